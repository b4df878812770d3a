"""A phone for tests: an adb daemon that the real ``adb`` talks to over TCP.

A folder is its storage, this machine's shell its shell, and what it says about itself is
written after what phones print. The arm64 one runs programs under qemu. It misbehaves on
demand, as phones do. It is no phone: its times and its memory mean nothing.

Run as a program it serves until it is ended: ``python tests/phone.py arm64 --folder DIR``.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import os
import shutil
import signal
import stat
import struct
import threading
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STORAGE = "/data/local/tmp"
QEMU = "qemu-aarch64-static"
VERSION, MAX_DATA = 0x01000001, 1 << 20
FEATURES = "cmd,stat_v2,ls_v2,fixed_push_mkdir"


CPU = """processor\t: {}
BogoMIPS\t: 50.00
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm asimddp
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x3
CPU part\t: 0xd0c
CPU revision\t: 1

"""


@dataclass(frozen=True)
class Profile:
    """What a phone says about itself."""

    properties: dict[str, str]
    ram_kb: int
    cores: str
    sensors: tuple[str, ...]
    battery_tail: str = ""
    arm64: bool = False


PROFILES = {
    # Android 14, its system on chip named by ro.soc.model; a sensor that is absent.
    "qualcomm": Profile(
        properties={
            "ro.product.manufacturer": "samsung",
            "ro.product.model": "SM-S921B",
            "ro.soc.manufacturer": "QTI",
            "ro.soc.model": "SM8650",
            "ro.board.platform": "pineapple",
            "ro.build.version.release": "14",
            "ro.build.fingerprint": "samsung/e1qxxx/e1q:14/UP1A.231005.007:user/release-keys",
            "ro.product.cpu.abi": "x86_64",
            "persist.sys.note": "a value\nof two [lines]",
        },
        ram_kb=7_642_108,
        cores="0-7",
        sensors=(
            "Temperature{mValue=34.8, mType=3, mName=SKIN, mStatus=0}",
            "Temperature{mValue=41.2, mType=0, mName=AP, mStatus=0}",
            "Temperature{mValue=-99.9, mType=5, mName=PA, mStatus=0}",
        ),
        # Older values come after the present ones.
        battery_tail="  --- SamsungBattery ---\n  level: 12\n  temperature: 455\n  voltage: 3411\n",
    ),
    # Android 11 knows no ro.soc.model.
    "older": Profile(
        properties={
            "ro.product.manufacturer": "Xiaomi",
            "ro.product.model": "Redmi Note 9",
            "ro.board.platform": "mt6768",
            "ro.build.version.release": "11",
            "ro.product.cpu.abi": "x86_64",
        },
        ram_kb=3_786_240,
        cores="0-7",
        sensors=("Temperature{mValue=36.0, mType=0, mName=mtktscpu, mStatus=0}",),
    ),
    "arm64": Profile(
        properties={
            "ro.product.manufacturer": "Google",
            "ro.product.model": "Pixel 8",
            "ro.soc.manufacturer": "Google",
            "ro.soc.model": "Tensor G3",
            "ro.board.platform": "zuma",
            "ro.build.version.release": "15",
            "ro.product.cpu.abi": "arm64-v8a",
        },
        ram_kb=7_833_000,
        cores="0-8",
        sensors=(
            "Temperature{mValue=31.5, mType=3, mName=VIRTUAL-SKIN, mStatus=0}",
            "Temperature{mValue=38.0, mType=0, mName=BIG, mStatus=0}",
        ),
        arm64=True,
    ),
}


@dataclass
class State:
    """What a test may change while the phone is in use."""

    authorized: bool = True
    shell_v2: bool = True
    plugged: bool = True
    thermal: int = 0
    battery_tenths: int = 284
    battery_percent: int = 80
    charging: bool = True
    bytes_per_s: float | None = None
    capacity: int = 60_000_000_000
    clock_offset_s: float = 0.0
    deaf: bool = False
    """Takes connections and answers nothing."""
    on_bytes: Callable[[int], None] | None = None
    """Told how many bytes have been sent to the phone so far."""


@dataclass
class Phone:
    """A phone; use it as a context manager."""

    folder: Path
    profile: Profile
    serial: str = "R5CX1234567"
    state: State = field(default_factory=State)
    commands: list[str] = field(default_factory=list)
    """Every script that its shell was given."""
    sent: list[tuple[str, int]] = field(default_factory=list)
    """Every file that was sent to it, and its bytes."""
    received: int = 0
    port: int = 0

    def __post_init__(self) -> None:
        self.storage = self.folder / "storage"
        self.system = self.folder / "system"
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._server: asyncio.Server | None = None
        self._hosts: set[_Host] = set()
        self.running: set[asyncio.subprocess.Process] = set()

    @property
    def address(self) -> str:
        """What ``adb connect`` takes."""
        return f"127.0.0.1:{self.port}"

    def __enter__(self) -> Phone:
        self.storage.mkdir(parents=True, exist_ok=True)
        self._install()
        self._thread.start()
        self.on_loop(self._start)
        return self

    def __exit__(self, *_: object) -> None:
        self.on_loop(self._stop)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def on_loop(self, function: Callable[[], Awaitable[Any]]) -> Any:
        async def call() -> Any:
            return await function()

        return asyncio.run_coroutine_threadsafe(call(), self._loop).result(30)

    async def _start(self) -> None:
        self._server = await asyncio.start_server(
            self._serve, "127.0.0.1", self.port, limit=4 * MAX_DATA
        )
        self.port = self._server.sockets[0].getsockname()[1]

    async def _stop(self) -> None:
        await self._unplug()
        self._kill_all()
        for _ in range(100):
            if not self.running:
                break
            await asyncio.sleep(0.02)
        if self._server is not None:
            self._server.close()

    def _install(self) -> None:
        """Write what the phone's programs print; they read it anew each time."""
        programs = self.system / "bin"
        programs.mkdir(parents=True, exist_ok=True)
        (self.system / "boot_id").write_text(f"{uuid.uuid4()}\n")
        (self.system / "meminfo").write_text(
            f"MemTotal:       {self.profile.ram_kb} kB\nMemFree:         412000 kB\n"
        )
        (self.system / "possible").write_text(f"{self.profile.cores}\n")
        for name, script in {
            "getprop": f'if [ -n "$1" ]; then cat "{self.system}/props/$1" 2>/dev/null || echo; '
            f'else cat "{self.system}/getprop"; fi',
            "dumpsys": f'cat "{self.system}/$1" 2>/dev/null || echo "Can\'t find service: $1" >&2',
            "df": f'cat "{self.system}/df"',
            "date": f'exec /bin/date -d "$(cat "{self.system}/offset") seconds" "$@"',
            "sync": "true",
        }.items():
            path = programs / name
            path.write_text(f"#!/bin/sh\n{script}\n")
            path.chmod(0o755)
        (self.system / "root" / "proc").mkdir(parents=True, exist_ok=True)
        (self.system / "root" / "proc" / "cpuinfo").write_text(
            "".join(CPU.format(number) for number in range(os.cpu_count() or 1))
        )
        (self.system / "props").mkdir(exist_ok=True)
        properties = {**self.profile.properties, "ro.serialno": self.serial}
        for key, value in properties.items():
            (self.system / "props" / key).write_text(f"{value}\n")
        (self.system / "getprop").write_text(
            "".join(f"[{k}]: [{v}]\n" for k, v in sorted(properties.items()))
        )

    def refresh(self) -> None:
        """Write the values that change."""
        now = self.state
        cached = "\tTemperature{mValue=66.0, mType=0, mName=AP, mStatus=3}\n"
        current = "".join(f"\t{line}\n" for line in self.profile.sensors)
        (self.system / "thermalservice").write_text(
            "IsStatusOverride: false\nThermalEventListeners:\n\tcallbacks: 1\n"
            f"Thermal Status: {now.thermal}\nCached temperatures:\n{cached}"
            "HAL Ready: true\nHAL connection:\n\tThermalHAL AIDL 2 connected: yes\n"
            f"Current temperatures from HAL:\n{current}"
            "Current cooling devices from HAL:\n"
            "\tCoolingDevice{mValue=0, mType=2, mName=thermal-cpufreq-0}\n"
        )
        (self.system / "battery").write_text(
            "Current Battery Service state:\n  AC powered: false\n"
            f"  USB powered: {str(now.charging).lower()}\n  Wireless powered: false\n"
            "  Max charging current: 500000\n  Charge counter: 3120000\n"
            f"  status: 2\n  present: true\n  level: {now.battery_percent}\n  scale: 100\n"
            f"  voltage: 4102\n  temperature: {now.battery_tenths}\n  technology: Li-ion\n"
            + self.profile.battery_tail
        )
        (self.system / "offset").write_text(f"{now.clock_offset_s:.0f}")
        used = self.used()
        (self.system / "df").write_text(
            "Filesystem      1K-blocks     Used Available Use% Mounted on\n"
            f"/dev/block/dm-48 {now.capacity // 1024} {used // 1024} "
            f"{max(0, now.capacity - used) // 1024}  34% /data/user/0\n"
        )

    def used(self) -> int:
        """Return the bytes in its storage."""
        total = 0
        for path in self.storage.rglob("*"):
            with contextlib.suppress(OSError):
                total += path.lstat().st_size if path.is_file() else 0
        return total

    def left(self) -> list[str]:
        """Return what is in the storage beside the cache."""
        root = self.storage / "handheld"
        cache = ("objects", "harness", "weights")
        found = [p for p in self.storage.rglob("*") if p.is_file()]
        names = [p.relative_to(self.storage).as_posix() for p in found]
        kept = tuple(f"handheld/{c}/" for c in cache)
        runs = [p.as_posix() for p in (root / "runs").glob("*")]
        return [n for n in names if not n.startswith(kept) or n.endswith(".part")] + runs

    def harnesses(self) -> list[int]:
        """Return the processes whose working folder is on the phone."""
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and (entry / "cwd").readlink().is_relative_to(
                    self.storage.resolve() / "handheld" / "harness"
                ):
                    found.append(int(entry.name))
        return found

    def kill_harness(self) -> bool:
        """End the harness as a phone does that runs out of memory."""
        pids = self.harnesses()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return bool(pids)

    def unplug(self) -> None:
        """Pull the cable. What runs on the phone goes on."""
        self.on_loop(self._unplug)

    async def _unplug(self) -> None:
        self.state.plugged = False
        for host in list(self._hosts):
            host.abort()

    def plug(self) -> None:
        """Put the cable back."""
        self.state.plugged = True

    def reboot(self) -> None:
        """Restart the phone, which takes no time here."""
        self.unplug()
        self.on_loop(self._reboot)
        self.plug()

    async def _reboot(self) -> None:
        self._kill_all()
        (self.system / "boot_id").write_text(f"{uuid.uuid4()}\n")

    def _kill_all(self) -> None:
        for process in list(self.running):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not self.state.plugged:
            writer.transport.abort()
            return
        host = _Host(self, reader, writer)
        self._hosts.add(host)
        try:
            await host.serve()
        except (asyncio.IncompleteReadError, ConnectionError, struct.error):
            pass
        finally:
            self._hosts.discard(host)
            host.abort()

    def local(self, path: str) -> Path:
        """Return where a path of the phone is."""
        if path == STORAGE or path.startswith(f"{STORAGE}/"):
            return self.storage / path[len(STORAGE) :].lstrip("/")
        return self.folder / "nowhere" / path.lstrip("/")

    def translate(self, script: str) -> str:
        """Make a script of the phone's one of this machine's."""
        script = script.replace(STORAGE, str(self.storage.resolve()))
        script = script.replace("/proc/meminfo", f"{self.system}/meminfo")
        script = script.replace("/proc/sys/kernel/random/boot_id", f"{self.system}/boot_id")
        script = script.replace("/sys/devices/system/cpu/possible", f"{self.system}/possible")
        if self.profile.arm64:
            # Engines read /proc/cpuinfo, and fall over this machine's.
            qemu = f"{QEMU} -L {self.system}/root -cpu neoverse-n1"
            script = script.replace("exec ./", f"exec {qemu} ./")
        return script


