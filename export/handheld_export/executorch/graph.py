"""An XNNPACK graph while it is written: its tensors, its constants and its nodes.

Permutations cost nothing until an operator needs another order: a :class:`Value` remembers how
its axes lie, and :meth:`Graph.ordered` moves them only then.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from executorch.backends.xnnpack.serialization import xnnpack_graph_schema as xs
from torch import Tensor

from handheld_export.quantization import QuantizedWeight

NONE = 2**32 - 1
"""In the place of a tensor that is not there."""
_BY_NAME = 2**64 - 1
_INPUT, _OUTPUT = 1, 2
NHWC = (0, 3, 1, 2)
"""How the axes of a picture lie that PyTorch calls [N, C, H, W]."""
_READS = (
    "input_id",
    "input1_id",
    "input2_id",
    "input3_id",
    "input4_id",
    "input5_id",
    "filter_id",
    "bias_id",
)


@dataclass(frozen=True)
class Value:
    """A tensor of the delegate's graph.

    ``shape`` is how it lies in memory; axis ``i`` of the PyTorch tensor it stands for is
    its axis ``order[i]``.
    """

    id: int
    shape: tuple[int, ...]
    order: tuple[int, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Shape of the PyTorch tensor."""
        return tuple(self.shape[i] for i in self.order)


@dataclass(frozen=True, eq=False)
class Constant:
    """A parameter or buffer that is not written yet."""

    tensor: Tensor
    name: str

    @property
    def sizes(self) -> tuple[int, ...]:
        """Shape of the PyTorch tensor."""
        return tuple(self.tensor.shape)


@dataclass(frozen=True)
class QuantizedLayer:
    """Where the weight of a quantized layer is in the delegate's graph."""

    name: str
    weight: QuantizedWeight
    value: int


@dataclass
class _Slot:
    value: Any
    external: int = NONE
    flags: int = 0


