"""What the gate on run records sees in this machine's noise: planted changes, and none.

    python benchmarks/gate.py build/bundles/critter-stack1-litert-cpu
    python benchmarks/gate.py BUNDLE --records build/gate/records.jsonl

Runs the bundle twice a round, as `handheld bench BASE NEW --rounds N` does, unchanged. Then, again
and again, some of the rounds are drawn, in each of them one run is called the base and the other
new, and both are compared with the package's gates: as they are, which must pass, and with all
times of the new runs 10 % longer or all memory 5 % larger, which must fail. With --records, runs
from before are used.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path
from typing import Any

from handheld import bench, comparison, records
from handheld.bundle import Bundle
from handheld.errors import UsageError
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
    found: list[list[RunRecord]], size: int, count: int, time: float, memory: float
) -> list[dict[str, Any]]:
    """Compare the two sides of rounds drawn at random, sides drawn at random too."""
    rng = random.Random(1)
    gates = comparison.read_gates()
    rows: list[dict[str, Any]] = []
    for _ in range(count):
        drawn = [rng.sample(pair, 2) for pair in rng.sample(found, size)]
        new = [planted(pair[1], time, memory) for pair in drawn]
        result = comparison.compare([pair[0] for pair in drawn], new, gates)
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


def rounds(file: Path, bundle: Bundle) -> list[list[RunRecord]]:
    """Return a bundle's runs of every whole round in a file."""
    found: dict[records.Round, list[RunRecord]] = {}
    for record in records.read(file):
        ours = record.bundle.sha256 == bundle.sha256
        if ours and record.status == "ok" and record.round is not None:
            found.setdefault(record.round, []).append(record)
    return [pair for pair in found.values() if len(pair) == 2]


def main() -> int:
    """Collect runs, compare sets of them, and write what the gates said."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--set", type=int, default=30, help="rounds in a comparison")
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--records", type=Path)
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "gate")
    arguments = parser.parse_args()
    from handheld.devices.host import HostDevice

    file = arguments.records or arguments.output / "records.jsonl"
    stages = Stages()
    bundle = Bundle.open(arguments.bundle)
    if arguments.records is None:
        device = HostDevice()
        have = len(rounds(file, bundle)) if file.exists() else 0
        series = records.new_id()
        with stages(f"running {bundle.path.name} twice in each of {arguments.rounds} rounds"):
            for index in range(2 * (arguments.rounds - have)):
                bench.run(
                    bundle,
                    device,
                    bench.Options(iterations=arguments.iterations, first_ever=False),
                    command=command(),
                    turn=records.Round(series=series, index=index // 2),
                    keep=lambda r: records.append(file, r),
                )
    pairs = rounds(file, bundle)
    if len(pairs) < arguments.set:
        raise UsageError(f"holds {len(pairs)} rounds of two runs", path=file, remedy="run more")
    found = [r for pair in pairs for r in pair]
    cases = {
        "unchanged": trials(pairs, arguments.set, 20, 1.0, 1.0),
        "10 % slower": trials(pairs, arguments.set, 20, 1.1, 1.0),
        "5 % more memory": trials(pairs, arguments.set, 20, 1.0, 1.05),
    }
    failed: dict[str, dict[str, int]] = {}
    for name, rows in cases.items():
        failed[name] = {
            metric: sum(r[metric]["verdict"] == "fail" for r in rows) for metric in METRICS
        }
        failed[name]["any"] = sum(any(v["verdict"] == "fail" for v in r.values()) for r in rows)
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
            "rounds_per_comparison": arguments.set,
            "spread_of_medians": round(spread, 4),
            "failed_of_20": failed,
            "cases": cases,
        },
    )
    right = (
        not failed["unchanged"]["any"]
        and failed["10 % slower"]["any"] == 20
        and failed["5 % more memory"]["any"] == 20
    )
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(guarded(main))
