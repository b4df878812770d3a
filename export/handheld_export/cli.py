"""The commands ``handheld export`` and ``handheld verify``."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from handheld import models
from handheld.errors import GateError, TargetError, UsageError

if TYPE_CHECKING:
    from handheld_export.verify import Report


def quiet() -> None:
    """Keep what libraries say on import out of the terminal."""
    warnings.filterwarnings("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    logging.disable(logging.WARNING)


def _checkpoint_path(name: str) -> Path:
    path = Path(name)
    return path if path.exists() or os.sep in name else models.checkpoint(name)


def export(
    checkpoint: Annotated[
        str, typer.Argument(help="Folder in diffusers layout, .safetensors file, or model name.")
    ],
    target: Annotated[
        list[str] | None,
        typer.Option(
            "--target", "-t", help="Engine to lower for, NAME or NAME:SOC, or 'all'; repeatable."
        ),
    ] = None,
    precision: Annotated[
        list[str] | None,
        typer.Option(
            "--precision",
            "-p",
            help="fp32, fp16, int8, int4, int4g32, int2, 16a8w, 16a4w or 16a2w, by rounding to "
            "nearest, or 'all' that a target has; a student keeps its codes, and what it has in "
            "float. Repeatable; int8 if not given, and all with --target all.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The bundle; with several, the folder of bundles."),
    ] = None,
    size: Annotated[
        list[str] | None,
        typer.Option(
            help="WIDTHxHEIGHT of pictures in pixels; repeatable, then one bundle draws all of "
            "them, the first by default. The checkpoint's own size if not given."
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Sampling steps to unroll.")] = None,
    sampler: Annotated[str | None, typer.Option(help="ddim, dpmpp2m or dmd.")] = None,
    spacing: Annotated[str | None, typer.Option(help="trailing, leading or linspace.")] = None,
    timesteps: Annotated[
        str | None, typer.Option(help="Explicit timesteps, for example 999,749,499,249.")
    ] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; 1 is none.")] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Prompt to prefetch; repeatable.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the reference picture.")] = 0,
    references: Annotated[
        bool, typer.Option(help="Let reference results of every call travel in the bundle.")
    ] = False,
    calibrate: Annotated[
        bool, typer.Option(help="Fix the activation grids of convolutions by calibration.")
    ] = False,
    decoder_bands: Annotated[
        str,
        typer.Option(
            metavar="MB",
            help="Decode in bands whose largest tensor has this many MB, so that memory does not "
            "grow with whole pictures in float32. auto: where that saves much; off: never.",
        ),
    ] = "auto",
    jobs: Annotated[
        int | None,
        typer.Option("--jobs", "-j", help="Most worker processes; all cores if not given."),
    ] = None,
    memory: Annotated[
        int | None,
        typer.Option(
            help="MB (10^6 bytes) for all processes together; by default 60 % of what is free."
        ),
    ] = None,
    cache: Annotated[bool, typer.Option(help="Use artifacts lowered earlier.")] = True,
    dry_run: Annotated[bool, typer.Option(help="Show the segments and stop.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Lower a checkpoint to verified bundles.

    \b
    handheld export critter --target litert-cpu --precision int8 -o build/critter
    handheld export ./sdxl -t litert-cpu -t executorch-xnnpack -p int4 -o build/sdxl
    handheld export ./sdxl -p int4 --memory 4000 -o build/sdxl
    handheld export ./sdxl --size 512x512 --size 768x512 -o build/sdxl
    handheld export critter --dry-run
    """  # noqa: D301
    quiet()
    wanted = target or ["litert-cpu"]
    chosen, absent = _choose(wanted, precision or ["all" if "all" in wanted else "int8"])
    for name, value in (("jobs", jobs), ("memory", memory)):
        if value is not None and not value > 0:
            raise UsageError(f"--{name} {value} is not positive")
    bands = _bands(decoder_bands)
    if output is None and not dry_run:
        raise UsageError("no place for the bundle", remedy="give one with --output")
    from handheld.commands.plan import picture_size
    from handheld_export.checkpoint import Checkpoint
    from handheld_export.export import Options, plan_segments
    from handheld_export.export import export as run

    source = Checkpoint(_checkpoint_path(checkpoint))
    console = Console(stderr=True)
    results = []
    failed: list[TargetError] = []
    for name, level in chosen:
        options = Options(
            target=name,
            precision=level,
            sizes=tuple(map(picture_size, size or ())),
            sampler=sampler,
            steps=steps,
            spacing=spacing,
            timesteps=_numbers(timesteps),
            guidance=guidance,
            prompts=tuple(prompt) if prompt else None,
            seed=seed,
            references=references,
            calibrate=calibrate,
            decoder_bands=bands,
        )
        if dry_run:
            results.append({"target": name, "precision": level} | plan_segments(source, options))
            continue
        assert output is not None
        folder = f"{source.name}-{name}-{level}".replace(":", "-")
        place = output if len(chosen) == 1 else output / folder
        began = time.perf_counter()
        try:
            with _Bar(console, f"{name} {level}") as bar:
                manifest = run(
                    source,
                    options,
                    place,
                    jobs=jobs,
                    memory=memory,
                    progress=bar.progress,
                    use_cache=cache,
                )
        except TargetError as e:
            if "all" not in wanted:
                raise
            failed.append(e)
            results.append({"target": name, "precision": level, "failed": str(e)})
            console.print(f"{name} {level}: {e}", style="red", markup=False, soft_wrap=True)
            continue
        results.append(
            {
                "bundle": str(place),
                "sha256": manifest.sha256,
                "target": name,
                "precision": level,
                "artifacts": len(manifest.artifacts),
                "sizes": list(manifest.sizes),
                "bytes": manifest.nbytes,
                "snr_db": manifest.verification.snr_db,
                "student_snr_db": manifest.verification.student_snr_db,
                "psnr_db": manifest.verification.psnr_db,
                "seconds": round(time.perf_counter() - began, 2),
                "from_cache": bar.cached,
                "lowered": bar.lowered,
            }
        )
    results += [{"target": e.field, "skipped": e.message, "remedy": e.remedy} for e in absent]
    if json_output:
        sys.stdout.write(json.dumps(results, indent=2) + "\n")
    elif dry_run:
        for result in results[: len(chosen)]:
            _print_plan(result)
    else:
        _print_bundles([r for r in results if "bundle" in r])
    for error in absent:
        console.print(
            f"skipped {error.message}: {error.remedy}", style="yellow", markup=False, soft_wrap=True
        )
    if failed:
        if json_output:  # one document, which says it
            raise typer.Exit(1)
        raise TargetError(f"{len(failed)} of {len(chosen)} exports failed: {failed[0]}")


