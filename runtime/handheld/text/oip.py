"""Bytes of the Open Inference Protocol v2 with binary tensor data, as text servers speak it.

A body is JSON followed by the raw bytes of its tensors in their order; the header
``Inference-Header-Content-Length`` says where the JSON ends. Numbers are little-endian, a
string tensor is a row of 4-byte lengths, each followed by that many bytes of UTF-8. See
https://github.com/kserve/open-inference-protocol and docs/text-api.md.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from handheld.errors import TextServerError

Datatype = Literal["FP32", "FP16", "INT8"]
"""How embeddings travel."""
DATATYPES: Final[tuple[Datatype, ...]] = get_args(Datatype)
JSON_LENGTH: Final = "Inference-Header-Content-Length"
INT8_GROUP: Final = 64
"""Neighbouring values that share a scale."""
_NUMPY = {"FP32": "<f4", "FP16": "<f2", "INT8": "i1", "INT32": "<i4"}
_MAX_RANK = 4
Array = NDArray[Any]


class AnswerError(TextServerError):
    """A text server's answer is malformed."""


@dataclass(frozen=True, eq=False)
class Answer:
    """What a server answered."""

    parameters: Mapping[str, Any]
    tensors: Mapping[str, Array]
    version: str | None


def wire_dtype(datatype: Datatype) -> np.dtype[Any]:
    """Return the dtype of the values in which embeddings travel."""
    return np.dtype(_NUMPY[datatype])


def write_strings(values: Iterable[str]) -> bytes:
    """Return the bytes of a string tensor."""
    encoded = [v.encode() for v in values]
    return b"".join(struct.pack("<I", len(e)) + e for e in encoded)


def write_request(
    prompts: Sequence[str],
    prompts_2: Sequence[str] | None = None,
    *,
    clip_skip: int | None = None,
    datatype: Datatype = "FP16",
    request_id: str | None = None,
) -> tuple[bytes, int]:
    """Return the body of a request for embeddings, and the length of its JSON.

    Parameters
    ----------
    prompts : sequence of str
        For both encoders, or for the first one if there are ``prompts_2``.
    prompts_2 : sequence of str, optional
        For the second encoder.
    clip_skip : int, optional
        Layers to skip, as in diffusers.
    datatype : Datatype
        How the embeddings are wanted.
    request_id : str, optional
    """
    inputs, tail = [], b""
    for name, values in (("prompt", prompts), ("prompt_2", prompts_2)):
        if values is not None:
            data = write_strings(values)
            inputs.append(
                {
                    "name": name,
                    "shape": [len(values)],
                    "datatype": "BYTES",
                    "parameters": {"binary_data_size": len(data)},
                }
            )
            tail += data
    parameters: dict[str, Any] = {"binary_data_output": True, "datatype": datatype}
    if clip_skip is not None:
        parameters["clip_skip"] = clip_skip
    tree: dict[str, Any] = {"inputs": inputs, "parameters": parameters}
    if request_id is not None:
        tree = {"id": request_id, **tree}
    head = json.dumps(tree, separators=(",", ":")).encode()
    return head + tail, len(head)


def read_answer(body: bytes, json_length: str | None) -> Answer:
    """Read the body of an answer.

    Parameters
    ----------
    body : bytes
    json_length : str or None
        The header ``Inference-Header-Content-Length``.

    Raises
    ------
    AnswerError
        If it is not one.
    """
    try:
        return _read(body, len(body) if json_length is None else int(json_length))
    except RecursionError:
        raise AnswerError("the answer's JSON is nested too deeply") from None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise AnswerError(f"the answer is malformed: {error}") from None


def _read(body: bytes, end: int) -> Answer:
    if not 0 <= end <= len(body):
        raise ValueError(f"{JSON_LENGTH} is {end}, the body has {len(body)} bytes")
    tree = json.loads(body[:end])
    tensors: dict[str, Array] = {}
    for item in tree["outputs"]:
        size = item.get("parameters", {}).get("binary_data_size")
        raw = None if size is None else body[end : end + _whole(size)]
        if raw is not None and len(raw) != size:
            raise ValueError(f"{size} bytes are announced, {len(raw)} are there")
        end += 0 if raw is None else len(raw)
        tensors[str(item["name"])] = _tensor(item, raw)
    if end != len(body):
        raise ValueError("bytes are left over")
    version = tree.get("model_version")
    return Answer(dict(tree.get("parameters") or {}), tensors, version and str(version))


def _whole(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is not a size")
    return value


def _tensor(item: Any, raw: bytes | None) -> Array:
    shape = [_whole(n) for n in item["shape"]]
    dtype = _NUMPY.get(item["datatype"])
    if dtype is None or len(shape) > _MAX_RANK:
        raise ValueError(f"output '{item['name']}' has an unknown datatype or too many dimensions")
    if raw is not None:
        return np.frombuffer(raw, dtype=dtype).reshape(shape)
    values = item["data"]
    if type(values) is not list or not all(type(v) in (int, float) for v in values):
        raise ValueError(f"the data of output '{item['name']}' is not a list of numbers")
    with np.errstate(over="ignore"):
        return np.array(values, dtype=dtype).reshape(shape)


def to_wire(name: str, value: NDArray[np.float32], datatype: Datatype) -> dict[str, Array]:
    """Return the tensors in which an array travels.

    INT8 rounds groups of :data:`INT8_GROUP` neighbours to 127 steps of their largest
    magnitude, which ``NAME_scale`` holds, divided by 127: ``x[..., i]`` is
    ``NAME[..., i] * NAME_scale[..., i // 64]``.

    Parameters
    ----------
    name : str
    value : float32 array
        ``[..., width]``.
    datatype : Datatype
    """
    if datatype == "FP32":
        return {name: np.ascontiguousarray(value, "<f4")}
    if datatype == "FP16":
        with np.errstate(over="ignore"):
            return {name: np.ascontiguousarray(value, "<f2")}
    width = value.shape[-1]
    padded = np.zeros((*value.shape[:-1], _groups(width) * INT8_GROUP), np.float32)
    padded[..., :width] = value
    grouped = padded.reshape(*value.shape[:-1], -1, INT8_GROUP)
    scale = np.abs(grouped).max(axis=-1) / np.float32(127)
    safe = np.where(scale > 0, scale, np.float32(1))
    codes = np.rint(grouped / safe[..., None]).astype(np.int8)
    codes = codes.reshape(padded.shape)[..., :width]
    return {name: np.ascontiguousarray(codes), f"{name}_scale": scale.astype("<f4")}


def from_wire(name: str, tensors: Mapping[str, Array]) -> NDArray[np.float32] | None:
    """Return an array from the tensors in which it travelled, None if it is not among them.

    Raises
    ------
    AnswerError
        If the tensors do not fit each other.
    """
    value = tensors.get(name)
    if value is None:
        return None
    if value.dtype.kind == "f":
        return value.astype(np.float32)
    scale = tensors.get(f"{name}_scale")
    wanted = (*value.shape[:-1], _groups(value.shape[-1])) if value.ndim else None
    if value.dtype != np.int8 or scale is None or scale.shape != wanted:
        raise AnswerError(f"output '{name}' is neither floats nor codes with scales")
    spread = np.repeat(scale.astype(np.float32), INT8_GROUP, axis=-1)[..., : value.shape[-1]]
    product: NDArray[np.float32] = value.astype(np.float32) * spread
    return product


def _groups(width: int) -> int:
    return -(-width // INT8_GROUP)
