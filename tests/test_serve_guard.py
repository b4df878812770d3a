"""What stands before the endpoints, without a network."""

from __future__ import annotations

import asyncio
import json
import time

import pytest

pytest.importorskip("kserve")

from handheld_export.serve.access import Access
from handheld_export.serve.guard import ABORT, Guard
from handheld_export.serve.settings import Settings

PATH = "/v2/models/text"


async def asked(guard, path=PATH, send=None):
    """Ask by GET; return status, body and whether the connection was dropped."""
    sent, dropped = [], []

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def keep(message):
        sent.append(message)

    scope = {
        "type": "http",
        "method": "GET",
        "path": path,
        "headers": [],
        "query_string": b"",
        "client": ("1.2.3.4", 5),
        ABORT: lambda: dropped.append(True),
    }
    await guard(scope, receive, send or keep)
    if not sent:
        return None, b"", bool(dropped)
    return sent[0]["status"], b"".join(m.get("body", b"") for m in sent[1:]), bool(dropped)


def answering(body):
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body})

    return app


def guard(app, tmp_path, **changes):
    settings = Settings(tmp_path, **changes)
    return Guard(app, settings, Access(settings), "1" * 64)


def test_long_answers_arrive_whole(tmp_path):
    body = bytes(range(256)) * 3001
    found = asyncio.run(asked(guard(answering(body), tmp_path)))
    assert found == (200, body, False)


def test_a_client_that_does_not_read_is_dropped_and_holds_others_up_no_longer(tmp_path):
    async def scenario():
        kept = guard(answering(b"x" * 2**20), tmp_path, send_timeout=0.5, max_unread=2**20 + 9)
        arrived = asyncio.Event()

        async def stuck(message):
            if message["type"] == "http.response.body":
                arrived.set()
                await asyncio.Event().wait()

        first = asyncio.create_task(asked(kept, send=stuck))
        await arrived.wait()
        status, body, _ = await asked(kept)
        assert status == 503 and "read" in json.loads(body)["error"]
        assert (await asked(kept, "/v2/health/live"))[0] == 200
        began = time.monotonic()
        assert (await first)[2], "the connection is dropped"
        assert time.monotonic() - began < 5
        assert (await asked(kept))[0] == 200

    asyncio.run(scenario())


@pytest.mark.parametrize("kind", ["http.response.start", "http.response.body"])
@pytest.mark.parametrize("path", [PATH, "/nothing"])
def test_short_answers_and_refusals_have_a_time_too(tmp_path, kind, path):
    async def stuck(message):
        if message["type"] == kind:
            await asyncio.Event().wait()

    async def scenario():
        kept = guard(answering(b"{}"), tmp_path, send_timeout=0.2, max_connections=1)
        assert (await asked(kept, path, send=stuck))[2], "the connection is dropped"
        assert (await asked(kept))[0] == 200, "and its place is free"

    asyncio.run(scenario())


def test_an_answer_that_would_be_too_much_to_wait_for_is_refused_before_it_begins(tmp_path):
    kept = guard(answering(b"x" * 2**20), tmp_path, max_unread=2**19)
    status, body, _ = asyncio.run(asked(kept))
    assert status == 503 and "read" in json.loads(body)["error"]


def test_those_that_are_not_let_in_take_no_place(tmp_path):
    tokens = tmp_path / "tokens"
    tokens.write_text("")

    async def scenario():
        waits = asyncio.Event()

        async def stuck(message):
            await waits.wait()

        kept = guard(answering(b"{}"), tmp_path, max_connections=1, tokens=tokens)
        tasks = [asyncio.create_task(asked(kept, send=stuck)) for _ in range(3)]
        await asyncio.sleep(0.05)
        assert (await asked(kept))[0] == 401, "and not 503"
        waits.set()
        await asyncio.gather(*tasks)

    asyncio.run(scenario())


def test_too_many_requests_are_refused_and_probes_are_not(tmp_path):
    async def scenario():
        going = asyncio.Event()

        async def slow(scope, receive, send):
            if scope["path"] == PATH:
                await going.wait()
            await answering(b"{}")(scope, receive, send)

        kept = guard(slow, tmp_path, max_connections=3)
        tasks = [asyncio.create_task(asked(kept)) for _ in range(3)]
        await asyncio.sleep(0)
        assert (await asked(kept))[0] == 503
        assert (await asked(kept, "/v2/health/live"))[0] == 200
        going.set()
        assert [t[0] for t in await asyncio.gather(*tasks)] == [200] * 3
        assert (await asked(kept))[0] == 200

    asyncio.run(scenario())
