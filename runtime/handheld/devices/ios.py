"""iPhones, through ``xcrun devicectl`` on a Mac or ``pymobiledevice3``. Not run on hardware yet.

The benchmark app of ``ios_harness`` does on the phone what the harness does elsewhere. It is
started with a job and writes events to its container, from which they are copied. In its
``Documents/handheld``: ``objects`` (files, named by their sha256) and ``weights`` are a cache;
``incoming``, ``bundle`` and ``runs`` belong to the run under way. The app itself checks and moves
what came in, lays the bundle's files out again as its manifest has them, since Core ML opens
packages by their folder, and clears away what earlier runs left.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import time
import uuid
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from handheld.bundle import MANIFEST, Bundle, references
from handheld.devices import devicectl, lock, process, pymobiledevice3
from handheld.devices.base import Device, Devices, Obstacle, Place, Received, Sending
from handheld.devices.iphone import CHIPS, Iphone, NotInstalledError
from handheld.errors import DeviceError, HarnessError
from handheld.files import sha256_file
from handheld.native import NativeError
from handheld.protocol import Done, Failure, Job, Output, TensorFile, Thermal
from handheld.records import DeviceFacts, Heat, Transfer

APP: Final = "HANDHELD_IOS_APP"
"""Environment variable: the built benchmark app, which is installed if it is missing."""
IDENTIFIER: Final = "dev.handheld.bench"
ROOT: Final = "Documents/handheld"
POLL_S = 1.0
PAUSES = 4
"""Between two looks at a run's events, as often the time that a look takes."""
REPORT_S = 60.0
MAX_EVENTS_BYTES = 256 * 2**20


class Report(BaseModel):
    """What the app says about the phone and its container."""

    model_config = ConfigDict(extra="ignore")
    objects: dict[str, int] = {}
    engines: dict[str, str] = {}
    ram_bytes: int | None = None
    free_bytes: int | None = None
    cores: int | None = None
    thermal: Annotated[int, Field(ge=0, le=3)] | None = None
    """``ProcessInfo.thermalState``: 0 nominal to 3 critical."""
    battery_percent: Annotated[float, Field(ge=0, le=100)] | None = None
    charging: bool | None = None


# Apple's four states on Android's scale: nominal, fair, serious, critical.
_STATUS: Final = (0, 1, 3, 4)


class IosDevices(Devices):
    """iPhones and iPads that this computer reaches: by devicectl on a Mac, else pymobiledevice3."""

    def attached(self) -> list[Device]:
        """Return the devices that can be used."""
        try:
            return [IosDevice(phone) for phone in _phones() if phone.obstacle() is None]
        except DeviceError:
            return []

    def obstacles(self) -> list[Obstacle]:
        """Return why devices cannot be used."""
        try:
            return [found for phone in _phones() if (found := phone.obstacle())]
        except DeviceError as error:
            return [Obstacle(error.message, error.remedy or "see what the program itself says")]


def _phones() -> Sequence[Iphone]:
    if devicectl.program() is not None:
        return devicectl.phones()
    if pymobiledevice3.program() is not None:
        return pymobiledevice3.phones()
    return []  # iPhones are of no concern on a machine without a program that reaches them


class IosDevice(Device):
    """An iPhone or iPad."""

    kind = "ios"

    def __init__(self, phone: Iphone) -> None:
        self._phone = phone
        self.serial = phone.serial
        digest = hashlib.sha256(f"handheld {self.serial}".encode()).hexdigest()
        self.id = f"ios-{digest[:8]}"
        self._place: IosPlace | None = None
        self._told: Report | None = None

    def facts(self) -> DeviceFacts:
        """Return what the device is; its memory and engines are known if its app is there."""
        known = self._phone.facts
        report = self._report()
        return DeviceFacts(
            id=self.id,
            kind="ios",
            model=_joined(known.model, known.product_type),
            soc=CHIPS.get(known.product_type or ""),
            arch=known.cpu,
            cores=report.cores,
            ram_bytes=report.ram_bytes,
            free_bytes=report.free_bytes,
            os=known.os,
            os_build=known.os_build,
            engines=report.engines,
            harness=f"app {IDENTIFIER}",
            transport=self._phone.transport,
        )

    def _report(self) -> Report:
        """Return what the app said last; it is asked once, where nothing runs."""
        if self._place is not None:
            return self._place.app.report
        if self._told is None:
            self._told = Report()
            # An app that is not there, or that another handheld uses, tells nothing.
            with contextlib.suppress(DeviceError), lock.held(self.id, self.serial):
                self._told = App(self._phone).ask()
        return self._told

    def heat(self) -> Heat:
        """Return the thermal state, which only the app can tell."""
        if self._place is not None and self._place.running:
            # To ask, the app would have to be started anew.
            return Heat(status=self._place.thermal)
        report = self._place.app.ask() if self._place else self._report()
        return Heat(
            status=None if report.thermal is None else _STATUS[report.thermal],
            battery_percent=report.battery_percent,
            charging=report.charging,
        )

    def contact(self) -> None:
        """Ask the program that reaches the phone; its heat would not tell between runs."""
        phone = next((p for p in _phones() if p.serial == self.serial), None)
        if phone is None:
            raise DeviceError(
                "the phone is not connected", field=self.serial, remedy="plug it in again"
            )
        if found := phone.obstacle():
            raise DeviceError(found.what, field=self.serial, remedy=found.remedy)

    def glance(self) -> Heat | None:
        """Return what the app's last event said; to ask, it would have to be started anew."""
        if self._place is None or not self._place.running:
            return None
        return Heat(status=self._place.thermal)

    @contextmanager
    def prepare(
        self, bundle: Bundle, sending: Sending = lambda name, done, total: None
    ) -> Iterator[Place]:
        """Install the app if need be, send what is missing, and clean up afterwards."""
        with lock.held(self.id, self.serial):
            app = App(self._phone)
            place = IosPlace(app, bundle)
            self._place = place
            try:
                place.send(sending)
                yield place
            finally:
                self._place = None
                with contextlib.suppress(DeviceError):
                    app.ask()
                self._told = app.report


