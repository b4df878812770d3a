"""``handheld serve-text`` as a process: options, workers, signals."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time

import anyio
import httpx
import numpy as np
import pytest
from uvicorn.config import STARTUP_FAILURE

pytest.importorskip("kserve")

from handheld import cli
from handheld.text.client import AsyncTextClient
from handheld_export.serve.run import Application
from handheld_export.serve.settings import Settings
from handheld_export.text import LocalTextEncoder


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "argv", ["handheld"])


class Process:
    """A server; its log lines as they come."""

    def __init__(self, checkpoint, *options):
        command = [sys.executable, "-m", "handheld", "serve-text", str(checkpoint)]
        self.process = subprocess.Popen(
            [*command, "--port", "0", "--threads", "1", "--json", *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        self.lines: list[dict] = []
        self.noise: list[str] = []
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()
        self.facts = json.loads(self.process.stdout.readline())
        self.url = self.facts["url"]

    def _read(self):
        for line in self.process.stderr:
            try:
                self.lines.append(json.loads(line))
            except ValueError:
                self.noise.append(line)

    def pids(self):
        return [line["pid"] for line in self.lines if line["event"] == "ready"]

    def wait_ready(self, count, seconds=300):
        give_up = time.monotonic() + seconds
        while len(self.pids()) < count:
            assert self.process.poll() is None, self.lines + self.noise
            assert time.monotonic() < give_up, self.lines + self.noise
            time.sleep(0.05)

    def stop(self, sig=signal.SIGTERM):
        self.process.send_signal(sig)
        return self.process.wait(60)


@contextlib.contextmanager
def process(checkpoint, *options):
    found = Process(checkpoint, *options)
    try:
        yield found
    finally:
        found.process.kill()
        found.process.wait(30)


def test_dry_run(sdxl, capsys):
    assert cli.run(["serve-text", str(sdxl), "--dry-run", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["encoders_sha256"] == LocalTextEncoder(sdxl).encoders_sha256
    assert (facts["tokens"], facts["width"], facts["pooled_width"]) == (8, 40, 20)


def test_new_token(tmp_path, capsys):
    path = tmp_path / "tokens"
    assert cli.run(["serve-text", "--new-token", "app", "--tokens", str(path), "--json"]) == 0
    made = json.loads(capsys.readouterr().out)["token"]
    assert path.read_text().startswith("app ") and made not in path.read_text()
    assert cli.run(["serve-text", "--new-token", "a b", "--tokens", str(path)]) == 2
    assert cli.run(["serve-text", "--new-token", "app"]) == 2


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ([], "no checkpoint"),
        (["nowhere"], "no bundle, checkpoint or model"),
        (["{}", "--tls-cert", "x"], "go together"),
        (["{}", "--tls-cert", "x", "--tls-key", "y"], "no such file"),
        (["{}", "--tls-cert", __file__, "--tls-key", __file__], "no certificate and key"),
        (["{}", "--redis", "http://u:secret@x"], "--redis: is not the URL of a Redis"),
        (["{}", "--redis", "redis://u:secret@x:port"], "--redis: is not the URL of a Redis"),
        (["{}", "--policy", "nowhere:f"], "no prompt policy"),
        (["{}", "--tokens", "missing"], "cannot read"),
        (["{}", "--workers", "0"], "--workers"),
        (["{}", "--device", "abacus"], "cannot use 'abacus'"),
    ],
)
def test_usage(sdxl, options, text, capsys):
    given = [o.format(sdxl) for o in options]
    assert cli.run(["serve-text", *given, "--dry-run"]) == 2
    told = capsys.readouterr().err
    assert text in told and "secret" not in told


def test_a_worker_that_cannot_start_says_so_to_its_supervisor(sdxl, tmp_path, caplog):
    for changes, reason in (
        ({"policy": "nowhere:f"}, "no prompt policy"),
        ({"tokens": tmp_path / "none"}, "cannot read"),
        ({"redis": 7}, "AttributeError"),
    ):
        with pytest.raises(SystemExit) as caught:
            Application(Settings(sdxl, **changes))()
        assert caught.value.code == STARTUP_FAILURE
        assert reason in caplog.records[-1].reason


def test_without_the_extra(monkeypatch, sdxl, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.run(["serve-text", str(sdxl)]) == 2
    assert 'pip install "handheld[serve]"' in capsys.readouterr().err


@pytest.mark.slow
def test_a_taken_port_and_a_signal(sdxl, capsys):
    with process(sdxl) as server:
        server.wait_ready(1)
        port = server.url.rsplit(":", 1)[1]
        assert cli.run(["serve-text", str(sdxl), "--port", port]) == 2
        assert "cannot listen" in capsys.readouterr().err
        assert httpx.get(f"{server.url}/v2/health/ready").status_code == 200
        assert server.stop(signal.SIGINT) == 0
    events = [line["event"] for line in server.lines]
    assert events[-2:] == ["draining", "stopped"]


@pytest.mark.slow
def test_broken_weights_stop_the_start(sdxl, tmp_path):
    import tiny

    copy = tiny.copied(sdxl, tmp_path / "copy")
    weights = copy / "text_encoder" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    for options in ([], ["--workers", "2"]):
        with process(copy, *options) as server:
            assert server.process.wait(300) == 2
            server.reader.join(10)
            reasons = [x.get("reason", "") for x in server.lines if x["event"] == "start-failed"]
            assert reasons and "text_encoder" in reasons[0]


async def load(server, wanted, clients, stop, kill):
    """Ask from several clients, checking every row, until told to stop."""
    answered, slowest = 0, 0.0

    async def ask(number):
        nonlocal answered, slowest
        # A connection per request, as from many phones.
        for i in range(10**9):
            if stop.is_set():
                return
            prompt = list(wanted)[(number * 7 + i) % len(wanted)]
            async with AsyncTextClient(server.url, deadline=30, datatype="FP32") as client:
                began = time.monotonic()
                (row,) = await client.encode([prompt])
                slowest = max(slowest, time.monotonic() - began)
            np.testing.assert_allclose(row.prompt_embeds, wanted[prompt].prompt_embeds, atol=2e-6)
            np.testing.assert_allclose(row.pooled, wanted[prompt].pooled, atol=2e-6)
            answered += 1

    async with anyio.create_task_group() as group:
        for number in range(clients):
            group.start_soon(ask, number)
        group.start_soon(kill, lambda: answered)
    return answered, slowest


@pytest.mark.slow
def test_two_of_three_workers_are_killed_under_load(sdxl):
    prompts = [f"prompt number {i}" for i in range(40)]
    wanted = dict(zip(prompts, LocalTextEncoder(sdxl).encode(prompts), strict=True))
    # Without a cache every answer comes from the encoders.
    with process(sdxl, "--workers", "3", "--cache-mb", "0", "--log-level", "info") as server:
        server.wait_ready(3)
        stop = threading.Event()
        before = server.pids()

        async def kill(answered):
            await anyio.sleep(1)
            for pid in before[:2]:
                os.kill(pid, signal.SIGKILL)
            count = answered()
            with anyio.fail_after(300):
                while len(server.pids()) < 5 or answered() < count + 100:
                    await anyio.sleep(0.1)
            stop.set()

        answered, slowest = anyio.run(load, server, wanted, 8, stop, kill)
        assert answered > 100 and slowest < 30
        metrics = httpx.get(f"{server.url}/metrics").text
        counted = [x for x in metrics.splitlines() if x.startswith("handheld_text_requests_total")]
        total = sum(float(x.rsplit(" ", 1)[1]) for x in counted if 'route="infer"' in x)
        assert total >= answered, "metrics are those of all workers, also of those that are gone"
        assert server.stop() == 0
        server.reader.join(10)
        assert sum(line["event"] == "stopped" for line in server.lines) == 3


@pytest.mark.slow
def test_workers_leave_when_their_supervisor_is_killed(sdxl):
    with process(sdxl, "--workers", "2") as server:
        server.wait_ready(2)
        server.process.kill()
        server.reader.join(60)
        assert not server.reader.is_alive(), "a worker still holds the log"
        assert sum(line["event"] == "stopped" for line in server.lines) == 2
