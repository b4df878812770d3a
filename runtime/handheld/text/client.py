"""Text encoders by API: a client that retries, hedges, caches and checks what it gets."""

from __future__ import annotations

import random
import re
import ssl
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote, urlsplit

import anyio
import httpx
import numpy as np
from anyio.from_thread import BlockingPortal
from numpy.typing import NDArray

from handheld.bundle import Bundle
from handheld.errors import TextServerError, UsageError
from handheld.manifest import TextInfo
from handheld.text import PromptEmbedding
from handheld.text.oip import (
    DATATYPES,
    JSON_LENGTH,
    Answer,
    AnswerError,
    Datatype,
    from_wire,
    read_answer,
    wire_dtype,
    write_request,
)
from handheld.text.store import Store

_RETRIED = {408, 425, 429, 500, 502, 503, 504}
_MAX_BODY = 256 * 2**20
_MAX_ERROR = 2**16
_LOCAL = ("localhost", "127.0.0.1", "::1")
_TOKEN = re.compile(r"[\x21-\x7e]+")


class _AgainError(Exception):
    """An attempt failed in a way that the next one may not."""

    def __init__(self, reason: str, after: float = 0.0) -> None:
        super().__init__(reason)
        self.after = after


class AsyncTextClient:
    """Asks a text server for embeddings.

    Parameters
    ----------
    url : str
        Of the server, for example ``https://text.example``.
    encoders_sha256 : str, optional
        Hash of the encoders that the answers must come from. It is part of every request's
        path, so a server with others refuses, and every answer is checked. Without it the
        hash of the first answer is held on to.
    text : TextInfo, optional
        Of a bundle; gives the hash, and the shapes that answers must have.
    model : str
        Name of the model on the server.
    token : str, optional
        Bearer token.
    deadline : float
        Seconds for an answer, over all attempts.
    attempt : float, optional
        Seconds for one attempt; a third of the deadline by default.
    hedge : float, optional
        Seconds after which a second request goes out if the first is not answered yet; the
        first answer counts. Costs the server double work on slow requests.
    datatype : Datatype
        How embeddings travel.
    store : Store, optional
        Where embeddings are kept on disk.
    get : bool
        Ask by GET, one request per prompt, so that caches on the way can answer. Puts prompts
        into URLs, which servers on the way may log.
    verify : bool or str
        Check the server's certificate; a path names the authorities' certificates.
    transport : httpx.AsyncBaseTransport, optional
        Instead of the network.

    Raises
    ------
    UsageError
        If the URL is not one of HTTP, or a token would travel in the clear to another machine.
    """

    def __init__(
        self,
        url: str,
        *,
        encoders_sha256: str | None = None,
        text: TextInfo | None = None,
        model: str = "text",
        token: str | None = None,
        deadline: float = 10.0,
        attempt: float | None = None,
        hedge: float | None = None,
        datatype: Datatype = "FP16",
        store: Store | None = None,
        get: bool = False,
        verify: bool | str = True,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._base = _checked_url(url, token)
        if datatype not in DATATYPES:
            raise UsageError(f"'{datatype}' is not a datatype", remedy=", ".join(DATATYPES))
        self.url = url
        self.model = model
        self.deadline = deadline
        self.datatype: Datatype = datatype
        self._text = text
        self._version = encoders_sha256 or (text.encoders_sha256 if text else None)
        self._attempt = attempt or deadline / 3
        self._hedge = hedge
        self._store = store
        self._get = get
        headers = {"accept": "application/octet-stream"}
        if token is not None:
            headers["authorization"] = f"Bearer {token}"
        self._http = httpx.AsyncClient(
            headers=headers,
            timeout=self._attempt,
            verify=_authorities(verify) if isinstance(verify, str) else verify,
            transport=transport,
            # What goes to this machine may be unencrypted: no proxy of the environment gets it.
            mounts={f"all://[{h}]" if ":" in h else f"all://{h}": None for h in _LOCAL},
            follow_redirects=False,
        )

    async def __aenter__(self) -> Self:
        """Return the client."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close the connections."""
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def version(self) -> str:
        """Return the hash of the encoders, which is asked of the server if it is not known.

        Raises
        ------
        TextServerError
            If the server does not tell within the deadline.
        """
        if self._version is None:
            response = await self._ask("GET", self._path(""), None, {})
            try:
                tree: Any = response.json()
                (version,) = tree["versions"]
                self._version = str(version)
            except (KeyError, TypeError, ValueError, RecursionError):
                raise TextServerError(
                    "the server does not tell which text encoders it has",
                    path=self.url,
                    remedy="name a server that `handheld serve-text` runs",
                ) from None
        return self._version

    async def encode(
        self,
        prompts: Sequence[str],
        prompts_2: Sequence[str] | None = None,
        clip_skip: int | None = None,
    ) -> list[PromptEmbedding]:
        """Return the embeddings of prompts, from disk or the server.

        Parameters
        ----------
        prompts : sequence of str
        prompts_2 : sequence of str, optional
            For the second encoder; ``prompts`` by default.
        clip_skip : int, optional
            As in diffusers.

        Returns
        -------
        list of PromptEmbedding
            One per prompt; see :attr:`PromptEmbedding.truncated`.

        Raises
        ------
        TextServerError
            If there is no right answer within the deadline.
        """
        if prompts_2 is not None and len(prompts_2) != len(prompts):
            raise UsageError("there must be as many second prompts as prompts")
        for prompt in (*prompts, *(prompts_2 or ())):
            try:
                prompt.encode()
            except UnicodeEncodeError:
                raise UsageError(
                    "a prompt holds half of a surrogate pair, which is no character",
                    remedy="decode the prompt as UTF-8",
                ) from None
        started = time.monotonic()
        version = self._version or await self.version()
        seconds: Sequence[str | None] = prompts_2 or [None] * len(prompts)
        pairs = list(dict.fromkeys(zip(prompts, seconds, strict=True)))
        found: dict[tuple[str, str | None], PromptEmbedding] = {}
        paths = {}
        if self._store is not None:
            for pair in pairs:
                paths[pair] = self._store.path(version, *pair, clip_skip, self.datatype)
                row = self._store.get(paths[pair])
                if row is not None and self._fault(row) is None:
                    found[pair] = row
        lacking = [p for p in pairs if p not in found]
        groups = [[p] for p in lacking] if self._get else [lacking] if lacking else []
        for group in groups:
            left = max(0.0, self.deadline - (time.monotonic() - started))
            rows = await self._fetch(group, clip_skip, version, left)
            for pair, row in zip(group, rows, strict=True):
                found[pair] = row
                if self._store is not None:
                    self._store.put(paths[pair], row)
        return [found[pair] for pair in zip(prompts, seconds, strict=True)]

    async def _fetch(
        self,
        pairs: Sequence[tuple[str, str | None]],
        clip_skip: int | None,
        version: str,
        seconds: float,
    ) -> list[PromptEmbedding]:
        if self._get:
            ((prompt, prompt_2),) = pairs
            query = {"prompt": prompt, "prompt_2": prompt_2, "clip_skip": clip_skip}
            given = {k: v for k, v in query.items() if v is not None}
            path = self._path(f"/versions/{version}/embeddings")
            path = f"{path}?{httpx.QueryParams({**given, 'datatype': self.datatype})}"
            response = await self._ask("GET", path, None, {}, seconds)
        else:
            second = None if pairs[0][1] is None else [p or "" for _, p in pairs]
            body, end = write_request(
                [p for p, _ in pairs], second, clip_skip=clip_skip, datatype=self.datatype
            )
            headers = {JSON_LENGTH: str(end), "content-type": "application/octet-stream"}
            path = self._path(f"/versions/{version}/infer")
            response = await self._ask("POST", path, body, headers, seconds)
        try:
            answer = read_answer(response.content, response.headers.get(JSON_LENGTH))
            return self._read(answer, version, len(pairs))
        except AnswerError as error:
            error.path = self.url
            raise

    def _path(self, rest: str) -> str:
        return f"{self._base}/v2/models/{quote(self.model, safe='')}{rest}"

    def _read(self, answer: Answer, version: str, count: int) -> list[PromptEmbedding]:
        for told in (answer.version, answer.parameters.get("encoders_sha256")):
            if told != version:
                raise TextServerError(
                    f"answered with other text encoders ({str(told)[:12]}) than those asked for "
                    f"({version[:12]})",
                    path=self.url,
                    field="encoders_sha256",
                    remedy="name a server of the checkpoint that the bundle was exported from",
                )
        for name in ("prompt_embeds", "pooled"):
            value = answer.tensors.get(name)
            if value is not None and value.dtype != wire_dtype(self.datatype):
                raise AnswerError(f"output '{name}' is {value.dtype}, not {self.datatype}")
        embeds = from_wire("prompt_embeds", answer.tensors)
        pooled = from_wire("pooled", answer.tensors)
        tokens = answer.tensors.get("tokens")
        if (
            embeds is None
            or embeds.ndim != 3
            or len(embeds) != count
            or (pooled is not None and (pooled.ndim != 2 or len(pooled) != count))
            or tokens is None
            or tokens.dtype.kind != "i"
            or tokens.ndim != 2
            or len(tokens) != count
        ):
            raise AnswerError("the answer lacks outputs, or they have other shapes than asked for")
        rows = [
            PromptEmbedding(
                embeds[i],
                None if pooled is None else pooled[i],
                tuple(int(n) for n in tokens[i]),
            )
            for i in range(count)
        ]
        for row in rows:
            if (fault := self._fault(row)) is not None:
                raise AnswerError(fault)
        return rows

    def _fault(self, row: PromptEmbedding) -> str | None:
        """Return what is wrong with an embedding, None if nothing is."""
        values: list[NDArray[np.float32]] = [row.prompt_embeds]
        values += [] if row.pooled is None else [row.pooled]
        if not all(np.isfinite(v).all() for v in values):
            return "the embeddings are not finite"
        if self._text is None:
            return None
        wanted = (self._text.tokens, self._text.width)
        if row.prompt_embeds.shape != wanted:
            return (
                f"prompt_embeds is of shape {list(row.prompt_embeds.shape)}, the bundle wants "
                f"{list(wanted)}"
            )
        have = None if row.pooled is None else len(row.pooled)
        if self._text.pooled_width not in (None, have):
            return f"pooled has {have} values, the bundle wants {self._text.pooled_width}"
        return None

    async def _ask(
        self,
        method: str,
        url: str,
        body: bytes | None,
        headers: dict[str, str],
        seconds: float | None = None,
    ) -> httpx.Response:
        """Ask until there is an answer, the deadline passes, or asking again cannot help."""
        limit = self.deadline if seconds is None else seconds
        last, tries = "the server did not answer", 0
        with anyio.move_on_after(limit) as scope:
            while True:
                try:
                    return await self._hedged(method, url, body, headers)
                except _AgainError as error:
                    last = str(error)
                    # Full jitter: clients that failed together do not come back together.
                    wait = random.uniform(0, min(2.0, 0.1 * 2**tries))  # noqa: S311
                    tries += 1
                    wait = max(wait, error.after)
                    if wait >= scope.deadline - anyio.current_time():
                        break
                    await anyio.sleep(wait)
        raise TextServerError(
            f"no answer within {self.deadline:g} s: {last}",
            path=self.url,
            remedy="check that the server runs and can be reached",
        )

    async def _hedged(
        self, method: str, url: str, body: bytes | None, headers: dict[str, str]
    ) -> httpx.Response:
        if self._hedge is None:
            return await self._once(method, url, body, headers)
        outcomes: list[httpx.Response | _AgainError] = []
        refused: list[TextServerError] = []
        sent = 0

        async def attempt(delay: float) -> None:
            nonlocal sent
            try:
                await anyio.sleep(delay)
                sent += 1
                outcomes.append(await self._once(method, url, body, headers))
                group.cancel_scope.cancel()
            except _AgainError as error:
                outcomes.append(error)
                if sent == 1:
                    # Failed before the hedge was due: whether to ask again is the caller's.
                    group.cancel_scope.cancel()
            except TextServerError as error:
                refused.append(error)
                group.cancel_scope.cancel()

        async with anyio.create_task_group() as group:
            group.start_soon(attempt, 0.0)
            group.start_soon(attempt, self._hedge)
        for outcome in outcomes:
            if isinstance(outcome, httpx.Response):
                return outcome
        if refused:
            raise refused[0]
        raise next(o for o in outcomes if isinstance(o, _AgainError))

    async def _once(
        self, method: str, url: str, body: bytes | None, headers: dict[str, str]
    ) -> httpx.Response:
        try:
            with anyio.fail_after(self._attempt):
                request = self._http.build_request(method, url, content=body, headers=headers)
                response = await self._http.send(request, stream=True)
                try:
                    content = await _bounded(response)
                finally:
                    await response.aclose()
        except (httpx.TransportError, TimeoutError) as error:
            reason = str(error) or type(error).__name__
            if isinstance(error, TimeoutError):
                reason = f"nothing came within {self._attempt:g} s"
            raise _AgainError(reason) from None
        except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError) as error:
            raise TextServerError(
                f"cannot be asked: {type(error).__name__}", path=self.url, remedy="check the URL"
            ) from None
        whole = httpx.Response(
            response.status_code, headers=_plain(response), content=content, request=request
        )
        if whole.status_code == 200:
            return whole
        reason = f"HTTP {whole.status_code}: {_reason(whole)}"
        if whole.status_code in _RETRIED:
            raise _AgainError(reason, _retry_after(whole))
        raise self._refused(whole, reason)

    def _refused(self, response: httpx.Response, reason: str) -> TextServerError:
        remedies = {
            401: "set HANDHELD_TEXT_TOKEN to a valid token",
            403: "ask for something else",
            404: "name a server of the checkpoint that the bundle was exported from",
        }
        if response.is_redirect:
            return TextServerError(
                f"sends elsewhere: {reason}", path=self.url, remedy="name the right URL"
            )
        return TextServerError(
            f"refused: {reason}", path=self.url, remedy=remedies.get(response.status_code)
        )


