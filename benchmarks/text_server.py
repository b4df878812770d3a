"""What a text server costs and saves: load, latency, workers that die, encoders of full size.

    python benchmarks/text_server.py --json build/text-server.json
    python benchmarks/text_server.py --parts load,hits --requests 2000

Parts: `load` (batching on against off), `hits` (one plain client, answers from memory), `kill`
(three workers, two killed), `attack` (hostile requests beside a client that must get its answers,
and the memory that they cost), `payload` (bytes and what rounding does to critter's pictures),
`full` (random encoders of SDXL's size: parity, memory, time). Every answer is compared with what
the encoders give in this process. Server and clients share this machine's cores. Exit code 1 if an
answer is wrong or a figure is missed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import anyio
import httpx
import numpy as np

from handheld.devices.host import HostDevices
from handheld.errors import HandheldError
from handheld.files import replace_between
from handheld.text import PromptEmbedding
from handheld.text.client import AsyncTextClient
from handheld.text.oip import Datatype, from_wire, to_wire, write_request
from stages import ROOT, Stages, command, guarded, say, versions, write_summary

CRITTER = ROOT / "models" / "critter"
HIT_MS = 2.0
ATTACK_BYTES = 128_000_000
"""What hostile requests may add to the server's peak."""
TOLERANCE = 1e-3
"""Largest difference over largest value, of answers in FP16 against encode_prompt in float32."""
_COLOURS = ("purple", "lime", "blue", "yellow", "orange", "pink", "turquoise", "red")
_KINDS = ("creature", "monster", "critter", "robot")


def prompts(count: int) -> list[str]:
    """Return prompts of different tokens."""
    made = []
    for i in range(count):
        colour, other = _COLOURS[i % 8], _COLOURS[i // 8 % 8]
        made.append(f"a {colour} horned {_KINDS[i // 64 % 4]} {i} with a {other} spiky body")
    return made


class Server:
    """A running `handheld serve-text`, and what it logs."""

    def __init__(self, folder: Path, checkpoint: Path, options: Sequence[str]) -> None:
        self.log = folder / f"server-{time.monotonic_ns()}.log"
        begin = [sys.executable, "-m", "handheld", "serve-text", str(checkpoint)]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*begin, "--port", "0", "--json", "--log-level", "info", *options],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert self.process.stdout is not None
        self.facts = json.loads(self.process.stdout.readline())
        self.url: str = self.facts["url"]

    def events(self, name: str) -> list[dict[str, Any]]:
        """Return the log's whole lines of one kind."""
        lines = self.log.read_text().split("\n")[:-1]
        found = [json.loads(x) for x in lines if x.startswith("{")]
        return [x for x in found if x.get("event") == name]

    def wait(self, workers: int) -> None:
        """Wait until workers are ready."""
        while len(self.events("ready")) < workers:
            if self.process.poll() is not None:
                raise SystemExit(f"the server did not start:\n{self.log.read_text()}")
            time.sleep(0.1)

    def metric(self, name: str) -> float:
        """Return the sum of a metric over its labels."""
        lines = httpx.get(f"{self.url}/metrics", timeout=60).text.splitlines()
        return sum(float(x.rsplit(" ", 1)[1]) for x in lines if x.startswith(name))

    def cpu_seconds(self) -> float:
        """Return the processor time that a single worker has used."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def peak_bytes(self) -> int:
        """Return the high-water mark of a single worker's resident memory."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return next(int(x.split()[1]) for x in text.splitlines() if x.startswith("VmHWM")) * 1024


@contextlib.contextmanager
def serving(folder: Path, checkpoint: Path, *options: str, workers: int = 1) -> Iterator[Server]:
    """Run a server for as long as the block."""
    server = Server(folder, checkpoint, [*options, "--workers", str(workers)])
    try:
        server.wait(workers)
        yield server
    finally:
        server.process.send_signal(signal.SIGTERM)
        try:
            server.process.wait(60)
        except subprocess.TimeoutExpired:
            server.process.kill()


