"""Android phones, through adb. No app is installed: the harness runs from the shell.

What is on a phone, below :data:`ROOT`: ``objects`` (files of bundles, named by their sha256),
``harness`` (one folder for each build), ``weights`` (packed by the engines) are a cache.
``manifest.json`` and ``runs`` belong to the run under way, and go when it is over or, if the
phone went away in between, when it is next prepared.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
import re
import tempfile
import threading
import uuid
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from handheld import harness, kit, socs
from handheld.bundle import MANIFEST, Bundle, references
from handheld.devices import adb, lock, process
from handheld.devices.adb import Phone, Server, quote, script
from handheld.devices.base import Device, Devices, Obstacle, Place, Received, Sending
from handheld.devices.host import machine_id
from handheld.errors import DeviceBusyError, DeviceError, HandheldError, HarnessError
from handheld.files import cache_root, sha256_file
from handheld.kit import Kit
from handheld.native import NativeError
from handheld.protocol import Done, Job, Output, TensorFile
from handheld.records import DeviceFacts, Heat, Transfer

ROOT: Final = "/data/local/tmp/handheld"
OBJECTS, HARNESS, WEIGHTS, RUNS = (f"{ROOT}/{n}" for n in ("objects", "harness", "weights", "runs"))
LOCK: Final = f"{ROOT}/lock"
LOCK_S = 900.0
"""A machine that has not touched its lock on a phone for this long has gone away."""
SPARE_BYTES = 100_000_000
"""Space that stays free on the phone."""
SYNC_S = 120.0
BATCH_BYTES = 32_000_000

_KITS: Final = {
    "arm64-v8a": ("android-arm64", "linux-arm64"),
    "x86_64": ("linux-x86_64",),
}
_STATES: Final = {
    "unauthorized": ("this machine is not allowed in", "confirm the prompt on the phone"),
    "authorizing": ("this machine is not allowed in yet", "confirm the prompt on the phone"),
    "offline": ("does not answer", "plug it in again, or: adb reconnect offline"),
    "no permissions": (
        "this user may not open its USB device",
        "add an udev rule for it (apt install android-sdk-platform-tools-common), plug it in again",
    ),
    "recovery": ("is in recovery mode", "adb reboot"),
    "sideload": ("is in recovery mode", "adb reboot"),
    "bootloader": ("is in its bootloader", "fastboot reboot"),
    "connecting": ("is being connected", "wait a moment"),
}
_FACTS: Final = script(
    [
        "getprop",
        "echo @meminfo; cat /proc/meminfo",
        "echo @cores; cat /sys/devices/system/cpu/possible",
        "echo @space; df -k /data/local/tmp",
        "echo @boot; cat /proc/sys/kernel/random/boot_id",
    ]
)
_NPU: Final = ('export ADSP_LIBRARY_PATH="$PWD;/vendor/dsp/cdsp;/vendor/lib/rfsa/adsp"',)
"""Where the NPU looks for its own libraries; paths are parted by semicolons there."""
_HEAT: Final = script(
    [
        "echo @thermal; dumpsys thermalservice 2>/dev/null",
        "echo @battery; dumpsys battery 2>/dev/null",
        "echo @load; head -n 1 /proc/stat; sleep 0.3; head -n 1 /proc/stat",
        "true",
    ]
)


def _ending(files: str) -> list[str]:
    """Return the lines that end the harnesses whose numbers are in ``files``, a pattern.

    A process is ours if its working folder is: once the phone has restarted, another may
    have the number.
    """
    return [
        f"for file in {files}; do",
        '  [ -f "$file" ] || continue',
        '  pid=$(cat "$file")',
        '  case "$pid" in ""|*[!0-9]*) continue;; esac',
        "  tries=0",
        "  while [ $tries -lt 60 ]; do",
        f'    case "$(readlink /proc/$pid/cwd)" in {HARNESS}/*) ;; *) break;; esac',
        '    if [ $tries -lt 30 ]; then kill -TERM "$pid"; else kill -KILL "$pid"; fi',
        "    tries=$((tries + 1))",
        "    sleep 0.1",
        "  done",
        "done",
    ]


_SWEEP: Final = script(
    [
        *_ending(f"{RUNS}/*/pid"),
        f"rm -rf {RUNS} {ROOT}/{MANIFEST}",
        f"mkdir -p {OBJECTS} {HARNESS} {WEIGHTS} {RUNS}",
    ]
)


def owner() -> str:
    """Return what this machine is called on a phone.

    Copies of one image differ by their names, users of one machine by their cache, in which lies
    the lock that keeps their own processes apart.
    """
    text = f"{machine_id()} {platform.node()} {cache_root()}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _if_mine(owner: str, command: str) -> str:
    """Return a line that does something while the phone is this machine's."""
    return f'case "$(cat {LOCK}/owner 2>/dev/null)" in "{owner} "*) {command};; esac'


