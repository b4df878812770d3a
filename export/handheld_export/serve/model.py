"""The text encoders as a model of KServe: prompts in, embeddings out."""

from __future__ import annotations

import asyncio
import struct
import uuid
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from kserve import InferInput, InferOutput, InferRequest, InferResponse, Model
from kserve.errors import InvalidInput, ModelNotFound
from kserve.protocol.infer_type import to_http_parameters
from numpy.typing import NDArray

from handheld.text import PromptEmbedding
from handheld.text.oip import Datatype, to_wire
from handheld_export.serve import metrics
from handheld_export.serve.access import Access
from handheld_export.serve.batching import Batcher
from handheld_export.serve.cache import MemoryCache, RedisCache, Row, key
from handheld_export.serve.errors import Refusal
from handheld_export.serve.settings import Settings
from handheld_export.text import LocalTextEncoder, Tokens

CLIENT = "x-handheld-client"
"""Header in which the guard hands on who asks; what a client puts there is dropped."""
CALLER: ContextVar[str] = ContextVar("caller")
"""Who asks by gRPC."""
_WIRE = {"<f4": "FP32", "<f2": "FP16", "|i1": "INT8", "<i4": "INT32"}
_INLINE_BYTES = 2048
"""Prompts up to this size are turned into tokens faster than a thread is asked to."""
_JSON_VALUES = 2**18
"""Numbers that an answer may hold as JSON, which is written while nobody else is answered."""


@dataclass(frozen=True)
class Ask:
    """A valid request."""

    prompts: Sequence[str]
    prompts_2: Sequence[str] | None
    clip_skip: int | None
    datatype: Datatype


def encoder(settings: Settings) -> LocalTextEncoder:
    """Return the encoders that a server runs.

    Raises
    ------
    CheckpointError
        If the checkpoint has no text encoders.
    """
    if settings.backend == "onnxruntime":
        from handheld_export.serve.onnx import OnnxTextEncoder

        return OnnxTextEncoder(settings.checkpoint, threads=settings.threads)
    return LocalTextEncoder(settings.checkpoint, device=settings.device, dtype=settings.dtype)


