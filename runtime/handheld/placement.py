"""Where operations of artifacts run, as their files say: delegated, or on the CPU.

ExecuTorch and LiteRT decide it when an artifact is made (ahead of time), so its file tells. Both
formats are flatbuffers, of which a few tables are read here.
"""

from __future__ import annotations

import mmap
import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from handheld.bundle import Bundle
from handheld.manifest import Artifact
from handheld.program import Call
from handheld.records import Pass
from handheld.release.manifest import Unit
from handheld.release.rules import read as read_rules

MOST_TABLES: Final = 1_000_000
_DELEGATE_CALL: Final = 2
_KERNEL_CALL: Final = 1
_DISPATCH: Final = "DISPATCH_OP"
"""LiteRT's operator that holds what was compiled for an NPU."""

Placement = dict[str, dict[str, int]]
"""Per artifact, operations by compute unit or delegate."""


def placement(
    bundle: Bundle, size: str, passes: Sequence[Pass]
) -> tuple[Placement | None, str | None]:
    """Return what ran where, and why that is unknown or counts calls instead of operations.

    What an engine told goes first. Otherwise files of ExecuTorch and LiteRT tell; of other targets
    that have nothing but the CPU, calls per picture are counted.
    """
    told = {load.artifact: load.units for p in passes for load in p.loads if load.units}
    if told:
        return told, None
    if not any(p.done for p in passes):
        return None, "no pass was run to its end"
    calls = Counter(op.artifact for op in bundle.manifest.sizes[size].program.ops
                    if isinstance(op, Call))  # fmt: skip
    artifacts = {a.id: a for a in bundle.manifest.artifacts}
    counted = {name: operations(bundle, artifacts[name]) for name in sorted(calls)}
    if found := {name: units for name, units in counted.items() if units is not None}:
        if len(found) == len(counted):
            return found, None
        return found, "files of other artifacts do not tell"
    if unit(bundle) != "cpu":
        return None, "neither the engine nor its files tell"
    return (
        {name: {"cpu": count} for name, count in sorted(calls.items())},
        "calls per picture, on the CPU alone: neither the engine nor its files tell operations",
    )


def unit(bundle: Bundle) -> Unit | None:
    """Return the compute unit that a bundle's target is for; None of one that is not known."""
    target = read_rules().targets.get(bundle.manifest.target.partition(":")[0])
    return target.unit if target else None


def operations(bundle: Bundle, artifact: Artifact) -> dict[str, int] | None:
    """Count an artifact's operations by compute unit, or delegate; None if its file does not tell.

    What a delegate took counts once for each call of it, under its own name.
    """
    count = {"executorch": _executorch, "litert": _litert}.get(artifact.engine)
    if count is None:
        return None
    try:
        with _mapped(bundle.file(artifact.file)) as data:
            return dict(sorted(count(_Table.root(data)).items())) or None
    except (ValueError, struct.error, OSError, UnicodeDecodeError):
        return None


def _mapped(path: Path) -> mmap.mmap:
    with path.open("rb") as f:
        return mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)


def _executorch(program: _Table) -> Counter[str]:
    counts: Counter[str] = Counter()
    for plan in program.tables(1):
        delegates = [delegate.text(0) for delegate in plan.tables(7)]
        for chain in plan.tables(5):
            for instruction in chain.tables(2):
                kind = instruction.byte(0)
                if kind == _KERNEL_CALL:
                    counts["cpu"] += 1
                if kind == _DELEGATE_CALL:
                    index = instruction.table(1).integer(0)
                    if not 0 <= index < len(delegates):
                        raise ValueError("no such delegate")
                    counts[delegates[index]] += 1
    return counts


def _litert(model: _Table) -> Counter[str]:
    dispatches = {i for i, code in enumerate(model.tables(1)) if code.text(1) == _DISPATCH}
    graph = next(model.tables(2), None)
    if graph is None:
        raise ValueError("there is no graph")
    return Counter(
        "npu" if operator.integer(0) in dispatches else "cpu" for operator in graph.tables(3)
    )


class _File:
    """A flatbuffer. What lies outside it raises ``struct.error``."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.left = MOST_TABLES
        """How many tables may still be read: lists that overlap could name any number of them."""

    def read(self, form: str, at: int) -> int:
        """Return the number at a place."""
        value: int = struct.unpack_from(form, self.data, at)[0]
        return value


class _Table:
    """A table of a flatbuffer."""

    def __init__(self, file: _File, at: int) -> None:
        file.left -= 1
        self._fields = at - file.read("<i", at)
        if self._fields < 0 or file.left < 0:
            raise ValueError("outside the file, or an absurd number")
        self._file, self._at = file, at
        self._size = file.read("<H", self._fields)

    @classmethod
    def root(cls, data: mmap.mmap) -> _Table:
        """Return the table that a file begins with."""
        file = _File(data)
        return cls(file, file.read("<I", 0))

    def _place(self, field: int) -> int | None:
        entry = 4 + 2 * field
        offset = self._file.read("<H", self._fields + entry) if entry < self._size else 0
        return self._at + offset if offset else None

    def byte(self, field: int) -> int:
        """Return a number of one byte."""
        place = self._place(field)
        return 0 if place is None else self._file.read("<B", place)

    def integer(self, field: int) -> int:
        """Return a number of four bytes."""
        place = self._place(field)
        return 0 if place is None else self._file.read("<i", place)

    def table(self, field: int) -> _Table:
        """Return a table in this one."""
        place = self._place(field)
        if place is None:
            raise ValueError("there is no such table")
        return _Table(self._file, place + self._file.read("<I", place))

    def text(self, field: int) -> str:
        """Return a text, empty if there is none."""
        place = self._place(field)
        if place is None:
            return ""
        start = place + self._file.read("<I", place)
        return self._file.data[start + 4 : start + 4 + self._file.read("<I", start)].decode()

    def tables(self, field: int) -> Iterator[_Table]:
        """Yield the tables of a list."""
        place = self._place(field)
        if place is None:
            return
        start = place + self._file.read("<I", place)
        count = self._file.read("<I", start)
        for entry in range(start + 4, start + 4 + 4 * count, 4):
            yield _Table(self._file, entry + self._file.read("<I", entry))
