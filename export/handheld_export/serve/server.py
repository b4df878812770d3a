"""The server: KServe's data plane and endpoints, with gRPC beside them; run.py runs it.

KServe's own ``ModelServer`` is not used: it listens on every interface, opens endpoints that
load and unload models, gives its gRPC server neither TLS nor interceptors, runs gRPC in one
process only, and kills workers that take longer to load than five seconds.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Annotated, Any
from urllib.parse import unquote

import grpc
import orjson
from fastapi import APIRouter, FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from kserve import InferInput, InferRequest, InferResponse, ModelRepository
from kserve import errors as kserve_errors
from kserve.protocol.dataplane import DataPlane
from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import (
    add_GRPCInferenceServiceServicer_to_server,
)
from kserve.protocol.grpc.interceptors import ExceptionToStatusInterceptor
from kserve.protocol.grpc.servicer import InferenceServicer
from kserve.protocol.infer_type import RequestedOutput
from kserve.protocol.rest.v2_endpoints import V2Endpoints
from pydantic import BaseModel, Field, StrictBool, StrictInt, StrictStr, ValidationError
from starlette.exceptions import HTTPException

from handheld import __version__
from handheld.bundle import field_path
from handheld.errors import HandheldError
from handheld_export.serve import metrics
from handheld_export.serve.access import Access
from handheld_export.serve.errors import Refusal
from handheld_export.serve.guard import UNREAD, VERSION, Guard, Load
from handheld_export.serve.model import CALLER, CLIENT, TextModel
from handheld_export.serve.settings import Settings

_JSON_LENGTH = "inference-header-content-length"
_log = logging.getLogger("handheld.serve")
_Parameters = dict[str, StrictBool | StrictInt | float | StrictStr]


class _Input(BaseModel):
    name: StrictStr
    shape: Annotated[list[Annotated[StrictInt, Field(ge=0, lt=2**31)]], Field(max_length=4)]
    datatype: StrictStr
    parameters: _Parameters | None = None
    data: list[Any] | None = None


class _Output(BaseModel):
    name: StrictStr
    parameters: _Parameters | None = None


class _Request(BaseModel):
    id: StrictStr | None = None
    parameters: _Parameters | None = None
    inputs: Annotated[list[_Input], Field(max_length=16)]
    outputs: Annotated[list[_Output], Field(max_length=16)] | None = None


class TextDataPlane(DataPlane):  # type: ignore[misc]
    """KServe's data plane with a strict reader of requests and versions of models.

    KServe's own reader answers malformed requests with its internal errors.
    """

    def __init__(self, registry: ModelRepository, version: str) -> None:
        super().__init__(model_registry=registry)
        self._version = version

    def metadata(self) -> dict[str, Any]:
        """Return what the server is."""
        return {
            "name": "handheld",
            "version": __version__,
            "extensions": ["binary_tensor_data"],
        }

    async def ready(self) -> bool:
        """Tell whether requests will be answered."""
        return all(m.ready for m in self._model_registry.get_models().values())

    async def model_metadata(self, model_name: str) -> dict[str, Any]:
        """Return what a model takes and gives."""
        found = await super().model_metadata(model_name)
        return {**found, "versions": [self._version], "platform": "handheld_text"}

    def decode(
        self,
        body: Any,
        headers: dict[str, str],
        protocol_version: str = "v2",
        model_name: str | None = None,
    ) -> tuple[InferRequest, dict[str, Any]]:
        """Read a request's body.

        Raises
        ------
        Refusal
            If it is malformed.
        """
        length = headers.get(_JSON_LENGTH, "")
        if not isinstance(body, bytes) or not length.isascii() or not length.isdigit():
            raise Refusal(400, f"the header {_JSON_LENGTH} is not a number")
        if len(length) > 12 or (end := int(length)) > len(body):
            raise Refusal(400, f"the header {_JSON_LENGTH} is over the body's length")
        try:
            tree = orjson.loads(body[:end])
            request = _Request.model_validate(tree)
        except orjson.JSONDecodeError:
            raise Refusal(400, "the request is not JSON") from None
        except ValidationError as error:
            fault = error.errors(include_url=False, include_context=False, include_input=False)[0]
            where = field_path(fault["loc"]) or "the request"
            raise Refusal(400, f"{where}: {fault['msg']}") from None
        inputs = []
        for item in request.inputs:
            size = (item.parameters or {}).get("binary_data_size")
            data: Any = item.data
            if size is not None:
                if type(size) is not int or not 0 <= size <= len(body) - end or data is not None:
                    raise Refusal(400, f"input '{item.name[:64]}': the binary data is not there")
                raw = body[end : end + size]
                end += size
                data = strings(raw) if item.datatype == "BYTES" else [raw]
            elif data is None:
                raise Refusal(400, f"input '{item.name[:64]}' has no data")
            inputs.append(InferInput(item.name, list(item.shape), item.datatype, data))
        if end != len(body):
            raise Refusal(400, "bytes follow the request's data")
        asked = InferRequest(
            model_name=model_name,
            infer_inputs=inputs,
            request_id=request.id,
            parameters=request.parameters,
        )
        binary = asked.use_binary_outputs
        if request.outputs:
            asked.request_outputs = [
                RequestedOutput(o.name, {"binary_data": binary, **(o.parameters or {})})
                for o in request.outputs
            ]
        return asked, {}

    def encode(
        self,
        model_name: str,
        response: InferResponse,
        headers: dict[str, str],
        req_attributes: dict[str, Any],
    ) -> tuple[bytes, dict[str, str]]:
        """Write an answer's body."""
        try:
            body, size = response.to_rest()
        except kserve_errors.InvalidInput as error:
            raise Refusal(400, error.reason) from None
        if size is None:
            return orjson.dumps(body), {}
        return body, {_JSON_LENGTH: str(size)}