class TextModel(Model):  # type: ignore[misc]
    """Text encoders behind KServe's data plane.

    Parameters
    ----------
    settings : Settings
    access : Access
    """

    def __init__(self, settings: Settings, access: Access) -> None:
        super().__init__(settings.model)
        self.settings = settings
        self.encoder = encoder(settings)
        self.version = self.encoder.encoders_sha256
        self._access = access
        self._templates: dict[Datatype, dict[str, tuple[tuple[int, ...], np.dtype[Any]]]] = {}
        self._memory = MemoryCache(settings.cache)
        self._redis = RedisCache(settings.redis, settings.redis_seconds) if settings.redis else None
        self._batcher = Batcher(
            self.encoder.run,
            max_batch=settings.max_batch,
            wait=settings.batch_wait,
            max_queue=settings.max_queue,
        )

    def load(self) -> bool:
        """Load the encoders and run them once on one prompt and once on a full batch."""
        if self.settings.backend == "torch" and self.settings.device == "cpu":
            import torch

            torch.set_num_threads(self.settings.threads)
        self.encoder.load()
        for count in {1, self.settings.max_batch}:
            self.encoder.run(self.encoder.tokenize(["warm-up"] * count))
        self.ready = True
        return True

    async def load_in_thread(self) -> None:
        """Load in the thread in which batches will run, since torch's settings belong to it."""
        await asyncio.get_running_loop().run_in_executor(self._batcher.thread, self.load)

    async def close(self) -> None:
        """Let go of threads and connections."""
        self.ready = False
        if self._redis is not None:
            await self._redis.close()
        await asyncio.to_thread(self._batcher.close)

    def get_input_types(self) -> list[dict[str, Any]]:
        """Return the inputs, for the model's metadata."""
        names = ["prompt", "prompt_2"][: len(self.encoder.configs)]
        return [{"name": n, "datatype": "BYTES", "shape": [-1]} for n in names]

    def get_output_types(self) -> list[dict[str, Any]]:
        """Return the outputs, for the model's metadata."""
        encoder = self.encoder
        shape = [-1, encoder.length, encoder.width]
        found = [{"name": "prompt_embeds", "datatype": "FP32", "shape": shape}]
        if encoder.pooled_width is not None:
            found.append(
                {"name": "pooled", "datatype": "FP32", "shape": [-1, encoder.pooled_width]}
            )
        count = len(encoder.configs)
        return [*found, {"name": "tokens", "datatype": "INT32", "shape": [-1, count]}]

    async def predict(
        self,
        payload: InferRequest,
        headers: Mapping[str, str] | None = None,
        response_headers: dict[str, str] | None = None,
    ) -> InferResponse:
        """Answer a request of KServe's data plane.

        Raises
        ------
        Refusal
            If it is not valid, not allowed, or takes too long.
        """
        if payload.from_grpc:
            client = CALLER.get()
            if payload.model_version not in (None, "", self.version):
                raise Refusal(404, "there are other text encoders here than that version")
            if not self.ready:
                raise Refusal(503, "the encoders are not loaded", 1.0)
        else:
            client = (headers or {}).get(CLIENT, "")
        ask = self.read(payload)
        if not payload.from_grpc and _as_json(payload, "prompt_embeds"):
            values = len(ask.prompts) * self.encoder.length * self.encoder.width
            if values > _JSON_VALUES and len(ask.prompts) > 1:
                raise Refusal(400, "ask for so many prompts with the parameter binary_data_output")
        self.admit(ask, client)
        rows, lengths = await self.answer(ask)
        return self.respond(payload, rows, lengths)

    def read(self, payload: InferRequest) -> Ask:
        """Check a request.

        Raises
        ------
        Refusal
            If something in it is wrong.
        """
        if not isinstance(payload, InferRequest):
            raise Refusal(400, "is not a request for inference")
        inputs = {i.name: i for i in payload.inputs}
        known = [i["name"] for i in self.get_input_types()]
        if len(inputs) != len(payload.inputs) or not set(inputs) <= set(known):
            raise Refusal(400, f"the inputs are {' and '.join(known)}, each once")
        outputs = [o.name for o in payload.request_outputs or ()]
        if len(set(outputs)) != len(outputs):
            raise Refusal(400, "outputs: a name is there twice")
        if "prompt" not in inputs:
            raise Refusal(400, "the input 'prompt' is missing")
        prompts = self._strings(inputs["prompt"])
        prompts_2 = self._strings(inputs["prompt_2"]) if "prompt_2" in inputs else None
        if prompts_2 is not None and len(prompts_2) != len(prompts):
            raise Refusal(400, "there must be as many of prompt_2 as of prompt")
        parameters = to_http_parameters(payload.parameters) if payload.parameters else {}
        return self.ask(
            prompts, prompts_2, parameters.get("clip_skip"), parameters.get("datatype", "FP32")
        )

    def ask(
        self,
        prompts: Sequence[str],
        prompts_2: Sequence[str] | None,
        clip_skip: Any,
        datatype: Any,
    ) -> Ask:
        """Check a request's parameters.

        Raises
        ------
        Refusal
            If something in it is wrong.
        """
        most = self.encoder.max_clip_skip
        if clip_skip is not None and not (type(clip_skip) is int and 0 <= clip_skip <= most):
            raise Refusal(400, f"parameter clip_skip must be a whole number from 0 to {most}")
        if datatype not in get_args(Datatype):
            raise Refusal(400, f"parameter datatype must be of {', '.join(get_args(Datatype))}")
        if not 1 <= len(prompts) <= self.settings.max_prompts:
            raise Refusal(400, f"a request has 1 to {self.settings.max_prompts} prompts")
        if prompts_2 is not None and len(self.encoder.configs) == 1:
            raise Refusal(400, "there is no second encoder for prompt_2")
        for text in (*prompts, *(prompts_2 or ())):
            if len(text) > self.settings.max_prompt or (
                len(text.encode(errors="replace")) > self.settings.max_prompt
            ):
                raise Refusal(400, f"a prompt is over {self.settings.max_prompt} bytes")
        return Ask(prompts, prompts_2, clip_skip, datatype)

    def _strings(self, item: InferInput) -> list[str]:
        if item.datatype != "BYTES":
            raise Refusal(400, f"input '{item.name}' must have the datatype BYTES")
        shape = item.shape
        if not shape or len(shape) > 2 or shape[0] < 1 or shape[1:] not in ([], [1]):
            raise Refusal(400, f"input '{item.name}' must have the shape [n] or [n, 1]")
        if shape[0] > self.settings.max_prompts:
            raise Refusal(400, f"a request has 1 to {self.settings.max_prompts} prompts")
        try:
            values = item.as_numpy().ravel().tolist()
            return [v.decode() if isinstance(v, bytes) else _string(v) for v in values]
        except UnicodeDecodeError:
            raise Refusal(400, f"input '{item.name}' is not UTF-8") from None
        except (ValueError, TypeError, struct.error, InvalidInput):
            raise Refusal(
                400, f"the data of input '{item.name}' does not fit its shape and datatype"
            ) from None

    async def tokens(self, ask: Ask) -> Tokens:
        """Return a request's tokens."""
        size = sum(len(p) for p in (*ask.prompts, *(ask.prompts_2 or ())))
        if size <= _INLINE_BYTES:
            return self.encoder.tokenize(ask.prompts, ask.prompts_2)
        return await asyncio.to_thread(self.encoder.tokenize, ask.prompts, ask.prompts_2)

    def admit(self, ask: Ask, client: str) -> None:
        """Count prompts, and ask the operator's policy about them.

        Raises
        ------
        Refusal
            If the client may not ask for them.
        """
        self._access.charge(client, len(ask.prompts))
        for text in dict.fromkeys((*ask.prompts, *(ask.prompts_2 or ()))):
            self._access.check(text, client)

    async def answer(self, ask: Ask) -> tuple[list[Row], list[tuple[int, ...]]]:
        """Return the embeddings of admitted prompts, as they travel, and the prompts' tokens.

        Raises
        ------
        Refusal
            If it takes too long.
        """
        try:
            async with asyncio.timeout(self.settings.timeout):
                tokens = await self.tokens(ask)
                truncated = sum(self._truncated(n) for n in tokens.lengths)
                if truncated and self.settings.long_prompts == "refuse":
                    raise Refusal(400, f"a prompt has more than {self.encoder.length} tokens")
                metrics.TRUNCATED.inc(truncated)
                return await self._rows(ask, tokens), list(tokens.lengths)
        except TimeoutError:
            raise Refusal(504, "the encoders took too long", 1.0) from None

    def _truncated(self, lengths: tuple[int, ...]) -> bool:
        return any(n > self.encoder.length for n in lengths)

    def keys(self, ask: Ask, tokens: Tokens) -> list[str]:
        """Return what tells each prompt's embeddings from all others."""
        skip = None if ask.clip_skip == 0 and len(self.encoder.configs) > 1 else ask.clip_skip
        settings = self.settings
        computed = f"{settings.backend} {settings.device} {settings.dtype} {ask.datatype}"
        return [key(self.version, tokens.key(i), skip, computed) for i in range(len(tokens))]

    async def _rows(self, ask: Ask, tokens: Tokens) -> list[Row]:
        keys = self.keys(ask, tokens)
        found: dict[str, Row] = {k: r for k in keys if (r := self._memory.get(k)) is not None}
        metrics.PROMPTS.labels("memory").inc(sum(k in found for k in keys))
        lacking = {k: i for i, k in reversed(list(enumerate(keys))) if k not in found}
        if lacking and self._redis is not None:
            rows = await self._redis.get(list(lacking))
            for name, row in zip(list(lacking), rows, strict=True):
                if row is not None and self._fits(row, ask.datatype):
                    found[name] = row
                    del lacking[name]
                    self._memory.put(name, row)
                    metrics.PROMPTS.labels("redis").inc()
        if lacking:
            made = await self._batcher.encode(tokens.take(list(lacking.values())), ask.clip_skip)
            new = {k: _travelling(row, ask.datatype) for k, row in zip(lacking, made, strict=True)}
            metrics.PROMPTS.labels("encoders").inc(len(new))
            found |= new
            for name, row in new.items():
                self._memory.put(name, row)
            if self._redis is not None:
                self._redis.put(new)
        metrics.CACHE_BYTES.set(self._memory.nbytes)
        return [found[k] for k in keys]

    def _fits(self, row: Row, datatype: Datatype) -> bool:
        """Tell whether a row from outside this process is like the model's own."""
        if datatype not in self._templates:
            encoder = self.encoder
            pooled = encoder.pooled_width
            empty = PromptEmbedding(
                np.zeros((encoder.length, encoder.width), np.float32),
                None if pooled is None else np.zeros(pooled, np.float32),
            )
            made = _travelling(empty, datatype)
            self._templates[datatype] = {n: (t.shape, t.dtype) for n, t in made.items()}
        return {n: (t.shape, t.dtype) for n, t in row.items()} == self._templates[datatype]

    def respond(
        self, payload: InferRequest, rows: Sequence[Row], lengths: Sequence[tuple[int, ...]]
    ) -> InferResponse:
        """Return the answer to a request."""
        truncated = sum(self._truncated(n) for n in lengths)
        return response(self.name, self.version, payload, rows, lengths, truncated)

    def check_version(self, model: str, version: str | None) -> None:
        """Check a path's model and version.

        Raises
        ------
        Refusal
            If they are not served here.
        """
        if model != self.name:
            raise ModelNotFound(model)
        if version not in (None, self.version):
            raise Refusal(404, "there are other text encoders here than that version")


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("not a string")
    # JSON may hold halves of surrogate pairs, which are no characters.
    value.encode()
    return value


