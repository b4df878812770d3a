"""The machine handheld runs on, as a device: Linux, or macOS without what ``/proc`` would tell."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

from handheld import harness
from handheld.bundle import Bundle
from handheld.devices import process
from handheld.devices.base import Device, Devices, Obstacle, Place, Received, Sending
from handheld.files import cache_root, output_errors
from handheld.protocol import Job
from handheld.records import DeviceFacts, Heat


class HostPlace(Place):
    """A bundle on this machine."""

    def __init__(self, binary: Path, work: Path, used: Callable[[float], None]) -> None:
        self._binary = binary
        self._work = work
        self._used = used

    def run(self, job: Job, timeout_s: float | None = None) -> Generator[Received, None, None]:
        """Run the harness with a job file in a temporary folder."""
        path = self._work / "job.json"
        with output_errors(path):
            path.write_text(job.model_dump_json())
            if job.cache:
                Path(job.cache).mkdir(parents=True, exist_ok=True)
        command = [str(self._binary), str(path)]
        yield from process.run(command, timeout_s=timeout_s, used=self._used)

    def forget_cache(self, cache: str) -> None:
        """Remove a folder of packed weights."""
        shutil.rmtree(cache, ignore_errors=True)


class HostDevice(Device):
    """The machine handheld runs on."""

    kind = "host"

    def __init__(self) -> None:
        self.id = f"host-{machine_id()[:8]}"
        self._used_s = 0.0

    def facts(self) -> DeviceFacts:
        """Return what this machine is."""
        found = harness.find()
        return DeviceFacts(
            id=self.id,
            kind="host",
            model=_model(),
            cpu=cpu_model(),
            arch=platform.machine(),
            cores=_cores(),
            ram_bytes=_ram(),
            free_bytes=_free(cache_root()),
            os=_os(),
            engines=found.engines if found else {},
        )

    def heat(self) -> Heat:
        """Return temperature, throttling and load now."""
        return Heat(celsius=_hottest(), throttle_events=_throttled(), busy=_busy())

    def others_s(self) -> float | None:
        """Return the processor seconds of all but this device's harnesses that have ended.

        What this process does besides is counted: it may be driving phones at the same time.
        """
        try:
            user, nice, system, _, _, irq, softirq, steal = (
                int(n) for n in Path("/proc/stat").read_text().split()[1:9]
            )
        except (OSError, ValueError):
            return None
        everybody = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        return everybody - self._used_s

    def _count(self, seconds: float) -> None:
        self._used_s += seconds

    @contextmanager
    def prepare(
        self, bundle: Bundle, sending: Sending = lambda name, done, total: None
    ) -> Iterator[Place]:
        """Find or build the harness and make a folder for its files."""
        binary = harness.binary()
        with tempfile.TemporaryDirectory(prefix="handheld-") as work:
            yield HostPlace(binary, Path(work), self._count)


class HostDevices(Devices):
    """The kind of device that is always there."""

    def attached(self) -> list[Device]:
        """Return this machine."""
        return [HostDevice()]

    def obstacles(self) -> list[Obstacle]:
        """Return what the harness lacks."""
        if harness.find() is None:
            return [Obstacle("the harness is not built", "run `handheld harness build`")]
        return []


def machine_id() -> str:
    for path in (Path("/etc/machine-id"), Path("/var/lib/dbus/machine-id")):
        if text := _read(path):
            return hashlib.sha256(f"handheld {text}".encode()).hexdigest()
    return hashlib.sha256(f"handheld {uuid.getnode()} {cpu_model()}".encode()).hexdigest()


def _read(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace").strip() or None
    except OSError:
        return None


def _sysctl(name: str) -> str | None:
    if platform.system() != "Darwin":
        return None
    try:
        done = subprocess.run(
            ["sysctl", "-n", name], capture_output=True, text=True, timeout=5, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _model() -> str | None:
    return (
        _read(Path("/sys/class/dmi/id/product_name"))
        or _read(Path("/proc/device-tree/model"))
        or _sysctl("hw.model")
    )


def cpu_model() -> str | None:
    """Name this machine's processor; None where the system does not tell."""
    text = _read(Path("/proc/cpuinfo")) or ""
    for key in ("model name", "Hardware", "CPU part"):
        for line in text.splitlines():
            name, _, value = line.partition(":")
            if name.strip() == key and value.strip():
                return value.strip()
    return _sysctl("machdep.cpu.brand_string") or platform.processor() or None


def _cores() -> int | None:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _ram() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return int(text) if (text := _sysctl("hw.memsize")) else None


def _free(path: Path) -> int | None:
    while not path.exists() and path != path.parent:
        path = path.parent
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return None


def _os() -> str:
    if platform.system() == "Darwin":
        return f"macOS {platform.mac_ver()[0]}"
    try:
        name = platform.freedesktop_os_release().get("PRETTY_NAME", "Linux")
    except OSError:
        name = platform.system()
    return f"{name}, {platform.system()} {platform.release()}"


def _hottest() -> float | None:
    temperatures = []
    for zone in Path("/sys/class/thermal").glob("thermal_zone*/temp"):
        text = _read(zone)
        if text and text.lstrip("-").isdigit() and int(text) > 0:
            temperatures.append(int(text) / 1000)
    return max(temperatures, default=None)


def _throttled() -> int | None:
    counts = []
    cpus = Path("/sys/devices/system/cpu")
    for path in cpus.glob("cpu[0-9]*/thermal_throttle/*_throttle_count"):
        text = _read(path)
        if text and text.isdigit():
            counts.append(int(text))
    return sum(counts) if counts else None


def _busy(seconds: float = 0.3) -> float | None:
    """Return the part of all cores in use while waiting; None where the system does not tell."""

    def times() -> tuple[int, int] | None:
        try:
            fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        except OSError:
            return None
        values = [int(v) for v in fields]
        return sum(values) - values[3] - values[4], sum(values)

    before = times()
    if before is None:
        return None
    time.sleep(seconds)
    after = times()
    if after is None or after[1] <= before[1]:
        return None
    return min(1.0, max(0.0, (after[0] - before[0]) / (after[1] - before[1])))
