"""A stand-in for ``xcrun devicectl`` and the benchmark app on an iPhone, backed by a folder.

``state.json`` in the folder says how it behaves; :class:`IPhone` writes it. It answers with
the envelopes of devicectl's versions, writes them only where ``--json-output`` says, and
prints a table that nobody may read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

CORE = "com.apple.dt.CoreDeviceError"
IDENTIFIER = "4F480C10-679A-47F3-AE36-99D0EC643774"
UDID = "00008130-001C4D5A1E80001C"


class IPhone:
    """What a test sees of it."""

    def __init__(self, folder: Path, **state: Any) -> None:
        import fake_harness

        self.folder = folder
        fake_harness.install(folder)
        self.files = folder / "container" / "Documents" / "handheld"
        self.files.mkdir(parents=True)
        self.xcrun = folder / "xcrun"
        copy = folder / "fake_xcrun.py"
        copy.write_text(Path(__file__).read_text())
        self.xcrun.write_text(f'#!/bin/sh\nexec {sys.executable} -SE {copy} {folder} "$@"\n')
        self.xcrun.chmod(0o755)
        self.pmd = folder / "pymobiledevice3"
        words = f"{sys.executable} -SE {copy} {folder} --pmd"
        self.pmd.write_text(f'#!/bin/sh\nexec {words} "$@"\n')
        self.pmd.chmod(0o755)
        self.set(**state)

    def set(self, **state: Any) -> None:
        (self.folder / "state.json").write_text(json.dumps(state))

    def calls(self) -> list[list[str]]:
        path = self.folder / "calls.jsonl"
        return [json.loads(x) for x in path.read_text().splitlines()] if path.exists() else []

    def left(self) -> list[str]:
        found = [p.relative_to(self.files) for p in self.files.rglob("*") if p.is_file()]
        return [
            str(p)
            for p in found
            if p.parts[0] not in ("objects", "weights") and not p.name.startswith("report-")
        ]

    def running(self) -> list[int]:
        return _running(self.folder)

    def terminated(self) -> list[int]:
        """Return the apps that were ended by a call."""
        return [int(option(c, "--pid")) for c in self.calls() if "terminate" in c]

    def is_idle(self, patience_s: float = 20) -> bool:
        """Tell whether no app is left; one that has just reported is on its way out."""
        deadline = time.monotonic() + patience_s
        while self.running() and time.monotonic() < deadline:
            time.sleep(0.05)
        return self.running() == []


def _running(folder: Path) -> list[int]:
    found = []
    for path in (folder / "pids").glob("*"):
        with contextlib.suppress(OSError):
            if "Z" not in Path(f"/proc/{path.name}/stat").read_text().rpartition(")")[2][:3]:
                found.append(int(path.name))
    return found


class FailedError(Exception):
    def __init__(self, domain: str, code: int, text: str, under: dict[str, Any] | None = None):
        super().__init__(text)
        user: dict[str, Any] = {"NSLocalizedDescription": {"string": text}}
        if under is not None:
            user["NSUnderlyingError"] = {"error": under}
        self.error = {"domain": domain, "code": code, "userInfo": user}


def under(domain: str, code: int, text: str) -> dict[str, Any]:
    user = {"NSLocalizedFailureReason": {"string": text}}
    return {"domain": domain, "code": code, "userInfo": user}


def main() -> None:
    folder, arguments = Path(sys.argv[1]), sys.argv[2:]
    state = json.loads((folder / "state.json").read_text())
    if arguments and arguments[0] == "--app":
        app(folder, state, arguments[1:])
        return
    if arguments and arguments[0] == "--pmd":
        pymobiledevice3(folder, state, arguments[1:])
        return
    assert arguments[0] == "devicectl", arguments
    with (folder / "calls.jsonl").open("a") as f:
        f.write(json.dumps(arguments) + "\n")
    answer = Path(arguments[arguments.index("--json-output") + 1])
    i = arguments.index(str(answer)) + 1
    words = list(arguments[i:])
    print("Name   Identifier   State\n----   ----------   -----\nnot to be read")
    if "hang" in state:
        time.sleep(600)
    if "silent" in state:
        sys.exit(1)
    if "garbage" in state:
        answer.write_text(state["garbage"])
        sys.exit(0)
    info: dict[str, Any] = {"arguments": arguments, "outcome": "success", "version": "397.28"}
    info["commandType"] = "devicectl." + ".".join(words[: 2 if words[0] == "list" else 3])
    version = state.get("version", 3)
    if version > 1:
        info["jsonVersion"] = version
    envelope: dict[str, Any] = {"info": info}
    try:
        if "timeout" in state:
            info["outcome"] = "timeout"
        else:
            envelope["result"] = command(folder, state, words)
    except FailedError as error:
        info["outcome"] = "failed"
        envelope["error"] = error.error
    answer.write_text(json.dumps(envelope))
    sys.exit(0 if info["outcome"] == "success" else 1)


def option(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


def command(folder: Path, state: dict[str, Any], words: list[str]) -> dict[str, Any]:
    if words[:2] == ["list", "devices"]:
        return {"devices": [device(state)]}
    assert words[0] == "device"
    assert option(words, "--device") == IDENTIFIER
    copies = (folder / "calls.jsonl").read_text().count('"copy", "to"')
    if "gone" in state or copies > state.get("gone_after_copies", copies):
        raise FailedError(CORE, 1011, "The device is not connected.")
    match words[1:3]:
        case ["process", "launch"]:
            return launch(folder, state, words[words.index("--terminate-existing") + 1 :])
        case ["process", "terminate"]:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(int(option(words, "--pid")), signal.SIGKILL)
            return {}
        case ["info", "processes"]:
            found = [{"processIdentifier": p, "executable": "Bench"} for p in _running(folder)]
            return {"runningProcesses": found}
        case ["info", "lockState"]:
            if "no_values" in state:
                raise FailedError(CORE, 1001, "Unknown command.")
            locked = {"passcodeRequired": "locked" in state, "unlockedSinceBoot": True}
            return {"deviceIdentifier": IDENTIFIER, **locked}
        case ["install", "app"]:
            installed = {k: v for k, v in state.items() if k != "not_installed"}
            (folder / "state.json").write_text(json.dumps(installed))
            return {"installedApplications": [{"bundleID": "dev.handheld.bench"}]}
        case ["copy", direction]:
            return copy(folder, state, words, direction)
    raise AssertionError(words)


def device(state: dict[str, Any]) -> dict[str, Any]:
    connection = {"pairingState": "paired", "transportType": "wired", "tunnelState": "connected"}
    properties = {
        "name": "Test iPhone", "osVersionNumber": "18.1", "osBuildUpdate": "22B83",
        "developerModeStatus": "enabled", "ddiServicesAvailable": True,
    }  # fmt: skip
    hardware = {
        "udid": UDID, "productType": "iPhone16,1", "marketingName": "iPhone 15 Pro",
        "platform": "iOS", "cpuType": {"name": "arm64e"}, "reality": "physical",
        "internalStorageCapacity": 256_000_000_000,
    }  # fmt: skip
    for part, changes in (
        (connection, state.get("connection", {})),
        (properties, state.get("properties", {})),
        (hardware, state.get("hardware", {})),
    ):
        part.update(changes)
        for key in [k for k, v in part.items() if v is None]:
            del part[key]
    return {
        "identifier": IDENTIFIER,
        "connectionProperties": connection,
        "deviceProperties": properties,
        "hardwareProperties": hardware,
        "visibilityClass": "default",
    }


def launch(folder: Path, state: dict[str, Any], words: list[str]) -> dict[str, Any]:
    board = "FBSOpenApplicationErrorDomain"
    if "not_installed" in state:
        raise FailedError(
            CORE, 10002, "The application failed to launch.",
            under("FBSOpenApplicationServiceErrorDomain", 1, "The app is not installed."),
        )  # fmt: skip
    if "locked" in state:
        raise FailedError(CORE, 10002, "The application failed to launch.",
                          under(board, 7, "Unable to launch because the device was not, or could "
                                "not be, unlocked."))  # fmt: skip
    if "untrusted" in state:
        raise FailedError(CORE, 10002, "The application failed to launch.",
                          under(board, 3, "denied: untrusted developer"))  # fmt: skip
    for pid in _running(folder):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    process = subprocess.Popen(
        [sys.executable, "-SE", __file__, str(folder), "--app", *words[1:]],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    (folder / "pids").mkdir(exist_ok=True)
    (folder / "pids" / str(process.pid)).touch()
    return {"process": {"processIdentifier": process.pid, "executable": "file:///Bench.app/Bench"}}


def copy(folder: Path, state: dict[str, Any], words: list[str], direction: str) -> dict[str, Any]:
    source, target = option(words, "--source"), option(words, "--destination")
    once = folder / "timed-out"
    if "copy_timeout" in state and not once.exists():
        once.touch()
        raise FailedError(CORE, 7000, "The file could not be copied.",
                          under("NSPOSIXErrorDomain", 60, "Operation timed out"))  # fmt: skip
    container = folder / "container"
    if direction == "from":
        if not (container / source).is_file():
            raise FailedError(CORE, 7000, "The file could not be copied.",
                              under("NSCocoaErrorDomain", 260, "no such file"))  # fmt: skip
        shutil.copyfile(container / source, target)
        return {"files": []}
    (container / target).parent.mkdir(parents=True, exist_ok=True)
    if Path(source).stat().st_size > state.get("room", sys.maxsize):
        (container / target).write_bytes(Path(source).read_bytes()[: state["room"]])
        raise FailedError(CORE, 7000, "The file could not be copied.",
                          under("NSPOSIXErrorDomain", 28, "No space left on device"))  # fmt: skip
    shutil.copyfile(source, container / target)
    if "flip" in state and len(Path(target).name) == 64:
        data = bytearray((container / target).read_bytes())
        data[0] ^= 1
        (container / target).write_bytes(data)
    return {"files": []}


def pymobiledevice3(folder: Path, state: dict[str, Any], arguments: list[str]) -> None:
    """Do as the program pymobiledevice3 does, of which ``--udid`` may be anywhere."""
    with (folder / "calls.jsonl").open("a") as f:
        f.write(json.dumps(arguments) + "\n")
    assert arguments.pop(0) == "--no-color"
    if "hang" in state:
        time.sleep(600)
    if "garbage" in state:
        print(state["garbage"])
        return
    words = list(arguments)
    if words[:2] == ["usbmux", "list"]:
        if "fails" in state:
            fails(state["fails"])
        if words[2:] == ["--simple"]:
            print(json.dumps([UDID, UDID], indent=4))
            return
        if "recovery" in state:
            fails("Incorrect mode returned. Got: {'Type': 'com.apple.mobile.restored'}")
        if "gone" in state:
            print("[]")
            return
        known = {
            "BuildVersion": "22B83", "ConnectionType": "USB", "DeviceClass": "iPhone",
            "DeviceName": "Test iPhone", "Identifier": UDID, "ProductType": "iPhone16,1",
            "ProductVersion": state.get("ios", "18.1"), "UniqueDeviceID": UDID,
        }  # fmt: skip
        network = {**known, "ConnectionType": "Network"}
        print(json.dumps([known, network, {**known, "DeviceClass": "Watch"}, {"odd": 1}], indent=4))
        return
    at = words.index("--udid")
    assert words[at + 1] == UDID
    del words[at : at + 2]
    for key in ("fails", "recovery", "phone_fails"):
        if key in state:
            fails(state[key])
    if "unpaired" in state:
        # All of these pair first, and wait for the user for ever.
        print("2026-01-01 12:00:00 host pymobiledevice3.lockdown[1] INFO waiting user pairing "
              "dialog...", file=sys.stderr, flush=True)  # fmt: skip
        time.sleep(600)
    container = folder / "container"
    match words:
        case ["amfi", "developer-mode-status"]:
            print(json.dumps(state.get("developer_mode", True)))
        case ["lockdown", "get", "", "PasswordProtected"]:
            if "no_values" in state:
                fails("No such value.")
            print(json.dumps("locked" in state))
        case ["mounter", "list"]:
            image = {"DiskImageType": "Personalized", "ImageSignature": "00ff"}
            print(json.dumps([] if "unmounted" in state else [image], indent=4))
        case ["developer", "dvt", "launch", "--userspace", text]:
            try:
                found = launch(folder, state, shlex.split(text))
            except FailedError as error:
                fails(str(error))
            print(f"Process launched with pid {found['process']['processIdentifier']}")
        case ["developer", "dvt", "kill", "--userspace", pid]:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(int(pid), signal.SIGKILL)
        case ["developer", "dvt", "is-running-pid", "--userspace", pid]:
            print(json.dumps(int(pid) in _running(folder)))
        case ["apps", "query", name]:
            print(json.dumps({} if "not_installed" in state else {name: {"CFBundleName": "Bench"}}))
        case ["apps", "install", path]:
            assert Path(path).is_dir()
            command(folder, state, ["device", "install", "app", "--device", IDENTIFIER])
        case ["apps", "push", _, source, target]:
            place = container / target
            assert place.is_dir(), "AFC makes no folder above what is sent"
            assert Path(source).is_dir(), "a file alone would need its folder to be there"
            shutil.copytree(source, place / Path(source).name, dirs_exist_ok=True)
        case ["apps", "pull", _, source, target]:
            if not (container / source).is_file():
                fails(f"No such file on the device: {source} (AFC status OBJECT_NOT_FOUND).")
            shutil.copyfile(container / source, target)
        case _:
            raise AssertionError(words)


def fails(text: str) -> NoReturn:
    head = "2026-01-01 12:00:00 host pymobiledevice3.__main__[1]"
    print(f"{head} ERROR {text}", file=sys.stderr)
    print(f"{head} INFO Run again with -v for the full traceback", file=sys.stderr)
    sys.exit(1)


def lay_out(bundle: Path) -> None:
    """Make a bundle's files of those that are named by their hashes, as Objects.lay does."""
    bundle.mkdir()
    Path("incoming/manifest.json").replace(bundle / "manifest.json")
    manifest = json.loads((bundle / "manifest.json").read_text())
    refs = [ref for a in manifest["artifacts"] for ref in (a["file"], *a["parts"])]
    if manifest["constants"]:
        refs.append(manifest["constants"])
    for ref in refs:
        (bundle / ref["path"]).parent.mkdir(parents=True, exist_ok=True)
        if not (bundle / ref["path"]).exists():
            os.link(Path("objects") / ref["sha256"], bundle / ref["path"])


