"""Measure the critter model: accuracy on held-out combinations, coverage, PSNR, a grid of samples.

    python benchmarks/critter_quality.py            # writes quality.json and the card's figures
    python benchmarks/critter_quality.py --sweep    # compares sampler settings

The main figures come from pictures for attribute combinations that training never saw.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from handheld.files import replace_between
from handheld_export.critter import data, evaluate, sample

BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
READ = {
    "generated": "drawn from a caption that names all four large attributes",
    "generated_two_named": "drawn from a caption that names face color and head only",
    "reconstructed": "real, through the VAE",
    "real": "real",
}
WAYS = {"nearest_truth": "nearest truth", "classifier": "classifier"}


def card(figures: dict[str, Any]) -> str:
    """Return the model card's figures in Markdown."""
    names = [n.replace("_", " ") for n in data.NAMES]
    lines = [
        f"| pictures | read by | {' | '.join(names)} |",
        "|---|---|" + "---:|" * len(names),
    ]
    for key, words in READ.items():
        for way, said in WAYS.items():
            read = figures[key][way]
            shares = (f"{100 * read[n]:.1f} %" if n in read else "" for n in data.NAMES)
            lines.append(f"| {words} | {said} | {' | '.join(shares)} |")
    vae, coverage = figures["vae"], figures["coverage"]
    bits = ", ".join(
        f"{n.replace('_', ' ')} {abs(b['bits']):.2f} of {b['uniform_bits']:.2f}"
        for n, b in coverage["attributes"].items()
    )
    lines += [
        "",
        f"{figures['pictures']} pictures, {figures['settings']['steps']} steps of "
        f"{figures['settings']['sampler']} with guidance {figures['settings']['guidance']:g}; "
        "256 pictures in the rows with two attributes.",
        "",
        f"The VAE reconstructs held-out pictures with a mean PSNR of {vae['psnr_mean_db']:.1f} dB "
        f"({vae['psnr_of_mean_error_db']:.1f} dB for the mean squared error of all, "
        f"{vae['psnr_min_db']:.1f} dB for the worst).",
        "",
        f"What a caption leaves open varies: entropy in bits over {coverage['pictures']} pictures "
        f'of "{coverage["prompt"]}": {bits}.',
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, and write what was found beside the model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", type=Path, default=Path("models/critter"))
    parser.add_argument("--grid", type=Path, default=Path("docs/images/critter-grid.png"))
    parser.add_argument("--pictures", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--sweep", action="store_true", help="only compare sampler settings on the validation split"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.sweep:
        for steps in (4, 6, 8):
            for sampler in sample.SAMPLERS:
                for guidance in (1.0, 2.0, 3.0):
                    setting = (sampler, steps, guidance)
                    print(json.dumps(evaluate.sweep(arguments.model, [setting])[0]), flush=True)
        return
    figures = evaluate.evaluate(arguments.model, arguments.pictures)
    evaluate.write_json(arguments.model / "quality.json", figures)
    readme = arguments.model / "README.md"
    replace_between(readme, BEGIN, END, card(figures))
    arguments.grid.parent.mkdir(parents=True, exist_ok=True)
    evaluate.samples(arguments.model).save(arguments.grid, optimize=True)
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
