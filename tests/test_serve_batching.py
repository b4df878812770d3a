from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest

pytest.importorskip("kserve")

from handheld.text import PromptEmbedding
from handheld_export.serve.batching import Batcher
from handheld_export.serve.errors import Refusal
from handheld_export.text import Tokens


def tokens(*values):
    return Tokens((np.array([[v, 0] for v in values], np.int64),), tuple((2,) for _ in values))


class Encoders:
    """Gives the token back; holds the first batch until told to go on."""

    def __init__(self, fails=False):
        self.batches = []
        self.gate = threading.Event()
        self.fails = fails

    def run(self, found, clip_skip):
        self.batches.append((found.ids[0][:, 0].tolist(), clip_skip))
        assert self.gate.wait(30)
        if self.fails:
            raise RuntimeError("broken")
        return [PromptEmbedding(np.full((1, 1), float(v))) for v in found.ids[0][:, 0]]


async def settle():
    for _ in range(20):
        await asyncio.sleep(0.005)


def run(scenario, encoders, **options):
    batcher = Batcher(encoders.run, **({"max_batch": 4, "wait": 0, "max_queue": 8} | options))

    async def whole():
        try:
            await scenario(batcher)
        finally:
            encoders.gate.set()

    asyncio.run(whole())
    batcher.close()


def test_what_waits_becomes_a_batch_and_doubles_are_encoded_once():
    encoders = Encoders()

    async def scenario(batcher):
        asked = [asyncio.create_task(batcher.encode(tokens(1), None))]
        await settle()
        asked += [asyncio.create_task(batcher.encode(tokens(v, v + 1), None)) for v in (2, 3, 4)]
        asked.append(asyncio.create_task(batcher.encode(tokens(1), None)))
        asked.append(asyncio.create_task(batcher.encode(tokens(9), 1)))
        await settle()
        encoders.gate.set()
        rows = [[float(r.prompt_embeds[0, 0]) for r in await task] for task in asked]
        assert rows == [[1], [2, 3], [3, 4], [4, 5], [1], [9]]

    run(scenario, encoders)
    assert encoders.batches == [([1], None), ([2, 3, 4, 5], None), ([9], 1)]


def test_prompts_nobody_waits_for_are_dropped():
    encoders = Encoders()

    async def scenario(batcher):
        first = asyncio.create_task(batcher.encode(tokens(1), None))
        await settle()
        gone = asyncio.create_task(batcher.encode(tokens(2), None))
        shared = [asyncio.create_task(batcher.encode(tokens(3), None)) for _ in range(2)]
        await settle()
        gone.cancel()
        shared[0].cancel()
        await settle()
        encoders.gate.set()
        await first
        assert float((await shared[1])[0].prompt_embeds[0, 0]) == 3
        assert float((await batcher.encode(tokens(2), None))[0].prompt_embeds[0, 0]) == 2

    run(scenario, encoders)
    assert encoders.batches == [([1], None), ([3], None), ([2], None)]


def test_a_full_queue_refuses():
    encoders = Encoders()

    async def scenario(batcher):
        first = asyncio.create_task(batcher.encode(tokens(0), None))
        await settle()
        waiting = asyncio.create_task(batcher.encode(tokens(1, 2), None))
        await settle()
        with pytest.raises(Refusal) as e:
            await batcher.encode(tokens(3), None)
        assert e.value.http_status == 503
        same = asyncio.create_task(batcher.encode(tokens(2), None))
        await settle()
        encoders.gate.set()
        await asyncio.gather(first, waiting, same)

    run(scenario, encoders, max_queue=2)


def test_a_failure_reaches_everybody_and_the_next_batch_runs():
    encoders = Encoders(fails=True)
    encoders.gate.set()

    async def scenario(batcher):
        for _ in range(2):
            with pytest.raises(RuntimeError, match="broken"):
                await batcher.encode(tokens(1), None)
        encoders.fails = False
        assert len(await batcher.encode(tokens(1), None)) == 1

    run(scenario, encoders)
