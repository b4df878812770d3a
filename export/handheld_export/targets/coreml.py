"""Core ML, for the Neural Engine first. Converted and checked anywhere, run on Apple's hardware."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from handheld.errors import TargetError
from handheld.program import Ports
from handheld_export.targets.base import Array, Lowered, Runner, SegmentInput, Target

_MOST_WEIGHTS = {
    "int8": 900_000_000,
    "int4": 1_500_000_000,
    "int4g32": 1_500_000_000,
    "int2": 1_500_000_000,
}


class CoreML(Target):
    """Lower to an .mlpackage that computes in fp16.

    Weights are palettes of the student's codes with one scale per output channel in 2 and 4 bits,
    and 8-bit codes with scales. :mod:`handheld_export.mil` runs the very package for verification;
    it was not run on hardware here.
    """

    name: ClassVar[str] = "coreml"
    engine: ClassVar[str] = "coreml"
    suffix: ClassVar[str] = ".mlpackage"
    precisions: ClassVar[tuple[str, ...]] = ("fp16", "int8", "int4", "int4g32", "int2")
    segment_weights: ClassVar[int] = 475_000_000
    across_blocks: ClassVar[bool] = True
    packages: ClassVar[Mapping[str, str]] = {"coremltools": "coremltools"}
    extra: ClassVar[str] = "coreml"
    unproven: ClassVar[str | None] = (
        "coreml: run by handheld's evaluator of ML programs, not run on hardware"
    )

    def most_weights(self, precision: str) -> int:
        """Return what stays below 1 GB: the Neural Engine takes seconds to prepare each package.

        SDXL's U-Net becomes two chunks in 4 and 2 bits, three in int8, six in fp16.
        """
        return _MOST_WEIGHTS.get(precision, self.segment_weights)

    def lower(self, segment: SegmentInput, path: Path) -> Lowered:
        """Write the package of a segment and read its codes back.

        Raises
        ------
        TargetError
            If a layer's grid does not fit or coremltools cannot convert the segment.
        """
        from handheld_export import coreml
        from handheld_export.ane_rewrites import ANE_REPLACEMENTS
        from handheld_export.half import fit
        from handheld_export.mil import Package
        from handheld_export.rewrites import rewrite

        module = rewrite(segment.module, ANE_REPLACEMENTS)
        try:
            notes = fit(module, segment.examples)
            layers = coreml.compress(module, self.held)
            files = coreml.convert(module, segment.examples, len(segment.ports.outputs), path)
            coreml.read_back(path, layers)
            Package(path).check()
        except TargetError as error:
            raise TargetError(
                f"segment '{segment.id}': {error.message}", remedy=error.remedy
            ) from error
        return Lowered(files[0], tools=self.versions(), notes=notes, parts=tuple(files[1:]))

    def load(self, path: Path, ports: Ports) -> Runner:
        """Open a package, named by its ``Manifest.json``, with the evaluator."""
        return _Runner(path.parent, ports)


class _Runner(Runner):
    def __init__(self, path: Path, ports: Ports) -> None:
        from handheld_export.mil import Package

        self._package = Package(path)
        self._outputs = len(ports.outputs)

    def __call__(self, *inputs: Array) -> tuple[Array, ...]:
        results = self._package.run({f"in{i}": x for i, x in enumerate(inputs)})
        return tuple(results[f"out{i}"] for i in range(self._outputs))
