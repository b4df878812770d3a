"""One file of weights behind several .tflite files.

A model at several picture sizes is the same weights under graphs of other shapes. So what the
files of a segment have in common is taken out of them, into one file that
:mod:`continues <handheld_export.sharing>` each.

Buffers in common have the same index everywhere. XNNPACK knows packed weights by the indices of
weight and bias, so that files of one segment can use one file of packed weights.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import ai_edge_litert.schema_py_generated as schema
import numpy as np
from numpy.typing import NDArray

from handheld.errors import TargetError
from handheld_export.litert.tflite import ALIGNMENT, code_of, packed
from handheld_export.sharing import padded, whole

_LEAST: Final = 64
"""Bytes of a buffer that is worth a place among the shared ones, which are aligned to as many."""
_KERNELS: Final = frozenset(
    (schema.BuiltinOperator.CONV_2D, schema.BuiltinOperator.FULLY_CONNECTED)
)

Bytes = NDArray[np.uint8]
_Key = tuple[bytes, int]
"""Hash of a buffer's content, and how many equal ones the file has before it."""


class _Kernel(NamedTuple):
    operator: int
    weight: int
    """Index of a buffer."""
    bias: int
    grid: str


class _File:
    """A .tflite file and the content of its buffers."""

    def __init__(self, path: Path) -> None:
        self.path = path
        data = np.memmap(path, np.uint8, "r")
        self.model: Any = schema.ModelT.InitFromPackedBuf(data.data, 0)
        self.graph = self.model.subgraphs[0]
        self.contents = [_content(b, data) for b in self.model.buffers]
        seen: Counter[bytes] = Counter()
        self.keys: dict[_Key, int] = {}
        for index, content in enumerate(self.contents):
            if content is not None:
                digest = hashlib.sha256(content.data).digest()
                self.keys[digest, seen[digest]] = index
                seen[digest] += 1

    def kernels(self) -> set[_Kernel]:
        """Return what packed weights are known by and made of."""
        found = set()
        widened = {
            int(op.outputs[0]): int(op.inputs[0])
            for op in self.graph.operators
            if code_of(self.model, op) == schema.BuiltinOperator.DEQUANTIZE
        }
        for op in self.graph.operators:
            if (code := code_of(self.model, op)) in _KERNELS:
                read = int(op.inputs[1])
                weight, bias = self.graph.tensors[widened.get(read, read)], 0
                if len(op.inputs) > 2 and int(op.inputs[2]) >= 0:
                    bias = self.graph.tensors[int(op.inputs[2])].buffer
                found.add(_Kernel(code, weight.buffer, bias, self._grid(weight)))
        return found

    def _grid(self, weight: Any) -> str:
        """Return a hash of type and scales of a weight."""
        parts: list[Any] = [np.array([weight.type, *weight.shape], np.int64)]
        if (q := weight.quantization) is not None:
            parts += [np.asarray(x) for x in (q.scale, q.zeroPoint) if x is not None]
            if isinstance(q.details, schema.BlockwiseQuantizationT):
                scales = self.contents[self.graph.tensors[q.details.scales].buffer]
                parts += [np.array([q.details.blockSize]), scales]
        return hashlib.sha256(b"|".join(x.tobytes() for x in parts)).hexdigest()

    def number(self, common: Sequence[_Key]) -> None:
        """Put the buffers in common first, in their order."""
        first = [self.keys[key] for key in common]
        taken = {0, *first}
        order = [0, *first, *(i for i in range(len(self.contents)) if i not in taken)]
        place = {old: new for new, old in enumerate(order)}
        self.model.buffers = [self.model.buffers[i] for i in order]
        self.contents = [self.contents[i] for i in order]
        for tensor in self.graph.tensors:
            tensor.buffer = place[tensor.buffer]


def _content(buffer: Any, data: Bytes) -> Bytes | None:
    if buffer.offset > 1:
        return data[buffer.offset : buffer.offset + buffer.size]
    return None if buffer.data is None else np.asarray(buffer.data, np.uint8)


def share(paths: Sequence[Path], outputs: Sequence[Path], weights: Path) -> bool:
    """Write files again with what all have in common in one more file.

    Parameters
    ----------
    paths : sequence of Path
        One segment at several sizes, as :func:`~handheld_export.litert.tflite.graft` writes it.
    outputs : sequence of Path
        ``SEGMENT.WIDTHxHEIGHT.tflite`` for each, in the folder of ``weights``.
    weights : Path
        ``SEGMENT.weights``.

    Returns
    -------
    bool
        False if they have no layers in common or use them in other ways; nothing is written then.

    Raises
    ------
    TargetError
        If what was written is not what was read.
    """
    files = [_File(path) for path in paths]
    common = [key for key in files[0].keys if all(key in f.keys for f in files[1:])]
    for file in files:
        file.number(common)
    kernels = files[0].kernels()
    inside = range(1, 1 + len(common))
    layers = all(k.weight in inside and k.bias in (0, *inside) for k in kernels)
    if not kernels or not layers or any(f.kernels() != kernels for f in files[1:]):
        return False
    places, at = {}, 0
    for index in inside:
        content = files[0].contents[index]
        assert content is not None
        if content.size >= _LEAST:
            places[index] = at
            at += -(-content.size // ALIGNMENT) * ALIGNMENT
    _write_weights(weights, files[0], places)
    for file, output in zip(files, outputs, strict=True):
        _write_graph(output, file, places)
        _compare(output, file)
    return True


def _write_weights(path: Path, file: _File, places: dict[int, int]) -> None:
    with path.open("wb") as out:
        for index, at in places.items():
            out.write(bytes(at - out.tell()))
            out.write(file.contents[index].data)  # type: ignore[union-attr]


def _write_graph(path: Path, file: _File, places: dict[int, int]) -> None:
    model = file.model
    for index, (buffer, content) in enumerate(zip(model.buffers, file.contents, strict=True)):
        buffer.data = None if index in places else content
        buffer.offset = buffer.size = 2 if index in places else 0
    end = padded(len(packed(model)))
    for index, at in places.items():
        content = file.contents[index]
        assert content is not None
        model.buffers[index].offset, model.buffers[index].size = end + at, content.size
    data = packed(model)
    path.write_bytes(data + bytes(end - len(data)))


def _compare(path: Path, file: _File) -> None:
    with whole(path) as joined:
        written = _File(joined)
        for i, (a, b) in enumerate(zip(file.graph.tensors, written.graph.tensors, strict=True)):
            x, y = file.contents[a.buffer], written.contents[b.buffer]
            if not (x is None and y is None) and not (
                x is not None and y is not None and np.array_equal(x, y)
            ):
                raise TargetError(f"tensor {i} is not what it was in {file.path}", path=path)
