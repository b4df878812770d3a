"""Many bundles on many devices: a matrix that is run in parallel and can be gone on with."""

from __future__ import annotations

import contextlib
import os
import threading
import time
import tomllib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from handheld import __version__, bench, devices, records
from handheld.bundle import Bundle, describe_validation
from handheld.devices import adb
from handheld.devices.base import Device
from handheld.errors import DeviceBusyError, DeviceError, HandheldError, UsageError, unexpected
from handheld.files import describe_os_error
from handheld.program import Model
from handheld.protocol import Event, Iteration, Residency
from handheld.records import DeviceFacts, RunRecord
from handheld.thermal_gate import Gate

POLL_S = 2.0


class GateTable(Gate):
    """``[gate]``."""

    cooldown_s: Annotated[float, Field(ge=0)] = 30.0
    """Pause before every run of a device but the first."""


class OptionsTable(bench.Timing):
    """``[options]``."""

    iterations: Annotated[int, Field(ge=1)] = 10
    precision: Annotated[float, Field(gt=0, le=1)] | None = 0.02
    sustained_minutes: Annotated[float, Field(ge=0)] = 0.0


class BundleTable(Model):
    """One of ``[[bundles]]``."""

    path: str
    """Relative to the matrix's folder."""
    sizes: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """The reference's if left out."""
    residency: Annotated[tuple[Residency, ...], Field(min_length=1)] = ("resident",)


class Matrix(Model):
    """What a matrix file says."""

    devices: Annotated[tuple[str, ...], Field(min_length=1)]
    """Kinds, ids or serial numbers, or ``all``."""
    bundles: Annotated[tuple[BundleTable, ...], Field(min_length=1)]
    adb_servers: tuple[Annotated[str, Field(pattern=r"^tcp:[A-Za-z0-9.:_-]+$")], ...] = ()
    """``tcp:HOST:PORT``; none asks the one that adb itself would."""
    attempts: Annotated[int, Field(ge=1, le=20)] = 3
    """How often a run is tried whose device went away."""
    return_s: Annotated[float, Field(ge=0)] = 120.0
    """How long a device that went away is waited for."""
    busy_s: Annotated[float, Field(ge=0)] = 3600.0
    """How long a device is waited for that somebody else uses."""
    options: OptionsTable = OptionsTable()
    gate: GateTable = GateTable()


def read(path: Path) -> Matrix:
    """Read a matrix file (TOML).

    Raises
    ------
    UsageError
        If it cannot be read or is malformed.
    """
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
        return Matrix.model_validate(tree)
    except OSError as error:
        message, remedy = describe_os_error(error)
        raise UsageError(f"cannot read: {message}", path=path, remedy=remedy) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"is not TOML: {error}", path=path) from None
    except ValidationError as error:
        message, field = describe_validation(error)
        raise UsageError(message, path=path, field=field) from None


@dataclass(frozen=True)
class Cell:
    """One bundle, size and residency on one device."""

    bundle: Bundle
    size: str
    residency: Residency

    @property
    def name(self) -> str:
        """What progress calls it."""
        facts = self.bundle.manifest
        return f"{facts.model.id} {facts.target} {facts.precision} {self.size} {self.residency}"


@dataclass(frozen=True)
class Result:
    """How a cell ended on a device."""

    device: str
    cell: str
    outcome: Literal["done", "already", "failed", "interrupted", "missing"]
    record: RunRecord | None = None
    error: str | None = None


Say = Callable[[str, str], None]
"""Told what happens: ``say(device, text)``."""


