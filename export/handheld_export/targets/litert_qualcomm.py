"""LiteRT on Qualcomm's Hexagon NPU, compiled ahead of time."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from handheld import qnn
from handheld.errors import TargetError
from handheld.program import Ports
from handheld_export.targets.base import Lowered, Runner, SegmentInput, Target


class LiteRTQualcomm(Target):
    """Lower to a .tflite whose one operator is a context binary of QNN for one SoC.

    The NPU computes in fp16, and weights are float16, whatever grid the student's codes are on:
    the compiler leaves convolutions with int8 weights, and layers with int4 ones, to the CPU. The
    binary runs here in QNN's simulation of the NPU; it was not run on hardware.
    """

    name: ClassVar[str] = "litert-qualcomm"
    engine: ClassVar[str] = "litert"
    suffix: ClassVar[str] = ".tflite"
    precisions: ClassVar[tuple[str, ...]] = ("fp16",)
    segment_weights: ClassVar[int] = 200_000_000
    packages: ClassVar[Mapping[str, str]] = {
        "ai-edge-litert": "ai_edge_litert",
        "litert-torch": "litert_torch",
        "onnx": "onnx",
        "onnxruntime": "onnxruntime",
    }
    extra: ClassVar[str] = "onnx"
    runs_here: ClassVar[bool] = False
    socs: ClassVar[tuple[str, ...]] = ("SM8650", "SM8550", "SM8750")
    unproven: ClassVar[str | None] = (
        "litert-qualcomm: run in QNN's simulation of the NPU, not run on hardware"
    )

    @property
    def options(self) -> Mapping[str, str]:  # type: ignore[override]
        """What the engine must be told: the NPU, and of which SoC."""
        return {"accelerator": "npu", "soc": self.soc or ""}

    def missing(self) -> str | None:
        """Return one line that says what to install, or None if all is there."""
        return super().missing() or qnn.missing("litert")

    def versions(self) -> dict[str, str]:
        """Return LiteRT's version, the tools' and QNN's."""
        return super().versions() | {"qnn": self._sdk.build}

    @cached_property
    def _sdk(self) -> qnn.Sdk:
        sdk = qnn.find("litert")
        if sdk is None:
            raise TargetError(f"target '{self.name}' lacks QNN", remedy=qnn.missing("litert"))
        return sdk

    def lower(self, segment: SegmentInput, path: Path) -> Lowered:
        """Convert a segment, compile it, and read SoC and version back from the binary.

        Raises
        ------
        TargetError
            If values leave fp16, or an operator does not go to the NPU.
        """
        from handheld_export import litert, litert_npu, tflite
        from handheld_export.half import fit
        from handheld_export.litert_rewrites import GPU_REPLACEMENTS
        from handheld_export.rewrites import rewrite

        module = rewrite(segment.module, GPU_REPLACEMENTS)
        notes = fit(module, segment.examples)
        opened = tflite.Open(module, len(segment.ports.inputs)).eval()
        opened.layers = [replace(x, quantized=None, half=True) for x in opened.layers]
        flatbuffer = litert.convert(opened, segment, [x.weight for x in opened.layers])
        assert self.soc is not None
        with tempfile.TemporaryDirectory(prefix="handheld-npu-") as folder:
            source = Path(folder) / path.name
            tflite.graft(flatbuffer, opened.layers, segment.ports, source)
            tflite.check(source, opened.layers)
            litert_npu.compile_for(self._sdk, self.soc, source, path)
        _, _, found = litert_npu.binary(path)
        if (found["soc"], found["qnn"]) != (self.soc, self._sdk.build):
            raise TargetError(f"the binary says {found}, not {self.soc}, {self._sdk.build}")
        return Lowered(path, 1, self.versions() | found, notes)

    def load(self, path: Path, ports: Ports) -> Runner:
        """Open an artifact in QNN's simulation.

        Raises
        ------
        TargetError
            If it is for another SoC.
        """
        from handheld_export import litert_npu

        soc = litert_npu.binary(path)[2]["soc"]
        if soc != self.soc:
            raise TargetError(f"is compiled for {soc}, not for {self.soc}", path=path)
        return litert_npu.Simulated(self._sdk, path, ports)
