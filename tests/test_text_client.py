from __future__ import annotations

import json
import socket
import subprocess
import sys
import time

import anyio
import httpx
import numpy as np
import pytest

import samples
from handheld import text
from handheld.errors import BundleError, TextServerError, UsageError
from handheld.text import oip
from handheld.text.client import AsyncTextClient, TextClient
from handheld.text.store import Store

SHA = "1" * 64


def asked(content, length):
    """Return the prompts of a request, and its JSON."""
    at = int(length)
    tree = json.loads(content[:at])
    prompts = []
    for _ in range(tree["inputs"][0]["shape"][0]):
        size = int.from_bytes(content[at : at + 4], "little")
        prompts.append(content[at + 4 : at + 4 + size].decode())
        at += 4 + size
    return prompts, tree


class Server(httpx.AsyncBaseTransport):
    """Answers like a text server; ``faults`` are what comes before."""

    def __init__(self, *faults, sha=SHA, width=6, pooled=5, value=None, pause=0.0):
        self.faults, self.sha, self.shapes, self.value = list(faults), sha, (width, pooled), value
        self.pause = pause
        self.requests = []

    async def handle_async_request(self, request):
        content = await request.aread()
        self.requests.append((request, content))
        if self.faults:
            fault = self.faults.pop(0)
            if isinstance(fault, float):
                await anyio.sleep(fault)
            elif isinstance(fault, Exception):
                raise fault
            else:
                return fault
        await anyio.sleep(self.pause)
        if request.method == "GET" and request.url.path == "/v2/models/text":
            return httpx.Response(200, json={"versions": [self.sha]})
        if request.method == "GET":
            prompts = [request.url.params["prompt"]]
        else:
            prompts, _ = asked(content, request.headers[oip.JSON_LENGTH])
        return self.answer(prompts)

    def answer(self, prompts):
        width, pooled = self.shapes
        n = len(prompts)
        base = np.array([len(p) if self.value is None else self.value for p in prompts], np.float32)
        tensors = {
            "prompt_embeds": np.broadcast_to(base[:, None, None], (n, samples.TOKENS, width)),
            "pooled": np.broadcast_to(base[:, None], (n, pooled)),
            "tokens": np.array([[len(p) + 2] * 2 for p in prompts], np.int32),
        }
        outputs, tail = [], b""
        for name, value in tensors.items():
            wire = value if value.dtype == np.int32 else value.astype("<f2")
            data = np.ascontiguousarray(wire).tobytes()
            outputs.append(
                {
                    "name": name,
                    "shape": list(value.shape),
                    "datatype": "INT32" if value.dtype == np.int32 else "FP16",
                    "parameters": {"binary_data_size": len(data)},
                }
            )
            tail += data
        head = {
            "model_version": self.sha,
            "parameters": {"encoders_sha256": self.sha},
            "outputs": outputs,
        }
        front = json.dumps(head).encode()
        headers = {oip.JSON_LENGTH: str(len(front))}
        return httpx.Response(200, content=front + tail, headers=headers)


def client(server, **options):
    options.setdefault("encoders_sha256", SHA)
    return TextClient("http://localhost:1", transport=server, **options)


def refusal(status, **headers):
    return httpx.Response(status, json={"error": "because"}, headers=headers)


def test_embeddings_and_lengths():
    server = Server()
    with client(server) as found:
        rows = found.encode(["abc", "a", "abc"])
    assert [r.prompt_embeds[0, 0] for r in rows] == [3, 1, 3]
    assert rows[0].prompt_embeds.dtype == np.float32 and rows[0].pooled.shape == (5,)
    assert rows[0].tokens == (5, 5) and rows[0].truncated and not rows[1].truncated
    ((request, _),) = server.requests
    assert request.url.path == f"/v2/models/text/versions/{SHA}/infer"


