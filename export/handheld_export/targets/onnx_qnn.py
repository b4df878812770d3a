"""onnxruntime on Qualcomm's Hexagon NPU, through its QNN provider."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from handheld_export.hexagon import HexagonTarget, counted, process
from handheld_export.targets.base import Lowered, SegmentInput


class ONNXQNN(HexagonTarget):
    """Lower to an ONNX graph of one EPContext node, which holds a context binary for one SoC.

    The NPU computes in fp16, and weights are float16, whatever grid the student's codes are on. The
    binary runs here in QNN's simulation of the NPU; it was not run on hardware.
    """

    name: ClassVar[str] = "onnx-qnn"
    engine: ClassVar[str] = "onnx"
    suffix: ClassVar[str] = ".onnx"
    precisions: ClassVar[tuple[str, ...]] = ("fp16",)
    segment_weights: ClassVar[int] = 100_000_000  # twice in memory while it is compiled, in float32
    packages: ClassVar[Mapping[str, str]] = {
        "onnxruntime": "onnxruntime",
        "onnx": "onnx",
        "onnxscript": "onnxscript",
    }
    extra: ClassVar[str] = "onnx"
    converter: ClassVar[str] = "litert"
    samples: ClassVar[int] = 0

    @property
    def options(self) -> Mapping[str, str]:  # type: ignore[override]
        """What the engine must be told: the provider, and of which SoC."""
        return {"provider": "qnn", "soc": self.soc or ""}

    def versions(self) -> dict[str, str]:
        """Return onnxruntime's version, the tools' and QNN's."""
        return super().versions() | {"qnn": self.sdk.build}

    def lower(self, segment: SegmentInput, path: Path) -> Lowered:
        """Export a segment, compile it, and read SoC and version back from the binary.

        Raises
        ------
        TargetError
            If values leave fp16, or an operator does not go to the NPU.
        """
        from handheld_export import onnx
        from handheld_export.half import fit
        from handheld_export.rewrites import quantized_of, rewrite

        module = rewrite(segment.module)
        notes = fit(module, segment.examples)
        coded = [w for layer in module.modules() if (w := quantized_of(layer)) is not None]
        ports = segment.ports
        with tempfile.TemporaryDirectory(prefix="handheld-npu-") as folder:
            source = Path(folder) / path.name
            onnx.lower(module, segment.examples, list(ports.inputs), list(ports.outputs), source)
            request = {"do": "compile", "source": str(source), "path": str(path), "soc": self.soc}
            process(self.sdk, "lower")(request)
        return Lowered(path, 1, self.versions() | self.made(path), notes, held=counted(coded))
