"""ExecuTorch on Qualcomm's Hexagon NPU, through QNN."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Mapping
from functools import cache, cached_property
from pathlib import Path
from typing import ClassVar

import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.hooks import RemovableHandle

from handheld import qnn
from handheld.errors import TargetError
from handheld.program import Ports
from handheld.socs import HEXAGON
from handheld_export.hexagon import check, counted
from handheld_export.qnn_process import ARTIFACT, CODES, PROGRAM, SAMPLES, Process
from handheld_export.quantization import BITS, QuantizedWeight
from handheld_export.targets.base import Array, Lowered, Runner, SegmentInput, Target

_LEAST_SIDE = 16
"""Quantized residual blocks on smaller pictures have been seen to come out wrong."""
_FIELD = re.compile(rb"soc_type=(SM\d+);arch=(\d+);")
_BUILD = re.compile(rb"v(\d+\.\d+\.\d+\.\d{12})")


class ExecuTorchQNN(Target):
    """Lower to a .pte that holds one QNN context binary for one SoC.

    The NPU computes in fp16, or on 16-bit grids that are calibrated on the program's own inputs.
    Layers with codes keep them, with the student's scale per output channel; the weights of all
    other layers are on 16-bit grids. The artifact runs here in QNN's simulation of the NPU; it was
    not run on hardware.
    """

    name: ClassVar[str] = "executorch-qnn"
    engine: ClassVar[str] = "qnn"
    suffix: ClassVar[str] = ".pte"
    precisions: ClassVar[tuple[str, ...]] = ("fp16", "16a8w", "16a4w", "16a2w")
    segment_weights: ClassVar[int] = 400_000_000  # far below the 2 GB that QNN takes per graph
    packages: ClassVar[Mapping[str, str]] = {"executorch": "executorch", "pydot": "pydot"}
    extra: ClassVar[str] = "qnn"
    runs_here: ClassVar[bool] = False
    samples: ClassVar[int] = 16
    socs: ClassVar[tuple[str, ...]] = ("SM8650", "SM8550", "SM8750")
    unproven: ClassVar[str | None] = (
        "executorch-qnn: run in QNN's simulation of the NPU, not run on hardware"
    )

    def missing(self) -> str | None:
        """Return one line that says what to install, or None if all is there."""
        return super().missing() or qnn.missing("executorch")

    def versions(self) -> dict[str, str]:
        """Return QNN's version, which that of the phone's libraries must match, and the tools'."""
        return {"qnn": self._sdk.build} | super().versions()

    @cached_property
    def _sdk(self) -> qnn.Sdk:
        sdk = qnn.find("executorch")
        if sdk is None:
            raise TargetError(
                f"target '{self.name}' lacks its tools", remedy=qnn.missing("executorch")
            )
        return sdk

    def lower(self, segment: SegmentInput, path: Path) -> Lowered:
        """Compile a segment and read SoC and version back from the binary.

        Raises
        ------
        TargetError
            If a layer's grid does not run, or an operator is not taken by the NPU.
        """
        layers = _quantized(segment.module)
        for name, weight in layers.items():
            check(name, weight)
        notes: tuple[str, ...] = ()
        held = None
        if (small := self._too_small(segment)) is not None:
            notes = (
                f"kept in fp16: quantized residual blocks below 16x16 can come out wrong, {small}",
            )
            held = counted(layers.values())
            layers = {}
        with tempfile.TemporaryDirectory(prefix="handheld-qnn-") as folder:
            work = Path(folder)
            self._write(work, segment, layers)
            answer, _ = _process(self._sdk, "lower")(
                {"do": "lower", "folder": folder, "soc": self.soc}
            )
            if answer["outside"] or answer["partitions"] != 1:
                outside = ", ".join(answer["outside"]) or "none"
                raise TargetError(
                    f"is {answer['partitions']} graphs for the NPU, with operators outside: "
                    f"{outside}"
                )
            shutil.move(work / ARTIFACT, path)
        found = binary(path)
        wanted = {"soc": self.soc, "hexagon": str(HEXAGON[self.soc or ""]), "qnn": self._sdk.build}
        if found != wanted:
            raise TargetError(f"the binary says {found}, not {wanted}", path=path)
        return Lowered(path, 1, self.versions() | found, notes, held=held)

    def _too_small(self, segment: SegmentInput) -> str | None:
        """Return which quantized convolution works on too small a picture."""
        found: list[str] = []

        def watch(name: str, conv: nn.Conv2d) -> RemovableHandle:
            def look(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
                h, w = inputs[0].shape[-2:]
                if min(h, w) < _LEAST_SIDE:
                    found.append(f"layer '{name}' at {h}x{w}")

            return conv.register_forward_pre_hook(look)

        hooks = [
            watch(name, layer)
            for name, layer in segment.module.named_modules()
            if isinstance(layer, nn.Conv2d)
            and layer.kernel_size != (1, 1)
            and getattr(layer, "quantized", None) is not None
        ]
        try:
            with torch.no_grad():
                segment.module(*segment.examples)
        finally:
            for hook in hooks:
                hook.remove()
        return found[0] if found else None

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

    def load(self, path: Path, ports: Ports) -> Runner:
        """Open an artifact in QNN's simulation.

        Raises
        ------
        TargetError
            If it is for another SoC.
        """
        soc = binary(path)["soc"]
        if soc != self.soc:
            raise TargetError(f"is compiled for {soc}, not for {self.soc}", path=path)
        return _Runner(_process(self._sdk, "run"), path)


@cache
def _process(sdk: qnn.Sdk, _: str) -> Process:
    """Return the one process for a purpose: starting it takes longer than most requests.

    What compiles must not have run anything, because it is copied for every segment.
    """
    return Process(sdk)


def binary(path: Path) -> dict[str, str]:
    """Read SoC, Hexagon architecture and QNN's version from a context binary.

    Raises
    ------
    TargetError
        If they are not in it.
    """
    data = path.read_bytes()
    fields, build = _FIELD.search(data), _BUILD.search(data)
    if fields is None or build is None:
        raise TargetError("is no context binary of QNN", path=path)
    return {"soc": fields[1].decode(), "hexagon": fields[2].decode(), "qnn": build[1].decode()}


def _quantized(module: nn.Module) -> dict[str, QuantizedWeight]:
    found = {n: getattr(m, "quantized", None) for n, m in module.named_modules()}
    return {n: w for n, w in found.items() if w is not None}


class _Runner(Runner):
    def __init__(self, process: Process, path: Path) -> None:
        self._process = process
        self._handle = process.load(path)

    def __call__(self, *inputs: Array) -> tuple[Array, ...]:
        _, results = self._process({"do": "run", "handle": self._handle}, inputs)
        return tuple(results)

    def __del__(self) -> None:
        if hasattr(self, "_handle"):
            self._process.drop(self._handle)