class Fleet:
    """Runs a matrix.

    Parameters
    ----------
    matrix : Matrix
    folder : Path
        What bundles' paths are relative to.
    records_file : Path
        JSON Lines. What it holds already is not run again.
    command : tuple of str
        For the records.
    say : callable, optional
    """

    def __init__(
        self,
        matrix: Matrix,
        folder: Path,
        records_file: Path,
        command: tuple[str, ...] = (),
        say: Say = lambda device, text: None,
    ) -> None:
        self.matrix = matrix
        self._records = records_file
        self._command = command
        self._say = say
        self._stop = threading.Event()
        opened = [(Bundle.open(folder / table.path), table) for table in matrix.bundles]
        self.cells = [
            Cell(bundle, size, residency)
            for bundle, table in opened
            for size in table.sizes or (bundle.size()[0],)
            for residency in table.residency
        ]
        for cell in self.cells:
            cell.bundle.size(cell.size)
        self._facts: dict[str, DeviceFacts | None] = {}
        self._past = records.read(records_file) if records_file.exists() else []
        if matrix.adb_servers:
            os.environ[adb.SERVERS] = ",".join(matrix.adb_servers)

    def find(self) -> tuple[dict[str, Device], list[Result]]:
        """Return the devices that are there, by id, and a result for each that cannot be used.

        A phone that is attached and not authorized, or a lab's adb server that is down, is one of
        the latter, even where other phones were found.
        """
        found: dict[str, Device] = {}
        missing = []
        for name in self.matrix.devices:
            try:
                # A phone that two servers know, or two names mean, is still one phone.
                found.update({d.id: d for d in devices.find(name)})
                kept = devices.obstacles(name)
            except DeviceError as error:
                missing.append(Result(name, "", "missing", error=str(error)))
                continue
            known = {d.serial for d in found.values()}
            missing += [
                Result(o.device or name, "", "missing", error=f"{o.what} ({o.remedy})")
                for o in kept
                if o.device not in known
            ]
        return found, missing

    def finished(self, device: Device, cell: Cell) -> RunRecord | None:
        """Return the record of a cell that need not be run again.

        Of a device that does not answer, it is not known whether its harness is another by now.
        """
        wanted = self._options(cell).settings(0, "reference")
        for record in reversed(self._past):
            ours = record.settings.model_copy(update={"seed": 0, "inputs": "reference"})
            same = (
                record.device.id == device.id
                and record.bundle.sha256 == cell.bundle.sha256
                and record.bundle.size == cell.size
                and ours == wanted
                and record.handheld == __version__
            )
            # A wrong picture is a result: it would come out again.
            wrong = record.check is not None and not record.check.matches
            if same and (record.status == "ok" or wrong) and self._is_same(device, record):
                return record
        return None

    def _is_same(self, device: Device, record: RunRecord) -> bool:
        """Tell whether a device's harness is still the one that made a record."""
        if device.id not in self._facts:
            try:
                self._facts[device.id] = device.facts()
            except DeviceError:
                self._facts[device.id] = None
        facts, then = self._facts[device.id], record.device
        if facts is None:
            return True
        # What an iPhone's app has in it is known once it has run; libraries that were made
        # elsewhere tell their versions when they run.
        known = {name: text for name, text in facts.engines.items() if text != "unknown"}
        return facts.harness in (None, then.harness) and known.items() <= then.engines.items()

    def run(self) -> list[Result]:
        """Run what is missing, each device on a thread of its own, and return all results.

        After Ctrl-C every run is ended, its record marked partial, and its device cleaned up.
        """
        found, results = self.find()
        pool = ThreadPoolExecutor(max_workers=max(1, len(found)))
        waiting = {pool.submit(self._device, d): d for d in found.values()}
        try:
            for future in as_completed(waiting):
                results += future.result()
        except BaseException:
            self._stop.set()
            self._say("", "stopping: runs end and phones are cleaned up")
            raise
        finally:
            pool.shutdown()
        return results

    def _device(self, device: Device) -> list[Result]:
        results: list[Result] = []
        for cell in self.cells:
            rested = all(r.outcome in ("already", "interrupted") for r in results)
            try:
                results.append(self._next(device, cell, rested))
            except Exception as error:  # a mistake of ours stops no other phone
                text = unexpected(error)
                self._say(device.id, f"{cell.name}: {text}")
                results.append(Result(device.id, cell.name, "failed", error=text))
        if all(r.outcome == "already" for r in results):
            # Nothing was prepared, which would have done it.
            with contextlib.suppress(DeviceError):
                device.tidy()
        return results

    def _next(self, device: Device, cell: Cell, rested: bool) -> Result:
        if record := self.finished(device, cell):
            self._say(device.id, f"{cell.name}: already in {self._records}")
            return Result(device.id, cell.name, "already", record)
        if not rested:
            self._stop.wait(self.matrix.gate.cooldown_s)
        if self._stop.is_set():
            return Result(device.id, cell.name, "interrupted")
        return self._cell(device, cell)

    def _cell(self, device: Device, cell: Cell) -> Result:
        kept: list[RunRecord] = []

        def keep(record: RunRecord) -> None:
            records.append(self._records, record)
            kept.append(record)

        error: HandheldError | None = None
        attempt = 0
        busy_until = time.monotonic() + self.matrix.busy_s
        while attempt < self.matrix.attempts:
            attempt += 1
            if attempt > 1 and not self._back(device):
                break
            before = len(kept)
            error = None
            try:
                bench.run(
                    cell.bundle,
                    device,
                    self._options(cell),
                    command=self._command,
                    progress=lambda purpose, event: self._progress(device, cell, purpose, event),
                    notice=lambda text: self._notice(device, cell, text),
                    keep=keep,
                )
            except KeyboardInterrupt:
                last = kept[-1] if len(kept) > before else None
                return Result(device.id, cell.name, "interrupted", last)
            except DeviceBusyError as e:
                error = e
                if time.monotonic() >= busy_until or self._stop.wait(POLL_S):
                    break
                attempt -= 1
                continue
            except HandheldError as e:
                error = e
                self._say(device.id, f"{cell.name}: {e}")
                if not isinstance(e, DeviceError):
                    break
                continue
            record = kept[-1]
            self._say(device.id, f"{cell.name}: {_summary(record)}")
            if record.status == "ok":
                return Result(device.id, cell.name, "done", record)
            if record.check is not None and not record.check.matches:
                break
        last = kept[-1] if kept else None
        text = str(error) if error else last.error if last else None
        return Result(device.id, cell.name, "failed", last, text)

    def _back(self, device: Device) -> bool:
        """Wait for a device to come back."""
        deadline = time.monotonic() + self.matrix.return_s
        while not self._stop.is_set():
            try:
                device.contact()
            except DeviceError:
                if time.monotonic() >= deadline:
                    return False
                self._stop.wait(POLL_S)
            else:
                return True
        return False

    def _progress(self, device: Device, cell: Cell, purpose: str, event: Event | None) -> None:
        self._check_stop()
        if event is None:
            self._say(device.id, f"{cell.name}: {purpose}")
        elif isinstance(event, Iteration) and event.kind == "first":
            self._say(device.id, f"{cell.name}: {purpose}: first picture {event.total_ms:.0f} ms")

    def _notice(self, device: Device, cell: Cell, text: str) -> None:
        self._check_stop()
        self._say(device.id, f"{cell.name}: {text}")

    def _check_stop(self) -> None:
        # Ctrl-C reaches the main thread only; here it takes the same way out.
        if self._stop.is_set():
            raise KeyboardInterrupt

    def _options(self, cell: Cell) -> bench.Options:
        table = self.matrix.options
        return bench.Options(
            **table.model_dump(exclude={"sustained_minutes"}),
            sustained_s=60 * table.sustained_minutes,
            size=cell.size,
            residency=cell.residency,
            gate=self.matrix.gate,
        )


def _summary(record: RunRecord) -> str:
    figures = record.summary()
    text: str = record.status
    if isinstance(median := figures["median_ms"], float):
        text += f", median {median:.1f} ms of {figures['timed']}"
    flags = ["noisy"] * bool(record.noisy) + ["throttled"] * bool(record.throttled)
    if flags:
        text += f", {' and '.join(flags)}"
    return f"{text}: {record.error}" if record.error else text
