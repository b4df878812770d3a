"""What stands before KServe's endpoints: limits of time and size, tokens, a log line each.

Only the routes that a text server needs are open. A request that gets through has its body
read, in time and in bounds, and its client named.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
import weakref
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from handheld_export.serve import metrics
from handheld_export.serve.access import Access
from handheld_export.serve.errors import Refusal
from handheld_export.serve.model import CLIENT
from handheld_export.serve.settings import Settings

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

VERSION = "handheld.version"
"""Key of an ASGI scope: the version that a path named."""
JSON_LENGTH = b"inference-header-content-length"
_OPEN = {
    "/": "live",
    "/v2": "metadata",
    "/v2/health/live": "live",
    "/v2/health/ready": "ready",
    "/v2/models": "models",
    "/metrics": "metrics",
}
_MODEL = re.compile(
    r"(?P<base>/v2/models/(?P<model>[^/]+))(?:/versions/(?P<version>[^/]+))?"
    r"(?P<rest>|/ready|/infer|/embeddings)"
)
_PUBLIC = {"live", "ready", "metrics", "metadata"}
_DISCARD_BYTES, _DISCARD_SECONDS = 16 * 2**20, 2.0
_PIECE = 2**17
_FED = 2**14
_HEADER_COST = 32
"""Bytes that a header counts for beside its own: a short one takes more memory than it has."""
UNREAD = "too many answers wait to be read"
ABORT = "handheld.abort"
"""Key of an ASGI scope: a function that drops the connection with what it has not sent."""
_log = logging.getLogger("handheld.serve")


class Guard:
    """ASGI middleware.

    Parameters
    ----------
    app : ASGI application
    settings : Settings
    access : Access
    version : str
        Hash of the encoders.
    """

    def __init__(self, app: App, settings: Settings, access: Access, version: str) -> None:
        self._app = app
        self._settings = settings
        self._access = access
        self._version = version
        self._load = Load()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Handle one connection's scope."""
        if scope["type"] == "http":
            await self._request(scope, receive, send)
        elif scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    async def _request(self, scope: Message, receive: Receive, send: Send) -> None:
        started = time.perf_counter()
        reply = _Reply(send, self._load, self._settings.send_timeout)
        gone, receive = receive, _once(receive)
        route, client = "unknown", "-"
        admitted = False
        try:
            try:
                route = self._route(scope)
                client = self._client(scope, route)
                if route not in _PUBLIC:
                    self._admit()
                    admitted = True
                    reply.most = self._settings.max_unread
                most = 0 if route in _PUBLIC else self._settings.max_body
                body = await self._body(scope, receive, most)
                await self._app(scope, _replay(body, gone), reply)
            except _UnreadError:
                raise
            except Refusal as refusal:
                if not reply.started:
                    if refusal.http_status != 408:
                        await _discard(receive)
                    await reply.refuse(refusal)
            except Exception as error:
                _log_failure(error)
                if not reply.started:
                    await reply.refuse(Refusal(500, "internal error"))
        except _UnreadError:
            # Closing would wait until the client reads the rest.
            scope.get(ABORT, lambda: None)()
        finally:
            self._load.requests -= admitted
            seconds = time.perf_counter() - started
            metrics.REQUESTS.labels(route, str(reply.status)).inc()
            metrics.SECONDS.labels(route).observe(seconds)
            if route not in _PUBLIC:
                _log.info(
                    "request",
                    extra={
                        "event": "request",
                        "route": route,
                        "status": reply.status,
                        "ms": round(seconds * 1e3, 3),
                        "client": client,
                    },
                )

    def _admit(self) -> None:
        if self._load.requests >= self._settings.max_connections:
            raise Refusal(503, "too many requests at once", 1.0)
        if self._load.unread > self._settings.max_unread:
            raise Refusal(503, UNREAD, 1.0)
        self._load.requests += 1

    def _route(self, scope: Message) -> str:
        """Return what a path is called in metrics; strip its version."""
        path = scope["path"]
        if not path.endswith("/embeddings"):
            # KServe's endpoints take a version from here, and fail at it.
            scope["query_string"] = b""
        if path in _OPEN:
            return _OPEN[path]
        match = _MODEL.fullmatch(path)
        if match is None:
            raise Refusal(404, "there is nothing at this path")
        if match["version"] is not None:
            if match["version"] != self._version:
                raise Refusal(404, "there are other text encoders here than that version")
            scope["path"] = match["base"] + match["rest"]
            scope["raw_path"] = scope["path"].encode()
        scope[VERSION] = match["version"]
        return match["rest"].lstrip("/") or "model"

    def _client(self, scope: Message, route: str) -> str:
        headers = scope["headers"]
        peer = scope["client"][0] if scope.get("client") else "-"
        values = {k.decode("latin-1"): v.decode("latin-1") for k, v in headers}
        client = peer if route in _PUBLIC else self._access.client(values, peer)
        scope["headers"] = [(k, v) for k, v in headers if k != CLIENT.encode()]
        scope["headers"].append((CLIENT.encode(), client.encode("latin-1", "replace")))
        return client

    async def _body(self, scope: Message, receive: Receive, most: int) -> bytes:
        """Read a body, and say what it is in the way that KServe's endpoint goes by."""
        headers = dict(scope["headers"])
        if headers.get(b"content-encoding", b"identity").lower() not in (b"", b"identity"):
            raise Refusal(415, "compressed bodies are not read")
        length = headers.get(b"content-length", b"")
        if length.isdigit() and int(length) > most:
            raise Refusal(413, f"the body is over {most} bytes")
        body = bytearray()
        try:
            async with asyncio.timeout(self._settings.body_timeout):
                while True:
                    message = await receive()
                    if message["type"] != "http.request":
                        raise Refusal(408, "the client went away")
                    body += message.get("body", b"")
                    if len(body) > most:
                        raise Refusal(413, f"the body is over {most} bytes")
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            raise Refusal(408, "the body took too long") from None
        if scope["method"] == "POST":
            dropped = (b"content-type", b"transfer-encoding", b"content-length", JSON_LENGTH)
            end = headers.get(JSON_LENGTH, str(len(body)).encode())
            # Cloud events are not read: their headers would change how the body is.
            kept = [
                (k, v) for k, v in scope["headers"] if k not in dropped and not k.startswith(b"ce-")
            ]
            scope["headers"] = [
                *kept,
                (b"content-type", b"application/octet-stream"),
                (b"content-length", str(len(body)).encode()),
                (JSON_LENGTH, end),
            ]
        return bytes(body)


