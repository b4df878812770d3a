"""Run records: what one benchmark run saw, complete enough to be believed later.

Records hold raw figures; medians and the like are computed from them whenever they are
wanted. A file of records is JSON Lines that is only ever appended to.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import numpy as np
from pydantic import AwareDatetime, Field, ValidationError

from handheld.bundle import describe_validation
from handheld.errors import RecordError
from handheld.files import describe_os_error, fsync_folder, output_errors
from handheld.manifest import Sha256
from handheld.program import Model
from handheld.protocol import (
    Hello,
    Iteration,
    Load,
    Memory,
    Output,
    Plan,
    Residency,
    Thermal,
)

RECORD_VERSION: Final = 1
INTERRUPTED: Final = "interrupted"
"""The error of a run that was cut short by who started it."""
NOISY_SPREAD = 0.10
"""A record whose p5 to p95 is wider than this part of its median is noisy."""
NOISY_LOAD = 0.25
"""So is one before or after which other processes used more than this part of the cores."""
NOISY_OTHERS = 0.10
"""So is one during which they used more than this part."""
NOISY_MEDIAN = 0.025
"""With times enough to tell, a record is noisy whose median is not known to this part, instead of
one of wide spread: short disturbances widen the spread and leave the median alone."""
_BLOCKS = 10
_LONG = 10 * _BLOCKS
_STUDENT = 2.262157
"""Student's t of 97.5 % with nine degrees of freedom."""


class DeviceFacts(Model):
    """What a device is. Names no host, user or serial number."""

    id: str
    """Stable for one device, and says nothing about its owner."""
    kind: Literal["host", "android", "ios"]
    model: str | None = None
    cpu: str | None = None
    soc: str | None = None
    arch: str | None = None
    cores: int | None = None
    """Cores that the harness may use."""
    ram_bytes: int | None = None
    free_bytes: int | None = None
    """Free space where bundles and caches are kept."""
    os: str | None = None
    os_build: str | None = None
    engines: dict[str, str] = {}
    harness: str | None = None
    """Which build of the harness it runs, where there are several."""
    transport: str | None = None
    """The program that reaches it, with its version."""


class Transfer(Model):
    """What was sent to a device before the run."""

    files: int = 0
    bytes: int = 0
    kept_files: int = 0
    """Files that were there already."""
    kept_bytes: int = 0


class Heat(Model):
    """Thermal state and load at one moment; null where the platform does not tell."""

    status: Annotated[int, Field(ge=0, le=6)] | None = None
    """Android's scale: 0 none to 6 shutdown."""
    celsius: float | None = None
    """The hottest sensor."""
    battery_celsius: float | None = None
    battery_percent: Annotated[float, Field(ge=0, le=100)] | None = None
    charging: bool | None = None
    charge_uah: int | None = None
    """What the battery holds, in microampere-hours."""
    battery_mv: int | None = None
    throttle_events: int | None = None
    """Times the processor throttled since it was started."""
    busy: Annotated[float, Field(ge=0, le=1)] | None = None
    """Part of all cores that was in use over a moment, before or after the run."""


class GateFigures(Model):
    """How the device was waited for before the run."""

    waited_s: Annotated[float, Field(ge=0)] = 0.0
    passed: bool
    """Whether it was fit in the end."""
    waited_for: tuple[str, ...] = ()
    """What was wrong at first."""
    reasons: tuple[str, ...] = ()
    """What was still wrong when the run began."""
    too_hot: bool = False


class HeatSample(Model):
    """Thermal state during a run."""

    t_s: float
    """Seconds since the pass was started."""
    heat: Heat


class BundleFacts(Model):
    """Which bundle was run."""

    sha256: Sha256
    model: str
    target: str
    precision: str
    size: str
    steps: int
    bytes: int


class Settings(Model):
    """How it was run."""

    residency: Residency
    memory_budget: int | None = None
    """Bytes; where given, it decided what was resident and what was streamed."""
    prefetch: bool = True
    threads: int
    seed: int
    warmup: int
    iterations: int
    min_seconds: float
    precision: float | None = None
    max_seconds: float | None = None
    sustained_s: float | None = None
    inputs: Literal["reference", "prefetched"] = "reference"
    cache: bool = True
    """Whether packed weights were kept in files."""

    @property
    def mode(self) -> str:
        """How weights were held, in a word: a residency, or the budget that decided."""
        if self.memory_budget is None:
            return self.residency
        return f"within {self.memory_budget / 1e6:.0f} MB"