class Checker:
    """Compares answers with what the encoders give here."""

    def __init__(self, checkpoint: Path, count: int) -> None:
        from handheld_export.text import LocalTextEncoder

        encoder = LocalTextEncoder(checkpoint)
        self.prompts = prompts(count)
        self.wanted: dict[str, PromptEmbedding] = {}
        for at in range(0, count, 32):
            part = self.prompts[at : at + 32]
            self.wanted |= dict(zip(part, encoder.encode(part), strict=True))

    def right(self, prompt: str, row: PromptEmbedding) -> bool:
        """Tell whether an answer is the prompt's."""
        wanted = self.wanted[prompt]
        pairs = ((row.prompt_embeds, wanted.prompt_embeds), (row.pooled, wanted.pooled))
        return all(difference(a, b) <= TOLERANCE for a, b in pairs)


def difference(a: Any, b: Any) -> float:
    """Return max|a - b| / max|b|."""
    return float(np.abs(a - b).max() / np.abs(b).max())


def quantiles(seconds: Sequence[float]) -> dict[str, float]:
    """Return latencies in ms."""
    p50, p99 = np.percentile(seconds, [50, 99]) * 1e3
    return {
        "p50_ms": round(float(p50), 3),
        "p99_ms": round(float(p99), 3),
        "max_ms": round(max(seconds) * 1e3, 3),
    }


