"""What a program that reaches iPhones has to do; the seam between ios.py and such programs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from handheld.devices.base import Obstacle
from handheld.errors import DeviceError

CALL_S = 60.0
INSTALL_S = 600.0
SLOWEST_BYTES_PER_S = 250_000
OLDEST_IOS = 17
"""What the benchmark app asks for, see ios_harness/Package.swift."""


def _chips(chip: str, *products: str) -> dict[str, str]:
    return dict.fromkeys(products, chip)


CHIPS: Final = {
    **_chips("A12 Bionic", "iPhone11,2", "iPhone11,4", "iPhone11,6", "iPhone11,8"),
    **_chips("A13 Bionic", "iPhone12,1", "iPhone12,3", "iPhone12,5", "iPhone12,8"),
    **_chips("A14 Bionic", "iPhone13,1", "iPhone13,2", "iPhone13,3", "iPhone13,4"),
    **_chips("A15 Bionic", "iPhone14,2", "iPhone14,3", "iPhone14,4", "iPhone14,5", "iPhone14,6"),
    **_chips("A15 Bionic", "iPhone14,7", "iPhone14,8"),
    **_chips("A16 Bionic", "iPhone15,2", "iPhone15,3", "iPhone15,4", "iPhone15,5"),
    **_chips("A17 Pro", "iPhone16,1", "iPhone16,2"),
    **_chips("A18", "iPhone17,3", "iPhone17,4", "iPhone17,5"),
    **_chips("A18 Pro", "iPhone17,1", "iPhone17,2"),
    **_chips("A19", "iPhone18,3"),
    **_chips("A19 Pro", "iPhone18,1", "iPhone18,2", "iPhone18,4"),
}
"""Apple's chip by product type: no program tells it. That of other products is unknown."""


class NotInstalledError(DeviceError):
    """The benchmark app is not on the phone."""


@dataclass(frozen=True)
class Facts:
    """What the program says about a phone; None where it does not."""

    model: str | None = None
    product_type: str | None = None
    cpu: str | None = None
    os: str | None = None
    os_build: str | None = None


class Iphone(ABC):
    """One attached iPhone or iPad. Paths on it are below the app's container.

    Every method raises DeviceError if the phone cannot be reached or the program fails.
    """

    serial: str
    transport: str
    """The program, for the record."""
    facts: Facts

    @abstractmethod
    def obstacle(self) -> Obstacle | None:
        """Return what keeps the phone from being used."""

    @abstractmethod
    def launch(self, app: str, arguments: list[str]) -> int:
        """Start an app anew and return its process id.

        Raises
        ------
        NotInstalledError
            If it is not on the phone.
        """

    @abstractmethod
    def is_running(self, pid: int) -> bool:
        """Tell whether a process is there."""

    @abstractmethod
    def terminate(self, pid: int) -> None:
        """End a process."""

    @abstractmethod
    def install(self, path: Path) -> None:
        """Install a built app."""

    @abstractmethod
    def copy_to(self, app: str, source: Path, target: str) -> None:
        """Send a file into an app's container, into a folder that need not be there."""

    @abstractmethod
    def copy_from(self, app: str, source: str, target: Path) -> bool:
        """Fetch a file from an app's container; tell whether it was there."""


def developer_mode_is_off(serial: str) -> Obstacle:
    """Return the obstacle."""
    where = "Settings, Privacy & Security, Developer Mode"
    return Obstacle("Developer Mode is off", f"turn it on: {where}", serial)


def is_locked(serial: str) -> Obstacle:
    """Return the obstacle."""
    return Obstacle("is locked", "unlock it and keep it unlocked", serial)


def is_too_old(version: str | None, serial: str) -> Obstacle | None:
    """Return an obstacle if the benchmark app does not run on an iOS, as far as it is known."""
    major = (version or "").partition(".")[0]
    if not major.isdecimal() or int(major) >= OLDEST_IOS:
        return None
    return Obstacle(
        f"has iOS {version}, the benchmark app needs {OLDEST_IOS}",
        "update it, or use another phone",
        serial,
    )


def copy_seconds(path: Path) -> float:
    """Return how long it may take to send a file."""
    return CALL_S + path.stat().st_size / SLOWEST_BYTES_PER_S