def test_what_may_pass_is_asked_again():
    reset = httpx.ReadError("reset")
    server = Server(reset, refusal(503), refusal(429, **{"retry-after": "0"}), refusal(500))
    with client(server) as found:
        assert len(found.encode(["a"])) == 1
    assert len(server.requests) == 5
    bodies = {content for _, content in server.requests}
    assert len(bodies) == 1


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 301])
def test_what_cannot_pass_is_not(status):
    server = Server(refusal(status))
    with client(server) as found, pytest.raises(TextServerError, match=f"HTTP {status}: because"):
        found.encode(["a"])
    assert len(server.requests) == 1


def test_the_deadline_holds():
    for faults in (
        [httpx.ConnectError("no route")] * 999,
        [60.0] * 9,
        [refusal(503, **{"retry-after": "60"})],
    ):
        began = time.monotonic()
        with (
            client(Server(*faults), deadline=0.5) as found,
            pytest.raises(TextServerError, match=r"no answer within 0\.5 s"),
        ):
            found.encode(["a"])
        assert time.monotonic() - began < 5


def test_a_hedge_overtakes_a_slow_answer():
    server = Server(30.0)
    with client(server, hedge=0.05, deadline=20, attempt=20) as found:
        began = time.monotonic()
        assert len(found.encode(["a"])) == 1
        assert time.monotonic() - began < 10
    assert len(server.requests) == 2
    server = Server(httpx.ReadError("reset"))
    with client(server, hedge=5, deadline=20) as found:
        assert len(found.encode(["a"])) == 1, "a failure does not wait for the hedge"
    with client(Server(refusal(401)), hedge=5) as found, pytest.raises(TextServerError):
        found.encode(["a"])


def test_other_encoders_are_refused():
    with client(Server(sha="2" * 64)) as found, pytest.raises(TextServerError, match="other text"):
        found.encode(["a"])
    with client(Server(), encoders_sha256=None) as found:
        assert found.encoders_sha256 == SHA
        assert len(found.encode(["a"])) == 1
    mute = Server(httpx.Response(200, json={"name": "x"}))
    with (
        client(mute, encoders_sha256=None) as found,
        pytest.raises(TextServerError, match="does not tell"),
    ):
        found.encode(["a"])


def test_answers_must_fit_the_bundle(tmp_path):
    bundle = samples.write_bundle(tmp_path / "sample")
    info = bundle.manifest.text.model_copy(update={"encoders_sha256": SHA})
    for server, match in (
        (Server(width=7), r"prompt_embeds is of shape \[4, 7\]"),
        (Server(pooled=4), "pooled has 4 values"),
        (Server(value=np.nan), "not finite"),
        (Server(httpx.Response(200, content=b"x")), "malformed"),
    ):
        with client(server, text=info) as found, pytest.raises(TextServerError, match=match):
            found.encode(["a"])


def test_prefetched_prompts_need_no_server(tmp_path):
    bundle = samples.write_bundle(tmp_path / "sample")
    server = Server(*[httpx.ConnectError("refused")] * 99, sha=bundle.manifest.text.encoders_sha256)
    with TextClient.for_bundle(
        "http://localhost:1", bundle, transport=server, deadline=0.2
    ) as found:
        row = text.embed(bundle, samples.PROMPT, found)
        assert (row.pooled == samples.embeddings()["pooled"]).all()
        assert not server.requests
        with pytest.raises(TextServerError, match="no answer") as e:
            text.embed(bundle, "other", found)
        assert samples.PROMPT in e.value.remedy
    other = Server(sha="2" * 64)
    with client(other, encoders_sha256="2" * 64) as found, pytest.raises(BundleError):
        text.embed(bundle, "other", found)


