"""Segments as ONNX graphs that hold the student's codes.

Quantized layers are replaced by modules that keep codes and scales as buffers in the very layout
of onnxruntime's kernels and name the operators that read them; torch's exporter turns everything
else into ONNX, and buffers become initializers.

- Linear layers are ``com.microsoft.MatMulNBits`` in 2 or 4 bits, and in int8 with groups. Its
  kernels quantize activations to int8 in blocks while running.
- Linear layers in int8 with scales per channel are ``MatMulInteger``, on rows that the graph itself
  quantizes. That is faster, and gives the same bits on arm64 and on x86-64 with VNNI.
- Convolutions are ``DynamicQuantizeLinear`` and ``ConvInteger`` with int8 codes.
- Layers whose input is not to be rounded compute in float from the same codes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from handheld.errors import TargetError
from handheld.files import sha256_file
from handheld_export.quantization import BITS, QuantizedWeight, unpack
from handheld_export.quantization import pack as pack_rows
from handheld_export.rewrites import float_input_of

OPSET = 23
DOMAIN = "com.microsoft"
EXTERNAL_FROM = 1024
"""Bytes from which a tensor lies in the file of external data."""
_ZERO = 128
"""Of rows' codes: the fast kernels take an unsigned left side, whose middle this is."""
_LEAST = 1e-20
"""A row of zeros is divided by this."""
_FLOAT_ACTIVATIONS, _INT8_ACTIVATIONS = 1, 4
"""``accuracy_level`` of MatMulNBits: activations in float32, or in int8."""


@dataclass(frozen=True)
class Layer:
    """A quantized layer of an artifact, to be read back."""

    name: str
    initializers: tuple[str, ...]
    """What the codes may be called in the file: one name for each place that uses the layer."""
    weight: QuantizedWeight


class CodedLinear(nn.Module):
    """A linear layer that holds its codes as MatMulNBits reads them."""

    codes: Tensor
    scales: Tensor
    bias: Tensor

    def __init__(self, layer: nn.Linear, weight: QuantizedWeight) -> None:
        super().__init__()
        out, self.inputs = layer.out_features, layer.in_features
        self.bits = BITS[weight.grid]
        self.accuracy = _FLOAT_ACTIVATIONS if float_input_of(layer) else _INT8_ACTIVATIONS
        self.block = weight.group_size or _block(self.inputs)
        blocks = -(-self.inputs // self.block)
        half = 1 << (self.bits - 1)
        padded = np.zeros((out, blocks * self.block), np.int8)
        padded[:, : self.inputs] = weight.codes
        offset = (padded.astype(np.int16) + half).astype(np.uint8)
        rows = offset if self.bits == 8 else pack_rows(offset.view(np.int8), self.bits)
        scales = weight.scales.reshape(out, -1)
        self.register_buffer("codes", torch.from_numpy(rows.reshape(out, blocks, -1)))
        self.register_buffer(
            "scales", torch.from_numpy(np.broadcast_to(scales, (out, blocks)).copy())
        )
        bias = torch.zeros(out) if layer.bias is None else layer.bias.detach()
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        out = len(self.bias)
        y: Tensor = torch.onnx.ops.symbolic(
            f"{DOMAIN}::MatMulNBits",
            (x, self.codes, self.scales, None, None, self.bias),
            {
                "K": self.inputs,
                "N": out,
                "bits": self.bits,
                "block_size": self.block,
                "accuracy_level": self.accuracy,
            },
            dtype=torch.float32,
            shape=(*x.shape[:-1], out),
            version=1,
        )
        return y


class IntegerLinear(nn.Module):
    """A linear layer that holds int8 codes as MatMulInteger reads them.

    Rows are quantized while running, each by its largest magnitude.
    """

    codes: Tensor
    scales: Tensor
    bias: Tensor
    zero: Tensor
    most: Tensor
    least: Tensor

    def __init__(self, layer: nn.Linear, weight: QuantizedWeight) -> None:
        super().__init__()
        self.register_buffer("codes", torch.from_numpy(np.ascontiguousarray(weight.codes.T)))
        self.register_buffer("scales", torch.from_numpy(weight.scales.copy()))
        bias = torch.zeros(layer.out_features) if layer.bias is None else layer.bias.detach()
        self.register_buffer("bias", bias)
        self.register_buffer("zero", torch.tensor(_ZERO, dtype=torch.uint8))
        # As tensors: numbers would become Reciprocal, and Clip, which turns infinity into a number.
        self.register_buffer("most", torch.tensor(127.0))
        self.register_buffer("least", torch.tensor(_LEAST))

    def forward(self, x: Tensor) -> Tensor:
        largest = torch.maximum(x.abs().amax(-1, keepdim=True), self.least)
        codes = torch.round(x * (self.most / largest) + _ZERO).to(torch.uint8)
        counted = torch.onnx.ops.symbolic(
            "MatMulInteger",
            (codes, self.codes, self.zero, None),
            {},
            dtype=torch.int32,
            shape=(*x.shape[:-1], len(self.bias)),
        )
        return counted.float() * self.scales * (largest * (1 / 127)) + self.bias


class CodedConv(nn.Module):
    """A convolution that holds its codes as ConvInteger reads them."""

    codes: Tensor
    scales: Tensor
    bias: Tensor

    def __init__(self, layer: nn.Conv2d, weight: QuantizedWeight) -> None:
        super().__init__()
        if isinstance(layer.padding, str) or layer.padding_mode != "zeros":
            raise TargetError(f"padding {layer.padding} of mode {layer.padding_mode} is not taken")
        self.register_buffer("codes", torch.from_numpy(np.ascontiguousarray(weight.codes)))
        self.float_input = float_input_of(layer)
        shape = (-1,) if self.float_input else (1, -1, 1, 1)
        self.register_buffer("scales", torch.from_numpy(weight.scales.reshape(shape).copy()))
        bias = torch.zeros(layer.out_channels) if layer.bias is None else layer.bias.detach()
        self.register_buffer("bias", bias.reshape(1, -1, 1, 1))
        self.stride, self.padding = list(layer.stride), list(layer.padding)
        self.dilation, self.groups = list(layer.dilation), layer.groups

    def forward(self, x: Tensor) -> Tensor:
        if self.float_input:
            return self._in_float(x)
        codes, scale, zero = torch.onnx.ops.symbolic_multi_out(
            "DynamicQuantizeLinear",
            (x,),
            dtypes=(torch.uint8, torch.float32, torch.uint8),
            shapes=(x.shape, (), ()),
        )
        counted = torch.onnx.ops.symbolic(
            "ConvInteger",
            (codes, self.codes, zero, None),
            {
                "strides": self.stride,
                "pads": [*self.padding, *self.padding],
                "dilations": self.dilation,
                "group": self.groups,
            },
            dtype=torch.int32,
            shape=self._shape(x),
        )
        return counted.float() * (scale * self.scales) + self.bias

    def _in_float(self, x: Tensor) -> Tensor:
        weight = torch.onnx.ops.symbolic(
            "DequantizeLinear",
            (self.codes, self.scales, None),
            {"axis": 0},
            dtype=torch.float32,
            shape=tuple(self.codes.shape),
        )
        parts = (self.stride, self.padding, self.dilation, self.groups)
        return functional.conv2d(x, weight, None, *parts) + self.bias

    def _shape(self, x: Tensor) -> tuple[int, ...]:
        place = zip(
            x.shape[2:], self.codes.shape[2:], self.stride, self.padding, self.dilation, strict=True
        )
        sides = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in place]
        return (x.shape[0], self.codes.shape[0], *sides)


