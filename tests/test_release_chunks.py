from __future__ import annotations

import hashlib
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from handheld.errors import ReleaseError
from handheld.release.chunks import BITS, MAX_BYTES, MIN_BYTES, chunked, parse_list, split

TABLE = [int.from_bytes(hashlib.sha256(bytes([b])).digest()[:4], "little") for b in range(256)]


def data(size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8).tobytes()


def plainly(content):
    """The specification, byte by byte: what is older than 32 bytes has been shifted out."""
    start = total = 0
    for i, byte in enumerate(content):
        total = (2 * total + TABLE[byte]) % 2**32
        size = i + 1 - start
        if (total < 2 ** (32 - BITS) and size >= MIN_BYTES) or size == MAX_BYTES:
            yield content[start : i + 1]
            start = i + 1
    if start < len(content):
        yield content[start:]


def test_as_specified():
    content = data(300_000) + bytes(100_000) + data(200_000, 1)
    assert list(split(io.BytesIO(content))) == list(plainly(content))


def test_pieces_make_the_file():
    content = data(5 * 2**20)
    pieces = list(split(io.BytesIO(content)))
    assert b"".join(pieces) == content
    assert all(MIN_BYTES <= len(p) <= MAX_BYTES for p in pieces[:-1])
    assert 8 <= len(pieces) <= 40


def test_constant_content_is_cut_at_the_limit():
    assert [len(p) for p in split(io.BytesIO(bytes(3 * MAX_BYTES)))] == [MAX_BYTES] * 3


def test_an_insertion_changes_few_pieces():
    content = data(4 * 2**20)
    before = {hashlib.sha256(p).digest() for p in split(io.BytesIO(content))}
    moved = content[:1_000_000] + b"inserted" + content[1_000_000:]
    after = [hashlib.sha256(p).digest() for p in split(io.BytesIO(moved))]
    assert sum(h not in before for h in after) <= 2


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 3 * 2**20), st.integers(0, 5))
def test_any_size(size, seed):
    assert b"".join(split(io.BytesIO(data(size, seed)))) == data(size, seed)


def test_copies_while_splitting(tmp_path):
    source, target = tmp_path / "a", tmp_path / "b"
    source.write_bytes(data(2**20))
    found = chunked(source, "a", target)
    assert target.read_bytes() == source.read_bytes()
    assert found.sha256 == hashlib.sha256(data(2**20)).hexdigest()
    assert sum(n for _, n in found.pieces) == found.bytes == 2**20


@pytest.mark.parametrize(
    "text",
    [b"", b"{}", b"[" * 10_000, b'{"variant": "a", "files": [{"path": "../x"}]}',
     b'{"schema_version": 1, "variant": "a", "files": [{"path": "x", "sha256": "' + b"0" * 64
     + b'", "bytes": 5, "pieces": []}]}'],
)  # fmt: skip
def test_lists_that_are_refused(text):
    with pytest.raises(ReleaseError):
        parse_list(text, "chunks.json")
