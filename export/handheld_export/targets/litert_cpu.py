"""LiteRT on the CPU, with XNNPACK inside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

from handheld.errors import TargetError
from handheld.program import Ports
from handheld_export.quantization import QuantizedWeight
from handheld_export.targets.base import Array, Lowered, Runner, SegmentInput, Target

if TYPE_CHECKING:
    from handheld_export.litert import tflite


class LiteRTCPU(Target):
    """Lower to .tflite with weight-only codes and activations quantized while running."""

    name: ClassVar[str] = "litert-cpu"
    engine: ClassVar[str] = "litert"
    suffix: ClassVar[str] = ".tflite"
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "int8", "int4", "int4g32", "int2")
    segment_weights: ClassVar[int] = 80_000_000
    bands: ClassVar[bool] = True
    reads_floats: ClassVar[bool] = False
    packages: ClassVar[Mapping[str, str]] = {
        "ai-edge-litert": "ai_edge_litert",
        "litert-torch": "litert_torch",
    }

    def lower(self, segment: SegmentInput, path: Path) -> Lowered:
        """Write the artifact of a segment.

        The scales of groups are rounded to bfloat16, because that is all the kernels take;
        codes and all other scales are the student's. Convolutions of fewer than 8 bits are held
        as int8: XNNPACK reads no narrower ones, int4 runs outside it, and int2 gives NaN. Large
        ones (:func:`handheld.planning.sliced`) become nine linear layers instead. Layers whose
        input is not rounded are held as int8, too, and XNNPACK widens them when it loads them.

        Raises
        ------
        TargetError
            If a layer's grid cannot run, or the converted graph does not read each
            layer's weight as it should.
        """
        from handheld_export.litert import conversion, tflite
        from handheld_export.litert.rewrites import REPLACEMENTS
        from handheld_export.rewrites import rewrite

        module = rewrite(segment.module, REPLACEMENTS)
        opened = tflite.Open(module, len(segment.ports.inputs)).eval()
        opened.layers = [self._holding(layer) for layer in opened.layers]
        checked = [_check(x.name, x.quantized) for x in opened.layers if x.quantized is not None]
        notes = [note for note in checked if note]
        flatbuffer = conversion.convert(opened, segment, [layer.weight for layer in opened.layers])
        tflite.graft(flatbuffer, opened.layers, segment.ports, path)
        tflite.check(path, opened.layers)
        return Lowered(path, _partitions(path), self.versions(), tuple(notes))

    def _holding(self, layer: tflite.Layer) -> tflite.Layer:
        weight = layer.quantized
        if weight is None:
            return layer
        held = self.container(weight, float_input=layer.float_input)
        if held == "float32":
            return replace(layer, quantized=None, weight=torch.from_numpy(weight.dequantize()))
        return replace(layer, quantized=replace(weight, grid=held))

    def share_weights(
        self, paths: Sequence[Path], outputs: Sequence[Path], weights: Path
    ) -> Path | None:
        """Put weights into one file that continues the graphs of all sizes."""
        from handheld_export.litert import shared

        return weights if shared.share(paths, outputs, weights) else None

    def load(self, path: Path, ports: Ports) -> Runner:
        """Open an artifact with the engine's Python runtime."""
        return _Runner(path, ports)


def _check(name: str, weight: QuantizedWeight) -> str | None:
    def refuse(what: str) -> TargetError:
        return TargetError(f"layer '{name}': {what}")

    if weight.grid == "palette":
        raise refuse("palettes do not run on LiteRT's CPU kernels")
    if weight.group_size is None:
        return None
    if weight.grid != "int4":
        raise refuse(f"{weight.grid} in groups does not run on LiteRT; groups are for int4")
    if weight.group_size % 32:
        raise refuse(f"groups of {weight.group_size} do not run on LiteRT; use a multiple of 32")
    from handheld_export.litert.tflite import block_scales

    kept = block_scales(weight.scales).astype(np.float32)
    error = float(np.max(np.abs(kept - weight.scales) / weight.scales))
    if error > 2**-8:
        raise refuse(f"group scales leave what float16 holds (relative error {error:.2g})")
    return (
        f"layer '{name}': group scales rounded to bfloat16, off by {error:.1e}" if error else None
    )


def _partitions(path: Path) -> int:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path), num_threads=1)
    interpreter.allocate_tensors()
    return sum(op["op_name"] == "DELEGATE" for op in interpreter._get_ops_details())


class _Runner(Runner):
    def __init__(self, path: Path, ports: Ports) -> None:
        from ai_edge_litert.interpreter import Interpreter

        from handheld_export import sharing

        with sharing.whole(path) as joined:
            self._interpreter = Interpreter(str(joined), num_threads=2)
        self._ports = ports
        self._interpreter.allocate_tensors()
        signature = self._interpreter.get_signature_list()
        if len(signature) != 1:
            raise TargetError("the artifact does not have one signature", path=path)
        self._run = self._interpreter.get_signature_runner()

    def __call__(self, *inputs: Array) -> tuple[Array, ...]:
        results = self._run(**dict(zip(self._ports.inputs, inputs, strict=True)))
        return tuple(results[name] for name in self._ports.outputs)