class _Stream:
    """One stream between the host and a service of the phone."""

    def __init__(self, host: _Host, local: int, remote: int) -> None:
        self.host, self.local, self.remote = host, local, remote
        self.input = asyncio.StreamReader(limit=1 << 30)
        self.acknowledged = asyncio.Event()
        self.closed = False

    async def write(self, data: bytes) -> None:
        for start in range(0, len(data), self.host.max_data):
            self.acknowledged.clear()
            await self.host.send(
                b"WRTE", self.local, self.remote, data[start : start + self.host.max_data]
            )
            await self.acknowledged.wait()
            if self.closed:
                raise ConnectionResetError

    def end(self) -> None:
        self.closed = True
        self.acknowledged.set()
        self.input.feed_eof()


class _Host:
    """A connection to an adb server."""

    def __init__(
        self, phone: Phone, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.phone, self.reader, self.writer = phone, reader, writer
        self.streams: dict[int, _Stream] = {}
        self.tasks: set[asyncio.Task[None]] = set()
        self.max_data = MAX_DATA
        self.next_id = 1

    def abort(self) -> None:
        self.writer.transport.abort()
        for stream in self.streams.values():
            stream.end()

    async def send(self, command: bytes, a: int, b: int, data: bytes = b"") -> None:
        number = int.from_bytes(command, "little")
        header = struct.pack(
            "<4sIIIII", command, a, b, len(data), sum(data) & 0xFFFFFFFF, number ^ 0xFFFFFFFF
        )
        self.writer.write(header + data)
        await self.writer.drain()

    async def serve(self) -> None:
        state = self.phone.state
        while True:
            command, a, b, size, _, _ = struct.unpack("<4sIIIII", await self.reader.readexactly(24))
            data = await self.reader.readexactly(size) if size else b""
            if state.deaf:
                continue
            if command == b"CNXN":
                self.max_data = min(MAX_DATA, b)
                await self._greet()
            elif command == b"AUTH":
                # A key that the user has not confirmed: the phone asks for another, then waits.
                if a != 3:
                    await self.send(b"AUTH", 1, 0, os.urandom(20))
            elif command == b"OPEN":
                await self._open(a, data.rstrip(b"\0").decode(errors="replace"))
            elif (stream := self.streams.get(b)) is None:
                pass
            elif command == b"OKAY":
                stream.acknowledged.set()
            elif command == b"WRTE":
                await self._slow(len(data))
                if not stream.closed:
                    stream.input.feed_data(data)
                await self.send(b"OKAY", stream.local, stream.remote)
            elif command == b"CLSE":
                stream.end()
                self.streams.pop(b, None)

    async def _slow(self, size: int) -> None:
        phone = self.phone
        phone.received += size
        if phone.state.on_bytes is not None:
            phone.state.on_bytes(phone.received)
        if phone.state.bytes_per_s:
            await asyncio.sleep(size / phone.state.bytes_per_s)

    async def _greet(self) -> None:
        state = self.phone.state
        if not state.authorized:
            await self.send(b"AUTH", 1, 0, os.urandom(20))
            return
        features = ("shell_v2," if state.shell_v2 else "") + FEATURES
        model = self.phone.profile.properties["ro.product.model"].replace(" ", "_")
        banner = (
            f"device::ro.product.name=test;ro.product.model={model};ro.product.device=test;"
            f"features={features}"
        )
        await self.send(b"CNXN", VERSION, MAX_DATA, banner.encode())

    async def _open(self, remote: int, service: str) -> None:
        name, _, argument = service.partition(":")
        kind, *options = name.split(",")
        handlers: dict[str, Callable[[_Stream, str], Awaitable[None]]] = {
            "shell": self._shell_v2 if "v2" in options else self._shell,
            "exec": self._shell,
            "sync": self._sync,
        }
        stream = _Stream(self, self.next_id, remote)
        if kind not in handlers:
            await self.send(b"CLSE", 0, remote)
            return
        self.next_id += 1
        self.streams[stream.local] = stream
        await self.send(b"OKAY", stream.local, remote)
        task = asyncio.ensure_future(self._run(handlers[kind], stream, argument))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _run(
        self, handler: Callable[[_Stream, str], Awaitable[None]], stream: _Stream, argument: str
    ) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await handler(stream, argument)
            self.streams.pop(stream.local, None)
            await self.send(b"CLSE", stream.local, stream.remote)

    async def _start(self, script: str, merged: bool) -> asyncio.subprocess.Process:
        self.phone.commands.append(script)
        self.phone.refresh()
        process = await asyncio.create_subprocess_exec(
            "/bin/sh",
            "-c",
            self.phone.translate(script),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT if merged else asyncio.subprocess.PIPE,
            env={**os.environ, "PATH": f"{self.phone.system}/bin:{os.environ['PATH']}"},
            start_new_session=True,
            cwd="/",
        )
        self.phone.running.add(process)
        return process

    async def _shell(self, stream: _Stream, script: str) -> None:
        process = await self._start(script, merged=True)
        assert process.stdout is not None
        try:
            while data := await process.stdout.read(65536):
                await stream.write(data.replace(b"\n", b"\r\n"))
            await process.wait()
        finally:
            self.phone.running.discard(process)

    async def _shell_v2(self, stream: _Stream, script: str) -> None:
        process = await self._start(script, merged=False)

        async def copy(reader: asyncio.StreamReader | None, number: int) -> None:
            assert reader is not None
            while data := await reader.read(65536):
                await self._packet(stream, number, data)

        try:
            await asyncio.gather(copy(process.stdout, 1), copy(process.stderr, 2))
            code = await process.wait()
            await self._packet(stream, 3, bytes([code if code >= 0 else 128 - code]))
        finally:
            self.phone.running.discard(process)

    async def _packet(self, stream: _Stream, number: int, data: bytes) -> None:
        await stream.write(struct.pack("<BI", number, len(data)) + data)

    async def _sync(self, stream: _Stream, _: str) -> None:
        while True:
            name, size = struct.unpack("<4sI", await stream.input.readexactly(8))
            if name == b"QUIT":
                return
            path = (await stream.input.readexactly(size)).decode(errors="replace")
            if name == b"SEND":
                await self._receive(stream, path)
            elif name == b"RECV":
                await self._deliver(stream, self.phone.local(path))
            elif name in (b"STAT", b"STA2", b"LST2"):
                await stream.write(name + self._stat(self.phone.local(path), name != b"STAT"))
            elif name in (b"LIST", b"LIS2"):
                await self._list(stream, self.phone.local(path), name == b"LIS2")

    def _stat(self, path: Path, second: bool) -> bytes:
        try:
            found = path.stat()
        except OSError as error:
            if second:
                return struct.pack("<IQQIIIIQqqq", error.errno or 1, *([0] * 10))
            return struct.pack("<III", 0, 0, 0)
        changed = int(found.st_mtime + self.phone.state.clock_offset_s)
        if not second:
            return struct.pack("<III", found.st_mode, found.st_size, changed & 0xFFFFFFFF)
        return struct.pack(
            "<IQQIIIIQqqq", 0, 0, 0, found.st_mode, 1, 2000, 2000, found.st_size,
            changed, changed, changed,
        )  # fmt: skip

    async def _list(self, stream: _Stream, path: Path, second: bool) -> None:
        head = b"DNT2" if second else b"DENT"
        for child in sorted(path.iterdir()) if path.is_dir() else ():
            name = child.name.encode()
            await stream.write(
                head + self._stat(child, second) + struct.pack("<I", len(name)) + name
            )
        await stream.write(b"DONE" + bytes(72 if second else 16))

    async def _receive(self, stream: _Stream, request: str) -> None:
        name, _, mode = request.rpartition(",")
        path = self.phone.local(name)
        failure: str | None = None
        file: io.BufferedIOBase
        total = 0
        room = self.phone.state.capacity - self.phone.used()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("wb")
        except OSError as error:
            failure, file = f"couldn't create file: {error.strerror}", io.BytesIO()
        with file:
            while True:
                part, size = struct.unpack("<4sI", await stream.input.readexactly(8))
                if part == b"DONE":
                    break
                data = await stream.input.readexactly(size)
                total += size
                if total > room and failure is None:
                    failure = "write failed: No space left on device"
                if failure is None:
                    file.write(data)
                    file.flush()
        if failure is not None:
            await stream.write(b"FAIL" + struct.pack("<I", len(failure)) + failure.encode())
            return
        path.chmod(stat.S_IMODE(int(mode)) | 0o600)
        self.phone.sent.append((name, total))
        await stream.write(b"OKAY" + bytes(4))

    async def _deliver(self, stream: _Stream, path: Path) -> None:
        try:
            data = path.read_bytes()
        except OSError as error:
            text = (error.strerror or "failed").encode()
            await stream.write(b"FAIL" + struct.pack("<I", len(text)) + text)
            return
        for start in range(0, len(data), 65536):
            part = data[start : start + 65536]
            await self._slow(len(part))
            await stream.write(b"DATA" + struct.pack("<I", len(part)) + part)
        await stream.write(b"DONE" + bytes(4))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("profile", choices=sorted(PROFILES))
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--port", type=int, default=0)
    arguments = parser.parse_args()
    if PROFILES[arguments.profile].arm64 and shutil.which(QEMU) is None:
        parser.exit(2, f"{QEMU} is missing: apt install qemu-user-static\n")
    profile = PROFILES[arguments.profile]
    with Phone(arguments.folder, profile, port=arguments.port) as phone:
        print(f"adb connect {phone.address}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                time.sleep(3600)


if __name__ == "__main__":
    main()
