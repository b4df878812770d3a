"""Embeddings that were asked for before, in memory and in Redis.

The key of an entry is the hash of the encoders, the token ids, clip skip, backend, device and
datatypes: what determines the numbers and nothing else. Prompts that differ in case or spaces
only share an entry, and no text of a prompt is kept.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from handheld.errors import UsageError
from handheld_export.serve import metrics

Row = Mapping[str, NDArray[Any]]
"""The tensors of one prompt, as they travel."""
_MAX_WRITING, _PAUSE_SECONDS = 64, 5.0
_log = logging.getLogger("handheld.serve")


def key(encoders_sha256: str, ids: bytes, clip_skip: int | None, computed: str) -> str:
    """Return the key of a prompt's embeddings; `computed` says by what, and how they travel."""
    head = f"{encoders_sha256} {clip_skip} {computed} ".encode()
    return hashlib.sha256(head + ids).hexdigest()


class MemoryCache:
    """The entries used last, up to a number of bytes.

    Parameters
    ----------
    max_bytes : int
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.nbytes = 0
        self._rows: OrderedDict[str, Row] = OrderedDict()

    def get(self, key: str) -> Row | None:
        """Return an entry, None if it is not there."""
        row = self._rows.get(key)
        if row is not None:
            self._rows.move_to_end(key)
        return row

    def put(self, key: str, row: Row) -> None:
        """Keep an entry, and drop those that were not used for longest."""
        size = _nbytes(row)
        if size > self.max_bytes:
            return
        if (old := self._rows.pop(key, None)) is not None:
            self.nbytes -= _nbytes(old)
        self._rows[key] = row
        self.nbytes += size
        while self.nbytes > self.max_bytes:
            _, dropped = self._rows.popitem(last=False)
            self.nbytes -= _nbytes(dropped)

    def __len__(self) -> int:
        """Return the number of entries."""
        return len(self._rows)


def _nbytes(row: Row) -> int:
    return sum(t.nbytes for t in row.values())


class RedisCache:
    """Entries that workers and servers share. Redis failing makes answers slower, not wrong.

    Parameters
    ----------
    url : str
    seconds : int
        After which an entry goes.

    Raises
    ------
    UsageError
        If the URL is not one of Redis.
    """

    def __init__(self, url: str, seconds: int) -> None:
        from redis.asyncio import Redis

        try:
            self._redis: Any = Redis.from_url(url, socket_timeout=0.25, socket_connect_timeout=0.25)
        except ValueError:
            # The URL may hold a password.
            raise UsageError(
                "is not the URL of a Redis",
                field="--redis",
                remedy="name one like redis://localhost:6379",
            ) from None
        self._seconds = seconds
        self._again = 0.0
        self._writing: set[asyncio.Task[None]] = set()

    async def get(self, keys: Sequence[str]) -> list[Row | None]:
        """Return entries, None for those that are not there."""
        if time.monotonic() < self._again:
            return [None] * len(keys)
        try:
            found = await self._redis.mget([f"handheld:text:{k}" for k in keys])
            return [None if data is None else _parse(data) for data in found]
        except Exception as error:
            self._failed(error)
            return [None] * len(keys)

    def put(self, rows: Mapping[str, Row]) -> None:
        """Keep entries, soon; what comes too fast to be written is left out."""
        if time.monotonic() < self._again or len(self._writing) >= _MAX_WRITING:
            return
        task = asyncio.create_task(self._put(rows))
        self._writing.add(task)
        task.add_done_callback(self._writing.discard)

    async def _put(self, rows: Mapping[str, Row]) -> None:
        try:
            async with self._redis.pipeline(transaction=False) as pipe:
                for name, row in rows.items():
                    pipe.set(f"handheld:text:{name}", save(dict(row)), ex=self._seconds)
                await pipe.execute()
        except Exception as error:
            self._failed(error)

    async def close(self) -> None:
        """Close the connections, when what is being written is written."""
        await asyncio.gather(*self._writing, return_exceptions=True)
        await self._redis.aclose()

    def _failed(self, error: Exception) -> None:
        # A Redis that hangs would hold up every request for the length of its time-outs.
        self._again = time.monotonic() + _PAUSE_SECONDS
        metrics.REDIS_ERRORS.inc()
        _log.warning("redis", extra={"event": "redis-failed", "error": type(error).__name__})


def _parse(data: bytes) -> Row | None:
    try:
        row = load(data)
    except (SafetensorError, ValueError, KeyError):
        return None
    finite = all(np.isfinite(t).all() for t in row.values() if t.dtype.kind == "f")
    return row if finite else None
