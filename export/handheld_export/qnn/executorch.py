"""From an exported segment to a QNN context binary; runs where QNN is loaded.

In fp16 the graph goes to the compiler as it is. Otherwise every tensor is on a 16-bit grid that
reaches twice as far as what the samples show. So are the weights of layers that have no codes, in
their own range; layers with codes keep them, with the student's own scales.
"""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torchao.quantization.pt2e import (
    MinMaxObserver,
    PerChannelMinMaxObserver,
    UniformQuantizationObserverBase,
)
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer import QuantizationSpec

from handheld.errors import TargetError
from handheld_export.qnn.process import ARTIFACT, CODES, PROGRAM, SAMPLES
from handheld_export.quantization import BITS, LIMITS, ROOM

_MAGIC, _HEADER = struct.pack("<I", 0x5678ABCD), 20
"""What is before a binary: magic number (4 bytes), signature and size (8 each)."""
_ANNOTATION = "quantization_annotation"
_WEIGHTED = (torch.ops.aten.conv2d.default, torch.ops.aten.linear.default)


class Seen(MinMaxObserver):  # type: ignore[misc]
    """The range that was seen, with room."""

    def calculate_qparams(self) -> Any:
        """Return scale and zero point."""
        return self._calculate_qparams(ROOM * self.min_val, ROOM * self.max_val)


class GivenScales(UniformQuantizationObserverBase):  # type: ignore[misc]
    """Observes nothing: scales per output channel are given, zero points are 0."""

    def __init__(self, scales: torch.Tensor, ch_axis: int = 0, **options: Any) -> None:
        super().__init__(**options)
        self.ch_axis = ch_axis
        self.register_buffer("scales", scales)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the weight as it is."""
        return x

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scales and zero points."""
        scales: torch.Tensor = self.scales
        return scales, torch.zeros(len(scales), dtype=torch.int32)


def _spec(codes: torch.Tensor | None, scales: torch.Tensor | None, grid: str) -> QuantizationSpec:
    if codes is None:
        return QuantizationSpec(
            dtype=torch.int16,
            quant_min=-32767,
            quant_max=32767,
            qscheme=torch.per_channel_symmetric,
            ch_axis=0,
            observer_or_fake_quant_ctr=PerChannelMinMaxObserver.with_args(eps=2**-32),
        )
    low, high = LIMITS[grid]
    return QuantizationSpec(
        dtype=torch.int8,
        quant_min=low,
        quant_max=high,
        qscheme=torch.per_channel_symmetric,
        ch_axis=0,
        observer_or_fake_quant_ctr=GivenScales.with_args(scales=scales),
    )


class _Weights:
    """Puts the student's grids on the weights of a graph."""

    def __init__(self, stored: dict[str, torch.Tensor]) -> None:
        self._stored = stored
        self.layers = {n.rpartition(".")[0] for n in stored}
        self.given: set[str] = set()

    def grid(self, layer: str) -> str:
        """Return the name of a layer's grid, which its number of bits tells."""
        bits = int(self._stored[f"{layer}.bits"])
        return next(g for g, b in BITS.items() if b == bits)

    def annotate(self, graph: torch.fx.GraphModule) -> None:
        """Replace what the quantizer has said about weights."""
        for node in graph.graph.nodes:
            if node.target not in _WEIGHTED or _ANNOTATION not in node.meta:
                continue
            weight = node.args[1]
            layer = str(weight.target).removesuffix(".weight")
            known = layer in self.layers
            specs = node.meta[_ANNOTATION].input_qspec_map
            specs[weight] = _spec(
                self._stored.get(f"{layer}.codes"),
                self._stored.get(f"{layer}.scales"),
                self.grid(layer) if known else "",
            )
            if known:
                self.given.add(layer)

    def check(self, graph: torch.fx.GraphModule) -> None:
        """Check that the quantized graph holds the codes and scales.

        Raises
        ------
        TargetError
            For the first layer that it does not hold.
        """
        found = {
            (node.args[0].target, node.args[1].target): node
            for node in graph.graph.nodes
            if "dequantize_per_channel" in str(node.target)
            and getattr(node.args[0], "op", "") == "get_attr"
        }
        held = [
            (_attribute(graph, str(codes)), _attribute(graph, str(scales)))
            for codes, scales in found
        ]
        for layer in sorted(self.layers):
            codes, scales = self._stored[f"{layer}.codes"], self._stored[f"{layer}.scales"]
            if layer not in self.given or not any(
                c.shape == codes.shape and torch.equal(c.to(torch.int8), codes)
                and torch.equal(s.float(), scales)
                for c, s in held
            ):  # fmt: skip
                raise TargetError(f"layer '{layer}': the graph holds other codes or scales")


