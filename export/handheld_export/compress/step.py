"""What a step is: settings, a run, and what it does to shapes and bits."""

from __future__ import annotations

import hashlib
import importlib
import json
import pkgutil
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from handheld.errors import CheckpointError, UsageError
from handheld.planning import Shape
from handheld.program import Model
from handheld_export.checkpoint import Checkpoint
from handheld_export.compress.data import Dataset, Prepared, prepare
from handheld_export.compress.diffusion import Schedule
from handheld_export.compress.engine import Machine, Watch
from handheld_export.compress.load import Load
from handheld_export.quantization import QuantizedWeight

GROUP = "handheld.compress"
VERSION = 2
"""Of what steps compute: a new one leaves what older ones cached alone."""


@dataclass
class Student:
    """What a step takes and gives.

    Parameters
    ----------
    unet_config, vae_config : dict
        diffusers configurations.
    unet, vae : mapping of str to Tensor
        Float weights by name, CPU.
    quantized : dict of layer to QuantizedWeight
        U-Net layers that carry codes.
    float_inputs : dict
        Layers of ``unet`` and ``vae`` whose inputs are not to be rounded.
    settings : dict
        ``handheld.json``.
    reference_config, reference
        Configuration and weights of the float student that a smaller one is to imitate.
    history : list of dict
        One entry for each step: kind, settings, figures.
    """

    unet_config: dict[str, Any]
    unet: dict[str, torch.Tensor]
    vae_config: dict[str, Any]
    vae: dict[str, torch.Tensor]
    settings: dict[str, Any]
    quantized: dict[str, QuantizedWeight] = field(default_factory=dict)
    vae_quantized: dict[str, QuantizedWeight] = field(default_factory=dict)
    float_inputs: dict[str, list[str]] = field(default_factory=dict)
    reference_config: dict[str, Any] = field(default_factory=dict)
    reference: dict[str, torch.Tensor] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def steps(self) -> list[str]:
        """Kinds of the steps so far."""
        return [str(entry["step"]) for entry in self.history]