def _taking(owner: str) -> list[str]:
    """Return the lines that take the phone for a machine, or tell who has it.

    A lock of the same machine is left over: its own lock keeps its processes apart. One that
    nobody has touched for a while, or that comes from before a restart or from the future,
    is of a machine that went away. One without a name is being made by another, if it is new.
    """
    return [
        f"mkdir -p {ROOT}",
        "boot=$(cat /proc/sys/kernel/random/boot_id)",
        f"if ! mkdir {LOCK} 2>/dev/null; then",
        f"  owner=$(cat {LOCK}/owner 2>/dev/null)",
        f"  age=$(( $(date +%s) - $(stat -c %Y {LOCK} 2>/dev/null || echo 0) ))",
        '  case "$owner" in',
        f'    "{owner} "*) ;;',
        f'    *" $boot") if [ $age -ge -60 ] && [ $age -lt {int(LOCK_S)} ]; then',
        "      held=$age; fi;;",
        '    "") if [ $age -ge -60 ] && [ $age -lt 60 ]; then held=$age; fi;;',
        "  esac",
        "  taken=yes",
        "fi",
        'if [ -z "$held" ]; then',
        f'  echo "{owner} $boot" > {LOCK}/owner && touch {LOCK} || exit 1',
        # Two that found the same old lock both got here.
        f'  if [ -n "$taken" ]; then sleep 1; {_if_mine(owner, "taken=")}; fi',
        '  if [ -n "$taken" ]; then held=0; fi',
        "fi",
        'if [ -n "$held" ]; then echo "@held $held"; fi',
    ]


class AndroidDevices(Devices):
    """Phones that an adb server knows."""

    def attached(self) -> list[Device]:
        """Return the phones that can be used."""
        if adb.program() is None:
            return []
        found: list[Device] = []
        for server, listed in self._listed():
            if listed.state == "device":
                with contextlib.suppress(DeviceError):
                    found.append(AndroidDevice(Phone(server, listed.serial)))
        return found

    def obstacles(self) -> list[Obstacle]:
        """Return why phones cannot be used."""
        if adb.program() is None:
            return [Obstacle("there is no adb program", f"apt install adb, or set {adb.PROGRAM}")]
        found = []
        for socket in adb.servers():
            try:
                listed = Server(socket).devices()
            except DeviceError as error:
                found.append(Obstacle(error.message, error.remedy or "", socket))
                continue
            found += [o for item in listed if (o := self._obstacle(Server(socket), item))]
        return found

    def _listed(self) -> Iterator[tuple[Server, adb.Listed]]:
        for socket in adb.servers():
            with contextlib.suppress(DeviceError):
                for item in Server(socket).devices():
                    yield Server(socket), item

    def _obstacle(self, server: Server, item: adb.Listed) -> Obstacle | None:
        if item.state != "device":
            what, remedy = _STATES.get(item.state, (f"is in state '{item.state}'", "adb reconnect"))
            return Obstacle(what, remedy, item.serial)
        try:
            device = AndroidDevice(Phone(server, item.serial))
        except DeviceError as error:
            return Obstacle(error.message, error.remedy or "", item.serial)
        try:
            device.kit()
        except HandheldError as error:
            return Obstacle(error.message, error.remedy or "", item.serial)
        return None


