"""What the gate on run records sees in this machine's noise: planted changes, and none.

    python benchmarks/gate.py build/bundles/critter-stack1-litert-cpu
    python benchmarks/gate.py BUNDLE --records build/gate/records.jsonl

Runs the bundle again and again, unchanged. Then sets of these runs are compared with the package's
gates: pairs of sets as they are, which must pass, and pairs whose new set has all times 10 % longer
or all memory 5 % larger, which must fail. With --records, runs from before are used.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path
from typing import Any

from handheld import bench, comparison, records
from handheld.bundle import Bundle
from handheld.records import MemoryFigures, RunRecord
from stages import ROOT, Stages, command, guarded, say, versions, write_summary

METRICS = ("median_ms", "min_ms", "peak_rss")


def planted(record: RunRecord, time: float, memory: float) -> RunRecord:
    """Return a record with all times and the peak of memory multiplied."""
    passes = []
    for one in record.passes:
        iterations = tuple(
            i.model_copy(update={"total_ms": i.total_ms * time}) for i in one.iterations
        )
        passes.append(one.model_copy(update={"iterations": iterations}))
    figures = record.memory
    if figures is not None and figures.peak_rss is not None:
        values = {**figures.model_dump(), "peak_rss": int(figures.peak_rss * memory)}
        figures = MemoryFigures.model_validate(values)
    return record.model_copy(update={"passes": tuple(passes), "memory": figures})


def trials(
    found: list[RunRecord], size: int, count: int, time: float, memory: float
) -> list[dict[str, Any]]:
    """Compare pairs of sets that share no run; each takes turns through the runs."""
    rng = random.Random(1)
    gates = comparison.read_gates()
    rows: list[dict[str, Any]] = []
    for _ in range(count):
        drawn = rng.sample(found, 2 * size)
        new = [planted(r, time, memory) for r in drawn[size:]]
        result = comparison.compare(drawn[:size], new, gates)
        rows.append(
            {
                r.gate.metric: {
                    "verdict": r.verdict,
                    "ratio": r.ratio,
                    "low": r.low,
                    "high": r.high,
                }
                for r in result.rows
            }
        )
    return rows


def main() -> int:
    """Collect runs, compare sets of them, and write what the gates said."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--runs", type=int, default=80)
    parser.add_argument("--set", type=int, default=40, help="runs on each side")
    parser.add_argument("--iterations", type=int, default=150)
    parser.add_argument("--records", type=Path)
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "gate")
    arguments = parser.parse_args()
    from handheld.devices.host import HostDevice

    file = arguments.records or arguments.output / "records.jsonl"
    stages = Stages()
    if arguments.records is None:
        bundle, device = Bundle.open(arguments.bundle), HostDevice()
        have = len(records.read(file)) if file.exists() else 0
        with stages(f"running {bundle.path.name} {arguments.runs} times"):
            for _ in range(arguments.runs - have):
                bench.run(
                    bundle,
                    device,
                    bench.Options(iterations=arguments.iterations, first_ever=False),
                    command=command(),
                    keep=lambda r: records.append(file, r),
                )
    found = [r for r in records.read(file) if r.status == "ok"]
    cases = {
        "unchanged": trials(found, arguments.set, 20, 1.0, 1.0),
        "10 % slower": trials(found, arguments.set, 20, 1.1, 1.0),
        "5 % more memory": trials(found, arguments.set, 20, 1.0, 1.05),
    }
    failed: dict[str, dict[str, int]] = {}
    for name, rows in cases.items():
        failed[name] = {
            metric: sum(r[metric]["verdict"] == "fail" for r in rows) for metric in METRICS
        }
        say(f"{name}: of 20 comparisons failed {failed[name]}")
    medians = sorted(float(v) for r in found if isinstance(v := r.summary()["median_ms"], float))
    spread = (medians[int(0.95 * len(medians))] - medians[int(0.05 * len(medians))]) / medians[
        len(medians) // 2
    ]
    say(f"{len(found)} runs; their medians span {spread:.0%} from p5 to p95")
    write_summary(
        arguments.output / "summary.json",
        {
            "command": list(command()),
            "versions": versions(),
            "device": found[0].device.model_dump(mode="json"),
            "runs": len(found),
            "runs_per_side": arguments.set,
            "spread_of_medians": round(spread, 4),
            "failed_of_20": failed,
            "cases": cases,
        },
    )
    right = (
        not any(failed["unchanged"].values())
        and failed["10 % slower"]["min_ms"] == 20
        and failed["5 % more memory"]["peak_rss"] == 20
    )
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(guarded(main))