def test_what_is_on_disk_is_not_asked_for(tmp_path):
    store = Store(tmp_path)
    server = Server()
    with client(server, store=store) as found:
        first = found.encode(["a", "bc"])
        again = found.encode(["bc", "a", "d"])
    assert (again[0].prompt_embeds == first[1].prompt_embeds).all()
    assert again[1].tokens == first[0].tokens
    assert len(server.requests) == 2 and server.requests[1][1].endswith(b"\x01\x00\x00\x00d")
    with client(Server(sha="2" * 64), encoders_sha256="2" * 64, store=store) as found:
        found.encode(["a"])
    assert len(list(tmp_path.glob("*.safetensors"))) == 4
    for path in tmp_path.glob("*.safetensors"):
        path.write_bytes(b"broken")
    with client(server, store=store) as found:
        assert (found.encode(["a"])[0].pooled == first[0].pooled).all()
    small = Store(tmp_path, max_bytes=1)
    with client(server, store=small) as found:
        found.encode(["e"])
    assert not list(tmp_path.glob("*.safetensors"))
    blocked = Store(tmp_path / "file" / "folder")
    (tmp_path / "file").write_text("")
    with client(server, store=blocked) as found:
        assert len(found.encode(["a"])) == 1


def test_by_get():
    server = Server()
    with client(server, get=True) as found:
        rows = found.encode(["a&b", "ü"])
    assert [r.prompt_embeds[0, 0] for r in rows] == [3, 1]
    assert [r.url.params["prompt"] for r, _ in server.requests] == ["a&b", "ü"]


def test_by_get_the_deadline_is_for_all_prompts():
    began = time.monotonic()
    with (
        client(Server(pause=0.3), get=True, deadline=0.5, attempt=0.5) as found,
        pytest.raises(TextServerError, match="no answer"),
    ):
        found.encode([str(i) for i in range(9)])
    assert time.monotonic() - began < 2


def test_an_answer_in_another_datatype_is_refused():
    with client(Server(), datatype="FP32") as found, pytest.raises(TextServerError, match="FP32"):
        found.encode(["a"])


def test_a_client_that_is_not_closed_lets_the_program_end():
    program = "from handheld.text.client import TextClient; TextClient('http://localhost:1')"
    done = subprocess.run([sys.executable, "-c", program], timeout=60, check=False)
    assert done.returncode == 0


def test_what_no_request_can_hold_is_refused_before_it_is_sent(tmp_path):
    server = Server()
    with client(server) as found, pytest.raises(UsageError, match="surrogate"):
        found.encode(["a\ud800"])
    for token in ("secret\n", "se cret", "s\u00e9cret", ""):
        with pytest.raises(UsageError, match="token") as e:
            client(server, token=token)
        assert "cret" not in str(e.value)
    with pytest.raises(UsageError, match="certificates"):
        AsyncTextClient("https://x", verify=str(tmp_path / "missing.pem"))
    assert not server.requests


def test_urls_and_tokens():
    for url in (
        "localhost",
        "ftp://x",
        "http://",
        "http://a:b@c",
        "http://x?y",
        "http://x:y",
        "http://[::1",
        "http://a\nb",
    ):
        with pytest.raises(UsageError):
            AsyncTextClient(url)
    with pytest.raises(UsageError, match="unencrypted"):
        AsyncTextClient("http://text.example", token="t")
    with pytest.raises(UsageError, match="datatype"):
        AsyncTextClient("http://x", datatype="BF16")
    server = Server()
    with client(server, token="t") as found:
        found.encode(["a"])
    assert server.requests[0][0].headers["authorization"] == "Bearer t"


def test_async():
    async def scenario():
        async with AsyncTextClient(
            "http://localhost:1", encoders_sha256=SHA, transport=Server()
        ) as found:
            rows = await found.encode(["a"], ["b"], clip_skip=1)
            assert len(rows) == 1

    anyio.run(scenario)


def test_no_proxy_sees_what_goes_to_this_machine(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as proxy, socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        proxy.settimeout(0.3)
        for name in ("http_proxy", "all_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.getsockname()[1]}")
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        for host in ("localhost", "127.0.0.1", "[::1]"):
            with (
                TextClient(f"http://{host}:{port}", token="secret", deadline=0.3) as client,
                pytest.raises(TextServerError),
            ):
                client.encode(["a"])
            with pytest.raises(TimeoutError):
                proxy.accept()
        with (
            TextClient("http://text.example", deadline=0.3) as client,
            pytest.raises(TextServerError),
        ):
            client.encode(["a"])
        proxy.accept()[0].close()
