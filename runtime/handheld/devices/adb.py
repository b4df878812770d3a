"""The ``adb`` program as a subprocess: every call ends, and every failure has a name.

One program serves the whole process, since clients of different versions end each other's
server. It may talk to servers on other machines: ``HANDHELD_ADB_SERVERS`` names them, as
``tcp:HOST:PORT`` with commas between. No argument passes through a shell of this machine.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

from handheld.devices import programs
from handheld.errors import DeviceError

PROGRAM: Final = "HANDHELD_ADB"
"""Environment variable: the program to use instead of the ``adb`` on PATH."""
SERVERS: Final = "HANDHELD_ADB_SERVERS"

CALL_S = 30.0
"""How long a small request may take."""
ATTACH_S = 15.0
SLOWEST_BYTES_PER_S = 250_000
"""A transfer slower than this is taken for a hanging one."""
LARGEST_PULL_BYTES = 256 * 2**20
_EXIT = "@handheld-exit "


def program() -> str | None:
    """Return the adb program, or None if there is none."""
    return shutil.which(os.environ.get(PROGRAM) or "adb")


def servers() -> list[str | None]:
    """Return the adb servers to ask; None is the one that adb itself would choose."""
    named = os.environ.get(SERVERS, "")
    return [part.strip() for part in named.split(",") if part.strip()] or [None]


@cache
def version(path: str) -> str:
    """Return the version of an adb program."""
    try:
        done = programs.call("adb", [path, "version"], CALL_S)
    except DeviceError:
        return "unknown"
    found = re.search(r"^Version (\S+)", done.out, re.MULTILINE)
    return found[1] if found else "unknown"


@dataclass(frozen=True)
class Listed:
    """One line of ``adb devices``."""

    serial: str
    state: str
    """``device`` if it can be used, else ``unauthorized``, ``offline``, ..."""
    model: str | None = None


@dataclass(frozen=True)
class Output:
    """What a command on the device printed, and its exit code."""

    text: str
    code: int


@dataclass(frozen=True)
class Server:
    """One adb server."""

    socket: str | None = None

    def command(self, *arguments: str) -> list[str]:
        """Return the command line of a request.

        Raises
        ------
        DeviceError
            If there is no adb.
        """
        found = program()
        if found is None:
            raise DeviceError(
                "there is no adb program here", remedy=f"apt install adb, or set {PROGRAM}"
            )
        return [found, *(("-L", self.socket) if self.socket else ()), *arguments]

    def call(self, *arguments: str, timeout_s: float = CALL_S) -> programs.Ended:
        """Make a request and return what adb answered, whatever it was.

        Raises
        ------
        DeviceError
            If adb takes too long or cannot be started.
        """
        done = programs.call(
            "adb",
            self.command(*arguments),
            timeout_s,
            field=self.socket,
            remedy="check the cable, or restart the server: adb kill-server",
        )
        if "doesn't match this client" in done.err:
            raise DeviceError(
                "another version of adb runs the server, and the two end each other",
                field=self.socket,
                remedy=f"use one adb everywhere: set {PROGRAM} to it",
            )
        return done

    def devices(self) -> list[Listed]:
        """Return what the server knows of.

        Raises
        ------
        DeviceError
            If there is no server.
        """
        done = self.call("devices", "-l")
        if done.code:
            raise DeviceError(
                f"adb cannot list devices: {_last_line(done.err)}",
                field=self.socket,
                remedy="check that the adb server runs and can be reached",
            )
        return parse_devices(done.out)

    def connect(self, address: str) -> bool:
        """Attach a phone on the network again; tell whether it is there."""
        # The exit code is 0 in any case.
        self.call("connect", address)
        return any(d.serial == address and d.state == "device" for d in self.devices())


def parse_devices(text: str) -> list[Listed]:
    """Read what ``adb devices -l`` prints."""
    found = []
    for line in text.splitlines():
        fields = line.split()
        if len(fields) < 2 or line.startswith(("*", "List of devices")):
            continue
        state = "no permissions" if fields[1:3] == ["no", "permissions"] else fields[1]
        model = next((f[6:] for f in fields[2:] if f.startswith("model:")), None)
        found.append(Listed(fields[0], state.rstrip(";"), model))
    return found


@dataclass(frozen=True)
class Phone:
    """One phone of a server."""

    server: Server
    serial: str

    def command(self, *arguments: str) -> list[str]:
        """Return the command line of a request to the phone."""
        return self.server.command("-s", self.serial, *arguments)

    def shell_command(self, script: str) -> list[str]:
        """Return the command line that runs a script on the phone."""
        # -n: standard input stays here.
        return self.command("shell", "-n", script)

    def shell(self, script: str, timeout_s: float = CALL_S) -> Output:
        """Run a script in the phone's shell.

        Values in it must have passed :func:`quote`.

        Raises
        ------
        DeviceError
            If the phone is gone, or did not answer in time.
        """
        # Phones without shell_v2 tell no exit code, and a broken connection must not look
        # like a command that ended, so the script itself says the last word.
        # Parentheses keep an `exit` in it from taking that away.
        text = f'(\n{script}\n)\necho "{_EXIT}$?"'
        done = self.server.call("-s", self.serial, "shell", "-n", text, timeout_s=timeout_s)
        body, found, code = done.out.replace("\r\n", "\n").rpartition(_EXIT)
        if not found or not code.strip().isdigit():
            raise self.gone(_last_line(done.err or done.out))
        return Output(body, int(code))

    def push(self, sources: Sequence[Path], target: str, nbytes: int) -> None:
        """Send files: one to a name, or several into a folder.

        Raises
        ------
        DeviceError
            If they did not all arrive.
        """
        self._transfer("push", [*(str(p.absolute()) for p in sources), target], nbytes)

    def pull(self, source: str, target: Path) -> None:
        """Fetch a file.

        Raises
        ------
        DeviceError
            If it did not arrive.
        """
        self._transfer("pull", [source, str(target.absolute())], LARGEST_PULL_BYTES)
        if not target.is_file():
            raise DeviceError("adb brought nothing", path=source)

    def _transfer(self, verb: str, paths: list[str], nbytes: int) -> None:
        seconds = CALL_S + nbytes / SLOWEST_BYTES_PER_S
        done = self.server.call("-s", self.serial, verb, *paths, timeout_s=seconds)
        if done.code == 0:
            return
        said = f"{done.out}\n{done.err}"
        reason = _last_line("\n".join(x for x in said.splitlines() if "error" in x) or said)
        if "No space left" in said:
            raise DeviceError(
                "the phone's storage is full", field=self.serial, remedy="free some space on it"
            )
        if self.state() != "device":
            raise self.gone(reason)
        raise DeviceError(f"adb could not {verb} a file: {reason}", field=self.serial)

    def state(self) -> str:
        """Return the phone's state, ``gone`` if the server does not know it."""
        try:
            listed = self.server.devices()
        except DeviceError:
            return "gone"
        return next((d.state for d in listed if d.serial == self.serial), "gone")

    def attach(self) -> bool:
        """Tell whether the phone is there, after looking for it once more."""
        if self.state() == "device":
            return True
        with contextlib.suppress(DeviceError):
            if ":" in self.serial:
                # The server holds on to a dead connection and would call it connected.
                self.server.call("disconnect", self.serial)
                return self.server.connect(self.serial)
            self.server.call("-s", self.serial, "reconnect")
            self.server.call("-s", self.serial, "wait-for-device", timeout_s=ATTACH_S)
            return self.state() == "device"
        return False

    def gone(self, reason: str = "") -> DeviceError:
        """Return the error that says that the phone went away."""
        said = f": {reason}" if reason else ""
        return DeviceError(
            f"the phone does not answer{said}",
            field=self.serial,
            remedy="plug it in again; what it has done so far is kept",
        )


def quote(value: str) -> str:
    """Make a value one word of a script for the phone's shell."""
    return shlex.quote(value)


def script(lines: Sequence[str]) -> str:
    """Join lines of a script."""
    return "\n".join(lines)


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no reason was given"
