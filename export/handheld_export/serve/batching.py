"""Dynamic batching: prompts that wait while the encoders are busy become the next batch."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from handheld.text import PromptEmbedding
from handheld_export.serve import metrics
from handheld_export.serve.errors import Refusal
from handheld_export.text import Tokens

Run = Callable[[Tokens, int | None], list[PromptEmbedding]]
Key = tuple[bytes, int | None]


@dataclass(eq=False)
class _Item:
    key: Key
    tokens: Tokens
    future: asyncio.Future[PromptEmbedding] = field(repr=False)
    waiting: int = 0


class Batcher:
    """Feeds prompts of many requests to encoders that take them several at a time.

    An idle encoder starts at once on whatever there is (or after ``wait``), so a lone request
    pays nothing. The same prompt asked for twice while the first waits is encoded once.
    Belongs to one event loop.

    Parameters
    ----------
    run : callable
        Encodes tokens with a clip skip; called in one thread.
    max_batch : int
        Prompts at once.
    wait : float
        Seconds for which an idle encoder waits for more.
    max_queue : int
        Prompts that may wait.
    """

    def __init__(self, run: Run, *, max_batch: int, wait: float, max_queue: int) -> None:
        self._run = run
        self._max_batch = max_batch
        self._wait = wait
        self._max_queue = max_queue
        self._items: dict[Key, _Item] = {}
        self._queue: list[_Item] = []
        self.thread = ThreadPoolExecutor(1, "encoders")
        self._worker: asyncio.Task[None] | None = None

    async def encode(self, tokens: Tokens, clip_skip: int | None) -> list[PromptEmbedding]:
        """Encode prompts.

        Raises
        ------
        Refusal
            If too many prompts wait already.
        """
        keys = [(tokens.key(i), clip_skip) for i in range(len(tokens))]
        new = len({k for k in keys if k not in self._items})
        if len(self._queue) + new > self._max_queue:
            raise Refusal(503, "too many prompts wait for the encoders", 1.0)
        items = [self._item(key, tokens, i) for i, key in enumerate(keys)]
        for item in items:
            item.waiting += 1
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        try:
            # Shielded: somebody else may wait for the same prompt.
            return list(await asyncio.gather(*(asyncio.shield(i.future) for i in items)))
        finally:
            for item in items:
                item.waiting -= 1

    def _item(self, key: Key, tokens: Tokens, i: int) -> _Item:
        item = self._items.get(key)
        if item is None:
            item = _Item(key, tokens.take([i]), asyncio.get_running_loop().create_future())
            self._items[key] = item
            self._queue.append(item)
            metrics.QUEUE.set(len(self._queue))
        return item

    async def _work(self) -> None:
        if self._wait > 0 and len(self._queue) < self._max_batch:
            await asyncio.sleep(self._wait)
        while batch := self._next():
            started = time.perf_counter()
            try:
                rows = await asyncio.get_running_loop().run_in_executor(
                    self.thread,
                    self._run,
                    Tokens.join([i.tokens for i in batch]),
                    batch[0].key[1],
                )
            except BaseException as error:
                self._finish(batch, error)
                if not isinstance(error, Exception):
                    raise
            else:
                self._finish(batch, rows)
            metrics.ENCODE_SECONDS.observe(time.perf_counter() - started)
            metrics.BATCH.observe(len(batch))

    def _next(self) -> list[_Item]:
        """Take the next batch: the oldest prompt and those that can go with it."""
        for item in self._queue:
            if item.waiting == 0:
                item.future.cancel()
                self._items.pop(item.key, None)
        self._queue = [i for i in self._queue if i.waiting > 0]
        batch: list[_Item] = []
        for item in self._queue:
            if len(batch) == self._max_batch:
                break
            if not batch or item.key[1] == batch[0].key[1]:
                batch.append(item)
        self._queue = [i for i in self._queue if i not in batch]
        metrics.QUEUE.set(len(self._queue))
        return batch

    def _finish(
        self, batch: Sequence[_Item], result: Sequence[PromptEmbedding] | BaseException
    ) -> None:
        for i, item in enumerate(batch):
            self._items.pop(item.key, None)
            if item.future.done():
                continue
            if isinstance(result, BaseException):
                item.future.set_exception(result)
                # Retrieved, so that asyncio does not log it when every waiter is gone.
                item.future.exception()
            else:
                item.future.set_result(result[i])

    def close(self) -> None:
        """Stop the thread once it has done what it does."""
        self.thread.shutdown(wait=True, cancel_futures=True)