def strings(raw: bytes) -> list[bytes]:
    """Return the elements of a string tensor's bytes.

    Raises
    ------
    Refusal
        If a length goes over the end.
    """
    found, at = [], 0
    while at < len(raw):
        size = int.from_bytes(raw[at : at + 4], "little")
        if at + 4 + size > len(raw):
            raise Refusal(400, "a string's length goes over the end of the data")
        found.append(raw[at + 4 : at + 4 + size])
        at += 4 + size
    return found


class _Guarded(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Names clients, refuses calls that are not a text server's, and bounds time and memory.

    Calls have one message each way, but are served as if clients sent several: gRPC would wait
    for a call's only one before it tells of the call, without an end.
    """

    _PUBLIC = ("ServerLive", "ServerReady", "ServerMetadata")
    _CLOSED = ("RepositoryModelLoad", "RepositoryModelUnload")

    def __init__(self, access: Access, settings: Settings) -> None:
        self._access = access
        self._settings = settings
        self._load = Load()

    async def intercept_service(self, continuation: Callable[..., Any], details: Any) -> Any:
        """Let a call through, or not."""
        handler = await continuation(details)
        if handler is None:
            return None
        return grpc.stream_unary_rpc_method_handler(
            partial(self._call, details.method.rpartition("/")[2], handler.unary_unary),
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )

    async def _call(
        self, name: str, answering: Callable[..., Any], messages: Any, context: Any
    ) -> Any:
        started = time.perf_counter()
        status = "OK"
        try:
            try:
                CALLER.set(self._client(name, context))
                answer = await answering(await self._message(context), context)
                self._hold(answer.ByteSize(), context)
            except Refusal as refusal:
                await context.abort(refusal.status_code, refusal.reason)
            else:
                return answer
        except BaseException:
            code = context.code()
            status = code.name if isinstance(code, grpc.StatusCode) else "UNKNOWN"
            raise
        finally:
            seconds = time.perf_counter() - started
            metrics.REQUESTS.labels(f"grpc-{name}", status).inc()
            metrics.SECONDS.labels(f"grpc-{name}").observe(seconds)

    def _client(self, name: str, context: Any) -> str:
        peer = _address(context.peer())
        if name in self._CLOSED:
            raise Refusal(501, "models are not loaded by clients")
        if name in self._PUBLIC:
            return peer
        return self._access.client(dict(context.invocation_metadata() or ()), peer)

    async def _message(self, context: Any) -> Any:
        try:
            async with asyncio.timeout(self._settings.body_timeout):
                message = await context.read()
        except TimeoutError:
            raise Refusal(408, "the request took too long") from None
        if message is grpc.aio.EOF:
            raise Refusal(400, "there is no message")
        return message

    def _hold(self, size: int, context: Any) -> None:
        """Count an answer until it is sent."""
        if self._load.unread + size > self._settings.max_unread:
            raise Refusal(503, UNREAD)
        self._load.unread += size

        def sent(_: Any) -> None:
            self._load.unread -= size

        context.add_done_callback(sent)


def _address(peer: str) -> str:
    """Return the address in gRPC's name for who asks, which is ``ipv6:%5B::1%5D:PORT`` or so."""
    kind, _, rest = peer.partition(":")
    return unquote(rest.rpartition(":")[0]).strip("[]") if kind in ("ipv4", "ipv6") else peer


async def _start_grpc(settings: Settings, plane: TextDataPlane, access: Access) -> Any:
    most = settings.max_body
    server = grpc.aio.server(
        interceptors=(_Guarded(access, settings), ExceptionToStatusInterceptor()),
        options=[
            ("grpc.max_receive_message_length", most),
            ("grpc.max_send_message_length", -1),
            ("grpc.so_reuseport", 1),
            ("grpc.max_concurrent_streams", 64),
            ("grpc.max_connection_idle_ms", 65_000),
            # What a client does not read is given up with its connection.
            ("grpc.max_connection_age_ms", 600_000),
            ("grpc.max_connection_age_grace_ms", int(settings.send_timeout * 1e3)),
        ],
        maximum_concurrent_rpcs=settings.max_connections,
    )
    add_GRPCInferenceServiceServicer_to_server(InferenceServicer(plane, None), server)
    address = f"{_bracketed(settings.host)}:{settings.grpc_port}"
    if settings.tls_cert and settings.tls_key:
        pair = (settings.tls_key.read_bytes(), settings.tls_cert.read_bytes())
        server.add_secure_port(address, grpc.ssl_server_credentials([pair]))
    else:
        server.add_insecure_port(address)
    await server.start()
    return server


class _Stopping:
    """Stops gRPC when the signal comes: uvicorn drains HTTP first, and says so only then.

    Parameters
    ----------
    server : grpc.aio.Server or None
    seconds : float
        For calls in flight.
    """

    _SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self, server: Any, seconds: float) -> None:
        self._server = server
        self._seconds = seconds
        self._stopped: asyncio.Future[None] | None = None
        if server is None or threading.current_thread() is not threading.main_thread():
            return
        loop = asyncio.get_running_loop()
        for number in self._SIGNALS:
            before = signal.getsignal(number)

            def heard(number: int, frame: Any, before: Any = before) -> None:
                loop.call_soon_threadsafe(self._begin)
                if callable(before):
                    before(number, frame)

            signal.signal(number, heard)

    def _begin(self) -> None:
        if self._stopped is None and self._server is not None:
            self._stopped = asyncio.ensure_future(self._server.stop(self._seconds))

    async def wait(self) -> None:
        """Return when gRPC has stopped."""
        self._begin()
        if self._stopped is not None:
            await self._stopped


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


