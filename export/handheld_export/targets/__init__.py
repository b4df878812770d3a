"""Targets, one file each, found by the entry point group ``handheld.targets``."""

from __future__ import annotations

from importlib.metadata import EntryPoint, EntryPoints, entry_points
from typing import TYPE_CHECKING

from handheld.errors import TargetError, UsageError

if TYPE_CHECKING:
    from handheld_export.targets.base import Target


def names() -> list[str]:
    """Names of all targets that are installed, ``NAME:SOC`` for every SoC of those that have some.

    A target whose module does not import is listed by its name.
    """
    found: list[str] = []
    for entry in _entries():
        socs = _socs(entry)
        found += [f"{entry.name}:{soc}" for soc in socs] or [entry.name]
    return sorted(set(found))


def one_each() -> list[str]:
    """Names as :func:`names`, with the first SoC only."""
    first = {e.name: f"{e.name}:{s[0]}" for e in _entries() if (s := _socs(e))}
    return sorted({first.get(e.name, e.name) for e in _entries()})


def _entries() -> EntryPoints:
    return entry_points(group="handheld.targets")


def _socs(entry: EntryPoint) -> tuple[str, ...]:
    try:
        socs: tuple[str, ...] = entry.load().socs
    except ImportError:
        return ()
    return socs


def find(name: str) -> Target:
    """Return a target that is ready to lower.

    Parameters
    ----------
    name : str
        For example ``litert-cpu``, or ``executorch-qnn:SM8650``.

    Raises
    ------
    UsageError
        If no target has this name.
    TargetError
        If its tools are not installed.
    """
    base, _, soc = name.partition(":")
    for entry in _entries():
        if entry.name == base:
            try:
                kind: type[Target] = entry.load()
            except ImportError as e:
                raise TargetError(
                    f"target '{name}' cannot start: {e}",
                    remedy='pip install "handheld[export]"',
                ) from None
            target = kind.for_soc(soc) if soc or kind.socs else kind()
            if missing := target.missing():
                raise TargetError(f"target '{name}' lacks its tools", remedy=missing)
            return target
    raise UsageError(f"target '{name}' is unknown", remedy=f"choose from {', '.join(names())}")
