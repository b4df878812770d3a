"""Whether a benchmark on this machine can be believed: again and again, idle and loaded.

    python benchmarks/repeatability.py build/demo/bundles/critter-stack1-litert-cpu-int8

Runs a bundle five times as `handheld bench` does and compares the medians: on an idle machine they
lie within 5 % of each other, as MLPerf Mobile asks of its runs, and none is marked noisy. Then does
the same while other processes keep all cores busy: every one of these records must be marked noisy.
One core is left to the system: a picture waits for its slowest thread.
Writes the records and summary.json.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from handheld import bench, records
from handheld.bundle import Bundle
from handheld.devices.host import HostDevice
from handheld.errors import GateError
from handheld.records import RunRecord
from stages import ROOT, Stages, command, guarded, say, versions, write_summary

WITHIN = 0.05


@contextlib.contextmanager
def load(processes: int) -> Iterator[None]:
    """Keep cores busy."""
    with contextlib.ExitStack() as held:
        for _ in range(processes):
            words = [sys.executable, "-S", "-c", "while True: pass"]
            held.callback(subprocess.Popen(words).kill)
        yield


def row(record: RunRecord) -> dict[str, Any]:
    """Return what the summary says of a run."""
    figures, latency = record.summary(), record.latency()
    return {
        "id": record.id,
        "median_ms": figures["median_ms"],
        "spread": figures["spread"],
        "timed": figures["timed"],
        "others": latency.others if latency else None,
        "noisy": list(record.noisy),
    }


def main() -> int:
    """Run, compare, and write what was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--tries", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=45.0, help="of timed runs a try")
    cores = os.cpu_count() or 1
    parser.add_argument(
        "--threads", type=int, default=max(1, cores - 1), help="by default all cores but one"
    )
    parser.add_argument("--loaded-seconds", type=float, default=8.0)
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "repeatability")
    arguments = parser.parse_args()
    bundle, device, stages = Bundle.open(arguments.bundle), HostDevice(), Stages()
    file = arguments.output / "records.jsonl"

    def tries(seconds: float) -> list[dict[str, Any]]:
        options = bench.Options(
            threads=arguments.threads, iterations=20, min_seconds=seconds, first_ever=False
        )
        found = []
        for _ in range(arguments.tries):
            record = bench.run(
                bundle, device, options, command=command(),
                keep=lambda r: records.append(file, r),
            )  # fmt: skip
            if record.status != "ok":
                raise GateError(f"a run failed: {record.error}", path=file)
            found.append(row(record))
        return found

    with stages(f"{arguments.tries} tries"):
        idle = tries(arguments.seconds)
    with stages(f"{arguments.tries} tries, all cores busy"), load(cores):
        loaded = tries(arguments.loaded_seconds)
    medians = [r["median_ms"] for r in idle]
    apart = max(medians) / min(medians) - 1
    marked = sum(bool(r["noisy"]) for r in loaded)
    calm = sum(not r["noisy"] for r in idle)
    say(f"medians: {', '.join(f'{m:.2f}' for m in medians)} ms, {apart:.1%} apart")
    say(f"not marked noisy: {calm} of {len(idle)}; loaded, marked noisy: {marked} of {len(loaded)}")
    write_summary(
        arguments.output / "summary.json",
        {
            "command": list(command()),
            "versions": versions(),
            "device": device.facts().model_dump(mode="json"),
            "bundle": bundle.sha256,
            "threads": arguments.threads,
            "medians_apart": round(apart, 4),
            "idle": idle,
            "loaded": loaded,
        },
    )
    return 0 if apart <= WITHIN and calm == len(idle) and marked == len(loaded) else 1


if __name__ == "__main__":
    sys.exit(guarded(main))
