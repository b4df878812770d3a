"""What `handheld plan` says of critter's students, against their bundles and runs.

    python benchmarks/plan_against_runs.py

Exports each stack for litert-cpu at its own size and runs it resident and streamed. The plan must
be within 2 % of the files and within 10 % of the peaks.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from handheld import planning, plans, recipes
from handheld.bundle import Bundle
from handheld.devices.host import HostDevice
from handheld.errors import UsageError
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

TARGET = "litert-cpu"
WITHIN = 0.02


def main() -> int:
    """Plan, export, run, compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("bundles", nargs="*", type=Path, help="made before, in place of exporting")
    parser.add_argument("--stack", action="append", choices=recipes.STACKS)
    parser.add_argument("--min-seconds", type=float, default=3.0)
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "plan_against_runs")
    arguments = parser.parse_args()
    folder: Path = arguments.output
    folder.mkdir(parents=True, exist_ok=True)
    stages = Stages()
    build_harness(stages)
    base = planning.architecture(str(ROOT / "models" / "critter"))
    made = {b.manifest.model.id: b for b in map(Bundle.open, arguments.bundles)}
    if wrong := [b for b in made.values() if b.manifest.target != TARGET]:
        raise UsageError(f"is not for {TARGET}", path=wrong[0].path, remedy="name another bundle")
    rows: list[dict[str, Any]] = []
    for stack in arguments.stack or recipes.STACKS:
        planned = plans.row(recipes.shape_after(recipes.builtin(stack, "critter"), base), TARGET)
        student = ROOT / "models" / f"critter-{stack}"
        bundle = made.get(student.name) or export(
            student, TARGET, "int8", folder / "bundles", stages
        )
        size = sum(a.nbytes for a in bundle.manifest.artifacts)
        promised = planned["unet_bytes"] + planned["decoder_bytes"]
        row: dict[str, Any] = {
            "stack": stack,
            "planned": promised,
            "file": size,
            "off": promised / size - 1,
        }
        for residency in RESIDENCIES:
            record = measure(
                bundle, HostDevice(), residency, folder / "records.jsonl", stages,
                min_seconds=arguments.min_seconds,
            )  # fmt: skip
            row[f"{residency}_peak"] = record.summary()["peak_rss"]
            row[f"{residency}_planned"] = planned["peak_bytes"][residency]
        rows.append(row)
        say(
            f"{stack}: files {promised / 1e6:.2f} MB planned, {size / 1e6:.2f} MB made, "
            f"{row['off']:+.2%}"
        )
        for residency in RESIDENCIES:
            expected, peak = row[f"{residency}_planned"], row[f"{residency}_peak"]
            seen = "unknown" if peak is None else f"{peak / 1e6:.1f} MB, {expected / peak - 1:+.1%}"
            say(f"{stack}, {residency}: {expected / 1e6:.1f} MB planned, at peak {seen}")
    write_summary(
        folder / "summary.json",
        {"command": list(command()), "versions": versions(), "rows": rows},
    )
    right = all(
        abs(r["off"]) <= WITHIN
        and all(_near(r[f"{k}_planned"], r[f"{k}_peak"]) for k in RESIDENCIES)
        for r in rows
    )
    return 0 if right else 1


def _near(planned: int, peak: int | None) -> bool:
    return peak is not None and abs(planned / peak - 1) <= plans.OFF


if __name__ == "__main__":
    sys.exit(guarded(main))
