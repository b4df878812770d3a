"""A program run with the artifacts that were made of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from handheld.errors import TargetError
from handheld.manifest import Verification
from handheld.precision import find as find_precision
from handheld_export import measure
from handheld_export.export.prompts import Texts
from handheld_export.export.reference import Sized, run_program
from handheld_export.targets.base import Array, Target
from handheld_export.torch_artifacts import TorchArtifacts

_STUDENT_WEIGHTS = 500_000_000


class Runners:
    """The call function of a program, with a target's artifacts in Python.

    Parameters
    ----------
    target : Target
    segments : mapping of artifact id to something with ``ports``
    paths : mapping of artifact id to files, first the one that the engine opens
    keep : int
        Bytes of artifacts up to which all stay loaded.
    """

    def __init__(
        self,
        target: Target,
        segments: Mapping[str, Any],
        paths: Mapping[str, Sequence[Path]],
        keep: int = 1_000_000_000,
    ) -> None:
        self._target = target
        self._segments = segments
        self._paths = paths
        files = {path for own in paths.values() for path in own}
        self._keep = sum(p.stat().st_size for p in files) <= keep
        self._ready: dict[str, Any] = {}

    def __call__(self, artifact: str, args: Mapping[str, Array]) -> dict[str, Array]:
        """Run an artifact.

        Raises
        ------
        TargetError
            If it does not run or gives something else than its ports say.
        """
        ports = self._segments[artifact].ports
        path = self._paths[artifact][0]
        try:
            runner = self._ready.get(artifact) or self._target.load(path, ports)
            if self._keep:
                self._ready[artifact] = runner
            outputs = runner(*(np.ascontiguousarray(args[n]) for n in ports.inputs))
        except Exception as e:  # engines raise whatever they like
            raise TargetError(f"does not run: {e}", path=path, field=artifact) from e
        shapes = [tuple(x.shape) for x in outputs]
        if shapes != (wanted := [spec.shape for spec in ports.outputs.values()]):
            raise TargetError(f"gives {shapes} instead of {wanted}", path=path, field=artifact)
        return dict(zip(ports.outputs, outputs, strict=True))


def measure_picture(
    one: Sized, texts: Texts, paths: Mapping[str, Sequence[Path]], keep: int
) -> Verification:
    """Hold the artifacts' picture against the reference, and a small student's, too."""
    plan, reference = one.plan, one.reference
    runners = Runners(plan.target, {s.id: s for _, s, _ in plan.segments}, paths, keep // 2)
    result = run_program(plan, runners, texts.inputs[0], plan.options.seed)
    student_snr = None
    precision = find_precision(plan.options.precision)
    quantized = precision.linear or precision.other or plan.checkpoint.unet.quantized
    if quantized and sum(s.weights for _, s, _ in plan.segments) <= _STUDENT_WEIGHTS:
        student = TorchArtifacts([(s, c) for _, s, c in plan.segments], precision=precision)
        student_snr = measure.snr_db(
            run_program(plan, student, texts.inputs[0], plan.options.seed).decoded, result.decoded
        )
        student.close()
    return Verification(
        snr_db=measure.snr_db(reference.decoded, result.decoded),
        student_snr_db=student_snr,
        max_abs_error=measure.max_abs_error(reference.decoded, result.decoded),
        psnr_db=measure.psnr_db(reference.picture, result.picture),
    )