class Tally:
    """What a load saw."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.errors: list[str] = []
        self.wrong = 0
        self.wall = 0.0

    def facts(self) -> dict[str, Any]:
        """Return the figures."""
        return {
            "requests": len(self.seconds) + len(self.errors),
            "errors": len(self.errors),
            "first_errors": self.errors[:3],
            "wrong": self.wrong,
            "seconds": round(self.wall, 2),
            "per_second": round(len(self.seconds) / self.wall, 1),
            **quantiles(self.seconds),
        }


async def load(
    server: Server,
    checker: Checker,
    requests: int,
    clients: int,
    *,
    deadline: float = 60.0,
    during: Any = None,
) -> Tally:
    """Ask from several clients at once."""
    tally, asked = Tally(), 0
    version = server.facts["encoders_sha256"]

    async def one() -> None:
        nonlocal asked
        async with AsyncTextClient(
            server.url, encoders_sha256=version, deadline=deadline
        ) as client:
            while asked < requests:
                prompt = checker.prompts[asked % len(checker.prompts)]
                asked += 1
                began = time.perf_counter()
                try:
                    (row,) = await client.encode([prompt])
                except Exception as error:
                    tally.errors.append(f"{type(error).__name__}: {error}"[:200])
                    continue
                tally.seconds.append(time.perf_counter() - began)
                tally.wrong += not checker.right(prompt, row)

    began = time.perf_counter()
    async with anyio.create_task_group() as group:
        for _ in range(clients):
            group.start_soon(one)
        if during is not None:
            group.start_soon(during, lambda: asked)
    tally.wall = time.perf_counter() - began
    return tally


def load_part(
    work: Path, stages: Stages, requests: int, clients: int, threads: str
) -> dict[str, Any]:
    """Compare batching on with batching off, without a cache."""
    checker = Checker(CRITTER, min(requests, 1000))
    found: dict[str, Any] = {"clients": clients}
    # Without batching a tenth of the requests is enough to tell the throughput.
    for name, batch, count in (("batched", "32", requests), ("one_by_one", "1", requests // 10)):
        with (
            stages(f"load, {name.replace('_', ' ')}") as end,
            serving(
                work, CRITTER, "--cache-mb", "0", "--max-batch", batch, "--threads", threads
            ) as server,
        ):
            encoded = "handheld_text_encode_seconds"
            before = [server.metric(f"{encoded}_{x}") for x in ("sum", "count")]
            cpu, own = server.cpu_seconds(), time.process_time()
            tally = anyio.run(partial(load, server, checker, count, clients))
            cpu, own = server.cpu_seconds() - cpu, time.process_time() - own
            after = [server.metric(f"{encoded}_{x}") for x in ("sum", "count")]
            spent, batches = (b - a for a, b in zip(before, after, strict=True))
            found[name] = tally.facts() | {
                "server_cpu_ms": round(cpu / count * 1e3, 3),
                "client_cpu_ms": round(own / count * 1e3, 3),
                "batches": int(batches),
                "prompts_per_batch": round(len(tally.seconds) / batches, 2),
                "encode_ms_per_prompt": round(spent / len(tally.seconds) * 1e3, 3),
            }
            end(f"{found[name]['per_second']} requests/s, p99 {found[name]['p99_ms']} ms")
    found["throughput_ratio"] = round(
        found["batched"]["per_second"] / found["one_by_one"]["per_second"], 2
    )
    return found


def hits_part(work: Path, stages: Stages, requests: int, threads: str) -> dict[str, Any]:
    """Measure one client: answers from memory, and what the server adds to the encoders."""
    found: dict[str, Any] = {}
    body, end_of_json = write_request(["a purple horned creature"], datatype="FP16")
    headers = {"inference-header-content-length": str(end_of_json)}
    for name, cache in (("hit", "64"), ("miss", "0")):
        with (
            stages(f"one client, cache {name}") as end,
            serving(work, CRITTER, "--cache-mb", cache, "--threads", threads) as server,
            # The leanest client at hand: its own time is in the figure, too.
            contextlib.closing(HTTPConnection(httpx.URL(server.url).netloc.decode())) as client,
        ):

            def ask(client: HTTPConnection = client) -> bytes:
                client.request("POST", "/v2/models/text/infer", body, headers)
                response = client.getresponse()
                answer = response.read()
                if response.status != 200:
                    raise HandheldError(f"the server answers {response.status}: {answer[:200]!r}")
                return answer

            count = requests if name == "hit" else max(50, requests // 5)
            for _ in range(20):
                ask()
            encoded = "handheld_text_encode_seconds"
            before = [server.metric(f"{encoded}_{x}") for x in ("sum", "count")]
            seconds = []
            cpu, own = server.cpu_seconds(), time.process_time()
            for _ in range(count):
                began = time.perf_counter()
                answer = ask()
                seconds.append(time.perf_counter() - began)
            cpu, own = server.cpu_seconds() - cpu, time.process_time() - own
            found[name] = quantiles(seconds) | {
                "requests": count,
                "server_cpu_ms": round(cpu / count * 1e3, 3),
                "client_cpu_ms": round(own / count * 1e3, 3),
            }
            found["answer_bytes"] = len(answer)
            if name == "miss":
                after = [server.metric(f"{encoded}_{x}") for x in ("sum", "count")]
                spent, batches = (b - a for a, b in zip(before, after, strict=True))
                found["miss"]["encode_mean_ms"] = round(spent / batches * 1e3, 3)
                mean = float(np.mean(seconds)) * 1e3
                found["miss"]["mean_ms"] = round(mean, 3)
                found["overhead_ms"] = round(mean - found["miss"]["encode_mean_ms"], 3)
            end(f"p50 {found[name]['p50_ms']} ms")
    return found


def kill_part(work: Path, stages: Stages, requests: int) -> dict[str, Any]:
    """Kill two of three workers under load."""
    checker = Checker(CRITTER, 200)
    with (
        stages("three workers, two killed") as end,
        serving(work, CRITTER, "--cache-mb", "0", "--threads", "1", workers=3) as server,
    ):
        victims = [x["pid"] for x in server.events("ready")][:2]

        async def kill(asked: Any) -> None:
            for i, pid in enumerate(victims):
                while asked() < requests * (i + 1) // 4:
                    await anyio.sleep(0.01)
                os.kill(pid, signal.SIGKILL)

        tally = anyio.run(partial(load, server, checker, requests, 12, deadline=30.0, during=kill))
        found = tally.facts() | {"clients": 12, "killed": len(victims), "deadline_s": 30.0}
        end(f"{found['errors']} errors, {found['wrong']} wrong, slowest {found['max_ms']} ms")
    return found


def hostile(token: str, revoked: str) -> dict[str, tuple[bytes, dict[str, str], int]]:
    """Return body, headers and the right status of requests that nobody should send."""
    key = {"authorization": f"Bearer {token}"}

    def of(**tensor: Any) -> bytes:
        base = {"name": "prompt", "shape": [1], "datatype": "BYTES", "data": ["a"]}
        return json.dumps({"inputs": [base | tensor]}).encode()

    good, end = write_request(["a robot"])
    lying = good.replace(b"\x07\x00\x00\x00", b"\xff\xff\xff\xff")
    return {
        "bad JSON": (b'{"inputs": [', key, 400),
        "deep JSON": (b"[" * 500_000, key, 400),
        "wrong datatype": (of(datatype="FP32", data=[1.0]), key, 400),
        "wrong shape": (of(shape=[2, 3]), key, 400),
        "huge shape": (of(shape=[2**62]), key, 400),
        "huge batch": (of(shape=[100_000], data=["a"] * 100_000), key, 400),
        "lying string length": (lying, key | {"inference-header-content-length": str(end)}, 400),
        "oversized body": (b"x" * (8 << 20), key, 413),
        "invalid token": (of(), {"authorization": "Bearer wrong"}, 401),
        "rotated-out token": (of(), {"authorization": f"Bearer {revoked}"}, 401),
    }


async def drip(port: int, seconds: float, counts: dict[str, int]) -> None:
    """Send a request's head so slowly that it never ends; count how the server ends it."""
    give_up = time.monotonic() + seconds
    stream = await anyio.connect_tcp("127.0.0.1", port)
    async with stream:
        answer = b""

        async def listen() -> None:
            nonlocal answer
            with contextlib.suppress(anyio.EndOfStream, anyio.BrokenResourceError):
                answer = await stream.receive(1000)

        async with anyio.create_task_group() as group:
            group.start_soon(listen)
            with contextlib.suppress(anyio.BrokenResourceError):
                for byte in b"POST /v2/models/text/infer HTTP/1.1\r\nX-Slow: " + b"x" * 1000:
                    if answer or time.monotonic() > give_up:
                        break
                    await stream.send(bytes([byte]))
                    await anyio.sleep(0.2)
            group.cancel_scope.cancel()
    status = answer.split(b" ")[1].decode() if answer.startswith(b"HTTP/1.1 ") else "held open"
    counts[status] = counts.get(status, 0) + 1


