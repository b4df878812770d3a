"""Whether memory budgets are kept, and what they cost in time.

    python benchmarks/memory_budgets.py BUNDLE --budget 300 --budget 600 --budget 1000

Runs a bundle resident, streamed and within each budget, in MB. A budget that is too small is said
to be, with the least that would do; one that is exceeded, by the run that packs or a later one,
fails.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from handheld.bundle import Bundle
from handheld.devices.host import HostDevice
from handheld.errors import UsageError
from handheld.memory_plan import plan_bundle
from handheld.records import RunRecord
from stages import (
    RESIDENCIES,
    ROOT,
    Stages,
    build_harness,
    command,
    guarded,
    measure,
    say,
    versions,
    write_summary,
)


def main() -> int:
    """Run, compare with what was planned."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--budget", type=float, action="append", required=True, metavar="MB")
    parser.add_argument("--size", help="WIDTHxHEIGHT; by default the reference's")
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "memory_budgets")
    arguments = parser.parse_args()
    folder: Path = arguments.output
    folder.mkdir(parents=True, exist_ok=True)
    stages = Stages()
    build_harness(stages)
    bundle = Bundle.open(arguments.bundle)
    name, _ = bundle.size(arguments.size)
    options = {"size": name, "iterations": arguments.iterations}
    records = folder / "records.jsonl"
    rows: list[dict[str, Any]] = []
    for residency in RESIDENCIES:
        record = measure(bundle, HostDevice(), residency, records, stages, **options)
        median = record.summary()["median_ms"]
        rows.append({"mode": residency, "median_ms": median, **_peak(record)})
    resident_ms = rows[0]["median_ms"]
    kept = True
    for megabytes in arguments.budget:
        budget = round(megabytes * 1e6)
        try:
            plan = plan_bundle(bundle.manifest, name, budget)
        except UsageError as error:
            say(str(error))
            rows.append({"mode": f"within {megabytes:.0f} MB", "refused": error.message})
            continue
        record = measure(
            bundle, HostDevice(), "stream", records, stages, memory_budget=budget, **options
        )
        median = record.summary()["median_ms"]
        row = {
            "mode": record.settings.mode,
            "median_ms": median,
            "over_resident": None if not median or not resident_ms else median / resident_ms,
            "planned_bytes": plan.peak_bytes,
            "budget_bytes": budget,
            **_peak(record),
        }
        rows.append(row)
        good = record.status == "ok" and 0 < row["peak_rss"] <= budget
        kept = kept and good
        times = "" if row["over_resident"] is None else f", {row['over_resident']:.2f}x the time"
        say(
            f"{row['mode']}: {row['peak_rss'] / 1e6:.1f} MB at peak, {plan.peak_bytes / 1e6:.1f} "
            f"planned{times}: {'kept' if good else 'EXCEEDED OR FAILED'}"
        )
    write_summary(
        folder / "summary.json",
        {"command": list(command()), "versions": versions(), "rows": rows},
    )
    return 0 if kept else 1


def _peak(record: RunRecord) -> dict[str, int]:
    """Return the highest mark of all processes, the one that packs among them."""
    marks = [m.peak_rss for p in record.passes for m in p.memory if m.peak_rss is not None]
    return {"peak_rss": max(marks, default=0)}


if __name__ == "__main__":
    sys.exit(guarded(main))