def engines(state: dict[str, Any]) -> dict[str, str]:
    return state.get("engines", {"litert": "2.3.0", "coreml": "18.1"})


def app(folder: Path, state: dict[str, Any], arguments: list[str]) -> None:
    """Do what the benchmark app does."""
    home = folder / "container" / "Documents" / "handheld"
    os.chdir(home)
    for name in ("incoming", "objects", "weights", "runs"):
        Path(name).mkdir(exist_ok=True)
    for path in Path("incoming").iterdir():
        if len(path.name) == 64:
            good = hashlib.sha256(path.read_bytes()).hexdigest() == path.name
            path.replace(Path("objects") / path.name) if good else path.unlink()
    time.sleep(state.get("launch_s", 0))
    if "--forget" in arguments:
        shutil.rmtree(option(arguments, "--forget"), ignore_errors=True)
    shutil.rmtree("runs")
    for path in Path().glob("report-*"):
        path.unlink()
    shutil.rmtree("bundle", ignore_errors=True)
    if arguments[0] != "--job":
        shutil.rmtree("incoming")
    if arguments[0] == "--report":
        report = {
            "objects": {p.name: p.stat().st_size for p in Path("objects").iterdir()},
            "engines": engines(state), "ram_bytes": 8_000_000_000,
            "free_bytes": state.get("free", 90_000_000_000), "cores": 6,
            "thermal": state.get("thermal", 0), "battery_percent": 77, "charging": True,
        }  # fmt: skip
        part = Path(f"{arguments[1]}.part")
        part.write_text(json.dumps(report))
        part.replace(arguments[1])
    if arguments[0] == "--job":
        run = Path(arguments[1])
        run.mkdir(parents=True)
        lay_out(Path("bundle"))
        Path("incoming/job.json").replace(run / "job.json")
        cache = json.loads((run / "job.json").read_text())["cache"]
        if cache:
            Path(cache).mkdir(parents=True, exist_ok=True)
        shutil.copytree("bundle", folder / "bundle-of-the-last-job", dirs_exist_ok=True)
        with (run / "events.jsonl").open("wb") as out:
            subprocess.run(
                [sys.executable, "-SE", folder / "fake_harness.py", run / "job.json"],
                stdin=subprocess.DEVNULL, stdout=out, check=False,
                env={**os.environ, "HANDHELD_FAKE": state.get("harness", ""),
                     "HANDHELD_FAKE_ENGINES": json.dumps(engines(state))},
            )  # fmt: skip


if __name__ == "__main__":
    main()
