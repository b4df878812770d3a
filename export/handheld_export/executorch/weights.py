"""Codes and scales as XNNPACK holds them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from executorch.backends.xnnpack.serialization import xnnpack_graph_schema as xs
from numpy.typing import NDArray

from handheld.errors import TargetError
from handheld_export.executorch.graph import NHWC, NONE, Constant, Graph, QuantizedLayer, Value
from handheld_export.quantization import QuantizedWeight


def refuse_layer(name: str, message: str) -> TargetError:
    """Return the error that names a layer."""
    return TargetError(f"layer '{name}': {message}")


def pack4(codes: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Pack codes of -8..7 two to a byte, the even column in the low half, offset by 8."""
    shifted: NDArray[np.uint8] = (codes.astype(np.int16) + 8).astype(np.uint8)
    return np.bitwise_or(np.left_shift(shifted[:, 1::2], 4, dtype=np.uint8), shifted[:, ::2])


def bfloat16(scales: NDArray[np.float32]) -> tuple[bytes, float]:
    """Round scales to bfloat16; the second result is the largest relative error."""
    exact = torch.tensor(scales)
    rounded = exact.to(torch.bfloat16)
    error = float(((rounded.float() - exact).abs() / exact).max())
    return rounded.view(torch.int16).numpy().tobytes(), error


def qparams(low: float, high: float) -> tuple[float, int]:
    """Scale and zero point of the int8 grid over a range, zero included."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = float(np.float32(max(high - low, 1e-6) / 255))
    return scale, int(np.clip(round(-128 - low / scale), -128, 127))


def linear_codes(graph: Graph, name: str, weight: QuantizedWeight) -> Value:
    """Write the codes of a linear layer, int8 [out, in] or two to a byte, with their scales.

    Raises
    ------
    TargetError
        For a grid or a size of groups that XNNPACK has no kernels for.
    """
    inputs = weight.codes.shape[1]
    codes: NDArray[Any]
    scales = np.ascontiguousarray(weight.scales, dtype=np.float32)
    if weight.grid not in ("int8", "int4", "int2"):
        raise refuse_layer(name, f"grid '{weight.grid}' does not run on XNNPACK")
    if weight.grid == "int8":
        if weight.group_size is not None:
            raise refuse_layer(name, "int8 in groups does not run on XNNPACK")
        datatype, codes = xs.XNNDatatype.xnn_datatype_qcint8, weight.codes
    else:
        if inputs % 2:
            raise refuse_layer(name, "4-bit codes need an even number of inputs")
        datatype, codes = xs.XNNDatatype.xnn_datatype_qcint4, pack4(weight.codes)
    quantization: Any
    if weight.group_size is None:
        stored = scales.tobytes()
        quantization = xs.PerChannelQuant([], 0, graph.store(stored), scales.size)
    else:
        if weight.group_size % 32:
            raise refuse_layer(
                name, f"groups of {weight.group_size} do not run; use a multiple of 32"
            )
        stored, error = bfloat16(scales)
        if error:
            graph.notes.append(f"{name}: group scales rounded to bfloat16, off by {error:.1e}")
        datatype = xs.XNNDatatype.xnn_datatype_qbint4
        quantization = xs.PerChannelGroupQuant(
            [],
            0,
            weight.group_size,
            scale_buffer_idx=graph.store(stored),
            num_scales=scales.size,
        )
    buffer = graph.store(np.ascontiguousarray(codes).tobytes(), stored)
    value = graph.value(weight.codes.shape, None, datatype, quantization, buffer)
    graph.layers.append(QuantizedLayer(name, weight, value.id))
    return value


def conv_codes(
    graph: Graph, name: str, weight: QuantizedWeight, bias: Constant | None, input_scale: float
) -> tuple[int, int]:
    """Write the filter and, in int32, the bias of a convolution whose input has a fixed grid."""
    filter_ = conv_filter(graph, name, weight)
    if bias is None:
        return filter_, NONE
    scales = np.ascontiguousarray(weight.scales, dtype=np.float32)
    steps = (scales * np.float32(input_scale)).astype(np.float32)
    whole = np.rint(bias.tensor.numpy().astype(np.float64) / steps)
    whole = np.clip(whole, -(2**31), 2**31 - 1).astype(np.int32)
    stored = steps.tobytes()
    bias_value = graph.value(
        whole.shape,
        None,
        xs.XNNDatatype.xnn_datatype_qcint32,
        xs.PerChannelQuant([], 0, graph.store(stored), steps.size),
        graph.store(whole.tobytes(), stored),
    )
    return filter_, bias_value.id


def conv_filter(graph: Graph, name: str, weight: QuantizedWeight) -> int:
    """Write the codes of a convolution as int8 [out, height, width, in], whatever their bits.

    Raises
    ------
    TargetError
        For a grid that XNNPACK has no kernels for.
    """
    if weight.grid not in ("int8", "int4", "int2") or weight.group_size is not None:
        raise refuse_layer(name, f"grid '{weight.grid}' does not run in convolutions")
    scales = np.ascontiguousarray(weight.scales, dtype=np.float32)
    codes = np.ascontiguousarray(weight.codes.transpose(0, 2, 3, 1))
    stored = scales.tobytes()
    value = graph.value(
        codes.shape,
        NHWC,
        xs.XNNDatatype.xnn_datatype_qcint8,
        xs.PerChannelQuant([], 0, graph.store(stored), scales.size),
        graph.store(codes.tobytes(), stored),
    )
    graph.layers.append(QuantizedLayer(name, weight, value.id))
    return value.id
