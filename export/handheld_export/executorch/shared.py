"""One file of weights behind several ExecuTorch programs.

A program's weights are named segments behind its flatbuffer, which lists their offsets. So sharing
moves them into a file that :mod:`continues <handheld_export.sharing>` all programs of a segment,
and changes nothing of a program but these offsets. Names are hashes of content and scales
(:meth:`handheld_export.executorch.graph.Graph.store`), and XNNPACK knows packed weights by them.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from executorch.exir._serialize._flatbuffer_program import _patch_generated_flatbuffer_aliases
from executorch.exir._serialize._program import _ExtendedHeader, _get_extended_header
from executorch.exir._serialize.generated.executorch_flatbuffer.Program import Program

from handheld.errors import TargetError
from handheld_export.sharing import padded, whole

_ALIGNMENT: Final = 128
_HEADER: Final = 8
"""Where the extended header begins: behind the root's offset and the file's identifier."""
_OFFSET, _SIZE = 4, 6
"""Fields of a data segment in its table."""


class _Program:
    """A program's bytes, and where its segments are."""

    def __init__(self, path: Path) -> None:
        self.data = bytearray(path.read_bytes())
        header = _get_extended_header(bytes(self.data[: _ExtendedHeader.NUM_HEAD_BYTES]))
        if header is None or not header.is_valid():
            raise TargetError("has no segments", path=path)
        self.header = header
        # ExecuTorch does this before it writes a program, and here none may have been written.
        _patch_generated_flatbuffer_aliases()
        self.table: Any = Program.GetRootAs(self.data, 0)
        named = (self.table.NamedData(i) for i in range(self.table.NamedDataLength()))
        self.names = {entry.Key().decode(): int(entry.SegmentIndex()) for entry in named}

    def span(self, index: int) -> tuple[int, int]:
        """Return where a segment begins in the file, and its length."""
        segment = self.table.Segments(index)
        return self.header.segment_base_offset + segment.Offset(), segment.Size()

    def content(self, name: str) -> bytes:
        start, size = self.span(self.names[name])
        return bytes(self.data[start : start + size])

    def end(self) -> int:
        """Return where those end that have no name; a program begins with them."""
        named = set(self.names.values())
        spans = {i: self.span(i) for i in range(self.table.SegmentsLength())}
        return max((s + n for i, (s, n) in spans.items() if i not in named), default=0)

    def moved(self, places: dict[str, int], total: int) -> bytes:
        """Return the program with its named segments at other places of a file of ``total``."""
        end = self.end()
        if not end or any(self.span(i)[0] < end for i in self.names.values()):
            raise TargetError("does not begin with what has no name")
        data, base = bytearray(self.data[:end]), self.header.segment_base_offset
        for name, at in places.items():
            table = self.table.Segments(self.names[name])._tab
            field = table.Offset(_OFFSET)
            struct.pack_into("<Q", data, table.Pos + field, at - base)
        self.header.segment_data_size = total - base
        data[_HEADER : _HEADER + _ExtendedHeader.EXPECTED_LENGTH] = self.header.to_bytes()
        return bytes(data) + bytes(padded(end) - end)


def share(paths: Sequence[Path], outputs: Sequence[Path], weights: Path) -> bool:
    """Write programs again with their weights in one more file.

    Parameters
    ----------
    paths : sequence of Path
        One segment at several sizes, as
        :func:`~handheld_export.executorch.xnnpack.lower` writes it.
    outputs : sequence of Path
        ``SEGMENT.WIDTHxHEIGHT.pte`` for each, in the folder of ``weights``.
    weights : Path
        ``SEGMENT.weights``.

    Returns
    -------
    bool
        False if they do not have the same weights; nothing is written then.

    Raises
    ------
    TargetError
        If what was written is not what was read.
    """
    programs = [_Program(path) for path in paths]
    names = list(programs[0].names)
    if not names or any(set(p.names) != set(names) for p in programs):
        return False
    contents = {name: programs[0].content(name) for name in names}
    if any(p.content(n) != data for p in programs for n, data in contents.items()):
        return False
    places, at = {}, 0
    with weights.open("wb") as out:
        for name, data in contents.items():
            at = -(-at // _ALIGNMENT) * _ALIGNMENT
            out.write(bytes(at - out.tell()) + data)
            places[name] = at
            at += len(data)
    for program, output in zip(programs, outputs, strict=True):
        head = padded(program.end())
        output.write_bytes(program.moved({n: head + p for n, p in places.items()}, head + at))
        with whole(output) as joined:
            written = _Program(joined)
            if any(written.content(n) != data for n, data in contents.items()):
                raise TargetError("does not hold the weights that it had", path=output)
    return True