def _block(inputs: int) -> int:
    """Return the block that one scale per channel is repeated for: kernels know 16 to 256."""
    return min(128, max(16, 1 << math.ceil(math.log2(inputs))))


def check(name: str, weight: QuantizedWeight) -> None:
    """Refuse what onnxruntime's kernels do not hold.

    Raises
    ------
    TargetError
        Naming the layer.
    """
    if weight.grid == "palette":
        raise TargetError(f"layer '{name}': palettes do not run on onnxruntime's CPU kernels")
    if weight.codes.ndim == 4 and weight.grid != "int8":
        raise TargetError(f"layer '{name}': convolutions hold int8 codes, not {weight.grid}")
    group = weight.group_size
    if group is not None and (group < 16 or group > 256 or group & (group - 1)):
        raise TargetError(
            f"layer '{name}': groups of {group} do not run on onnxruntime",
            remedy="use a power of two from 16 to 256",
        )


def replace(
    module: nn.Module, container: Callable[[QuantizedWeight], QuantizedWeight]
) -> list[Layer]:
    """Replace quantized layers of a module in place.

    Parameters
    ----------
    module : torch.nn.Module
        A rewritten copy.
    container : callable
        Returns a weight on the grid that holds it.

    Returns
    -------
    list of Layer
        What the artifact must hold, with the names of initializers.

    Raises
    ------
    TargetError
        If a grid does not run.
    """
    found: dict[int, tuple[nn.Module, str, QuantizedWeight, list[str]]] = {}
    for name, layer in list(module.named_modules(remove_duplicate=False)):
        if not isinstance(layer, nn.Linear | nn.Conv2d):
            continue
        stored: QuantizedWeight | None = getattr(layer, "quantized", None)
        if stored is None:
            continue
        if id(layer) not in found:
            source = str(getattr(layer, "source_name", name))
            weight = container(stored)
            check(source, weight)
            found[id(layer)] = _coded(layer, weight), source, weight, []
        new, _, _, names = found[id(layer)]
        names.append(f"{name}.codes")
        parent, _, own = name.rpartition(".")
        setattr(module.get_submodule(parent), own, new)
    return [Layer(s, tuple(names), weight) for _, s, weight, names in found.values()]


