"""SDXL at its full size: export, run resident and streamed, and check what comes out.

    python benchmarks/full_size.py --json build/full_size.json
    python benchmarks/full_size.py --stack stack2 --size 768x768 --json build/full_size.json
    python benchmarks/full_size.py --checkpoint critter-stack1 --size 64x64

Weights are random (``make_sdxl.py``): speed, memory and parity are claimed and nothing else. Peaks
of runs are high-water marks of the whole process, those of exports the largest sum over all
processes. Records are appended to a file beside the summary, and a page shows all of it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import watch
from handheld import models, recipes
from handheld.bundle import Bundle
from handheld.devices.host import HostDevice
from handheld.errors import HandheldError, UsageError
from handheld.files import write_file
from handheld.program import Call
from handheld.protocol import Residency
from handheld.records import RunRecord
from handheld.report import page, plots
from stages import (
    RESIDENCIES,
    ROOT,
    Stages,
    build_harness,
    command,
    guarded,
    measure,
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
    source: Path, target: str, precision: str, size: str, memory: int, folder: Path, stages: Stages
) -> tuple[Path, dict[str, Any]]:
    """Export a bundle with an empty cache, and again from the cache."""
    output = folder / "bundles" / f"{source.name}-{target}-{size}"
    cache = folder / "cache" / output.name
    words = [
        *(sys.executable, "-m", "handheld", "export", str(source), "-o", str(output), "--json"),
        *("--target", target, "--precision", precision, "--memory", str(memory)),
        *("--size", size),
    ]
    figures: dict[str, Any] = {"checkpoint": source.name, "target": target, "size": size}
    shutil.rmtree(cache, ignore_errors=True)
    for name in ("first", "cached"):
        with stages(f"exporting {output.name}, {name}") as end:
            seen = watch.run(words, {"XDG_CACHE_HOME": str(cache)})
            (folder / "export.log").open("a").write(seen.errors)
            if seen.code:
                last = seen.errors.strip().splitlines()[-1:] or ["no reason given"]
                raise HandheldError(f"the export failed: {last[0]}", path=output)
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


def macs(bundle: Bundle) -> int:
    """Return the multiply-accumulates of one picture."""
    size = next(iter(bundle.manifest.sizes.values()))
    counted = {a.id: a.macs or 0 for a in bundle.manifest.artifacts}
    return sum(counted[op.artifact] for op in size.program.ops if isinstance(op, Call))


def draw(summary: dict[str, Any], records: Sequence[RunRecord], path: Path) -> None:
    """Write a page with tables and plots."""
    runs, exports = summary["runs"], summary["exports"]
    slowest = max((r["median_ms"] or 0 for r in runs), default=0)
    biggest = max((r["peak_rss_mb"] or 0 for r in runs), default=0)
    lines = []
    for r in runs:
        unet = r["unet_step_ms"] or 0
        drawn = plots.bars(
            [("U-Net step", unet, "one"), ("decoder", r["decoder_ms"] or 0, "two")],
            slowest,
            "ms",
        )
        memory = plots.bars([("peak", r["peak_rss_mb"] or 0, "one")], biggest, "MB")
        cells = (r["bundle"], r["size"], way(r))
        head = "".join(f"<td>{escape(str(c))}</td>" for c in cells)
        lines.append(
            f"{head}<td>{_cell(r['median_ms'])} ms{drawn}</td>"
            f"<td>{_cell(r['peak_rss_mb'])} MB{memory}</td><td>{_cell(r['psnr_db'])}</td>"
        )
    names = ("bundle", "size", "residency", "U-Net step and decoder", "peak", "PSNR dB")
    made = [
        "".join(
            f"<td>{escape(str(e[k]))}</td>"
            for k in (
                "checkpoint",
                "target",
                "size",
                "first_s",
                "first_peak_mb",
                "cached_s",
                "bytes",
            )
        )
        for e in exports
    ]
    columns = ("checkpoint", "target", "size", "s", "peak MB", "from the cache s", "bytes")
    body = page.document(
        "SDXL at full size",
        [
            "<h1>SDXL at full size</h1>",
            f"<p>{escape(' '.join(summary['command']))}</p>",
            page.table("Runs", "Random weights. Peaks are high-water marks.", names, lines),
            page.table("Exports", "Peaks are sums over all processes.", columns, made),
        ],
    )
    write_file(path, body.encode())
    write_file(path.with_suffix(".records.html"), page.render(records).encode())


def way(figures: dict[str, Any]) -> str:
    """Return how a bundle was run."""
    budget = figures["memory_budget_mb"]
    return figures["residency"] if budget is None else f"within {budget} MB"


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def main() -> int:
    """Export, run, summarize."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--stack", action="append", choices=recipes.STACKS, help="default stack1")
    parser.add_argument("--checkpoint", action="append", help="instead of a stack: folder or model")
    parser.add_argument("--decoder", action="append", choices=("tiny", "full"), help="default tiny")
    parser.add_argument("--target", action="append", help="default litert-cpu")
    parser.add_argument("--size", action="append", help="WIDTHxHEIGHT, default 512x512")
    parser.add_argument("--residency", action="append", choices=RESIDENCIES, help="default all")
    parser.add_argument(
        "--precision", default="int8", help="of layers that carry no codes; int4 for a checkpoint"
    )
    parser.add_argument("--memory", type=int, default=4000, help="MB for the export")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument(
        "--memory-budget", action="append", type=int, help="MB; a resident run under each, too"
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
    summary |= {"exports": [], "runs": []}
    made: list[Path] = list(arguments.bundle or ())
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
                for size in arguments.size or ["512x512"]:
                    path, figures = export(
                        source, target, arguments.precision, size, arguments.memory, folder, stages
                    )
                    summary["exports"].append(figures)
                    made.append(path)
                    write_summary(arguments.json, summary)
    records: list[RunRecord] = []
    log = arguments.json.with_suffix(".records.jsonl")
    for path in made:
        bundle = Bundle.open(path)
        ways: list[tuple[Residency, int | None]]
        ways = [(r, None) for r in arguments.residency or RESIDENCIES]
        ways += [("resident", budget) for budget in arguments.memory_budget or ()]
        for residency, budget in ways:
            with stderr_to(folder / "runs.log"):
                record = measure(
                    bundle, HostDevice(), residency, log, stages,
                    threads=arguments.threads, iterations=arguments.iterations,
                    memory_budget=None if budget is None else budget * 10**6,
                )  # fmt: skip
            records.append(record)
            figures = row(record, bundle) | parts(record, bundle)
            figures["memory_budget_mb"] = budget
            figures |= {"size": record.bundle.size, "macs": macs(bundle)}
            summary["runs"].append(figures)
            write_summary(arguments.json, summary)
    print_table(summary["runs"], "full size (MB = 10^6 bytes)")
    for r in summary["runs"]:
        say(
            f"{r['bundle']} {way(r)}: U-Net step {_cell(r['unet_step_ms'])} ms, decoder "
            f"{_cell(r['decoder_ms'])} ms, {r['macs'] / 1e9:.1f} GMAC"
        )
    for e in summary["exports"]:
        say(
            f"export {e['checkpoint']} {e['target']} {e['size']}: {e['first_s']} s, peak "
            f"{e['first_peak_once_mb']} MB ({e['first_peak_mb']} MB with shared pages in each); "
            f"from the cache {e['cached_s']} s"
        )
    draw(summary, records, arguments.json.with_suffix(".html"))
    say(f"written: {arguments.json}, {log}, {arguments.json.with_suffix('.html')}")
    return 0 if all(r.status == "ok" for r in records) else 1


if __name__ == "__main__":
    sys.exit(guarded(main))
