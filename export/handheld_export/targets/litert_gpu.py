"""LiteRT on phones' GPUs, in half precision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from handheld.errors import UsageError
from handheld.program import Ports
from handheld_export.targets.base import Lowered, Runner, SegmentInput, Target

if TYPE_CHECKING:
    from handheld_export.litert import tflite


class LiteRTGPU(Target):
    """Lower to .tflite with weights in float16, every operator on the GPU delegate.

    The delegate's own checks say whether it takes an artifact. Artifacts run on the wheel's WebGPU
    accelerator where Vulkan has a driver for it, else on the CPU, computing in half precision.
    """

    name: ClassVar[str] = "litert-gpu"
    engine: ClassVar[str] = "litert"
    suffix: ClassVar[str] = ".tflite"
    precisions: ClassVar[tuple[str, ...]] = ("fp16",)
    segment_weights: ClassVar[int] = 80_000_000
    packages: ClassVar[Mapping[str, str]] = {
        "ai-edge-litert": "ai_edge_litert",
        "litert-torch": "litert_torch",
    }
    options: Mapping[str, str] = {"accelerator": "gpu"}

    def __init__(self, unit: Literal["cpu", "gpu"] | None = None) -> None:
        self._unit = unit

    def caveat(self) -> str:
        """Return where artifacts run instead of on a phone."""
        if self._place() == "cpu":
            return "litert-gpu: run on the CPU in half precision, not run on hardware"
        from handheld_export.litert import runtime

        return f"litert-gpu: run through WebGPU on '{runtime.gpu()}', not on a phone"

    def on(self, unit: str) -> LiteRTGPU:
        """Return this target with artifacts on the CPU in half precision, or through WebGPU.

        Raises
        ------
        UsageError
            If the unit is unknown, or no driver is here.
        """
        if unit == "cpu":
            return LiteRTGPU("cpu")
        if unit != "gpu":
            raise UsageError(
                f"litert-gpu has no compute unit '{unit}'", remedy="choose from cpu, gpu"
            )
        from handheld_export.litert import runtime

        if runtime.gpu() is None:
            raise UsageError(
                "WebGPU finds no Vulkan driver that it takes",
                remedy="install one, or name it in VK_DRIVER_FILES; see docs/numerics.md",
            )
        return LiteRTGPU("gpu")

    def lower(self, segment: SegmentInput, path: Path) -> Lowered:
        """Write the artifact of a segment and ask the GPU delegate's checks about it.

        Raises
        ------
        TargetError
            If values leave fp16, or the delegate does not take an operator.
        """
        from handheld_export.half import fit
        from handheld_export.litert import conversion, runtime, tflite
        from handheld_export.litert.rewrites import GPU_REPLACEMENTS
        from handheld_export.rewrites import rewrite

        module = rewrite(segment.module, GPU_REPLACEMENTS)
        notes = fit(module, segment.examples)
        opened = tflite.Open(module, len(segment.ports.inputs)).eval()
        opened.layers = [self.stored(layer) for layer in opened.layers]
        flatbuffer = conversion.convert(opened, segment, [x.weight for x in opened.layers])
        tflite.graft(flatbuffer, opened.layers, segment.ports, path)
        tflite.check(path, opened.layers)
        runtime.check_gpu(path)
        return Lowered(path, 1, self.versions(), notes)

    def stored(self, layer: tflite.Layer) -> tflite.Layer:
        """Return a layer as the artifact holds it: the student's weight in float16."""
        return replace(layer, quantized=None, half=True)

    def load(self, path: Path, ports: Ports) -> Runner:
        """Open an artifact on the GPU, or on the CPU in half precision."""
        from handheld_export.litert.runtime import Compiled

        return Compiled(path, ports, self._place())

    def _place(self) -> Literal["cpu", "gpu"]:
        from handheld_export.litert import runtime

        return self._unit or ("gpu" if runtime.gpu() else "cpu")