class App:
    """The benchmark app and its container. Paths are below :data:`ROOT`."""

    def __init__(self, phone: Iphone) -> None:
        self.phone = phone
        self.report = Report()
        """What it said last."""

    def ask(self, *orders: str) -> Report:
        """Start the app so that it clears up, takes in what was sent, and reports.

        What ``orders`` say is done once it has reported: to start the app again would end it.

        Raises
        ------
        DeviceError
            If it cannot be started or says nothing.
        """
        name = f"report-{uuid.uuid4().hex}.json"
        self.launch("--report", name, *orders)
        deadline = time.monotonic() + REPORT_S
        with tempfile.TemporaryDirectory(prefix="handheld-") as folder:
            path = Path(folder) / name
            while not self.copy_from(name, path):
                if time.monotonic() > deadline:
                    raise DeviceError(
                        "the app on the phone does not report",
                        remedy="unlock the phone and keep it unlocked",
                    )
                time.sleep(POLL_S)
            try:
                self.report = Report.model_validate_json(path.read_bytes())
            except (OSError, ValidationError) as error:
                raise DeviceError(
                    f"the app's report is not understood: {str(error).splitlines()[0]}",
                    remedy="install an app of the same version as handheld",
                ) from None
        return self.report

    def install(self) -> None:
        """Install the app that was built."""
        app = os.environ.get(APP)
        if not app or not Path(app).is_dir():
            raise DeviceError(
                "the benchmark app is not installed",
                remedy=f"build it (ios_harness/README.md) and set {APP} to the .app folder",
            )
        self.phone.install(Path(app))

    def launch(self, *arguments: str) -> int:
        """Start it anew and return its process id."""
        return self.phone.launch(IDENTIFIER, list(arguments))

    def copy_to(self, source: Path, target: str) -> None:
        """Send a file."""
        self.phone.copy_to(IDENTIFIER, source, f"{ROOT}/{target}")

    def copy_from(self, source: str, target: Path) -> bool:
        """Fetch a file; tell whether it is there."""
        return self.phone.copy_from(IDENTIFIER, f"{ROOT}/{source}", target)


