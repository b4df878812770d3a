"""onnxruntime on Qualcomm's Hexagon NPU, through its QNN provider."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from handheld_export.qnn.hexagon import HexagonTarget, check, counted, process, too_small
from handheld_export.targets.base import Lowered, SegmentInput


class ONNXQNN(HexagonTarget):
    """Lower to an ONNX graph of one EPContext node, which holds a context binary for one SoC.

    The NPU computes in fp16, or on 16-bit grids that are calibrated on the program's own inputs.
    There, layers with codes have the student's values, in int8 codes with a scale per output
    channel, and layers without stay in fp16. The binary runs here in QNN's simulation of the NPU;
    it was not run on hardware.
    """

    name: ClassVar[str] = "onnx-qnn"
    engine: ClassVar[str] = "onnx"
    suffix: ClassVar[str] = ".onnx"
    precisions: ClassVar[tuple[str, ...]] = ("fp16", "16a8w")
    segment_weights: ClassVar[int] = 100_000_000  # twice in memory while it is compiled, in float32
    packages: ClassVar[Mapping[str, str]] = {
        "onnxruntime": "onnxruntime",
        "onnx": "onnx",
        "onnxscript": "onnxscript",
    }
    extra: ClassVar[str] = "onnx"
    converter: ClassVar[str] = "litert"
    told: ClassVar[Mapping[str, str]] = {"provider": "qnn"}

    def lower(self, segment: SegmentInput, path: Path) -> Lowered:
        """Export a segment, compile it, and read SoC and version back from the binary.

        Without ``samples`` there is nothing to calibrate on, and codes are held in fp16.

        Raises
        ------
        TargetError
            If a layer's grid does not run, values leave fp16, or an operator does not go to the
            NPU.
        """
        import onnx as onnx_format

        from handheld_export.half import fit, steady
        from handheld_export.onnx import graphs, static
        from handheld_export.qnn.levels import level
        from handheld_export.rewrites import quantized_of, rewrite

        small = too_small(segment) if segment.samples else None
        module = rewrite(segment.module)
        notes = fit(module, segment.examples)
        if small is not None:
            notes = (*notes, small)
        coded = [w for layer in module.modules() if (w := quantized_of(layer)) is not None]
        on_grids = bool(segment.samples and coded and small is None)
        if on_grids:
            notes = (*notes, *level(module, segment.samples))
            static.replace(module, check, self.held)
        else:
            notes = (*notes, *steady(module, segment.examples))
        inputs, outputs = list(segment.ports.inputs), list(segment.ports.outputs)
        with tempfile.TemporaryDirectory(prefix="handheld-npu-") as folder:
            source = Path(folder) / path.name
            graphs.lower(module, segment.examples, inputs, outputs, source)
            if on_grids:
                model = onnx_format.load(str(source))
                samples = [
                    dict(zip(inputs, (x.numpy() for x in sample), strict=True))
                    for sample in segment.samples
                ]
                static.quantize(model, static.observe(model, samples))
                static.check(model, module)
                onnx_format.save_model(model, str(source))
            request = {"do": "compile", "source": str(source), "path": str(path), "soc": self.soc}
            process(self.sdk, "lower")(request)
        held = None if on_grids else counted((w, "fp16") for w in coded)
        return Lowered(path, 1, self.versions() | self.made(path), notes, held=held)