@dataclass(frozen=True, eq=False)
class Context:
    """What every step may use besides the student.

    Parameters
    ----------
    teacher : Checkpoint
        What the recipe began with.
    dataset : Dataset
    pictures : int
        How many of the dataset's pictures are encoded.
    machine : Machine
    work, cache : Path
        Of this step (checkpoints, logs), and of what steps share (latents, teacher pairs).
    essence : str
        Hash of everything that determines this step's result.
    """

    teacher: Checkpoint
    dataset: Dataset
    pictures: int
    machine: Machine
    work: Path
    cache: Path
    essence: str = ""
    watch: Watch = field(default_factory=Watch)
    sample_every: int = 0
    """Draw a grid of pictures this often; 0 leaves it to the recipe."""

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return torch.device(self.machine.accelerator.device)

    @cached_property
    def schedule(self) -> Schedule:
        """The teacher's noise schedule."""
        return Schedule(self.teacher.scheduler).to(self.device)

    @cached_property
    def data(self) -> Prepared:
        """Latents and embeddings of the dataset."""
        acc = self.machine.accelerator
        with acc.main_process_first():
            vae = load_vae(self.teacher).to(self.device)
            return prepare(self.teacher, vae, self.dataset, self.pictures, self.cache, self.watch)

    def key(self, **parts: Any) -> str:
        """Name what steps share by everything that it depends on."""
        parts |= {"version": VERSION, "precision": self.machine.precision}
        text = json.dumps(parts, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:24]

    def load_teacher(self) -> nn.Module:
        """Load the teacher's U-Net, frozen."""
        return self.frozen(self.teacher.unet.config, read_all(self.teacher, "unet"))

    def frozen(self, config: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> nn.Module:
        """Make a U-Net that only runs forward, on a GPU in the precision it computes in."""
        unet: nn.Module = build_unet(config, weights).eval().requires_grad_(False)
        if self.device.type != "cpu" and self.machine.precision == "bf16":
            unet = unet.bfloat16()
        return unet.to(self.device)

    def guidance(self, wanted: float | None) -> float:
        """Return the teacher's guidance where the recipe gives none."""
        return float(self.teacher.settings.get("guidance", 1.0)) if wanted is None else wanted


class Step(Model):
    """Settings of a step; subclasses name it and run it.

    Attributes
    ----------
    kind : str
        What recipes call it.
    after : tuple of str
        Kinds of which at least one must come before.
    before : tuple of str
        Kinds that must not have come before.
    imitated : bool
        Whether what the step is given is what later steps imitate.
    """

    kind: ClassVar[str]
    imitated: ClassVar[bool] = False
    after: ClassVar[tuple[str, ...]] = ()
    before: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def run(self, student: Student, context: Context) -> Student:
        """Do it.

        Raises
        ------
        TrainingError, UsageError
        """

    def shape(self, shape: Shape) -> Shape:
        """Return what the step makes of a shape.

        Raises
        ------
        UsageError
            If it cannot be done.
        """
        return shape

    def load(self, after: Shape, reference: Shape, teacher: Shape) -> Load:
        """Return what the step asks of the hardware; nothing to speak of unless it says so.

        Parameters
        ----------
        after : Shape
            What the step makes.
        reference : Shape
            The float student that a smaller one imitates.
        teacher : Shape
        """
        return Load()


def essential(step: Step) -> dict[str, Any]:
    """Return a step's settings without those that change nothing in its result."""
    settings = step.model_dump()
    if isinstance(settings.get("train"), dict):
        idle = ("save_seconds", "log_every", "sample_every")
        settings["train"] = {k: v for k, v in settings["train"].items() if k not in idle}
    return settings


def read_all(checkpoint: Checkpoint, kind: str) -> dict[str, torch.Tensor]:
    """Read all weights of ``unet`` or ``vae``, float32."""
    component = checkpoint.unet if kind == "unet" else checkpoint.vae
    if component.quantized:
        raise CheckpointError(
            "is quantized already", path=checkpoint.path, remedy="compress the original"
        )
    store = component.store
    return {k: v.float() for k, v in store.read(list(store)).items()}


def build_unet(config: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> Any:
    """Make a diffusers U-Net with the given weights, in the layout that trains fastest."""
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import AttnProcessor

    unet = UNet2DConditionModel.from_config(dict(config))
    unet.load_state_dict(dict(weights))
    if not torch.cuda.is_available():
        unet.set_attn_processor(AttnProcessor())  # twice as fast backwards as the fused kernel
    return unet.to(memory_format=torch.channels_last)


def load_vae(checkpoint: Checkpoint) -> Any:
    """Load the autoencoder, frozen."""
    import diffusers

    config = dict(checkpoint.vae.config)
    vae = getattr(diffusers, str(config["_class_name"])).from_config(config)
    vae.load_state_dict(read_all(checkpoint, "vae"))
    return vae.eval().requires_grad_(False).to(memory_format=torch.channels_last)


@cache
def kinds() -> dict[str, type[Step]]:
    """Return all steps: files of :mod:`.steps`, and entry points of other packages."""
    from handheld_export.compress import steps

    found: dict[str, type[Step]] = {}
    modules = [
        importlib.import_module(f"{steps.__name__}.{m.name}")
        for m in pkgutil.iter_modules(steps.__path__)
    ]
    classes = [v for m in modules for v in vars(m).values()]
    classes += [e.load() for e in entry_points(group=GROUP)]
    for value in classes:
        if isinstance(value, type) and issubclass(value, Step) and "kind" in vars(value):
            found[value.kind] = value
    return found


def find(kind: str) -> type[Step]:
    """Return a step by its name in recipes.

    Raises
    ------
    UsageError
        If there is none.
    """
    if kind not in kinds():
        raise UsageError(
            f"step '{kind}' is unknown", remedy=f"choose from {', '.join(sorted(kinds()))}"
        )
    return kinds()[kind]
