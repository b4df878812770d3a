"""Compare the teacher with every student: accuracy, coverage, distance to real pictures.

    python benchmarks/quality.py                       # what is in build/onestep, build/stack1 ...
    python benchmarks/quality.py --pictures 128        # a quick look

Pictures are drawn in torch for attribute combinations that training never saw, by every model
from the same noise, and read by the two judges of the critter model. What a model drew is kept
under build/quality by the hash of its weights, so that a second run draws only what is new.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

import stages
from handheld.files import replace_between, write_file
from handheld_export.checkpoint import Checkpoint
from handheld_export.compress import card
from handheld_export.compress.painter import Painter, weights
from handheld_export.critter import data, evaluate, judge
from handheld_export.quantization import round_to_nearest
from promises import Line, at_least
from promises import show as tell

LARGE = ("face_color", "head", "body_color")
FREE = ("body_color", "body", "eyes", "mouth")
PROMPT = evaluate.PROMPT
BEGIN, END = "<!-- quality: begin -->", "<!-- quality: end -->"


def prompts(n: int, seed: int = 51) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Held-out combinations, each at most once in a thousand prompts."""
    parts = [
        evaluate.prompts(min(1000, n - at), "test", seed=seed + i)
        for i, at in enumerate(range(0, n, 1000))
    ]
    creatures, asked, captions = zip(*parts, strict=True)
    return torch.cat(creatures), torch.cat(asked), [c for part in captions for c in part]


def rounded(student: Checkpoint, base: Checkpoint) -> dict[str, torch.Tensor]:
    """The float one-step student, rounded to nearest on the grids of another student."""
    found = weights(base.unet)
    for layer in student.unet.quantized:
        like = student.unet.quantized_weight(layer)
        own = found[f"{layer}.weight"].numpy()
        plain = round_to_nearest(own, like.grid, like.group_size)
        found[f"{layer}.weight"] = torch.from_numpy(plain.dequantize())
    return found


def _alike(student: Checkpoint, base: Checkpoint) -> bool:
    """Tell whether a student could have the other's weights, rounded."""
    same = student.settings.get("timesteps") == base.settings.get("timesteps")
    return same and student.unet.config == base.unet.config


def drawn(
    painter: Painter, captions: list[str], seed: int, cache: Path, key: str
) -> tuple[torch.Tensor, float]:
    """Draw, or read what was drawn before; seconds per picture when it was drawn."""
    name = hashlib.sha256(
        json.dumps([key, captions, seed, len(painter.plan), painter.guidance]).encode()
    ).hexdigest()[:24]
    path = cache / f"{name}.pt"
    if path.exists():
        kept = torch.load(path, weights_only=True)
        return kept["pictures"], kept["seconds"]
    shape = (len(captions), painter.channels, painter.side, painter.side)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    began = time.perf_counter()
    pictures = painter.draw(captions, noise)
    seconds = (time.perf_counter() - began) / len(captions)
    cache.mkdir(parents=True, exist_ok=True)
    torch.save({"pictures": pictures, "seconds": seconds}, path.with_suffix(".partial"))
    path.with_suffix(".partial").replace(path)
    return pictures, seconds


@torch.no_grad()
def features(classifier: judge.Classifier, pictures: torch.Tensor) -> torch.Tensor:
    """The classifier's last 128 channels, averaged over the picture, float64 [n, 128]."""
    layers = classifier.body[:-3]
    rows = [layers(data.to_float(p)).mean(dim=(2, 3)) for p in torch.split(pictures, 64)]
    return torch.cat(rows).double()


def frechet(a: torch.Tensor, b: torch.Tensor) -> float:
    """Frechet distance of two Gaussians (Heusel et al., arXiv 1706.08500), on our features."""
    mean = (a.mean(0) - b.mean(0)).square().sum()
    ca, cb = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(ca)
    root = vectors @ (values.clamp_min(0).sqrt()[:, None] * vectors.T)
    cross = torch.linalg.eigvalsh(root @ cb @ root).clamp_min(0).sqrt().sum()
    return float(mean + ca.trace() + cb.trace() - 2 * cross)