class Pass(Model):
    """One process of the harness, from start to end."""

    purpose: Literal["first-ever", "latency", "memory", "sustained", "diagnosis"]
    """``first-ever`` starts without packed weights, the others find them."""
    started: AwareDatetime
    finished: AwareDatetime
    spawn_to_hello_ms: float | None = None
    spawn_to_first_ms: float | None = None
    """From starting the process to the end of its first iteration."""
    hello: Hello | None = None
    plan: Plan | None = None
    """Of a run within a memory budget."""
    loads: tuple[Load, ...] = ()
    iterations: tuple[Iteration, ...] = ()
    memory: tuple[Memory, ...] = ()
    thermal: tuple[Thermal, ...] = ()
    outputs: tuple[Output, ...] = ()
    heat: tuple[HeatSample, ...] = ()
    others: Annotated[float, Field(ge=0)] | None = None
    """Part of all cores that other processes used meanwhile; null where nobody tells."""
    done: bool = False
    error: str | None = None

    def milliseconds(self, kind: Literal["first", "warmup", "timed"]) -> list[float]:
        """Return the total time of every iteration of one kind."""
        return [i.total_ms for i in self.iterations if i.kind == kind]

    @property
    def load_ms(self) -> float:
        """Sum over artifacts of the time of their first load."""
        first: dict[str, float] = {}
        for load in self.loads:
            first.setdefault(load.artifact, load.ms)
        return sum(first.values())


class MemoryFigures(Model):
    """Peak memory of the run, in bytes; null where it was not measured."""

    separate_pass: bool
    """Whether the process did nothing but this."""
    peak_rss: int | None = None
    """High-water mark of the resident set, from process start to end."""
    anon: int | None = None
    """Largest anonymous part that an event saw."""
    file: int | None = None
    """Largest file-backed part that an event saw: clean pages the system may take back."""
    swap: int | None = None
    base_rss: int | None = None
    """Resident set before any engine was touched; part of ``peak_rss``."""
    activations: int | None = None
    dma_buf: int | None = None
    phys_footprint: int | None = None
    not_counted: tuple[str, ...] = ()
    """Kinds of memory that the figures above leave out."""


class Check(Model):
    """The picture compared with the bundle's reference."""

    sha256: Sha256
    reference_sha256: Sha256
    snr_db: float
    psnr_db: float
    max_abs_error: int
    device_psnr_db: float | None = None
    """The same as ``psnr_db``, computed on the device itself."""
    first_wrong: str | None = None
    """Of a wrong picture, the first segment that went wrong, if that could be found out."""
    min_psnr_db: float
    """Below this the picture is wrong."""

    @property
    def matches(self) -> bool:
        """Whether the picture is the reference's, but for rounding."""
        return self.psnr_db >= self.min_psnr_db


class Round(Model):
    """Runs of one round were made one after the other: what disturbs one disturbs the others."""

    series: Annotated[str, Field(min_length=1, max_length=64)]
    """Of one command."""
    index: Annotated[int, Field(ge=0)]


