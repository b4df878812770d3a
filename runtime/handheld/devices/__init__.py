"""Devices that run bundles: this machine, attached phones."""

from __future__ import annotations

from importlib.metadata import entry_points

from handheld.devices.base import Device, Devices
from handheld.errors import DeviceError

GROUP = "handheld.devices"

__all__ = ["GROUP", "Device", "Devices", "find", "providers"]


def providers() -> dict[str, Devices]:
    """Return the installed kinds of devices, by name."""
    return {entry.name: entry.load()() for entry in sorted(entry_points(group=GROUP))}


def find(wanted: str) -> list[Device]:
    """Return the devices that ``wanted`` names: a kind, a device's id, or ``all``.

    Raises
    ------
    DeviceError
        If there is none.
    """
    attached = {name: provider.attached() for name, provider in providers().items()}
    devices = [d for group in attached.values() for d in group]
    if wanted == "all":
        return devices
    chosen = attached.get(wanted) or [d for d in devices if d.id == wanted]
    if not chosen:
        names = ", ".join([*attached, *(d.id for d in devices)])
        raise DeviceError(f"there is no device '{wanted}'", remedy=f"choose one of: all, {names}")
    return chosen
