"""What the packed model can do, measured on attribute combinations that training never saw."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

from . import data, judge, sample, vae
from .loop import step_generator

ASKED = data.NAMES[: data.SPLIT_ON]
PROMPT = "a purple horned creature"


def prompts(
    n: int, split: data.Split, seed: int, only: Sequence[str] | None = None
) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Draw creatures of different held-out combinations, with captions.

    Parameters
    ----------
    n
        How many; at most the number of combinations in the split.
    split
        Which split.
    seed
        Of combinations, free attributes and wording.
    only
        The attributes that captions name. By default the four that make a combination held out,
        and eyes, mouth and nose as often as in training.

    Returns
    -------
    tuple
        Creatures (n, 7); what was asked (n, 7), -1 where a caption does not name the attribute;
        captions.
    """
    generator, rng = step_generator(seed, 0), random.Random(seed)  # noqa: S311
    table = data.combinations(split)
    creatures = data.sample_creatures(n, split, generator)
    creatures[:, : data.SPLIT_ON] = table[torch.randperm(len(table), generator=generator)[:n]]
    asked, captions = creatures.clone(), []
    for row, creature in enumerate(creatures.tolist()):
        named = set(only) if only is not None else {*ASKED, *data.random_subset(rng)}
        captions.append(data.describe(creature, sorted(named), rng))
        for i, name in enumerate(data.NAMES):
            if name not in named:
                asked[row, i] = -1
    return creatures, asked, captions


def judged(
    classifier: judge.Classifier, pictures: torch.Tensor, asked: torch.Tensor
) -> dict[str, dict[str, float]]:
    """Return the accuracy of each attribute by both ways of reading."""
    return {
        "nearest_truth": judge.accuracy(judge.read_all(pictures), asked),
        "classifier": judge.accuracy(judge.classify(classifier, pictures), asked),
    }


def entropy_bits(read: torch.Tensor, count: int) -> float:
    """Return the entropy of attribute values, in bits."""
    share = torch.bincount(read, minlength=count).double() / len(read)
    return float(-(share * share.clamp_min(1e-12).log2()).sum())


def coverage(pictures: torch.Tensor) -> dict[str, dict[str, float]]:
    """Return the entropy of each attribute over pictures of one prompt, and the largest one."""
    read = judge.read_all(pictures)
    return {
        name: {
            "bits": entropy_bits(read[:, i], count),
            "uniform_bits": float(torch.tensor(float(count)).log2()),
        }
        for i, (name, count) in enumerate(zip(data.NAMES, data.COUNTS, strict=True))
    }


def sweep(
    folder: Path,
    settings: Sequence[tuple[sample.Sampler, int, float]],
    n: int = 128,
) -> list[dict[str, Any]]:
    """Try sampler settings on the validation split, judged by the nearest composed truth."""
    model = sample.load(folder)
    _, asked, captions = prompts(n, "val", seed=21)
    rows = []
    for sampler, steps, guidance in settings:
        pictures = sample.generate(
            model, captions, 22, sampler=sampler, steps=steps, guidance=guidance
        )
        figures = judge.accuracy(judge.read_all(pictures), asked)
        rows.append({"sampler": sampler, "steps": steps, "guidance": guidance, **figures})
    return rows


def grid(pictures: torch.Tensor, captions: Sequence[str], columns: int = 5) -> Image.Image:
    """Lay pictures out in a grid with their captions below them."""
    cell, text_height = 2 * data.SIZE, 56
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * cell, rows * (cell + text_height)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (picture, words) in enumerate(zip(pictures, captions, strict=True)):
        x, y = i % columns * cell, i // columns * (cell + text_height)
        tile = Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
        sheet.paste(tile.resize((cell, cell), Image.Resampling.NEAREST), (x, y))
        lines, line = [], ""
        for word in words.split():
            if len(line) + len(word) > 38:
                lines.append(line)
                line = ""
            line = f"{line} {word}".strip()
        draw.multiline_text((x + 6, y + cell + 2), "\n".join([*lines, line]), fill="black")
    return sheet


def evaluate(folder: Path, n: int = 1024) -> dict[str, Any]:
    """Measure a packed model.

    Parameters
    ----------
    folder
        The packed model, with its judge.
    n
        Pictures for the main figures.

    Returns
    -------
    dict
        Accuracy on generated, real and reconstructed pictures; coverage; PSNR of the VAE.
    """
    began = time.monotonic()
    model = sample.load(folder)
    classifier = judge.load(folder)
    creatures, asked, captions = prompts(n, "test", seed=31)
    real = data.compose(creatures)
    rebuilt = vae.reconstruct(model.vae, real)
    ratios = vae.psnr(real, rebuilt)
    drawing = time.monotonic()
    drawn = sample.generate(model, captions, seed=32)
    seconds = (time.monotonic() - drawing) / n
    pair = ("face_color", "head")
    _, pair_asked, pair_captions = prompts(256, "test", seed=33, only=pair)
    return {
        "settings": model.settings,
        "pictures": n,
        "combinations": "test split, all different; captions name "
        + ", ".join(ASKED)
        + " and, at the training rates, eyes, mouth and nose",
        "seconds_per_picture": seconds,
        "generated": judged(classifier, drawn, asked),
        "real": judged(classifier, real, asked),
        "reconstructed": judged(classifier, rebuilt, asked),
        "generated_two_named": judged(
            classifier, sample.generate(model, pair_captions, seed=34), pair_asked
        ),
        "coverage": {
            "prompt": PROMPT,
            "pictures": 256,
            "attributes": coverage(sample.generate(model, [PROMPT] * 256, seed=35)),
        },
        "vae": {
            "pictures": n,
            "psnr_mean_db": float(ratios.mean()),
            "psnr_of_mean_error_db": float(-10 * (10 ** (-ratios / 10)).mean().log10()),
            "psnr_min_db": float(ratios.min()),
        },
        "seconds": time.monotonic() - began,
    }


def samples(folder: Path, n: int = 40) -> Image.Image:
    """Draw a grid of samples for held-out combinations, with captions as training writes them."""
    model = sample.load(folder)
    creatures, _, _ = prompts(n, "test", seed=41)
    rng = random.Random(42)  # noqa: S311
    captions = [data.caption(c, rng)[0] for c in creatures.tolist()]
    return grid(sample.generate(model, captions, seed=43), captions)


def write_json(path: Path, figures: object) -> None:
    """Write figures as indented JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(figures, indent=2) + "\n")