class AndroidDevice(Device):
    """A phone."""

    kind = "android"

    def __init__(self, phone: Phone) -> None:
        self.phone = phone
        self.serial = phone.serial
        # The serial number of the phone itself: over the network adb's is an address.
        # Some phones hide it from the shell.
        own = phone.shell("getprop ro.serialno").text.strip() or phone.serial
        self.id = f"android-{hashlib.sha256(f'handheld {own}'.encode()).hexdigest()[:8]}"

    def facts(self) -> DeviceFacts:
        """Return what the phone says about itself."""
        told = sections("getprop", self._ask(_FACTS))
        properties = parse_getprop(told.get("getprop", ""))
        try:
            chosen = self._kit(properties)
        except HandheldError:
            chosen = None
        path = adb.program()
        free = parse_free(told.get("space", ""))
        return DeviceFacts(
            id=self.id,
            kind="android",
            model=_joined(properties, "ro.product.manufacturer", "ro.product.model"),
            soc=soc(properties),
            arch=properties.get("ro.product.cpu.abi"),
            cores=parse_cores(told.get("cores", "")),
            ram_bytes=parse_meminfo(told.get("meminfo", "")).get("MemTotal"),
            free_bytes=free,
            os=f"Android {properties.get('ro.build.version.release', '?')}",
            os_build=properties.get("ro.build.fingerprint"),
            engines=chosen.info.engines if chosen else {},
            harness=chosen.label if chosen else None,
            transport=f"adb {adb.version(path)}" if path else None,
        )

    def heat(self) -> Heat:
        """Return thermal state, battery and load now."""
        return parse_heat(self._ask(_HEAT))

    def _keep(self, stopped: threading.Event) -> None:
        """Say again and again that this machine is using the phone."""
        line = _if_mine(owner(), f"touch {LOCK}")
        while not stopped.wait(LOCK_S / 10):
            with contextlib.suppress(DeviceError):
                self.phone.shell(line)

    def glance(self) -> Heat | None:
        """Return the thermal state alone: the load would be that of the run itself."""
        told = self.phone.shell("echo @thermal; dumpsys thermalservice 2>/dev/null; true").text
        return parse_heat(told)

    def kit(self) -> Kit:
        """Return the harness for this phone.

        Raises
        ------
        HarnessError
            If there is none.
        """
        return self._kit(parse_getprop(self._ask("getprop")))

    def _ask(self, text: str) -> str:
        try:
            return self.phone.shell(text).text
        except DeviceError:
            # It may have been plugged in again, or the server started anew.
            if not self.phone.attach():
                raise
        return self.phone.shell(text).text

    def _kit(self, properties: Mapping[str, str]) -> Kit:
        abi = properties.get("ro.product.cpu.abi", "unknown")
        names = _KITS.get(abi)
        if names is None:
            raise HarnessError(
                f"no harness runs on its processor ({abi})",
                remedy=f"use a phone with one of {', '.join(_KITS)}",
            )
        found = kit.find(*names)
        if found is None:
            raise HarnessError(
                f"no harness is built for it ({abi})",
                remedy=f"run `handheld harness build --for {names[-1]}`",
            )
        if found.info.sources not in (None, harness.sources_sha256()):
            raise HarnessError(
                "the harness for it was built from another version's sources",
                path=found.folder,
                remedy=f"run `handheld harness build --for {found.info.name}`",
            )
        return found

    @contextmanager
    def prepare(
        self, bundle: Bundle, sending: Sending = lambda name, done, total: None
    ) -> Iterator[Place]:
        """Send what the phone lacks, and clean up afterwards."""
        with lock.held(self.id, self.serial):
            if not self.phone.attach():
                raise self.phone.gone()
            properties = parse_getprop(self._ask("getprop"))
            place = AndroidPlace(
                self.phone, bundle, self._kit(properties), soc(properties), sending
            )
            place.take()
            stopped = threading.Event()
            keeper = threading.Thread(target=self._keep, args=(stopped,), daemon=True)
            keeper.start()
            try:
                place.send()
                yield place
            finally:
                stopped.set()
                keeper.join()
                with contextlib.suppress(DeviceError):
                    self._clean()

    def tidy(self) -> None:
        """Remove what a run of this machine left when the phone went away."""
        with contextlib.suppress(DeviceBusyError), lock.held(self.id, self.serial):
            self._clean()

    def _clean(self) -> None:
        mine = owner()
        for command in (_SWEEP, f"rm -rf {LOCK}"):
            self.phone.shell(_if_mine(mine, f"\n{command}\n"), timeout_s=60)


