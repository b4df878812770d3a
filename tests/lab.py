"""An adb server of the tests' own, with test phones attached, and kits that phones run."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from handheld import kit
from phone import PROFILES, Phone


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@contextmanager
def adb_server(folder: Path) -> Iterator[dict[str, str]]:
    """Yield the environment in which adb has a server, keys and a home of its own."""
    program = shutil.which("adb")
    assert program is not None
    folder.mkdir(parents=True, exist_ok=True)
    environment = {
        "HANDHELD_ADB": program,
        "ANDROID_ADB_SERVER_PORT": str(free_port()),
        "ADB_MDNS_AUTO_CONNECT": "",
        "HOME": str(folder),
    }
    try:
        yield environment
    finally:
        adb("kill-server", environment=environment)


def adb(*arguments: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [environment["HANDHELD_ADB"], *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def connect(phone: Phone, environment: dict[str, str]) -> None:
    """Attach a phone and wait until it answers."""
    deadline = time.monotonic() + 30
    while True:
        adb("connect", phone.address, environment=environment)
        state = adb("-s", phone.address, "get-state", environment=environment)
        if state.stdout.strip() == "device" or not phone.state.authorized:
            return
        assert time.monotonic() < deadline, state
        time.sleep(0.2)


def disconnect(phone: Phone, environment: dict[str, str]) -> None:
    """Detach a phone and wait until the server has forgotten it."""
    deadline = time.monotonic() + 30
    while True:
        adb("disconnect", phone.address, environment=environment)
        listed = adb("devices", environment=environment).stdout
        if phone.address not in listed:
            return
        assert time.monotonic() < deadline, listed
        time.sleep(0.1)


def make_phone(folder: Path, profile: str = "qualcomm", serial: str = "R5CX1234567") -> Phone:
    return Phone(folder, PROFILES[profile], serial=serial)


def fake_kit(folder: Path) -> Path:
    """Make a kit of the stand-in for the harness; return the folder of kits."""
    import samples

    target = folder / "linux-x86_64"
    target.mkdir(parents=True)
    source = Path(__file__).with_name("fake_harness.py")
    (target / "fake_harness.py").write_text(source.read_text())
    (target / "picture.raw").write_bytes(samples.picture().tobytes())
    program = target / "handheld-harness"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -SE ./fake_harness.py "$@"\n')
    program.chmod(0o755)
    kit.write(target, "linux-x86_64", {"litert": "2.3.0"}, ("./handheld-harness",), {})
    return folder


@contextmanager
def environ(values: dict[str, str]) -> Iterator[None]:
    """Change this process's environment for a while."""
    before = {key: os.environ.get(key) for key in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for key, value in before.items():
            with contextlib.suppress(KeyError):
                if value is None:
                    del os.environ[key]
                else:
                    os.environ[key] = value
