"""``handheld report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from handheld import records as records_
from handheld import report as report_
from handheld.bundle import Bundle
from handheld.commands.output import print_json
from handheld.errors import UsageError
from handheld.files import write_file

MAX_PICTURE_BYTES = 32 * 2**20


def report(
    records: Annotated[list[Path], typer.Argument(metavar="RECORDS...", help="Files of records.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The page.")] = Path("report.html"),
    bundle: Annotated[
        list[Path] | None,
        typer.Option(help="A bundle that was run, for its picture and estimate; repeatable."),
    ] = None,
    pictures: Annotated[
        Path | None, typer.Option(help="Folder of pictures, RECORD-ID.png each.")
    ] = None,
    title: Annotated[str, typer.Option(help="Of the page.")] = "Run records",
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Make a page of run records that needs no network and no other file.

    Time and memory with spread, streaming against resident, memory over time, heat, placement,
    pictures, estimates against measurements; every number links to its record.

    \b
    handheld report records.jsonl
    handheld report a.jsonl b.jsonl --bundle build/critter --title "critter, July" -o build/r.html
    """  # noqa: D301
    found = {r.id: r for path in records for r in records_.read(path)}
    if not found:
        raise UsageError("holds no run records", path=records[0], remedy="run `handheld bench`")
    opened = [Bundle.open(path) for path in bundle or ()]
    drawn = {}
    if pictures is not None:
        for record_id in found:
            file = pictures / f"{record_id}.png"
            if file.is_file() and file.stat().st_size <= MAX_PICTURE_BYTES:
                drawn[record_id] = file.read_bytes()
        if not drawn:
            raise UsageError("has no picture of these records", path=pictures)
    page = report_.render(list(found.values()), opened, drawn, title)
    write_file(output, page.encode())
    if json_output:
        print_json({"page": str(output), "records": len(found), "bytes": len(page.encode())})
    else:
        typer.echo(f"{output}: {len(found)} records")