def attack_part(work: Path, stages: Stages, rounds: int, threads: str) -> dict[str, Any]:
    """Send what nobody should send, while a good client asks; watch statuses and memory."""
    from handheld_export.serve import access

    checker = Checker(CRITTER, 200)
    file = work / "tokens"
    revoked = access.new_token(file, "phone-app")
    token = access.new_token(file, "phone-app")
    with (
        stages("hostile requests") as end,
        serving(
            work, CRITTER, "--tokens", str(file), "--threads", threads, "--cache-mb", "8"
        ) as server,
    ):
        version, port = server.facts["encoders_sha256"], int(server.url.rsplit(":", 1)[1])
        # Rotate: only the second line stays.
        file.write_text("".join(file.read_text().splitlines(keepends=True)[1:]))
        cases = hostile(token, revoked)
        statuses: dict[str, dict[str, int]] = {name: {} for name in (*cases, "slow head")}
        tally = Tally()

        async def good(count: int) -> None:
            async with AsyncTextClient(
                server.url, token=token, encoders_sha256=version, deadline=60.0
            ) as client:
                for i in range(count):
                    prompt = checker.prompts[i % len(checker.prompts)]
                    began = time.perf_counter()
                    try:
                        (row,) = await client.encode([prompt])
                    except Exception as error:
                        tally.errors.append(f"{type(error).__name__}: {error}"[:200])
                        continue
                    tally.seconds.append(time.perf_counter() - began)
                    tally.wrong += not checker.right(prompt, row)

        async def bad(name: str) -> None:
            body, headers, _ = cases[name]
            async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
                for _ in range(rounds):
                    try:
                        answer = await client.post(
                            "/v2/models/text/infer", content=body, headers=headers
                        )
                        status = str(answer.status_code)
                    except httpx.WriteError:
                        # The server may hang up while a body that it refuses is on its way.
                        status = "hung up"
                    statuses[name][status] = statuses[name].get(status, 0) + 1

        async def run() -> None:
            async with anyio.create_task_group() as group:
                for name in cases:
                    group.start_soon(bad, name)
                for _ in range(100):
                    group.start_soon(drip, port, 60.0, statuses["slow head"])
                group.start_soon(good, rounds * 5)

        anyio.run(good, rounds)
        before = server.peak_bytes()
        tally = Tally()
        began = time.perf_counter()
        anyio.run(run)
        tally.wall = time.perf_counter() - began
        found: dict[str, Any] = {
            "statuses": statuses,
            "unexpected": sorted(
                name
                for name, seen in statuses.items()
                if set(seen)
                - {str(cases[name][2]) if name in cases else "408"}
                - ({"hung up"} if name == "oversized body" else set())
            ),
            "good": tally.facts(),
            "peak_before_bytes": before,
            "peak_after_bytes": server.peak_bytes(),
            "growth_bytes": server.peak_bytes() - before,
            "workers_lost": len(server.events("ready")) - 1 + (server.process.poll() is not None),
        }
        count = sum(sum(seen.values()) for seen in statuses.values())
        end(f"{count} refused, peak {found['growth_bytes'] / 1e6:+.0f} MB")
    return found


