"""``handheld bench``."""

from __future__ import annotations

import itertools
import math
import shlex
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from handheld import bench as bench_
from handheld import devices, records
from handheld.bundle import Bundle
from handheld.commands.output import announce_build, megabytes, milliseconds, print_json
from handheld.errors import GateError, HandheldError, UsageError
from handheld.memory_plan import plan_bundle
from handheld.protocol import Event, Iteration, Residency
from handheld.records import RunRecord
from handheld.thermal_gate import Gate


def bench(
    bundles: Annotated[list[Path], typer.Argument(help="Bundles: folders or zip files.")],
    device: Annotated[
        str, typer.Option("--device", "-d", help="A kind of device, a device's id, or all.")
    ] = "host",
    size: Annotated[
        str | None, typer.Option(help="WIDTHxHEIGHT; by default the reference's.")
    ] = None,
    residency: Annotated[
        str, typer.Option(help="resident, stream, or both with a comma between.")
    ] = "resident",
    memory_budget: Annotated[
        float | None,
        typer.Option(
            min=1.0,
            metavar="MB",
            help="What fits stays in memory, the rest is streamed; takes the place of --residency.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would stay within --memory-budget.")
    ] = False,
    iterations: Annotated[int, typer.Option(min=1, help="Timed iterations, at least.")] = 5,
    min_seconds: Annotated[
        float, typer.Option(min=0.0, help="Go on with timed iterations for this long.")
    ] = 0.0,
    precision: Annotated[
        float | None,
        typer.Option(
            help="And until the median is known to this part of it, with 95 % confidence: 0.02."
        ),
    ] = None,
    max_seconds: Annotated[
        float, typer.Option(min=1.0, help="For how long --precision is waited for.")
    ] = 120.0,
    sustained: Annotated[
        float, typer.Option(min=0.0, help="Minutes of a further pass that shows what heat does.")
    ] = 0.0,
    cooldown: Annotated[
        float, typer.Option(min=0.0, help="Seconds of rest between two runs on a device.")
    ] = 0.0,
    max_battery_celsius: Annotated[
        float, typer.Option(help="A phone whose battery is hotter is waited for.")
    ] = 37.0,
    patience: Annotated[
        float, typer.Option(min=0.0, help="Seconds to wait for a hot phone.")
    ] = 600.0,
    rounds: Annotated[
        int,
        typer.Option(min=1, help="Records of each; bundles take turns, so noise hits all alike."),
    ] = 1,
    warmup: Annotated[int, typer.Option(min=0, help="Iterations before the timed ones.")] = 1,
    threads: Annotated[int, typer.Option(min=1, max=256)] = 2,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0, max=2**64 - 1, help="By default the reference's, whose picture is compared."
        ),
    ] = None,
    cache: Annotated[bool, typer.Option(help="Keep packed weights in files.")] = True,
    first_ever: Annotated[
        bool, typer.Option(help="Also measure a start without packed weights.")
    ] = True,
    min_psnr: Annotated[
        float | None,
        typer.Option(
            help="A picture further from the reference, in dB, is wrong; by default 3 dB less "
            "than the export measured, at most 40."
        ),
    ] = None,
    timeout: Annotated[
        float,
        typer.Option(
            min=1.0, help="Seconds for each process, besides those it is asked to go on for."
        ),
    ] = 3600.0,
    records_file: Annotated[
        Path, typer.Option("--records", help="JSON Lines file that records are appended to.")
    ] = Path("records.jsonl"),
    json_output: Annotated[bool, typer.Option("--json", help="Print the records.")] = False,
) -> None:
    """Measure latency and peak memory of bundles on devices.

    Each record takes three processes: one without packed weights (ever: from its start to its
    first picture), one for the times (cold: the same with packed weights; first: its first
    picture alone), one for memory. A picture that is not the reference's fails: exit code 1.
    A hot phone is waited for; if it stays hot, its record is marked throttled.

    \b
    handheld bench build/critter
    handheld bench build/a build/b --residency resident,stream --iterations 20 --json
    handheld bench build/critter --min-seconds 60 --records runs/critter.jsonl
    handheld bench build/base build/new --rounds 30 --min-seconds 2
    handheld bench build/critter --memory-budget 300 --dry-run
    handheld bench build/critter --device android --precision 0.02 --sustained 10
    """  # noqa: D301
    modes = _residencies(residency)
    budget = None if memory_budget is None else round(memory_budget * 1e6)
    if budget is not None and modes != ["resident"]:
        raise UsageError("--memory-budget decides the residency", remedy="leave out --residency")
    for option, value in (
        ("--min-seconds", min_seconds),
        ("--timeout", timeout),
        ("--min-psnr", min_psnr),
        ("--precision", precision),
        ("--max-seconds", max_seconds),
        ("--sustained", sustained),
        ("--cooldown", cooldown),
        ("--patience", patience),
        ("--max-battery-celsius", max_battery_celsius),
    ):
        if value is not None and not math.isfinite(value):
            raise UsageError(f"'{value}' is not a number of this kind", field=option)
    if precision is not None and not 0 < precision <= 1:
        raise UsageError("is not in 0 to 1", field="--precision", remedy="for 2 %, say 0.02")
    opened = [Bundle.open(path) for path in bundles]
    if dry_run:
        if budget is None:
            raise UsageError("--dry-run plans a --memory-budget", remedy="say how many MB")
        _print_plans(opened, size, budget, cache, json_output)
        return
    chosen = devices.find(device)
    done: list[RunRecord] = []
    console = Console(stderr=True)
    if any(d.kind == "host" for d in chosen):
        announce_build(console)
    used: set[str] = set()

    def keep(record: RunRecord) -> None:
        records.append(records_file, record)
        done.append(record)

    stopped: HandheldError | KeyboardInterrupt | None = None
    try:
        series = records.new_id()
        turns = [*itertools.product(opened, chosen, modes)]
        for index, (bundle, one, mode) in (
            # Every other round the other way round, so that none always comes first.
            (i, turn)
            for i in range(rounds)
            for turn in (turns[::-1] if i % 2 else turns)
        ):
            options = bench_.Options(
                size=size,
                residency=mode,
                memory_budget=budget,
                threads=threads,
                warmup=warmup,
                iterations=iterations,
                min_seconds=min_seconds,
                precision=precision,
                max_seconds=max_seconds,
                sustained_s=60 * sustained,
                gate=Gate(
                    max_battery_celsius=max_battery_celsius,
                    patience_s=patience,
                ),
                seed=seed,
                cache=cache,
                first_ever=first_ever,
                timeout_s=timeout,
                min_psnr_db=min_psnr,
            )
            if one.id in used:
                time.sleep(cooldown)
            used.add(one.id)
            title = f"{bundle.manifest.model.id} on {one.id}, {memory_budget or mode}"
            with _Bar(console, title, iterations + warmup) as bar:
                bench_.run(
                    bundle,
                    one,
                    options,
                    command=("handheld", *(shlex.quote(a) for a in sys.argv[1:])),
                    turn=records.Round(series=series, index=index) if rounds > 1 else None,
                    progress=bar.see,
                    notice=bar.say,
                    keep=keep,
                )
    except (HandheldError, KeyboardInterrupt) as error:
        stopped = error
    if json_output:
        _print_json(done, stopped)
    elif done:
        _print(done)
        console.print(f"records: {records_file}", soft_wrap=True)
    if stopped:
        raise stopped
    failed = [r for r in done if r.status != "ok"]
    if failed and not json_output:
        raise GateError(
            f"{len(failed)} of {len(done)} runs failed: {failed[0].error}", path=records_file
        )
    if failed:
        raise typer.Exit(1)


