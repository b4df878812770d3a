"""Writing a segment as one XNNPACK delegate of an ExecuTorch program.

ExecuTorch's own lowering retraces the graph some twenty times, quantizes weights itself and
wraps every convolution into transposes. A rewritten segment needs none of that: its
operators are few and all of them are XNNPACK's. :func:`lower` therefore walks the exported
graph once and writes the delegate's graph in the schema that the runtime reads, with each
layer's codes as they are. Permutations cost nothing until an operator needs another order,
so pictures stay ``[N, H, W, C]`` from end to end.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from executorch.backends.xnnpack.serialization import xnnpack_graph_schema as xs
from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import (
    XNNHeader,
    _get_schema_bytes,
    serialize_xnnpack_binary,
)
from executorch.exir._serialize._flatbuffer import _flatc_decompile
from executorch.exir._serialize._named_data_store import NamedDataStore
from executorch.exir._serialize._program import deserialize_pte_binary
from executorch.exir.lowered_backend_module import LoweredBackendModule
from executorch.exir.passes import MemoryPlanningPass
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.fx import Node

from handheld.errors import TargetError
from handheld_export.quantization import ActivationRange, QuantizedWeight
from handheld_export.rewrites import (
    float_input_of,
    quantized_of,
    range_of,
    rewrite,
    source_of,
)

_NONE = 2**32 - 1
_BY_NAME = 2**64 - 1
_ALIGNMENT = 16
_KEEP_DIMS = 0x40
_TRANSPOSE_B = 0x1
_INPUT, _OUTPUT = 1, 2
_NHWC = (0, 3, 1, 2)
_RELU = xs.OutputMinMax(0, "+inf")
_MOST_CONCATENATED = 5


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


@dataclass(frozen=True)
class Result:
    """What :func:`lower` wrote."""

    layers: tuple[QuantizedLayer, ...]
    nodes: Mapping[str, int]
    """Number of nodes by kind."""
    notes: tuple[str, ...]


@dataclass
class _Slot:
    value: Any
    external: int = _NONE
    flags: int = 0


Operand = Value | Constant | float


def lower(
    module: nn.Module,
    examples: Sequence[Tensor],
    path: Path,
    outputs: Sequence[tuple[int, ...]] | None = None,
) -> Result:
    """Write a module as an ExecuTorch program that is one XNNPACK delegate.

    Parameters
    ----------
    module : torch.nn.Module
        Takes tensors, returns a tuple of tensors; in eval mode.
    examples : sequence of tensors
        One value per input; only the shapes matter.
    path : Path
    outputs : sequence of shapes, optional
        Checked against what the module returns.

    Returns
    -------
    Result

    Raises
    ------
    TargetError
        For an operator without an XNNPACK form and for a layer whose grid does not run.
    """
    rewritten = rewrite(module)
    with torch.no_grad():
        exported = torch.export.export(rewritten, tuple(examples), strict=False)
    emitter = _Emitter(rewritten)
    results = emitter.run(exported)
    shapes = [v.sizes for v in results]
    if outputs is not None and shapes != [tuple(s) for s in outputs]:
        raise TargetError(f"the module returns shapes {shapes}, its ports say {list(outputs)}")
    graph, ids = emitter.finish(results)
    store = NamedDataStore()
    for key, data in emitter.data.items():
        if any(c.named_key == key for c in graph.constant_data):
            store.add_named_data(key, data, _ALIGNMENT)
    lowered = LoweredBackendModule(
        _shell(examples, shapes),
        "XnnpackBackend",
        serialize_xnnpack_binary(graph, bytearray()),
        [],
        store.get_named_data_store_output(),
    )
    planning = MemoryPlanningPass(alloc_graph_input=False, alloc_graph_output=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        program = lowered.buffer(extract_delegate_segments=True, memory_planning=planning)
    path.write_bytes(program)
    layers = tuple(
        QuantizedLayer(x.name, x.weight, ids[x.value]) for x in emitter.layers if x.value in ids
    )
    return Result(layers, _count(graph), tuple(emitter.notes))


def _codes_of(layer: nn.Module) -> QuantizedWeight | None:
    """Return the codes that a layer computes with; XNNPACK has no products of floats and codes."""
    return None if float_input_of(layer) else quantized_of(layer)


class _Shell(nn.Module):
    """Has a segment's signature; the delegate takes the place of its body."""

    def __init__(self, shapes: Sequence[tuple[int, ...]]) -> None:
        super().__init__()
        self.shapes = shapes

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.zeros(s) for s in self.shapes)


