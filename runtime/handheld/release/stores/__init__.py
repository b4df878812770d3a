"""Releases laid out for the tools of stores; found by the entry point group ``handheld.stores``."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

from handheld.errors import UsageError
from handheld.release.stores.base import Layout, Pack, Store

GROUP = "handheld.stores"

__all__ = ["GROUP", "Layout", "Pack", "Store", "find", "names"]


def names() -> list[str]:
    """Return the names of the installed stores."""
    return sorted(e.name for e in entry_points(group=GROUP))


def find(name: str) -> Store:
    """Return a store.

    Raises
    ------
    UsageError
        If it is not installed.
    """
    for entry in entry_points(group=GROUP):
        if entry.name == name:
            made: Any = entry.load()()
            assert isinstance(made, Store)
            return made
    raise UsageError(f"there is no store '{name}'", remedy=f"choose one of: {', '.join(names())}")
