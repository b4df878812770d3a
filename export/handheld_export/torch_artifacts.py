"""Running a program's segments in torch.

This gives what artifacts are compared with, the inputs that they are lowered and verified
on, and the ranges of activations that static quantization needs. Weights are mapped one
segment at a time, unless all of them fit into ``keep`` bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file

from handheld.execute import execute
from handheld.precision import Precision
from handheld.program import Program
from handheld_export.assemble import LATENT, Draft
from handheld_export.checkpoint import Component
from handheld_export.quantization import ActivationRange
from handheld_export.segments import Segment, SegmentModule, layers, materialize, release

Array = NDArray[Any]


class TorchArtifacts:
    """The call function of :func:`handheld.execute.execute`, in torch and float32.

    Parameters
    ----------
    segments : sequence of (Segment, Component)
    precision : Precision or None
        None runs the checkpoint as it is; otherwise the student with this precision,
        dequantized.
    observe : bool
        Record the ranges of convolutions in :attr:`ranges`.
    keep : int
        Bytes of float32 weights up to which all segments stay in memory.
    """

    def __init__(
        self,
        segments: Sequence[tuple[Segment, Component]],
        *,
        precision: Precision | None = None,
        observe: bool = False,
        keep: int = 2_000_000_000,
    ) -> None:
        self._segments = {s.id: (s, c) for s, c in segments}
        self._precision = precision
        self._observe = observe
        self._keep = 4 * sum(s.weights for s, _ in segments) <= keep
        self._ready: dict[str, SegmentModule] = {}
        self._ranges: dict[str, list[float]] = {}
        self.counts: dict[str, int] = {}
        self._examples: tuple[Path, Mapping[str, int]] | None = None
        self._samples: tuple[Path, Mapping[str, frozenset[int]]] | None = None
        self.results: dict[str, Array] = {}
        """Results of the latest call."""

    def save_examples(self, folder: Path, calls: Mapping[str, int]) -> None:
        """Save inputs and outputs of one call per artifact.

        Parameters
        ----------
        folder : Path
            Gets ``ID.safetensors`` with ``in.PORT`` and ``out.PORT``.
        calls : mapping of artifact id to int
            Which of the artifact's calls, counted from 0 since now.
        """
        self._examples = (folder, calls)
        self.counts = {}

    def stop_examples(self) -> None:
        """Save no further examples."""
        self._examples = None

    def save_samples(self, folder: Path, calls: Mapping[str, frozenset[int]]) -> None:
        """Save the inputs of some calls per artifact.

        Parameters
        ----------
        folder : Path
            Gets ``ID/N.safetensors`` with ``in.PORT``, N counting files.
        calls : mapping of artifact id to set of int
            Which of the artifact's calls, counted from 0 since now.
        """
        self._samples = (folder, calls)
        self.counts = {}

    def _sample(self, artifact: str, args: Mapping[str, Array], count: int) -> None:
        if self._samples is None:
            return
        folder, calls = self._samples
        if count in calls.get(artifact, ()):
            place = folder / artifact
            place.mkdir(parents=True, exist_ok=True)
            name = f"{len(list(place.iterdir())):03}.safetensors"
            save_file({f"in.{n}": np.ascontiguousarray(v) for n, v in args.items()}, place / name)

    @property
    def ranges(self) -> dict[str, ActivationRange]:
        """Ranges of convolutions by module path, widened to three significant digits."""
        return {k: ActivationRange(*map(_widen, v)) for k, v in self._ranges.items()}

    def __call__(self, artifact: str, args: Mapping[str, Array]) -> dict[str, Array]:
        """Run a segment."""
        segment, _ = self._segments[artifact]
        module = self._ready.get(artifact) or self._prepare(artifact)
        with torch.no_grad():
            outputs = module(*(torch.from_numpy(np.asarray(args[n])) for n in segment.inputs))
        results = {
            n: np.ascontiguousarray(v.numpy())
            for n, v in zip(segment.outputs, outputs, strict=True)
        }
        count = self.counts.get(artifact, 0)
        self.counts[artifact] = count + 1
        self._sample(artifact, args, count)
        if self._examples and self._examples[1].get(artifact) == count:
            save_file(
                {f"in.{n}": np.ascontiguousarray(args[n]) for n in segment.inputs}
                | {f"out.{n}": v for n, v in results.items()},
                self._examples[0] / f"{artifact}.safetensors",
            )
        if not self._keep:
            self._ready.pop(artifact)
            release(segment)
        self.results = results
        return results

    def close(self) -> None:
        """Drop all weights."""
        for segment, _ in self._segments.values():
            release(segment)
        self._ready.clear()

    def _prepare(self, artifact: str) -> SegmentModule:
        segment, component = self._segments[artifact]
        materialize(segment, component, self._precision)
        if self._observe:
            for name, layer in layers(segment):
                if isinstance(layer, torch.nn.Conv2d):
                    self._watch(name, layer)
        module = self._ready[artifact] = SegmentModule(segment)
        return module

    def _watch(self, name: str, layer: torch.nn.Conv2d) -> None:
        def hook(_: object, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            seen = [*inputs[0].aminmax(), *output.aminmax()]
            now = [float(v) for v in seen]
            old = self._ranges.get(name, now)
            self._ranges[name] = [
                min(old[0], now[0]),
                max(old[1], now[1]),
                min(old[2], now[2]),
                max(old[3], now[3]),
            ]

        # A model outlives its segments' weights; a layer is watched once however often
        # its segment is filled in.
        if not layer._forward_hooks:
            layer.register_forward_hook(hook)


def decode(segments: Sequence[Segment], vae: Component, latent: Array) -> tuple[Array, Array]:
    """Decode a latent with diffusers' modules.

    Parameters
    ----------
    segments : sequence of Segment
        Of a whole decoder.
    vae : Component
    latent : float32 ndarray [1, h, w, C]

    Returns
    -------
    picture : uint8 ndarray [1, H, W, 3]
    decoded : float32 ndarray [1, H, W, 3]
    """
    draft = Draft()
    z = draft.input(LATENT, latent.shape, role="latent")
    result = draft.calls(segments, "", {"latent": z})
    outputs = {"decoded": result, "picture": draft.picture(result)}
    program = Program(
        inputs=tuple(draft.inputs), tensors=draft.tensors, ops=tuple(draft.ops), outputs=outputs
    )
    artifacts = TorchArtifacts([(s, vae) for s in segments])
    values = execute(program, {}, {z: latent}, artifacts)
    artifacts.close()
    return values["picture"], values["decoded"]


def _widen(value: float) -> float:
    if value == 0 or not math.isfinite(value):
        return value
    unit = 10.0 ** (math.floor(math.log10(abs(value))) - 2)
    return round(math.copysign(math.ceil(abs(value) / unit) * unit, value), 12)
