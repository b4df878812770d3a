"""Fixed 16-bit grids for all values of an ONNX graph, as QNN's provider reads them.

A graph names its grids by pairs of QuantizeLinear and DequantizeLinear. Weights with codes are
DequantizeLinear of these alone, with scales per channel; layers without codes stay in float. The
ranges come from a run of the same graph on calibration samples, before the pairs are in it; grids
reach twice as far.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from handheld.errors import TargetError
from handheld_export.quantization import ROOM, QuantizedWeight
from handheld_export.rewrites import quantized_of, source_of

_MOST: Final = 65535
_MOST_SIGNED: Final = 32767
_LEAST_RANGE: Final = 1e-30
_MOVING: Final = frozenset({"Reshape", "Transpose", "Slice", "Concat", "Pad", "Unsqueeze"})
"""Operators that compute nothing: what they read and write is on one grid."""
_BOUNDED: Final = frozenset({"Softmax", "Sigmoid", "Tanh"})
"""Operators whose results are within -1 and 1."""
_WEIGHTED: Final = frozenset({"Conv", "Gemm", "MatMul"})
_ONE: Final = "reciprocal.one"
Ranges = dict[str, tuple[float, float]]
"""Least and greatest value by tensor; 0 is always between them."""


class Coded(nn.Module):
    """A layer that computes its weight from codes and scales, in the graph too."""

    codes: Tensor
    scales: Tensor

    def __init__(self, layer: nn.Linear | nn.Conv2d, weight: QuantizedWeight, name: str) -> None:
        super().__init__()
        self.weight, self.name, self.bias = weight, name, layer.bias
        self.linear = isinstance(layer, nn.Linear)
        codes = weight.codes.T if self.linear else weight.codes
        self.register_buffer("codes", torch.from_numpy(np.ascontiguousarray(codes)))
        self.register_buffer("scales", torch.from_numpy(weight.scales.copy()))
        if isinstance(layer, nn.Conv2d):
            self.options: Any = layer.stride, layer.padding, layer.dilation, layer.groups

    def forward(self, x: Tensor) -> Tensor:
        """Run the layer."""
        weight = torch.onnx.ops.symbolic(
            "DequantizeLinear",
            (self.codes, self.scales),
            {"axis": int(self.linear)},
            dtype=torch.float32,
            shape=self.codes.shape,
        )
        if not self.linear:
            return F.conv2d(x, weight, self.bias, *self.options)
        y = x @ weight
        return y if self.bias is None else y + self.bias


def replace(
    module: nn.Module,
    check: Callable[[str, QuantizedWeight], None],
    held: Callable[[QuantizedWeight], QuantizedWeight],
) -> None:
    """Replace layers with codes, in place.

    Parameters
    ----------
    module : torch.nn.Module
    check : callable
        Refuses what does not run, given a layer's name and weight.
    held : callable
        Gives the same values in the codes that the graph is to hold.
    """
    made: dict[int, Coded] = {}
    for name, layer in list(module.named_modules(remove_duplicate=False)):
        weight = quantized_of(layer)
        if weight is None or not isinstance(layer, nn.Linear | nn.Conv2d):
            continue
        source = source_of(layer) or name
        check(source, weight)
        if id(layer) not in made:
            made[id(layer)] = Coded(layer, held(weight), source)
        parent, _, own = name.rpartition(".")
        setattr(module.get_submodule(parent), own, made[id(layer)])


def check(model: Any, module: nn.Module) -> None:
    """Compare the codes in a graph with those that :func:`replace` put into a module.

    Raises
    ------
    TargetError
        For the first layer whose codes or scales are not there to the bit.
    """
    from onnx import numpy_helper

    stored = {t.name: t for t in model.graph.initializer}
    read = {tuple(n.input[:2]) for n in model.graph.node if n.op_type == "DequantizeLinear"}
    for name, layer in module.named_modules():
        if not isinstance(layer, Coded):
            continue
        names = f"{name}.codes", f"{name}.scales"
        wanted = layer.codes.numpy(), layer.weight.scales
        if names not in read or not all(
            np.array_equal(numpy_helper.to_array(stored[n]), w)
            for n, w in zip(names, wanted, strict=True)
        ):
            raise TargetError(f"layer '{layer.name}': the graph holds other codes or scales")


def observe(model: Any, samples: Sequence[Mapping[str, NDArray[Any]]]) -> Ranges:
    """Run a graph on samples and return the range of each float tensor that a node or caller gives.

    Parameters
    ----------
    model : onnx.ModelProto
    samples : sequence of mappings of input to float32 ndarray

    Raises
    ------
    TargetError
        If a value is not finite.
    """
    import onnx
    import onnxruntime as ort

    names = [name for node in model.graph.node for name in node.output if name]
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    del watched.graph.output[:]
    watched.graph.output.extend(onnx.helper.make_empty_tensor_value_info(n) for n in names)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = ort.InferenceSession(watched.SerializeToString(), options, ["CPUExecutionProvider"])
    ranges: Ranges = {}
    for sample in samples:
        computed = dict(zip(names, session.run(names, dict(sample)), strict=True))
        for name, value in {**computed, **sample}.items():
            if value.dtype != np.float32:
                continue
            if not np.isfinite(value).all():
                raise TargetError("calibration gives values that are not finite")
            low, high = ranges.get(name, (0.0, 0.0))
            ranges[name] = min(low, float(value.min())), max(high, float(value.max()))
    return ranges


def quantize(model: Any, ranges: Ranges) -> None:
    """Put all that a graph computes on grids, in place, but for layers with float weights.

    Parameters
    ----------
    model : onnx.ModelProto
    ranges : dict
        As :func:`observe` gives them.
    """
    _divide(model.graph)
    _Grids(model.graph, ranges).run()


def _divide(graph: Any) -> None:
    """Make reciprocals divisions of a 1 of their own.

    QNN's provider puts the 1 of a Reciprocal on the grid of what divides it, where it is no 1 if
    that grid ends below.
    """
    from onnx import numpy_helper

    found = [node for node in graph.node if node.op_type == "Reciprocal"]
    if found:
        graph.initializer.append(numpy_helper.from_array(np.asarray(1, np.float32), _ONE))
    for node in found:
        node.op_type = "Div"
        node.input[:] = [_ONE, *node.input]


class _Grids:
    def __init__(self, graph: Any, ranges: Ranges) -> None:
        from onnx import TensorProto, numpy_helper

        self.graph, self.ranges = graph, _united(graph, _with_room(graph, ranges))
        constants = {t.name: t for t in graph.initializer if t.data_type == TensorProto.FLOAT}
        self.weights = {n.output[0]: n for n in graph.node if n.op_type == "DequantizeLinear"}
        self.constants = {name: numpy_helper.to_array(t) for name, t in constants.items()}
        self.nodes: list[Any] = []
        self.placed: dict[str, str] = {}
        self.scales: dict[str, np.float32] = {}

    def run(self) -> None:
        for node in self.graph.node:
            floats = node.op_type in _WEIGHTED and node.input[1] in self.constants
            if not floats and node.output[0] not in self.weights:
                inputs = [self._input(node, place) for place in range(len(node.input))]
                node.input[:] = inputs
            self.nodes.append(node)
        for output in self.graph.output:
            self._end(output.name)
        del self.graph.node[:], self.graph.value_info[:]
        self.graph.node.extend(self.nodes)
        used = {name for node in self.nodes for name in node.input}
        kept = [t for t in self.graph.initializer if t.name in used]
        del self.graph.initializer[:]
        self.graph.initializer.extend(kept)

    def _input(self, node: Any, place: int) -> str:
        name = str(node.input[place])
        if name in self.weights or not (name in self.ranges or name in self.constants):
            return name
        if node.op_type == "Conv" and place == 2:
            return self._bias(node, name)
        if node.op_type == "MatMul" and place == 1 and name in self.ranges:
            return self._signed(name)
        return self._placed(name)

    def _store(self, name: str, values: Any) -> str:
        from onnx import numpy_helper

        self.graph.initializer.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def _node(self, kind: str, inputs: Sequence[str], output: str, **options: int) -> str:
        from onnx import helper

        self.nodes.append(helper.make_node(kind, inputs, [output], **options))
        return output

    def _placed(self, name: str, made: str | None = None) -> str:
        """Return a tensor that has been on its grid, by the name ``made``."""
        if name not in self.placed:
            if name in self.constants:
                values = self.constants[name]
                low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
            else:
                low, high = self.ranges[name]
            scale = np.float32(max(high - low, _LEAST_RANGE) / _MOST)
            zero = np.uint16(np.clip(round(-low / float(scale)), 0, _MOST))
            made = made or f"{name}.grid"
            grid = self._store(f"{made}.scale", scale), self._store(f"{made}.zero", zero)
            codes = self._node("QuantizeLinear", [name, *grid], f"{made}.codes")
            self.placed[name] = self._node("DequantizeLinear", [codes, *grid], made)
            self.scales[self.placed[name]] = scale
        return self.placed[name]

    def _signed(self, name: str) -> str:
        """Return a computed tensor that has been on a symmetric grid of signed codes.

        QNN's provider rounds the right side of a product of two computed matrices to 8 bits where
        its 16-bit codes are unsigned.
        """
        made = f"{name}.signed"
        if made not in self.scales:
            scale = np.float32(max(*map(abs, self.ranges[name]), _LEAST_RANGE) / _MOST_SIGNED)
            grid = self._store(f"{made}.scale", scale), self._store(f"{made}.zero", np.int16(0))
            codes = self._node("QuantizeLinear", [self._placed(name), *grid], f"{made}.codes")
            self.scales[self._node("DequantizeLinear", [codes, *grid], made)] = scale
        return made

    def _bias(self, node: Any, name: str) -> str:
        """Put a bias on the grid of its layer's sums: a product of the input's and the weight's."""
        x = self._placed(str(node.input[0]))
        scale = self.scales[x] * self.constants[str(self.weights[node.input[1]].input[1])]
        codes = np.rint(self.constants[name].astype(np.float64) / scale)
        if np.abs(codes).max() >= 2**31:
            layer = str(self.weights[node.input[1]].input[0]).removesuffix(".codes")
            raise TargetError(f"layer '{layer}': its bias leaves 32 bits on the grid of its sums")
        made = f"{node.output[0]}.bias"
        stored = (
            self._store(f"{made}.codes", codes.astype(np.int32)),
            self._store(f"{made}.scales", scale.astype(np.float32)),
        )
        return self._node("DequantizeLinear", stored, made, axis=0)

    def _end(self, name: str) -> None:
        """Let a result of the graph come off its grid."""
        raw = f"{name}.raw"
        for node in self.nodes:
            node.input[:] = [raw if n == name else n for n in node.input]
            node.output[:] = [raw if n == name else n for n in node.output]
        self.ranges[raw] = self.ranges[name]
        self._placed(raw, name)


def _with_room(graph: Any, ranges: Ranges) -> Ranges:
    bounded = {n for node in graph.node if node.op_type in _BOUNDED for n in node.output}
    wider = {name: (ROOM * low, ROOM * high) for name, (low, high) in ranges.items()}
    return wider | {n: (max(wider[n][0], -1.0), min(wider[n][1], 1.0)) for n in bounded}


def _united(graph: Any, ranges: Ranges) -> Ranges:
    """Give all that is only moved one range."""
    group = {name: name for name in ranges}
    for node in graph.node:
        if node.op_type in _MOVING:
            moved = {group[n] for n in (*node.input, *node.output) if n in group}
            group |= {n: min(moved) for n, g in group.items() if g in moved}
    united: Ranges = {}
    for name, (low, high) in ranges.items():
        least, most = united.get(group[name], (0.0, 0.0))
        united[group[name]] = min(least, low), max(most, high)
    return {name: united[group[name]] for name in ranges}