def _travelling(row: PromptEmbedding, datatype: Datatype) -> Row:
    wire = to_wire("prompt_embeds", row.prompt_embeds, datatype)
    if row.pooled is not None:
        wire |= to_wire("pooled", row.pooled, datatype)
    if not all(np.isfinite(t).all() for t in wire.values() if t.dtype.kind == "f"):
        raise Refusal(500, f"the embeddings are not finite in {datatype}")
    # A view would keep the whole batch for as long as one of its rows is cached.
    return {n: t if t.base is None else t.copy() for n, t in wire.items()}


def _as_json(payload: InferRequest, output: str) -> bool:
    """Tell whether an answer holds an output as JSON."""
    if payload.request_outputs:
        return any(o.name == output and not o.binary_data for o in payload.request_outputs)
    return not payload.use_binary_outputs


def response(
    model: str,
    version: str,
    payload: InferRequest,
    rows: Sequence[Row],
    lengths: Sequence[tuple[int, ...]],
    truncated: int,
) -> InferResponse:
    """Return the answer to a request, for KServe to write.

    Parameters
    ----------
    model, version : str
        Name on the path, and hash of the encoders.
    payload : InferRequest
    rows : sequence of mapping of str to array
        The tensors of each prompt.
    lengths : sequence of tuple of int
        The tokens of each whole prompt, per encoder.
    truncated : int
        Prompts that were longer than the encoders read.
    """
    outputs = [output(n, np.stack([r[n] for r in rows])) for n in rows[0]]
    outputs.append(output("tokens", np.array(lengths, "<i4")))
    return InferResponse(
        response_id=payload.id or str(uuid.uuid4()),
        model_name=model,
        model_version=version,
        infer_outputs=outputs,
        from_grpc=payload.from_grpc,
        parameters={"encoders_sha256": version, "truncated": truncated},
        use_binary_outputs=payload.use_binary_outputs,
        requested_outputs=payload.request_outputs,
    )


def output(name: str, value: NDArray[Any]) -> InferOutput:
    """Return an output of KServe's."""
    found = InferOutput(name=name, shape=list(value.shape), datatype=_WIRE[value.dtype.str])
    found.set_data_from_numpy(value, binary_data=True)
    return found