class Rounded:
    """Text encoders whose embeddings have travelled."""

    def __init__(self, encoder: Any, datatype: Datatype) -> None:
        self.encoder, self.datatype = encoder, datatype

    def encode(self, texts: Sequence[str]) -> list[PromptEmbedding]:
        made = []
        for row in self.encoder.encode(texts):
            values = []
            for name, value in (("prompt_embeds", row.prompt_embeds), ("pooled", row.pooled)):
                values.append(from_wire(name, to_wire(name, value, self.datatype)))
            assert values[0] is not None
            made.append(PromptEmbedding(values[0], values[1]))
        return made


def payload_part(stages: Stages, pictures: int) -> dict[str, Any]:
    """Say what each datatype weighs, and what it does to critter's pictures."""
    import torch

    from handheld_export.checkpoint import Checkpoint
    from handheld_export.compress.painter import Painter

    with stages("payload") as end:
        painter = Painter(Checkpoint(CRITTER))
        encoder = painter._encoder
        captions = prompts(pictures)
        side = painter.side
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(pictures, painter.channels, side, side, generator=generator)
        drawn: dict[str, Any] = {}
        found: dict[str, Any] = {"pictures": pictures}
        for datatype in ("FP32", "FP16", "INT8"):
            painter._encoder = Rounded(encoder, datatype)  # type: ignore[assignment]
            drawn[datatype] = painter.draw(captions, noise).numpy().astype(np.float64)
            found[datatype] = {"sdxl_bytes": wire_bytes(datatype, 77, 2048, 1280)}
            if datatype != "FP32":
                error = drawn[datatype] - drawn["FP32"]
                mse = (error**2).mean(axis=(1, 2, 3))
                psnr = 10 * np.log10(255**2 / np.maximum(mse, 1e-4))
                found[datatype] |= {
                    "psnr_median_db": round(float(np.median(psnr)), 1),
                    "psnr_worst_db": round(float(psnr.min()), 1),
                    "equal_pixels": round(float((error == 0).mean()), 4),
                }
        end(f"FP16 {found['FP16']['psnr_median_db']} dB, INT8 {found['INT8']['psnr_median_db']} dB")
    return found


def wire_bytes(datatype: Any, tokens: int, width: int, pooled: int) -> int:
    """Return the bytes of one prompt's tensors."""
    shapes = {"prompt_embeds": (tokens, width), "pooled": (pooled,)}
    return sum(
        t.nbytes
        for name, shape in shapes.items()
        for t in to_wire(name, np.ones(shape, np.float32), datatype).values()
    )


CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
}
BIGG = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}