class IosPlace(Place):
    """A bundle in the container of the benchmark app."""

    def __init__(self, app: App, bundle: Bundle) -> None:
        self.app = app
        self._bundle = bundle
        self._run = ""
        self.running = False
        self.thermal: int | None = None
        """What the last event of the run said."""
        self.transfer = Transfer()

    def send(self, sending: Sending) -> None:
        """Send what the container lacks."""
        try:
            report = self.app.ask()
        except NotInstalledError:
            self.app.install()
            report = self.app.ask()
        refs = {ref.sha256: ref for _, ref in references(self._bundle.manifest)}
        missing = {k: r for k, r in refs.items() if report.objects.get(k) != r.bytes}
        total = sum(r.bytes for r in missing.values())
        if report.free_bytes is not None and report.free_bytes < total:
            raise DeviceError(
                f"the phone has {report.free_bytes / 1e6:.0f} MB free, the bundle needs "
                f"{total / 1e6:.0f} MB",
                remedy="free some space on it",
            )
        sent = 0
        for digest, ref in missing.items():
            sending(Path(ref.path).name, sent, total)
            self.app.copy_to(self._bundle.file(ref), f"incoming/{digest}")
            sent += ref.bytes
        if missing:
            taken = self.app.ask().objects
            lost = [r for k, r in missing.items() if taken.get(k) != r.bytes]
            if lost:
                raise DeviceError(
                    "a file changed on its way to the phone",
                    path=self._bundle.file(lost[0]),
                    remedy="try another cable",
                )
            sending("", total, total)
        self.transfer = Transfer(
            files=len(missing),
            bytes=total,
            kept_files=len(refs) - len(missing),
            kept_bytes=sum(r.bytes for r in refs.values()) - total,
        )

    def run(self, job: Job, timeout_s: float | None = None) -> Generator[Received, None, None]:
        """Run a job in the app and yield its events as they are copied.

        The times of arrival are those of the app's own clock: copying takes a while.
        """
        # A folder of its own: until the app has started, the last run's events are still there.
        self._run = f"runs/{uuid.uuid4().hex}"
        remote = self._translate(job)
        with tempfile.TemporaryDirectory(prefix="handheld-") as name:
            folder = Path(name)
            # The app clears its folder when it starts, so a job brings all that it needs.
            self.app.copy_to(self._bundle.path / MANIFEST, f"incoming/{MANIFEST}")
            (folder / "job.json").write_text(remote.model_dump_json())
            self.app.copy_to(folder / "job.json", "incoming/job.json")
            pid = self.app.launch("--job", self._run)
            ended = False
            self.running, self.thermal = True, None
            try:
                for event in self._events(folder / "events.jsonl", pid, timeout_s):
                    received = event.event
                    if isinstance(received, Thermal):
                        self.thermal = received.status
                    if isinstance(received, Output) and received.file is not None:
                        received = received.model_copy(update={"file": job.output})
                    if isinstance(received, Done):
                        ended = True
                        self._fetch(job, remote)
                    ended = ended or isinstance(received, Failure)
                    yield Received(received, event.since_spawn_ms)
            finally:
                self.running = False
                if not ended:
                    with contextlib.suppress(DeviceError):
                        self.app.phone.terminate(pid)

    def _events(
        self, path: Path, pid: int, timeout_s: float | None
    ) -> Generator[Received, None, None]:
        start = time.monotonic()
        offset = 0
        alive = True
        while True:
            begin = time.monotonic()
            if self.app.copy_from(f"{self._run}/events.jsonl", path):
                if path.stat().st_size > MAX_EVENTS_BYTES:
                    raise HarnessError(
                        f"the app told more than {MAX_EVENTS_BYTES / 1e6:.0f} MB of events",
                        remedy="ask for a shorter run",
                    )
                data = path.read_bytes()
                whole = data.rfind(b"\n") + 1
                for line in data[offset:whole].splitlines():
                    event = process.parse(line)
                    if event is None:
                        continue
                    process.check_protocol(event, "install an app of the same version as handheld")
                    yield Received(event, event.t_ms)
                    if isinstance(event, Failure):
                        raise NativeError(event.code, f"{event.code}: {event.message}")
                    if isinstance(event, Done):
                        return
                offset = max(offset, whole)
            if not alive:
                raise process.HarnessEndedError(
                    "the app ended before its job was done, probably because memory ran out", 1
                )
            if timeout_s is not None and time.monotonic() - start > timeout_s:
                raise HarnessError(
                    f"the harness took longer than {timeout_s:g} s", remedy="raise --timeout"
                )
            # All events are copied every time: of a long run seldom, so as not to disturb it.
            time.sleep(max(POLL_S, PAUSES * (time.monotonic() - begin)))
            # Asked before the last look at its events, so that none is missed.
            alive = self.app.phone.is_running(pid)

    def _translate(self, job: Job) -> Job:
        known = {
            str(self._bundle.file(ref).resolve()): f"objects/{ref.sha256}"
            for _, ref in references(self._bundle.manifest)
        }

        def sent(source: TensorFile) -> TensorFile:
            path = Path(source.path).resolve()
            if str(path) not in known:
                digest = sha256_file(path)
                self.app.copy_to(path, f"incoming/{digest}")
                known[str(path)] = f"objects/{digest}"
            return TensorFile(path=known[str(path)], tensor=source.tensor)

        return job.model_copy(
            update={
                "bundle": "bundle",
                "inputs": {name: sent(source) for name, source in job.inputs.items()},
                "expect": sent(job.expect) if job.expect else None,
                "cache": _weights(job.cache) if job.cache else None,
                "output": f"{self._run}/picture.raw" if job.output else None,
                "dump_calls": f"{self._run}/calls.safetensors" if job.dump_calls else None,
            }
        )

    def _fetch(self, job: Job, remote: Job) -> None:
        for source, target in ((remote.output, job.output), (remote.dump_calls, job.dump_calls)):
            if source and target and not self.app.copy_from(source, Path(target)):
                raise DeviceError("the app wrote no such file", path=source)

    def forget_cache(self, cache: str) -> None:
        """Have the app remove packed weights."""
        self.app.ask("--forget", _weights(cache))


def _weights(cache: str) -> str:
    return f"weights/{hashlib.sha256(cache.encode()).hexdigest()[:32]}"


def _joined(name: str | None, product: str | None) -> str | None:
    return f"{name} ({product})" if name and product else name or product
