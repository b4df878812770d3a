"""Every target's numerics: models exported in every precision, then verified, in one table.

    python benchmarks/numerics.py                       # critter and its three students
    python benchmarks/numerics.py --model critter-stack1 --target litert-cpu --precision int8
    python benchmarks/numerics.py --segment             # one full-size segment in the evaluator

Writes build/numerics: the bundles, a report beside each, and of all of them numerics.md,
numerics.json and numerics.html with pictures. A target whose tools are missing is named and passed
over. Bundles of the same checkpoint that are there already are taken as they are, and so are their
reports: what was stopped goes on, and calls for some targets add up. Exits with 1 if a gate of this
call fails, or the full-size segment takes longer than a minute.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from handheld.bundle import MANIFEST, Bundle
from handheld.errors import HandheldError, TargetError
from handheld.files import write_file
from handheld.manifest import Verification
from handheld.models import checkpoint as find_model
from handheld.numerics_gates import Gate
from handheld.precision import PRECISIONS
from handheld.program import Ports, TensorSpec
from handheld_export import measure, targets, verify_page
from handheld_export.checkpoint import Checkpoint
from handheld_export.cli import quiet
from handheld_export.export import Options, export
from handheld_export.quantization import round_to_nearest
from handheld_export.targets.base import SegmentInput
from handheld_export.verify import Report, Row, verify

MODELS = ("critter", "critter-stack1", "critter-stack2", "critter-stack3")
STUDENT_PRECISIONS = ("fp32", "fp16", "int8", "16a8w")
"""Roundings of a student's other layers: its own codes are the rest."""
SECONDS = 60.0
REPORT = ".report.npz"
"""Ending of what was found of a bundle."""


def bundles(
    model: str, wanted: list[str], precision: str | None, folder: Path
) -> Iterator[tuple[Path, HandheldError | None]]:
    """Export a model for every target that is here; give what is to be verified, or what failed."""
    source = Checkpoint(find_model(model))
    student = bool(source.unet.quantized)
    for name in wanted:
        try:
            levels = targets.find(name).precisions
        except TargetError as error:
            print(f"skipped {error.message}: {error.remedy}", flush=True)
            continue
        for level in levels:
            if precision is not None and level != precision:
                continue
            if precision is None and student and level not in STUDENT_PRECISIONS:
                continue
            path = folder / f"{model}-{name}-{level}".replace(":", "-")
            if _stale(path, source):
                began = time.perf_counter()
                try:
                    export(source, Options(target=name, precision=level), path)
                except HandheldError as error:
                    yield path, error
                    continue
                print(f"{path.name}: {time.perf_counter() - began:.0f} s", flush=True)
            yield path, None


def _stale(path: Path, source: Checkpoint) -> bool:
    """Tell whether a bundle is not there, or was made of another checkpoint of that name."""
    if not (path / MANIFEST).exists():
        return True
    if checkpoint_of(path) == source.sha256:
        return False
    shutil.rmtree(path)
    return True


def checkpoint_of(path: Path) -> str | None:
    """Return the hash of the checkpoint that a bundle was made of, None if it does not open."""
    try:
        return Bundle.open(path, verify_hashes=False).manifest.model.checkpoint_sha256
    except HandheldError:
        return None


@cache
def present(model: str) -> str | None:
    """Return the hash of a model's checkpoint as it is now, None where there is none."""
    try:
        return Checkpoint(find_model(model)).sha256
    except HandheldError:
        return None


