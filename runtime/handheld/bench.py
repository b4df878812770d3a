"""Benchmarks: latency and memory of bundles on devices, as run records.

A record is made of three processes of the harness. The first finds no packed weights
(first-ever), the second measures times, the third does nothing but show its memory. A fourth
may run for minutes, to show what heat does (sustained). docs/benchmark-protocol.md has the rules.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from safetensors.numpy import save_file

from handheld import __version__, diagnose
from handheld.bundle import Bundle
from handheld.devices.base import Device, Place
from handheld.errors import (
    BundleError,
    DeviceBusyError,
    DeviceError,
    GateError,
    HandheldError,
    HarnessError,
    UsageError,
    unexpected,
)
from handheld.files import output_errors, weights_cache
from handheld.manifest import Size
from handheld.memory_plan import plan_bundle
from handheld.placement import placement, unit
from handheld.program import Model
from handheld.protocol import (
    Done,
    Event,
    Hello,
    Iteration,
    Job,
    Load,
    Memory,
    Output,
    Plan,
    Residency,
    TensorFile,
    Thermal,
)
from handheld.records import (
    INTERRUPTED,
    BundleFacts,
    Check,
    DeviceFacts,
    Heat,
    HeatSample,
    MemoryFigures,
    Pass,
    Round,
    RunRecord,
    Settings,
    new_id,
    noise_reasons,
)
from handheld.release.manifest import Unit
from handheld.thermal_gate import Gate, wait

MIN_PSNR_DB = 30.0
"""What a picture must reach where the bundle does not say what its export reached."""
MOST_PSNR_DB = 40.0
"""Engines round differently on other processors, so no more is asked for."""
ALLOWED_DB = 3.0
"""How much worse than its export a bundle may be."""
CAP_DB = 999.0
WATCH_S = 2.0
"""Between two looks at a phone's heat while it is measured; a look is one request to the phone."""
SAMPLE_S = 30.0
"""How often a sustained pass looks at the device's heat."""
Purpose = Literal["first-ever", "latency", "memory", "sustained", "diagnosis"]


class Timing(Model):
    """How often and how long a bundle is run; what a fleet's matrix may say, too."""

    threads: Annotated[int, Field(ge=1, le=256)] = 2
    warmup: Annotated[int, Field(ge=0)] = 1
    iterations: Annotated[int, Field(ge=1)] = 5
    min_seconds: Annotated[float, Field(ge=0)] = 0.0
    """Timed iterations go on until this has passed as well."""
    precision: Annotated[float, Field(gt=0, le=1)] | None = None
    """And until half the width of the median's 95 % confidence interval is at most this part of
    it, or ``max_seconds`` have passed."""
    max_seconds: Annotated[float, Field(gt=0)] = 120.0
    cache: bool = True
    """Keep packed weights in files."""
    first_ever: bool = True
    """Also measure a start without packed weights."""
    timeout_s: Annotated[float, Field(gt=0)] | None = 3600.0
    """Of each process, besides the time that it was asked to go on for."""
    min_psnr_db: float | None = None
    """A picture further than this from the reference is wrong; None takes
    :func:`expected_psnr`."""


class Options(Timing):
    """How to run a bundle."""

    size: str | None = None
    """Key of the manifest's sizes; None takes the default one."""
    residency: Residency = "resident"
    memory_budget: Annotated[int, Field(ge=1)] | None = None
    """Bytes; decides what stays and what is streamed, instead of ``residency``."""
    sustained_s: Annotated[float, Field(ge=0)] = 0.0
    """Length of a sustained pass in seconds; 0 makes none."""
    gate: Gate = Gate()
    """What the device must be like before it is measured."""
    seed: int | None = None
    """None takes the reference's, whose picture is then compared."""

    def settings(self, seed: int, inputs: Literal["reference", "prefetched"]) -> Settings:
        """Return what a record says of them."""
        return Settings(
            residency=self.residency,
            memory_budget=self.memory_budget,
            threads=self.threads,
            seed=seed,
            warmup=self.warmup,
            iterations=self.iterations,
            min_seconds=self.min_seconds,
            precision=self.precision,
            max_seconds=None if self.precision is None else self.max_seconds,
            sustained_s=self.sustained_s or None,
            inputs=inputs,
            cache=self.cache,
        )


