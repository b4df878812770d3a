"""The command ``handheld``.

Commands are imported when they are run, so that ``handheld --help`` stays fast and a light
installation stays usable. Commands of other packages come by the entry point group
``handheld.commands``: each entry is a function or a :class:`typer.Typer`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Annotated, Any

import typer
from typer._click.exceptions import ClickException, UsageError  # typer's own copy of click
from typer.core import TyperCommand, TyperGroup

from handheld import __version__
from handheld.errors import HandheldError, MissingDependencyError
from handheld.files import describe_os_error

GROUP = "handheld.commands"
INTERNAL_ERROR = 70

_COMMANDS = {
    "generate": "Draw a picture from a prompt.",
    "compress": "Distil, trim and quantize a checkpoint to a student.",
    "plan": "Estimate size, memory and time of a model before it is made.",
    "export": "Lower a checkpoint to verified bundles.",
    "verify": "Check the numerics of a bundle's artifacts against torch.",
    "serve-text": "Serve text encoders by the Open Inference Protocol.",
    "bench": "Measure latency and peak memory of bundles on devices.",
    "devices": "List this machine and attached phones.",
    "release": "Build, verify, select from, publish and install releases.",
    "report": "Make a page of run records.",
    "compare": "Compare run records, with a gate.",
    "bundle": "Look into bundles.",
    "harness": "Make the native program that runs bundles.",
    "qnn": "Lay out Qualcomm's QNN libraries.",
    "doctor": "Say what is missing here and how to get it.",
    "schema": "Print the JSON Schemas of manifests, jobs, events, records and releases.",
}
LISTED = tuple(_COMMANDS)
"""Names of this distribution's commands."""
_HEAVY = ("compress", "export", "verify", "serve-text")
_INSTALL = 'install with  pip install "handheld[export]"'


@cache
def _entries() -> dict[str, EntryPoint]:
    return {e.name: e for e in entry_points(group=GROUP)}


class LazyGroup(TyperGroup):
    """A group whose commands are imported when they are run, not when they are listed."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of all commands."""
        return [*_COMMANDS, *sorted(set(_entries()) - set(_COMMANDS))]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a stand-in for a command, which knows its help text."""
        if cmd_name in _COMMANDS:
            return TyperCommand(cmd_name, help=_COMMANDS[cmd_name])
        if cmd_name in _entries():
            entry = _entries()[cmd_name]
            origin = entry.dist.name if entry.dist else entry.module
            return TyperCommand(cmd_name, help=f"From {origin}.")
        return None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Import the command that is run."""
        name, stand_in, rest = super().resolve_command(ctx, args)
        return name, load(name) if stand_in is not None and name else None, rest


def load(name: str) -> Any:
    """Import a command.

    Raises
    ------
    MissingDependencyError
        If what it needs is not installed.
    """
    if name in _COMMANDS and name not in _HEAVY:
        target = getattr(import_module(f"handheld.commands.{name}"), name)
    elif name in _entries():
        target = _entries()[name].load()
    else:
        remedy = _INSTALL.replace("export", "serve") if name == "serve-text" else _INSTALL
        raise MissingDependencyError(f"'{name}' is not installed", remedy=remedy)
    if isinstance(target, typer.Typer):
        return typer.main.get_command(target)
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command(name)(target)
    return typer.main.get_command(app)


app = typer.Typer(
    cls=LazyGroup, no_args_is_help=True, rich_markup_mode=None, context_settings={"color": False}
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"handheld {__version__}")
        raise typer.Exit


@app.callback()
def handheld(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """SDXL on phones: compress, export, verify, benchmark and run bundles.

    \b
    handheld generate critter "a purple horned creature" -o out.png
    handheld compress critter --stack stack1 -o build/student
    handheld export critter --target litert-cpu --precision int8 -o build/critter
    handheld bench build/critter --residency resident,stream
    handheld COMMAND --help

    Exit codes: 0 ok, 1 a check or a run failed, 2 bad usage or input.
    """  # noqa: D301


def command() -> Any:
    """Return the whole command line."""
    return typer.main.get_command(app)


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line and exit."""
    sys.exit(run(sys.argv[1:] if args is None else args))


def run(args: Sequence[str]) -> int:
    """Run the command line and return the exit code."""
    as_json = "--json" in args
    try:
        code = command().main(list(args), prog_name="handheld", standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:
        # The interpreter flushes stdout once more on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if os.environ.get("HANDHELD_DEBUG") == "1":
            raise
        return _report(error, as_json)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130
    return code if isinstance(code, int) else 0


def _report(error: Exception, as_json: bool) -> int:
    usage = ""
    if isinstance(error, ClickException):
        found = HandheldError(error.format_message())
        found.code, found.exit_code = "usage", error.exit_code
        if isinstance(error, UsageError) and error.ctx is not None:
            usage = f"{error.ctx.get_usage()}\n"
            found.remedy = f"see `{error.ctx.command_path} --help`"
    elif isinstance(error, HandheldError):
        found = error
    elif isinstance(error, ModuleNotFoundError):
        found = MissingDependencyError(f"needs {error.name}, which is missing", remedy=_INSTALL)
    elif isinstance(error, OSError):
        message, remedy = describe_os_error(error)
        path = error.filename if isinstance(error.filename, str) else None
        found = HandheldError(message, path=path, remedy=remedy)
        found.code = "io"
    elif isinstance(error, typer.Abort):
        found = HandheldError("aborted")
        found.exit_code = 130
    elif isinstance(error, MemoryError):
        found = HandheldError("memory ran out", remedy="close other programs or use less")
    else:
        found = HandheldError(
            f"internal error: {type(error).__name__}: {error}",
            remedy="set HANDHELD_DEBUG=1 for the traceback, and report it",
        )
        found.code, found.exit_code = "internal", INTERNAL_ERROR
    if as_json:
        sys.stdout.write(json.dumps({"error": found.as_dict()}) + "\n")
        sys.stdout.flush()
    else:
        # Names of files may hold what a terminal would obey.
        text = "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in str(found))
        sys.stderr.write(f"{usage}error: {text}\n")
    return found.exit_code


if __name__ == "__main__":
    main()
