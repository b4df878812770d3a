"""What the records of `make bench` say about accuracy, residency and the harness's own cost.

    python benchmarks/promises.py
    python benchmarks/promises.py --summary build/demo/summary.json

Reads a summary, its records and its bundles; runs nothing. Exit code 1 if a figure is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from handheld import records
from handheld.bundle import Bundle
from stages import ROOT, guarded

END_TO_END_DB = {"fp32": 70.0, "int8": 30.0}
ARTIFACT_DB = {"fp32": 90.0}
ENGINE_SHARE = 0.98
BASE_MB = 8.0


class Line(NamedTuple):
    """One figure, and what it must be."""

    what: str
    where: str
    value: str
    wanted: str
    kept: bool | None
    """None where nothing is promised."""


def at_least(what: str, where: str, value: float, least: float | None, unit: str) -> Line:
    wanted = "" if least is None else f">= {least:g}{unit}"
    return Line(
        what, where, f"{value:.1f}{unit}", wanted, None if least is None else value >= least
    )


def accuracy(bundle: Bundle) -> Iterator[Line]:
    """Compare what the export measured with torch."""
    manifest = bundle.manifest
    where, precision = bundle.path.name, manifest.precision
    found = [(a.verification.snr_db, a.id) for a in manifest.artifacts if a.verification]
    worst, name = min((db, id_) for db, id_ in found if db is not None)
    yield at_least(f"worst artifact ({name})", where, worst, ARTIFACT_DB.get(precision), " dB")
    whole = manifest.verification.snr_db
    if whole is not None:
        least = END_TO_END_DB.get(precision)
        yield at_least("whole program, engine in Python", where, whole, least, " dB")


def runs(found: Iterable[records.RunRecord]) -> Iterator[Line]:
    """Check what the harness did, per target and precision."""
    pictures: dict[str, set[str]] = {}
    for record in found:
        where = f"{record.bundle.model} {record.bundle.target} {record.bundle.precision}"
        here = f"{where} {record.settings.residency}"
        for p in record.passes:
            pictures.setdefault(where, set()).update(o.sha256 for o in p.outputs)
        if record.check:
            least = END_TO_END_DB.get(record.bundle.precision)
            yield at_least("picture from the harness", here, record.check.snr_db, least, " dB")
        latency = record.latency()
        timed = [i for i in latency.iterations if i.kind == "timed"] if latency else []
        if timed and record.settings.residency == "resident":
            share = float(np.median([i.engine_ms / i.total_ms for i in timed]))
            yield at_least("time in the engine", here, 100 * share, 100 * ENGINE_SHARE, " %")
        if record.memory and record.memory.base_rss is not None:
            base = record.memory.base_rss / 1e6
            what = "memory before an engine is touched"
            yield Line(what, here, f"{base:.1f} MB", f"<= {BASE_MB:g} MB", base <= BASE_MB)
    for where, hashes in pictures.items():
        what = "resident and stream draw the same"
        yield Line(what, where, f"{len(hashes)} picture(s)", "1", len(hashes) == 1)


def at_most(what: str, where: str, value: float, most: float | None, unit: str) -> Line:
    wanted = "" if most is None else f"<= {most:g}{unit}"
    return Line(what, where, f"{value:.1f}{unit}", wanted, None if most is None else value <= most)


def show(lines: Sequence[Line], title: str) -> int:
    """Print figures and what was promised; return 1 if one is missed."""
    table = Table(title=title)
    for heading in ("what", "where", "value", "promised", ""):
        table.add_column(heading, overflow="fold")
    for x in lines:
        table.add_row(x.what, x.where, x.value, x.wanted, verdict(x))
    console = Console()
    if not console.is_terminal:
        console.width = 120
    console.print(table)
    return 1 if any(x.kept is False for x in lines) else 0


def verdict(line: Line) -> str:
    """Return whether a figure is kept, in a word; nothing where nothing is promised."""
    return "" if line.kept is None else "kept" if line.kept else "MISSED"


def main() -> int:
    """Print the figures and check them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--summary", type=Path, default=ROOT / "build" / "bench" / "summary.json")
    path: Path = parser.parse_args().summary
    summary: dict[str, Any] = json.loads(path.read_text())
    wanted = [r["record"] for r in summary["rows"]]
    known = {r.id: r for r in records.read(ROOT / summary["records"])}
    folders = sorted({r["bundle"] for r in summary["rows"]})
    lines = [x for f in folders for x in accuracy(Bundle.open(path.parent / "bundles" / f))]
    lines += runs(known[i] for i in wanted)
    return show(lines, str(path))


if __name__ == "__main__":
    sys.exit(guarded(main))
