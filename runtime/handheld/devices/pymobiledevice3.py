"""The program ``pymobiledevice3`` (PyPI), which reaches iPhones from Linux too.

Not run on hardware. It is licensed GPL-3, so it is run as a program of its own and never imported.
What it says in JSON is read; of its errors the text is all there is. From iOS 17 on, developer
services need a tunnel: ``--userspace`` makes one in the program itself, without root. Written
against version 11.45.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import tempfile
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from handheld.devices import programs
from handheld.devices.base import Obstacle
from handheld.devices.iphone import (
    CALL_S,
    INSTALL_S,
    Facts,
    Iphone,
    NotInstalledError,
    copy_seconds,
    developer_mode_is_off,
    is_locked,
    is_too_old,
)
from handheld.errors import DeviceError

PROGRAM: Final = "HANDHELD_PYMOBILEDEVICE3"
"""Environment variable: the program to use instead of the one on PATH."""
NAME: Final = "pymobiledevice3"
ASK_S = 20.0
"""How long a phone may take to say how it is; one that is not paired waits for its user."""
_ERROR: Final = re.compile(r"\bERROR\b\s*(.+)")
_MISSING: Final = re.compile(r"No such file on the device|OBJECT_NOT_FOUND")
_PID: Final = re.compile(r"Process launched with pid (\d+)")
_MOUNT: Final = f"run  {NAME} mounter auto-mount"
_REMEDIES: Final = (
    (r"not trust|to trust|not paired|Trust dialog", "unlock the phone, plug it in and tap Trust"),
    (r"Pair it again", f"unlock the phone and run  {NAME} lockdown pair"),
    (r"password protected|passcode|was not, or could not be, unlocked", "unlock the phone"),
    (r"Developer Mode", "turn Developer Mode on: Settings, Privacy & Security, Developer Mode"),
    (r"DeveloperDiskImage|InvalidService", _MOUNT),
    (r"usbmuxd", "install and start usbmuxd"),
    (r"not connected|No device|Device not found|terminated", "plug the phone in again"),
)


class Listed(BaseModel):
    """One of ``usbmux list``; newer versions say more than what is read here."""

    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True)
    udid: str = Field(alias="UniqueDeviceID")
    kind: str | None = Field(default=None, alias="DeviceClass")
    product_type: str | None = Field(default=None, alias="ProductType")
    os_version: str | None = Field(default=None, alias="ProductVersion")
    os_build: str | None = Field(default=None, alias="BuildVersion")


def program() -> str | None:
    """Return the program, or None if there is none."""
    return shutil.which(os.environ.get(PROGRAM) or NAME)


def devices() -> list[Listed]:
    """Return the iPhones and iPads at hand.

    Raises
    ------
    DeviceError
        If the program fails or says something else.
    """
    try:
        tree = _json(_call(["usbmux", "list"], CALL_S).out)
    except DeviceError:
        # One phone that does not answer, in recovery say, keeps it from telling of any.
        tree = _json(_call(["usbmux", "list", "--simple"], CALL_S).out)
    if not isinstance(tree, list):
        raise _not_understood()
    found: dict[str, Listed] = {}
    for item in tree:
        try:
            listed = Listed.model_validate(
                {"UniqueDeviceID": item} if isinstance(item, str) else item
            )
        except ValidationError:
            continue
        if listed.kind in (None, "iPhone", "iPad"):
            # A phone is listed once for its cable and once for the network.
            found.setdefault(listed.udid, listed)
    return list(found.values())


def phones() -> list[Pymobiledevice3]:
    """Return the iPhones and iPads at hand.

    Raises
    ------
    DeviceError
        If the program fails or says something else.
    """
    return [Pymobiledevice3(listed) for listed in devices()]


def obstacle(listed: Listed) -> Obstacle | None:
    """Ask a phone what keeps it from being used.

    One that does not trust this machine then asks its user whether it should.
    """
    serial = listed.udid
    if old := is_too_old(listed.os_version, serial):
        return old
    try:
        told = _json(_call(["amfi", "developer-mode-status", "--udid", serial], ASK_S).out)
        if not isinstance(told, bool):
            raise _not_understood()
        if not told:
            return developer_mode_is_off(serial)
        if _is_locked(serial):
            return is_locked(serial)
        if not _json(_call(["mounter", "list", "--udid", serial], ASK_S).out):
            return Obstacle("its developer services are not available", _MOUNT, serial)
    except programs.TooLongError as error:
        if re.search("pairing dialog", error.said):
            return Obstacle("does not trust this machine yet", "unlock it and tap Trust", serial)
        return Obstacle(error.message, error.remedy or "", serial)
    except DeviceError as error:
        return Obstacle(error.message, error.remedy or "", serial)
    return None


def _is_locked(serial: str) -> bool:
    # The empty word is the domain that has no name. Some phones may lack the value.
    arguments = ["lockdown", "get", "--udid", serial, "", "PasswordProtected"]
    try:
        return _json(_call(arguments, ASK_S).out) is True
    except programs.TooLongError:
        raise
    except DeviceError:
        return False


class Pymobiledevice3(Iphone):
    """An iPhone, by this program."""

    transport = NAME

    def __init__(self, listed: Listed) -> None:
        self._listed = listed
        self.serial = listed.udid
        system = "iPadOS" if listed.kind == "iPad" else "iOS"
        self.facts = Facts(
            product_type=listed.product_type,
            os=f"{system} {listed.os_version or '?'}",
            os_build=listed.os_build,
        )

    def obstacle(self) -> Obstacle | None:
        """Ask the phone what keeps it from being used."""
        return obstacle(self._listed)

    def launch(self, app: str, arguments: list[str]) -> int:
        """Start an app anew and return its process id."""
        # The program splits this one argument as a shell would.
        words = shlex.join([app, *arguments])
        try:
            answer = self._developer("launch", words).out
        except DeviceError:
            # Its text does not say why in words that stay the same.
            if not self._is_installed(app):
                raise NotInstalledError(f"{app} is not on the phone") from None
            raise
        match = _PID.search(answer)
        if match is None:
            raise _not_understood()
        return int(match[1])

    def _is_installed(self, app: str) -> bool:
        found = _json(_call(["apps", "query", "--udid", self.serial, app], CALL_S).out)
        return isinstance(found, dict) and app in found

    def is_running(self, pid: int) -> bool:
        """Tell whether a process is there."""
        answer = _json(self._developer("is-running-pid", str(pid)).out)
        if not isinstance(answer, bool):
            raise _not_understood()
        return answer

    def terminate(self, pid: int) -> None:
        """End a process."""
        self._developer("kill", str(pid))

    def install(self, path: Path) -> None:
        """Install a built app."""
        command = ["apps", "install", "--udid", self.serial, str(path.absolute())]
        _call(command, INSTALL_S)

    def copy_to(self, app: str, source: Path, target: str) -> None:
        """Send a file; its folder is sent with it, which makes it on the phone."""
        folder, _, name = target.rpartition("/")
        above, _, last = folder.rpartition("/")
        with tempfile.TemporaryDirectory(prefix="handheld-") as temporary:
            staged = Path(temporary) / last
            staged.mkdir()
            (staged / name).symlink_to(source.absolute())
            command = ["apps", "push", "--udid", self.serial, app, str(staged), above]
            _call(command, copy_seconds(source))

    def copy_from(self, app: str, source: str, target: Path) -> bool:
        """Fetch a file; tell whether it was there."""
        command = ["apps", "pull", "--udid", self.serial, app, source, str(target.absolute())]
        try:
            _call(command, INSTALL_S)
        except _MissingError:
            return False
        return target.is_file()

    def _developer(self, verb: str, *arguments: str) -> programs.Ended:
        command = ["developer", "dvt", verb, "--userspace", "--udid", self.serial, *arguments]
        return _call(command, CALL_S)


class _MissingError(DeviceError):
    """There is no such file on the phone."""


def _call(arguments: list[str], timeout_s: float) -> programs.Ended:
    found = program()
    if found is None:
        raise DeviceError(
            f"there is no {NAME} here", remedy=f"install it apart:  pipx install {NAME}"
        )
    ended = programs.call(NAME, [found, "--no-color", *arguments], timeout_s)
    if ended.code == 0:
        return ended
    text = ended.err.strip() or ended.out.strip()
    # Its last line is advice; lines of its log that are no errors come before and after.
    errors = _ERROR.findall(text) or text.splitlines() or ["it says nothing"]
    last = " ".join(errors[-1].split())[:300]
    if _MISSING.search(text):
        raise _MissingError(last)
    remedy = next((r for pattern, r in _REMEDIES if re.search(pattern, text, re.I)), None)
    raise DeviceError(f"{NAME} failed: {last}", remedy=remedy or "unlock the phone and try again")


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise _not_understood() from None


def _not_understood() -> DeviceError:
    return DeviceError(f"{NAME}'s answer is not understood", remedy="update handheld and it")