Progress = Callable[[Purpose, Event | None], None]
"""Told of a pass when it starts (None) and of every event in it."""
Notice = Callable[[str], None]
"""Told in words what goes on between passes: files on their way, a hot device waited for."""


def run(
    bundle: Bundle,
    device: Device,
    options: Options,
    *,
    command: tuple[str, ...] = (),
    turn: Round | None = None,
    progress: Progress = lambda purpose, event: None,
    notice: Notice = lambda text: None,
    keep: Callable[[RunRecord], None] = lambda record: None,
) -> RunRecord:
    """Run a bundle on a device and return what was seen.

    Whatever happens once the device is being prepared, ``keep`` is told the record, complete or
    not: one of a device that went away or filled up before anything was run has no passes. A
    KeyboardInterrupt, and an exception that nobody expected, is raised again.

    Raises
    ------
    UsageError
        If the bundle has nothing to run with.
    HarnessError, DeviceError
        If the device cannot run bundles at all, or lacks this one's engine.
    """
    size_name, size = bundle.size(options.size)
    facts = device.facts()
    _check_engines(bundle, facts)
    if options.memory_budget is not None:
        if device.kind == "ios":
            raise UsageError(
                "is for harnesses that keep packed weights in files, which those of iPhones do not",
                field="--memory-budget",
                remedy="choose --residency",
            )
        # Refused here rather than by the device.
        plan_bundle(bundle.manifest, size_name, options.memory_budget, packed=options.cache)

    def sending(name: str, done: int, total: int) -> None:
        notice(f"sending {done / 1e6:.0f} of {total / 1e6:.0f} MB: {name}")

    def waiting(reasons: list[str], seconds: float) -> None:
        notice(f"waiting for {device.id}, {seconds:.0f} s: {', '.join(reasons)}")

    def record(given: _Given, started: datetime, **seen: Any) -> RunRecord:
        return RunRecord(
            id=new_id(started),
            started=started,
            finished=datetime.now(UTC),
            handheld=__version__,
            command=command,
            bundle=BundleFacts(
                sha256=bundle.sha256,
                model=bundle.manifest.model.id,
                target=bundle.manifest.target,
                precision=bundle.manifest.precision,
                size=size_name,
                steps=bundle.manifest.model.steps,
                bytes=bundle.nbytes,
            ),
            settings=options.settings(given.seed, given.source),
            round=turn,
            **seen,
        )

    with (
        _inputs(bundle, size_name, size, options) as given,
        contextlib.ExitStack() as held,
    ):
        started = datetime.now(UTC)
        try:
            place = held.enter_context(device.prepare(bundle, sending))
            if device.kind == "ios":
                # Only its app, which has run by now, tells what is in the phone.
                facts = device.facts()
                _check_engines(bundle, facts)
            heat_start, gate = wait(options.gate, device.heat, waiting=waiting)
        except DeviceBusyError:
            raise
        except DeviceError as error:
            keep(record(given, started, status="failed", error=str(error), device=facts))
            raise
        attempt = _Attempt(bundle, device, place, options, size_name, given, progress)
        started = datetime.now(UTC)
        status: Literal["ok", "failed", "partial"] = "ok"
        said: str | None = None
        raised: BaseException | None = None
        try:
            attempt.run()
        except HandheldError as e:
            status, said = "failed", str(e)
            if any(p.iterations for p in attempt.passes) and not isinstance(e, GateError):
                status = "partial"
        except BaseException as e:  # raised again once the record is kept
            raised = e
            status = "partial"
            said = INTERRUPTED if isinstance(e, KeyboardInterrupt) else unexpected(e)
        heat_end = _heat(device)
        check = attempt.check
        if status == "ok" and check is not None and not check.matches:
            status = "failed"
            said = f"the picture is wrong: {check.psnr_db:.1f} dB from the reference"
            if check.first_wrong:
                said += f"; {check.first_wrong}"
        hello = next((p.hello for p in attempt.passes if p.hello), None)
        if hello is not None:
            facts = facts.model_copy(update={"engines": hello.engines})
        latency = next((p for p in attempt.passes if p.purpose == "latency"), None)
        placed, note = placement(bundle, size_name, attempt.passes)
        seen = record(
            given,
            started,
            status=status,
            error=said,
            device=facts,
            transfer=place.transfer,
            passes=tuple(attempt.passes),
            memory=_memory(attempt.passes, unit(bundle)),
            gate=gate,
            heat_start=heat_start,
            heat_end=heat_end,
            placement=placed,
            placement_note=note,
            battery_drop_percent=_battery_drop(heat_start, heat_end),
            energy_j_per_picture=attempt.energy,
            check=check,
            noisy=noise_reasons(
                latency.milliseconds("timed") if latency else [],
                heat_start,
                heat_end,
                latency.others if latency else None,
            ),
            throttled=gate.too_hot or _throttled(attempt.passes, heat_start, heat_end),
        )
    keep(seen)
    if raised is not None:
        raise raised
    return seen


