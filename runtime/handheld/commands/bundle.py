"""``handheld bundle show``."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from handheld.bundle import Bundle
from handheld.commands.output import megabytes, print_json
from handheld.execute import activation_bytes

bundle = typer.Typer(
    help="Look into bundles.", no_args_is_help=True, add_completion=False, rich_markup_mode=None
)


@bundle.callback()
def _group() -> None:
    """Look into bundles."""


@bundle.command()
def show(
    path: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A folder or zip file.")],
    artifacts: Annotated[bool, typer.Option(help="List every artifact.")] = False,
    hashes: Annotated[bool, typer.Option(help="Check every file's sha256.")] = True,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check a bundle and say what it holds.

    \b
    handheld bundle show build/critter
    handheld bundle show build/critter --artifacts --json
    """  # noqa: D301
    opened = Bundle.open(path, verify_hashes=hashes)
    facts = describe(opened)
    if json_output:
        print_json(facts)
        return
    table = Table(show_header=False, box=None)
    for name, value in facts.items():
        if name != "artifacts":
            table.add_row(name.replace("_", " "), _text(value))
    Console().print(table)
    if artifacts:
        listed = Table(title="artifacts (MB = 10^6 bytes)")
        for name in ("id", "component", "engine", "MB", "units", "SNR dB", "partitions"):
            listed.add_column(name, overflow="fold")
        for item in facts["artifacts"]:
            listed.add_row(
                item["id"],
                item["component"],
                item["engine"],
                megabytes(item["bytes"]),
                str(item["units"]),
                "-" if item["snr_db"] is None else f"{item['snr_db']:.1f}",
                "-" if item["partitions"] is None else str(item["partitions"]),
            )
        Console().print(listed)


def describe(opened: Bundle) -> dict[str, Any]:
    """Return what a bundle holds as JSON values."""
    manifest = opened.manifest
    weights: Counter[str] = Counter()
    held: Counter[str] = Counter()
    drawn = manifest.called(manifest.default_size)  # the other sizes have the same weights
    for item in drawn:
        weights.update(item.weights)
        held.update(item.held)
    macs = [a.macs for a in drawn]
    prefetched = manifest.text.prefetched
    return {
        "path": str(opened.path),
        "sha256": opened.sha256,
        "model": manifest.model.id,
        "target": manifest.target,
        "precision": manifest.precision,
        "steps": manifest.model.steps,
        "sampler": manifest.model.sampler,
        "guidance": manifest.model.guidance,
        "bytes": opened.nbytes,
        "engines": sorted({f"{a.engine} {a.engine_version}" for a in manifest.artifacts}),
        "weights": dict(weights),
        "held": dict(held),
        "macs": sum(m for m in macs if m is not None) if None not in macs else None,
        "sizes": {
            name: {
                "operations": len(size.program.ops),
                "calls": sum(op.op == "call" for op in size.program.ops),
                "activation_bytes": activation_bytes(size.program),
                "verification": manifest.verification_of(name).model_dump(mode="json"),
            }
            for name, size in manifest.sizes.items()
        },
        "verification": manifest.verification.model_dump(mode="json"),
        "reference": manifest.reference.size if manifest.reference else None,
        "prompts": list(prefetched.prompts) if prefetched else [],
        "licence": manifest.licence,
        "artifacts": [
            {
                "id": a.id,
                "component": a.component,
                "engine": a.engine,
                "bytes": a.nbytes,
                "units": len(a.units),
                "macs": a.macs,
                "snr_db": a.verification.snr_db,
                "partitions": a.partitions,
            }
            for a in manifest.artifacts
        ],
    }


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k}: {_text(v)}" for k, v in value.items() if v is not None) or "-"
    if isinstance(value, list):
        return ", ".join(map(_text, value)) or "-"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else str(value)
