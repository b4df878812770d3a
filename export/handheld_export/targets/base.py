"""The seam between handheld and an engine: lower a segment, run what came out.

A target is one file in this folder (or anywhere, by the entry point group
``handheld.targets``) with one subclass of :class:`Target`.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, cast

import numpy as np
import torch
from numpy.typing import NDArray

from handheld.errors import UsageError
from handheld.planning import Container, Stored, container
from handheld.program import Ports
from handheld_export.quantization import Grid, QuantizedWeight

Array = NDArray[np.generic]


@dataclass(frozen=True)
class SegmentInput:
    """A segment as a target receives it.

    Parameters
    ----------
    id : str
        Artifact id, unique in the bundle.
    module : torch.nn.Module
        Takes the tensors of ``ports.inputs`` in order and returns a tuple in the order of
        ``ports.outputs``. Pictures and latents are ``[N, H, W, C]`` at its boundary and
        the inside is NCHW. In eval mode, float32. Quantized layers (``nn.Linear``,
        ``nn.Conv2d``) hold the dequantized weight as their parameter and carry
        ``layer.quantized`` (:class:`~handheld_export.quantization.QuantizedWeight`), whether
        their input is not to be rounded, ``layer.float_input`` (bool), and, where calibrated,
        ``layer.activation_range`` (:class:`~handheld_export.quantization.ActivationRange`).
    ports : Ports
    examples : sequence of tensors
        One realistic value per input.
    shared : Path or None
        Folder for what segments of the same structure share; None where no other one has the
        structure.
    samples : sequence of sequences of tensors
        Further values per input, for targets that ask for ``samples``.
    """

    id: str
    module: torch.nn.Module
    ports: Ports
    examples: Sequence[torch.Tensor]
    shared: Path | None = None
    samples: Sequence[Sequence[torch.Tensor]] = ()


@dataclass(frozen=True)
class Lowered:
    """What a target made of a segment."""

    path: Path
    partitions: int | None = None
    tools: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    parts: tuple[Path, ...] = ()
    """Further files that the engine finds from the main one: beside it, named as it is with more
    behind, or below the folder that it lies in."""
    held: Mapping[str, int] | None = None
    """Weights on a wider grid than their own, where that depends on the segment and not on
    :meth:`Target.container` alone; as ``held`` of the manifest."""


class Target(ABC):
    """One engine to lower for."""

    name: ClassVar[str]
    """For example ``litert-cpu``."""
    engine: ClassVar[str]
    """Engine of the harness that runs the artifacts."""
    suffix: ClassVar[str]
    """File suffix of artifacts, with the dot."""
    precisions: ClassVar[tuple[str, ...]]
    """Names of :mod:`handheld.precision` that this target runs."""
    segment_weights: ClassVar[int]
    """Grouping policy: neighbouring units join while their weights stay below this."""
    segment_bytes: ClassVar[int | None] = None
    """The same by the bytes of a file that keeps codes as they are and all else in fp16."""
    across_blocks: ClassVar[bool] = False
    """Whether units of different blocks join, for engines that like few artifacts."""

    bands: ClassVar[bool] = False
    """Whether decoders in bands (:mod:`handheld_export.bands`) were tried on it."""
    options: Mapping[str, str] = {}
    """What the engine must be told to run an artifact; see :class:`~handheld.manifest.Artifact`."""
    packages: ClassVar[Mapping[str, str]] = {}
    """Distributions that lower and load, engine first, and the module that each brings."""
    extra: ClassVar[str] = "export"
    """Extra of handheld that installs them."""
    unproven: ClassVar[str | None] = None
    """What verification here cannot show, where :meth:`load` is not the engine itself."""
    needs_ranges: ClassVar[bool] = False
    """Whether quantized layers need calibrated activation ranges."""
    reads_floats: ClassVar[bool] = True
    """Whether :meth:`lower` reads the dequantized weights of layers that carry codes. If not, it
    gets zeros: float32 is most of what a segment takes in memory."""
    runs_here: ClassVar[bool] = True
    """Whether loaded artifacts run in this process, so that their memory can be measured."""
    samples: ClassVar[int] = 0
    """Calls, spread over several pictures, whose inputs :meth:`lower` gets to calibrate on."""
    codes_on_grids: ClassVar[bool] = False
    """Whether layers with a student's codes compute on calibrated grids at ``fp16``, too."""
    socs: ClassVar[tuple[str, ...]] = ()
    """SoCs that artifacts are compiled for, one at a time; the target is then ``NAME:SOC``."""
    soc: ClassVar[str | None] = None
    """The SoC of a ``NAME:SOC``."""

    @classmethod
    def for_soc(cls, soc: str) -> Target:
        """Return the target ``NAME:SOC``.

        Raises
        ------
        UsageError
            If it is not compiled for this SoC.
        """
        if soc not in cls.socs:
            raise UsageError(
                f"target '{cls.name}' is not compiled for '{soc}'",
                remedy=f"choose from {', '.join(f'{cls.name}:{s}' for s in cls.socs)}"
                if cls.socs
                else f"write '{cls.name}'",
            )
        named = {"name": f"{cls.name}:{soc}", "soc": soc}
        target: Target = type(cls.__name__, (cls,), named)()
        return target

    def caveat(self) -> str | None:
        """Return what verification here cannot show, None where :meth:`load` shows all."""
        return self.unproven

    def container(self, weight: QuantizedWeight, *, float_input: bool = False) -> Container:
        """Return what holds a weight's codes, wider where no kernel reads its own grid.

        Parameters
        ----------
        weight : QuantizedWeight
        float_input : bool
            Whether the layer's input is not to be rounded.
        """
        shape = weight.codes.shape
        kind = "linear" if len(shape) == 2 else "conv1x1" if shape[2:] == (1, 1) else "conv3x3"
        stored = Stored(weight.grid, weight.group_size, float_input)
        return container(self.name.partition(":")[0], kind, stored, weight.codes.size)

    def held(self, weight: QuantizedWeight) -> QuantizedWeight:
        """Return a weight on the grid that holds its codes."""
        return replace(weight, grid=cast(Grid, self.container(weight)))

    def missing(self) -> str | None:
        """Return one line that says what to install, or None if all is there."""
        absent = [p for p, m in self.packages.items() if importlib.util.find_spec(m) is None]
        return f"pip install 'handheld[{self.extra}]' (no {', '.join(absent)})" if absent else None

    def versions(self) -> dict[str, str]:
        """Return the versions that decide what an artifact looks like, engine first."""
        return {p: importlib.metadata.version(p) for p in (*self.packages, "torch")}

    @abstractmethod
    def lower(self, segment: SegmentInput, path: Path) -> Lowered:
        """Write the artifact of a segment to ``path``.

        Raises
        ------
        TargetError
            If the segment cannot be lowered, naming the layer and the reason. Who calls adds the
            segment.
        """

    def share(
        self, paths: Mapping[str, Path], weights: str, folder: Path
    ) -> Mapping[str, tuple[Path, ...]] | None:
        """Write what one segment became at several sizes again, with weights in common.

        Parameters
        ----------
        paths : mapping of artifact id to Path
            What :meth:`lower` wrote at each size.
        weights : str
            Name of a file for what they have in common, where artifacts do not name it.
        folder : Path
            Where to write.

        Returns
        -------
        mapping of artifact id to its files, or None
            The first one is that which the engine opens. None where the engine cannot share or
            there is nothing to share: the artifacts stay as they are, and weights are repeated.
        """
        outputs = {name: folder / f"{name}{self.suffix}" for name in paths}
        common = self.share_weights(list(paths.values()), list(outputs.values()), folder / weights)
        return {name: (path, common) for name, path in outputs.items()} if common else None

    def share_weights(
        self, paths: Sequence[Path], outputs: Sequence[Path], weights: Path
    ) -> Path | None:
        """Write artifacts again, and in one file, ``weights`` or beside it, what they share.

        Returns
        -------
        Path or None
            That file. None where there is nothing to share; nothing is written then.
        """
        return None

    def on(self, unit: str) -> Target:
        """Return this target with artifacts loaded on one of the engine's compute units.

        Raises
        ------
        UsageError
            If there is no such unit, or not here.
        """
        raise UsageError(f"target '{self.name}' has no compute unit '{unit}'")

    def conflicts(self, path: Path, tools: Mapping[str, str]) -> list[str]:
        """Say where an artifact, its manifest and what is installed disagree, beside the engine.

        Parameters
        ----------
        path : Path
        tools : mapping of str to str
            What the manifest says that made it.
        """
        return []

    @abstractmethod
    def load(self, path: Path, ports: Ports) -> Runner:
        """Open an artifact for verification with the engine's Python runtime."""


class Runner(ABC):
    """A loaded artifact."""

    @abstractmethod
    def __call__(self, *inputs: Array) -> tuple[Array, ...]:
        """Run once; arrays in the order and with the shapes of the artifact's ports."""
