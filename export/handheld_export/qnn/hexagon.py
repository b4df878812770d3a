"""What the roads to Qualcomm's Hexagon NPUs have in common."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import cache, cached_property
from pathlib import Path
from typing import ClassVar, Final

import numpy as np
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from handheld import qnn
from handheld.errors import TargetError
from handheld.program import Ports
from handheld.socs import HEXAGON
from handheld_export.qnn.process import Process
from handheld_export.quantization import ROOM, QuantizedWeight
from handheld_export.targets.base import Array, Runner, SegmentInput, Target

_SOC: Final = re.compile(rb"soc_type=(SM\d+);arch=(\d+);")
_BUILD: Final = re.compile(rb"v(\d+\.\d+\.\d+\.\d{12})")
_LEAST_SIDE: Final = 16
"""Quantized residual blocks on smaller pictures have been seen to come out wrong."""
_SUM_ERROR: Final = 0.77 * 2**8
"""What a sum of products of codes loses, root of the mean square: QNN drops its last 8 bits.
As measured in the simulation, on linear layers of 2 and 4 bits."""
_LEAST_SUM_DB: Final = 40.0


def facts(data: bytes, path: Path) -> dict[str, str]:
    """Read SoC, Hexagon architecture and QNN's version from what holds a context binary.

    Raises
    ------
    TargetError
        If they are not in it.
    """
    soc, build = _SOC.search(data), _BUILD.search(data)
    if soc is None or build is None:
        raise TargetError("is no context binary of QNN", path=path)
    return {"soc": soc[1].decode(), "hexagon": soc[2].decode(), "qnn": build[1].decode()}


@cache
def process(sdk: qnn.Sdk, purpose: str) -> Process:
    """Return the one process for a purpose: starting it takes longer than most requests.

    What compiles must not have run anything, because it is copied for every segment.
    """
    return Process(sdk)


class Simulated(Runner):
    """An artifact in QNN's simulation of the NPU.

    Parameters
    ----------
    process : Process
    path : Path
    """

    def __init__(self, process: Process, path: Path) -> None:
        self._process = process
        self._handle = process.load(path)

    def __call__(self, *inputs: Array) -> tuple[Array, ...]:
        _, results = self._process({"do": "run", "handle": self._handle}, inputs)
        return tuple(results)

    def __del__(self) -> None:
        if hasattr(self, "_handle"):
            self._process.drop(self._handle)


class HexagonTarget(Target):
    """A target whose artifacts hold one context binary for one SoC."""

    converter: ClassVar[str]
    """Of :data:`handheld.qnn.RELEASES`: whose QNN compiles and simulates."""
    told: ClassVar[Mapping[str, str]] = {}
    """What an engine that is not QNN's own must be told, beside the SoC."""
    runs_here: ClassVar[bool] = False
    samples: ClassVar[int] = 16
    socs: ClassVar[tuple[str, ...]] = ("SM8650", "SM8550", "SM8750")

    @property
    def options(self) -> Mapping[str, str]:  # type: ignore[override]
        """What the engine must be told: where to run, and on which SoC."""
        return {**self.told, "soc": self.soc or ""} if self.told else {}

    def versions(self) -> dict[str, str]:
        """Return the engine's version, the tools' and QNN's."""
        return super().versions() | {"qnn": self.sdk.build}

    def caveat(self) -> str | None:
        """Return what verification here cannot show."""
        name = self.name.partition(":")[0]
        return f"{name}: run in QNN's simulation of the NPU, not run on hardware"

    def missing(self) -> str | None:
        """Return one line that says what to install, or None if all is there."""
        return super().missing() or qnn.missing(self.converter)

    @cached_property
    def sdk(self) -> qnn.Sdk:
        """QNN's libraries.

        Raises
        ------
        TargetError
            If they are not laid out.
        """
        sdk = qnn.find(self.converter)
        if sdk is None:
            raise TargetError(f"target '{self.name}' lacks QNN", remedy=qnn.missing(self.converter))
        return sdk

    def held(self, weight: QuantizedWeight) -> QuantizedWeight:
        """Return a weight on the grid that holds its codes; as int8, in codes as large as can be.

        QNN's sums lose their last 8 bits, of which small codes leave little.
        """
        return weight.stretched() if self.container(weight) == "int8" else super().held(weight)

    def drowned(self, segment: SegmentInput) -> dict[str, float]:
        """Find layers whose codes are too narrow for their sums, so that int8 is to hold them.

        Returns
        -------
        dict
            By layer, the estimated dB of its sums, less than 40.
        """
        found = sums_db(segment, self.held)
        return {name: db for name, db in found.items() if db < _LEAST_SUM_DB}

    def facts(self, path: Path) -> dict[str, str]:
        """Return ``soc``, ``hexagon`` and ``qnn`` as an artifact's binary says them."""
        return facts(path.read_bytes(), path)

    def made(self, path: Path) -> dict[str, str]:
        """Return the facts of an artifact that was just compiled.

        Raises
        ------
        TargetError
            If they are not those of this target.
        """
        found = self.facts(path)
        arch = str(HEXAGON[self.soc or ""])
        wanted = {"soc": self.soc, "hexagon": arch, "qnn": self.sdk.build}
        if found != wanted:
            raise TargetError(f"the binary says {found}, not {wanted}", path=path)
        return found

    def conflicts(self, path: Path, tools: Mapping[str, str]) -> list[str]:
        """Say where the binary, the manifest and the QNN that is installed disagree."""
        try:
            found = self.facts(path)
        except TargetError as error:
            return [error.message]
        told = [
            f"the manifest says {name} {tools[name]}, its binary {value}"
            for name, value in found.items()
            if name in tools and tools[name] != value
        ]
        if found["qnn"] != self.sdk.build:
            told.append(f"compiled by QNN {found['qnn']}, {self.sdk.build} is installed")
        return told

    def load(self, path: Path, ports: Ports) -> Runner:
        """Open an artifact in QNN's simulation.

        Raises
        ------
        TargetError
            If it is for another SoC.
        """
        soc = self.facts(path)["soc"]
        if soc != self.soc:
            raise TargetError(f"is compiled for {soc}, not for {self.soc}", path=path)
        return Simulated(process(self.sdk, "run"), path)


