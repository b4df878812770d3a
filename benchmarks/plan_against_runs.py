"""What `handheld plan` says of models, against their bundles and runs.

    python benchmarks/plan_against_runs.py
    python benchmarks/plan_against_runs.py critter-stack1 --size 128x128 --size 192x192
    python benchmarks/plan_against_runs.py build/full_size/checkpoints/stack1-tiny=BUNDLE

A model is a checkpoint's folder or name, critter's three students if none is given, and is exported
at all sizes as one bundle; after "=" stands a bundle that was made of it before. Bundles are run at
each of their sizes. The plan must be within 2 % of the files and within 10 % of the peaks.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from handheld import models, planning, plans
from handheld.bundle import Bundle
from handheld.devices.host import HostDevice
from handheld.errors import UsageError
from handheld.protocol import Residency
from stages import (
    RESIDENCIES,
    ROOT,
    Stages,
    build_harness,
    command,
    export,
    guarded,
    measure,
    say,
    versions,
    write_summary,
)

WITHIN = 0.02


def planned(checkpoint: Path, bundle: Bundle) -> dict[str, dict[str, Any]]:
    """Return what is planned of a bundle, by size, from its checkpoint's configurations alone.

    Raises
    ------
    UsageError
        If the bundle's target is not planned, or its export was told how to draw the decoder.
    """
    target = bundle.manifest.target
    if target not in planning.PLANNED:
        raise UsageError(
            f"is for {target}, which is not planned",
            path=bundle.path,
            remedy=f"export for {' or '.join(planning.PLANNED)}",
        )
    if bundle.manifest.provenance.options.get("decoder_bands", "auto") != "auto":
        raise UsageError(
            "was exported with --decoder-bands, which is not planned",
            path=bundle.path,
            remedy="export without it",
        )
    shape = plans.at_precision(planning.architecture(str(checkpoint)), bundle.manifest.precision)
    return {
        name: plans.row(plans.at_size(shape, size.width, size.height), target)
        for name, size in bundle.manifest.sizes.items()
    }


def alone(bundle: Bundle, size: str) -> int:
    """Return the bytes of the artifacts that one size calls."""
    files = {f.path: f.bytes for a in bundle.manifest.called(size) for f in a.files}
    return sum(files.values())


def given(text: str) -> tuple[Path, Path | None]:
    """Read a model: a checkpoint, and a bundle if one is named."""
    checkpoint, _, bundle = text.partition("=")
    return models.checkpoint(checkpoint), Path(bundle) if bundle else None


def opened(checkpoint: Path, path: Path) -> Bundle:
    """Open a bundle, and look whether it is of the checkpoint.

    Raises
    ------
    UsageError
        If it is of another.
    """
    bundle = Bundle.open(path)
    settings = checkpoint / "handheld.json"
    told = json.loads(settings.read_text()) if settings.is_file() else {}
    name, wanted = bundle.manifest.model.id, told.get("name") or checkpoint.stem
    if name != wanted:
        raise UsageError(
            f"is of '{name}', not of '{wanted}'",
            path=path,
            remedy="name the checkpoint that it was exported from",
        )
    return bundle


def compare(
    checkpoint: Path,
    bundle: Bundle,
    residencies: Sequence[Residency],
    folder: Path,
    min_seconds: float,
    stages: Stages,
) -> list[dict[str, Any]]:
    """Run a bundle at each of its sizes; return rows of planned and seen."""
    rows = []
    for size, plan in planned(checkpoint, bundle).items():
        promised, file = plan["unet_bytes"] + plan["decoder_bytes"], alone(bundle, size)
        row: dict[str, Any] = {
            "model": checkpoint.name,
            "target": bundle.manifest.target,
            "size": size,
            "planned": promised,
            "file": file,
            "off": promised / file - 1,
            "peaks": {},
        }
        where = f"{checkpoint.name} {bundle.manifest.target} {size}"
        say(
            f"{where}: files {promised / 1e6:.2f} MB planned, {file / 1e6:.2f} MB made, "
            f"{row['off']:+.2%}"
        )
        for residency in residencies:
            record = measure(
                bundle, HostDevice(), residency, folder / "records.jsonl", stages,
                size=size, min_seconds=min_seconds,
            )  # fmt: skip
            expected = plan["peak_bytes"][residency]
            peak = record.memory.peak_rss if record.memory else None
            row["peaks"][residency] = {"planned": expected, "seen": peak}
            seen = "unknown" if peak is None else f"{peak / 1e6:.1f} MB, {expected / peak - 1:+.1%}"
            say(f"{where}, {residency}: {expected / 1e6:.1f} MB planned, at peak {seen}")
        rows.append(row)
    return rows


def near(row: dict[str, Any]) -> bool:
    """Tell whether a row's plan is as near to what was seen as it must be."""
    return abs(row["off"]) <= WITHIN and all(
        p["seen"] is not None and abs(p["planned"] / p["seen"] - 1) <= plans.OFF
        for p in row["peaks"].values()
    )


def main() -> int:
    """Plan, export, run, compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("models", nargs="*", help="CHECKPOINT or CHECKPOINT=BUNDLE")
    parser.add_argument(
        "--target", choices=planning.PLANNED, default="litert-cpu", help="of what is exported here"
    )
    parser.add_argument(
        "--precision", default="int8", help="of layers without codes in what is exported here"
    )
    parser.add_argument(
        "--size", action="append", help="WIDTHxHEIGHT; all are in one bundle; default its own"
    )
    parser.add_argument("--residency", action="append", choices=RESIDENCIES, help="default all")
    parser.add_argument("--min-seconds", type=float, default=3.0, help="of timed runs in each")
    parser.add_argument(
        "--output",
        type=Path,
        default=ROOT / "build" / "plan_against_runs",
        help="folder for bundles, records and a summary",
    )
    arguments = parser.parse_args()
    folder: Path = arguments.output
    folder.mkdir(parents=True, exist_ok=True)
    stages = Stages()
    named = arguments.models or [f"critter-stack{i}" for i in (1, 2, 3)]
    pairs = [given(text) for text in named]
    build_harness(stages)
    rows: list[dict[str, Any]] = []
    for checkpoint, path in pairs:
        bundle = (
            opened(checkpoint, path)
            if path
            else export(
                checkpoint,
                arguments.target,
                arguments.precision,
                folder / "bundles",
                stages,
                sizes=arguments.size or (),
            )
        )
        residencies = arguments.residency or RESIDENCIES
        rows += compare(checkpoint, bundle, residencies, folder, arguments.min_seconds, stages)
        write_summary(
            folder / "summary.json",
            {"command": list(command()), "versions": versions(), "rows": rows},
        )
    return 0 if all(map(near, rows)) else 1


if __name__ == "__main__":
    sys.exit(guarded(main))
