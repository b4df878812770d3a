"""ExecuTorch on Qualcomm's Hexagon NPU, through QNN."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import torch
from safetensors.torch import save_file
from torch import nn

from handheld.errors import TargetError
from handheld_export.qnn.hexagon import (
    HexagonTarget,
    check,
    counted,
    note_on,
    process,
    too_small,
)
from handheld_export.qnn.process import ARTIFACT, CODES, PROGRAM, SAMPLES
from handheld_export.quantization import BITS, QuantizedWeight
from handheld_export.targets.base import Lowered, SegmentInput


class ExecuTorchQNN(HexagonTarget):
    """Lower to a .pte that holds one QNN context binary for one SoC.

    The NPU computes in fp16, or on 16-bit grids that are calibrated on the program's own inputs.
    Layers with codes keep them, with the student's scale per output channel, or hold the same
    values as int8 where sums would drown; the weights of all other layers are on 16-bit grids. The
    artifact runs here in QNN's simulation of the NPU; it was not run on hardware.
    """

    name: ClassVar[str] = "executorch-qnn"
    engine: ClassVar[str] = "qnn"
    suffix: ClassVar[str] = ".pte"
    precisions: ClassVar[tuple[str, ...]] = ("fp16", "16a8w", "16a4w", "16a2w")
    segment_weights: ClassVar[int] = 400_000_000  # far below the 2 GB that QNN takes per graph
    packages: ClassVar[Mapping[str, str]] = {"executorch": "executorch", "pydot": "pydot"}
    extra: ClassVar[str] = "qnn"
    converter: ClassVar[str] = "executorch"
    codes_on_grids: ClassVar[bool] = True

    def versions(self) -> dict[str, str]:
        """Return QNN's version, which that of the phone's libraries must match, and the tools'."""
        return {"qnn": self.sdk.build} | super().versions()

    def lower(self, segment: SegmentInput, path: Path) -> Lowered:
        """Compile a segment and read SoC and version back from the binary.

        Raises
        ------
        TargetError
            If a layer's grid does not run, or an operator is not taken by the NPU.
        """
        from handheld_export.half import steady
        from handheld_export.qnn.levels import level
        from handheld_export.rewrites import PictureGroupNorm, rewrite

        given = layers = _quantized(segment.module)
        for name, weight in layers.items():
            check(name, weight)
        notes: tuple[str, ...] = ()
        if (small := too_small(segment)) is not None:
            notes, layers = (small,), {}
        elif layers:
            drowned = self.drowned(segment)
            notes = note_on(drowned)
            layers = {n: w.stretched() if n in drowned else w for n, w in layers.items()}
        held = counted((w, layers[n].grid if layers else "fp16") for n, w in given.items())
        if layers:
            # QNN's own GroupNorm has 48 dB on grids, where means have 76.
            module = rewrite(segment.module, {nn.GroupNorm: PictureGroupNorm})
            notes = (*notes, *level(module, segment.samples or [segment.examples]))
        else:
            module = rewrite(segment.module, {})
            notes = (*notes, *steady(module, segment.examples))
        with tempfile.TemporaryDirectory(prefix="handheld-qnn-") as folder:
            work = Path(folder)
            self._write(work, replace(segment, module=module), layers)
            answer, _ = process(self.sdk, "lower")(
                {"do": "lower", "folder": folder, "soc": self.soc}
            )
            if answer["outside"] or answer["partitions"] != 1:
                outside = ", ".join(answer["outside"]) or "none"
                raise TargetError(
                    f"is {answer['partitions']} graphs for the NPU, with operators outside: "
                    f"{outside}"
                )
            shutil.move(work / ARTIFACT, path)
        return Lowered(path, 1, self.versions() | self.made(path), notes, held=held)

    def _write(
        self, work: Path, segment: SegmentInput, layers: Mapping[str, QuantizedWeight]
    ) -> None:
        try:
            program = torch.export.export(segment.module, tuple(segment.examples), strict=True)
        except Exception as error:  # torch raises whatever it likes
            raise TargetError(f"torch cannot export it: {error}") from error
        torch.export.save(program, work / PROGRAM)
        (work / SAMPLES).mkdir()
        for i, sample in enumerate(segment.samples or [segment.examples]):
            named = {f"{j:03}": x.contiguous() for j, x in enumerate(sample)}
            save_file(named, work / SAMPLES / f"{i:03}.safetensors")
        if layers:
            stored: dict[str, torch.Tensor] = {}
            for name, weight in layers.items():
                stored[f"{name}.codes"] = torch.from_numpy(weight.codes)
                stored[f"{name}.scales"] = torch.from_numpy(weight.scales)
                stored[f"{name}.bits"] = torch.tensor(BITS[weight.grid])
            save_file(stored, work / CODES)


def _quantized(module: nn.Module) -> dict[str, QuantizedWeight]:
    found = {n: getattr(m, "quantized", None) for n, m in module.named_modules()}
    return {n: w for n, w in found.items() if w is not None}
