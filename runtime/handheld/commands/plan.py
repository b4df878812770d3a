"""The command ``handheld plan``."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from handheld import models, planning, plans, recipes
from handheld.commands.output import megabytes, print_json
from handheld.errors import UsageError
from handheld.files import write_file


def plan(
    checkpoint: Annotated[
        str,
        typer.Argument(
            help="'sdxl', a model name, or a folder with unet/config.json and vae/config.json."
        ),
    ],
    stack: Annotated[
        list[str] | None,
        typer.Option("--stack", "-s", help="stack1, stack2, stack3, onestep or int4; repeatable."),
    ] = None,
    recipe: Annotated[
        list[Path] | None, typer.Option("--recipe", "-r", help="A TOML recipe; repeatable.")
    ] = None,
    target: Annotated[
        list[str] | None, typer.Option("--target", "-t", help="Repeatable; all planned if not set.")
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="For layers that a recipe leaves in float.")
    ] = None,
    size: Annotated[
        list[str] | None, typer.Option(help="Picture as WIDTHxHEIGHT in pixels; repeatable.")
    ] = None,
    budget: Annotated[
        float | None, typer.Option(help="MB (10^6 bytes) of peak memory that must do.")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="A device whose rates come along, for latency: 'OnePlus 12'."),
    ] = None,
    rates: Annotated[
        Path | None, typer.Option(help="A device table of your own in TOML, for latency.")
    ] = None,
    phone: Annotated[
        list[str] | None,
        typer.Option(help="Does it fit a phone of the catalogue? Repeatable; or all."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Picture of stacked bars, .svg.")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Estimate size, memory and time of a model before it is made; reads no weights.

    \b
    handheld plan sdxl --stack stack1 --stack stack2 --size 512x512 --budget 1500
    handheld plan critter --precision int8 --target litert-cpu --json
    handheld plan sdxl --stack stack2 --size 512x512 --phone "OnePlus 12" --phone "iPhone 13 Pro"
    """  # noqa: D301
    if budget is not None and not (math.isfinite(budget) and budget > 0):
        raise UsageError(f"--budget {budget:g} is out of range", remedy="give MB above 0")
    if output is not None and output.suffix != ".svg":
        raise UsageError("--output is no .svg", path=output, remedy="name a file that ends in .svg")
    targets = target or list(planning.PLANNED)
    if unknown := sorted(set(targets) - set(planning.PLANNED)):
        raise UsageError(
            f"target '{unknown[0]}' is not planned",
            remedy=f"choose from {', '.join(planning.PLANNED)}",
        )
    name = checkpoint
    if os.sep not in checkpoint and checkpoint in models.names():
        name = str(models.checkpoint(checkpoint))
    first = planning.architecture(name)
    if device is not None and rates is not None:
        raise UsageError("--device and --rates exclude each other", remedy="leave one out")
    table = plans.rates_of(device) if device else plans.read_rates(rates) if rates else None
    fits = _on_phones(phone) if phone else None
    rows: list[dict[str, Any]] = []
    for label, path in _recipes(stack or [], recipe or [], Path(name).name):
        shape = recipes.shape_after(path, first) if path else first
        shape = plans.at_precision(shape, precision) if precision else shape
        for sized in [plans.at_size(shape, *picture_size(s)) for s in size or []] or [shape]:
            rows += [
                {"model": label}
                | plans.row(sized, t, budget=round(budget * 1e6) if budget else None, rates=table)
                for t in targets
            ]
    if fits is not None:
        for row in rows:
            row["phones"] = fits(row)
    report = {
        "checkpoint": checkpoint,
        "estimate": True,
        "budget_bytes": round(budget * 1e6) if budget else None,
        "device": table.device if table else None,
        "rows": rows,
    }
    if output is not None:
        write_file(output, picture(rows, budget).encode())
    if json_output:
        print_json(json.loads(json.dumps(report)))
    else:
        _print(report)


def _on_phones(names: list[str]) -> Callable[[dict[str, Any]], list[dict[str, Any]]]:
    """Return a function that says of a row whether it fits phones."""
    from handheld import phone_plans  # takes the code of releases with it
    from handheld.release import catalogue
    from handheld.release.rules import read

    entries = list(dict.fromkeys(e for name in names for e in catalogue.named(name)))
    rules = read()
    return lambda row: [x for e in entries for x in phone_plans.on_phone(row, e, rules)]


def _recipes(stacks: list[str], files: list[Path], family: str) -> list[tuple[str, Path | None]]:
    found: list[tuple[str, Path | None]] = [(s, recipes.builtin(s, family)) for s in stacks]
    found += [(f.stem, f) for f in files]
    return found or [("as it is", None)]


def picture_size(text: str) -> tuple[int, int]:
    """Read a ``--size``: width and height in pixels."""
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    if match is None:
        raise UsageError(f"--size '{text}' is no size", remedy="write it as 512x768")
    return int(match[1]), int(match[2])


