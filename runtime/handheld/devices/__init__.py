"""Devices that run bundles: this machine, attached phones."""

from __future__ import annotations

from importlib.metadata import entry_points

from handheld.devices.base import Device, Devices, Obstacle
from handheld.errors import DeviceError

GROUP = "handheld.devices"

__all__ = ["GROUP", "Device", "Devices", "Obstacle", "find", "obstacles", "providers"]


def providers() -> dict[str, Devices]:
    """Return the installed kinds of devices, by name."""
    return {entry.name: entry.load()() for entry in sorted(entry_points(group=GROUP))}


def find(wanted: str) -> list[Device]:
    """Return the devices that ``wanted`` names: a kind, a device's id or serial, or ``all``.

    Raises
    ------
    DeviceError
        If there is none, or what is named cannot be used as it is.
    """
    kinds = providers()
    if wanted in kinds:
        # Other kinds are not asked: some start programs to look for devices.
        kinds = {wanted: kinds[wanted]}
    devices = [d for provider in kinds.values() for d in provider.attached()]
    if wanted == "all":
        return devices
    chosen = [d for d in devices if wanted in (d.kind, d.id, d.serial)]
    if chosen:
        return chosen
    for obstacle in obstacles(wanted):
        raise DeviceError(obstacle.what, path=obstacle.device, remedy=obstacle.remedy)
    names = ", ".join([*providers(), *(d.id for d in devices)])
    raise DeviceError(f"there is no device '{wanted}'", remedy=f"choose one of: all, {names}")


def obstacles(wanted: str) -> list[Obstacle]:
    """Return why devices that ``wanted`` means cannot be used.

    ``all`` means what is attached: a kind that lacks its program is no obstacle then.
    """
    kinds = providers()
    if wanted in kinds:
        return kinds[wanted].obstacles()
    found = [o for provider in kinds.values() for o in provider.obstacles()]
    return [o for o in found if (o.device if wanted == "all" else o.device == wanted)]
