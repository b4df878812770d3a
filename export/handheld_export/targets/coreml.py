"""Core ML, for the Neural Engine first. Converted and checked anywhere, run on Apple's hardware."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from handheld.errors import UsageError
from handheld.program import Ports
from handheld_export.targets.base import Array, Lowered, Runner, SegmentInput, Target

_UNITS = {"cpu": "CPU_ONLY", "gpu": "CPU_AND_GPU", "ane": "CPU_AND_NE"}
"""Compute units and what coremltools calls them; the CPU takes what the others do not."""


class CoreML(Target):
    """Lower to an .mlpackage that computes in fp16.

    Weights are palettes of the student's codes with one scale per output channel in 2 and 4 bits,
    and 8-bit codes with scales. :mod:`handheld_export.coreml.mil` runs the very package for
    verification; it was not run on hardware here.
    """

    name: ClassVar[str] = "coreml"
    engine: ClassVar[str] = "coreml"
    suffix: ClassVar[str] = ".mlpackage"
    precisions: ClassVar[tuple[str, ...]] = ("fp16", "int8", "int4", "int4g32", "int2")
    # The Neural Engine takes seconds to prepare each package, and none may reach 1 GB.
    segment_weights: ClassVar[int] = 425_000_000
    segment_bytes: ClassVar[int | None] = 850_000_000
    across_blocks: ClassVar[bool] = True
    packages: ClassVar[Mapping[str, str]] = {"coremltools": "coremltools"}
    extra: ClassVar[str] = "coreml"
    unproven: ClassVar[str | None] = (
        "coreml: run by handheld's evaluator of ML programs, not run on hardware"
    )

    def __init__(self, unit: str | None = None) -> None:
        self._unit = unit

    def on(self, unit: str) -> CoreML:
        """Return this target with packages run by Core ML itself, on macOS.

        Not run on hardware yet: written after coremltools' documentation.

        Raises
        ------
        UsageError
            If the unit is unknown, or this is no Mac.
        """
        if unit not in _UNITS:
            raise UsageError(
                f"Core ML has no compute unit '{unit}'", remedy=f"choose from {', '.join(_UNITS)}"
            )
        if sys.platform != "darwin":
            raise UsageError(
                "Core ML runs on macOS only",
                remedy="verify without --unit: handheld's evaluator runs the package",
            )
        return CoreML(unit)

    def lower(self, segment: SegmentInput, path: Path) -> Lowered:
        """Write the package of a segment and read its codes back.

        Raises
        ------
        TargetError
            If a layer's grid does not fit or coremltools cannot convert the segment.
        """
        from handheld_export.coreml.mil import Package
        from handheld_export.coreml.packages import compress, convert, read_back
        from handheld_export.coreml.rewrites import ANE_REPLACEMENTS
        from handheld_export.half import fit
        from handheld_export.rewrites import rewrite

        module = rewrite(segment.module, ANE_REPLACEMENTS)
        notes = fit(module, segment.examples)
        layers = compress(module, self.held)
        files = convert(module, segment.examples, len(segment.ports.outputs), path)
        read_back(path, layers)
        Package(path).check()
        return Lowered(files[0], tools=self.versions(), notes=notes, parts=tuple(files[1:]))

    def load(self, path: Path, ports: Ports) -> Runner:
        """Open a package, named by its ``Manifest.json``, with the evaluator or on a unit."""
        if self._unit is not None:
            return _Device(path.parent, ports, self._unit)
        return _Runner(path.parent, ports)


class _Runner(Runner):
    def __init__(self, path: Path, ports: Ports) -> None:
        from handheld_export.coreml.mil import Package

        self._package = Package(path)
        self._outputs = len(ports.outputs)

    def __call__(self, *inputs: Array) -> tuple[Array, ...]:
        results = self._package.run({f"in{i}": x for i, x in enumerate(inputs)})
        return tuple(results[f"out{i}"] for i in range(self._outputs))


class _Device(Runner):
    """Core ML itself, on one compute unit."""

    def __init__(self, path: Path, ports: Ports, unit: str) -> None:
        import coremltools as ct

        self._model: Any = ct.models.MLModel(
            str(path), compute_units=getattr(ct.ComputeUnit, _UNITS[unit])
        )
        self._outputs = len(ports.outputs)

    def __call__(self, *inputs: Array) -> tuple[Array, ...]:
        results = self._model.predict({f"in{i}": x for i, x in enumerate(inputs)})
        return tuple(results[f"out{i}"] for i in range(self._outputs))
