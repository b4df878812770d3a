"""ExecuTorch on the CPU, through its XNNPACK delegate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from handheld.program import Ports
from handheld_export.targets.base import Array, Lowered, Runner, SegmentInput, Target


class ExecuTorchXNNPACK(Target):
    """Lower to a .pte that is one XNNPACK delegate.

    The artifact has one method, ``forward``. Its inputs and outputs are contiguous,
    row-major float32 tensors in the order of the ports, and none of them is memory-planned:
    the caller hands over the storage of each input and each output
    (``Module::set_input``/``set_output``), and nothing is copied. Activations inside live in
    XNNPACK's workspace, which all loaded artifacts share.

    Linear layers run from the student's codes with activations quantized per token while
    running: int8 and int4 per channel, int4 in groups of a multiple of 32; int2 codes are
    held as int4, which changes nothing. 1x1 convolutions run as linear layers. Other
    convolutions run in int8 whatever their grid. Their activations are on the fixed int8
    grid of the calibrated range where the student has one, and quantized per picture while
    running where it has none, which is a few dB more exact and no slower.

    A layer whose input is not to be rounded is held in float32.

    Codes are the student's to the bit. So are scales per channel; scales of groups are
    bfloat16 in XNNPACK, so they are rounded to it (relative error at most 2**-8, noted per
    layer) unless the student's are already.
    """

    name: ClassVar[str] = "executorch-xnnpack"
    engine: ClassVar[str] = "executorch"
    suffix: ClassVar[str] = ".pte"
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "int8", "int4", "int4g32", "int2")
    segment_weights: ClassVar[int] = 80_000_000
    packages: ClassVar[Mapping[str, str]] = {"executorch": "executorch"}

    def lower(self, segment: SegmentInput, path: Path) -> Lowered:
        """Write the artifact of a segment and read its codes back.

        Raises
        ------
        TargetError
            If a layer's grid does not run or an operator has no XNNPACK form.
        """
        from handheld_export.executorch import reading, xnnpack

        outputs = [spec.shape for spec in segment.ports.outputs.values()]
        result = xnnpack.lower(segment.module, segment.examples, path, outputs)
        reading.check(path, result.layers)
        return Lowered(path, 1, self.versions(), result.notes)

    def share_weights(
        self, paths: Sequence[Path], outputs: Sequence[Path], weights: Path
    ) -> Path | None:
        """Put weights into one file that continues the programs of all sizes."""
        from handheld_export.executorch import shared

        return weights if shared.share(paths, outputs, weights) else None

    def load(self, path: Path, ports: Ports) -> Runner:
        """Open an artifact with the engine's Python runtime."""
        return _Runner(path, ports)


class _Runner(Runner):
    def __init__(self, path: Path, ports: Ports) -> None:
        from executorch.runtime import Runtime

        from handheld_export import sharing

        with sharing.whole(path) as joined:
            self._program: Any = Runtime.get().load_program(joined)
            self._method: Any = self._program.load_method("forward")
        self._ports = ports

    def __call__(self, *inputs: Array) -> tuple[Array, ...]:
        tensors = [torch.from_numpy(np.ascontiguousarray(x)) for x in inputs]
        results = self._method.execute(tensors)
        return tuple(r.clone().numpy() for r in results)