def _once(receive: Receive) -> Receive:
    """Remember that a body has ended, since to ask again would wait for the client to leave."""
    ended = False

    async def receiving() -> Message:
        nonlocal ended
        if ended:
            return {"type": "http.request", "body": b"", "more_body": False}
        message = await receive()
        ended = message["type"] != "http.request" or not message.get("more_body", False)
        return message

    return receiving


def _replay(body: bytes, receive: Receive) -> Receive:
    sent = False

    async def replayed() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed


async def _discard(receive: Receive) -> None:
    """Read what is still to come of a body, for a while.

    A connection that is closed with bytes unread is reset, and the answer is lost with it.
    """
    left = _DISCARD_BYTES
    try:
        async with asyncio.timeout(_DISCARD_SECONDS):
            while left > 0:
                message = await receive()
                left -= len(message.get("body", b""))
                if message["type"] != "http.request" or not message.get("more_body", False):
                    return
    except TimeoutError:
        return


class _UnreadError(Exception):
    """A client did not read its answer in time."""


def _log_failure(error: Exception) -> None:
    """Log an error's kind and place; its message may quote a prompt."""
    where = error.__traceback__
    while where is not None and where.tb_next is not None:
        where = where.tb_next
    place = where.tb_frame.f_code.co_qualname if where is not None else None
    _log.error("failed", extra={"event": "error", "error": type(error).__name__, "where": place})


@dataclass
class Load:
    """What a worker has at hand, by one protocol."""

    requests: int = 0
    unread: int = 0
    """Bytes of answers that are being sent."""


