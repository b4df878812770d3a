"""What is computed in parts to save memory, from sizes alone: the rule of export and plan.

Decoders are cut into bands of rows, the table of an attention into heads and queries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

WHOLE_BYTES: Final = 32 * 10**6
"""A decoder whose largest float32 tensor has no more than this is drawn whole."""
BAND_BYTES: Final = 8 * 10**6
"""Of the largest tensor of a band, where nobody says otherwise."""
MOST_BANDS: Final = 64
"""So many parts of the largest tensor and no more: a program has a limit of operations."""


TABLE_BYTES: Final = 32 * 10**6
"""Of what the softmax of an attention gives at once, in float32."""


def attention(heads: int, queries: int, keys: int) -> tuple[int, int]:
    """Return of how many heads and queries the table of an attention is computed at once.

    All queries of as many heads as fit. Where not even the fewest do, of those: the keys and values
    of a part are packed for it, and what is packed for few queries costs most. Of one head alone
    LiteRT makes another operator, so the fewest are the least divisor above one.

    Returns
    -------
    heads, queries : int
        The heads divide what is given; the last part may have fewer queries.
    """
    at_once = [n for n in range(heads, 0, -1) if heads % n == 0 and (n > 1 or heads == 1)]
    chosen = next((n for n in at_once if 4 * n * queries * keys <= TABLE_BYTES), at_once[-1])
    most = max(1, TABLE_BYTES // (4 * chosen * keys))
    parts = math.ceil(queries / most)
    return chosen, math.ceil(queries / parts)


def choose(largest: int) -> float | None:
    """Return the MB of a decoder's bands, None if it is better drawn whole.

    Parameters
    ----------
    largest : int
        Bytes of its largest tensor in float32.
    """
    if largest <= WHOLE_BYTES:
        return None
    return max(BAND_BYTES, math.ceil(largest / MOST_BANDS)) / 1e6


@dataclass(frozen=True)
class Windows:
    """Bands that overlap, because what a call gives near a cut is wrong.

    Parameters
    ----------
    height : int
        Rows of the whole tensor.
    rows : int
        Of every window.
    overlap : int
        Rows at a cut that are not kept.
    starts : tuple of int
        First rows. The first and the last window end where the tensor does.
    """

    height: int
    rows: int
    overlap: int
    starts: tuple[int, ...]

    def kept(self, index: int) -> tuple[int, int]:
        """Return which rows of the whole come from a window: from, and up to."""
        last = len(self.starts) - 1
        inner = self.rows - self.overlap
        start = self.starts[index - 1] + inner if index else 0
        return start, self.starts[index] + inner if index < last else self.height


def windows(height: int, overlap: int, row_bytes: int, limit: float) -> Windows:
    """Cut rows into as few windows as have at most so many bytes each.

    Parameters
    ----------
    height : int
        Rows.
    overlap : int
        How far what is beyond a cut reaches.
    row_bytes : int
        Of the largest tensor of a call, for each row of the window.
    limit : float
        Bytes. Windows are no smaller than four times the overlap, so that at most half of the work
        is done twice.
    """
    count, rows = 1, height
    while rows * row_bytes > limit and overlap * 4 < rows:
        smaller = -(-(height + 2 * overlap * count) // (count + 1))
        if smaller < max(1, 4 * overlap):
            break
        count, rows = count + 1, smaller
    step = rows - 2 * overlap
    return Windows(height, rows, overlap, tuple(min(i * step, height - rows) for i in range(count)))