def _choose(
    wanted: list[str], precisions: list[str]
) -> tuple[list[tuple[str, str]], list[TargetError]]:
    """Return pairs of target and precision, and why others of ``all`` targets are left out.

    Raises
    ------
    UsageError, TargetError
        For a target that was named and is unknown, lacks its tools or does not run a precision; if
        none is left.
    """
    from handheld_export import targets

    names = targets.one_each() if "all" in wanted else list(dict.fromkeys(wanted))
    chosen: list[tuple[str, str]] = []
    absent: list[TargetError] = []
    for name in names:
        try:
            own = targets.find(name).precisions
        except TargetError as error:
            if name in wanted:
                raise
            error.field = name
            absent.append(error)
            continue
        levels = own if "all" in precisions else tuple(dict.fromkeys(precisions))
        for level in levels:
            if level in own:
                chosen.append((name, level))
                continue
            message = f"target '{name}' does not run precision '{level}'"
            remedy = f"choose from {', '.join(own)}"
            if name in wanted or "all" not in wanted:
                raise UsageError(message, remedy=remedy)
            absent.append(TargetError(message, field=name, remedy=remedy))
    if not chosen and absent:
        raise absent[0]
    return chosen, absent


def verify(
    bundle: Annotated[list[Path], typer.Argument(help="Bundles, or a folder of bundles.")],
    checkpoint: Annotated[
        str | None,
        typer.Option(help="Checkpoint to compare with; by default the model the bundle names."),
    ] = None,
    gate: Annotated[
        Path | None,
        typer.Option(help="TOML file of gates, in the form of handheld's numerics_gates.toml."),
    ] = None,
    unit: Annotated[
        str | None,
        typer.Option(
            help="Compute unit: cpu, gpu or ane for coreml on macOS, cpu or gpu for litert-gpu."
        ),
    ] = None,
    noises: Annotated[
        int, typer.Option(min=1, help="Pictures to draw, each from another noise.")
    ] = 3,
    html: Annotated[
        Path | None, typer.Option(help="Write a page with all figures and pictures.")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check the numerics of every artifact against torch, at all sizes.

    Exit code 1 if a gate fails, or if one of several bundles lacks its tools here.

    \b
    handheld verify build/critter
    handheld verify build/all --html build/numerics.html
    handheld verify build/critter --checkpoint critter --json
    """  # noqa: D301
    quiet()
    from handheld.bundle import Bundle
    from handheld.files import output_errors
    from handheld_export import verify_page
    from handheld_export.verify import verify as run

    path = None if checkpoint is None else _checkpoint_path(checkpoint)
    opened = [Bundle.open(b) for b in _bundles(bundle)]
    reports: list[Report] = []
    skipped: list[TargetError] = []
    for one in opened:
        try:
            reports += [run(one, path, gate, unit, size, noises) for size in one.manifest.sizes]
        except TargetError as e:
            if len(opened) == 1:
                raise
            e.path = str(one.path)
            skipped.append(e)
    if not reports:
        raise skipped[0]
    if html is not None:
        with output_errors(html):
            html.parent.mkdir(parents=True, exist_ok=True)
            html.write_text(verify_page.render(reports), encoding="utf-8")
    if json_output:
        told = [r.as_dict() for r in reports]
        left = [{"bundle": str(e.path), "skipped": e.message, "remedy": e.remedy} for e in skipped]
        document = told[0] if len(opened) == len(told) == 1 else {"bundles": told + left}
        sys.stdout.write(json.dumps(document, indent=2) + "\n")
    else:
        console = Console()
        _print_reports(console, reports)
        for report in reports:
            for problem in report.problems:
                console.print(f"{report.bundle}: {problem}", style="red", markup=False)
        for note in dict.fromkeys(n for r in reports for n in r.notes):
            console.print(note, style="yellow", markup=False)
        for error in skipped:
            console.print(f"skipped {error}", style="yellow", markup=False, soft_wrap=True)
    bad = [r for r in reports if not r.passed]
    if bad:
        if json_output:  # one document, which says it
            raise typer.Exit(1)
        failed = [r.artifact for r in bad[0].rows if not r.passed]
        what = ", ".join(failed) or (bad[0].problems[0] if bad[0].problems else "end to end")
        raise GateError(f"verification failed: {what}", path=bad[0].bundle)
    if skipped:
        if json_output:
            raise typer.Exit(1)
        raise GateError(f"{len(skipped)} of {len(opened)} bundles are not verified")


def _bundles(paths: list[Path]) -> list[Path]:
    """Return bundles, and those in folders that are none."""
    from handheld.bundle import MANIFEST

    found: list[Path] = []
    for path in paths:
        inside = [] if (path / MANIFEST).exists() else sorted(path.glob(f"*/{MANIFEST}"))
        found += [p.parent for p in inside] or [path]
    return found


def _print_reports(console: Console, reports: list[Report]) -> None:
    from handheld_export import verify_page

    several = len(reports) > 1
    title = "end to end" if several else f"{reports[0].target} {reports[0].precision}"
    table = Table(title=f"numerics, {title}", caption=verify_page.LEGEND)
    for i, column in enumerate(verify_page.COLUMNS):
        table.add_column(column, justify="right" if i else "left", no_wrap=i == 0)
    for report in reports:
        for cells, passed in verify_page.lines(report, artifacts=not several):
            table.add_row(*cells, "ok" if passed else "[red]FAILED[/red]")
    console.print(table)


def _bands(text: str) -> float | Literal["auto"] | None:
    if text == "auto":
        return "auto"
    if text == "off":
        return None
    try:
        bands = float(text)
    except ValueError:
        bands = math.nan
    if not (math.isfinite(bands) and bands > 0):
        raise UsageError(
            f"--decoder-bands '{text}' is no size", remedy="give MB above 0, auto or off"
        )
    return bands


def _numbers(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(t) for t in text.split(","))
    except ValueError:
        raise UsageError(
            f"--timesteps '{text}' is not a list of integers", remedy="write 999,749,499,249"
        ) from None


class _Bar:
    """A progress bar over weights, with an estimate from the segments done in this run."""

    def __init__(self, console: Console, title: str) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._title = title
        self._task = self._bar.add_task(title, total=None, left="")
        self._began = 0.0
        self._weights = 0
        self._lowered_weights = 0
        self.cached = 0
        self.lowered = 0
        from handheld_export.export import Progress as Hooks

        self.progress = Hooks(self._stage, self._planned, self._done)

    def __enter__(self) -> _Bar:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def _stage(self, name: str) -> None:
        self._bar.update(self._task, description=f"{self._title}: {name}")

    def _planned(self, count: int, weights: int) -> None:
        self._began = time.perf_counter()
        self._weights = weights
        self._bar.update(self._task, total=count, left="estimating")

    def _done(self, segment: str, weights: int, meta: dict[str, Any] | None) -> None:
        if meta is None:
            self.cached += 1
            self._weights -= weights
        else:
            self.lowered += 1
            self._lowered_weights += weights
        left = ""
        if self._lowered_weights:
            spent = time.perf_counter() - self._began
            rest = self._weights - self._lowered_weights
            seconds = spent * rest / self._lowered_weights
            left = f"about {seconds:.0f} s left" if rest > 0 else ""
        self._bar.update(self._task, advance=1, left=left)


def _print_bundles(results: list[dict[str, Any]]) -> None:
    table = Table(title="bundles (sizes in MB = 10^6 bytes)")
    for column in ("bundle", "artifacts", "MB", "SNR dB", "student dB", "PSNR dB", "s", "cached"):
        table.add_column(column, justify="left" if column == "bundle" else "right", overflow="fold")
    for r in results:
        table.add_row(
            r["bundle"],
            str(r["artifacts"]),
            f"{r['bytes'] / 1e6:.1f}",
            f"{r['snr_db']:.1f}",
            "" if r["student_snr_db"] is None else f"{r['student_snr_db']:.1f}",
            f"{r['psnr_db']:.1f}",
            f"{r['seconds']:.1f}",
            f"{r['from_cache']}/{r['artifacts']}",
        )
    Console().print(table)


def _print_plan(plan: dict[str, Any]) -> None:
    table = Table(title=f"{plan['target']} {plan['precision']}: {plan['steps']} steps")
    for column in ("segment", "units", "weights"):
        table.add_column(column, justify="left" if column == "segment" else "right")
    for s in plan["segments"]:
        table.add_row(s["id"], str(s["units"]), f"{s['weights']:,}")
    Console().print(table)
