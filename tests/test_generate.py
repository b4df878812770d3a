from __future__ import annotations

import hashlib
import json
import os
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from PIL import Image

import samples
import test_text_client
from handheld import generate, models, text
from handheld.cli import run
from handheld.commands import generate as command
from handheld.errors import BundleError, HandheldError, MissingDependencyError, UsageError
from handheld.generate import Picture
from handheld.protocol import Iteration
from handheld.text import PromptEmbedding, oip


@pytest.fixture(autouse=True)
def environment(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("HANDHELD_MODELS", raising=False)
    monkeypatch.delenv("HANDHELD_DEBUG", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def sample(tmp_path):
    return samples.write_bundle(tmp_path / "sample")


class Encoder:
    encoders_sha256 = "1" * 64

    def __init__(self, width=6, pooled=5, value=1.0):
        self.shapes, self.value = (width, pooled), value

    def encode(self, prompts):
        width, pooled = self.shapes
        return [
            PromptEmbedding(
                np.full((samples.TOKENS, width), self.value, np.float32),
                None if pooled is None else np.zeros(pooled, np.float32),
            )
            for _ in prompts
        ]


class Session:
    """Stands in for the native one: answers with the sample's picture."""

    jobs: list = []

    def __init__(self, job, events):
        self.job, self.events, self.inputs = job, events, {}
        Session.jobs.append(self)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def set_input(self, name, value):
        self.inputs[name] = value

    def run(self):
        self.events(Iteration(t_ms=1, index=0, kind="first", total_ms=12.5, engine_ms=1))

    def output(self, role):
        assert role == "picture"
        return samples.picture().ravel()


@pytest.fixture
def session(monkeypatch):
    monkeypatch.setattr("handheld.native.Session", Session)
    monkeypatch.setattr(command, "announce_build", lambda console: None)
    Session.jobs = []
    return Session


# Embeddings


def test_prefetched_prompts_need_no_encoder(sample):
    found = text.embed(sample, samples.PROMPT, None)
    wanted = samples.embeddings()
    assert (found.prompt_embeds == wanted["prompt_embeds"]).all()
    assert (found.pooled == wanted["pooled"]).all()


def test_other_prompts_need_one(sample):
    with pytest.raises(UsageError, match="--text-checkpoint") as e:
        text.embed(sample, "other", None)
    assert samples.PROMPT in e.value.remedy
    assert text.embed(sample, "other", Encoder()).pooled.shape == (5,)


def test_an_encoder_must_be_the_right_one(sample):
    other = Encoder()
    other.encoders_sha256 = "2" * 64
    with pytest.raises(BundleError, match="other text encoders"):
        text.embed(sample, "other", other)
    with pytest.raises(BundleError, match=r"prompt_embeds .* of shape \[4, 7\]"):
        text.embed(sample, "other", Encoder(width=7))
    with pytest.raises(BundleError, match=r"pooled .* missing"):
        text.embed(sample, "other", Encoder(pooled=None))
    with pytest.raises(HandheldError, match="not finite"):
        text.embed(sample, "other", Encoder(value=np.nan))


def test_without_torch(monkeypatch, tmp_path):
    monkeypatch.setattr(text, "entry_points", lambda **_: [])
    with pytest.raises(MissingDependencyError, match=r"handheld\[export\]"):
        text.local_encoder(tmp_path)


# Inputs and pictures


def test_inputs_take_the_programs_shapes(sample):
    embedding = PromptEmbedding(*sample.prefetched(samples.PROMPT))
    program = samples.program()
    inputs = generate.program_inputs(program, embedding, None)
    assert {k: v.shape for k, v in inputs.items()} == {
        "prompt_embeds": (1, 4, 6), "pooled": (1, 5)
    }  # fmt: skip
    guided = program.model_copy(
        update={"inputs": tuple(i.model_copy(update={"negative": True}) for i in program.inputs)}
    )
    assert generate.needs_negative(guided)
    with pytest.raises(UsageError, match="nothing is given"):
        generate.program_inputs(guided, embedding, None)


def test_pictures_say_what_they_are(tmp_path):
    pixels = samples.picture()[0]
    picture = Picture(pixels, "a prömpt", None, 7, "f" * 64, 1.0)
    generate.save(picture, tmp_path / "out.png")
    with Image.open(tmp_path / "out.png") as image:
        assert (np.asarray(image) == pixels).all()
        assert image.text["prompt"] == "a prömpt"
        assert image.text["seed"] == "7"
        assert image.text["bundle"] == "f" * 64
        assert "negative" not in image.text


def test_draws_a_bundle(sample, session, capsys, tmp_path):
    args = ["generate", "sample", samples.PROMPT, "-o", "deep/out.png", "--seed", "5"]
    assert run([*args, "--residency", "stream", "--threads", "3"]) == 0
    (used,) = session.jobs
    assert (used.job.seed, used.job.threads, used.job.residency) == (5, 3, "stream")
    assert (used.inputs["pooled"] == samples.embeddings()["pooled"][None]).all()
    assert Path(used.job.cache).is_dir()
    assert "16x8 in 12 ms" in capsys.readouterr().err
    assert run([*args, "--json", "--no-cache"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["sha256"] == hashlib.sha256(samples.picture().tobytes()).hexdigest()
    assert session.jobs[1].job.cache is None


# Text servers


@pytest.fixture
def text_server():
    """Answers like a text server of the sample's encoders."""
    server = test_text_client.Server()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            content = self.rfile.read(int(self.headers["content-length"]))
            prompts, _ = test_text_client.asked(content, self.headers[oip.JSON_LENGTH])
            answer = server.answer(prompts)
            self.send_response(200)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(answer.content)
            server.requests.append((self.headers["authorization"], content))

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        Thread(target=http.serve_forever, daemon=True).start()
        server.url = f"http://127.0.0.1:{http.server_port}"
        yield server
        http.shutdown()


def test_draws_with_a_text_server(sample, session, text_server, monkeypatch, capsys):
    monkeypatch.setenv("HANDHELD_TEXT_TOKEN", "secret")
    args = ["generate", "sample", "-o", "out.png", "--text-url", text_server.url]
    assert run([*args, samples.PROMPT]) == 0
    assert not text_server.requests, "the bundle holds this prompt"
    assert run([*args, "new"]) == 0
    assert (session.jobs[1].inputs["pooled"] == len("new")).all()
    assert text_server.requests[0][0] == "Bearer secret"
    assert run([*args, "new"]) == 0
    assert len(text_server.requests) == 1, "the second time it is on disk"
    assert run([*args, "a prompt with more tokens"]) == 0
    assert "was cut off: a prompt with more tokens" in capsys.readouterr().err


def test_a_text_server_that_is_away_fails_in_time(sample, session, capsys):
    args = ["generate", "sample", "-o", "out.png", "--text-url", "http://127.0.0.1:9"]
    assert run([*args, samples.PROMPT]) == 0
    began = time.monotonic()
    assert run([*args, "new", "--text-deadline", "0.3"]) == 2
    assert time.monotonic() - began < 5
    error = capsys.readouterr().err
    assert "no answer within 0.3 s" in error and samples.PROMPT in error
    assert run([*args, "new", "--text-deadline", "0.3", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "text-server"
    assert run([*args, "new", "--text-checkpoint", "x"]) == 2
    assert not Path("other.png").exists()


def test_a_text_server_of_other_encoders_is_refused(sample, session, text_server, capsys):
    text_server.sha = "2" * 64
    args = ["generate", "sample", "new", "-o", "new.png", "--text-url", text_server.url]
    assert run(args) == 2
    assert "other text encoders" in capsys.readouterr().err
    assert not Path("new.png").exists()


# Models by name


def checkpoint(folder):
    for part in ("unet", "vae", "text_encoder"):
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text("{}")
    return folder


def test_models_by_name(tmp_path, monkeypatch):
    here = checkpoint(tmp_path / "models/small")
    there = checkpoint(tmp_path / "elsewhere/large")
    checkpoint(tmp_path / "elsewhere/small")
    assert models.checkpoint("small").resolve() == here
    with pytest.raises(UsageError, match="no bundle, checkpoint or model 'large'") as e:
        models.checkpoint("large")
    assert "small" in e.value.remedy
    monkeypatch.setenv("HANDHELD_MODELS", f"{tmp_path}/nowhere{os.pathsep}{tmp_path}/elsewhere")
    assert models.checkpoint("large") == there
    assert models.checkpoint("small").parent == tmp_path / "elsewhere"
    assert models.checkpoint(str(here)) == here
    assert {"large", "small"} <= set(models.names())
    for name in ("", ".", "..", "models/nobody", "../x"):
        with pytest.raises(UsageError):
            models.checkpoint(name)


def test_a_model_is_exported_once(tmp_path, session, monkeypatch, capsys):
    folder = checkpoint(tmp_path / "models/small")
    exports = []

    def export(checkpoint, *, target, precision, output):
        print("a table that must not reach standard output")
        exports.append((checkpoint, target, precision))
        samples.write_bundle(output)

    class Entry:
        @staticmethod
        def load():
            return export

    monkeypatch.setattr(command, "entry_points", lambda **_: [Entry])
    args = ["generate", "small", samples.PROMPT, "-o", "out.png", "--json"]
    for _ in range(2):
        assert run(args) == 0
        captured = capsys.readouterr()
        assert json.loads(captured.out)["width"] == 16
    assert exports == [("models/small", ["litert-cpu"], ["int8"])]
    assert "a table" not in captured.out
    (cached,) = (tmp_path / "cache/handheld/bundles").glob("small-*-litert-cpu-int8")
    (cached / "artifacts/unet.0.tflite").write_bytes(b"x")
    assert run(args) == 0
    os.utime(folder / "unet/config.json", (2**32, 2**32))
    assert run(args) == 0
    assert len(exports) == 3
    assert run(["generate", "models/small", samples.PROMPT, "-o", "out.png"]) == 0
    assert len(exports) == 3, "it is the same model, named by its path"
    other = checkpoint(tmp_path / "elsewhere/small")
    os.utime(other / "unet/config.json", (2**30, 2**30))
    monkeypatch.setenv("HANDHELD_MODELS", str(other.parent))
    assert run(args) == 0
    assert len(exports) == 4, "another model of that name, though older"


def test_a_model_without_the_exporter(tmp_path, monkeypatch, capsys):
    checkpoint(tmp_path / "models/small")
    monkeypatch.setattr(command, "entry_points", lambda **_: [])
    assert run(["generate", "small", "x", "-o", "out.png"]) == 2
    assert 'pip install "handheld[export]"' in capsys.readouterr().err