def _check_engines(bundle: Bundle, facts: DeviceFacts) -> None:
    """Refuse what would not start. A device that does not tell its engines finds out itself."""
    wanted = {a.engine for a in bundle.manifest.artifacts}
    if facts.engines and (missing := sorted(wanted - set(facts.engines))):
        raise HarnessError(
            f"wants engine '{missing[0]}', which the harness on '{facts.id}' lacks",
            path=bundle.path,
            field="artifacts",
            remedy=f"it has {', '.join(sorted(facts.engines))}: export for a target that uses it, "
            "or run `handheld doctor`",
        )


def expected_psnr(bundle: Bundle, size: str) -> float:
    """Return what PSNR a size's picture must have against its reference."""
    measured = bundle.manifest.verification_of(size).psnr_db
    return MIN_PSNR_DB if measured is None else min(measured - ALLOWED_DB, MOST_PSNR_DB)


def compare(
    picture: NDArray[np.uint8], reference: NDArray[np.uint8], min_psnr_db: float = MIN_PSNR_DB
) -> Check:
    """Compare a picture with the bundle's reference.

    Raises
    ------
    BundleError
        If their sizes differ.
    """
    if picture.size != reference.size:
        raise BundleError(f"the picture has {picture.size} bytes, the reference {reference.size}")
    ours, theirs = picture.ravel().astype(np.float64), reference.ravel().astype(np.float64)
    squares = float(((ours - theirs) ** 2).sum())

    def decibels(signal: float) -> float:
        if squares == 0.0:
            return CAP_DB
        return float(min(CAP_DB, 10 * np.log10(signal / squares))) if signal else -CAP_DB

    return Check(
        sha256=_digest(picture),
        reference_sha256=_digest(reference),
        snr_db=decibels(float((theirs**2).sum())),
        psnr_db=decibels(255.0**2 * ours.size),
        max_abs_error=int(np.abs(ours - theirs).max()),
        min_psnr_db=min_psnr_db,
    )


def _digest(picture: NDArray[np.uint8]) -> str:
    return hashlib.sha256(np.ascontiguousarray(picture).tobytes()).hexdigest()


@dataclass(frozen=True)
class _Given:
    """What the program is run with."""

    inputs: dict[str, TensorFile]
    seed: int
    source: Literal["reference", "prefetched"]
    picture: NDArray[np.uint8] | None
    """What must come out, if that is known."""
    expect: TensorFile | None = None
    """Where that is."""


