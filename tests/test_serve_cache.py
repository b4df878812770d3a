from __future__ import annotations

import asyncio
import shutil
import socket
import subprocess
import time

import numpy as np
import pytest

pytest.importorskip("kserve")

from handheld_export.serve.cache import MemoryCache, RedisCache, key


def row(n=10, value=1.0):
    return {"x": np.full(n, value, np.float32)}


def test_the_row_unused_for_longest_goes():
    cache = MemoryCache(100)
    cache.put("a", row())
    cache.put("b", row())
    assert cache.nbytes == 80
    assert cache.get("a") is not None
    cache.put("c", row())
    assert cache.get("b") is None and cache.get("a") is not None
    cache.put("a", row(20))
    assert (len(cache), cache.nbytes) == (1, 80)
    cache.put("d", row(26))
    assert cache.get("d") is None, "larger than the cache"
    assert cache.nbytes == 80


def test_keys_differ_by_all_that_matters():
    keys = {key(s, i, c, d) for s in "ab" for i in (b"1", b"2") for c in (None, 0, 1) for d in "xy"}
    assert len(keys) == 24


def test_redis_that_is_away_is_a_miss():
    async def scenario():
        cache = RedisCache("redis://127.0.0.1:9", 60)
        cache.put({"a": row()})
        assert await cache.get(["a", "b"]) == [None, None]
        await cache.close()

    asyncio.run(scenario())


def test_redis_that_hangs_holds_up_one_request_only():
    async def scenario(port):
        cache = RedisCache(f"redis://127.0.0.1:{port}", 60)
        began = time.monotonic()
        assert await cache.get(["a"]) == [None]
        first = time.monotonic() - began
        began = time.monotonic()
        for _ in range(9):
            cache.put({"a": row()})
            assert await cache.get(["a"]) == [None]
        assert time.monotonic() - began < first
        await cache.close()

    with socket.create_server(("127.0.0.1", 0)) as mute:
        asyncio.run(scenario(mute.getsockname()[1]))


@pytest.mark.system
def test_redis_keeps_rows(tmp_path):
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("redis-server is not installed")
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    server = subprocess.Popen(
        [program, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", tmp_path],
        stdout=subprocess.DEVNULL,
    )
    try:
        give_up = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                assert time.monotonic() < give_up
                time.sleep(0.05)

        async def scenario():
            cache = RedisCache(f"redis://127.0.0.1:{port}", 60)
            cache.put({"a": row(value=2.0), "nan": row(value=np.nan)})
            await asyncio.gather(*cache._writing)
            found = await cache.get(["a", "b", "nan"])
            assert (found[0]["x"] == 2).all() and found[1:] == [None, None]
            await cache._redis.set("handheld:text:broken", b"x" * 99)
            assert await cache.get(["broken"]) == [None]
            await cache.close()

        asyncio.run(scenario())
    finally:
        server.terminate()
        server.wait(30)
