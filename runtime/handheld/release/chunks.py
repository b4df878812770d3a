"""Files in content-defined pieces, so that an update sends what changed only.

A piece ends where the sum of the last 32 bytes' table entries, each shifted by its age, is small
(gear hashing, as in FastCDC). Insertions therefore move cuts with the content, and equal content
gives equal pieces wherever it stands. Table entry ``b`` is the first four bytes of the sha256 of
the byte ``b``, little-endian, so every language can make it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, BinaryIO, Final, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from handheld.bundle import describe_validation
from handheld.errors import ReleaseError
from handheld.manifest import BundlePath, Sha256
from handheld.program import Model
from handheld.release.manifest import AGAIN

MIN_BYTES: Final = 64 * 2**10
MAX_BYTES: Final = 2**20
BITS: Final = 18
"""A cut every 2**18 bytes, 256 KiB, on average."""
MAX_LIST_BYTES = 64 * 2**20

_WINDOW = 32
_BLOCK = 2**20
_TABLE = np.array(
    [int.from_bytes(hashlib.sha256(bytes([b])).digest()[:4], "little") for b in range(256)],
    dtype=np.uint32,
)

Piece = tuple[Sha256, Annotated[int, Field(ge=1, le=MAX_BYTES)]]
"""Hash and bytes."""


class ChunkedFile(Model):
    """A file as pieces in order."""

    path: BundlePath
    """Inside the bundle."""
    sha256: Sha256
    bytes: Annotated[int, Field(ge=0)]
    pieces: tuple[Piece, ...]


class ChunkList(Model):
    """All files of a variant as pieces."""

    schema_version: Literal[1] = 1
    variant: str
    files: tuple[ChunkedFile, ...]

    def to_bytes(self) -> bytes:
        """Return the bytes of ``chunks/ID.json``."""
        return (self.model_dump_json() + "\n").encode()


def parse_list(data: bytes, path: str | Path) -> ChunkList:
    """Parse a list of pieces.

    Raises
    ------
    ReleaseError
        If it is none, or a file's pieces do not add up to its size.
    """
    if len(data) > MAX_LIST_BYTES:
        raise ReleaseError(f"{len(data)} bytes is over the limit", path=path, remedy=AGAIN)
    try:
        found = ChunkList.model_validate_json(data, strict=True)
    except ValidationError as error:
        message, field = describe_validation(error)
        raise ReleaseError(message, path=path, field=field, remedy=AGAIN) from None
    for i, file in enumerate(found.files):
        if sum(n for _, n in file.pieces) != file.bytes:
            raise ReleaseError(
                "the pieces do not add up to the file", path=path, field=f"files[{i}]", remedy=AGAIN
            )
    return found


def split(source: BinaryIO, copy: BinaryIO | None = None) -> Iterator[bytes]:
    """Yield the pieces of a stream.

    Parameters
    ----------
    source : binary stream
    copy : binary stream, optional
        Gets what was read, so that one pass both copies and splits.
    """
    held = bytearray()
    tail = np.zeros(0, np.uint8)
    while block := source.read(_BLOCK):
        if copy is not None:
            copy.write(block)
        data = np.frombuffer(block, np.uint8)
        # Positions after which the content says to cut, counted from the start of ``held``.
        cuts = _cuts(tail, data) + len(held)
        tail = np.concatenate([tail, data])[-(_WINDOW - 1) :]
        held += block
        start = 0
        for cut in cuts.tolist():
            while cut - start > MAX_BYTES:
                yield bytes(held[start : start + MAX_BYTES])
                start += MAX_BYTES
            if cut - start >= MIN_BYTES:
                yield bytes(held[start:cut])
                start = cut
        while len(held) - start > MAX_BYTES:
            yield bytes(held[start : start + MAX_BYTES])
            start += MAX_BYTES
        del held[:start]
    if held:
        yield bytes(held)


def _cuts(tail: NDArray[np.uint8], data: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Return the ends of pieces in ``data``, which comes after ``tail``."""
    sums = _TABLE[np.concatenate([tail, data])]
    width = 1
    while width < _WINDOW:
        # Sums over twice as many bytes: those of the older half are shifted once per byte.
        older = np.zeros_like(sums)
        older[width:] = sums[:-width] << np.uint32(width)
        sums = sums + older
        width *= 2
    small = sums[len(tail) :] < np.uint32(1 << (32 - BITS))
    return np.flatnonzero(small).astype(np.int64) + 1


def chunked(path: Path, name: str, copy: Path | None = None) -> ChunkedFile:
    """Split a file, and copy it in the same pass if asked.

    Parameters
    ----------
    path : Path
    name : str
        Its path inside the bundle.
    copy : Path, optional
        Where the copy goes; nothing may be there.
    """
    digest, total = hashlib.sha256(), 0
    pieces: list[tuple[str, int]] = []
    with path.open("rb") as source:
        sink = copy.open("xb") if copy else None
        try:
            for piece in split(source, sink):
                digest.update(piece)
                total += len(piece)
                pieces.append((hashlib.sha256(piece).hexdigest(), len(piece)))
        finally:
            if sink:
                sink.close()
    return ChunkedFile(path=name, sha256=digest.hexdigest(), bytes=total, pieces=tuple(pieces))