@contextmanager
def _inputs(bundle: Bundle, size_name: str, size: Size, options: Options) -> Iterator[_Given]:
    reference = bundle.manifest.reference_of(size_name)
    if reference is not None:
        path = str(bundle.file(reference.file))
        seed = reference.seed if options.seed is None else options.seed
        picture = bundle.reference(size_name).get("picture") if seed == reference.seed else None
        yield _Given(
            inputs={
                item.name: TensorFile(path=path, tensor=f"input.{item.name}")
                for item in size.program.inputs
                if item.role != "noise"
            },
            seed=seed,
            source="reference",
            picture=picture,
            expect=None if picture is None else TensorFile(path=path, tensor="picture"),
        )
        return
    text = bundle.manifest.text
    if text.prefetched is None or not text.prefetched.prompts:
        raise UsageError(
            f"holds neither a reference for {size_name} nor prompts to run it with",
            path=bundle.path,
            remedy="export it with prompts",
        )
    found = bundle.prefetched(text.prefetched.prompts[0])
    assert found is not None
    tensors: dict[str, NDArray[Any]] = {}
    for item in size.program.inputs:
        value = {"prompt_embeds": found[0], "pooled": found[1]}.get(item.role)
        if item.role == "noise":
            continue
        if value is None:
            raise UsageError(
                f"nothing is known for the input '{item.name}'",
                path=bundle.path,
                remedy="bench a size that has a reference",
            )
        spec = size.program.tensors[item.name]
        tensors[item.name] = (
            np.zeros(spec.shape, spec.dtype)
            if item.negative
            else value.reshape(spec.shape).astype(spec.dtype)
        )
    with tempfile.TemporaryDirectory(prefix="handheld-") as folder:
        file = Path(folder) / "inputs.safetensors"
        with output_errors(file):
            save_file(tensors, file)
        yield _Given(
            inputs={name: TensorFile(path=str(file), tensor=name) for name in tensors},
            seed=options.seed or 0,
            source="prefetched",
            picture=None,
        )