def _print_plans(
    opened: list[Bundle], size: str | None, budget: int, packed: bool, json_output: bool
) -> None:
    """Print what would stay in memory, without running anything."""
    plans = [(b, plan_bundle(b.manifest, b.size(size)[0], budget, packed=packed)) for b in opened]
    if json_output:
        print_json({"plans": [{"bundle": b.sha256, **plan.to_json()} for b, plan in plans]})
        return
    for bundle, plan in plans:
        typer.echo(
            f"{bundle.path}: {len(plan.resident)} artifacts stay, {len(plan.streamed)} are "
            f"streamed{'' if plan.prefetch else ' without prefetch'}; at most "
            f"{megabytes(plan.peak_bytes)} of {megabytes(budget)} MB"
        )
        for mode, names in (("stay", plan.resident), ("stream", plan.streamed)):
            typer.echo(f"  {mode}: {', '.join(names) or '-'}")


def _print_json(done: list[RunRecord], stopped: HandheldError | KeyboardInterrupt | None) -> None:
    """Print one object, whatever happened; an error before any record is left to be reported."""
    shown: dict[str, Any] = {"records": [r.to_json() for r in done]}
    if isinstance(stopped, HandheldError):
        if not done:
            raise stopped
        shown["error"] = stopped.as_dict()
    print_json(shown)
    if isinstance(stopped, HandheldError):
        raise typer.Exit(stopped.exit_code)
    if stopped:
        raise typer.Exit(130)


