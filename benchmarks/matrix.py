"""The matrix: every precision that a target runs, resident and streamed, on this machine.

    python benchmarks/matrix.py
    python benchmarks/matrix.py --target litert-cpu --precision int8 --iterations 50

Records are appended to build/bench/records.jsonl, one a combination; they are never removed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from stages import (
    RESIDENCIES,
    ROOT,
    Stages,
    build_harness,
    command,
    export,
    guarded,
    inside,
    measure,
    print_table,
    row,
    say,
    versions,
    write_summary,
)

TARGETS = ("litert-cpu", "executorch-xnnpack")
PRECISIONS = ("fp32", "int8", "int4", "int4g32", "int2")


def main() -> int:
    """Run the matrix."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", default="critter", help="name of a model, or a checkpoint")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "bench")
    parser.add_argument("--target", action="append", help="repeatable; by default both")
    parser.add_argument("--precision", action="append", help="repeatable; by default all")
    parser.add_argument("--iterations", type=int, default=30, help="timed, at least")
    parser.add_argument("--min-seconds", type=float, default=10.0, help="timed, at least")
    arguments = parser.parse_args()

    from handheld import models
    from handheld.devices.host import HostDevice
    from handheld_export import targets

    checkpoint = models.checkpoint(arguments.model)
    stages = Stages()
    build_harness(stages)
    device = HostDevice()
    records = arguments.output / "records.jsonl"
    rows: list[dict[str, Any]] = []
    facts: dict[str, Any] = {}
    for precision in arguments.precision or PRECISIONS:
        for target in arguments.target or TARGETS:
            if precision not in targets.find(target).precisions:
                say(f"         {target} does not run {precision}")
                continue
            bundle = export(checkpoint, target, precision, arguments.output / "bundles", stages)
            for residency in RESIDENCIES:
                record = measure(
                    bundle,
                    device,
                    residency,
                    records,
                    stages,
                    warmup=3,
                    iterations=arguments.iterations,
                    min_seconds=arguments.min_seconds,
                )
                rows.append(row(record, bundle))
                facts = record.device.model_dump(mode="json")
    summary = arguments.output / "summary.json"
    write_summary(
        summary,
        {
            "rows": rows,
            "command": list(command()),
            "versions": versions(),
            "device": facts,
            "model": arguments.model,
            "records": inside(records),
            "stages": stages.done,
            "seconds": round(stages.seconds, 1),
        },
    )
    say("")
    print_table(rows, f"{arguments.model} on this machine (one picture; MB = 10^6 bytes)")
    say(f"figures: {inside(summary)}   records: {inside(records)}")
    return 0 if all(r["status"] == "ok" for r in rows) else 1


if __name__ == "__main__":
    sys.exit(guarded(main))
