"""How long an export takes, without and with its cache, and how much memory it needs.

    python benchmarks/export_time.py --target litert-cpu --precision int4

Every export is a process of its own, with a cache that starts empty.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from stages import ROOT, guarded, say, versions

TARGETS = ("litert-cpu", "executorch-xnnpack")
PRECISIONS = ("fp32", "int8", "int4")


def export(model: str, target: str, precision: str, output: Path, cache: Path) -> float:
    """Run `handheld export` and return its seconds."""
    words = ["export", model, "--target", target, "--precision", precision, "-o", str(output)]
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "handheld", *words, "--json"],
        env={**os.environ, "XDG_CACHE_HOME": str(cache)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return time.monotonic() - began


def main() -> int:
    """Time exports, print a line each and write them to a file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", default="critter")
    parser.add_argument("--target", action="append", help="repeatable; by default both")
    parser.add_argument("--precision", action="append", help="repeatable")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "export_time.json")
    arguments = parser.parse_args()
    rows = []
    for precision in arguments.precision or PRECISIONS:
        for target in arguments.target or TARGETS:
            with tempfile.TemporaryDirectory() as folder:
                bundle, cache = Path(folder) / "bundle", Path(folder) / "cache"
                first = export(arguments.model, target, precision, bundle, cache)
                again = export(arguments.model, target, precision, bundle, cache)
            # Linux counts in kibibytes, and the largest of all children so far.
            peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e6
            row = {
                "target": target,
                "precision": precision,
                "seconds": round(first, 1),
                "cached_seconds": round(again, 1),
                "largest_process_so_far_mb": round(peak, 1),
            }
            rows.append(row)
            say(json.dumps(row))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    record = {"rows": rows, "command": sys.argv, "versions": versions()}
    arguments.output.write_text(json.dumps(record, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
