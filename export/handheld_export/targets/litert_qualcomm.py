"""LiteRT on Qualcomm's Hexagon NPU, compiled ahead of time."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from handheld_export.qnn.hexagon import HexagonTarget, check, counted, note_on
from handheld_export.targets.base import Lowered, SegmentInput

if TYPE_CHECKING:
    from handheld_export.litert import tflite


class LiteRTQualcomm(HexagonTarget):
    """Lower to a .tflite whose one operator is a context binary of QNN for one SoC.

    The NPU computes in fp16, or on 16-bit grids that are calibrated on the program's own inputs.
    There, layers with codes have the student's values, with a scale per output channel, and layers
    without stay in fp16. The compiler takes int4 and int2 in linear layers; convolutions, and
    layers whose sums would drown, hold such codes as int8. The binary runs here in QNN's simulation
    of the NPU; it was not run on hardware.
    """

    name: ClassVar[str] = "litert-qualcomm"
    engine: ClassVar[str] = "litert"
    suffix: ClassVar[str] = ".tflite"
    precisions: ClassVar[tuple[str, ...]] = ("fp16", "16a8w", "16a4w", "16a2w")
    segment_weights: ClassVar[int] = 200_000_000
    packages: ClassVar[Mapping[str, str]] = {
        "ai-edge-litert": "ai_edge_litert",
        "litert-torch": "litert_torch",
        "onnx": "onnx",
        "onnxruntime": "onnxruntime",
    }
    extra: ClassVar[str] = "onnx"
    converter: ClassVar[str] = "litert"
    told: ClassVar[Mapping[str, str]] = {"accelerator": "npu"}

    def facts(self, path: Path) -> dict[str, str]:
        """Return ``soc``, ``hexagon`` and ``qnn`` as an artifact's binary says them."""
        from handheld_export.litert import npu

        return npu.binary(path)[2]

    def lower(self, segment: SegmentInput, path: Path) -> Lowered:
        """Convert a segment, compile it, and read SoC and version back from the binary.

        Without ``samples`` there is nothing to calibrate on, and codes are held in fp16.

        Raises
        ------
        TargetError
            If a layer's grid does not run, values leave fp16, or an operator does not go to the
            NPU.
        """
        from handheld_export.half import fit, steady
        from handheld_export.litert import conversion, npu, static, tflite
        from handheld_export.litert.rewrites import GPU_REPLACEMENTS
        from handheld_export.qnn.levels import level
        from handheld_export.rewrites import quantized_of, rewrite

        named = segment.module.named_modules()
        coded = {name: w for name, layer in named if (w := quantized_of(layer)) is not None}
        on_grids, drowned = bool(segment.samples and coded), {}
        if on_grids:
            for name, weight in coded.items():
                check(name, weight)
            drowned = self.drowned(segment)
        module = rewrite(segment.module, GPU_REPLACEMENTS)
        notes = (*fit(module, segment.examples), *note_on(drowned))
        if on_grids:
            notes = (*notes, *level(module, segment.samples))
        else:
            notes = (*notes, *steady(module, segment.examples))
        opened = tflite.Open(module, len(segment.ports.inputs)).eval()
        given = [x.quantized for x in opened.layers]
        opened.layers = [self._holding(x, on_grids, x.name in drowned) for x in opened.layers]
        flatbuffer = conversion.convert(opened, segment, [x.weight for x in opened.layers])
        assert self.soc is not None
        with tempfile.TemporaryDirectory(prefix="handheld-npu-") as folder:
            source, edit = Path(folder) / path.name, None
            if on_grids:
                floats = [replace(x, quantized=None) for x in opened.layers]
                tflite.graft(flatbuffer, floats, segment.ports, source)
                samples = [[x.numpy() for x in sample] for sample in segment.samples]
                edit = partial(static.quantize, ranges=static.observe(source, samples))
            tflite.graft(flatbuffer, opened.layers, segment.ports, source, edit)
            tflite.check(source, opened.layers)
            npu.compile_for(self.sdk, self.soc, source, path)
        grids = [x.quantized.grid if x.quantized else "fp16" for x in opened.layers]
        held = counted((w, g) for w, g in zip(given, grids, strict=True) if w is not None)
        return Lowered(path, 1, self.versions() | self.made(path), notes, held=held)

    def _holding(self, layer: tflite.Layer, on_grids: bool, drowned: bool) -> tflite.Layer:
        weight = layer.quantized
        if weight is None or not on_grids:
            return replace(layer, quantized=None, half=True)
        # No convolution of fewer bits compiles, a strided 1x1 one neither.
        stretched = drowned or weight.codes.ndim == 4
        held = weight.stretched() if stretched else self.held(weight)
        # Inputs are on 16-bit grids, which hold what eight bits do not.
        return replace(layer, quantized=held, float_input=False)
