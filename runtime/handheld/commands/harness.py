"""``handheld harness build``."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from handheld import harness as harness_
from handheld.commands.output import print_json

harness = typer.Typer(
    help="Make the native program that runs bundles.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)


@harness.callback()
def _group() -> None:
    """Make the native program that runs bundles."""


@harness.command()
def build(
    force: Annotated[bool, typer.Option("--force", help="Build it even if it is there.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Build the harness for the engines that are installed.

    \b
    handheld harness build
    handheld harness build --force --json
    """  # noqa: D301
    console = Console(stderr=True)
    with console.status("building the harness"):
        paths = harness_.build(force)
    engines = ", ".join(f"{k} {v}" for k, v in paths.engines.items())
    if json_output:
        print_json(
            {
                "program": str(paths.program),
                "library": str(paths.library),
                "engines": paths.engines,
            }
        )
    else:
        console.print(f"{paths.program}: {engines}", markup=False, highlight=False, soft_wrap=True)
