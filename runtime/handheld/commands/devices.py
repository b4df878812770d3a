"""``handheld devices``."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from handheld import devices as devices_
from handheld.commands.output import gigabytes, print_json
from handheld.devices import Device, Obstacle
from handheld.errors import DeviceError
from handheld.records import DeviceFacts, Heat

_COLUMNS = ("device", "hardware", "RAM", "free", "system", "engines", "heat")
_STATUS = ("none", "light", "moderate", "severe", "critical", "emergency", "shutdown")


def devices(
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List this machine and attached phones, and what stops those that cannot be used.

    Phones are found by adb (Android), and iPhones by xcrun devicectl on a Mac, else by the
    program pymobiledevice3.
    HANDHELD_ADB_SERVERS=tcp:HOST:PORT,... names adb servers on other machines.

    \b
    handheld devices
    handheld devices --json
    """  # noqa: D301
    obstacles: list[Obstacle] = []
    found: list[tuple[Device, DeviceFacts, Heat]] = []
    for provider in devices_.providers().values():
        obstacles += provider.obstacles()
        for device in provider.attached():
            try:
                found.append((device, device.facts(), device.heat()))
            except DeviceError as error:
                obstacles.append(Obstacle(error.message, error.remedy or "", device.serial))
    if json_output:
        print_json(
            {
                "devices": [
                    {
                        "serial": d.serial,
                        **f.model_dump(mode="json"),
                        "heat": h.model_dump(mode="json"),
                    }
                    for d, f, h in found
                ],
                "obstacles": [
                    {"device": o.device, "what": o.what, "remedy": o.remedy} for o in obstacles
                ],
            }
        )
        return
    table = Table(title="devices (GB = 10^9 bytes)")
    for name in _COLUMNS:
        table.add_column(name, overflow="fold")
    for row in found:
        table.add_row(*(Text(cell) for cell in _row(*row)))
    console = Console()
    console.print(table)
    for obstacle in obstacles:
        console.print(f"{obstacle}", markup=False, highlight=False, soft_wrap=True)


def _row(device: Device, facts: DeviceFacts, heat: Heat) -> list[str]:
    def lines(*parts: str | None) -> str:
        return "\n".join(p for p in parts if p) or "-"

    cores = f"{facts.cores} cores" if facts.cores else None
    return [
        lines(facts.id, device.serial),
        lines(facts.model, facts.soc or facts.cpu, cores),
        gigabytes(facts.ram_bytes),
        gigabytes(facts.free_bytes),
        facts.os or "-",
        lines(*(f"{k} {v}" for k, v in facts.engines.items())),
        _heat(heat),
    ]


def _heat(heat: Heat) -> str:
    parts = [] if heat.status is None else [_STATUS[heat.status]]
    parts += [] if heat.celsius is None else [f"{heat.celsius:.0f} °C"]
    parts += [] if heat.battery_celsius is None else [f"battery {heat.battery_celsius:.0f} °C"]
    return "\n".join(parts) or "unknown"
