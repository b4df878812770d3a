"""SDXL at its full size: export, run resident and streamed, and check what comes out.

    python benchmarks/full_size.py --json build/full_size.json
    python benchmarks/full_size.py --stack stack2 --size 512x512 --size 768x768 --pictures 100
    python benchmarks/full_size.py --decoder tiny --decoder full --cold
    python benchmarks/full_size.py --checkpoint critter-stack1 --size 64x64

All sizes are in one bundle. Weights are random (``make_sdxl.py``): speed, memory and parity are
claimed and nothing else. Peaks of runs are high-water marks of the whole process, those of exports
the largest sum over all processes. Records are appended to a file beside the summary, and a page
shows all of it. Figures are held against what is promised; a promise that is missed is exit code 1.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any

import full_size_promises as promised
import watch
from handheld import models, recipes
from handheld.bundle import Bundle
from handheld.devices.host import HostDevice
from handheld.errors import CheckpointError, HandheldError, UsageError
from handheld.files import weights_cache, write_file
from handheld.program import Call
from handheld.protocol import Residency
from handheld.records import Pass, RunRecord
from handheld.report import page, plots
from plan_against_runs import planned
from promises import Line, show, verdict
from stages import (
    RESIDENCIES,
    ROOT,
    Stages,
    build_harness,
    command,
    guarded,
    measure,
    megabytes,
    print_table,
    row,
    say,
    stderr_to,
    versions,
    write_summary,
)

MAKE = ROOT / "benchmarks" / "make_sdxl.py"


def checkpoint(stack: str, decoder: str, folder: Path, stages: Stages) -> Path:
    """Make a stack's student, unless it is there."""
    path = folder / "checkpoints" / f"{stack}-{decoder}"
    if not (path / "handheld.json").is_file():  # it is written last
        shutil.rmtree(path, ignore_errors=True)
        words = [sys.executable, str(MAKE), "--stack", stack, "--decoder", decoder, "-o", str(path)]
        with stages(f"making {path.name}") as end:
            seen = watch.run(words)
            if seen.code:
                raise UsageError(f"make_sdxl.py failed: {seen.errors.strip()}", path=path)
            end(f"peak {seen.peak / 1e6:.0f} MB")
    return path


def export(
    source: Path, target: str, arguments: argparse.Namespace, stages: Stages
) -> tuple[Path, dict[str, Any]]:
    """Export a bundle of all sizes with an empty cache, and again from the cache."""
    folder, sizes = arguments.folder, arguments.size or ["512x512"]
    bands = arguments.decoder_bands
    name = "-".join((source.name, target, *sizes, *([f"bands-{bands}"] if bands != "auto" else [])))
    output, cache = folder / "bundles" / name, folder / "cache" / name
    words = [
        *(sys.executable, "-m", "handheld", "export", str(source), "-o", str(output), "--json"),
        *("--target", target, "--precision", arguments.precision),
        *("--memory", str(arguments.memory)),
        *(word for size in sizes for word in ("--size", size)),
        *("--decoder-bands", bands),
    ]
    figures: dict[str, Any] = {"checkpoint": source.name, "target": target, "sizes": sizes}
    figures |= {"decoder_bands": bands, "model": _name(source)}
    shutil.rmtree(cache, ignore_errors=True)
    for name in ("first", "cached"):
        with stages(f"exporting {output.name}, {name}") as end:
            seen = watch.run(words, {"XDG_CACHE_HOME": str(cache)})
            (folder / "export.log").open("a").write(seen.errors)
            if seen.code:
                raise HandheldError(f"the export failed: {_reason(seen)}", path=output)
            figures[f"{name}_s"] = round(seen.seconds, 1)
            figures[f"{name}_peak_mb"] = round(seen.peak / 1e6, 1)
            figures[f"{name}_peak_once_mb"] = round(seen.peak_once / 1e6, 1)
            figures[f"{name}_marks_mb"] = [round(m / 1e6, 1) for m in seen.marks.values()]
            end(
                f"peak {seen.peak_once / 1e6:.0f} MB, {seen.peak / 1e6:.0f} MB with what "
                f"{len(seen.marks)} processes share counted in each"
            )
    (result,) = json.loads(seen.output)
    figures |= {k: result[k] for k in ("artifacts", "bytes", "snr_db", "student_snr_db", "psnr_db")}
    if result["lowered"]:
        raise HandheldError(f"{result['lowered']} artifacts were lowered again", path=output)
    return output, figures