@dataclass(frozen=True)
class _File:
    """A file that the phone must have."""

    source: Path
    target: str
    sha256: str
    bytes: int


class AndroidPlace(Place):
    """A bundle on a phone.

    The folder :data:`ROOT` itself serves as the bundle's, with a manifest whose paths lead
    into ``objects``: a phone's shell may make no hard links.
    """

    def __init__(
        self, phone: Phone, bundle: Bundle, chosen: Kit, soc: str | None, sending: Sending
    ) -> None:
        self._phone = phone
        self._soc = soc
        self._bundle = bundle
        self._kit = chosen
        self._harness = f"{HARNESS}/{chosen.sha256}"
        self._sending = sending
        self._run = f"{RUNS}/{uuid.uuid4().hex}"
        self._boot = ""
        self.transfer = Transfer()

    def take(self) -> None:
        """Take the phone for this machine.

        Raises
        ------
        DeviceError
            If another machine is using it.
        """
        told = self._must(script(_taking(owner())), "cannot be taken")
        if found := re.search(r"@held (-?\d+)", told):
            raise DeviceBusyError(
                f"another machine is using this phone, and did {found[1]} s ago",
                field=self._phone.serial,
                remedy=f"wait for it to end; after {LOCK_S / 60:.0f} minutes of silence the phone "
                "is taken from it",
            )

    def send(self) -> None:
        """Clean up after earlier runs and send what is missing.

        Raises
        ------
        DeviceError
            If the phone is gone or full.
        """
        refs = {ref.sha256: ref for _, ref in references(self._bundle.manifest)}
        files = [
            _File(self._bundle.file(ref), f"{OBJECTS}/{digest}", digest, ref.bytes)
            for digest, ref in refs.items()
        ]
        for name, digest in self._kit.info.files.items():
            if not socs.is_for(name, self._soc):
                continue
            path = self._kit.folder / name
            files.append(_File(path, f"{self._harness}/{name}", digest, path.stat().st_size))
        told = self._must(
            script(
                [
                    _SWEEP,
                    f"mkdir -p {self._harness} {self._run} || exit 1",
                    "cat /proc/sys/kernel/random/boot_id",
                    "echo @space; df -k /data/local/tmp",
                    "echo @sizes; cd " + ROOT,
                    f"for d in objects harness/{self._kit.sha256}; do",
                    '  ( cd $d && stat -c "%s $d/%n" * 2>/dev/null )',
                    "done; true",
                ]
            ),
            "cannot make its folders",
            timeout_s=60,
        )
        parts = sections("boot", told)
        self._boot = parts["boot"].strip()
        have = {}
        for line in parts.get("sizes", "").splitlines():
            size, _, name = line.partition(" ")
            if size.isdigit():
                have[f"{ROOT}/{name}"] = int(size)
        missing = [f for f in files if have.get(f.target) != f.bytes]
        total = sum(f.bytes for f in missing)
        self._make_room(total, {f.target for f in files}, have, parse_free(parts.get("space", "")))
        with tempfile.TemporaryDirectory(prefix="handheld-") as name:
            manifest = Path(name) / MANIFEST
            manifest.write_text(json.dumps(flattened(self._bundle)))
            self._phone.push([manifest], f"{ROOT}/{MANIFEST}", manifest.stat().st_size)
        sent = 0
        for batch in batches(missing):
            self._sending(batch[0].source.name, sent, total)
            self._send_batch(batch)
            sent += sum(f.bytes for f in batch)
        if missing:
            # A phone that loses power now must not keep names of files without their bytes.
            self._phone.shell("sync", timeout_s=SYNC_S)
            self._sending("", total, total)
        self.transfer = Transfer(
            files=len(missing),
            bytes=total,
            kept_files=len(files) - len(missing),
            kept_bytes=sum(f.bytes for f in files) - total,
        )

    def _send_batch(self, batch: list[_File]) -> None:
        nbytes = sum(f.bytes for f in batch)
        with tempfile.TemporaryDirectory(prefix="handheld-") as name:
            # adb names what it sends after its source.
            links = [Path(name) / f"{i}" for i in range(len(batch))]
            for link, file in zip(links, batch, strict=True):
                link.symlink_to(file.source.resolve())
            self._phone.push(links, f"{self._run}/", nbytes)
        lines = [f"cd {self._run} || exit 1"]
        for i, file in enumerate(batch):
            lines += [
                # Old phones lack the command.
                f"sum=$(sha256sum {i} 2>/dev/null)",
                f'case "$sum" in ""|{file.sha256}*) ;; *) echo "@changed {i}"; exit 1;; esac',
                f"chmod 755 {i} && mv -f {i} {quote(file.target)} || exit 1",
            ]
        told = self._phone.shell(script(lines), timeout_s=adb.CALL_S + nbytes / 20_000_000)
        if found := re.search(r"@changed (\d+)", told.text):
            raise DeviceError(
                "a file changed on its way to the phone",
                path=batch[int(found[1])].source,
                remedy="fetch the bundle again, or use another cable",
            )
        if told.code:
            raise DeviceError(
                f"the phone cannot keep a file: {told.text.strip()}", field=self._phone.serial
            )

    def _make_room(
        self, need: int, wanted: set[str], have: dict[str, int], left: int | None
    ) -> None:
        if left is None or left >= need + SPARE_BYTES or not need:
            return
        # The cache gives way before a run fails.
        old = [n for n in have if n.startswith(f"{OBJECTS}/") and n not in wanted]
        lines = [f"rm -f {quote(name)}" for name in old]
        lines += [
            f"rm -rf {WEIGHTS}/*",
            f"cd {HARNESS} && for d in *; do",
            f'  [ "$d" = {self._kit.sha256} ] || rm -rf "$d"',
            "done",
            "df -k /data/local/tmp",
        ]
        left = parse_free(self._phone.shell(script(lines)).text)
        if left is not None and left < need + SPARE_BYTES:
            raise DeviceError(
                f"the phone has {left / 1e6:.0f} MB free, the bundle needs {need / 1e6:.0f} MB "
                f"and {SPARE_BYTES / 1e6:.0f} MB to spare",
                field=self._phone.serial,
                remedy="free some space on it",
            )

    def run(self, job: Job, timeout_s: float | None = None) -> Generator[Received, None, None]:
        """Run the harness on the phone."""
        remote = self._translate(job)
        lines = [f"mkdir -p {quote(f'{self._harness}/{remote.cache}')}"] if remote.cache else []
        lines += [
            f"cd {self._harness} || exit 1",
            f"printf %s {quote(remote.model_dump_json())} > {self._run}/job.json || exit 1",
            f"echo $$ > {self._run}/pid",
            *(f"export {k}={quote(v)}" for k, v in self._kit.info.environment.items()),
            *(_NPU if any(map(socs.is_skel, self._kit.info.files)) else ()),
            f"exec {' '.join(map(quote, self._kit.info.command))} {_seen(self._run)}/job.json",
        ]
        command = self._phone.shell_command(script(lines))
        ended = False
        try:
            for received in process.run(command, timeout_s=timeout_s, probe=self._probe):
                event = received.event
                if isinstance(event, Output) and event.file is not None:
                    event = event.model_copy(update={"file": job.output})
                if isinstance(event, Done):
                    self._fetch(job, remote)
                yield Received(event, received.since_spawn_ms)
            ended = True
        except NativeError:
            ended = True
            raise
        except process.HarnessEndedError as error:
            raise self._blame(error) from None
        finally:
            if not ended:
                # The adb program has ended, which does not end what it had started.
                with contextlib.suppress(DeviceError):
                    self._phone.shell(script(_ending(f"{self._run}/pid")), timeout_s=60)

    def _translate(self, job: Job) -> Job:
        """Return the job with the phone's paths, and send inputs that are not the bundle's."""
        known = {
            str(self._bundle.file(ref).resolve()): f"{OBJECTS}/{ref.sha256}"
            for _, ref in references(self._bundle.manifest)
        }

        def sent(source: TensorFile) -> TensorFile:
            path = Path(source.path).resolve()
            target = known.get(str(path))
            if target is None:
                target = f"{self._run}/{sha256_file(path)}"
                self._phone.push([path], target, path.stat().st_size)
                known[str(path)] = target
            return TensorFile(path=_seen(target), tensor=source.tensor)

        return job.model_copy(
            update={
                "bundle": _seen(ROOT),
                "inputs": {name: sent(source) for name, source in job.inputs.items()},
                "expect": sent(job.expect) if job.expect else None,
                "cache": _seen(self._cache(job.cache)) if job.cache else None,
                "output": _seen(f"{self._run}/picture.raw") if job.output else None,
                "dump_calls": _seen(f"{self._run}/calls.safetensors") if job.dump_calls else None,
            }
        )

    def _fetch(self, job: Job, remote: Job) -> None:
        for source, target in ((remote.output, job.output), (remote.dump_calls, job.dump_calls)):
            if source and target:
                self._phone.pull(f"{self._harness}/{source}", Path(target))

    def _probe(self) -> None:
        self._phone.shell("true")

    def _blame(self, error: process.HarnessEndedError) -> HandheldError:
        """Return why a harness ended: it is not to blame if the phone went away."""
        if self._phone.state() != "device" and not self._phone.attach():
            return self._phone.gone("it went away during the run")
        try:
            boot = self._phone.shell("cat /proc/sys/kernel/random/boot_id").text.strip()
        except DeviceError as other:
            return other
        if self._boot and boot != self._boot:
            return DeviceError(
                "the phone restarted during the run", field=self._phone.serial, remedy="run again"
            )
        if error.status in (0, 1):
            # A harness that fails says so first; adb itself ends with 1.
            return DeviceError(
                f"the connection to the phone broke, or the harness crashed: {error.message}",
                field=self._phone.serial,
                remedy="run again; check the cable and the adb server",
            )
        return error

    def forget_cache(self, cache: str) -> None:
        """Remove packed weights from the phone."""
        self._must(f"rm -rf {quote(self._cache(cache))}", "cannot remove packed weights")

    def _cache(self, cache: str) -> str:
        return f"{WEIGHTS}/{hashlib.sha256(cache.encode()).hexdigest()[:32]}"

    def _must(self, text: str, what: str, timeout_s: float = adb.CALL_S) -> str:
        done = self._phone.shell(text, timeout_s)
        if done.code:
            if "No space left" in done.text:
                what = "is full"
            raise DeviceError(f"the phone {what}: {done.text.strip()}", field=self._phone.serial)
        return done.text


