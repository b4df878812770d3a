"""``handheld harness build``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from handheld import harness as harness_
from handheld import kit
from handheld.commands.output import print_json
from handheld.errors import UsageError

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
    target: Annotated[
        str | None,
        typer.Option("--for", help=f"Build what phones run: {', '.join(kit.NAMES)}."),
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Build the harness for the engines that are installed.

    linux-arm64 brings its own loader and C library, so that a phone's shell can start it
    without an NDK at hand; it has the CPU engines only. Not run on hardware yet.

    \b
    handheld harness build
    handheld harness build --for linux-arm64
    handheld harness build --force --json
    """  # noqa: D301
    console = Console(stderr=True)
    if target is not None:
        _build_kit(console, target, force, json_output)
        return
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


@harness.command()
def add(
    folder: Annotated[
        Path,
        typer.Argument(
            exists=True, file_okay=False, help="The harness and libraries, built for Android."
        ),
    ],
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check a harness that was built with Android's NDK, and keep it for phones.

    Every library must be for arm64 and Android, aligned to 16 KB, with all that it needs.

    \b
    handheld harness add android_harness/build/android-arm64/kit
    """  # noqa: D301
    _print_kit(Console(stderr=True), harness_.add_kit(folder), json_output)


def _build_kit(console: Console, target: str, force: bool, json_output: bool) -> None:
    if target not in kit.NAMES:
        raise UsageError(
            f"there is no harness for '{target}'",
            field="--for",
            remedy=f"use one of {', '.join(kit.NAMES)}",
        )
    with console.status(f"building the harness for {target}"):
        made = harness_.build_kit(target, force)
    _print_kit(console, made, json_output)


def _print_kit(console: Console, made: kit.Kit, json_output: bool) -> None:
    size = sum((made.folder / name).stat().st_size for name in made.info.files)
    if json_output:
        print_json(
            {
                "folder": str(made.folder),
                "sha256": made.sha256,
                "bytes": size,
                "engines": made.info.engines,
            }
        )
    else:
        console.print(
            f"{made.folder}: {len(made.info.files)} files, {size / 1e6:.1f} MB",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