def segment(folder: Path) -> dict[str, Any]:
    """Convert one transformer of SDXL's size for Core ML, and time the evaluator.

    1280 channels, two layers, 256 tokens: that of a picture of 512 pixels.
    """
    from diffusers.models.transformers.transformer_2d import Transformer2DModel

    class Segment(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = Transformer2DModel(
                num_attention_heads=20, attention_head_dim=64, in_channels=1280, num_layers=2,
                norm_num_groups=32, cross_attention_dim=2048, use_linear_projection=True,
            )  # fmt: skip

        def forward(self, x: torch.Tensor, context: torch.Tensor) -> tuple[torch.Tensor, ...]:
            y = self.model(x.permute(0, 3, 1, 2), encoder_hidden_states=context).sample
            return (y.permute(0, 2, 3, 1),)

    torch.manual_seed(0)
    module = Segment().eval()
    for layer in module.modules():
        if isinstance(layer, torch.nn.Linear):
            weight = round_to_nearest(layer.weight.detach().numpy(), "int4")
            layer.weight = torch.nn.Parameter(torch.from_numpy(weight.dequantize()), False)
            layer.quantized = weight  # type: ignore[assignment]
    shapes = {"x": (1, 16, 16, 1280), "context": (1, 77, 2048)}
    ports = Ports(
        inputs={n: TensorSpec(shape=s) for n, s in shapes.items()},
        outputs={"y": TensorSpec(shape=shapes["x"])},
    )
    examples = [torch.randn(s) for s in shapes.values()]
    target = targets.find("coreml")
    began = time.perf_counter()
    with torch.no_grad():
        lowered = target.lower(
            SegmentInput("segment", module, ports, examples), folder / "segment.mlpackage"
        )
        converted = time.perf_counter() - began
        expected = module(*examples)[0].numpy()
    began = time.perf_counter()
    (result,) = target.load(lowered.path, ports)(*(x.numpy() for x in examples))
    return {
        "weights": sum(p.numel() for p in module.parameters()),
        "bytes": sum(p.stat().st_size for p in (lowered.path, *lowered.parts)),
        "convert_s": round(converted, 1),
        "evaluate_s": round(time.perf_counter() - began, 1),
        "snr_db": round(measure.snr_db(expected, result), 1),
    }


def report_of(path: Path, noises: int) -> Report:
    """Verify a bundle, or read what was found when that was done before."""
    kept = path.with_name(path.name + REPORT)
    if _current(kept):
        known = read(kept)
        if len(known.draws) == noises:
            return known
    report = verify(Bundle.open(path), noises=noises)
    write(report, kept)
    return report


def _current(report: Path) -> bool:
    bundle = _bundle(report) / MANIFEST
    both = report.exists() and bundle.exists()
    return both and report.stat().st_mtime > bundle.stat().st_mtime


def _bundle(report: Path) -> Path:
    return report.with_name(report.name.removesuffix(REPORT))


def write(report: Report, path: Path) -> None:
    """Keep a report, pictures included."""
    told = json.dumps(report.as_dict()).encode()
    arrays: dict[str, Any] = {f"picture {k}": v for k, v in report.pictures.items()}
    made = io.BytesIO()
    np.savez_compressed(made, report=np.frombuffer(told, np.uint8), **arrays)
    write_file(path, made.getvalue())


def read(path: Path) -> Report:
    """Read what :func:`write` kept."""
    with np.load(path, allow_pickle=False) as file:
        told = json.loads(file["report"].tobytes())
        pictures = {
            name.removeprefix("picture "): file[name] for name in file.files if name != "report"
        }
    whole = told["end_to_end"]
    own = ("bundle", "model", "target", "precision", "size", "reference")
    return Report(
        **{name: told[name] for name in own},
        rows=tuple(_row(row) for row in told["artifacts"]),
        end_to_end=Verification(**{k: v for k, v in whole.items() if k != "text"}),
        draws=tuple(Verification(**draw) for draw in told["noises"]),
        text=whole["text"],
        gate=_gate(told["gate"]),
        problems=tuple(told["problems"]),
        notes=tuple(told["notes"]),
        pictures=pictures,
    )


def _row(told: dict[str, Any]) -> Row:
    names = {f.name for f in fields(Row)}
    return Row(**{k: v for k, v in told.items() if k in names} | {"gate": _gate(told["gate"])})


def _gate(told: dict[str, Any]) -> Gate:
    return Gate(**told | {"text": tuple(told["text"])})


@cache
def _once(line: str) -> None:
    """Print a line the first time only: the table is written after every bundle."""
    print(line, flush=True)


def gather(folder: Path) -> list[Report]:
    """Return the reports of all bundles in a folder, by model, target and precision.

    Those of models that were trained again, or are gone, are named and left out.
    """
    reports = []
    for path in filter(_current, sorted(folder.glob(f"*{REPORT}"))):
        report = read(path)
        made_of = checkpoint_of(_bundle(path))
        if made_of is not None and made_of == present(report.model):
            reports.append(report)
        else:
            _once(f"left out {report.bundle}: not of {report.model} as it is now")
    order = {name: i for i, name in enumerate((*MODELS, *targets.names(), *PRECISIONS))}

    def place(report: Report) -> list[int]:
        names = (report.model, report.target, report.precision)
        return [order.get(name, len(order)) for name in names]

    return sorted(reports, key=place)


def summarize(folder: Path) -> None:
    """Write all reports of a folder as Markdown, JSON and a page."""
    reports = gather(folder)
    for name, text in (
        ("numerics.md", markdown(reports) + "\n"),
        ("numerics.json", json.dumps([r.as_dict() for r in reports], indent=2)),
        ("numerics.html", verify_page.render(reports)),
    ):
        write_file(folder / name, text.encode())


def failures(report: Report) -> list[str]:
    """Say what a bundle fails."""
    found = [r.artifact for r in report.rows if not r.passed]
    return found + ([] if report.whole_passed else ["end to end"]) + list(report.problems)


def markdown(reports: list[Report]) -> str:
    """Return the reports as the table of docs/numerics.md."""
    titles = [*verify_page.COLUMNS[:-1], "gates"]
    out = [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    for report in reports:
        (cells, _), *_ = verify_page.lines(report, artifacts=False)
        out.append(f"| {' | '.join(cells)} | {'; '.join(failures(report)) or 'ok'} |")
    return "\n".join(out)


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", action="append", help=f"by default {', '.join(MODELS)}")
    parser.add_argument("--target", action="append", help="by default all, of one SoC each")
    parser.add_argument("--all-socs", action="store_true", help="all SoCs that a target knows")
    parser.add_argument("--precision", help="by default all")
    parser.add_argument("--noises", type=int, default=3, help="pictures of each; by default 3")
    parser.add_argument("--segment", action="store_true", help="only the full-size segment")
    parser.add_argument("--output", type=Path, default=Path("build/numerics"))
    arguments = parser.parse_args()
    quiet()
    folder = arguments.output
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.segment:
        figures = segment(folder)
        print(json.dumps(figures, indent=2))
        (folder / "segment.json").write_text(json.dumps(figures, indent=2))
        sys.exit(figures["evaluate_s"] > SECONDS)
    reports: list[Report] = []
    failed = []
    wanted = arguments.target or (targets.names() if arguments.all_socs else targets.one_each())
    for model in arguments.model or MODELS:
        for path, error in bundles(model, wanted, arguments.precision, folder):
            try:
                if error is not None:
                    raise error
                report = report_of(path, arguments.noises)
            except HandheldError as e:
                failed.append(f"{path.name}: {e}")
                print(failed[-1], flush=True)
                continue
            reports.append(report)
            print(markdown([report]).rsplit("\n", 1)[-1], flush=True)
            failed += [f"{path.name}: {what}" for what in failures(report)]
            summarize(folder)
    print(markdown(reports))
    if failed:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    main()
