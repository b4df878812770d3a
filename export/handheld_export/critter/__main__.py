"""`python -m handheld_export.critter PHASE`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from . import evaluate, judge, pack, terminal, text, unet, vae

PHASES = ("data", "vae", "text", "unet", "classifier", "pack", "terminal", "evaluate")


def run_phase(phase: str, root: Path, model: Path) -> None:
    """Run one phase of the recipe; a phase that was killed goes on from its last checkpoint.

    Parameters
    ----------
    phase
        One of `PHASES`.
    root
        Folder of checkpoints and logs.
    model
        Folder of the packed model.
    """
    if phase == "data":
        text.tokenizers(root)
    elif phase == "vae":
        vae.run(root)
        print(json.dumps(vae.report(root)))
    elif phase == "text":
        text.run(root)
        print(json.dumps(text.report(root)))
    elif phase == "unet":
        unet.run(root)
    elif phase == "classifier":
        judge.run(root)
    elif phase == "pack":
        pack.write_trained(root, model, pack.SETTINGS)
        judge.pack(root, model)
    elif phase == "terminal":
        terminal.run(root, model)
    elif phase == "evaluate":
        figures = evaluate.evaluate(model)
        evaluate.write_json(model / "quality.json", figures)
        print(json.dumps(figures))


def main() -> None:
    """Run the phases that the command line names."""
    parser = argparse.ArgumentParser(
        prog="python -m handheld_export.critter", description="Train the critter model."
    )
    parser.add_argument("phase", choices=[*PHASES, "all"])
    parser.add_argument("--root", type=Path, default=Path("build/critter"))
    parser.add_argument("--model", type=Path, default=Path("models/critter"))
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for phase in PHASES if arguments.phase == "all" else (arguments.phase,):
        run_phase(phase, arguments.root, arguments.model)


if __name__ == "__main__":
    main()