def _shell(examples: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> Any:
    inputs = tuple(torch.empty(x.shape) for x in examples)
    program = torch.export.export(_Shell(shapes), inputs, strict=False)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
        node.meta.pop("nn_module_stack", None)
    return program


def _count(graph: xs.XNNGraph) -> dict[str, int]:
    counts: dict[str, int] = {}
    for node in graph.xnodes:
        name = type(node.xnode_union).__name__.removeprefix("XNN")
        counts[name] = counts.get(name, 0) + 1
    return counts


class _Emitter:
    def __init__(self, module: nn.Module) -> None:
        self.modules = dict(module.named_modules())
        self.slots: list[_Slot] = []
        self.nodes: list[xs.XNode] = []
        self.constants: list[xs.ConstantDataOffset] = [xs.ConstantDataOffset(0, 0)]
        self.data: dict[str, bytes] = {}
        self.layers: list[QuantizedLayer] = []
        self.notes: list[str] = []
        self.values: dict[Node, Any] = {}
        self.inputs: list[int] = []
        self._written: dict[Any, Any] = {}
        self._viewed: dict[int, Value] = {}
        self._fused: set[Node] = set()
        self._node: Node | None = None

    # --- walking the graph

    def run(self, exported: torch.export.ExportedProgram) -> list[Value]:
        """Emit all nodes and return the results."""
        signature = exported.graph_signature
        names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        state = {**dict(exported.named_parameters()), **dict(exported.named_buffers())}
        lifted = signature.inputs_to_lifted_tensor_constants
        for node in exported.graph.nodes:
            self._node = node
            if node.op == "placeholder":
                if node.name in names:
                    name = names[node.name]
                    self.values[node] = Constant(state[name].detach(), name)
                elif node.name in lifted:
                    name = lifted[node.name]
                    self.values[node] = Constant(exported.constants[name].detach(), name)
                else:
                    self.values[node] = self._input(node)
            elif node.op == "call_function":
                self.values[node] = self._call(node)
            elif node.op == "output":
                return [self._plain(self.values[n]) for n in node.args[0]]
        raise AssertionError("a graph has an output")

    def _input(self, node: Node) -> Value:
        sizes = tuple(node.meta["val"].shape)
        value = self._value(sizes)
        slot = self.slots[value.id]
        slot.external, slot.flags = len(self.inputs), _INPUT
        self.inputs.append(value.id)
        return value

    def _call(self, node: Node) -> Any:
        name = str(node.target)
        handler = _HANDLERS.get(name)
        if handler is None:
            raise self._refuse(f"operator {name} has no XNNPACK form")
        try:
            return handler(self, node, *self._arguments(node.args), **node.kwargs)
        except TypeError as error:
            raise self._refuse(f"operator {name} is called in an unknown way ({error})") from error

    def _arguments(self, arguments: Any) -> list[Any]:
        return [
            self._arguments(a)
            if isinstance(a, list | tuple)
            else self.values[a]
            if isinstance(a, Node)
            else a
            for a in arguments
        ]

    def _refuse(self, message: str) -> TargetError:
        stack = self._node.meta.get("nn_module_stack", {}) if self._node else {}
        where = next((str(p[0]) for p in reversed(stack.values()) if p[0]), "the segment")
        return TargetError(f"{where}: {message}", remedy="add a rewrite for it")

    def finish(self, results: Sequence[Value]) -> tuple[xs.XNNGraph, dict[int, int]]:
        """Mark results, drop what nobody reads and number the rest."""
        finals: list[int] = []
        for result in results:
            taken = result.id in finals or self.slots[result.id].flags
            if taken or self._constant(result.id):
                out = self._value(result.shape)
                self._node_add(xs.XNNCopy(result.id, out.id, 0))
                finals.append(out.id)
            else:
                finals.append(result.id)
        for i, id_ in enumerate(finals):
            self.slots[id_].external = len(self.inputs) + i
            self.slots[id_].flags = _OUTPUT
        needed = set(finals)
        kept: list[xs.XNode] = []
        for node in reversed(self.nodes):
            if node.xnode_union.output_id in needed:
                needed.update(_inputs_of(node))
                kept.append(node)
        kept.reverse()
        used = [i for i in range(len(self.slots)) if i in needed or i in self.inputs]
        ids = {old: new for new, old in enumerate(used)}
        constants = [self.constants[0]]
        values = [self._finished(old, ids[old], constants) for old in used]
        for node in kept:
            union = node.xnode_union
            for name in (*_READS, "output_id"):
                if (id_ := getattr(union, name, _NONE)) != _NONE:
                    setattr(union, name, ids[id_])
        graph = xs.XNNGraph(
            version="0",
            xnodes=kept,
            xvalues=values,
            num_externs=len(self.inputs) + len(finals),
            input_ids=[ids[i] for i in self.inputs],
            output_ids=[ids[i] for i in finals],
            constant_data=constants,
        )
        return graph, ids

    def _finished(self, old: int, new: int, constants: list[xs.ConstantDataOffset]) -> xs.XValue:
        slot = self.slots[old]
        quantized = isinstance(slot.value, xs.XNNQuantizedTensorValue)
        tensor = slot.value.tensor_value if quantized else slot.value
        tensor.id_out, tensor.external_id, tensor.flags = new, slot.external, slot.flags
        if tensor.constant_buffer_idx:
            constants.append(self.constants[tensor.constant_buffer_idx])
            tensor.constant_buffer_idx = len(constants) - 1
        if quantized and getattr(slot.value.quant_params, "scale_buffer_idx", -1) > 0:
            constants.append(self.constants[slot.value.quant_params.scale_buffer_idx])
            slot.value.quant_params.scale_buffer_idx = len(constants) - 1
        return xs.XValue(slot.value)

    def _constant(self, id_: int) -> bool:
        value = self.slots[id_].value
        return isinstance(value, xs.XNNTensorValue) and value.constant_buffer_idx != 0

    # --- values

    def _value(
        self,
        shape: Sequence[int],
        order: Sequence[int] | None = None,
        datatype: Any = xs.XNNDatatype.xnn_datatype_fp32,
        quantization: Any = None,
        buffer: int = 0,
    ) -> Value:
        shape = tuple(int(s) for s in shape)
        id_ = len(self.slots)
        tensor = xs.XNNTensorValue(datatype, len(shape), list(shape), buffer, _NONE, 0, id_)
        value = xs.XNNQuantizedTensorValue(tensor, quantization) if quantization else tensor
        self.slots.append(_Slot(value))
        return Value(id_, shape, tuple(order) if order else tuple(range(len(shape))))

    def _node_add(self, union: Any, limits: Any = None) -> None:
        self.nodes.append(xs.XNode(union, 0, limits))

    def _store(self, data: bytes, salt: bytes = b"") -> int:
        # Packed weights are cached under the names of weight and bias alone: the same codes
        # under other scales must not share a name.
        key = hashlib.sha256(data + salt).hexdigest()
        self.data[key] = data
        self.constants.append(xs.ConstantDataOffset(_BY_NAME, len(data), key))
        return len(self.constants) - 1

    def _write(self, constant: Constant, order: Sequence[int], rank: int) -> Value:
        """Write a constant as one of ``rank`` axes that lie in ``order``."""
        key = (constant.name, tuple(order), rank)
        if key not in self._written:
            tensor = constant.tensor.to(torch.float32)
            tensor = tensor.reshape((1,) * (rank - tensor.dim()) + tuple(tensor.shape))
            inverse = [list(order).index(i) for i in range(rank)]
            tensor = tensor.permute(inverse).contiguous()
            buffer = self._store(tensor.numpy().tobytes())
            self._written[key] = self._value(tensor.shape, order, buffer=buffer)
        value: Value = self._written[key]
        return value

    def _whole(self, constant: Constant) -> Value:
        rank = max(constant.tensor.dim(), 1)
        return self._write(constant, range(rank), rank)

    def _ordered(self, value: Value, order: Sequence[int]) -> Value:
        """Return a value that lies in ``order``."""
        order = tuple(order)
        if value.order == order:
            return value
        key = ("order", value.id, value.order, order)
        if key in self._written:
            return self._written[key]  # type: ignore[no-any-return]
        move = [0] * len(order)
        for i, axis in enumerate(order):
            move[axis] = value.order[i]
        shape = [value.shape[i] for i in move]
        moving = [i for i in move if value.shape[i] != 1]
        if moving == sorted(moving):
            return Value(self._reshaped(value, shape).id, tuple(shape), order)
        result = self._value(shape, order)
        self._node_add(xs.XNNStaticTranspose(len(move), move, value.id, result.id, 0))
        self._written[key] = result
        return result

    def _plain(self, value: Any) -> Value:
        """Return a value that lies as PyTorch's contiguous tensors do."""
        if isinstance(value, Constant):
            return self._whole(value)
        return self._ordered(value, range(len(value.shape)))

    def _reshaped(self, value: Value, shape: Sequence[int]) -> Value:
        """Return other axes over the same memory."""
        shape = tuple(int(s) for s in shape)
        value = self._viewed.get(value.id, value)
        if value.shape == shape:
            return Value(value.id, shape, tuple(range(len(shape))))
        key = ("reshape", value.id, shape)
        if key not in self._written:
            result = self._value(shape)
            self._node_add(xs.XNNStaticReshape(len(shape), list(shape), value.id, result.id, 0))
            self._viewed[result.id] = value
            self._written[key] = result
        return self._written[key]  # type: ignore[no-any-return]

    # --- operators

    def unary(self, kind: Any, x: Value) -> Value:
        result = self._value(x.shape, x.order)
        self._node_add(kind(x.id, result.id, 0))
        return result

    def binary(self, kind: Any, node: Node, a: Operand, b: Operand) -> Value:
        a, b = self._operand(a), self._operand(b)
        rank = max(len(a.sizes), len(b.sizes))
        tensors = [x for x in (a, b) if isinstance(x, Value)]
        if not tensors:
            raise self._refuse("arithmetic on constants only is not folded")
        lead = max(tensors, key=lambda x: (len(x.sizes) == rank, math.prod(x.shape)))
        if len(lead.sizes) < rank:
            lead = self._reshaped(self._plain(lead), (1,) * (rank - len(lead.sizes)) + lead.sizes)
        left, right = (self._aligned(x, lead, rank) for x in (a, b))
        shape = [max(i, j) for i, j in zip(left.shape, right.shape, strict=True)]
        result = self._value(shape, lead.order)
        self._node_add(kind(left.id, right.id, result.id, 0), self._limits(node))
        return result

    def _operand(self, x: Operand) -> Value | Constant:
        if isinstance(x, float | int):
            return Constant(torch.tensor(float(x)), f"scalar {float(x)!r}")
        return x

    def _aligned(self, x: Value | Constant, lead: Value, rank: int) -> Value:
        if isinstance(x, Constant):
            return self._write(x, lead.order, rank)
        if len(x.sizes) < rank:
            x = self._reshaped(self._plain(x), (1,) * (rank - len(x.sizes)) + x.sizes)
        return self._ordered(x, lead.order)

    def _limits(self, node: Node) -> Any:
        """Fuse a ReLU that is the only reader."""
        readers = list(node.users)
        if len(readers) == 1 and str(readers[0].target) in _RELUS:
            self._fused.add(readers[0])
            return _RELU
        return None

    def relu(self, node: Node, x: Value) -> Value:
        if node in self._fused:
            return x
        result = self._value(x.shape, x.order)
        self._node_add(xs.XNNClamp(x.id, result.id, 0), _RELU)
        return result

    def mean(self, x: Value, dims: Sequence[int] | int | None, keepdim: bool) -> Value:
        rank = len(x.sizes)
        logical = range(rank) if dims is None else [dims] if isinstance(dims, int) else dims
        axes = sorted(x.order[d % rank] for d in logical)
        if axes != list(range(axes[0], axes[-1] + 1)):
            raise self._refuse("a mean over axes that do not lie side by side")
        shape = [1 if i in axes else s for i, s in enumerate(x.shape)]
        if axes == [rank - 1] == [x.order[-1]] and keepdim:
            return self._row_mean(x)
        if rank == 4 and axes == [1, 2]:
            pooled = x
        else:
            inner = math.prod(x.shape[axes[-1] + 1 :])
            size = math.prod(x.shape[i] for i in axes)
            pooled = self._reshaped(x, (math.prod(x.shape[: axes[0]]), size, 1, inner))
        result = self._value([pooled.shape[0], 1, 1, pooled.shape[3]])
        self._node_add(xs.XNNGlobalAvgPooling2d(pooled.id, result.id, _KEEP_DIMS))
        result = Value(self._reshaped(result, shape).id, tuple(shape), x.order)
        if keepdim:
            return result
        removed = {d % rank for d in logical}
        return self._reshaped(
            self._plain(result), [s for i, s in enumerate(x.sizes) if i not in removed]
        )

    def _row_mean(self, x: Value) -> Value:
        """Return means over the last axis as a product with a column of 1 / n.

        XNNPACK reduces four-dimensional tensors only; the product saves two copies and is
        faster than the reduction.
        """
        n = x.shape[-1]
        column = self._whole(Constant(torch.full((1, n), 1 / n), f"mean of {n}"))
        result = self._value((*x.shape[:-1], 1), x.order)
        self._node_add(xs.XNNFullyConnected(x.id, column.id, _NONE, result.id, 0))
        return result

    def linear(self, node: Node, x: Value, weight: Constant, bias: Constant | None = None) -> Value:
        if x.order[-1] != len(x.order) - 1:
            x = self._plain(x)
        layer, name = self._layer(weight)
        quantized = _codes_of(layer)
        if quantized is None:
            source, filter_ = x, self._whole(weight)
        else:
            filter_ = self._linear_codes(name, quantized)
            source = self._dynamic(x)
        result = self._value((*x.shape[:-1], filter_.shape[0]), x.order)
        self._node_add(
            xs.XNNFullyConnected(source.id, filter_.id, self._bias(bias), result.id, 0),
            self._limits(node),
        )
        return result

    def _layer(self, weight: Constant) -> tuple[nn.Module, str]:
        path = weight.name.rpartition(".")[0]
        layer = self.modules[path]
        return layer, source_of(layer) or path

    def _bias(self, bias: Constant | None) -> int:
        return _NONE if bias is None else self._whole(bias).id

    def _linear_codes(self, name: str, weight: QuantizedWeight) -> Value:
        inputs = weight.codes.shape[1]
        codes: NDArray[Any]
        scales = np.ascontiguousarray(weight.scales, dtype=np.float32)
        if weight.grid not in ("int8", "int4", "int2"):
            raise _refuse_layer(name, f"grid '{weight.grid}' does not run on XNNPACK")
        if weight.grid == "int8":
            if weight.group_size is not None:
                raise _refuse_layer(name, "int8 in groups does not run on XNNPACK")
            datatype, codes = xs.XNNDatatype.xnn_datatype_qcint8, weight.codes
        else:
            if inputs % 2:
                raise _refuse_layer(name, "4-bit codes need an even number of inputs")
            datatype, codes = xs.XNNDatatype.xnn_datatype_qcint4, pack4(weight.codes)
        quantization: Any
        if weight.group_size is None:
            stored = scales.tobytes()
            quantization = xs.PerChannelQuant([], 0, self._store(stored), scales.size)
        else:
            if weight.group_size % 32:
                raise _refuse_layer(
                    name, f"groups of {weight.group_size} do not run; use a multiple of 32"
                )
            stored, error = _bfloat16(scales)
            if error:
                self.notes.append(f"{name}: group scales rounded to bfloat16, off by {error:.1e}")
            datatype = xs.XNNDatatype.xnn_datatype_qbint4
            quantization = xs.PerChannelGroupQuant(
                [],
                0,
                weight.group_size,
                scale_buffer_idx=self._store(stored),
                num_scales=scales.size,
            )
        buffer = self._store(np.ascontiguousarray(codes).tobytes(), stored)
        value = self._value(weight.codes.shape, None, datatype, quantization, buffer)
        self.layers.append(QuantizedLayer(name, weight, value.id))
        return value

    def _dynamic(self, x: Value, axes: int = 1) -> Value:
        """Quantize while running; shared by all layers that read it.

        The last ``axes`` axes share a scale: one for each token, three for each picture.
        """
        key = ("dynamic", x.id, axes)
        if key not in self._written:
            result = self._value(
                x.shape, x.order, xs.XNNDatatype.xnn_datatype_qdint8, xs.PerTokenDynamicQuant(axes)
            )
            self._node_add(xs.XNNConvert(x.id, result.id, 0))
            self._written[key] = result
        return self._written[key]  # type: ignore[no-any-return]

    def conv2d(
        self,
        node: Node,
        x: Value,
        weight: Constant,
        bias: Constant | None = None,
        stride: Sequence[int] = (1, 1),
        padding: Sequence[int] = (0, 0),
        dilation: Sequence[int] = (1, 1),
        groups: int = 1,
    ) -> Value:
        if groups != 1:
            raise self._refuse("convolutions in groups are not supported")
        if isinstance(padding, str):
            raise self._refuse(f"padding '{padding}' is not supported")
        x = self._ordered(x, _NHWC)
        stride, padding, dilation = (list(p) * (2 // len(p)) for p in (stride, padding, dilation))
        outputs, inputs, height, width = weight.sizes
        size = [
            (x.shape[1 + i] + 2 * padding[i] - dilation[i] * (k - 1) - 1) // stride[i] + 1
            for i, k in enumerate((height, width))
        ]
        shape = (x.shape[0], *size, outputs)
        layer, name = self._layer(weight)
        limits = self._limits(node)
        quantized, range_ = _codes_of(layer), range_of(layer)
        if any(float_input_of(reader) for reader in self._reading(node, limits is not None)):
            range_ = None  # a grid on its way would round what that layer reads
        if quantized is None or range_ is None:
            source, result = x, self._value(shape, _NHWC)
            if quantized is None:
                filter_ = self._write(weight, _NHWC, 4).id
            else:
                source = self._dynamic(x, axes=3)
                filter_ = self._conv_filter(name, quantized)
            bias_id, raw = self._bias(bias), result.id
        else:
            into = _qparams(range_.input_min, range_.input_max)
            source = self._static(x, into)
            out = self._output_qparams(node, range_, fused=limits is not None)
            filter_, bias_id = self._conv_codes(name, quantized, bias, into[0])
            raw_value = self._value(
                shape, _NHWC, xs.XNNDatatype.xnn_datatype_qint8, xs.PerTensorQuant(*out)
            )
            raw = raw_value.id
            result = self._value(shape, _NHWC)
            self._written["static", result.id, out] = raw_value
        self._node_add(
            xs.XNNConv2d(
                padding_top=padding[0],
                padding_right=padding[1],
                padding_bottom=padding[0],
                padding_left=padding[1],
                kernel_height=height,
                kernel_width=width,
                subsampling_height=stride[0],
                subsampling_width=stride[1],
                dilation_height=dilation[0],
                dilation_width=dilation[1],
                group_input_channels=inputs,
                group_output_channels=outputs,
                groups=1,
                adjustment_height=0,
                adjustment_width=0,
                input1_id=source.id,
                filter_id=filter_,
                bias_id=bias_id,
                output_id=raw,
                flags=0,
            ),
            limits,
        )
        if raw != result.id:
            self._node_add(xs.XNNConvert(raw, result.id, 0))
        return result

    def _reading(self, node: Node, fused: bool) -> Iterator[nn.Module]:
        """Give the layers that read a convolution's result, or that of its activation."""
        tail = next(iter(node.users)) if fused else node
        for reader in tail.users:
            if str(reader.target) in ("aten.conv2d.default", "aten.linear.default"):
                yield self._layer(self.values[cast(Node, reader.args[1])])[0]

    def _static(self, x: Value, qparams: tuple[float, int]) -> Value:
        key = ("static", x.id, qparams)
        if key not in self._written:
            result = self._value(
                x.shape, x.order, xs.XNNDatatype.xnn_datatype_qint8, xs.PerTensorQuant(*qparams)
            )
            self._node_add(xs.XNNConvert(x.id, result.id, 0))
            self._written[key] = result
        return self._written[key]  # type: ignore[no-any-return]

    def _output_qparams(
        self, node: Node, range_: ActivationRange, *, fused: bool
    ) -> tuple[float, int]:
        """Choose what a convolution rounds its result to.

        If only one convolution reads it, its input range serves and nothing is converted
        in between.
        """
        tail = next(iter(node.users)) if fused else node
        readers = list(tail.users)
        if len(readers) == 1 and str(readers[0].target) == "aten.conv2d.default":
            weight = self.values[cast(Node, readers[0].args[1])]
            layer, _ = self._layer(weight)
            following = range_of(layer)
            if _codes_of(layer) and following:
                return _qparams(following.input_min, following.input_max)
        return _qparams(0.0 if fused else range_.output_min, range_.output_max)

    def _conv_codes(
        self, name: str, weight: QuantizedWeight, bias: Constant | None, input_scale: float
    ) -> tuple[int, int]:
        filter_ = self._conv_filter(name, weight)
        if bias is None:
            return filter_, _NONE
        scales = np.ascontiguousarray(weight.scales, dtype=np.float32)
        steps = (scales * np.float32(input_scale)).astype(np.float32)
        whole = np.rint(bias.tensor.numpy().astype(np.float64) / steps)
        whole = np.clip(whole, -(2**31), 2**31 - 1).astype(np.int32)
        stored = steps.tobytes()
        bias_value = self._value(
            whole.shape,
            None,
            xs.XNNDatatype.xnn_datatype_qcint32,
            xs.PerChannelQuant([], 0, self._store(stored), steps.size),
            self._store(whole.tobytes(), stored),
        )
        return filter_, bias_value.id

    def _conv_filter(self, name: str, weight: QuantizedWeight) -> int:
        if weight.grid not in ("int8", "int4", "int2") or weight.group_size is not None:
            raise _refuse_layer(name, f"grid '{weight.grid}' does not run in convolutions")
        scales = np.ascontiguousarray(weight.scales, dtype=np.float32)
        codes = np.ascontiguousarray(weight.codes.transpose(0, 2, 3, 1))
        stored = scales.tobytes()
        value = self._value(
            codes.shape,
            _NHWC,
            xs.XNNDatatype.xnn_datatype_qcint8,
            xs.PerChannelQuant([], 0, self._store(stored), scales.size),
            self._store(codes.tobytes(), stored),
        )
        self.layers.append(QuantizedLayer(name, weight, value.id))
        return value.id

    def bmm(self, a: Value, b: Value) -> Value:
        a = self._plain(a)
        transposed = b.order == (0, 2, 1)
        if not transposed:
            b = self._plain(b)
        columns = b.sizes[2]
        result = self._value((a.shape[0], a.shape[1], columns))
        flags = _TRANSPOSE_B if transposed else 0
        self._node_add(xs.XNNBatchMatrixMultiply(a.id, b.id, result.id, flags))
        return result

    def softmax(self, x: Value, dim: int) -> Value:
        if dim % len(x.sizes) != len(x.sizes) - 1:
            raise self._refuse("softmax over another axis than the last")
        return self.unary(xs.XNNSoftmax, self._plain(x))

    def cat(self, parts: Sequence[Value | Constant], dim: int = 0) -> Value:
        values = [self._whole(p) if isinstance(p, Constant) else p for p in parts]
        lead = max(values, key=lambda v: math.prod(v.shape))
        values = [self._ordered(v, lead.order) for v in values]
        axis = lead.order[dim % len(lead.order)]
        while len(values) > 1:
            group, rest = values[:_MOST_CONCATENATED], values[_MOST_CONCATENATED:]
            shape = list(group[0].shape)
            shape[axis] = sum(v.shape[axis] for v in group)
            result = self._value(shape, lead.order)
            ids = [v.id for v in group] + [_NONE] * (_MOST_CONCATENATED - len(group))
            kind = getattr(xs, f"XNNConcatenate{len(group)}")
            self._node_add(kind(axis, *ids[:4], result.id, 0, ids[4]))
            values = [result, *rest]
        return values[0]

    def pad(self, x: Value, pads: Sequence[int], mode: str, value: float | None) -> Value:
        if mode != "constant" or any(p < 0 for p in pads):
            raise self._refuse("only padding by a constant is supported")
        rank = len(x.sizes)
        before, after = [0] * rank, [0] * rank
        for i in range(len(pads) // 2):
            axis = x.order[rank - 1 - i]
            before[axis], after[axis] = pads[2 * i], pads[2 * i + 1]
        shape = [s + b + a for s, b, a in zip(x.shape, before, after, strict=True)]
        result = self._value(shape, x.order)
        self._node_add(
            xs.XNNStaticConstantPad(before, after, float(value or 0), x.id, result.id, 0)
        )
        return result

    def permute(self, x: Value | Constant, axes: Sequence[int]) -> Value | Constant:
        if isinstance(x, Constant):
            return Constant(x.tensor.permute(*axes), f"{x.name} permuted {list(axes)}")
        rank = len(x.order)
        return Value(x.id, x.shape, tuple(x.order[a % rank] for a in axes))

    def view(self, node: Node, x: Value | Constant) -> Value | Constant:
        sizes = tuple(int(s) for s in node.meta["val"].shape)
        if sizes == x.sizes:
            return x
        if isinstance(x, Constant):
            return Constant(x.tensor.reshape(sizes), f"{x.name} viewed {list(sizes)}")
        return self._reshaped(self._plain(x), sizes)


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
_RELUS = ("aten.relu.default", "aten.relu_.default")


def _inputs_of(node: xs.XNode) -> list[int]:
    found = (getattr(node.xnode_union, name, _NONE) for name in _READS)
    return [i for i in found if i != _NONE]


def _transposed(e: _Emitter, x: Any, a: int, b: int) -> Any:
    axes = list(range(len(x.sizes)))
    axes[a], axes[b] = axes[b], axes[a]
    return e.permute(x, axes)


def _binary(kind: Any) -> Callable[..., Value]:
    def handle(e: _Emitter, node: Node, a: Any, b: Any, alpha: float = 1) -> Value:
        if alpha != 1:
            raise e._refuse("alpha is not supported")
        return e.binary(kind, node, a, b)

    return handle


def _multiply(e: _Emitter, node: Node, a: Any, b: Any) -> Value:
    if a is b and not e._limits(node):
        return e.unary(xs.XNNSquare, a)
    return e.binary(xs.XNNMultiply, node, a, b)


def _divide(e: _Emitter, node: Node, a: Any, b: Any) -> Value:
    return e.binary(xs.XNNDiv, node, a, b)


def _unary(kind: Any) -> Callable[..., Value]:
    return lambda e, node, x: e.unary(kind, x)


def _gelu(e: _Emitter, node: Node, x: Value, approximate: str = "none") -> Value:
    if approximate != "none":
        raise e._refuse(f"GELU approximated by {approximate} is not XNNPACK's")
    return e.unary(xs.XNNGelu, x)


def _silu(e: _Emitter, node: Node, x: Value) -> Value:
    return e.binary(xs.XNNMultiply, node, x, e.unary(xs.XNNSigmoid, x))


def _same(e: _Emitter, node: Node, x: Any, *_: Any, **__: Any) -> Any:
    return x


def _view(e: _Emitter, node: Node, x: Any, *_: Any, **__: Any) -> Any:
    return e.view(node, x)


def _only_if_unchanged(e: _Emitter, node: Node, x: Any, *_: Any, **__: Any) -> Any:
    if tuple(node.meta["val"].shape) != x.sizes or node.meta["val"].dtype != torch.float32:
        raise e._refuse(f"{node.target} changes shape or type")
    return x


_HANDLERS: dict[str, Callable[..., Any]] = {
    "aten.linear.default": lambda e, node, *a: e.linear(node, *a),
    "aten.conv2d.default": lambda e, node, *a: e.conv2d(node, *a),
    "aten.bmm.default": lambda e, node, a, b: e.bmm(a, b),
    "aten.softmax.int": lambda e, node, x, dim, dtype=None: e.softmax(x, dim),
    "aten.cat.default": lambda e, node, parts, dim=0: e.cat(parts, dim),
    "aten.mean.dim": lambda e, node, x, dims, keepdim=False: e.mean(x, dims, keepdim),
    "aten.pad.default": lambda e, node, x, pads, mode="constant", value=None: e.pad(
        x, pads, mode, value
    ),
    "aten.constant_pad_nd.default": lambda e, node, x, pads, value=0: e.pad(
        x, pads, "constant", value
    ),
    "aten.relu.default": lambda e, node, x: e.relu(node, x),
    "aten.relu_.default": lambda e, node, x: e.relu(node, x),
    "aten.permute.default": lambda e, node, x, axes: e.permute(x, axes),
    "aten.transpose.int": lambda e, node, x, a, b: _transposed(e, x, a, b),
    "aten.add.Tensor": _binary(xs.XNNAdd),
    "aten.sub.Tensor": _binary(xs.XNNSubtract),
    "aten.mul.Tensor": _multiply,
    "aten.div.Tensor": _divide,
    "aten.gelu.default": _gelu,
    "aten.silu.default": _silu,
    "aten.sigmoid.default": _unary(xs.XNNSigmoid),
    "aten.tanh.default": _unary(xs.XNNTanh),
    "aten.rsqrt.default": _unary(xs.XNNReciprocalSquareRoot),
    "aten.sqrt.default": _unary(xs.XNNSquareRoot),
    "aten.neg.default": _unary(xs.XNNNegate),
    "aten.exp.default": _unary(xs.XNNExp),
    "aten.dropout.default": _same,
    "aten.contiguous.default": _same,
    "aten.clone.default": _same,
    "aten.alias.default": _same,
    "aten.lift_fresh_copy.default": _same,
    "aten.detach_.default": _same,
    "aten.to.dtype": _only_if_unchanged,
    "aten.slice.Tensor": _only_if_unchanged,
    "aten.expand.default": _only_if_unchanged,
    "aten.reshape.default": _view,
    "aten.view.default": _view,
    "aten.flatten.using_ints": _view,
    "aten.unflatten.int": _view,
    "aten.unsqueeze.default": _view,
    "aten.squeeze.dim": _view,
}


def _refuse_layer(name: str, message: str, remedy: str | None = None) -> TargetError:
    return TargetError(f"layer '{name}': {message}", remedy=remedy)


def pack4(codes: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Pack codes of -8..7 two to a byte, the even column in the low half, offset by 8."""
    shifted: NDArray[np.uint8] = (codes.astype(np.int16) + 8).astype(np.uint8)
    return np.bitwise_or(np.left_shift(shifted[:, 1::2], 4, dtype=np.uint8), shifted[:, ::2])


def _bfloat16(scales: NDArray[np.float32]) -> tuple[bytes, float]:
    exact = torch.tensor(scales)
    rounded = exact.to(torch.bfloat16)
    error = float(((rounded.float() - exact).abs() / exact).max())
    return rounded.view(torch.int16).numpy().tobytes(), error


def _qparams(low: float, high: float) -> tuple[float, int]:
    """Scale and zero point of the int8 grid over a range, zero included."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = float(np.float32(max(high - low, 1e-6) / 255))
    return scale, int(np.clip(round(-128 - low / scale), -128, 127))


# --- reading back ------------------------------------------------------------------------


def check(path: Path, layers: Sequence[QuantizedLayer]) -> None:
    """Read an artifact and compare every quantized layer with its codes and scales.

    Raises
    ------
    TargetError
        Naming the first layer that is not the student's.
    """
    program, data = _read(path)
    for layer in layers:
        weight = layer.weight
        union = program["xvalues"][layer.value]["xvalue_union"]
        tensor, params = union["tensor_value"], union["quant_params"]
        codes: NDArray[np.int8]
        stored = np.frombuffer(data(tensor["constant_buffer_idx"]), np.uint8)
        scales = data(params["scale_buffer_idx"])
        if weight.codes.ndim == 4:
            expected = weight.codes.transpose(0, 2, 3, 1).reshape(-1).view(np.int8)
            codes = stored.view(np.int8)
        elif weight.grid == "int8":
            expected, codes = weight.codes.reshape(-1), stored.view(np.int8)
        else:
            expected = weight.codes.reshape(-1)
            pairs = np.stack([stored & 15, stored >> 4], axis=-1).reshape(-1)
            codes = pairs.astype(np.int8) - 8
        if weight.group_size is None:
            wanted = np.ascontiguousarray(weight.scales, np.float32).tobytes()
        else:
            wanted, _ = _bfloat16(np.ascontiguousarray(weight.scales, np.float32))
        if not np.array_equal(codes, expected):
            raise _refuse_layer(layer.name, "the artifact does not hold the student's codes")
        if scales != wanted:
            raise _refuse_layer(layer.name, "the artifact does not hold the student's scales")


def _read(path: Path) -> tuple[dict[str, Any], Callable[[int], bytes]]:
    file = deserialize_pte_binary(path.read_bytes())
    plan = file.program.execution_plan[0]
    if len(plan.delegates) != 1:
        raise TargetError(f"has {len(plan.delegates)} delegates, not one", path=path)
    blob = bytes(file.program.backend_delegate_data[plan.delegates[0].processed.index].data)
    header = XNNHeader.from_bytes(blob[: XNNHeader.EXPECTED_LENGTH])
    start = header.flatbuffer_offset
    with tempfile.TemporaryDirectory() as folder:
        schema = Path(folder) / "schema.fbs"
        schema.write_bytes(_get_schema_bytes())
        binary = Path(folder) / "graph.bin"
        binary.write_bytes(blob[start : start + header.flatbuffer_size])
        _flatc_decompile(folder, str(schema), str(binary), ["--raw-binary"])
        text = (Path(folder) / "graph.json").read_text()
    # flatc writes the bounds of fused activations as a bare `inf`, which is not JSON.
    graph = json.loads(re.sub(r"(?<=: )([+-]?)inf\b", r'"\1inf"', text))

    def data(index: int) -> bytes:
        assert file.named_data is not None
        entry = file.named_data.pte_data[graph["constant_data"][index]["named_key"]]
        return bytes(file.named_data.buffers[entry.buffer_index])

    return graph, data