class _Reply:
    """Sends an answer with its length and type, as fast as it is read and within a time.

    The transport keeps whatever it is given, so it is given no more than it can soon send, and
    the answer ends when the transport has sent it all.

    Attributes
    ----------
    most : int or None
        Bytes of answers that may be being sent at once; an answer that goes over is refused.
    """

    def __init__(self, send: Send, load: Load, seconds: float) -> None:
        self._send = send
        self._load = load
        self._seconds = seconds
        self._start: Message | None = None
        self._refused = False
        self.most: int | None = None
        self.started = False
        self.status = 0

    async def __call__(self, message: Message) -> None:
        if self._refused:
            return
        if message["type"] == "http.response.start":
            self._start = message
            self.status = message["status"]
            return
        body = message.get("body", b"")
        if self._start is not None:
            if self.most is not None and self._load.unread + len(body) > self.most:
                self._refused = True
                await self.refuse(Refusal(503, UNREAD, 1.0))
                return
            start, self._start = self._start, None
            names = {k.lower() for k, _ in start["headers"]}
            whole = not message.get("more_body", False)
            headers = list(start["headers"])
            if whole and b"content-length" not in names and start["status"] not in (204, 304):
                headers.append((b"content-length", str(len(body)).encode()))
            if b"content-type" not in names and start["status"] not in (204, 304):
                binary = JSON_LENGTH in names
                kind = b"application/octet-stream" if binary else b"application/json"
                headers.append((b"content-type", kind))
            await self._whole({**start, "headers": headers}, body, message.get("more_body", False))
        else:
            await self._whole(None, body, message.get("more_body", False))

    async def _whole(self, start: Message | None, body: bytes, more: bool) -> None:
        """Send an answer, or a part of one; return when the transport has no more of it."""
        self.started = True
        self._load.unread += len(body)
        part = {"type": "http.response.body", "more_body": True}
        try:
            async with asyncio.timeout(self._seconds):
                if start is not None:
                    await self._send(start)
                for at in range(0, len(body), _PIECE):
                    await self._send({**part, "body": body[at : at + _PIECE]})
                # Sending nothing waits until the transport has sent what it was given.
                await self._send({**part, "body": b"", "more_body": more})
        except TimeoutError:
            raise _UnreadError from None
        finally:
            self._load.unread -= len(body)

    async def refuse(self, refusal: Refusal) -> None:
        """Answer with a refusal, and close the connection if its body was not read."""
        self.status = refusal.http_status
        headers = {"content-type": "application/json", **refusal.headers}
        if refusal.http_status in (401, 404, 408, 413, 415):
            headers["connection"] = "close"
        body = json.dumps({"error": refusal.reason}).encode()
        headers["content-length"] = str(len(body))
        start = {
            "type": "http.response.start",
            "status": refusal.http_status,
            "headers": [(k.encode(), v.encode()) for k, v in headers.items()],
        }
        await self._whole(start, body, False)


class _DroppedError(Exception):
    """Stops the parser."""


