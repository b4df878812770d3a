"""Running a recipe: one folder per step, each finished step kept, the student written last."""

from __future__ import annotations

import json
import math
import pickle
import platform
import shutil
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from handheld import __version__, planning
from handheld.devices.host import cpu_model
from handheld.errors import CheckpointError, HandheldError, OutputError
from handheld.files import cache_root, replaced_folder, write_file
from handheld_export.checkpoint import Checkpoint, read_json, write_student_component
from handheld_export.compress import card, estimate
from handheld_export.compress.data import Dataset
from handheld_export.compress.engine import Machine, Watch, save_atomic
from handheld_export.compress.load import Cluster
from handheld_export.compress.recipe import Recipe
from handheld_export.compress.step import VERSION, Context, Student, read_all
from handheld_export.quantization import QuantizedWeight
from handheld_export.text import encoders_sha256

_DONE = "student.pt"
"""What a step leaves in its folder when it has ended."""
_COPIED = (
    "text_encoder",
    "text_encoder_2",
    "tokenizer",
    "tokenizer_2",
    "scheduler",
    "model_index.json",
)


def first(checkpoint: Checkpoint) -> Student:
    """Return a checkpoint as the student that no step has changed yet."""
    return Student(
        unet_config=dict(checkpoint.unet.config),
        unet=read_all(checkpoint, "unet"),
        vae_config=dict(checkpoint.vae.config),
        vae=read_all(checkpoint, "vae"),
        settings=dict(checkpoint.settings),
        history=list(checkpoint.settings.get("history", [])),
    )


def compress(
    checkpoint: Checkpoint,
    recipe: Recipe,
    output: Path,
    *,
    dataset: Dataset,
    machine: Machine,
    work: Path | None = None,
    watch: Watch | None = None,
    sample_every: int = 0,
    command: str = "",
) -> Student:
    """Make a student.

    Parameters
    ----------
    checkpoint : Checkpoint
        The teacher, unquantized.
    recipe : Recipe
    output : Path
        The student's folder.
    dataset : Dataset
    machine : Machine
    work : Path, optional
        Where steps keep what they have done. Recipes that begin with the same steps share them.
    watch : Watch, optional
    sample_every : int
        Draw a grid of pictures this often while training; 0 leaves it to the recipe.
    command : str
        What makes the student again, for its card.

    Raises
    ------
    UsageError, TrainingError, CheckpointError, OutputError
        What a look at configurations can tell is told before anything trains.
    """
    watch = watch or Watch()
    check_output(output, checkpoint)
    name = str(checkpoint.path)
    shape = planning.shape_of(checkpoint.unet.config, checkpoint.vae.config, None, name)
    world = machine.accelerator.num_processes
    estimate.plan(recipe, shape, Cluster(devices=world, memory=math.inf, fsdp=machine.fsdp))
    root = work or cache_root() / "compress"
    encoders = encoders_sha256(checkpoint.path)
    base = f"{VERSION} {checkpoint.sha256} {encoders} {dataset.key()} {machine.precision}"
    essences = [recipe.essence(i + 1, base) for i in range(len(recipe.steps))]
    folders = [
        root / f"{i}-{step.kind}-{essence[:16]}"
        for i, (step, essence) in enumerate(zip(recipe.steps, essences, strict=True), 1)
    ]
    # What comes before the last finished step is in its result, and may be gone.
    finished = max((i for i, f in enumerate(folders, 1) if (f / _DONE).exists()), default=0)
    student = _load(folders[finished - 1] / _DONE) if finished else first(checkpoint)
    began = time.monotonic()
    for i, step in enumerate(recipe.steps):
        if i < finished:
            watch.stage(f"{step.kind}: done before")
            continue
        essence, folder = essences[i], folders[i]
        watch.stage(step.kind)
        context = Context(
            teacher=checkpoint,
            dataset=dataset,
            pictures=recipe.data.pictures,
            machine=machine,
            work=folder,
            cache=root,
            essence=essence,
            watch=watch,
            sample_every=sample_every,
        )
        with _Clock(folder) as clock:
            student = step.run(student, context)
        student.history[-1] |= {
            "seconds": clock.seconds,
            "machine": machine_summary(machine),
        }
        if machine.accelerator.is_main_process:
            save_atomic(_dump(student), folder / _DONE)
            (folder / "checkpoint.pt").unlink(missing_ok=True)
        machine.accelerator.wait_for_everyone()
        machine.accelerator.free_memory()  # it keeps every model that it has prepared
    student.settings |= {
        "name": recipe.name,
        "recipe": recipe.name,
        "made_from": {"name": checkpoint.name, "sha256": checkpoint.sha256},
        "data": f"{recipe.data.pictures} of {dataset.about}",
        "command": command,
    }
    if machine.accelerator.is_main_process:
        watch.stage("writing the student")
        write(student, checkpoint, output)
    watch.stage(f"done in {time.monotonic() - began:.0f} s")
    return student