def _residencies(text: str) -> list[Residency]:
    known: tuple[Residency, ...] = get_args(Residency)
    wanted = list(dict.fromkeys(part.strip() for part in text.split(",")))
    for part in wanted:
        if part not in known:
            raise UsageError(
                f"'{part}' is not a residency", field="--residency", remedy=f"use {known}"
            )
    return [mode for mode in known if mode in wanted]


class _Bar:
    """Progress on the terminal."""

    def __init__(self, console: Console, title: str, iterations: int) -> None:
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[last]}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._title = title
        self._iterations = iterations
        self._task = self._bar.add_task(title, total=None, last="")

    def __enter__(self) -> _Bar:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """Show what goes on between passes."""
        self._bar.reset(self._task, total=None, description=text, last="")

    def see(self, purpose: str, event: Event | None) -> None:
        """Show where the run is."""
        if event is None:
            total = self._iterations if purpose == "latency" else 1
            self._bar.reset(
                self._task, total=total, description=f"{self._title}: {purpose}", last=""
            )
        elif isinstance(event, Iteration):
            self._bar.update(self._task, advance=1, last=f"{event.total_ms:.0f} ms")


def _print(done: list[RunRecord]) -> None:
    console, notes = Console(), Console(stderr=True)
    groups: dict[tuple[str, str, str], list[RunRecord]] = {}
    for record in done:
        key = (record.bundle.sha256, record.bundle.size, record.device.id)
        groups.setdefault(key, []).append(record)
    console.print("times in ms, memory in MB (10^6 bytes), spread is p5 to p95", highlight=False)
    for records_ in groups.values():
        facts = records_[0].bundle
        table = Table(
            title=f"{facts.model} {facts.target} {facts.precision}, {facts.size}, "
            f"on {records_[0].device.id}",
            title_justify="left",
            box=SIMPLE_HEAD,
            pad_edge=False,
            padding=(0, 1, 0, 0),
        )
        for name in _COLUMNS:
            justify: Literal["left", "right"] = "left" if name in ("residency", "") else "right"
            table.add_column(name, justify=justify, overflow="fold")
        for record in records_:
            table.add_row(*_row(record))
        console.print(table)
    for record in done:
        for reason in record.noisy:
            notes.print(f"noisy: {record.id}: {reason}", markup=False, soft_wrap=True)


_COLUMNS = (
    "residency", "median", "spread", "first", "cold", "ever", "peak", "anon", "PSNR", "",
)  # fmt: skip


def _row(record: RunRecord) -> list[str]:
    figures: dict[str, Any] = record.summary()
    spread = "-"
    if figures["p5_ms"] is not None:
        spread = f"{milliseconds(figures['p5_ms'])}-{milliseconds(figures['p95_ms'])}"
    flags: list[str] = [record.status] if record.status != "ok" else []
    flags += ["noisy"] * bool(record.noisy) + ["throttled"] * bool(record.throttled)
    return [
        record.settings.mode,
        milliseconds(figures["median_ms"]),
        spread,
        milliseconds(figures["first_ms"]),
        milliseconds(figures["cold_start_ms"]),
        milliseconds(figures["first_ever_ms"]),
        megabytes(figures["peak_rss"]),
        megabytes(record.memory.anon if record.memory else None),
        "-" if record.check is None else f"{record.check.psnr_db:.1f}",
        ", ".join(flags) or "ok",
    ]
