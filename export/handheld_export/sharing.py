"""Files that one more file continues.

What artifacts of a segment have in common at several picture sizes lies in a file of its own, as if
it were the end of each: they name it by offsets beyond their own length. Whoever opens one puts the
two behind each other: :func:`whole` in a file, the harness in memory, by mapping both, which is why
the first ends where a page ends.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

PAGE: Final = 1 << 14
"""The largest page of phones."""


def padded(length: int) -> int:
    """Return where the page ends that ``length`` bytes end in."""
    return -(-length // PAGE) * PAGE


def continued_by(path: Path) -> Path | None:
    """Return the file that continues ``SEGMENT.WIDTHxHEIGHT.*``, None if there is none."""
    weights = path.with_suffix("").with_suffix(".weights")
    return weights if weights.is_file() else None


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Give a file with what continues it, for as long as the block lasts."""
    more = continued_by(path)
    if more is None:
        yield path
        return
    with tempfile.NamedTemporaryFile(suffix=path.suffix) as file:
        for part in (path, more):
            with part.open("rb") as source:
                shutil.copyfileobj(source, file, 1 << 20)
        file.flush()
        yield Path(file.name)