class _Clock:
    """Time a step, runs that were stopped on the way included; killed ones leave no trace."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "seconds.json"
        self.seconds = 0.0

    def __enter__(self) -> _Clock:
        if self._path.exists():
            self.seconds = float(json.loads(self._path.read_text()))
        self._began = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = round(self.seconds + time.monotonic() - self._began, 1)
        if self._path.parent.is_dir():
            write_file(self._path, json.dumps(self.seconds).encode())


def machine_summary(machine: Machine) -> dict[str, Any]:
    """Say what training ran on."""
    acc = machine.accelerator
    on_gpu = acc.device.type == "cuda"
    name = torch.cuda.get_device_name() if on_gpu else cpu_model() or platform.machine()
    return {
        "device": name,
        "processes": acc.num_processes,
        "threads": torch.get_num_threads(),
        "precision": machine.precision,
        "torch": str(torch.__version__),
        "handheld": __version__,
    }


def write(student: Student, checkpoint: Checkpoint, output: Path) -> None:
    """Write a student in diffusers layout with its card, float weights in fp16.

    Raises
    ------
    OutputError
        If the place is taken by something else than a student, or cannot be written.
    """
    check_output(output, checkpoint)
    output.parent.mkdir(parents=True, exist_ok=True)
    with replaced_folder(output) as work:
        for name in _COPIED:
            source = checkpoint.path / name
            if source.is_dir():
                shutil.copytree(source, work / name)
            elif source.is_file():
                shutil.copy2(source, work / name)
        for kind, config, weights, codes in (
            ("unet", student.unet_config, student.unet, student.quantized),
            ("vae", student.vae_config, student.vae, student.vae_quantized),
        ):
            float_weights = {
                k: v.half().contiguous()
                for k, v in weights.items()
                if k.removesuffix(".weight") not in codes
            }
            write_student_component(
                work / kind,
                config,
                float_weights,
                codes,
                float_inputs=student.float_inputs.get(kind, ()),
            )
        settings = student.settings | {"history": student.history}
        (work / "handheld.json").write_text(json.dumps(settings, indent=2) + "\n")
        (work / "README.md").write_text(card.text(settings), encoding="utf-8")


def check_output(output: Path, checkpoint: Checkpoint) -> None:
    """Refuse a place that holds something else than a student, before hours of training.

    Raises
    ------
    OutputError
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    own = output.resolve() == checkpoint.path.resolve()
    if own or not _is_student(output):
        raise OutputError(
            "is the checkpoint to compress" if own else "is in the way and is no student",
            path=output,
            remedy="choose another place",
        )


def _is_student(folder: Path) -> bool:
    try:
        return "made_from" in read_json(folder / "handheld.json")
    except (HandheldError, OSError):
        return False


def _dump(student: Student) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        if isinstance(value, QuantizedWeight):
            return {
                "grid": value.grid,
                "codes": torch.from_numpy(value.codes),
                "scales": torch.from_numpy(value.scales),
                "group_size": value.group_size,
                "codebook": None if value.codebook is None else torch.from_numpy(value.codebook),
            }
        return {k: plain(v) for k, v in value.items()} if isinstance(value, dict) else value

    return {f.name: plain(getattr(student, f.name)) for f in fields(student)}


def _load(path: Path) -> Student:
    try:
        return _student(torch.load(path, map_location="cpu", weights_only=True))
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError, ValueError) as e:
        raise CheckpointError(
            f"does not hold what a finished step gives: {e}",
            path=path,
            remedy="remove this file; the step before it, or the recipe, goes on from there",
        ) from None


def _student(state: dict[str, Any]) -> Student:
    def weight(value: dict[str, Any]) -> QuantizedWeight:
        book = value["codebook"]
        return QuantizedWeight.checked(
            value["grid"],
            value["codes"].numpy(),
            value["scales"].numpy().astype(np.float32),
            value["group_size"],
            None if book is None else book.numpy(),
        )

    for name in ("quantized", "vae_quantized"):
        state[name] = {k: weight(v) for k, v in state[name].items()}
    return Student(**state)
