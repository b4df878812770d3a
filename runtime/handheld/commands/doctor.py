"""``handheld doctor``."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from handheld import doctor as doctor_
from handheld.commands.output import print_json


def doctor(
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what is missing here and how to get it; exit code 1 if something required is.

    \b
    handheld doctor
    handheld doctor --json
    """  # noqa: D301
    findings = doctor_.examine()
    bad = any(f.required and not f.ok for f in findings)
    if json_output:
        print_json({"ok": not bad, "findings": [f.as_dict() for f in findings]})
    else:
        table = Table()
        for name in ("", "what", "found", "needed for", "remedy"):
            table.add_column(name, overflow="fold")
        for f in findings:
            mark, style = ("ok", "green") if f.ok else ("missing", "red" if f.required else "dim")
            table.add_row(
                Text(mark, style), Text(f.name), Text(f.found or "-"), f.needed_for,
                Text("" if f.ok else f.remedy or ""),
            )  # fmt: skip
        Console().print(table)
    if bad:
        raise typer.Exit(1)
