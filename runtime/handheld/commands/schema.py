"""``handheld schema``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from handheld import schema as schema_
from handheld.commands.output import print_json
from handheld.errors import UsageError


def schema(
    name: Annotated[
        str | None, typer.Argument(help="manifest, job, event, record or release; by default all.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write NAME.json files to this folder.")
    ] = None,
    json_output: Annotated[
        bool, typer.Option("--json", help="What is printed is JSON anyway.")
    ] = False,
) -> None:
    """Print the JSON Schemas of manifests, jobs, events, records and releases.

    \b
    handheld schema manifest
    handheld schema -o docs/schema
    """  # noqa: D301
    if name is not None and name not in schema_.NAMES:
        raise UsageError(f"there is no schema '{name}'", remedy=f"use {', '.join(schema_.NAMES)}")
    if output is not None:
        paths = schema_.write(output)
        if json_output:
            print_json({"written": [str(p) for p in paths]})
        return
    if name is not None:
        print_json(schema_.schema(name))
    else:
        print_json({n: schema_.schema(n) for n in schema_.NAMES})
