"""What lowering a segment takes, and how many workers a budget of memory holds."""

from __future__ import annotations

import ctypes
import gc
import math
import os
from dataclasses import dataclass
from pathlib import Path

from handheld.errors import UsageError
from handheld_export.segments import Segment

IDLE = 900_000_000
"""Bytes of a worker between two segments: torch, diffusers and a converter, without the pages of
libraries that it shares with the others."""
PER_WEIGHT = {False: 19.0, True: 10.0}
"""Bytes per weight while a segment is lowered, unquantized or quantized: float32, codes, the
artifact, and what an engine packs when the artifact is tried."""
SHARE = 0.6
"""Part of the memory that is free when the export starts, where no budget is given."""


def available() -> int:
    """Return the bytes that this machine can still give."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def resident() -> int:
    """Return the bytes of this process that are in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def trim() -> None:
    """Give memory that nothing uses back to the system."""
    gc.collect()
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):  # glibc
        library.malloc_trim(0)


def need(segment: Segment, *, quantized: bool) -> int:
    """Estimate the bytes that lowering a segment takes beyond an idle worker's.

    Parameters
    ----------
    segment : Segment
    quantized : bool
        Whether its large weights carry codes.
    """
    shapes = segment.graph.shapes
    largest = 0
    for unit in segment.units:
        passing = sum(math.prod(shapes[n]) for n in (*unit.inputs, unit.name))
        largest = max(largest, 3 * passing + 2 * _attention(unit.module, shapes[unit.inputs[0]]))
    held = sum(math.prod(shapes[n]) for n in (*segment.inputs, *segment.outputs))
    # Torch's and the engine's run of the segment, one after the other, and results of both.
    return int(PER_WEIGHT[quantized] * segment.weights + 4 * (largest + 4 * held))


def _attention(module: object, shape: tuple[int, ...]) -> int:
    """Return the elements of the largest table of attention in a unit."""
    heads = [getattr(m, "heads", 0) for m in module.modules()]  # type: ignore[attr-defined]
    tokens = shape[2] * shape[3] if len(shape) == 4 else shape[1]
    return max((h for h in heads if isinstance(h, int)), default=0) * tokens**2


@dataclass(frozen=True)
class Budget:
    """Memory for an export's processes, this one included.

    Parameters
    ----------
    total : int
        Bytes.
    own : int
        Of them, what this process has while workers run.
    strict : bool
        Whether too little is an error, or one worker after all.
    """

    total: int
    own: int
    strict: bool = True

    @classmethod
    def of(cls, megabytes: int | None) -> Budget:
        """Return what was asked for, or a part of what is free."""
        own = resident()
        total = int(SHARE * available()) + own if megabytes is None else megabytes * 10**6
        return cls(total, own, strict=megabytes is not None)

    def workers(self, needs: list[int], most: int) -> int:
        """Return how many workers there can be, so that the largest segment still fits.

        Raises
        ------
        UsageError
            If one worker is too much; says how much would do.
        """
        largest = max(needs)
        least = self.own + IDLE + largest
        if least > self.total and self.strict:
            raise UsageError(
                f"--memory {self.total // 10**6} MB is too little",
                remedy=f"give at least {-(-least // 10**6)} MB",
            )
        return max(1, min(most, len(needs), (self.total - self.own - largest) // IDLE))

    def fits(self, running: list[int], one: int, workers: int) -> bool:
        """Return whether a segment can be lowered beside those that are."""
        return not running or self.own + workers * IDLE + sum(running) + one <= self.total