class TextClient:
    """:class:`AsyncTextClient` for programs without an event loop; safe to share by threads.

    Takes the same parameters. Is a :class:`~handheld.text.TextEncoder`.
    """

    def __init__(self, url: str, **options: Any) -> None:
        self._client = AsyncTextClient(url, **options)
        started: Future[BlockingPortal] = Future()
        # A daemon: a program that ends without closing its client must not wait for it.
        self._thread = threading.Thread(
            target=_run_portal, args=(started,), name="text-client", daemon=True
        )
        self._thread.start()
        self._portal = started.result()

    @classmethod
    def for_bundle(cls, url: str, bundle: Bundle, **options: Any) -> TextClient:
        """Return a client whose answers must fit a bundle."""
        return cls(url, text=bundle.manifest.text, **options)

    def __enter__(self) -> Self:
        """Return the client."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the connections."""
        self.close()

    def close(self) -> None:
        """Close the connections and stop the thread."""
        if self._thread.is_alive():
            self._portal.call(self._client.aclose)
            self._portal.call(self._portal.stop)
            self._thread.join()

    @property
    def encoders_sha256(self) -> str:
        """Hash of the encoders that answers come from."""
        return self._portal.call(self._client.version)

    def encode(
        self,
        prompts: Sequence[str],
        prompts_2: Sequence[str] | None = None,
        clip_skip: int | None = None,
    ) -> list[PromptEmbedding]:
        """Return the embeddings of prompts; see :meth:`AsyncTextClient.encode`."""
        return self._portal.call(self._client.encode, prompts, prompts_2, clip_skip)


