"""Apple's ``xcrun devicectl`` as a subprocess, read by its JSON output alone.

Every answer is an envelope: ``info`` (with ``outcome`` and, but for the oldest,
``jsonVersion``), then ``result`` or ``error``. The text that devicectl prints is not stable
and is never looked at.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Literal

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

PROGRAM: Final = "HANDHELD_XCRUN"
"""Environment variable: the program to use instead of the ``xcrun`` on PATH."""
ASK_S = 20.0
"""How long a phone may take to say whether it is locked."""
MAX_ANSWER_BYTES = 32 * 2**20
CORE_DEVICE: Final = "com.apple.dt.CoreDeviceError"
_MISSING: Final = (CORE_DEVICE, 7000)
_NOT_INSTALLED: Final = ("FBSOpenApplicationServiceErrorDomain", 1)
_POSIX_TIMEOUT: Final = ("NSPOSIXErrorDomain", 60)


class _Part(BaseModel):
    """Newer versions say more than what is read here."""

    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True)


class Info(_Part):
    """``info`` of an envelope."""

    outcome: Literal["success", "failed", "timeout"]
    command_type: str | None = Field(default=None, alias="commandType")
    json_version: int | None = Field(default=None, alias="jsonVersion")
    version: str | None = None


class Fault(_Part):
    """``error`` of an envelope."""

    code: int
    domain: str
    user_info: dict[str, Any] = Field(default={}, alias="userInfo")


class Envelope(_Part):
    """One answer of devicectl."""

    info: Info
    result: dict[str, Any] | None = None
    error: Fault | None = None


class Connection(_Part):
    """How a device is attached."""

    pairing_state: str | None = Field(default=None, alias="pairingState")
    transport_type: str | None = Field(default=None, alias="transportType")
    """``wired``, ``localNetwork``, ...; absent if it is not connected."""
    tunnel_state: str | None = Field(default=None, alias="tunnelState")


class Properties(_Part):
    """What is set on a device."""

    name: str | None = None
    os_version: str | None = Field(default=None, alias="osVersionNumber")
    os_build: str | None = Field(default=None, alias="osBuildUpdate")
    developer_mode: str | None = Field(default=None, alias="developerModeStatus")
    ddi_services: bool | None = Field(default=None, alias="ddiServicesAvailable")


class CPUType(_Part):
    """What processor a device has."""

    name: str | None = None


class Hardware(_Part):
    """What a device is."""

    udid: str | None = None
    product_type: str | None = Field(default=None, alias="productType")
    marketing_name: str | None = Field(default=None, alias="marketingName")
    platform: str | None = None
    cpu: CPUType | None = Field(default=None, alias="cpuType")
    reality: str | None = None
    storage: int | None = Field(default=None, alias="internalStorageCapacity")


class Listed(_Part):
    """One of ``result.devices``."""

    identifier: str
    connection: Connection = Field(default=Connection(), alias="connectionProperties")
    properties: Properties = Field(default=Properties(), alias="deviceProperties")
    hardware: Hardware = Field(default=Hardware(), alias="hardwareProperties")


class Process(_Part):
    """A process on a device."""

    pid: int = Field(alias="processIdentifier")
    executable: str | None = None


class DevicectlError(DeviceError):
    """devicectl says that something failed; ``causes`` are (domain, code), outermost first."""

    def __init__(self, message: str, causes: list[tuple[str, int]], remedy: str | None) -> None:
        super().__init__(message, remedy=remedy)
        self.causes = causes

    def caused_by(self, domain: str, code: int) -> bool:
        """Tell whether an error is in the chain."""
        return (domain, code) in self.causes


def program() -> str | None:
    """Return the xcrun program, or None if there is none."""
    return shutil.which(os.environ.get(PROGRAM) or "xcrun")


def read(data: bytes) -> Envelope:
    """Read an envelope.

    Raises
    ------
    DeviceError
        If it is none.
    """
    try:
        return Envelope.model_validate_json(data)
    except ValidationError as error:
        raise DeviceError(
            f"devicectl's answer is not understood: {error.errors()[0]['msg']}",
            remedy="update handheld, or choose an older Xcode with xcode-select",
        ) from None


def result(envelope: Envelope) -> dict[str, Any]:
    """Return what an envelope holds.

    Raises
    ------
    DevicectlError
        If it tells of a failure.
    """
    if envelope.info.outcome == "success" and envelope.error is None:
        return envelope.result or {}
    if envelope.error is None:
        what = "took too long" if envelope.info.outcome == "timeout" else "failed"
        raise DevicectlError(
            f"{envelope.info.command_type or 'devicectl'} {what}",
            [],
            "an Xcode that is older than the phone's iOS does this: update it",
        )
    causes, texts = _chain(envelope.error)
    raise DevicectlError(": ".join(texts) or "failed", causes, _remedy(causes))


def _chain(fault: Fault) -> tuple[list[tuple[str, int]], list[str]]:
    causes, texts = [(fault.domain, fault.code)], []
    info: Any = fault.user_info
    for _ in range(16):
        if not isinstance(info, dict):
            break
        for key in ("NSLocalizedDescription", "NSLocalizedFailureReason"):
            value = info.get(key)
            text = value.get("string") if isinstance(value, dict) else value
            if isinstance(text, str) and text not in texts:
                texts.append(text)
        under = info.get("NSUnderlyingError")
        inner = under.get("error") if isinstance(under, dict) else None
        if not isinstance(inner, dict):
            break
        if isinstance(inner.get("code"), int) and isinstance(inner.get("domain"), str):
            causes.append((inner["domain"], inner["code"]))
        info = inner.get("userInfo")
    return causes, texts


_REMEDIES: Final = {
    ("NSPOSIXErrorDomain", 28): "free some space on the phone",
    ("FBSOpenApplicationErrorDomain", 7): "unlock the phone and keep it unlocked",
    ("FBSOpenApplicationErrorDomain", 3): "trust the developer on the phone: Settings, General, "
    "VPN & Device Management",
    (CORE_DEVICE, 1): "plug the phone in again",
    (CORE_DEVICE, 1011): "the phone is not connected: plug it in",
    (CORE_DEVICE, 7000): "check that the file is there and the phone is unlocked",
    (CORE_DEVICE, 28001): "update handheld: this Xcode names the field differently",
}


def _remedy(causes: list[tuple[str, int]]) -> str | None:
    return next((_REMEDIES[c] for c in reversed(causes) if c in _REMEDIES), None)


def call(arguments: Sequence[str], timeout_s: float | None = None) -> dict[str, Any]:
    """Run devicectl and return the result of its answer; None gives it :data:`CALL_S`.

    Raises
    ------
    DeviceError
        If it cannot be run, takes too long, answers nonsense or tells of a failure.
    """
    timeout_s = CALL_S if timeout_s is None else timeout_s
    try:
        return _call(arguments, timeout_s)
    except DevicectlError as error:
        # A copy sometimes times out inside the phone's tunnel, which passes.
        if error.caused_by(*_POSIX_TIMEOUT):
            return _call(arguments, timeout_s)
        raise


def _call(arguments: Sequence[str], timeout_s: float) -> dict[str, Any]:
    found = program()
    if found is None:
        raise DeviceError("there is no xcrun here", remedy="install Xcode on a Mac")
    with tempfile.TemporaryDirectory(prefix="handheld-") as folder:
        answer = Path(folder) / "answer.json"
        # The arguments of a launched app come last, so the options go before them.
        command = [found, "devicectl", "--quiet", "--json-output", str(answer), *arguments]
        ended = programs.call("devicectl", command, timeout_s)
        try:
            with answer.open("rb") as f:
                data = f.read(MAX_ANSWER_BYTES + 1)
        except OSError:
            raise DeviceError(
                f"devicectl ended with {ended.code} and answered nothing",
                remedy="check that Xcode is set up: xcode-select -p, xcodebuild -runFirstLaunch",
            ) from None
    if len(data) > MAX_ANSWER_BYTES:
        raise DeviceError("devicectl's answer is too long")
    return result(read(data))


def devices() -> list[Listed]:
    """Return the devices that this Mac knows.

    Raises
    ------
    DeviceError
        If devicectl fails.
    """
    return parse_devices(call(["list", "devices"]))


def parse_devices(found: dict[str, Any]) -> list[Listed]:
    """Read ``result`` of ``list devices``; what is malformed is left out."""
    items = found.get("devices")
    listed = []
    for item in items if isinstance(items, list) else []:
        try:
            listed.append(Listed.model_validate(item))
        except ValidationError:
            continue
    return listed


def parse_process(found: dict[str, Any]) -> Process:
    """Read ``result`` of ``device process launch``.

    Raises
    ------
    DeviceError
        If there is no process in it.
    """
    try:
        return Process.model_validate(found.get("process"))
    except ValidationError:
        raise DeviceError("devicectl started the app and named no process") from None


def parse_processes(found: dict[str, Any]) -> set[int]:
    """Read ``result`` of ``device info processes``."""
    items = found.get("runningProcesses")
    listed = [i.get("processIdentifier") for i in items if isinstance(i, dict)] if isinstance(
        items, list
    ) else []  # fmt: skip
    return {pid for pid in listed if isinstance(pid, int)}


def is_passcode_required(found: dict[str, Any]) -> bool:
    """Read ``result`` of ``device info lockState``."""
    return found.get("passcodeRequired") is True


def _is_phone(item: Listed) -> bool:
    physical = item.hardware.reality in (None, "physical")
    return physical and item.hardware.platform in (None, "iOS", "iPadOS")


def obstacle(item: Listed) -> Obstacle | None:
    """Return what keeps a listed device from being used."""
    serial = item.hardware.udid or item.identifier
    if item.connection.pairing_state not in (None, "paired"):
        return Obstacle("is not paired", "unlock it, plug it in and tap Trust", serial)
    if item.connection.transport_type is None:
        return Obstacle("is not connected", "plug it in, or bring it to the same network", serial)
    if old := is_too_old(item.properties.os_version, serial):
        return old
    if item.properties.developer_mode not in (None, "enabled"):
        return developer_mode_is_off(serial)
    if item.properties.ddi_services is False and item.connection.tunnel_state != "connected":
        return Obstacle(
            "its developer services are not available",
            "unlock it and open Xcode's Devices window once",
            serial,
        )
    return None


def phones() -> list[Devicectl]:
    """Return the iPhones and iPads that this Mac knows.

    Raises
    ------
    DeviceError
        If devicectl fails.
    """
    return [Devicectl(item) for item in devices() if _is_phone(item)]


class Devicectl(Iphone):
    """An iPhone, by devicectl."""

    transport = "devicectl"

    def __init__(self, item: Listed) -> None:
        hardware, properties = item.hardware, item.properties
        self._item = item
        self._device = item.identifier
        self.serial = hardware.udid or item.identifier
        self.facts = Facts(
            model=hardware.marketing_name,
            product_type=hardware.product_type,
            cpu=hardware.cpu.name if hardware.cpu else None,
            os=f"{hardware.platform or 'iOS'} {properties.os_version or '?'}",
            os_build=properties.os_build,
        )

    def obstacle(self) -> Obstacle | None:
        """Return what keeps the phone from being used, as it was listed, or that it is locked."""
        if found := obstacle(self._item):
            return found
        try:
            state = self._call("info", "lockState", timeout_s=ASK_S)
        except programs.TooLongError as error:
            return Obstacle(error.message, error.remedy or "", self.serial)
        except DeviceError:
            # Older versions do not know the question. The start of the app tells then.
            return None
        return is_locked(self.serial) if is_passcode_required(state) else None

    def launch(self, app: str, arguments: list[str]) -> int:
        """Start an app anew and return its process id."""
        try:
            found = self._call("process", "launch", ["--terminate-existing", app, *arguments])
        except DevicectlError as error:
            if error.caused_by(*_NOT_INSTALLED):
                raise NotInstalledError(error.message, remedy=error.remedy) from None
            raise
        return parse_process(found).pid

    def is_running(self, pid: int) -> bool:
        """Tell whether a process is there."""
        return pid in parse_processes(self._call("info", "processes"))

    def terminate(self, pid: int) -> None:
        """End a process."""
        self._call("process", "terminate", ["--pid", str(pid)])

    def install(self, path: Path) -> None:
        """Install a built app."""
        self._call("install", "app", [str(path.absolute())], INSTALL_S)

    def copy_to(self, app: str, source: Path, target: str) -> None:
        """Send a file."""
        places = _container(app, str(source.absolute()), target)
        self._call("copy", "to", places, copy_seconds(source))

    def copy_from(self, app: str, source: str, target: Path) -> bool:
        """Fetch a file; tell whether it was there."""
        try:
            self._call("copy", "from", _container(app, source, str(target.absolute())), INSTALL_S)
        except DevicectlError as error:
            if error.caused_by(*_MISSING):
                return False
            raise
        return target.is_file()

    def _call(
        self, group: str, verb: str, after: Sequence[str] = (), timeout_s: float | None = None
    ) -> dict[str, Any]:
        return call(["device", group, verb, "--device", self._device, *after], timeout_s)


def _container(app: str, source: str, target: str) -> list[str]:
    return [
        "--domain-type", "appDataContainer", "--domain-identifier", app,
        "--source", source, "--destination", target,
    ]  # fmt: skip