def _coded(layer: nn.Linear | nn.Conv2d, weight: QuantizedWeight) -> nn.Module:
    if isinstance(layer, nn.Conv2d):
        return CodedConv(layer, weight)
    by_rows = weight.grid == "int8" and weight.group_size is None and not float_input_of(layer)
    return IntegerLinear(layer, weight) if by_rows else CodedLinear(layer, weight)


def lower(
    module: nn.Module,
    examples: Sequence[Tensor],
    inputs: Sequence[str],
    outputs: Sequence[str],
    path: Path,
) -> Path | None:
    """Write a module, with what :func:`replace` put into it.

    Parameters
    ----------
    module : torch.nn.Module
    examples : sequence of tensors
    inputs, outputs : sequence of str
        Names of the graph's.
    path : Path
        Of the graph; tensors go to a file beside it.

    Returns
    -------
    Path or None
        The file of external data, named by its SHA-256: phones keep a file by that, whatever its
        name was, and a graph finds its tensors by file name. None if no tensor is large enough.

    Raises
    ------
    TargetError
        If the exporter cannot translate it.
    """
    import onnx

    data = path.with_name(path.name + ".data")
    data.unlink(missing_ok=True)  # onnx would write behind what is there
    for name in ("torch.onnx", "onnxscript", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with torch.no_grad():
            made = torch.onnx.export(
                module, tuple(examples), dynamo=True, opset_version=OPSET, verbose=False,
                input_names=list(inputs), output_names=list(outputs), optimize=True,
            )  # fmt: skip
    except Exception as error:
        raise TargetError(f"torch cannot export it: {error}") from error
    assert made is not None
    model = made.model_proto
    _anonymous(model)
    onnx.save_model(
        model, path, save_as_external_data=True, location=data.name,
        size_threshold=EXTERNAL_FROM, convert_attribute=False,
    )  # fmt: skip
    made_data = name_by_content(path, data) if data.exists() else None
    onnx.checker.check_model(str(path))
    return made_data


def name_by_content(path: Path, data: Path) -> Path:
    """Rename a graph's file of external data to its SHA-256, in the graph, too."""
    import onnx

    name = sha256_file(data)
    model = onnx.load(str(path), load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = name
    path.write_bytes(model.SerializeToString(deterministic=True))
    return data.replace(data.with_name(name))


def _anonymous(model: Any) -> None:
    """Remove stack traces and the like: they name this machine's folders."""
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output):
        del value.metadata_props[:]
    for tensor in model.graph.initializer:
        del tensor.metadata_props[:]
    del model.graph.metadata_props[:]
    del model.metadata_props[:]


def read_back(path: Path, layers: Sequence[Layer]) -> None:
    """Compare the codes in a file with the student's.

    Raises
    ------
    TargetError
        For the first layer whose codes or scales are not there to the bit.
    """
    import onnx
    from onnx import numpy_helper

    model = onnx.load(str(path))
    stored = {t.name: t for t in model.graph.initializer}
    for layer in layers:
        own_name = next((n for n in layer.initializers if n in stored), None)
        if own_name is None:
            raise TargetError(
                f"layer '{layer.name}': the file holds no codes under {layer.initializers[0]}"
            )
        names = own_name, own_name.removesuffix("codes") + "scales"
        codes, scales = (numpy_helper.to_array(stored[n]) for n in names)
        own = layer.weight
        if not _same(codes, scales, own):
            raise TargetError(f"layer '{layer.name}': the file holds other codes or scales")


def _same(codes: NDArray[Any], scales: NDArray[Any], own: QuantizedWeight) -> bool:
    if own.codes.ndim == 4:
        return np.array_equal(codes, own.codes) and np.array_equal(scales.reshape(-1), own.scales)
    if codes.ndim == 2:
        return np.array_equal(codes.T, own.codes) and np.array_equal(scales, own.scales)
    bits = BITS[own.grid]
    out, inputs = own.codes.shape
    per = codes.shape[2] * 8 // bits
    rows = codes.reshape(out, -1)
    if bits == 8:
        found = rows.astype(np.int16) - 128
    else:
        raw = unpack(rows, bits, (out, codes.shape[1] * per)).astype(np.int16)
        half = 1 << (bits - 1)
        found = np.where(raw < 0, raw + 2 * half, raw) - half
    expected = np.broadcast_to(own.scales.reshape(out, -1), scales.reshape(out, -1).shape)
    return np.array_equal(found[:, :inputs], own.codes) and np.array_equal(
        scales.reshape(out, -1), expected
    )