class _Embeddings:
    """The endpoint that caches between client and server can keep: prompts by GET."""

    def __init__(self, settings: Settings, model: TextModel) -> None:
        self._settings = settings
        self._model = model

    async def __call__(
        self,
        request: Request,
        model_name: str,
        prompt: str,
        prompt_2: str | None = None,
        clip_skip: Annotated[int | None, Query(ge=0)] = None,
        datatype: str = "FP16",
    ) -> Response:
        """Answer one prompt; the same bytes as by POST, in the same form."""
        model = self._model
        version = request.scope.get(VERSION)
        model.check_version(model_name, version)
        ask = model.ask([prompt], None if prompt_2 is None else [prompt_2], clip_skip, datatype)
        model.admit(ask, request.headers.get(CLIENT, ""))
        (name,) = model.keys(ask, await model.tokens(ask))
        headers = {"etag": f'W/"{name[:32]}"', "cache-control": self._control(version)}
        if name[:32] in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        rows, lengths = await model.answer(ask)
        payload = InferRequest(model.name, [], name[:32], parameters={"binary_data_output": True})
        body, size = model.respond(payload, rows, lengths).to_rest()
        headers[_JSON_LENGTH] = str(size)
        return Response(body, headers=headers, media_type="application/octet-stream")

    def _control(self, version: str | None) -> str:
        shared = self._settings.tokens is None or self._settings.public
        scope = "public" if shared else "private"
        if version is not None:
            return f"{scope}, max-age=31536000, immutable"
        return f"{scope}, max-age={self._settings.http_seconds}"