def write_full_size(folder: Path) -> int:
    """Write random encoders of SDXL's size in float16, as SDXL ships them; return their bytes."""
    import shutil

    import torch
    import transformers

    words = json.loads((CRITTER / "text_encoder" / "config.json").read_text())
    ids = {k: words[k] for k in ("bos_token_id", "eos_token_id")}
    for suffix, shape, name in (
        ("", CLIP_L, "CLIPTextModel"),
        ("_2", BIGG, "CLIPTextModelWithProjection"),
    ):
        torch.manual_seed(0)
        config = transformers.CLIPTextConfig(
            vocab_size=49408, max_position_embeddings=77, pad_token_id=ids["eos_token_id"],
            **ids, **shape,
        )  # fmt: skip
        model = getattr(transformers, name)(config).half()
        model.save_pretrained(folder / f"text_encoder{suffix}")
        shutil.copytree(CRITTER / f"tokenizer{suffix}", folder / f"tokenizer{suffix}")
        del model
    return sum(p.stat().st_size for p in folder.glob("text_encoder*/*.safetensors"))


def full_part(work: Path, stages: Stages) -> dict[str, Any]:
    """Parity, memory and time of encoders of SDXL's size."""
    folder = work / "full"
    texts = ["a purple horned creature", "", "many words " * 40, "ünï 🤖"]
    with stages("writing encoders of full size") as end:
        size = write_full_size(folder)
        end(f"{size / 1e9:.2f} GB")
    found: dict[str, Any] = {"weights_bytes": size, "parameters": size // 2}
    with (
        stages("serving encoders of full size") as end,
        serving(work, folder, "--cache-mb", "0", "--timeout", "600") as server,
    ):
        answers = work / "answers.npz"
        found["load_seconds"] = server.events("ready")[0]["seconds"]

        async def ask() -> tuple[list[PromptEmbedding], list[float]]:
            async with AsyncTextClient(server.url, deadline=600, attempt=600) as client:
                seconds = []
                for i in range(4):
                    began = time.perf_counter()
                    await client.encode([f"prompt {i}"])
                    seconds.append(time.perf_counter() - began)
                return await client.encode(texts), seconds

        rows, seconds = anyio.run(ask)
        np.savez(
            answers,
            prompt_embeds=np.stack([r.prompt_embeds for r in rows]),
            pooled=np.stack([r.pooled for r in rows if r.pooled is not None]),
        )
        found["prompt"] = quantiles(seconds)
        found["server_peak_bytes"] = server.peak_bytes()
        end(f"{found['prompt']['p50_ms']:.0f} ms a prompt")
    with stages("diffusers' encode_prompt in float32") as end:
        found["parity"] = compare(folder, texts, answers)
        end(str(found["parity"]))
    with stages("the encoders in a process of their own, float16") as end:
        found["process"] = alone(folder)
        saved = found["process"]["resident_bytes"]
        end(f"{saved / 1e9:.2f} GB resident")
    return found


def compare(folder: Path, texts: Sequence[str], answers: Path) -> dict[str, float]:
    """Compare answers in FP16 with diffusers in float32, in a process of its own."""
    program = f"""
import json, numpy as np, torch
from diffusers import StableDiffusionXLPipeline as P
from transformers import CLIPTextModel as A, CLIPTextModelWithProjection as B, CLIPTokenizer as T
f = {str(folder)!r}
p = P(vae=None, unet=None, scheduler=None,
    tokenizer=T.from_pretrained(f + "/tokenizer"),
    tokenizer_2=T.from_pretrained(f + "/tokenizer_2"),
    text_encoder=A.from_pretrained(f + "/text_encoder", dtype=torch.float32),
    text_encoder_2=B.from_pretrained(f + "/text_encoder_2", dtype=torch.float32))
with torch.no_grad():
    e, _, q, _ = p.encode_prompt(
        {list(texts)!r}, device="cpu", do_classifier_free_guidance=False)
got = np.load({str(answers)!r})
print(json.dumps(dict((n, float(np.abs(got[n] - w.numpy()).max() / np.abs(w.numpy()).max()))
    for n, w in (("prompt_embeds", e), ("pooled", q)))))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise SystemExit(done.stderr)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def alone(folder: Path) -> dict[str, Any]:
    """Measure what loading and running both encoders adds to a process's memory."""
    program = f"""
import json, time, torch
from handheld_export.text import LocalTextEncoder
def rss():
    lines = open("/proc/self/status").read().splitlines()
    pick = lambda name: next(int(x.split()[1]) for x in lines if x.startswith(name)) * 1024
    return pick("VmRSS"), pick("VmHWM")
import transformers
from transformers import CLIPTextModel, CLIPTextModelWithProjection
e = LocalTextEncoder({str(folder)!r}, dtype="float16")
e.tokenize(["x"])
before, _ = rss()
e.load()
began = time.perf_counter()
e.encode(["a purple horned creature"])
seconds = time.perf_counter() - began
after, peak = rss()
print(json.dumps(dict(resident_bytes=after - before, peak_bytes=peak - before,
    seconds_per_prompt=round(seconds, 3))))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise SystemExit(done.stderr)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def cpu_ms(facts: dict[str, Any]) -> str:
    """Return the processor time of a request, which other processes do not add to."""
    return (
        f"{facts['server_cpu_ms']:.1f} ms in the server, {facts['client_cpu_ms']:.1f} in the client"
    )


def page(found: dict[str, Any]) -> str:
    """Return the figures as Markdown."""
    rows: list[tuple[str, str]] = []
    if (load := found.get("load")) is not None:
        many, one = load["batched"], load["one_by_one"]
        rows += [
            (
                f"{many['requests']} requests from {load['clients']} clients, no cache",
                f"{many['per_second']} per second, p50 {many['p50_ms']:.0f} ms, p99 "
                f"{many['p99_ms']:.0f} ms; {many['errors']} errors, {many['wrong']} wrong; "
                f"processor time {cpu_ms(many)}",
            ),
            (
                "the same without batching",
                f"{one['per_second']} per second: batching gives {load['throughput_ratio']} times "
                f"as many, {many['prompts_per_batch']} prompts a batch; processor time "
                f"{cpu_ms(one)}",
            ),
        ]
    if (hits := found.get("hits")) is not None:
        miss = hits["miss"]
        rows += [
            (
                "one client (Python's http.client), answer from memory",
                f"p50 {hits['hit']['p50_ms']:.2f} ms; processor time {cpu_ms(hits['hit'])}",
            ),
            (
                "the same client, no cache",
                f"{miss['mean_ms']:.1f} ms, of which the encoders take "
                f"{miss['encode_mean_ms']:.1f} ms; processor time {cpu_ms(miss)}",
            ),
        ]
    if (kill := found.get("kill")) is not None:
        rows.append(
            (
                f"{kill['requests']} requests, {kill['killed']} of three workers killed",
                f"{kill['errors']} errors, {kill['wrong']} wrong, slowest "
                f"{kill['max_ms'] / 1e3:.1f} s",
            )
        )
    if (attack := found.get("attack")) is not None:
        count = sum(sum(seen.values()) for seen in attack["statuses"].values())
        rows.append(
            (
                f"{count} hostile requests of {len(attack['statuses'])} kinds, beside "
                f"{attack['good']['requests']} good ones",
                f"the server's peak grows by {attack['growth_bytes'] / 1e6:.0f} MB; "
                f"{attack['workers_lost']} workers lost; good ones: {attack['good']['errors']} "
                f"errors, {attack['good']['wrong']} wrong, p99 {attack['good']['p99_ms']:.0f} ms",
            )
        )
    if (payload := found.get("payload")) is not None:
        for name in ("FP32", "FP16", "INT8"):
            facts = payload[name]
            text = f"{facts['sdxl_bytes'] / 1e3:.0f} kB a prompt of SDXL"
            if facts.get("equal_pixels") == 1.0:
                text += "; no pixel of critter's pictures differs"
            elif "psnr_median_db" in facts:
                text += (
                    f"; critter's pictures differ by {facts['psnr_median_db']} dB PSNR, at worst "
                    f"{facts['psnr_worst_db']}"
                )
            rows.append((name, text))
    if (full := found.get("full")) is not None:
        alone = full["process"]
        worst = max(full["parity"].values())
        rows += [
            (
                "SDXL's encoders, random weights, FP16 answers against encode_prompt in float32",
                f"max abs difference / max abs value {worst:.1e}",
            ),
            ("their files in float16", f"{full['weights_bytes'] / 1e9:.2f} GB"),
            (
                "what they add to a process that loads and runs them in float16",
                f"{alone['resident_bytes'] / 1e9:.2f} GB",
            ),
            (
                "the server that runs them in float32",
                f"{full['server_peak_bytes'] / 1e9:.1f} GB at its peak, "
                f"{full['prompt']['p50_ms'] / 1e3:.1f} s a prompt",
            ),
        ]
    lines = ["| what | figure |", "|---|---|", *(f"| {a} | {b} |" for a, b in rows)]
    parts = [found[p] for p in PARTS if p in found]
    machine = parts[0]["machine"]
    busy = max(p["busy_before"] or 0 for p in parts)
    return (
        "\n".join(lines) + f"\n\nMeasured by `benchmarks/text_server.py` on {machine['cpu']}, "
        f"{machine['cores']} cores, clients and server together, torch "
        f"{parts[0]['versions']['torch']}. Before the parts began, other processes used up to "
        f"{busy:.0%} of the cores."
    )


PARTS = ("load", "hits", "kill", "attack", "payload", "full")


def faults(found: dict[str, Any]) -> list[str]:
    """Return what was missed."""
    missed = []
    kinds = ("batched", "one_by_one")
    loads = {f"load, {k}": found["load"][k] for k in kinds} if "load" in found else {}
    if "kill" in found:
        loads["kill"] = found["kill"]
    if "attack" in found:
        attack = found["attack"]
        loads["attack"] = attack["good"]
        missed += [f"attack, {name}: {attack['statuses'][name]}" for name in attack["unexpected"]]
        if attack["growth_bytes"] > ATTACK_BYTES or attack["workers_lost"]:
            missed.append(
                f"attack: {attack['growth_bytes']} bytes, {attack['workers_lost']} workers lost"
            )
    for name, facts in loads.items():
        if facts["errors"] or facts["wrong"]:
            missed.append(f"{name}: {facts['errors']} errors, {facts['wrong']} wrong")
    if "hits" in found and found["hits"]["hit"]["p50_ms"] > HIT_MS:
        missed.append(f"a hit takes {found['hits']['hit']['p50_ms']} ms, wanted {HIT_MS}")
    for name, value in found.get("full", {}).get("parity", {}).items():
        if value > TOLERANCE:
            missed.append(f"{name} differs by {value:.1e} from encode_prompt")
    return missed


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--pictures", type=int, default=16)
    parser.add_argument("--json", type=Path, default=ROOT / "build" / "text-server.json")
    parser.add_argument("--threads", default="0", help="of servers of critter; 0: all cores")
    parser.add_argument("--page", type=Path, help="write the figures between this page's marks")
    args = parser.parse_args()
    parts = [p for p in args.parts.split(",") if p]
    if unknown := set(parts) - set(PARTS):
        parser.error(f"unknown parts: {', '.join(sorted(unknown))}")
    stages = Stages()
    (host,) = HostDevices().attached()
    before = host.heat()
    # Parts may be run one by one: what an earlier run measured stays.
    found = json.loads(args.json.read_text()) if args.json.is_file() else {}
    with tempfile.TemporaryDirectory(prefix="handheld-text-") as name:
        work = Path(name)
        runs = {
            "load": lambda: load_part(work, stages, args.requests, args.clients, args.threads),
            "hits": lambda: hits_part(work, stages, min(args.requests, 2000), args.threads),
            "kill": lambda: kill_part(work, stages, min(args.requests, 3000)),
            "attack": lambda: attack_part(work, stages, 100, args.threads),
            "payload": lambda: payload_part(stages, args.pictures),
            "full": lambda: full_part(work, stages),
        }
        for part in parts:
            facts = runs[part]()
            found[part] = facts | {
                "command": list(command()),
                "versions": versions(),
                "machine": host.facts().model_dump(mode="json"),
                "busy_before": before.busy,
                "busy_after": host.heat().busy,
                "stages": stages.done,
            }
            write_summary(args.json, found)
    if args.page is not None:
        replace_between(args.page, "<!-- figures: begin -->", "<!-- figures: end -->", page(found))
    missed = faults(found)
    for line in missed:
        say(f"missed: {line}")
    say(json.dumps(found, indent=2))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(guarded(main))
