"""Measure the critter model: accuracy on held-out combinations, coverage, PSNR, a grid of samples.

python benchmarks/critter_quality.py
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from handheld_export.critter import evaluate, sample


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("models/critter"))
    parser.add_argument("--root", type=Path, default=Path("build/critter"))
    parser.add_argument("--out", type=Path, default=Path("build/critter_quality.json"))
    parser.add_argument("--grid", type=Path, default=Path("docs/images/critter-grid.png"))
    parser.add_argument("--pictures", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--sweep", action="store_true", help="only compare sampler settings on the validation split"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.sweep:
        settings = [
            (sampler, steps, guidance)
            for steps in (4, 6, 8, 10)
            for sampler in sample.SAMPLERS
            for guidance in ((1.0, 2.0) if steps == 8 else (1.0,))
        ]
        rows = evaluate.sweep(arguments.model, settings)
        evaluate.write_json(arguments.out.with_name("critter_sweep.json"), rows)
        for row in rows:
            print(json.dumps(row))
        return
    figures = evaluate.evaluate(arguments.model, arguments.root, arguments.pictures)
    evaluate.write_json(arguments.out, figures)
    arguments.grid.parent.mkdir(parents=True, exist_ok=True)
    evaluate.samples(arguments.model).save(arguments.grid, optimize=True)
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