def application(settings: Settings) -> Guard:
    """Return the ASGI application of one worker."""
    access = Access(settings)
    model = TextModel(settings, access)
    registry = ModelRepository()
    registry.update(model)
    plane = TextDataPlane(registry, model.version)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        started = time.perf_counter()
        try:
            await model.load_in_thread()
            server = None
            if settings.grpc_port is not None:
                server = await _start_grpc(settings, plane, access)
        except HandheldError as error:
            _log.error("failed", extra={"event": "start-failed", "reason": str(error)})
            raise
        _log.info(
            "ready",
            extra={"event": "ready", "seconds": round(time.perf_counter() - started, 3)},
        )
        stopping = _Stopping(server, settings.drain)
        yield
        _log.info("draining", extra={"event": "draining"})
        await stopping.wait()
        await model.close()
        _log.info("stopped", extra={"event": "stopped"})

    app = FastAPI(
        title="handheld text encoders", version=__version__, docs_url=None, redoc_url=None,
        openapi_url=None, lifespan=lifespan,
    )  # fmt: skip
    app.include_router(_routes(plane))
    app.add_api_route(
        "/v2/models/{model_name}/embeddings", _Embeddings(settings, model).__call__,
        methods=["GET"], response_model=None,
    )  # fmt: skip
    _handle_errors(app)
    return Guard(app, settings, access, model.version)


def _routes(plane: TextDataPlane) -> APIRouter:
    """Return KServe's endpoints that a text server has."""
    ends = V2Endpoints(plane, None)
    router = APIRouter()
    for path, function in (
        ("/", plane.live),
        ("/metrics", _metrics),
        ("/v2", ends.metadata),
        ("/v2/health/live", ends.live),
        ("/v2/health/ready", ends.ready),
        ("/v2/models", ends.models),
        ("/v2/models/{model_name}", ends.model_metadata),
        ("/v2/models/{model_name}/ready", ends.model_ready),
    ):
        router.add_api_route(path, function, methods=["GET"])
    router.add_api_route(
        "/v2/models/{model_name}/infer", ends.infer, methods=["POST"], response_model=None
    )
    return router


async def _metrics() -> Response:
    body, kind = metrics.exposition()
    return Response(body, media_type=kind)


def _handle_errors(app: FastAPI) -> None:
    async def refuse(_: Request, error: Exception) -> JSONResponse:
        if isinstance(error, Refusal):
            return JSONResponse({"error": error.reason}, error.http_status, error.headers)
        if isinstance(error, RequestValidationError):
            fault = error.errors()[0]
            where = field_path(fault["loc"][1:]) or "the request"
            return JSONResponse({"error": f"{where}: {fault['msg']}"}, 400)
        if isinstance(error, HTTPException):
            return JSONResponse({"error": error.detail}, error.status_code, error.headers)
        status = 404 if isinstance(error, kserve_errors.ModelNotFound) else 503
        return JSONResponse({"error": str(error)}, status)

    for kind in (
        Refusal,
        RequestValidationError,
        HTTPException,
        kserve_errors.ModelNotFound,
        kserve_errors.ModelNotReady,
        kserve_errors.ServerNotReady,
        kserve_errors.ServerNotLive,
    ):
        app.add_exception_handler(kind, refuse)