class RunRecord(Model):
    """What one benchmark run of one bundle, size and setting saw on one device."""

    record_version: Literal[1] = RECORD_VERSION
    id: str
    status: Literal["ok", "failed", "partial"]
    """``failed``: an error, or a wrong picture; ``partial``: it was cut short."""
    error: str | None = None
    started: AwareDatetime
    finished: AwareDatetime
    handheld: str
    command: tuple[str, ...]
    device: DeviceFacts
    bundle: BundleFacts
    settings: Settings
    round: Round | None = None
    """Null where bundles did not take turns."""
    transfer: Transfer | None = None
    """Null where nothing has to be sent, and where it could not be."""
    passes: tuple[Pass, ...] = ()
    memory: MemoryFigures | None = None
    gate: GateFigures | None = None
    heat_start: Heat | None = None
    heat_end: Heat | None = None
    placement: dict[str, dict[str, int]] | None = None
    """Per artifact, operations by compute unit; what a delegate took counts once a call, under its
    name."""
    placement_note: str | None = None
    """Why ``placement`` is null, or what it counts instead of operations."""
    battery_drop_percent: float | None = None
    energy_j_per_picture: float | None = None
    """From the battery's charge counter over the sustained pass; null while it charges."""
    check: Check | None = None
    """Null where the inputs were not the reference's."""
    noisy: tuple[str, ...] = ()
    """Reasons not to trust the times; empty if none."""
    throttled: bool | None = None
    """Null where the platform does not tell."""

    def latency(self) -> Pass | None:
        """Return the pass whose times count."""
        return next((p for p in self.passes if p.purpose == "latency"), None)

    def summary(self) -> dict[str, float | int | bool | str | None]:
        """Return the figures that tables show, computed from the raw ones."""
        latency = self.latency()
        timed = latency.milliseconds("timed") if latency else []
        first = latency.milliseconds("first") if latency else []
        ever = next((p for p in self.passes if p.purpose == "first-ever"), None)
        stats = statistics(timed)
        sustained = next((p for p in self.passes if p.purpose == "sustained"), None)
        curve = [ms for _, ms in sustained_curve(sustained)] if sustained else []
        return {
            "median_ms": stats.median if stats else None,
            "min_ms": min(timed, default=None),
            "p5_ms": stats.p5 if stats else None,
            "p95_ms": stats.p95 if stats else None,
            "spread": stats.spread if stats else None,
            "precision": median_uncertainty(timed),
            "timed": len(timed),
            "first_ms": first[0] if first else None,
            "load_ms": latency.load_ms if latency else None,
            "cold_start_ms": latency.spawn_to_first_ms if latency else None,
            "first_ever_ms": ever.spawn_to_first_ms if ever else None,
            "drift": drift(timed),
            "peak_rss": self.memory.peak_rss if self.memory else None,
            "sustained_start_ms": curve[0] if curve else None,
            "sustained_end_ms": curve[-1] if curve else None,
            "matches": self.check.matches if self.check else None,
            "psnr_db": self.check.psnr_db if self.check else None,
        }

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON values, with its :meth:`summary`."""
        return {**self.model_dump(mode="json"), "summary": self.summary()}


@dataclass(frozen=True)
class Statistics:
    """Median and spread of times."""

    median: float
    p5: float
    p95: float

    @property
    def spread(self) -> float:
        """Width of p5 to p95 as part of the median."""
        return (self.p95 - self.p5) / self.median if self.median else 0.0


def statistics(values: list[float]) -> Statistics | None:
    """Return median, p5 and p95 (linearly interpolated), or None of nothing."""
    if not values:
        return None
    p5, median, p95 = (float(v) for v in np.percentile(values, [5, 50, 95]))
    return Statistics(median, p5, p95)


def median_uncertainty(values: list[float]) -> float | None:
    """Return half the width of the median's 95 % confidence interval, as part of the median.

    By order statistics, so that no distribution is assumed; None below six values. The
    harness stops by the same rule.
    """
    n = len(values)
    if n < 6:
        return None
    ordered = sorted(values)
    spread = 1.959964 * math.sqrt(n)
    low = max(0, math.floor((n - spread) / 2))
    high = min(n - 1, math.ceil((n + spread) / 2))
    median = float(np.median(ordered))
    return max(median - ordered[low], ordered[high] - median) / median if median > 0 else None


def sustained_curve(item: Pass, bin_s: float = 30.0) -> list[tuple[float, float]]:
    """Return (seconds since the first timed run, median milliseconds) for every bin of time."""
    timed = [i for i in item.iterations if i.kind == "timed"]
    if not timed:
        return []
    start = timed[0].t_ms - timed[0].total_ms
    bins: dict[int, list[float]] = {}
    for iteration in timed:
        bins.setdefault(int((iteration.t_ms - start) / 1000 / bin_s), []).append(iteration.total_ms)
    return [(index * bin_s, float(np.median(values))) for index, values in sorted(bins.items())]


def drift(values: list[float]) -> float | None:
    """Return by which part the last third is slower than the first third."""
    third = len(values) // 3
    if third == 0:
        return None
    return float(np.median(values[-third:]) / np.median(values[:third]) - 1)


def block_uncertainty(values: list[float]) -> float | None:
    """Return how uncertain a median is, as part of it, where times depend on those before them.

    A machine is slow or fast for a while, so neighbours are alike and the interval of
    :func:`median_uncertainty` is too narrow. Medians of ten blocks of neighbours are nearly
    independent (batch means; Law and Kelton, *Simulation Modeling and Analysis*, chapter 9). In
    long runs, from 100 values on, they are nearly normal, too: Student's interval, with 95 %. In
    shorter ones their second and ninth bound the median, with 98 %. Returns half the width; None
    below 20 values.
    """
    if len(values) < 2 * _BLOCKS:
        return None
    medians = sorted(float(np.median(b)) for b in np.array_split(np.asarray(values), _BLOCKS))
    middle = float(np.median(values))
    if middle <= 0:
        return None
    if len(values) >= _LONG:
        return _STUDENT * float(np.std(medians, ddof=1)) / math.sqrt(_BLOCKS) / middle
    return (medians[-2] - medians[1]) / 2 / middle


def noise_reasons(
    timed: list[float],
    start: Heat | None,
    end: Heat | None = None,
    others: float | None = None,
) -> tuple[str, ...]:
    """Return the reasons not to trust the times of a run.

    Parameters
    ----------
    timed : list of float
        Milliseconds of the timed iterations, in order.
    start, end : Heat, optional
        The device's state before and after.
    others : float, optional
        Part of all cores that other processes used meanwhile.
    """
    reasons = []
    stats = statistics(timed)
    uncertain = block_uncertainty(timed)
    if uncertain is not None:
        if uncertain > NOISY_MEDIAN:
            reasons.append(f"the median is known to {uncertain:.1%} only")
    elif stats and stats.spread > NOISY_SPREAD:
        reasons.append(f"p5 to p95 spans {stats.spread:.0%} of the median")
    change = drift(timed)
    if change is not None and abs(change) > NOISY_SPREAD:
        reasons.append(f"the last third is {change:+.0%} against the first")
    if others is not None and others > NOISY_OTHERS:
        reasons.append(f"other processes used {others:.0%} of the cores meanwhile")
    for heat, when in ((start, "before the start"), (end, "after the end")):
        if heat and heat.busy is not None and heat.busy > NOISY_LOAD:
            reasons.append(f"other processes used {heat.busy:.0%} of the cores {when}")
    return tuple(reasons)


def new_id(now: datetime | None = None) -> str:
    """Return a record id that sorts by time."""
    return f"{now or datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(4)}"


def append(path: str | Path, record: RunRecord) -> None:
    """Append a record to a file, durably.

    Raises
    ------
    OutputError
        If the file cannot be written.
    """
    line = json.dumps(record.to_json(), ensure_ascii=False, allow_nan=False) + "\n"
    target = Path(path)
    with output_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        is_new = not target.exists()
        with target.open("a+b") as f:
            fcntl.flock(f, fcntl.LOCK_EX)
            if f.tell() and _last_byte(target) != b"\n":
                # What was cut off mid-line stays a line of its own, which readers skip.
                line = "\n" + line
            f.write(line.encode())
            f.flush()
            os.fsync(f.fileno())
        if is_new:
            fsync_folder(target.absolute().parent)


def _last_byte(path: Path) -> bytes:
    with path.open("rb") as f:
        f.seek(-1, os.SEEK_END)
        return f.read(1)


def read(path: str | Path) -> list[RunRecord]:
    """Read a file of records, without the lines that were cut off while written.

    Raises
    ------
    RecordError
        If the file cannot be read, or a whole line is not a record.
    """
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        message, remedy = describe_os_error(error)
        raise RecordError(f"cannot read: {message}", path=path, remedy=remedy) from None
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            tree = json.loads(line)
        except (ValueError, RecursionError):
            # Only a whole line ends in a brace and is valid JSON.
            continue
        records.append(parse(tree, f"{path}:{number}"))
    return records


def parse(tree: Any, path: str | Path) -> RunRecord:
    """Validate one record.

    Raises
    ------
    RecordError
        If it is none.
    """
    if not isinstance(tree, dict) or type(tree.get("record_version")) is not int:
        raise RecordError("is not a run record", path=path, field="record_version")
    if tree["record_version"] > RECORD_VERSION:
        raise RecordError(
            "was made by a newer handheld",
            path=path,
            field="record_version",
            remedy="upgrade: pip install --upgrade handheld",
        )
    raw = {k: v for k, v in tree.items() if k != "summary"}
    try:
        return RunRecord.model_validate_json(json.dumps(raw))
    except ValidationError as error:
        message, field = describe_validation(error)
        raise RecordError(message, path=path, field=field) from None