@dataclass
class _Attempt:
    bundle: Bundle
    device: Device
    place: Place
    options: Options
    size: str
    given: _Given
    progress: Progress
    passes: list[Pass] = field(default_factory=list)
    check: Check | None = None
    energy: float | None = None

    def run(self) -> None:
        """Run all passes."""
        options = self.options
        cache = None
        if options.cache:
            cache = str(weights_cache(self.bundle.sha256, options.threads))
        if cache is not None and options.first_ever:
            self.place.forget_cache(cache)
            self._pass("first-ever", self._job(cache))
        with tempfile.TemporaryDirectory(prefix="handheld-") as name:
            output = Path(name) / "picture.raw"
            job = self._job(cache).model_copy(
                update={
                    "warmup": options.warmup,
                    "iterations": options.iterations,
                    "min_seconds": options.min_seconds,
                    "precision": options.precision,
                    "max_seconds": None if options.precision is None else options.max_seconds,
                    "output": str(output),
                    "expect": self.given.expect,
                }
            )
            self._pass("latency", job)
            self._compare(output)
        self._pass("memory", self._job(cache))
        digests = {o.sha256 for p in self.passes for o in p.outputs if o.role == "picture"}
        if len(digests) > 1:
            raise GateError(
                "one seed gave different pictures in different runs",
                path=self.bundle.path,
                remedy="report it: an engine is not deterministic",
            )
        if self.check is not None and not self.check.matches:
            self._diagnose(job)
        elif options.sustained_s:
            self._sustain(cache)

    def _job(self, cache: str | None) -> Job:
        return Job(
            bundle=str(self.bundle.path.resolve()),
            size=self.size,
            seed=self.given.seed,
            inputs=self.given.inputs,
            residency=self.options.residency,
            memory_budget=self.options.memory_budget,
            threads=self.options.threads,
            cache=cache,
            warmup=0,
            iterations=1,
            # Checked when the bundle was opened; here it would count as start-up time.
            verify_hashes=False,
        )

    def _diagnose(self, job: Job) -> None:
        assert self.check is not None
        # That it could not be found out is no reason to lose the run.
        with contextlib.suppress(HarnessError, DeviceError, BundleError):
            wrong = diagnose.find(self.bundle, job, lambda job: self._pass("diagnosis", job))
            if wrong is not None:
                self.check = self.check.model_copy(update={"first_wrong": str(wrong)})

    def _sustain(self, cache: str | None) -> None:
        before = self.device.heat()
        job = self._job(cache).model_copy(update={"min_seconds": self.options.sustained_s})
        self._pass("sustained", job)
        pictures = len(self.passes[-1].iterations)
        self.energy = energy_j(before, self.device.heat(), pictures)

    def _pass(self, purpose: Purpose, job: Job) -> None:
        self.progress(purpose, None)
        seen: dict[str, list[Any]] = {
            "loads": [],
            "iterations": [],
            "memory": [],
            "thermal": [],
            "outputs": [],
            "heat": [],
        }
        names = {
            Load: "loads",
            Iteration: "iterations",
            Memory: "memory",
            Thermal: "thermal",
            Output: "outputs",
        }
        values: dict[str, Any] = {}
        started, clock = datetime.now(UTC), time.monotonic()
        before = self.device.others_s()
        limit = self.options.timeout_s
        if limit is not None:
            limit += max(job.min_seconds, job.max_seconds or 0.0)
        events = self.place.run(job, limit)
        watch = _Watch(self.device, self._interval_s(purpose), seen["heat"])
        try:
            for received in events:
                event = received.event
                if (name := names.get(type(event))) is not None:
                    seen[name].append(event)
                if isinstance(event, Hello):
                    values.update(hello=event, spawn_to_hello_ms=received.since_spawn_ms)
                if isinstance(event, Plan):
                    values["plan"] = event
                if isinstance(event, Iteration):
                    values.setdefault("spawn_to_first_ms", received.since_spawn_ms)
                if isinstance(event, Done):
                    values["done"] = True
                self.progress(purpose, event)
            after, seconds = self.device.others_s(), time.monotonic() - clock
            if before is not None and after is not None:
                cores = os.cpu_count() or 1
                values["others"] = max(0.0, after - before) / (seconds * cores)
        except KeyboardInterrupt:
            values["error"] = "interrupted"
            raise
        except HandheldError as error:
            values["error"] = str(error)
            raise
        finally:
            events.close()
            watch.stop()
            self.passes.append(
                Pass(
                    purpose=purpose,
                    started=started,
                    finished=datetime.now(UTC),
                    **{k: tuple(v) for k, v in seen.items()},
                    **values,
                )
            )

    def _interval_s(self, purpose: Purpose) -> float | None:
        """Return how often to look at the device's heat, None for not at all."""
        if self.device.kind != "host":
            return WATCH_S
        # A computer counts its throttling itself, and to look costs it time.
        return SAMPLE_S if purpose == "sustained" else None

    def _compare(self, output: Path) -> None:
        if self.given.picture is None:
            return
        picture = np.fromfile(output, dtype=np.uint8) if output.is_file() else None
        if picture is None:
            raise BundleError("the harness wrote no picture", path=self.bundle.path)
        limit = self.options.min_psnr_db
        limit = expected_psnr(self.bundle, self.size) if limit is None else limit
        told = [o.psnr_db for p in self.passes for o in p.outputs if o.psnr_db is not None]
        self.check = compare(picture, self.given.picture, limit).model_copy(
            update={"device_psnr_db": told[-1] if told else None}
        )