def _run_portal(started: Future[BlockingPortal]) -> None:
    async def serve() -> None:
        async with BlockingPortal() as portal:
            started.set_result(portal)
            await portal.sleep_until_stopped()

    anyio.run(serve)


def _checked_url(url: str, token: str | None) -> str:
    try:
        parts = urlsplit(url)
        _ = parts.port, httpx.URL(url)
    except (ValueError, httpx.InvalidURL):
        parts = urlsplit("")
    if token is not None and not _TOKEN.fullmatch(token):
        raise UsageError(
            "the token holds spaces, line breaks or other characters that a header cannot",
            field="HANDHELD_TEXT_TOKEN",
            remedy="give the token alone, as  handheld serve-text --new-token  printed it",
        )
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.username:
        raise UsageError(
            f"'{url}' is not the URL of a server", remedy="name one like https://text.example"
        )
    local = parts.hostname in _LOCAL
    if token is not None and parts.scheme == "http" and not local:
        raise UsageError(
            "a token would travel unencrypted", path=url, remedy="use https, or no token"
        )
    return url.rstrip("/")


def _authorities(path: str) -> ssl.SSLContext:
    try:
        found = Path(path)
        folder = found.is_dir()
        return ssl.create_default_context(
            cafile=None if folder else path, capath=path if folder else None
        )
    except (OSError, ssl.SSLError) as error:
        raise UsageError(
            f"holds no authorities' certificates: {error.strerror or error}",
            path=path,
            remedy="name a PEM file or a folder of hashed ones",
        ) from None


async def _bounded(response: httpx.Response) -> bytes:
    most = _MAX_BODY if response.status_code == 200 else _MAX_ERROR
    found = bytearray()
    async for part in response.aiter_bytes():
        found += part
        if len(found) > most:
            if response.status_code != 200:
                break
            raise AnswerError(f"the answer is over {most} bytes")
    return bytes(found)


def _plain(response: httpx.Response) -> dict[str, str]:
    """Return the headers without those that describe the body's encoding, which is undone."""
    dropped = ("content-encoding", "content-length", "transfer-encoding")
    return {k: v for k, v in response.headers.items() if k not in dropped}


def _reason(response: httpx.Response) -> str:
    try:
        reason = response.json()["error"]
    except (ValueError, KeyError, TypeError, RecursionError):
        reason = response.reason_phrase
    return " ".join(str(reason)[:200].split())


def _retry_after(response: httpx.Response) -> float:
    value = response.headers.get("retry-after", "")
    return float(value) if value.isascii() and value.isdigit() and len(value) < 6 else 0.0