def _reason(seen: watch.Watched) -> str:
    """Return why a command with ``--json`` failed: it says so in JSON, unless it was killed."""
    try:
        return str(json.loads(seen.output)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        lines = seen.errors.strip().splitlines()
        return f"code {seen.code}: {lines[-1] if lines else 'no reason given'}"


def _name(source: Path) -> str:
    settings = source / "handheld.json"
    told = json.loads(settings.read_text()) if settings.is_file() else {}
    return str(told.get("name") or source.stem)


def decoder_kind(bundle: Bundle) -> str:
    """Return which decoder a bundle has, ``full`` or ``tiny``."""
    own = (a for a in bundle.manifest.artifacts if a.component == "decoder")
    return "full" if any("mid_block" in u for a in own for u in a.units) else "tiny"


def parts(record: RunRecord, bundle: Bundle) -> dict[str, float | None]:
    """Return the median milliseconds of one U-Net step and of the decoder."""
    size = bundle.manifest.sizes[record.bundle.size]
    component = {a.id: a.component for a in bundle.manifest.artifacts}
    calls = [component[op.artifact] for op in size.program.ops if isinstance(op, Call)]
    latency = record.latency()
    timed = [i for i in latency.iterations if i.kind == "timed"] if latency else []

    def median(name: str, runs: int) -> float | None:
        sums = [
            sum(ms for ms, c in zip(i.calls_ms, calls, strict=True) if c == name) / runs
            for i in timed
            if len(i.calls_ms) == len(calls)
        ]
        return round(statistics.median(sums), 2) if sums else None

    return {
        "unet_step_ms": median("unet", bundle.manifest.model.steps),
        "decoder_ms": median("decoder", 1),
    }


def macs(bundle: Bundle, size: str) -> int:
    """Return the multiply-accumulates of one picture."""
    counted = {a.id: a.macs or 0 for a in bundle.manifest.artifacts}
    ops = bundle.manifest.sizes[size].program.ops
    return sum(counted[op.artifact] for op in ops if isinstance(op, Call))


def first_segment_ms(record: RunRecord, bundle: Bundle) -> float | None:
    """Return from the start of a process, weights packed, until its first segment runs."""
    seen = record.latency()
    if seen is None or seen.hello is None or seen.spawn_to_hello_ms is None:
        return None
    ops = bundle.manifest.sizes[record.bundle.size].program.ops
    first = next(op.artifact for op in ops if isinstance(op, Call))
    ready = [m.t_ms for m in seen.memory if m.phase == "loaded"]
    # One that is streamed is loaded after the others, right before its call.
    loaded = [x.t_ms for x in seen.loads if x.artifact == first]
    if not (ready and loaded):
        return None
    return round(seen.spawn_to_hello_ms + max(ready[0], loaded[0]) - seen.hello.t_ms, 1)


def drift_mb(seen: Pass) -> float | None:
    """Return by how much resident memory grew from the first picture of a process to its last."""
    rss = {m.phase: m.rss for m in seen.memory}
    first, end = rss.get("first"), rss.get("end")
    return None if first is None or end is None else round((end - first) / 1e6, 2)


def drop_pages(bundle: Bundle, threads: int) -> int:
    """Take a bundle's files and packed weights out of the page cache; return what is left of them.

    What a process has mapped stays, and so does everything in a file system that is memory.
    """
    packed = weights_cache(bundle.sha256, threads)
    left = 0
    for path in (*_files(bundle.path), *_files(packed)):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            left += _in_memory(file.fileno())
    return left


def _files(folder: Path) -> Iterator[Path]:
    return (p for p in folder.rglob("*") if p.is_file())


def _in_memory(file: int) -> int:
    """Return the bytes of a file that are in the page cache."""
    size = os.fstat(file).st_size
    if not size:
        return 0
    pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
    # Python lends the address of a mapping that might be written to, and of no other.
    with mmap.mmap(file, size, access=mmap.ACCESS_COPY) as mapped:
        view = ctypes.c_char.from_buffer(mapped)
        libc = ctypes.CDLL(None, use_errno=True)
        address, length = ctypes.c_void_p(ctypes.addressof(view)), ctypes.c_size_t(size)
        failed = libc.mincore(address, length, pages)
        del view
    if failed:
        raise OSError(ctypes.get_errno(), "mincore")
    return sum(p & 1 for p in pages) * mmap.PAGESIZE


class Runs:
    """Measures bundles and keeps what was seen.

    Parameters
    ----------
    arguments : Namespace
        Of the command line.
    summary : dict
        Rows go to its ``runs``, budgets that were refused to its ``refused``.
    """

    def __init__(self, arguments: argparse.Namespace, summary: dict[str, Any], stages: Stages):
        self.arguments = arguments
        self.summary = summary
        self.stages = stages
        self.records: list[RunRecord] = []
        self.cold: list[RunRecord] = []
        self.log: Path = arguments.json.with_suffix(".records.jsonl")
        self.cold_log: Path = arguments.json.with_suffix(".cold.records.jsonl")

    def measure(self, bundle: Bundle, residency: Residency, log: Path, **options: Any) -> RunRecord:
        """Make a record."""
        threads = self.arguments.threads
        with stderr_to(self.arguments.folder / "runs.log"):
            record = measure(
                bundle, HostDevice(), residency, log, self.stages, threads=threads, **options
            )
        (self.cold if log == self.cold_log else self.records).append(record)
        return record

    def all_of(self, bundle: Bundle, checkpoint: Path | None) -> None:
        """Run a bundle at each size and residency, and at its default size in all other ways."""
        manifest = bundle.manifest
        plans: dict[str, dict[str, Any]] = {}
        if checkpoint is not None:
            try:
                plans = planned(checkpoint, bundle)
            except (CheckpointError, UsageError) as error:
                say(f"no plan beside the runs: {error}")
        residencies = self.arguments.residency or RESIDENCIES
        for size in manifest.sizes:
            for residency in residencies:
                seen = self.one(bundle, size, residency, plans.get(size))
                if size == manifest.default_size:
                    self.further(bundle, residency, seen)
                self.keep(seen)
        for budget in self.arguments.memory_budget or ():
            try:
                self.keep(self.one(bundle, manifest.default_size, "resident", None, budget))
            except UsageError as error:
                say(f"{bundle.path.name} within {budget} MB: {error}")
                why = {"bundle": bundle.path.name, "budget_mb": budget, "why": error.message}
                self.summary["refused"].append(why)

    def one(
        self,
        bundle: Bundle,
        size: str,
        residency: Residency,
        plan: dict[str, Any] | None,
        budget: int | None = None,
    ) -> dict[str, Any]:
        """Make a record of warm runs; return its row."""
        record = self.measure(
            bundle, residency, self.log, size=size, iterations=self.arguments.iterations,
            memory_budget=None if budget is None else budget * 10**6,
        )  # fmt: skip
        latency = record.latency()
        marks = [m.peak_rss for p in record.passes for m in p.memory if m.peak_rss is not None]
        expected = plan["peak_bytes"][residency] if plan else None
        if budget is not None and latency is not None and latency.plan is not None:
            expected = latency.plan.peak_bytes
        files = plan["unet_bytes"] + plan["decoder_bytes"] if plan else None
        called = {f.path: f.bytes for a in bundle.manifest.called(size) for f in a.files}
        return {
            **row(record, bundle),
            **parts(record, bundle),
            "size": size,
            "default_size": bundle.manifest.default_size,
            "decoder": decoder_kind(bundle),
            "way": residency if budget is None else f"within {budget} MB",
            "memory_budget_mb": budget,
            "macs": macs(bundle, size),
            "artifact_mb": megabytes(sum(called.values())),
            "highest_mb": megabytes(max(marks, default=None)),
            "first_segment_ms": first_segment_ms(record, bundle),
            "planned_mb": megabytes(expected),
            "planned_files_mb": megabytes(files),
            "cold_ms": None,
            "cold_start_ms": None,
            "pictures": None,
            "drift_mb": None,
        }

    def further(self, bundle: Bundle, residency: Residency, seen: dict[str, Any]) -> None:
        """Add what a cold page cache and many pictures show to a row."""
        once = {"size": seen["size"], "first_ever": False, "warmup": 0}
        if self.arguments.cold:
            left = drop_pages(bundle, self.arguments.threads)
            record = self.measure(bundle, residency, self.cold_log, iterations=1, **once)
            figures = record.summary()
            seen["cold_ms"], seen["cold_start_ms"] = figures["first_ms"], figures["cold_start_ms"]
            seen["cold_left_mb"] = megabytes(left)
        if pictures := self.arguments.pictures:
            record = self.measure(bundle, residency, self.log, iterations=pictures, **once)
            latency = record.latency()
            if latency is not None and latency.done:
                seen["pictures"] = pictures
                seen["drift_mb"] = drift_mb(latency)

    def keep(self, seen: dict[str, Any]) -> None:
        """Add a row to the summary and write it."""
        self.summary["runs"].append(seen)
        write_summary(self.arguments.json, self.summary)


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Let this process and those it starts put temporary files into a folder of their own."""
    kept, told = tempfile.tempdir, os.environ.get("TMPDIR")
    with tempfile.TemporaryDirectory(prefix="handheld-") as name:
        tempfile.tempdir = os.environ["TMPDIR"] = name
        try:
            yield Path(name)
        finally:
            tempfile.tempdir = kept
            if told is None:
                del os.environ["TMPDIR"]
            else:
                os.environ["TMPDIR"] = told


def leftovers(bundles: Sequence[Bundle], temporary: Path, threads: int) -> list[str]:
    """Return the temporary files that runs left behind."""
    found = list(temporary.iterdir())
    for bundle in bundles:
        found += weights_cache(bundle.sha256, threads).glob(".tmp-*")
    return sorted(map(str, found))


def draw(
    summary: dict[str, Any], lines: Sequence[Line], records: Sequence[RunRecord], path: Path
) -> None:
    """Write a page with tables and plots."""
    runs, exports = summary["runs"], summary["exports"]
    slowest = max((r["median_ms"] or 0 for r in runs), default=0)
    biggest = max((r["peak_rss_mb"] or 0 for r in runs), default=0)
    rows = []
    for r in runs:
        unet = r["unet_step_ms"] or 0
        drawn = plots.bars(
            [("U-Net step", unet, "one"), ("decoder", r["decoder_ms"] or 0, "two")],
            slowest,
            "ms",
        )
        memory = plots.bars([("peak", r["peak_rss_mb"] or 0, "one")], biggest, "MB")
        rows.append(
            _tds(r["bundle"], r["size"], r["way"])
            + f"<td>{_cell(r['median_ms'])} ms{drawn}</td>"
            + f"<td>{_cell(r['peak_rss_mb'])} MB{memory}</td>"
            + _tds(
                *(_cell(r[k]) for k in ("planned_mb", "first_segment_ms", "cold_ms", "drift_mb")),
                _cell(r["psnr_db"]),
            )
        )
    names = ("bundle", "size", "residency", "U-Net step and decoder", "peak", "planned MB",
             "first segment ms", "cold ms", "growth MB", "PSNR dB")  # fmt: skip
    made = [
        _tds(
            *(e["checkpoint"], e["target"], " ".join(e["sizes"])),
            *(e[k] for k in ("first_s", "first_peak_mb", "cached_s", "bytes")),
        )
        for e in exports
    ]
    columns = ("checkpoint", "target", "sizes", "s", "peak MB", "from the cache s", "bytes")
    kept = [_tds(x.what, x.where, x.value, x.wanted, verdict(x)) for x in lines]
    body = page.document(
        "SDXL at full size",
        [
            "<h1>SDXL at full size</h1>",
            f"<p>{escape(' '.join(summary['command']))}</p>",
            page.table("Promises", "", ("what", "where", "value", "promised", ""), kept),
            page.table("Runs", "Random weights. Peaks are high-water marks.", names, rows),
            page.table("Exports", "Peaks are sums over all processes.", columns, made),
        ],
    )
    write_file(path, body.encode())
    write_file(path.with_suffix(".records.html"), page.render(records).encode())


def _tds(*values: object) -> str:
    return "".join(f"<td>{escape(str(v))}</td>" for v in values)


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def main() -> int:
    """Export, run, summarize."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--stack", action="append", choices=recipes.STACKS, help="default stack1")
    parser.add_argument("--checkpoint", action="append", help="instead of a stack: folder or model")
    parser.add_argument("--decoder", action="append", choices=("tiny", "full"), help="default tiny")
    parser.add_argument("--decoder-bands", default="auto", help="MB, auto or off; default auto")
    parser.add_argument("--target", action="append", help="default litert-cpu")
    parser.add_argument(
        "--size", action="append", help="WIDTHxHEIGHT, default 512x512; all are in one bundle"
    )
    parser.add_argument("--residency", action="append", choices=RESIDENCIES, help="default all")
    parser.add_argument(
        "--precision", default="int8", help="of layers that carry no codes; int4 for a checkpoint"
    )
    parser.add_argument("--memory", type=int, default=4000, help="MB for the export")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument(
        "--memory-budget", action="append", type=int, help="MB; a run within each, too"
    )
    parser.add_argument("--cold", action="store_true", help="also with a cold page cache")
    parser.add_argument(
        "--pictures", type=int, default=0, help="also so many in a row: does memory grow?"
    )
    parser.add_argument("--bundle", action="append", type=Path, help="made before: only run it")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "full_size")
    parser.add_argument("--json", type=Path, default=ROOT / "build" / "full_size.json")
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    stages = Stages()
    build_harness(stages)
    summary: dict[str, Any] = {"command": list(command()), "versions": versions()}
    summary |= {"exports": [], "runs": [], "refused": [], "left": None}
    made: list[tuple[Path, Path | None]] = [(p, None) for p in arguments.bundle or ()]
    if not made:
        if arguments.checkpoint:
            sources = [p if (p := Path(n)).exists() else models.checkpoint(n)
                       for n in arguments.checkpoint]  # fmt: skip
        else:
            sources = [
                checkpoint(stack, decoder, folder, stages)
                for stack in arguments.stack or ["stack1"]
                for decoder in arguments.decoder or ["tiny"]
            ]
        for source in sources:
            for target in arguments.target or ["litert-cpu"]:
                path, figures = export(source, target, arguments, stages)
                summary["exports"].append(figures)
                made.append((path, source))
                write_summary(arguments.json, summary)
    runs = Runs(arguments, summary, stages)
    bundles = [Bundle.open(path) for path, _ in made]
    with temporary_folder() as temporary:
        for bundle, (_, source_of) in zip(bundles, made, strict=True):
            runs.all_of(bundle, source_of)
        summary["left"] = leftovers(bundles, temporary, arguments.threads)
    write_summary(arguments.json, summary)
    return report(runs)


def report(runs: Runs) -> int:
    """Print tables, write the page; return 1 if a run failed or a promise is missed."""
    summary, path = runs.summary, runs.arguments.json
    print_table(summary["runs"], "full size (MB = 10^6 bytes)")
    for r in summary["runs"]:
        say(
            f"{r['bundle']} {r['size']} {r['way']}: U-Net step {_cell(r['unet_step_ms'])} ms, "
            f"decoder {_cell(r['decoder_ms'])} ms, {r['macs'] / 1e9:.1f} GMAC"
        )
    lines = promised.lines(summary)
    missed = show(lines, "figures and promises")
    draw(summary, lines, runs.records, path.with_suffix(".html"))
    say(f"written: {path}, {runs.log}, {path.with_suffix('.html')}")
    failed = any(r.status != "ok" for r in (*runs.records, *runs.cold))
    return 1 if missed or failed else 0


if __name__ == "__main__":
    sys.exit(guarded(main))