def batches(files: list[_File], nbytes: int = BATCH_BYTES) -> Iterator[list[_File]]:
    """Put small files together, since each request takes a while of its own."""
    batch: list[_File] = []
    for file in files:
        if batch and sum(f.bytes for f in batch) + file.bytes > nbytes:
            yield batch
            batch = []
        batch.append(file)
    if batch:
        yield batch


def _seen(path: str) -> str:
    """Return a path below ROOT as seen from a harness's folder, in which it is started."""
    return path.replace(ROOT, "../..", 1)


def flattened(bundle: Bundle) -> dict[str, object]:
    """Return a bundle's manifest with every file at ``objects/SHA256``."""

    def walk(value: object) -> object:
        if isinstance(value, dict):
            if set(value) == {"path", "sha256", "bytes"}:
                return {**value, "path": f"objects/{value['sha256']}"}
            return {key: walk(item) for key, item in value.items()}
        if isinstance(value, list):
            return [walk(item) for item in value]
        return value

    tree = walk(bundle.manifest.model_dump(mode="json", exclude_none=True))
    assert isinstance(tree, dict)
    return tree


def sections(first: str, text: str) -> dict[str, str]:
    """Split text at lines such as ``@name``."""
    found: dict[str, list[str]] = {first: []}
    current = found[first]
    for line in text.splitlines():
        if re.fullmatch(r"@[a-z]+", line):
            current = found.setdefault(line[1:], [])
        else:
            current.append(line)
    return {name: "\n".join(lines) for name, lines in found.items()}