def check(name: str, weight: QuantizedWeight) -> None:
    """Refuse grids that QNN does not compute on.

    Raises
    ------
    TargetError
        Naming the layer. Blockwise 3x3 convolutions compile, and come out wrong without a word.
    """
    if weight.grid == "palette":
        raise TargetError(f"layer '{name}': palettes do not run on QNN")
    if weight.group_size is not None:
        raise TargetError(
            f"layer '{name}': {weight.grid} in groups does not run on QNN",
            remedy="give scales per channel",
        )


def counted(held: Iterable[tuple[QuantizedWeight, str]]) -> dict[str, int]:
    """Count weights that are held wider than on their own grid, as the manifest's ``held``.

    Parameters
    ----------
    held : iterable of pairs
        A layer's weight, and what holds it.
    """
    counts: Counter[str] = Counter()
    for weight, container in held:
        if container != weight.grid:
            counts[f"{weight.grid} as {container}"] += weight.codes.size
    return dict(sorted(counts.items()))


def sums_db(
    segment: SegmentInput, held: Callable[[QuantizedWeight], QuantizedWeight]
) -> dict[str, float]:
    """Estimate by layer how far sums of narrow codes are above what QNN drops of them, in dB.

    A layer's input is taken to be on a grid of its own. Where it is joined with larger values, and
    shares their grid, its sums are smaller.

    Parameters
    ----------
    segment : SegmentInput
        Its example stands for samples where it has none.
    held : callable
        Gives the weight that a target holds for a layer's.

    Returns
    -------
    dict
        Of layers that are held in 4 or 2 bits.
    """
    found: dict[str, _Sums] = {}
    hooks = []
    for name, layer in segment.module.named_modules():
        weight = getattr(layer, "quantized", None)
        if not isinstance(layer, nn.Linear | nn.Conv2d) or weight is None:
            continue
        if held(weight).grid in ("int4", "int2"):
            found[name] = sums = _Sums(layer, weight)
            hooks.append(layer.register_forward_hook(sums.add))
    try:
        if found:
            with torch.no_grad():
                for sample in segment.samples or [segment.examples]:
                    segment.module(*sample)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: sums.db() for name, sums in found.items()}


class _Sums:
    """What a layer sums up, without its bias, over all samples."""

    def __init__(self, layer: nn.Linear | nn.Conv2d, weight: QuantizedWeight) -> None:
        self._bias = layer.bias
        self._scales = weight.scales.astype(np.float64)
        self._peak, self._power, self._count = 0.0, 0.0, 0

    def add(self, layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        y = output.movedim(1, -1) if isinstance(layer, nn.Conv2d) else output
        y = (y if self._bias is None else y - self._bias).double()
        self._peak = max(self._peak, float(inputs[0].abs().max()))
        self._power += float(y.square().sum())
        self._count += y.numel() // y.shape[-1]

    def db(self) -> float:
        step = ROOM * self._peak / 2**15 * self._scales
        lost = self._count * float(np.square(_SUM_ERROR * step).sum())
        return 10 * math.log10(self._power / lost) if lost and self._power else math.inf


def note_on(drowned: Mapping[str, float]) -> tuple[str, ...]:
    """Return a note on layers that are held as int8 because of their sums."""
    if not drowned:
        return ()
    name = min(drowned, key=drowned.__getitem__)
    more = f" and {len(drowned) - 1} more" if len(drowned) > 1 else ""
    return (
        f"held as int8, because sums of so narrow codes would be rounded too much: layer '{name}' "
        f"(estimated {drowned[name]:.1f} dB){more}",
    )


def too_small(segment: SegmentInput) -> str | None:
    """Tell whether a quantized 3x3 convolution works on too small a picture for the NPU's grids.

    Returns
    -------
    str or None
        A note that names the first of them.
    """
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
    if not found:
        return None
    side = f"{_LEAST_SIDE}x{_LEAST_SIDE}"
    return f"kept in fp16: quantized residual blocks below {side} can come out wrong, {found[0]}"
