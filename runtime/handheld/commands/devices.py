"""``handheld devices``."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from handheld import devices as devices_
from handheld.commands.output import gigabytes, print_json


def devices(
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List this machine and attached phones, with their engines and thermal state.

    \b
    handheld devices
    handheld devices --json
    """  # noqa: D301
    found = [(d.facts(), d.heat()) for d in devices_.find("all")]
    if json_output:
        print_json(
            {
                "devices": [
                    {**f.model_dump(mode="json"), "heat": h.model_dump(mode="json")}
                    for f, h in found
                ]
            }
        )
        return
    table = Table(title="devices (GB = 10^9 bytes)")
    for name in ("id", "processor", "cores", "RAM", "free", "system", "engines", "heat"):
        table.add_column(name, overflow="fold")
    for facts, heat in found:
        engines = ", ".join(f"{k} {v}" for k, v in facts.engines.items())
        table.add_row(
            facts.id,
            facts.soc or facts.cpu or "-",
            str(facts.cores or "-"),
            gigabytes(facts.ram_bytes),
            gigabytes(facts.free_bytes),
            facts.os or "-",
            engines or "none: run `handheld harness build`",
            f"{heat.celsius:.0f} °C" if heat.celsius is not None else "unknown",
        )
    Console().print(table)
