"""Fixed 16-bit grids for all values of a .tflite file, as NPUs want them.

The ranges come from a run of the same file in float32 on calibration samples, so a tensor's range
is known by its place in the file; grids reach twice as far. Weights are the student's, in its
codes or in larger ones. Layers without codes stay in half precision between two conversions; all
else is on symmetric 16-bit grids.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import ai_edge_litert.schema_py_generated as schema
import numpy as np
from numpy.typing import NDArray

from handheld.errors import TargetError
from handheld_export.litert.tflite import code_of, operator_code
from handheld_export.quantization import ROOM

_OPS = schema.BuiltinOperator
_WEIGHTED: Final = frozenset({_OPS.CONV_2D, _OPS.FULLY_CONNECTED})
_MOVING: Final = frozenset({_OPS.RESHAPE, _OPS.TRANSPOSE, _OPS.SLICE, _OPS.PAD, _OPS.CONCATENATION})
"""Operators that compute nothing: what they read and write is on one grid."""
_BOUNDED: Final = frozenset({_OPS.SOFTMAX, _OPS.LOGISTIC, _OPS.TANH})
"""Operators whose results are 1 at most."""
_FLOAT: Final = schema.TensorType.FLOAT32
_MOST: Final = 32767
_LEAST_RANGE: Final = 1e-30

Ranges = NDArray[np.float64]
"""Largest magnitude by tensor index, 0 for tensors that are not float32."""


def observe(path: Path, samples: Sequence[Sequence[NDArray[Any]]]) -> Ranges:
    """Run a float32 file and return the largest magnitude that each of its tensors takes.

    Parameters
    ----------
    path : Path
    samples : sequence of sequences of float32 ndarrays
        Inputs in the file's order.

    Returns
    -------
    float64 ndarray, ``[tensors]``

    Raises
    ------
    TargetError
        If a value is not finite.
    """
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    interpreter = Interpreter(
        str(path),
        experimental_preserve_all_tensors=True,
        experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
        num_threads=1,
    )
    # Later there are kernels' own buffers, too, which hold anything.
    tensors = interpreter.get_tensor_details()
    interpreter.allocate_tensors()
    inputs = [d["index"] for d in interpreter.get_input_details()]
    ranges = np.zeros(1 + max(d["index"] for d in tensors))
    for sample in samples:
        for index, value in zip(inputs, sample, strict=True):
            interpreter.set_tensor(index, np.ascontiguousarray(value, np.float32))
        interpreter.invoke()
        for index in (d["index"] for d in tensors if d["dtype"] is np.float32 and d["name"]):
            ranges[index] = np.maximum(ranges[index], np.abs(interpreter.get_tensor(index)).max())
    if not np.isfinite(ranges).all():
        raise TargetError("calibration gives values that are not finite")
    return ranges


def quantize(model: Any, ranges: Ranges) -> None:
    """Put what a grafted model computes on grids, in place; its inputs and outputs stay float32.

    Parameters
    ----------
    model : schema.ModelT
        Of one subgraph, whose tensors are those that ``ranges`` were observed of.
    ranges : float64 ndarray, ``[tensors]``

    Raises
    ------
    TargetError
        If a bias leaves its 32 bits.
    """
    _Grids(model, ranges).run()


class _Grids:
    """The graph while it is rewritten.

    A computed tensor is on a grid if what computes it is; who reads it the other way gets it
    converted. ``made`` knows those copies by tensor and whether they are on a grid.
    """

    def __init__(self, model: Any, ranges: Ranges) -> None:
        self.model, self.graph = model, model.subgraphs[0]
        self.ranges = _united(model, _with_room(model, ranges))
        self.floats = {i for i, t in enumerate(self.graph.tensors) if t.type == _FLOAT}
        self.on_grid = {int(i): False for i in self.graph.inputs}
        for op in self.graph.operators:
            self.on_grid |= {int(i): self.computes(op) for i in op.outputs}
        self.made: dict[tuple[int, bool], int] = {}
        self.operators: list[Any] = []

    def computes(self, op: Any) -> bool:
        """Tell whether an operator computes on grids: all do but layers with float weights."""
        code = code_of(self.model, op)
        if code in _WEIGHTED:
            return int(op.inputs[1]) not in self.floats
        return bool(code != _OPS.DEQUANTIZE)

    def run(self) -> None:
        graph = self.graph
        for index in self.floats:
            if self.on_grid.get(index):
                self._place(graph.tensors[index], index)
        for op in graph.operators:
            computes, given = self.computes(op), [int(i) for i in op.inputs]
            for place, index in enumerate(given):
                if index not in self.floats:
                    continue
                if index in self.on_grid:
                    given[place] = self._converted(index, computes)
                elif computes:
                    bias = code_of(self.model, op) in _WEIGHTED and place == 2
                    given[place] = self._bias(given, index) if bias else self._constant(index)
            op.inputs = given
            self.operators.append(op)
        outputs = {int(i): self._converted(int(i), False) for i in graph.outputs}
        for signature in self.model.signatureDefs:
            for item in signature.outputs:
                item.tensorIndex = outputs[item.tensorIndex]
        graph.outputs = [outputs[int(i)] for i in graph.outputs]
        graph.operators = self.operators

    def _scale(self, index: int) -> np.float32:
        return np.float32(max(self.ranges[index], _LEAST_RANGE) / _MOST)

    def _place(self, tensor: Any, index: int) -> None:
        """Put a tensor on the grid of a tensor's range."""
        tensor.type = schema.TensorType.INT16
        tensor.quantization = _parameters(np.array([self._scale(index)]))

    def _copy(self, index: int) -> tuple[Any, int]:
        tensor, old = schema.TensorT(), self.graph.tensors[index]
        tensor.shape, tensor.type = old.shape, _FLOAT
        self.graph.tensors.append(tensor)
        return tensor, len(self.graph.tensors) - 1

    def _converted(self, index: int, on_grid: bool) -> int:
        """Return a computed tensor on its grid or in float."""
        if self.on_grid[index] == on_grid:
            return index
        if (index, on_grid) not in self.made:
            tensor, self.made[index, on_grid] = self._copy(index)
            if on_grid:
                self._place(tensor, index)
            op = schema.OperatorT()
            op.opcodeIndex = operator_code(
                self.model, _OPS.QUANTIZE if on_grid else _OPS.DEQUANTIZE
            )
            op.inputs, op.outputs = [index], [self.made[index, on_grid]]
            kind = "QuantizeOptions" if on_grid else "DequantizeOptions"
            op.builtinOptionsType = getattr(schema.BuiltinOptions, kind)
            op.builtinOptions = getattr(schema, f"{kind}T")()
            self.operators.append(op)
        return self.made[index, on_grid]

    def _values(self, index: int) -> NDArray[np.float32]:
        data = self.model.buffers[self.graph.tensors[index].buffer].data
        return np.asarray(data, np.uint8).view(np.float32)

    def _store(self, tensor: Any, codes: NDArray[Any]) -> None:
        buffer = schema.BufferT()
        buffer.data = codes.view(np.uint8)
        self.model.buffers.append(buffer)
        tensor.buffer = len(self.model.buffers) - 1

    def _constant(self, index: int) -> int:
        if (index, True) not in self.made:
            tensor, self.made[index, True] = self._copy(index)
            self._place(tensor, index)
            self._store(tensor, np.rint(self._values(index) / self._scale(index)).astype(np.int16))
        return self.made[index, True]

    def _bias(self, given: Sequence[int], index: int) -> int:
        """Put a bias on the grid of its layer's sums: a product of the input's and the weight's."""
        x, weight = (self.graph.tensors[i].quantization.scale for i in given[:2])
        scale = np.asarray(weight, np.float32) * np.float32(x[0])
        codes = np.rint(self._values(index).astype(np.float64) / scale)
        if np.abs(codes).max() >= 2**31:
            name = str(self.graph.tensors[given[1]].name).removesuffix(".weight")
            raise TargetError(f"layer '{name}': its bias leaves 32 bits on the grid of its sums")
        tensor, made = self._copy(index)
        tensor.type, tensor.quantization = schema.TensorType.INT64, _parameters(scale)
        self._store(tensor, codes.astype(np.int64))
        return made


def _with_room(model: Any, ranges: Ranges) -> Ranges:
    graph, wider = model.subgraphs[0], ranges.copy()
    wider[[int(i) for i in graph.inputs]] *= ROOM
    for op in graph.operators:
        outputs = [int(i) for i in op.outputs]
        wider[outputs] *= ROOM
        if code_of(model, op) in _BOUNDED:
            wider[outputs] = np.minimum(wider[outputs], 1)
    return wider


def _united(model: Any, ranges: Ranges) -> Ranges:
    """Give all that is only moved one range."""
    graph, united = model.subgraphs[0], ranges.copy()
    group = np.arange(len(graph.tensors))
    for op in graph.operators:
        if code_of(model, op) in _MOVING:
            moved = [int(i) for i in (*op.inputs, *op.outputs)]
            moved = [i for i in moved if i >= 0 and graph.tensors[i].type == _FLOAT]
            group[np.isin(group, group[moved])] = group[moved[0]]
    for g in np.unique(group):
        united[group == g] = ranges[group == g].max()
    return united


def _parameters(scale: NDArray[np.float32]) -> Any:
    q = schema.QuantizationParametersT()
    q.scale, q.zeroPoint = scale, np.zeros(len(scale), np.int64)
    return q