def parse_getprop(text: str) -> dict[str, str]:
    """Read what ``getprop`` prints: ``[name]: [value]``, values of several lines included."""
    pairs = re.findall(r"^\[([^\]\n]+)\]: \[(.*?)\]$", text, re.MULTILINE | re.DOTALL)
    return {name: value for name, value in pairs if value}


def soc(properties: Mapping[str, str]) -> str | None:
    """Return the name of the system on chip, from the best of the properties that name it."""
    maker = properties.get("ro.soc.manufacturer")
    for key in ("ro.soc.model", "ro.board.platform", "ro.hardware.chipname"):
        if (name := properties.get(key)) and name.lower() != "unknown":
            return f"{maker} {name}" if maker and key == "ro.soc.model" else name
    return None


def _joined(properties: Mapping[str, str], *keys: str) -> str | None:
    return " ".join(properties[k] for k in keys if k in properties) or None


def parse_meminfo(text: str) -> dict[str, int]:
    """Read ``/proc/meminfo``; sizes in bytes."""
    found = {}
    for name, value in re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE):
        found[name] = int(value) * 1024
    return found


def parse_cores(text: str) -> int | None:
    """Read ``0-7`` or ``0-3,6``."""
    if not re.fullmatch(r"\d{1,4}(-\d{1,4})?(,\d{1,4}(-\d{1,4})?)*", text.strip()):
        return None
    count = 0
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        count += int(last or first) - int(first) + 1
    return count if count > 0 else None