class Protocol(HttpToolsProtocol):
    """uvicorn's HTTP, with limits on headers, on requests sent ahead, and on unread bytes.

    Without them, connections that send a byte now and then, or read none, are kept for ever, and
    requests sent ahead fill the memory.
    """

    max_header_bytes = 2**16
    """Of a request, its trailers with it; requests that wait for their turn share it."""
    max_ahead = 16
    """Requests that may be sent before the one in hand is answered."""
    _timer: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None
    _began = 0.0
    _header_bytes = 0
    _held = 0
    """Bytes that the parser took since it last gave something."""
    _dropped = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the first request; make room if there are too many connections."""
        super().connection_made(transport)
        self._cycles: weakref.WeakSet[Any] = weakref.WeakSet()
        # Writing is paused while anything is unsent, also on a connection that is being closed.
        transport.set_write_buffer_limits(high=1)
        application: Any = self.config.app
        if len(self.connections) > application.settings.max_connections:
            self._make_room(2 * application.settings.max_connections)
        self._expect()

    def _make_room(self, most: int) -> None:
        """Drop a connection that rests or, at `most`, the one whose client takes longest."""
        others = [c for c in self.connections if c is not self and isinstance(c, Protocol)]
        for other in others:
            if other.is_resting():
                other._drop()
                return
        if len(self.connections) > most:
            waiting = [c for c in others if c.waits_for_client()]
            min(waiting, key=lambda c: c._began, default=self)._drop()

    def _abandon(self, cycle: Any) -> None:
        self._drop()
        # uvicorn knows only the last request's, and would miss the end of this one's answer.
        cycle.disconnected = True

    def _drop(self) -> None:
        self._dropped = True
        self._forget()
        self.transport.abort()

    def is_resting(self) -> bool:
        """Tell whether the last request was answered and the next has not begun."""
        return self._timer is None and self.pipeline_idle() and not self._dropped

    def waits_for_client(self) -> bool:
        """Tell whether a request is still to come, or an answer to be read."""
        reading = self._timer is not None or (not self.pipeline_idle() and self.cycle.more_body)
        return not self._dropped and (reading or self._unread is not None)

    def pipeline_idle(self) -> bool:
        """Tell whether no request is being read or answered."""
        return self.cycle is None or self.cycle.response_complete

    def data_received(self, data: bytes) -> None:
        """Read what came, and begin to wait if a request has begun."""
        if self._timer is None and self.pipeline_idle():
            self._expect()
        # The parser keeps a header to itself until it is whole, so it gets no more than a piece.
        for at in range(0, len(data), _FED):
            if self._dropped or self.transport.is_closing():
                return
            piece = data[at : at + _FED]
            self._held += len(piece)
            super().data_received(piece)
            if self._held > self.max_header_bytes:
                self._refuse_head()

    def on_message_begin(self) -> None:
        """Begin to count a request's headers."""
        super().on_message_begin()
        if not self.pipeline:
            self._header_bytes = 0

    def on_url(self, url: bytes) -> None:
        """Take a part of a path."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header, or a trailer."""
        self._count(len(name) + len(value) + _HEADER_COST)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Stop waiting; take the request, unless too many were sent ahead."""
        if len(self.pipeline) >= self.max_ahead:
            self._drop()
            raise _DroppedError
        self._held = 0
        self._forget()
        super().on_headers_complete()
        scope: Any = self.scope
        scope[ABORT] = partial(self._abandon, self.cycle)
        self._cycles.add(self.cycle)

    def on_body(self, body: bytes) -> None:
        """Take a part of a body."""
        self._held = 0
        super().on_body(body)

    def send_400_response(self, msg: str) -> None:
        """Answer what is no request, unless the parser was stopped because of its size."""
        if not self._dropped:
            super().send_400_response(msg)

    def _count(self, size: int) -> None:
        self._held = 0
        self._header_bytes += size
        if self._header_bytes > self.max_header_bytes:
            self._refuse_head()
            raise _DroppedError

    def _refuse_head(self) -> None:
        """Give up on a connection, with an answer unless others are due before it."""
        if self._timer is None:
            self._drop()
        else:
            self._give_up(b"431 Request Header Fields Too Large")

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        self._forget()
        # uvicorn knows the last request only, and would miss the end of an earlier answer.
        for cycle in self._cycles:
            cycle.disconnected = True
        self.resume_writing()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Begin to wait for the client to read."""
        super().pause_writing()
        if self._unread is None:
            application: Any = self.config.app
            seconds = application.settings.send_timeout
            self._unread = self.loop.call_later(seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """Stop waiting for the client to read."""
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _expect(self) -> None:
        self._began = self.loop.time()
        application: Any = self.config.app
        seconds = application.settings.header_timeout
        self._timer = self.loop.call_later(seconds, self._give_up, b"408 Request Timeout")

    def _forget(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self, status: bytes) -> None:
        self._dropped = True
        self._forget()
        if self.transport is not None and not self.transport.is_closing():
            self.transport.write(
                b"HTTP/1.1 " + status + b"\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
            )
            self.transport.close()
