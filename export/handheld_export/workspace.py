"""Memory that an engine wants besides weights, measured when an artifact is lowered."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path

from handheld_export.targets.base import Array, Runner

_STATUS = Path("/proc/self/status")
_STEP = 1 << 20


def measure(
    load: Callable[[], Runner], inputs: Sequence[Array], weights: int
) -> tuple[Sequence[Array], int | None]:
    """Load an artifact and run it, and see how far anonymous memory grows beyond its weights.

    An engine may take its workspace when it loads or when it runs, so both count. What does not are
    pages that it maps from its file, weights that it packs into memory, and tensors, which Python's
    runtimes copy. Nothing else may run in the process meanwhile.

    Parameters
    ----------
    load : callable
        Loads the artifact.
    inputs : sequence of array
    weights : int
        Bytes that it packs: about those of its files.

    Returns
    -------
    results : sequence of array
    workspace : int or None
        Bytes, rounded up to whole MiB; None where the system does not tell.
    """
    try:
        # Pages that were freed before would hide what is taken from them.
        ctypes.CDLL(None).malloc_trim(0)
        before = _fields()
        runner = load()
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return load()(*inputs), None
    results = runner(*inputs)
    after = _fields()
    grown = after["VmHWM"] - before["VmRSS"] - max(0, after["RssFile"] - before["RssFile"])
    # The results, and the runtime's own copies of what it was given and gave.
    grown -= sum(x.nbytes for x in inputs) + 2 * sum(r.nbytes for r in results) + weights
    return results, max(1, -(-grown // _STEP)) * _STEP


def _fields() -> dict[str, int]:
    lines = (line.split() for line in _STATUS.read_text().splitlines())
    return {f[0].rstrip(":"): int(f[1]) * 1024 for f in lines if len(f) == 3 and f[2] == "kB"}
