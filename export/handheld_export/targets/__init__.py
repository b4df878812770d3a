"""Targets, one file each, found by the entry point group ``handheld.targets``."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from handheld.errors import TargetError, UsageError

if TYPE_CHECKING:
    from handheld_export.targets.base import Target


def names() -> list[str]:
    """Names of all targets that are installed."""
    return sorted({e.name for e in entry_points(group="handheld.targets")})


def find(name: str) -> Target:
    """Return a target that is ready to lower.

    Parameters
    ----------
    name : str
        For example ``litert-cpu``.

    Raises
    ------
    UsageError
        If no target has this name.
    TargetError
        If its tools are not installed.
    """
    for entry in entry_points(group="handheld.targets"):
        if entry.name == name:
            try:
                target: Target = entry.load()()
            except ImportError as e:
                raise TargetError(
                    f"target '{name}' cannot start: {e}",
                    remedy='pip install "handheld[export]"',
                ) from None
            if missing := target.missing():
                raise TargetError(f"target '{name}' lacks its tools", remedy=missing)
            return target
    raise UsageError(f"target '{name}' is unknown", remedy=f"choose from {', '.join(names())}")
