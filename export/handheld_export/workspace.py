"""Memory that an engine wants while it runs an artifact, measured when that is lowered."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path

from handheld_export.targets.base import Array

_STATUS = Path("/proc/self/status")
_STEP = 1 << 20


def measure(run: Callable[[], Sequence[Array]]) -> tuple[Sequence[Array], int | None]:
    """Run an artifact for the first time and see how far anonymous memory grows.

    Pages that it maps from its file and the results themselves are not counted. Nothing else
    may run in the process meanwhile.

    Parameters
    ----------
    run : callable
        Runs the artifact, which has been loaded and has not run yet.

    Returns
    -------
    results : sequence of array
    workspace : int or None
        Bytes, rounded up to whole MiB; None where the system does not tell.
    """
    try:
        # Pages that were freed before would hide what is taken from them.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _fields()
    except (OSError, AttributeError):
        return run(), None
    results = run()
    after = _fields()
    grown = after["VmHWM"] - before["VmRSS"] - max(0, after["RssFile"] - before["RssFile"])
    grown -= sum(r.nbytes for r in results)
    return results, max(1, -(-grown // _STEP)) * _STEP


def _fields() -> dict[str, int]:
    lines = (line.split() for line in _STATUS.read_text().splitlines())
    return {f[0].rstrip(":"): int(f[1]) * 1024 for f in lines if len(f) == 3 and f[2] == "kB"}