def _print(report: dict[str, Any]) -> None:
    table = Table(
        title=f"{report['checkpoint']}: estimates, MB = 10^6 bytes",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    names = ("model", "size", "target", "params\nM", "GMACs a\npicture", "bits", "U-Net\nMB",
             "decoder\nMB", "activa-\ntions MB", "peak MB\nresident", "peak MB\nstreamed",
             "seconds")  # fmt: skip
    for i, name in enumerate(names):
        table.add_column(name, justify="left" if i < 3 else "right", no_wrap=True)
    for r in report["rows"]:
        bits, seconds = r["bits_per_weight"], r["seconds"]
        macs = r["unet_macs"] * r["steps"] + r["decoder_macs"]
        table.add_row(
            r["model"],
            f"{r['width']}x{r['height']}",
            r["target"],
            f"{(r['unet_params'] + r['decoder_params']) / 1e6:,.1f}",
            f"{macs / 1e9:,.0f}",
            "-" if bits is None else f"{bits:.2f}",
            megabytes(r["unet_bytes"]),
            megabytes(r["decoder_bytes"]),
            megabytes(r["activation_bytes"]),
            *(_verdict(r, k) for k in ("resident", "stream")),
            "unknown" if seconds is None else f"{seconds:.2f}",
        )
    console = Console()
    if not console.is_terminal:
        console.width = 150
    console.print(table)
    if any("phones" in r for r in report["rows"]):
        console.print(_phones(report["rows"]))
    for note in dict.fromkeys(n for r in report["rows"] for n in r["notes"]):
        console.print(f"estimate: {note}", highlight=False)
    console.print(
        "Peaks are estimates, fitted to runs of small models, and were low at full size; "
        "within 10 % of a budget they are close to it, and say no more.",
        highlight=False,
    )
    for line in dict.fromkeys(_sources(report)):
        console.print(line, highlight=False, markup=False)


def _phones(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    names = ("phone", "memory\nGB", "an app's\nMB", "model", "size", "target", "resident",
             "streamed", "seconds")  # fmt: skip
    for name in names:
        table.add_column(name, justify="right" if "\n" in name or name == "seconds" else "left")
    for r in rows:
        for p in r["phones"]:
            limit = "unknown" if p["app_bytes"] is None else megabytes(p["app_bytes"])
            assumed = " assumed" if p["app_source"].startswith("assumed") else ""
            fits = p["verdict"] or dict.fromkeys(("resident", "stream"), "unknown")
            table.add_row(
                p["phone"],
                str(p["ram_gb"]),
                f"{limit}{assumed}",
                r["model"],
                f"{r['width']}x{r['height']}",
                r["target"],
                fits["resident"],
                fits["stream"],
                "unknown" if p["seconds"] is None else f"{p['seconds']:.2f}",
            )
    return table


def _sources(report: dict[str, Any]) -> Iterator[str]:
    """Yield where rates and limits are from."""
    for r in report["rows"]:
        if r["rate_source"]:
            yield f"{report['device']}: {r['rate_source']}"
        for p in r.get("phones", ()):
            yield f"{p['phone']}: memory: {p['ram_source']}; an app's: {p['app_source']}"
            if p["rate_source"]:
                yield f"{p['phone']} ({p['soc']}), seconds: {p['rate_source']}"


def _verdict(row: dict[str, Any], residency: str) -> str:
    if row["peak_bytes"] is None:
        return "unknown"
    text = megabytes(row["peak_bytes"][residency])
    return text if row["verdict"] is None else f"{text} {row['verdict'][residency]}"


_COLOURS = {
    "unet_bytes": "#4878a8",
    "decoder_bytes": "#e0a040",
    "activation_bytes": "#70a870",
    "engine_bytes": "#a0a0a0",
}


def picture(rows: list[dict[str, Any]], budget: float | None) -> str:
    """Draw resident memory as stacked bars, and the budget in MB as a line, in SVG."""
    left, width, step = 230, 560, 26
    peaks = [
        max((r[k] or {"resident": 0})["resident"] for k in ("peak_bytes", "least_peak_bytes"))
        for r in rows
    ]
    largest = max([*peaks, (budget or 0) * 1e6])
    height = step * len(rows) + 50
    parts = []
    for i, r in enumerate(rows):
        y, x = 30 + step * i, float(left)
        label = f"{r['model']} {r['width']}x{r['height']} {r['target']}"
        parts.append(f'<text x="{left - 8}" y="{y + 13}" text-anchor="end">{escape(label)}</text>')
        rest = peaks[i] - r["least_peak_bytes"]["resident"]
        for key, colour in _COLOURS.items():
            nbytes = rest if key == "engine_bytes" else r[key]
            w = width * nbytes / largest
            title = f"{key.removesuffix('_bytes')}: {megabytes(nbytes)} MB"
            parts.append(
                f'<rect x="{x:.1f}" y="{y}" width="{w:.1f}" height="18" fill="{colour}">'
                f"<title>{title}</title></rect>"
            )
            x += w
        total = megabytes(peaks[i])
        parts.append(f'<text x="{x + 6:.1f}" y="{y + 13}">{total} MB</text>')
    if budget:
        x = left + width * budget * 1e6 / largest
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="22" y2="{height - 16}" stroke="#c03030"/>'
        )
    legend = "Resident, estimated: U-Net (blue), decoder (yellow), activations (green), rest (grey)"
    legend += f"; budget {budget:g} MB (red)" if budget else ""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 110}" height="{height}" '
        f'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>'
        f'<text x="8" y="16">{legend}</text>{"".join(parts)}</svg>\n'
    )
