"""Runs a recipe in a process of its own, which tests kill or run twice side by side."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from handheld_export.checkpoint import Checkpoint
from handheld_export.compress import recipe, run
from handheld_export.compress.data import Folder
from handheld_export.compress.engine import Machine


def main(recipe_path: str, checkpoint: str, data: str, work: str, output: str, *flags: str) -> None:
    """Run it."""
    torch.set_num_threads(1)
    run.compress(
        Checkpoint(checkpoint),
        recipe.read(Path(recipe_path)),
        Path(output),
        dataset=Folder(Path(data)),
        machine=Machine(precision="no", fsdp="fsdp" in flags, cpu=True),
        work=Path(work),
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