class _Watch:
    """Looks at a device's heat while it is measured, again and again, and at the end.

    Parameters
    ----------
    device : Device
    interval_s : float or None
        None never looks.
    samples : list of HeatSample
        Where what was seen goes, with the seconds since the start.
    """

    def __init__(self, device: Device, interval_s: float | None, samples: list[Any]) -> None:
        self._device = device
        self._interval_s = interval_s
        self._samples = samples
        self._began = time.monotonic()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        if interval_s is not None:
            self._thread = threading.Thread(target=self._look_on, name="heat", daemon=True)
            self._thread.start()

    def _look_on(self) -> None:
        # Not at once, which would disturb the start that is being measured.
        while not self._stopped.wait(self._interval_s):
            self._look()
        self._look()

    def _look(self) -> None:
        # A device that went away is noticed by who runs on it.
        with contextlib.suppress(DeviceError):
            heat = self._device.glance()
            seconds = time.monotonic() - self._began
            if heat is not None:
                self._samples.append(HeatSample(t_s=round(seconds, 3), heat=heat))

    def stop(self) -> None:
        """Look once more, and stop."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()


def _memory(passes: list[Pass], used: Unit | None) -> MemoryFigures | None:
    chosen = next((p for p in passes if p.purpose == "memory" and p.done), None)
    separate = chosen is not None
    chosen = chosen or next((p for p in passes if p.memory), None)
    if chosen is None or not chosen.memory:
        return None

    def largest(name: str) -> int | None:
        values = [v for m in chosen.memory if (v := getattr(m, name)) is not None]
        return max(values, default=None)

    peak = largest("peak_rss")
    swapped = [m.rss + m.swap for m in chosen.memory if m.rss is not None and m.swap]
    if peak is not None:
        peak = max([peak, *swapped])
    # No system tells this, and Apple's Neural Engine does most of its work there.
    not_counted = ["memory of other processes on this one's behalf"]
    dma_buf = largest("dma_buf")
    if dma_buf == 0 and used != "cpu":
        # An accelerator without buffers would compute nothing: the driver keeps them elsewhere.
        dma_buf = None
    # A footprint of Apple's has accelerators' buffers in it.
    if largest("phys_footprint") is None:
        if dma_buf is None:
            not_counted.insert(0, "dma-buf memory of accelerators")
        if used != "cpu":
            not_counted.insert(0, "what the accelerator's driver holds")
    return MemoryFigures(
        separate_pass=separate,
        peak_rss=peak,
        anon=largest("anon"),
        file=largest("file"),
        swap=largest("swap"),
        base_rss=chosen.hello.base_rss_bytes if chosen.hello else None,
        activations=largest("activations"),
        dma_buf=dma_buf,
        phys_footprint=largest("phys_footprint_peak") or largest("phys_footprint"),
        not_counted=tuple(not_counted),
    )


def _heat(device: Device) -> Heat:
    """Return a device's state; one that went away tells nothing."""
    try:
        return device.heat()
    except DeviceError:
        return Heat()


def _battery_drop(start: Heat, end: Heat) -> float | None:
    if start.battery_percent is None or end.battery_percent is None:
        return None
    return None if start.charging or end.charging else start.battery_percent - end.battery_percent


def energy_j(before: Heat, after: Heat, pictures: int) -> float | None:
    """Return the energy of a picture in joules, from the battery's charge and voltage.

    None while it charges, where the phone does not tell, and where the charge has not moved.
    The rest of the phone, the screen above all, is in it.
    """
    if before.charging is not False or after.charging is not False or not pictures:
        return None
    if before.charge_uah is None or after.charge_uah is None:
        return None
    if before.battery_mv is None or after.battery_mv is None:
        return None
    drop = before.charge_uah - after.charge_uah
    volts = (before.battery_mv + after.battery_mv) / 2000
    return drop * 3.6e-3 * volts / pictures if drop > 0 else None


def _throttled(passes: list[Pass], start: Heat, end: Heat) -> bool | None:
    statuses = [t.status for p in passes for t in p.thermal if t.status is not None]
    statuses += [h.status for h in (start, end) if h.status is not None]
    statuses += [h.heat.status for p in passes for h in p.heat if h.heat.status is not None]
    known = bool(statuses)
    hot = any(s >= 2 for s in statuses)
    if start.throttle_events is not None and end.throttle_events is not None:
        known = True
        hot = hot or end.throttle_events > start.throttle_events
    return hot if known else None