class Graph:
    """Tensors, constants and nodes, in the schema that ExecuTorch's runtime reads."""

    def __init__(self) -> None:
        self.data: dict[str, bytes] = {}
        """Constants, by the hash that is their name."""
        self.written: dict[Any, Any] = {}
        """Values that are there already, by what they were made of."""
        self.layers: list[QuantizedLayer] = []
        self.notes: list[str] = []
        self._slots: list[_Slot] = []
        self._nodes: list[xs.XNode] = []
        self._constants: list[xs.ConstantDataOffset] = [xs.ConstantDataOffset(0, 0)]
        self._inputs: list[int] = []
        self._viewed: dict[int, Value] = {}

    def input(self, sizes: tuple[int, ...]) -> Value:
        """Add an input of the graph, behind those that are there."""
        value = self.value(sizes)
        slot = self._slots[value.id]
        slot.external, slot.flags = len(self._inputs), _INPUT
        self._inputs.append(value.id)
        return value

    def value(
        self,
        shape: Sequence[int],
        order: Sequence[int] | None = None,
        datatype: Any = xs.XNNDatatype.xnn_datatype_fp32,
        quantization: Any = None,
        buffer: int = 0,
    ) -> Value:
        """Add a tensor; ``buffer`` is the number of its constant, 0 if it is computed."""
        shape = tuple(int(s) for s in shape)
        id_ = len(self._slots)
        tensor = xs.XNNTensorValue(datatype, len(shape), list(shape), buffer, NONE, 0, id_)
        value = xs.XNNQuantizedTensorValue(tensor, quantization) if quantization else tensor
        self._slots.append(_Slot(value))
        return Value(id_, shape, tuple(order) if order else tuple(range(len(shape))))

    def add(self, union: Any, limits: Any = None) -> None:
        """Add a node; ``limits`` is an activation that it ends with."""
        self._nodes.append(xs.XNode(union, 0, limits))

    def store(self, data: bytes, salt: bytes = b"") -> int:
        """Keep a constant's bytes and return their number.

        Packed weights are cached under the names of weight and bias alone: the same codes
        under other scales must not share a name, so scales are the codes' ``salt``.
        """
        key = hashlib.sha256(data + salt).hexdigest()
        self.data[key] = data
        self._constants.append(xs.ConstantDataOffset(_BY_NAME, len(data), key))
        return len(self._constants) - 1

    def write(self, constant: Constant, order: Sequence[int], rank: int) -> Value:
        """Write a constant as one of ``rank`` axes that lie in ``order``."""
        key = (constant.name, tuple(order), rank)
        if key not in self.written:
            tensor = constant.tensor.to(torch.float32)
            tensor = tensor.reshape((1,) * (rank - tensor.dim()) + tuple(tensor.shape))
            inverse = [list(order).index(i) for i in range(rank)]
            tensor = tensor.permute(inverse).contiguous()
            buffer = self.store(tensor.numpy().tobytes())
            self.written[key] = self.value(tensor.shape, order, buffer=buffer)
        value: Value = self.written[key]
        return value

    def whole(self, constant: Constant) -> Value:
        """Write a constant as it lies, a scalar as one of one axis."""
        rank = max(constant.tensor.dim(), 1)
        return self.write(constant, range(rank), rank)

    def ordered(self, value: Value, order: Sequence[int]) -> Value:
        """Return a value that lies in ``order``."""
        order = tuple(order)
        if value.order == order:
            return value
        key = ("order", value.id, value.order, order)
        if key in self.written:
            return self.written[key]  # type: ignore[no-any-return]
        move = [0] * len(order)
        for i, axis in enumerate(order):
            move[axis] = value.order[i]
        shape = [value.shape[i] for i in move]
        moving = [i for i in move if value.shape[i] != 1]
        if moving == sorted(moving):
            return Value(self.reshaped(value, shape).id, tuple(shape), order)
        result = self.value(shape, order)
        self.add(xs.XNNStaticTranspose(len(move), move, value.id, result.id, 0))
        self.written[key] = result
        return result

    def plain(self, value: Any) -> Value:
        """Return a value that lies as PyTorch's contiguous tensors do."""
        if isinstance(value, Constant):
            return self.whole(value)
        return self.ordered(value, range(len(value.shape)))

    def reshaped(self, value: Value, shape: Sequence[int]) -> Value:
        """Return other axes over the same memory."""
        shape = tuple(int(s) for s in shape)
        value = self._viewed.get(value.id, value)
        if value.shape == shape:
            return Value(value.id, shape, tuple(range(len(shape))))
        key = ("reshape", value.id, shape)
        if key not in self.written:
            result = self.value(shape)
            self.add(xs.XNNStaticReshape(len(shape), list(shape), value.id, result.id, 0))
            self._viewed[result.id] = value
            self.written[key] = result
        return self.written[key]  # type: ignore[no-any-return]

    def finish(self, results: Sequence[Value]) -> tuple[xs.XNNGraph, dict[int, int]]:
        """Mark results, drop what nobody reads and number the rest."""
        finals: list[int] = []
        for result in results:
            taken = result.id in finals or self._slots[result.id].flags
            if taken or self._constant(result.id):
                out = self.value(result.shape)
                self.add(xs.XNNCopy(result.id, out.id, 0))
                finals.append(out.id)
            else:
                finals.append(result.id)
        for i, id_ in enumerate(finals):
            self._slots[id_].external = len(self._inputs) + i
            self._slots[id_].flags = _OUTPUT
        needed = set(finals)
        kept: list[xs.XNode] = []
        for node in reversed(self._nodes):
            if node.xnode_union.output_id in needed:
                needed.update(_inputs_of(node))
                kept.append(node)
        kept.reverse()
        used = [i for i in range(len(self._slots)) if i in needed or i in self._inputs]
        ids = {old: new for new, old in enumerate(used)}
        constants = [self._constants[0]]
        values = [self._finished(old, ids[old], constants) for old in used]
        for node in kept:
            union = node.xnode_union
            for name in (*_READS, "output_id"):
                if (id_ := getattr(union, name, NONE)) != NONE:
                    setattr(union, name, ids[id_])
        graph = xs.XNNGraph(
            version="0",
            xnodes=kept,
            xvalues=values,
            num_externs=len(self._inputs) + len(finals),
            input_ids=[ids[i] for i in self._inputs],
            output_ids=[ids[i] for i in finals],
            constant_data=constants,
        )
        return graph, ids

    def _finished(self, old: int, new: int, constants: list[xs.ConstantDataOffset]) -> xs.XValue:
        slot = self._slots[old]
        quantized = isinstance(slot.value, xs.XNNQuantizedTensorValue)
        tensor = slot.value.tensor_value if quantized else slot.value
        tensor.id_out, tensor.external_id, tensor.flags = new, slot.external, slot.flags
        if tensor.constant_buffer_idx:
            constants.append(self._constants[tensor.constant_buffer_idx])
            tensor.constant_buffer_idx = len(constants) - 1
        if quantized and getattr(slot.value.quant_params, "scale_buffer_idx", -1) > 0:
            constants.append(self._constants[slot.value.quant_params.scale_buffer_idx])
            slot.value.quant_params.scale_buffer_idx = len(constants) - 1
        return xs.XValue(slot.value)

    def _constant(self, id_: int) -> bool:
        value = self._slots[id_].value
        return isinstance(value, xs.XNNTensorValue) and value.constant_buffer_idx != 0


def _inputs_of(node: xs.XNode) -> list[int]:
    found = (getattr(node.xnode_union, name, NONE) for name in _READS)
    return [i for i in found if i != NONE]
