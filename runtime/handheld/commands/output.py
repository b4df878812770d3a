"""What the commands print."""

from __future__ import annotations

import json
import sys
from typing import Any

from rich.console import Console

from handheld import harness


def print_json(value: Any) -> None:
    """Print a value as indented JSON to standard output."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def megabytes(value: int | None) -> str:
    """Return a size in MB (10**6 bytes)."""
    return "-" if value is None else f"{value / 1e6:.1f}"


def gigabytes(value: int | None) -> str:
    """Return a size in GB (10**9 bytes)."""
    return "-" if value is None else f"{value / 1e9:.1f}"


def milliseconds(value: float | None) -> str:
    """Return a time in ms."""
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def announce_build(console: Console) -> None:
    """Build the harness if there is none yet, and say so, since it takes a while."""
    if harness.find() is None:
        with console.status("building the harness, once"):
            paths = harness.build()
        console.print(
            f"built the harness: {paths.program}", markup=False, highlight=False, soft_wrap=True
        )
