"""onnxruntime on the CPU: the portable engine."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from handheld.program import Ports
from handheld_export.targets.base import Array, Lowered, Runner, SegmentInput, Target


class ONNX(Target):
    """Lower to an ONNX graph whose tensors lie in a file beside it.

    Linear layers run from the student's codes in 2, 4 or 8 bits, convolutions in int8;
    activations are quantized while running. Codes and scales are the student's to the bit.
    """

    name: ClassVar[str] = "onnx"
    engine: ClassVar[str] = "onnx"
    suffix: ClassVar[str] = ".onnx"
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "int8", "int4", "int4g32", "int2")
    segment_weights: ClassVar[int] = 80_000_000
    packages: ClassVar[Mapping[str, str]] = {
        "onnxruntime": "onnxruntime",
        "onnx": "onnx",
        "onnxscript": "onnxscript",
    }
    extra: ClassVar[str] = "onnx"

    def lower(self, segment: SegmentInput, path: Path) -> Lowered:
        """Write the artifact of a segment and read its codes back.

        Raises
        ------
        TargetError
            If a layer's grid does not run or an operator has no ONNX form.
        """
        from handheld_export.onnx import graphs
        from handheld_export.rewrites import rewrite

        module = rewrite(segment.module)
        layers = graphs.replace(module, self.held)
        ports = segment.ports
        data = graphs.lower(module, segment.examples, list(ports.inputs), list(ports.outputs), path)
        graphs.read_back(path, layers)
        return Lowered(path, tools=self.versions(), parts=(data,) if data else ())

    def share_weights(
        self, paths: Sequence[Path], outputs: Sequence[Path], weights: Path
    ) -> Path | None:
        """Put weights into one file beside the graphs of all sizes."""
        from handheld_export.onnx import shared

        return shared.share(paths, outputs, weights.parent)

    def load(self, path: Path, ports: Ports) -> Runner:
        """Open an artifact with onnxruntime."""
        return _Runner(path, ports)


@cache
def _saturates() -> bool:
    """Tell whether onnxruntime's fast int8 products overflow here: on x86 without VNNI."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return False
    try:
        return "vnni" not in Path("/proc/cpuinfo").read_text()
    except OSError:
        return True  # its other products are slower, and right


class _Runner(Runner):
    def __init__(self, path: Path, ports: Ports) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 2
        options.log_severity_level = 3
        if _saturates():
            options.add_session_config_entry("session.x64quantprecision", "1")
        self._session: Any = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        self._ports = ports

    def __call__(self, *inputs: Array) -> tuple[Array, ...]:
        named = dict(zip(self._ports.inputs, inputs, strict=True))
        return tuple(self._session.run(list(self._ports.outputs), named))
