"""Runs a recipe in a process of its own, which tests kill or run twice side by side."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from handheld_export.checkpoint import Checkpoint
from handheld_export.compress import recipe, run
from handheld_export.compress.data import Folder
from handheld_export.compress.engine import Machine


def main(recipe_path: Path, checkpoint: Path, data: Path, work: Path, fsdp: bool = False) -> None:
    """Run it; the student is written beside ``work``."""
    torch.set_num_threads(1)
    run.compress(
        Checkpoint(checkpoint),
        recipe.read(recipe_path),
        work.with_name(f"{work.name}-student"),
        dataset=Folder(data),
        machine=Machine(precision="no", fsdp=fsdp, cpu=True),
        work=work,
    )


def logged(log: Path, *given) -> None:
    """Run it, with a file for what it says."""
    with log.open("ab") as file:
        for fd in (1, 2):
            os.dup2(file.fileno(), fd)
    main(*given)