def right(read: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
    """Share of the large attributes that are as asked, by picture."""
    columns = [data.NAMES.index(n) for n in LARGE]
    return (read[:, columns] == asked[:, columns]).double().mean(dim=1)


def promises(report: dict[str, Any]) -> list[Line]:
    """Hold the figures against what the stacks promise."""
    models = report["models"]
    first, *students = models
    teacher, real = models[first], report["real"]
    mean = {name: row["large"]["classifier"] for name, row in models.items()}
    share = mean[first] / real["large"]["classifier"]
    lines = [at_least("accuracy, of that on real pictures", first, 100 * share, 95, " %")]
    for name in LARGE:
        own = teacher["accuracy"]["classifier"][name] / real["accuracy"]["classifier"][name]
        lines.append(at_least(f"  {name}", first, 100 * own, 95, " %"))
    if "onestep" in models:
        share = mean["onestep"] / mean[first]
        lines.append(at_least("accuracy, of the teacher's", "onestep", 100 * share, 98, " %"))
        far = models["onestep"]["distance"]
        lines.append(Line("feature distance", "onestep", f"{far:.2f}x", "<= 1.25x", far <= 1.25))
    if {"onestep", "warmup"} <= models.keys():
        for judged in ("classifier", "nearest_truth"):
            change = -50 * sum(models["warmup"]["against_onestep"][judged])
            lines.append(at_least(f"above warmup, {judged}", "onestep", change, 0, " points"))
        near, far = (models[n]["distance"] for n in ("onestep", "warmup"))
        wanted = f"<= {far:.2f}x, warmup's"
        lines.append(Line("feature distance", "onestep", f"{near:.2f}x", wanted, near <= far))
    for name in students:
        if "plain" not in name:
            share = models[name]["coverage"]
            lines.append(at_least("coverage, of the teacher's", name, 100 * share, 90, " %"))
    for name, points in (("stack1", 1), ("stack2", 3), ("stack3", 5)):
        for judged, both in models.get(name, {}).get("against_onestep", {}).items():
            change = 50 * sum(both)
            lines.append(at_least(f"to onestep, {judged}", name, change, -points, " points"))
    if "stack2" in models:
        for what in ("params", "macs"):
            left = models["stack2"][what] / teacher[what]
            lines.append(at_least(f"{what} trimmed", "stack2", 100 * (1 - left), 30, " %"))
    if "stack3" in models:
        smaller = 16 / models["stack3"]["bits_per_weight"]
        lines.append(at_least("layers below fp16", "stack3", smaller, 7.5, "x"))
    for name, row in models.items():
        if name == "stack3, plain rounding":
            worse = -100 * row["against_student"]["nearest_truth"][1]
            lines.append(at_least("worse by, at 95 %", name, worse, 0, " points"))
        elif name in ("stack1", "stack2", "stack3"):
            fewer = teacher["decoder_macs"] / row["decoder_macs"]
            lines.append(at_least("decoder's MACs below the VAE's", name, fewer, 5, "x"))
    return lines


def interval(difference: torch.Tensor) -> list[float]:
    """95 % interval of a mean of paired differences."""
    mean = float(difference.mean())
    half = 1.96 * float(difference.std()) / len(difference) ** 0.5
    return [mean - half, mean + half]


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    error = ((a.double() - b.double()) / 255).square().flatten(1).mean(1)
    return float((-10 * error.clamp_min(1e-10).log10()).mean())


def measure(
    pictures: torch.Tensor,
    free: torch.Tensor,
    asked: torch.Tensor,
    classifier: judge.Classifier,
    real: torch.Tensor,
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return figures of a model, and by judge which pictures were right."""
    reads = {
        "nearest_truth": judge.read_all(pictures),
        "classifier": judge.classify(classifier, pictures),
    }
    entropy = {n: c["bits"] for n, c in evaluate.coverage(free).items() if n in FREE}
    figures = {
        "accuracy": {w: judge.accuracy(r, asked) for w, r in reads.items()},
        "large": {w: float(right(r, asked).mean()) for w, r in reads.items()},
        "feature_distance": frechet(features(classifier, pictures), real),
        "entropy_bits": entropy,
        "entropy_mean_bits": sum(entropy.values()) / len(entropy),
    }
    return figures, {w: right(r, asked) for w, r in reads.items()}


def sheet(rows: dict[str, torch.Tensor], columns: int = 8) -> Image.Image:
    """One row of pictures per model."""
    from PIL import ImageDraw

    size, label = data.SIZE, 110
    out = Image.new("RGB", (label + columns * size, len(rows) * size), "white")
    draw = ImageDraw.Draw(out)
    for y, (name, pictures) in enumerate(rows.items()):
        draw.text((6, y * size + size // 2 - 6), name, fill="black")
        for x, picture in enumerate(pictures[:columns]):
            tile = Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
            out.paste(tile, (label + x * size, y * size))
    return out


def table(report: dict[str, Any]) -> str:
    """Return the figures in Markdown."""
    lines = [
        "| model | U-Net params M | bits | MB | face color | head | body color | all three, "
        "classifier | to one-step, points (95 %) | coverage | feature distance |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, row in report["models"].items():
        share = row["accuracy"]["nearest_truth"]
        change = row.get("against_onestep", {}).get("nearest_truth")
        points = "" if change is None else f"{100 * change[0]:+.1f} to {100 * change[1]:+.1f}"
        bits = "" if row["bits_per_weight"] is None else f"{row['bits_per_weight']:.2f}"
        lines.append(
            f"| {name} | {row['params'] / 1e6:.1f} | {bits} | {row['unet_bytes'] / 1e6:.1f} | "
            + " | ".join(f"{100 * share[a]:.1f} %" for a in LARGE)
            + f" | {100 * row['large']['classifier']:.1f} % | {points} | "
            f"{100 * row['coverage']:.0f} % | {row['distance']:.2f}x |"
        )
    real = report["real"]["large"]
    lines += [
        "",
        f"{report['pictures']} pictures of held-out combinations, all models from the same noise. "
        "Face color, head and body color by nearest truth. Both judges read "
        f"{100 * real['nearest_truth']:.1f} % and {100 * real['classifier']:.1f} % of the same "
        "attributes right on real pictures. Coverage: entropy of what "
        f'"{PROMPT}" leaves open over {report["coverage_pictures"]} noises, against the '
        "teacher's. Feature distance to other real pictures, against the teacher's. MB: the "
        f"U-Net, float parts in fp16. Drawn in {report['precision']}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Draw, judge, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--teacher", type=Path, default=Path("models/critter"))
    parser.add_argument("--students", type=Path, default=Path("build"))
    parser.add_argument(
        "--names", default="warmup,onestep,stack1,stack2,stack3", help="folders of students"
    )
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--noises", type=int, default=200)
    parser.add_argument("--seed", type=int, default=51, help="of prompts and noise")
    parser.add_argument("--steps", type=int, default=20, help="of the teacher")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="of drawing")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, default=Path("build/quality.json"))
    parser.add_argument("--grid", type=Path, default=Path("build/quality.png"))
    parser.add_argument(
        "--cards", action="store_true", help="write each student's figures into its card"
    )
    parser.add_argument("--page", type=Path, help="Markdown page whose table is written again")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    n, seed = arguments.pictures, arguments.seed
    creatures, asked, captions = prompts(n, seed=seed)
    teacher = Checkpoint(arguments.teacher)
    classifier = judge.load(arguments.teacher)
    real = data.compose(creatures)
    other, _, _ = prompts(n, seed=seed + 100)
    reference = features(classifier, data.compose(other))
    cache = Path("build/quality") / arguments.precision
    bf16 = arguments.precision == "bf16"
    models: dict[str, tuple[Painter, Checkpoint, str]] = {
        f"teacher, {arguments.steps} steps": (
            Painter(teacher, steps=arguments.steps, bf16=bf16), teacher, teacher.sha256,
        )
    }  # fmt: skip
    base: Checkpoint | None = None
    for name in arguments.names.split(","):
        folder = arguments.students / name
        if not (folder / "unet").is_dir():
            stages.say(f"{folder} is not there; left out")
            continue
        student = Checkpoint(folder)
        models[name] = Painter(student, bf16=bf16), student, student.sha256
        if name == "onestep":
            base = student
        elif student.unet.quantized and base and _alike(student, base):
            unet = rounded(student, base)
            key = f"{base.sha256} rounded as {student.sha256}"
            models[f"{name}, plain rounding"] = Painter(student, unet=unet, bf16=bf16), student, key
    report: dict[str, Any] = {
        "pictures": n,
        "coverage_pictures": arguments.noises,
        "real": {},
        "models": {},
        "torch": torch.__version__,
        "threads": arguments.threads,
        "precision": arguments.precision,
    }
    reads = {
        "nearest_truth": judge.read_all(real),
        "classifier": judge.classify(classifier, real),
    }
    report["real"]["large"] = {w: float(right(r, asked).mean()) for w, r in reads.items()}
    report["real"]["accuracy"] = {w: judge.accuracy(r, asked) for w, r in reads.items()}
    hits: dict[str, dict[str, torch.Tensor]] = {}
    rows: dict[str, torch.Tensor] = {}
    for name, (painter, checkpoint, key) in models.items():
        pictures, seconds = drawn(painter, captions, seed + 1, cache, key)
        free, _ = drawn(painter, [PROMPT] * arguments.noises, seed + 2, cache, key)
        figures, hits[name] = measure(pictures, free, asked, classifier, reference)
        rows[name] = pictures
        report["models"][name] = figures | size(checkpoint) | {"seconds_per_picture": seconds}
        stages.say(f"{name}: {figures['large']}, {seconds:.2f} s a picture")
    first = next(iter(report["models"]))
    for name, row in report["models"].items():
        whole = report["models"][first]
        row["coverage"] = row["entropy_mean_bits"] / whole["entropy_mean_bits"]
        row["distance"] = row["feature_distance"] / whole["feature_distance"]
        row["psnr_to_teacher_db"] = None if name == first else psnr(rows[name], rows[first])
        for key, to in (("against_teacher", first), ("against_onestep", "onestep")):
            if to in hits and name != to:
                row[key] = {w: interval(h - hits[to][w]) for w, h in hits[name].items()}
        student, comma, _ = name.partition(",")
        if comma and student in hits:
            row["against_student"] = {
                w: interval(h - hits[student][w]) for w, h in hits[name].items()
            }
    held = promises(report)
    report["promises"] = [line._asdict() for line in held]
    write_file(arguments.json, (json.dumps(report, indent=2) + "\n").encode())
    sheet(rows).save(arguments.grid, optimize=True)
    if arguments.page:
        replace_between(arguments.page, BEGIN, END, table(report))
    if arguments.cards:
        for name in arguments.names.split(","):
            if name in report["models"]:
                own = report | {"models": {k: report["models"][k] for k in (first, name)}}
                card.add_figures(arguments.students / name, table(own))
    show(report, held)


def size(checkpoint: Checkpoint) -> dict[str, Any]:
    """Count a student: parameters, MACs, bits per weight, bytes."""
    from handheld import planning
    from handheld.planning import Stored

    unet = checkpoint.unet
    shape = planning.shape_of(unet.config, checkpoint.vae.config, None, str(checkpoint.path))
    grids = {
        x: Stored(w.grid, w.group_size) for x in unet.quantized for w in [unet.quantized_weight(x)]
    }
    from dataclasses import replace

    found = planning.figures(replace(shape, grids=grids))
    return {
        "params": found["unet_params"],
        "macs": found["unet_macs"],
        "bits_per_weight": found["bits_per_weight"],
        "unet_bytes": found["unet_bytes"],
        "decoder_macs": found["decoder_macs"],
    }


def show(report: dict[str, Any], held: list[Line]) -> None:
    """Print the tables."""
    shown = Table(title=f"{report['pictures']} pictures, nearest truth / classifier")
    for column in ("model", "large", "vs one-step", "coverage", "distance", "s"):
        shown.add_column(column, justify="left" if column == "model" else "right")
    for name, row in report["models"].items():
        change = row.get("against_onestep", {}).get("nearest_truth")
        both = " / ".join(f"{100 * row['large'][w]:.1f}" for w in ("nearest_truth", "classifier"))
        shown.add_row(
            name,
            both,
            "" if change is None else f"{100 * change[0]:+.1f} .. {100 * change[1]:+.1f}",
            f"{100 * row['coverage']:.0f} %",
            f"{row['distance']:.2f}",
            f"{row['seconds_per_picture']:.2f}",
        )
    Console().print(shown)
    tell(held, "promises")


if __name__ == "__main__":
    main()
