"""Run a matrix of bundles on a fleet of phones, and go on where it was stopped.

The matrix is a TOML file (docs/benchmark-protocol.md has all fields):

    devices = ["android"]
    adb_servers = ["tcp:lab-1:5037", "tcp:lab-2:5037"]
    [options]
    precision = 0.02
    [[bundles]]
    path = "build/critter"
    residency = ["resident", "stream"]

    python benchmarks/phones.py fleet.toml --records runs/fleet.jsonl
    python benchmarks/phones.py fleet.toml --records runs/fleet.jsonl --dry-run

Every phone has a thread of its own. Records are appended as runs end; running the same again
runs what is missing. Exit code 1 if anything is missing or failed in the end.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import threading
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from handheld import fleet
from handheld.errors import HandheldError


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("matrix", type=Path)
    parser.add_argument("--records", type=Path, default=Path("build/phones.jsonl"))
    parser.add_argument("--dry-run", action="store_true", help="say what would be run")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    arguments = parser.parse_args()
    start, lock = time.monotonic(), threading.Lock()

    def say(device: str, text: str) -> None:
        with lock:
            print(f"{time.monotonic() - start:7.1f} s  {device:18} {text}", file=sys.stderr)

    try:
        matrix = fleet.read(arguments.matrix)
        command = tuple(shlex.quote(a) for a in ("python", *sys.argv))
        folder = arguments.matrix.parent
        runner = fleet.Fleet(matrix, folder, arguments.records, command, say)
        if arguments.dry_run:
            return _plan(runner, arguments.json)
        results = runner.run()
    except HandheldError as error:
        if arguments.json:
            print(json.dumps({"error": error.as_dict()}))
        else:
            print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted: run the same again to go on", file=sys.stderr)
        return 130
    bad = [r for r in results if r.outcome not in ("done", "already") or not _ok(r)]
    if arguments.json:
        print(json.dumps({"ok": not bad, "results": [_row(r) for r in results]}, indent=2))
    else:
        _print(results)
        print(f"records: {arguments.records}", file=sys.stderr)
    return 1 if bad else 0


def _ok(result: fleet.Result) -> bool:
    return result.record is not None and result.record.status == "ok"


def _plan(runner: fleet.Fleet, as_json: bool) -> int:
    found, missing = runner.find()
    rows = [
        {"device": d.id, "cell": c.name, "would_run": runner.finished(d, c) is None}
        for d in found.values()
        for c in runner.cells
    ]
    rows += [
        {"device": m.device, "cell": "", "would_run": False, "error": m.error} for m in missing
    ]
    if as_json:
        print(json.dumps({"plan": rows}, indent=2))
    else:
        for row in rows:
            what = row.get("error") or ("would run" if row["would_run"] else "already done")
            print(f"{row['device']}: {row['cell']}: {what}")
    return 0


def _row(result: fleet.Result) -> dict[str, object]:
    record = result.record
    return {
        "device": result.device,
        "cell": result.cell,
        "outcome": result.outcome,
        "error": result.error,
        "record": record.id if record else None,
        "noisy": bool(record and record.noisy),
        "throttled": record.throttled if record else None,
        "sent_bytes": record.transfer.bytes if record and record.transfer else None,
        "summary": record.summary() if record else None,
    }


def _print(results: list[fleet.Result]) -> None:
    table = Table(title="times in ms, memory in MB (10^6 bytes)")
    for name in ("device", "cell", "outcome", "median", "cold", "ever", "peak", "PSNR", ""):
        table.add_column(name, overflow="fold")
    for result in results:
        figures: dict[str, Any] = result.record.summary() if result.record else {}

        def number(name: str, scale: float = 1, figures: dict[str, Any] = figures) -> str:
            value = figures.get(name)
            return f"{value / scale:.1f}" if isinstance(value, int | float) else "-"

        record = result.record
        flags = [
            name
            for name, on in (
                ("noisy", record and record.noisy),
                ("throttled", record and record.throttled),
            )
            if on
        ]
        table.add_row(
            result.device, result.cell, result.outcome, number("median_ms"),
            number("cold_start_ms"), number("first_ever_ms"), number("peak_rss", 1e6),
            number("psnr_db"), result.error or ", ".join(flags) or "ok",
        )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
