"""``handheld compare``."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from handheld import comparison, records
from handheld.bundle import Bundle
from handheld.commands.output import print_json
from handheld.errors import GateError, OutputError, UsageError
from handheld.files import output_errors, write_file


def compare(
    base: Annotated[Path, typer.Argument(metavar="BASE", help="File of run records.")],
    new: Annotated[Path, typer.Argument(metavar="NEW", help="File of run records.")],
    base_bundle: Annotated[
        str | None,
        typer.Option(
            metavar="BUNDLE", help="Of BASE, only this bundle's: a path, or how its sha256 begins."
        ),
    ] = None,
    new_bundle: Annotated[
        str | None, typer.Option(metavar="BUNDLE", help="Of NEW, only this bundle's.")
    ] = None,
    gate: Annotated[
        Path | None, typer.Option(help="TOML file of gates; by default 3 % of time, 2 % of memory.")
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Fail too where there are too few runs to tell.")
    ] = False,
    summary: Annotated[
        Path | None,
        typer.Option(help="Append the Markdown here too; by default to GITHUB_STEP_SUMMARY."),
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare two sets of run records, with a gate: exit code 1 if the new set is worse.

    A gate fails only if the whole interval of new over base lies beyond its limit, so noise does
    not fail it, and one run gives no verdict. Runs that failed or drew a wrong picture fail. Where
    bundles took turns, runs of one round are compared with each other.

    \b
    handheld bench build/base build/new --rounds 30 --records turns.jsonl
    handheld compare turns.jsonl turns.jsonl --base-bundle build/base --new-bundle build/new
    handheld compare base.jsonl new.jsonl
    handheld compare base.jsonl new.jsonl --gate gates.toml --strict --json
    """  # noqa: D301
    gates = comparison.read_gates(gate)
    sets = [_records(base, base_bundle), _records(new, new_bundle)]
    if {r.id for r in sets[0]} & {r.id for r in sets[1]}:
        raise UsageError(
            f"holds runs that {base} holds too",
            path=new,
            remedy="name what each side is with --base-bundle and --new-bundle",
        )
    result = comparison.compare(sets[0], sets[1], gates)
    text = result.markdown()
    target = summary or (Path(name) if (name := os.environ.get("GITHUB_STEP_SUMMARY")) else None)
    if target is not None:
        _append(target, text)
    if json_output:
        print_json(result.as_dict())
    else:
        sys.stdout.write(text)
    undecided = [r for r in result.rows if r.verdict == "undecided"]
    if result.passed and not (strict and undecided):
        return
    if json_output:
        raise typer.Exit(1)
    if result.passed:
        raise GateError(f"{len(undecided)} gates have too few runs", remedy="run more of them")
    if not result.rows and not result.broken and not result.missing:
        raise GateError("no gate covers any of the runs", path=gate, remedy="widen the gates")
    failed = [f"{r.key}: {r.gate.metric}" for r in result.rows if r.verdict == "fail"]
    failed += [f"broken: {b}" for b in result.broken] + [f"missing: {m}" for m in result.missing]
    raise GateError(f"{len(failed)} failures, first: {failed[0]}", path=new)


def _records(path: Path, bundle: str | None) -> list[records.RunRecord]:
    """Return a file's records, of one bundle only if one is named."""
    found = records.read(path)
    if bundle is not None:
        start = Bundle.open(bundle).sha256 if Path(bundle).exists() else bundle.lower()
        found = [r for r in found if r.bundle.sha256.startswith(start)]
        if len({r.bundle.sha256 for r in found}) > 1:
            raise UsageError(
                f"'{bundle}' fits several bundles", path=path, remedy="give more of the sha256"
            )
    if not found:
        what = "run records" if bundle is None else f"run records of '{bundle}'"
        raise UsageError(f"holds no {what}", path=path, remedy="run `handheld bench`")
    return found


def _append(path: Path, text: str) -> None:
    if path.is_dir():
        raise OutputError("is a folder, not a file", path=path, remedy="name a file")
    with output_errors(path):
        before = path.read_bytes() if path.exists() else b""
        write_file(path, before + text.encode())
