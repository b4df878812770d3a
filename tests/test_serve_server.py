"""The text server as clients see it: real HTTP, real gRPC, real tritonclient."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from threading import Event, Thread

import httpx
import numpy as np
import pytest

from handheld.errors import TextServerError
from handheld.text import PromptEmbedding, oip
from handheld.text.client import TextClient

pytest.importorskip("kserve")

import grpc
from kserve import InferRequest
from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb
from kserve.protocol.grpc import grpc_predict_v2_pb2_grpc as pb_grpc

import serving
import tiny
from handheld_export.serve import access
from handheld_export.serve.model import _travelling, response
from handheld_export.serve.run import Application
from handheld_export.serve.server import _address
from handheld_export.serve.settings import Settings
from handheld_export.text import LocalTextEncoder

PROMPTS = ["a small red robot", "", "A  SMALL red\trobot", "ünï🤖"]  # as in triton_text.py
INFER = "/v2/models/text/infer"


@pytest.fixture(scope="module")
def served(sdxl):
    with serving.running(sdxl, grpc=True, max_prompts=8, max_body=2**16) as found:
        yield found


@pytest.fixture(scope="module")
def http(served):
    with httpx.Client(base_url=served.url, timeout=30) as client:
        yield client


@pytest.fixture(scope="module")
def wanted(sdxl):
    return LocalTextEncoder(sdxl).encode(PROMPTS)


def body(**changes):
    item = {"name": "prompt", "shape": [1], "datatype": "BYTES", "data": ["a robot"]}
    return {"inputs": [item | changes]}


def same(embeds, pooled, wanted, atol):
    for i, row in enumerate(wanted):
        np.testing.assert_allclose(embeds[i], row.prompt_embeds, atol=atol)
        np.testing.assert_allclose(pooled[i], row.pooled, atol=atol)


# Somebody else's client


def test_tritonclient(served, wanted):
    pytest.importorskip("tritonclient")
    program = Path(__file__).with_name("triton_text.py")
    address = served.url.removeprefix("http://")
    done = subprocess.run(
        [sys.executable, program, address, served.grpc],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["http"]["live"] == found["grpc"]["live"] == [True] * 3
    assert {i["name"] for i in found["http"]["metadata"]["inputs"]} == {"prompt", "prompt_2"}
    assert found["http"]["id"] == "seven"
    for how in ("http", "grpc"):
        for datatype, name, atol in (("FP32", "float32", 2e-6), ("FP16", "float16", 4e-3)):
            dtype, embeds, pooled = found[how][datatype]
            assert dtype == name
            same(np.array(embeds), np.array(pooled), wanted, atol)
    assert "other text encoders" in found["http"]["version"][1]
    refused = {k: v[0].removeprefix("StatusCode.") for k, v in found["grpc"]["refused"].items()}
    assert refused == {
        "clip_skip": "INVALID_ARGUMENT",
        "datatype": "INVALID_ARGUMENT",
        "version": "NOT_FOUND",
        "numbers": "INVALID_ARGUMENT",
        "huge": "RESOURCE_EXHAUSTED",
        "unload": "UNIMPLEMENTED",
    }


# What is answered


@pytest.mark.parametrize("name", ["fp16", "fp32", "int8"])
def test_answers_are_written_as_the_golden_ones(name):
    golden = Path(__file__).parent / "golden"
    cases = json.loads((golden / "index.json").read_text())["text"]
    case = next(c for c in cases if name in c["file"])
    wanted = (golden / case["file"]).read_bytes()
    answer = oip.read_answer(wanted, str(case["json_length"]))
    tokens = [tuple(row) for row in answer.tensors["tokens"].tolist()]
    row = {k: v[0] for k, v in answer.tensors.items() if k != "tokens"}
    asked = InferRequest("text", [], "7", parameters={"binary_data_output": True})
    body, length = response("text", answer.version, asked, [row], tokens, 1).to_rest()
    assert (body, length) == (wanted, case["json_length"])


def test_json(http, wanted):
    found = http.post(INFER, json=body(shape=[4], data=PROMPTS)).json()
    tensors = {o["name"]: np.array(o["data"]).reshape(o["shape"]) for o in found["outputs"]}
    same(tensors["prompt_embeds"], tensors["pooled"], wanted, 2e-6)
    assert tensors["tokens"].shape == (4, 2)
    assert found["parameters"]["encoders_sha256"] == found["model_version"]
    one = http.post(INFER, json=body() | {"outputs": [{"name": "pooled"}]}).json()
    assert [o["name"] for o in one["outputs"]] == ["pooled"]


def test_second_prompts_and_clip_skip(http, sdxl):
    encoder = LocalTextEncoder(sdxl)
    (row,) = encoder.encode(["one"], ["two"], 1)
    data, end = oip.write_request(["one"], ["two"], clip_skip=1, datatype="FP32")
    response = http.post(INFER, content=data, headers={oip.JSON_LENGTH: str(end)})
    answer = oip.read_answer(response.content, response.headers[oip.JSON_LENGTH])
    np.testing.assert_allclose(answer.tensors["prompt_embeds"][0], row.prompt_embeds, atol=2e-6)
    np.testing.assert_allclose(answer.tensors["pooled"][0], row.pooled, atol=2e-6)


def test_truncation_is_told(http):
    found = http.post(INFER, json=body(shape=[2], data=["a", "many words " * 9])).json()
    tokens = next(o for o in found["outputs"] if o["name"] == "tokens")
    assert tokens["data"][0] <= tiny.TOKENS < tokens["data"][2]
    assert found["parameters"]["truncated"] == 1


def test_a_prompt_comes_from_the_cache_however_it_is_spelt(http):
    def encoded():
        text = http.get("/metrics").text
        lines = [line for line in text.splitlines() if "prompts_total" in line]
        return sum(float(x.rsplit(" ", 1)[1]) for x in lines if "encoders" in x)

    first = http.post(INFER, json=body(data=["never seen before"])).json()
    before = encoded()
    again = http.post(INFER, json=body(data=["NEVER  seen before "])).json()
    assert encoded() == before
    assert first["outputs"] == again["outputs"]


def test_get_can_be_cached(http):
    version = http.get("/v2/models/text").json()["versions"][0]
    path = f"/v2/models/text/versions/{version}/embeddings"
    found = http.get(path, params={"prompt": "a robot"})
    assert "immutable" in found.headers["cache-control"]
    assert "public" in found.headers["cache-control"]
    posted = http.post(
        INFER,
        json=body() | {"parameters": {"binary_data_output": True, "datatype": "FP16"}},
    )
    answers = [oip.read_answer(r.content, r.headers[oip.JSON_LENGTH]) for r in (found, posted)]
    for name, value in answers[0].tensors.items():
        assert (value == answers[1].tensors[name]).all()
    tag = found.headers["etag"]
    assert (
        http.get(path, params={"prompt": "a robot"}, headers={"if-none-match": tag}).status_code
        == 304
    )
    other = http.get(path, params={"prompt": "a robot", "datatype": "FP32"})
    assert other.headers["etag"] != tag
    assert (
        http.get("/v2/models/text/embeddings", params={"prompt": "a"}).headers["cache-control"]
        == "public, max-age=86400"
    )
    for bad in ({}, {"prompt": "a", "clip_skip": -1}, {"prompt": "a", "datatype": "X"}):
        assert http.get("/v2/models/text/embeddings", params=bad).status_code == 400


# What is refused


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"[]", 400),
        (b'"' + b"[" * 9000, 400),
        (b"[" * 9000, 400),
        (json.dumps({"inputs": []}), 400),
        (json.dumps(body(datatype="FP32", data=[1.0])), 400),
        (json.dumps(body(shape=[2])), 400),
        (json.dumps(body(shape=[1, 2])), 400),
        (json.dumps(body(shape=[-1])), 400),
        (json.dumps(body(shape=[])), 400),
        (json.dumps(body(shape=["1"])), 400),
        (json.dumps(body(shape=[9], data=["x"] * 9)), 400),
        (json.dumps(body(shape=[10**6], data=["x"])), 400),
        (json.dumps(body(data=[3])), 400),
        (json.dumps(body(data=None)), 400),
        (json.dumps(body(data=[["a"], ["b"]])), 400),
        (json.dumps(body(data=[{"a": 1}])), 400),
        (json.dumps(body(name="other")), 400),
        (json.dumps({"inputs": body()["inputs"] * 2}), 400),
        (json.dumps(body() | {"outputs": [{"name": "nothing"}]}), 400),
        (json.dumps(body() | {"outputs": [{"name": "tokens"}] * 2}), 400),
        (json.dumps(body() | {"parameters": {"datatype": "FP16"}}), 400),
        (json.dumps(body() | {"parameters": {"datatype": ["FP16"]}}), 400),
        (json.dumps(body() | {"parameters": {"clip_skip": True}}), 400),
        (json.dumps(body(parameters={"binary_data_size": 7}, data=None)), 400),
        (json.dumps(body(parameters={"binary_data_size": 7})), 400),
        (json.dumps(body(data=["\ud800"])), 400),
        (b'{"inputs":[{"name":"prompt","shape":[1],"datatype":"BYTES","data":["\xff"]}]}', 400),
        (b"x" * (2**16 + 1), 413),
    ],
)  # fmt: skip
def test_bad_requests(http, content, status):
    response = http.post(INFER, content=content)
    assert response.status_code == status, response.text
    assert response.json()["error"]


def test_bad_binary_requests(http):
    good, end = oip.write_request(["a robot"])
    for content, length in (
        (good, str(end - 1)),
        (good, str(len(good) + 1)),
        (good, "-1"),
        (good, "٣"),
        (good, "9" * 40),
        (good + b"x", str(end)),
        (good[:-1], str(end)),
        (good.replace(b"\x07\x00\x00\x00", b"\xff\xff\xff\xff"), str(end)),
    ):
        headers = [(b"Inference-Header-Content-Length", length.encode())]
        response = http.post(INFER, content=content, headers=headers)
        assert response.status_code == 400, (length, response.text)
    assert http.post(INFER, content=good, headers={oip.JSON_LENGTH: str(end)}).status_code == 200
    squeezed = http.post(INFER, content=b"x", headers={"content-encoding": "gzip"})
    assert squeezed.status_code == 415


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v2/models/other", 404),
        ("GET", "/v2/models/text/versions/1", 404),
        ("POST", "/v2/models/other/infer", 404),
        ("GET", INFER, 405),
        ("GET", "/v2/models/text?model_version=0", 200),
        ("POST", "/v2/repository/models/text/unload", 404),
        ("POST", "/v1/models/text:predict", 404),
        ("GET", "/openapi.json", 404),
        ("GET", "/docs", 404),
        ("GET", "/v2%00", 404),
    ],
)
def test_closed_paths(http, method, path, status):
    json_ = body() if method == "POST" else None
    response = http.request(method, path, json=json_)
    assert response.status_code == status
    assert status == 200 or response.json()["error"]
    assert http.get("/v2/models/text/ready").status_code == 200


def test_slow_clients_are_dropped(sdxl):
    with serving.running(sdxl, header_timeout=0.3, body_timeout=0.3) as found:
        for start in (b"POST /v2/models/text/infer HTTP/1.1\r\nX-A: b\r\n", b""):
            with socket.create_connection(("127.0.0.1", found.port)) as sock:
                sock.settimeout(20)
                began = time.monotonic()
                sock.sendall(start)
                assert sock.recv(100).startswith(b"HTTP/1.1 408")
                assert time.monotonic() - began < 10
        with socket.create_connection(("127.0.0.1", found.port)) as sock:
            sock.settimeout(20)
            sock.sendall(
                b"POST /v2/models/text/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{"
            )
            assert sock.recv(100).startswith(b"HTTP/1.1 408")
        assert httpx.get(f"{found.url}/v2/health/ready").status_code == 200


REST = b"POST %b HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" % INFER.encode()
WHOLE = json.dumps(body(data=["held"])).encode()
HELD = b"POST %b HTTP/1.1\r\nContent-Length: %d\r\n\r\n%b" % (INFER.encode(), len(WHOLE), WHOLE)


@pytest.mark.parametrize(
    ("start", "rest"),
    [
        (b"GET / HTTP/1.1\r\n", b"X-A: " + b"b" * 4000 + b"\r\n"),
        (b"GET / HTTP/1.1\r\n", b"a:\r\n" * 999),
        (b"GET / HTTP/1.1\r\nX-A: ", b"b" * 4000),
        (b"GET /", b"b" * 4000),
        (REST + b"0\r\n", b"X-A: " + b"b" * 4000 + b"\r\n"),
        (REST + b"0\r\nX-A: ", b"b" * 4000),
        (HELD + b"GET / HTTP/1.1\r\n", b"X-A: " + b"b" * 4000 + b"\r\n"),
        (HELD + b"GET / HTTP/1.1\r\nX-A: ", b"b" * 4000),
    ],
    ids=["headers", "short", "header", "path", "trailers", "trailer", "next", "held"],
)
def test_headers_have_an_end(patient, start, rest):
    with socket.create_connection(("127.0.0.1", patient.port), timeout=20) as sock:
        sock.sendall(start)
        try:
            # More than the kernel keeps for a server that does not read.
            for _ in range(2**25 // len(rest)):
                sock.sendall(rest)
        except ConnectionError:
            pass
        else:
            pytest.fail("headers without end were read")
    assert httpx.get(f"{patient.url}/v2/health/ready").status_code == 200


def test_requests_sent_ahead_share_the_limit_of_headers(patient):
    with socket.create_connection(("127.0.0.1", patient.port), timeout=20) as sock:
        sock.sendall(HELD + (b"GET / HTTP/1.1\r\nX-A: " + b"b" * 40_000 + b"\r\n\r\n") * 3)
        with contextlib.suppress(ConnectionError):
            assert sock.recv(99) == b"", "the connection is kept"


@pytest.fixture(scope="module")
def patient(sdxl):
    """Serve one that gives up on nobody, and does not answer HELD in time."""
    times = {"header_timeout": 60, "body_timeout": 60, "batch_wait": 5.0}
    with serving.running(sdxl, max_connections=3, max_batch=9, **times) as found:
        yield found


@pytest.mark.parametrize(
    "start",
    [
        b"GET /v2/health/live HTTP/1.1\r\nContent-Length: 1000000\r\n\r\n" + b"x" * 999_999,
        b"GET /metrics HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"POST %b HTTP/1.1\r\nContent-Length: 99\r\n\r\n{" % INFER.encode(),
        b"POST %b HTTP/1.1\r\n" % INFER.encode(),
        b"",
    ],
    ids=["probes", "chunks", "bodies", "headers", "silent"],
)
def test_those_that_take_long_make_room_for_probes(patient, start):
    with ExitStack() as held:
        for _ in range(9):
            sock = held.enter_context(socket.create_connection(("127.0.0.1", patient.port)))
            sock.settimeout(20)
            with contextlib.suppress(ConnectionError):
                sock.sendall(start)
        for _ in range(3):
            assert httpx.get(f"{patient.url}/v2/health/ready").status_code == 200


def test_probes_have_no_body(http):
    for path in ("/v2/health/live", "/metrics", "/v2"):
        assert http.request("GET", path, content=b"x").status_code == 413
        assert http.request("GET", path, content=iter([b"x"])).status_code == 413
        assert http.request("GET", path, content=b"").status_code == 200


def test_tokens_are_asked_for_and_rotated(sdxl, tmp_path, capfd):
    file = tmp_path / "tokens"
    old = access.new_token(file, "app")
    assert old not in file.read_text()
    with serving.running(sdxl, grpc=True, tokens=file, level="info") as found:
        with httpx.Client(base_url=found.url) as client:

            def ask(token):
                headers = {"authorization": f"Bearer {token}"} if token else {}
                return client.post(INFER, json=body(data=["top secret"]), headers=headers)

            assert ask(None).status_code == 401
            assert ask("wrong").status_code == 401
            assert ask(None).headers["www-authenticate"] == "Bearer"
            assert ask(old).status_code == 200
            new = access.new_token(file, "app")
            assert ask(old).status_code == ask(new).status_code == 200
            file.write_text("".join(file.read_text().splitlines(keepends=True)[1:]))
            assert (ask(old).status_code, ask(new).status_code) == (401, 200)
            file.write_text("broken")
            assert ask(new).status_code == 200, "the tokens read before stay in force"
            assert client.get("/v2/health/ready").status_code == 200
            path = "/v2/models/text/embeddings?prompt=a"
            assert client.get(path).status_code == 401
            kept = client.get(path, headers={"authorization": f"Bearer {new}"})
            assert kept.headers["cache-control"].startswith("private")
        with grpc.insecure_channel(found.grpc) as channel:
            stub = pb_grpc.GRPCInferenceServiceStub(channel)
            asked = pb.ModelInferRequest(model_name="text", raw_input_contents=[b"\1\0\0\0x"])
            asked.inputs.add(name="prompt", datatype="BYTES", shape=[1])
            with pytest.raises(grpc.RpcError) as e:
                stub.ModelInfer(asked)
            assert e.value.code() is grpc.StatusCode.UNAUTHENTICATED
            assert stub.ServerReady(pb.ServerReadyRequest()).ready
            metadata = [("authorization", f"Bearer {new}")]
            assert stub.ModelInfer(asked, metadata=metadata).raw_output_contents
        told = httpx.get(f"{found.url}/metrics").text
        for status in ("OK", "UNAUTHENTICATED"):
            assert f'requests_total{{route="grpc-ModelInfer",status="{status}"}} ' in told
    logged = capfd.readouterr().err
    lines = [json.loads(line) for line in logged.splitlines() if line.startswith("{")]
    assert {"ready", "request", "draining", "stopped"} <= {line["event"] for line in lines}
    assert {line["client"] for line in lines if line["event"] == "request"} == {"-", "app"}
    assert "secret" not in logged and new not in logged


def certificate(folder):
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    found = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName(
                [x509.DNSName("localhost"), x509.IPAddress(ip_address("127.0.0.1"))]
            ),
            critical=False,
        )
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    (folder / "cert.pem").write_bytes(found.public_bytes(pem))
    (folder / "key.pem").write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return folder / "cert.pem", folder / "key.pem"


def test_tls(sdxl, tmp_path, wanted):
    cert, key = certificate(tmp_path)
    with serving.running(sdxl, grpc=True, tls_cert=cert, tls_key=key) as found:
        with TextClient(found.url, verify=str(cert), token="t", datatype="FP32") as client:
            rows = client.encode(PROMPTS)
        same([r.prompt_embeds for r in rows], [r.pooled for r in rows], wanted, 2e-6)
        with (
            TextClient(found.url, deadline=2) as client,
            pytest.raises(TextServerError, match="certificate"),
        ):
            client.encode(PROMPTS)
        with pytest.raises(httpx.TransportError):
            httpx.get(found.url.replace("https", "http"))
        credentials = grpc.ssl_channel_credentials(cert.read_bytes())
        with grpc.secure_channel(found.grpc, credentials) as channel:
            stub = pb_grpc.GRPCInferenceServiceStub(channel)
            assert stub.ServerReady(pb.ServerReadyRequest(), timeout=30).ready


def test_tls_handshakes_have_a_time(sdxl, tmp_path, monkeypatch):
    cert, key = certificate(tmp_path)
    monkeypatch.setattr(Settings, "header_timeout", 0.5)
    with (
        serving.running(sdxl, tls_cert=cert, tls_key=key) as found,
        socket.create_connection(("127.0.0.1", found.port), timeout=20) as sock,
        contextlib.suppress(ConnectionError),
    ):
        assert sock.recv(9) == b"", "the connection is kept"


def test_open_files_are_as_many_as_the_system_lets():
    told = (
        "import resource as r; r.setrlimit(r.RLIMIT_NOFILE, (99, 300));"
        "from handheld_export.serve.run import _raise_file_limit; _raise_file_limit();"
        "print(r.getrlimit(r.RLIMIT_NOFILE))"
    )
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True)
    assert done.stdout == "(300, 300)\n"


def test_rates_queue_and_time(sdxl):
    with (
        serving.running(sdxl, rate=0.001, burst=3) as found,
        httpx.Client(base_url=found.url) as client,
    ):
        codes = [client.post(INFER, json=body()).status_code for _ in range(4)]
        assert codes == [200, 200, 200, 429]
        limited = client.post(INFER, json=body())
        assert int(limited.headers["retry-after"]) >= 1
    with serving.running(sdxl, rate=0.001, burst=2) as found:
        path = f"{found.url}/v2/models/text/embeddings?prompt=a"
        tag = httpx.get(path).headers["etag"]
        codes = [httpx.get(path, headers={"if-none-match": tag}).status_code for _ in range(2)]
        assert codes == [304, 429], "to know a tag is no way around the limit"
    with serving.running(sdxl, timeout=0.0) as found:
        assert httpx.post(f"{found.url}{INFER}", json=body()).status_code == 504
    with serving.running(sdxl, max_queue=1) as found:
        response = httpx.post(f"{found.url}{INFER}", json=body(shape=[2], data=["a", "b"]))
        assert response.status_code == 503 and "retry-after" in response.headers


def test_policies(sdxl):
    with serving.running(sdxl, policy="test_serve_server:policy") as found:
        url = f"{found.url}{INFER}"
        assert httpx.post(url, json=body()).status_code == 200
        refused = httpx.post(url, json=body(data=["a forbidden robot"]))
        assert (refused.status_code, refused.json()["error"]) == (403, "the prompt is refused: no")
        broken = httpx.post(url, json=body(data=["break it"]))
        assert broken.status_code == 500 and "break" not in broken.text


def policy(prompt, client):
    if "who" in prompt:
        return client
    if "break" in prompt:
        raise RuntimeError(prompt)
    return "no" if "forbidden" in prompt else None


def test_answers_too_long_for_json_are_asked_for_in_binary(http, monkeypatch):
    monkeypatch.setattr("handheld_export.serve.model._JSON_VALUES", 10)
    two = body(shape=[2], data=["a", "b"])
    refused = http.post(INFER, json=two)
    assert refused.status_code == 400 and "binary_data_output" in refused.json()["error"]
    assert http.post(INFER, json=body()).status_code == 200
    binary = {"parameters": {"binary_data_output": True}}
    assert http.post(INFER, json=two | binary).status_code == 200
    assert http.post(INFER, json=two | {"outputs": [{"name": "tokens"}]}).status_code == 200
    long = {"name": "prompt_embeds", "parameters": {"binary_data": False}}
    assert http.post(INFER, json=two | binary | {"outputs": [long]}).status_code == 400


def test_clients_that_do_not_read_are_dropped(sdxl, capfd):
    with (
        serving.running(sdxl, send_timeout=0.5, send_buffer=4096) as found,
        socket.socket() as sock,
    ):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", found.port))
        ask = json.dumps(body()).encode()
        head = f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(ask)}\r\n\r\n"
        sock.sendall((head.encode() + ask) * 16)
        connections = found.server.server_state.connections
        give_up = time.monotonic() + 60
        while not connections:
            assert time.monotonic() < give_up
        while connections:
            assert time.monotonic() < give_up, "the connection is kept"
            time.sleep(0.05)
        answer = httpx.post(f"{found.url}{INFER}", json=body())
        assert 16 * len(answer.content) > 2**16, "the buffers hold less than the answers"
    assert "without completing" not in capfd.readouterr().err


def test_requests_sent_far_ahead_are_not_kept(sdxl):
    with (
        serving.running(sdxl) as found,
        socket.create_connection(("127.0.0.1", found.port), timeout=60) as sock,
    ):
        request = b"GET /v2/models HTTP/1.1\r\nHost: x\r\n\r\n"
        sock.sendall(request * 9)
        answers = b""
        while answers.count(b"HTTP/1.1 200") < 9:
            answers += sock.recv(9999)
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            for _ in range(10**4):
                sock.sendall(request * 100)
        assert httpx.get(f"{found.url}/v2/health/ready").status_code == 200


def ask_by_grpc(stub, prompt=b"a robot"):
    tensor = pb.ModelInferRequest.InferInputTensor(name="prompt", datatype="BYTES", shape=[1])
    tensor.contents.bytes_contents.append(prompt)
    request = pb.ModelInferRequest(model_name="text", inputs=[tensor])
    return stub.ModelInfer(request, timeout=60)


def begun(channel, name, release):
    """Return how a call fails that has no message before `release` is set."""
    call = channel.stream_unary(f"/inference.GRPCInferenceService/{name}", lambda x: x)
    with pytest.raises(grpc.RpcError) as caught:
        call((b"" for _ in range(1) if release.wait(60)), timeout=30)
    return caught.value.code(), caught.value.details()


def test_messages_by_grpc_have_a_time(sdxl, tmp_path):
    (tmp_path / "tokens").write_text("")
    release = Event()
    with (
        serving.running(sdxl, grpc=True, body_timeout=0.3, tokens=tmp_path / "tokens") as found,
        grpc.insecure_channel(found.grpc) as channel,
    ):
        try:
            late = (grpc.StatusCode.DEADLINE_EXCEEDED, "the request took too long")
            assert begun(channel, "ServerLive", release) == late
            code, _ = begun(channel, "ModelInfer", release)
            assert code is grpc.StatusCode.UNAUTHENTICATED, "before its message is read"
            code, _ = begun(channel, "RepositoryModelLoad", release)
            assert code is grpc.StatusCode.UNIMPLEMENTED
        finally:
            release.set()
        stub = pb_grpc.GRPCInferenceServiceStub(channel)
        assert stub.ServerReady(pb.ServerReadyRequest(), timeout=30).ready


def test_clients_by_grpc_are_told_apart_by_their_address(sdxl):
    options = {"rate": 0.001, "burst": 2, "policy": "test_serve_server:policy"}
    with (
        serving.running(sdxl, grpc=True, **options) as found,
        grpc.insecure_channel(found.grpc) as channel,
    ):
        stub = pb_grpc.GRPCInferenceServiceStub(channel)
        for prompt, code, said in (
            (b"who is it", grpc.StatusCode.PERMISSION_DENIED, "127.0.0.1"),
            (b"who is it", grpc.StatusCode.PERMISSION_DENIED, "127.0.0.1"),
            (b"a robot", grpc.StatusCode.RESOURCE_EXHAUSTED, "too many prompts"),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                ask_by_grpc(stub, prompt)
            assert caught.value.code() is code and said in caught.value.details()
        for address, status in (("127.0.0.1", 429), ("127.0.0.2", 200)):
            transport = httpx.HTTPTransport(local_address=address)
            with httpx.Client(transport=transport, base_url=found.url) as client:
                assert client.post(INFER, json=body()).status_code == status


def test_names_of_addresses():
    assert _address("ipv4:1.2.3.4:5") == "1.2.3.4"
    assert _address("ipv6:%5B::1%5D:5") == _address("ipv6:[::1]:5") == "::1"
    assert _address("unix:/a:b") == "unix:/a:b"


def test_answers_by_grpc_that_wait_to_be_read_are_bounded(sdxl):
    with serving.running(sdxl, grpc=True) as found, grpc.insecure_channel(found.grpc) as channel:
        size = ask_by_grpc(pb_grpc.GRPCInferenceServiceStub(channel)).ByteSize()
    with (
        serving.running(sdxl, grpc=True, max_unread=size + 99) as found,
        grpc.insecure_channel(found.grpc) as channel,
    ):
        for _ in range(9):
            assert ask_by_grpc(pb_grpc.GRPCInferenceServiceStub(channel)).outputs
    with (
        serving.running(sdxl, grpc=True, max_unread=size - 99) as found,
        grpc.insecure_channel(found.grpc) as channel,
    ):
        stub = pb_grpc.GRPCInferenceServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            ask_by_grpc(stub)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert stub.ServerReady(pb.ServerReadyRequest(), timeout=30).ready


def test_resting_connections_make_room(sdxl):
    with serving.running(sdxl, max_connections=3) as found:
        clients = [httpx.Client(base_url=found.url) for _ in range(9)]
        try:
            for client in clients:
                assert client.post(INFER, json=body()).status_code == 200
                assert httpx.get(f"{found.url}/v2/health/ready").status_code == 200
        finally:
            for client in clients:
                client.close()


def test_rows_do_not_hold_their_batch():
    batch = np.ones((9, 4, 64), np.float32)
    row = PromptEmbedding(batch[1], batch[1, 0])
    for datatype in oip.DATATYPES:
        for tensor in _travelling(row, datatype).values():
            assert tensor.base is None and not np.shares_memory(tensor, batch)


def test_long_prompts_can_be_refused(sdxl):
    with serving.running(sdxl, long_prompts="refuse") as found:
        url = f"{found.url}{INFER}"
        assert httpx.post(url, json=body()).status_code == 200
        refused = httpx.post(url, json=body(data=["many words " * 9]))
        assert refused.status_code == 400 and "tokens" in refused.json()["error"]


def test_the_application_travels_to_workers(sdxl):
    import pickle

    settings = Settings(sdxl, workers=3)
    assert pickle.loads(pickle.dumps(Application(settings))).settings == settings


@pytest.mark.slow
def test_requests_in_flight_are_answered_when_told_to_stop(sdxl):
    # The idle encoder waits for a batch, so these requests are in flight until then.
    with serving.running(sdxl, batch_wait=10.0, max_batch=9) as found:
        codes = []

        def ask(number):
            with httpx.Client(timeout=120) as client:
                url = f"{found.url}{INFER}"
                codes.append(client.post(url, json=body(data=[f"robot {number}"])).status_code)

        threads = [Thread(target=ask, args=(i,)) for i in range(5)]
        for thread in threads:
            thread.start()
        with httpx.Client(base_url=found.url, timeout=60) as client:
            give_up = time.monotonic() + 60
            while "handheld_text_queue 5.0" not in client.get("/metrics").text:
                assert time.monotonic() < give_up
        found.server.should_exit = True
        for thread in threads:
            thread.join(120)
        assert codes == [200] * 5
        with pytest.raises(httpx.TransportError):
            httpx.get(found.url)
