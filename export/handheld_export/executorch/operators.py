"""Operators of an exported segment as nodes of an XNNPACK graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from executorch.backends.xnnpack.serialization import xnnpack_graph_schema as xs
from torch import nn
from torch.fx import Node

from handheld.errors import TargetError
from handheld_export.executorch.graph import NHWC, NONE, Constant, Graph, Value
from handheld_export.executorch.weights import conv_codes, conv_filter, linear_codes, qparams
from handheld_export.quantization import ActivationRange, QuantizedWeight
from handheld_export.rewrites import float_input_of, quantized_of, range_of, source_of

_KEEP_DIMS = 0x40
_TRANSPOSE_B = 0x1
_RELU = xs.OutputMinMax(0, "+inf")
_MOST_CONCATENATED = 5
Operand = Value | Constant | float


def _codes_of(layer: nn.Module) -> QuantizedWeight | None:
    """Return the codes that a layer computes with; XNNPACK has no products of floats and codes."""
    return None if float_input_of(layer) else quantized_of(layer)


class Emitter:
    """Walks an exported graph once and writes every operator into ``graph``."""

    def __init__(self, module: nn.Module) -> None:
        self.graph = Graph()
        self._modules = dict(module.named_modules())
        self._values: dict[Node, Any] = {}
        self._fused: set[Node] = set()
        self._node: Node | None = None

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
                    self._values[node] = Constant(state[name].detach(), name)
                elif node.name in lifted:
                    name = lifted[node.name]
                    self._values[node] = Constant(exported.constants[name].detach(), name)
                else:
                    self._values[node] = self.graph.input(tuple(node.meta["val"].shape))
            elif node.op == "call_function":
                self._values[node] = self._call(node)
            elif node.op == "output":
                return [self.graph.plain(self._values[n]) for n in node.args[0]]
        raise AssertionError("a graph has an output")

    def _call(self, node: Node) -> Any:
        name = str(node.target)
        handler = _HANDLERS.get(name)
        if handler is None:
            raise self.refuse(f"operator {name} has no XNNPACK form")
        try:
            return handler(self, node, *self._arguments(node.args), **node.kwargs)
        except TypeError as error:
            raise self.refuse(f"operator {name} is called in an unknown way ({error})") from error

    def _arguments(self, arguments: Any) -> list[Any]:
        return [
            self._arguments(a)
            if isinstance(a, list | tuple)
            else self._values[a]
            if isinstance(a, Node)
            else a
            for a in arguments
        ]

    def refuse(self, message: str) -> TargetError:
        """Return an error that names the module of the operator at hand."""
        stack = self._node.meta.get("nn_module_stack", {}) if self._node else {}
        where = next((str(p[0]) for p in reversed(stack.values()) if p[0]), "the segment")
        return TargetError(f"{where}: {message}", remedy="add a rewrite for it")

    def unary(self, kind: Any, x: Value) -> Value:
        """Write an operator of one tensor, whatever the order of its axes."""
        result = self.graph.value(x.shape, x.order)
        self.graph.add(kind(x.id, result.id, 0))
        return result

    def binary(self, kind: Any, node: Node, a: Operand, b: Operand) -> Value:
        """Write arithmetic of two operands, the smaller one laid as the larger."""
        a, b = self._operand(a), self._operand(b)
        rank = max(len(a.sizes), len(b.sizes))
        tensors = [x for x in (a, b) if isinstance(x, Value)]
        if not tensors:
            raise self.refuse("arithmetic on constants only is not folded")
        lead = max(tensors, key=lambda x: (len(x.sizes) == rank, math.prod(x.shape)))
        if len(lead.sizes) < rank:
            lead = self.graph.reshaped(
                self.graph.plain(lead), (1,) * (rank - len(lead.sizes)) + lead.sizes
            )
        left, right = (self._aligned(x, lead, rank) for x in (a, b))
        shape = [max(i, j) for i, j in zip(left.shape, right.shape, strict=True)]
        result = self.graph.value(shape, lead.order)
        self.graph.add(kind(left.id, right.id, result.id, 0), self.limits(node))
        return result

    def _operand(self, x: Operand) -> Value | Constant:
        if isinstance(x, float | int):
            return Constant(torch.tensor(float(x)), f"scalar {float(x)!r}")
        return x

    def _aligned(self, x: Value | Constant, lead: Value, rank: int) -> Value:
        if isinstance(x, Constant):
            return self.graph.write(x, lead.order, rank)
        if len(x.sizes) < rank:
            x = self.graph.reshaped(self.graph.plain(x), (1,) * (rank - len(x.sizes)) + x.sizes)
        return self.graph.ordered(x, lead.order)

    def limits(self, node: Node) -> Any:
        """Fuse a ReLU that is the only reader."""
        readers = list(node.users)
        if len(readers) == 1 and str(readers[0].target) in _RELUS:
            self._fused.add(readers[0])
            return _RELU
        return None

    def relu(self, node: Node, x: Value) -> Value:
        """Write a ReLU, unless the node before took it in."""
        if node in self._fused:
            return x
        result = self.graph.value(x.shape, x.order)
        self.graph.add(xs.XNNClamp(x.id, result.id, 0), _RELU)
        return result

    def mean(self, x: Value, dims: Sequence[int] | int | None, keepdim: bool) -> Value:
        """Write a mean over axes that lie side by side."""
        rank = len(x.sizes)
        logical = range(rank) if dims is None else [dims] if isinstance(dims, int) else dims
        axes = sorted(x.order[d % rank] for d in logical)
        if axes != list(range(axes[0], axes[-1] + 1)):
            raise self.refuse("a mean over axes that do not lie side by side")
        shape = [1 if i in axes else s for i, s in enumerate(x.shape)]
        if axes == [rank - 1] == [x.order[-1]] and keepdim:
            return self._row_mean(x)
        if rank == 4 and axes == [1, 2]:
            pooled = x
        else:
            inner = math.prod(x.shape[axes[-1] + 1 :])
            size = math.prod(x.shape[i] for i in axes)
            pooled = self.graph.reshaped(x, (math.prod(x.shape[: axes[0]]), size, 1, inner))
        result = self.graph.value([pooled.shape[0], 1, 1, pooled.shape[3]])
        self.graph.add(xs.XNNGlobalAvgPooling2d(pooled.id, result.id, _KEEP_DIMS))
        result = Value(self.graph.reshaped(result, shape).id, tuple(shape), x.order)
        if keepdim:
            return result
        removed = {d % rank for d in logical}
        return self.graph.reshaped(
            self.graph.plain(result), [s for i, s in enumerate(x.sizes) if i not in removed]
        )

    def _row_mean(self, x: Value) -> Value:
        """Return means over the last axis as a product with a column of 1 / n.

        XNNPACK reduces four-dimensional tensors only; the product saves two copies and is
        faster than the reduction.
        """
        n = x.shape[-1]
        column = self.graph.whole(Constant(torch.full((1, n), 1 / n), f"mean of {n}"))
        result = self.graph.value((*x.shape[:-1], 1), x.order)
        self.graph.add(xs.XNNFullyConnected(x.id, column.id, NONE, result.id, 0))
        return result

    def linear(self, node: Node, x: Value, weight: Constant, bias: Constant | None = None) -> Value:
        """Write a linear layer; where it has codes, its inputs are rounded while running."""
        if x.order[-1] != len(x.order) - 1:
            x = self.graph.plain(x)
        layer, name = self._layer(weight)
        quantized = _codes_of(layer)
        if quantized is None:
            source, filter_ = x, self.graph.whole(weight)
        else:
            filter_ = linear_codes(self.graph, name, quantized)
            source = self._dynamic(x)
        result = self.graph.value((*x.shape[:-1], filter_.shape[0]), x.order)
        self.graph.add(
            xs.XNNFullyConnected(source.id, filter_.id, self._bias(bias), result.id, 0),
            self.limits(node),
        )
        return result

    def _layer(self, weight: Constant) -> tuple[nn.Module, str]:
        path = weight.name.rpartition(".")[0]
        layer = self._modules[path]
        return layer, source_of(layer) or path

    def _bias(self, bias: Constant | None) -> int:
        return NONE if bias is None else self.graph.whole(bias).id

    def _dynamic(self, x: Value, axes: int = 1) -> Value:
        """Quantize while running; shared by all layers that read it.

        The last ``axes`` axes share a scale: one for each token, three for each picture.
        """
        key = ("dynamic", x.id, axes)
        if key not in self.graph.written:
            result = self.graph.value(
                x.shape, x.order, xs.XNNDatatype.xnn_datatype_qdint8, xs.PerTokenDynamicQuant(axes)
            )
            self.graph.add(xs.XNNConvert(x.id, result.id, 0))
            self.graph.written[key] = result
        return self.graph.written[key]  # type: ignore[no-any-return]

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
        """Write a convolution: in float, with inputs rounded while running, or on fixed grids."""
        if groups != 1:
            raise self.refuse("convolutions in groups are not supported")
        if isinstance(padding, str):
            raise self.refuse(f"padding '{padding}' is not supported")
        x = self.graph.ordered(x, NHWC)
        stride, padding, dilation = (list(p) * (2 // len(p)) for p in (stride, padding, dilation))
        outputs, inputs, height, width = weight.sizes
        size = [
            (x.shape[1 + i] + 2 * padding[i] - dilation[i] * (k - 1) - 1) // stride[i] + 1
            for i, k in enumerate((height, width))
        ]
        shape = (x.shape[0], *size, outputs)
        layer, name = self._layer(weight)
        limits = self.limits(node)
        quantized, range_ = _codes_of(layer), range_of(layer)
        if any(float_input_of(reader) for reader in self._reading(node, limits is not None)):
            range_ = None  # a grid on its way would round what that layer reads
        if quantized is None or range_ is None:
            source, result = x, self.graph.value(shape, NHWC)
            if quantized is None:
                filter_ = self.graph.write(weight, NHWC, 4).id
            else:
                source = self._dynamic(x, axes=3)
                filter_ = conv_filter(self.graph, name, quantized)
            bias_id, raw = self._bias(bias), result.id
        else:
            into = qparams(range_.input_min, range_.input_max)
            source = self._static(x, into)
            out = self._output_qparams(node, range_, fused=limits is not None)
            filter_, bias_id = conv_codes(self.graph, name, quantized, bias, into[0])
            raw_value = self.graph.value(
                shape, NHWC, xs.XNNDatatype.xnn_datatype_qint8, xs.PerTensorQuant(*out)
            )
            raw = raw_value.id
            result = self.graph.value(shape, NHWC)
            self.graph.written["static", result.id, out] = raw_value
        self.graph.add(
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
            self.graph.add(xs.XNNConvert(raw, result.id, 0))
        return result

    def _reading(self, node: Node, fused: bool) -> Iterator[nn.Module]:
        """Give the layers that read a convolution's result, or that of its activation."""
        tail = next(iter(node.users)) if fused else node
        for reader in tail.users:
            if str(reader.target) in ("aten.conv2d.default", "aten.linear.default"):
                yield self._layer(self._values[cast(Node, reader.args[1])])[0]

    def _static(self, x: Value, grid: tuple[float, int]) -> Value:
        key = ("static", x.id, grid)
        if key not in self.graph.written:
            result = self.graph.value(
                x.shape, x.order, xs.XNNDatatype.xnn_datatype_qint8, xs.PerTensorQuant(*grid)
            )
            self.graph.add(xs.XNNConvert(x.id, result.id, 0))
            self.graph.written[key] = result
        return self.graph.written[key]  # type: ignore[no-any-return]

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
            weight = self._values[cast(Node, readers[0].args[1])]
            layer, _ = self._layer(weight)
            following = range_of(layer)
            if _codes_of(layer) and following:
                return qparams(following.input_min, following.input_max)
        return qparams(0.0 if fused else range_.output_min, range_.output_max)

    def bmm(self, a: Value, b: Value) -> Value:
        """Write a product of two batches; a transposed right side is read as it lies."""
        a = self.graph.plain(a)
        transposed = b.order == (0, 2, 1)
        if not transposed:
            b = self.graph.plain(b)
        columns = b.sizes[2]
        result = self.graph.value((a.shape[0], a.shape[1], columns))
        flags = _TRANSPOSE_B if transposed else 0
        self.graph.add(xs.XNNBatchMatrixMultiply(a.id, b.id, result.id, flags))
        return result

    def softmax(self, x: Value, dim: int) -> Value:
        """Write a softmax over the last axis."""
        if dim % len(x.sizes) != len(x.sizes) - 1:
            raise self.refuse("softmax over another axis than the last")
        return self.unary(xs.XNNSoftmax, self.graph.plain(x))

    def cat(self, parts: Sequence[Value | Constant], dim: int = 0) -> Value:
        """Join tensors, at most five at a time."""
        values = [self.graph.whole(p) if isinstance(p, Constant) else p for p in parts]
        lead = max(values, key=lambda v: math.prod(v.shape))
        values = [self.graph.ordered(v, lead.order) for v in values]
        axis = lead.order[dim % len(lead.order)]
        while len(values) > 1:
            group, rest = values[:_MOST_CONCATENATED], values[_MOST_CONCATENATED:]
            shape = list(group[0].shape)
            shape[axis] = sum(v.shape[axis] for v in group)
            result = self.graph.value(shape, lead.order)
            ids = [v.id for v in group] + [NONE] * (_MOST_CONCATENATED - len(group))
            kind = getattr(xs, f"XNNConcatenate{len(group)}")
            self.graph.add(kind(axis, *ids[:4], result.id, 0, ids[4]))
            values = [result, *rest]
        return values[0]

    def pad(self, x: Value, pads: Sequence[int], mode: str, value: float | None) -> Value:
        """Write padding by a constant."""
        if mode != "constant" or any(p < 0 for p in pads):
            raise self.refuse("only padding by a constant is supported")
        rank = len(x.sizes)
        before, after = [0] * rank, [0] * rank
        for i in range(len(pads) // 2):
            axis = x.order[rank - 1 - i]
            before[axis], after[axis] = pads[2 * i], pads[2 * i + 1]
        shape = [s + b + a for s, b, a in zip(x.shape, before, after, strict=True)]
        result = self.graph.value(shape, x.order)
        self.graph.add(
            xs.XNNStaticConstantPad(before, after, float(value or 0), x.id, result.id, 0)
        )
        return result

    def permute(self, x: Value | Constant, axes: Sequence[int]) -> Value | Constant:
        """Return other names for the same axes; nothing is moved."""
        if isinstance(x, Constant):
            return Constant(x.tensor.permute(*axes), f"{x.name} permuted {list(axes)}")
        rank = len(x.order)
        return Value(x.id, x.shape, tuple(x.order[a % rank] for a in axes))

    def view(self, node: Node, x: Value | Constant) -> Value | Constant:
        """Return another shape over the same values."""
        sizes = tuple(int(s) for s in node.meta["val"].shape)
        if sizes == x.sizes:
            return x
        if isinstance(x, Constant):
            return Constant(x.tensor.reshape(sizes), f"{x.name} viewed {list(sizes)}")
        return self.graph.reshaped(self.graph.plain(x), sizes)


_RELUS = ("aten.relu.default", "aten.relu_.default")


def _transposed(e: Emitter, x: Any, a: int, b: int) -> Any:
    axes = list(range(len(x.sizes)))
    axes[a], axes[b] = axes[b], axes[a]
    return e.permute(x, axes)


def _binary(kind: Any) -> Callable[..., Value]:
    def handle(e: Emitter, node: Node, a: Any, b: Any, alpha: float = 1) -> Value:
        if alpha != 1:
            raise e.refuse("alpha is not supported")
        return e.binary(kind, node, a, b)

    return handle


def _multiply(e: Emitter, node: Node, a: Any, b: Any) -> Value:
    if a is b and not e.limits(node):
        return e.unary(xs.XNNSquare, a)
    return e.binary(xs.XNNMultiply, node, a, b)


def _divide(e: Emitter, node: Node, a: Any, b: Any) -> Value:
    return e.binary(xs.XNNDiv, node, a, b)


def _unary(kind: Any) -> Callable[..., Value]:
    return lambda e, node, x: e.unary(kind, x)


def _gelu(e: Emitter, node: Node, x: Value, approximate: str = "none") -> Value:
    if approximate != "none":
        raise e.refuse(f"GELU approximated by {approximate} is not XNNPACK's")
    return e.unary(xs.XNNGelu, x)


def _silu(e: Emitter, node: Node, x: Value) -> Value:
    return e.binary(xs.XNNMultiply, node, x, e.unary(xs.XNNSigmoid, x))


def _same(e: Emitter, node: Node, x: Any, *_: Any, **__: Any) -> Any:
    return x


def _view(e: Emitter, node: Node, x: Any, *_: Any, **__: Any) -> Any:
    return e.view(node, x)


def _only_if_unchanged(e: Emitter, node: Node, x: Any, *_: Any, **__: Any) -> Any:
    if tuple(node.meta["val"].shape) != x.sizes or node.meta["val"].dtype != torch.float32:
        raise e.refuse(f"{node.target} changes shape or type")
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