def parse_free(text: str) -> int | None:
    """Read the bytes free from ``df -k``, whose long names may break a line in two."""
    fields = text.split()
    percent = [i for i, f in enumerate(fields) if re.fullmatch(r"\d+%", f)]
    if not percent or percent[-1] < 1 or not fields[percent[-1] - 1].isdigit():
        return None
    return int(fields[percent[-1] - 1]) * 1024


def parse_heat(text: str) -> Heat:
    """Read thermal state, battery and load, as :data:`_HEAT` prints them."""
    told = sections("none", text)
    thermal, battery = told.get("thermal", ""), told.get("battery", "")
    status = re.search(r"^\s*Thermal Status: ([0-6])\s*$", thermal, re.MULTILINE)
    # Values before this line are cached ones, which can be hours old.
    _, _, current = thermal.partition("Current temperatures from HAL:")
    current = re.split(r"^\S", current, maxsplit=1, flags=re.MULTILINE)[0]
    celsius = []
    for value, kind in re.findall(r"mValue=(-?\d+(?:\.\d+)?), mType=(-?\d+)", current):
        # 0 processor, 1 graphics, 3 skin, 9 neural unit; an absent sensor says -99.9 or the like.
        if kind in ("0", "1", "3", "9") and 0 < float(value) < 150:
            celsius.append(float(value))

    def field(name: str) -> str | None:
        # Some makers append older values: the first is the present one.
        found = re.search(rf"^\s*{name}: (\S+)\s*$", battery, re.MULTILINE)
        return found[1] if found else None

    def number(name: str) -> int | None:
        value = field(name)
        return int(value) if value and re.fullmatch(r"-?\d{1,9}", value) else None

    level, scale, tenths = number("level"), number("scale"), number("temperature")
    powered = [field(f"{source} powered") for source in ("AC", "USB", "Wireless", "Dock")]
    percent = 100 * level / scale if level is not None and scale else None
    return Heat(
        status=int(status[1]) if status else None,
        celsius=max(celsius, default=None),
        battery_celsius=None if tenths is None else tenths / 10,
        battery_percent=percent if percent is not None and 0 <= percent <= 100 else None,
        charging=None if not any(powered) else "true" in powered,
        charge_uah=number("Charge counter"),
        battery_mv=number("voltage"),
        busy=_busy(told.get("load", "")),
    )


def _busy(text: str) -> float | None:
    rows = [[int(v) for v in line.split()[1:9]] for line in text.splitlines() if _is_load(line)]
    if len(rows) != 2:
        return None
    before, after = rows
    total = sum(after) - sum(before)
    idle = after[3] + after[4] - before[3] - before[4]
    return min(1.0, max(0.0, 1 - idle / total)) if total > 0 else None


def _is_load(line: str) -> bool:
    return bool(re.fullmatch(r"cpu(\s+\d{1,18}){8,}", line.strip()))