def _attribute(graph: torch.fx.GraphModule, name: str) -> torch.Tensor:
    value: Any = graph
    for part in name.split("."):
        value = getattr(value, part)
    return value.detach()  # type: ignore[no-any-return]


def preload() -> None:
    """Import what :func:`lower` needs; QNN itself is loaded by its first use."""
    from executorch.backends.qualcomm.quantizer import quantizer
    from executorch.backends.qualcomm.utils import utils

    assert quantizer and utils


def _sign(program: bytes) -> bytes:
    """Replace the signature of the one binary, which is the time, by its hash.

    Raises
    ------
    TargetError
        If there is no binary, or more than one.
    """
    found = []
    at = program.find(_MAGIC)
    while at >= 0:
        (size,) = struct.unpack_from("<Q", program, at + 12)
        if 0 < size <= len(program) - at - _HEADER:
            found.append((at, size))
        at = program.find(_MAGIC, at + 4)
    if len(found) != 1:
        raise TargetError(f"has {len(found)} context binaries, not one")
    ((at, size),) = found
    signature = hashlib.sha256(program[at + _HEADER : at + _HEADER + size]).digest()[:8]
    return program[: at + 4] + signature + program[at + 12 :]


def lower(folder: Path, soc: str) -> dict[str, Any]:
    """Compile the segment in a folder.

    Parameters
    ----------
    folder : Path
        Holds the exported program, ``samples/N.safetensors`` (inputs by position) and, if it is to
        be quantized, ``codes.safetensors`` with codes, scales and bits by layer. Gets the artifact.
    soc : str

    Returns
    -------
    dict
        ``partitions``, and ``outside``: operators that are not in one.

    Raises
    ------
    TargetError
        If a layer's codes do not arrive.
    """
    from executorch.backends.qualcomm.quantizer.quantizer import QnnQuantizer, QuantDtype
    from executorch.backends.qualcomm.serialization.qc_schema import (
        QcomChipset,
        QnnExecuTorchBackendType,
    )
    from executorch.backends.qualcomm.utils.utils import (
        generate_htp_compiler_spec,
        generate_qnn_executorch_compiler_spec,
        to_edge_transform_and_lower_to_qnn,
    )
    from executorch.exir._serialize._program import deserialize_pte_binary

    chip = QcomChipset[soc]
    samples = [
        tuple(v for _, v in sorted(load_file(p).items()))
        for p in sorted((folder / SAMPLES).iterdir())
    ]
    module: Any = torch.export.load(folder / PROGRAM).module()
    codes = folder / CODES
    if quantized := codes.is_file():
        weights = _Weights(load_file(codes))
        quantizer = QnnQuantizer(
            backend=QnnExecuTorchBackendType.kHtpBackend, soc_model=chip, strict=False
        )
        quantizer.set_default_quant_config(
            QuantDtype.use_16a8w,
            is_conv_per_channel=True,
            is_linear_per_channel=True,
            act_observer=Seen,
        )
        quantizer.add_custom_quant_annotations((weights.annotate,))
        prepared = prepare_pt2e(module, quantizer)
        with torch.no_grad():
            for sample in samples:
                prepared(*sample)
        module = convert_pt2e(prepared)
        weights.check(module)
    spec = generate_qnn_executorch_compiler_spec(
        chip, generate_htp_compiler_spec(use_fp16=not quantized)
    )
    program = to_edge_transform_and_lower_to_qnn(module, samples[0], spec).to_executorch()
    made = bytes(program.buffer)
    plan = deserialize_pte_binary(made).program.execution_plan[0]
    outside = sorted({o.name for o in plan.operators})
    if len(plan.delegates) == 1 and not outside:
        (folder / ARTIFACT).write_bytes(_sign(made))
    return {"partitions": len(plan.delegates), "outside": outside}
