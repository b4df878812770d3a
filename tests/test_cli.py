from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import pytest

import fake_harness
import samples
from handheld import cli
from handheld.cli import run
from handheld.records import read

HANDHELD = [sys.executable, "-m", "handheld"]
COMMANDS = [
    "generate", "export", "verify", "bench", "devices", "bundle show", "harness build", "doctor",
    "qnn install", "schema", "report", "compare", "release build", "release verify",
    "release select", "release pack", "release publish", "release update", "release confirm",
    "release revert",
]  # fmt: skip


@pytest.fixture(scope="module")
def fake(tmp_path_factory):
    return fake_harness.install(tmp_path_factory.mktemp("harness") / "fake")


@pytest.fixture(autouse=True)
def environment(tmp_path, monkeypatch, fake):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HANDHELD_HARNESS", str(fake))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("HANDHELD_FAKE", raising=False)
    monkeypatch.delenv("HANDHELD_DEBUG", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def sample(tmp_path):
    return samples.write_bundle(tmp_path / "sample")


def outcome(capsys, *args):
    code = run(args)
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return code, captured.out, captured.err


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from handheld.cli import run; run(['--help']);"
        "print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = set(done.stderr.split())
    assert not {"torch", "numpy", "pydantic", "rich", "handheld_export"} & modules
    for name in ("generate", "export", "verify", "bench", "devices", "bundle", "harness"):
        assert f"\n  {name} " in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_examples_and_json(capsys, command):
    code, out, _ = outcome(capsys, *command.split(), "--help")
    assert code == 0
    assert f"\n  handheld {command}" in out
    assert "--json" in out


def test_version(capsys):
    assert outcome(capsys, "--version") == (0, "handheld 0.1.0\n", "")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["frobnicate"], "No such command 'frobnicate'"),
        (["bench"], "Missing argument"),
        (["bench", "x", "--iterations", "0"], "greater than or equal to 1"),
        (["bench", "x", "--residency", "sometimes"], "'sometimes' is not a residency"),
        (["bench", "missing"], "missing: no such bundle"),
        (["bench", "sample", "--device", "phone"], "there is no device 'phone'"),
        (["bundle", "show", "missing"], "missing: no such bundle"),
        (["schema", "x"], "there is no schema 'x'"),
        (["--frobnicate"], "No such option"),
        (["generate", "sample", "x"], "Missing option"),
        (["generate", "sample", "x", "-o", "x.jpg"], "pictures are PNG files"),
        (["generate", "nobody", "x", "-o", "x.png"], "no bundle, checkpoint or model 'nobody'"),
        (["generate", "sample", "x", "-o", "x.png", "--negative", "y"], "without guidance"),
        (["generate", "sample", "x", "-o", "x.png", "--size", "1x1"], "has no size '1x1'"),
        (["generate", "sample", "unknown", "-o", "x.png"], "holds no embeddings"),
        (["generate", "sample", "x", "-o", "x.png", "--text-url", "y"], "not the URL of a server"),
    ],
)
def test_bad_usage(capsys, sample, args, message):
    code, out, err = outcome(capsys, *args)
    assert (code, out) == (2, "")
    assert "error: " in err
    assert message in err
    code, out, err = outcome(capsys, *args, "--json")
    assert (code, err) == (2, "")
    error = json.loads(out)["error"]
    assert set(error) == {"code", "message", "path", "field", "remedy"}


def test_bundle_show(capsys, sample):
    code, out, _ = outcome(capsys, "bundle", "show", "sample", "--artifacts")
    assert code == 0
    assert "one-step" in out
    assert "unet.0" in out
    code, out, _ = outcome(capsys, "bundle", "show", "sample", "--json")
    facts = json.loads(out)
    assert facts["sha256"] == sample.sha256
    assert facts["sizes"]["16x8"]["activation_bytes"] == 4748
    assert facts["prompts"] == [samples.PROMPT]


def test_names_cannot_command_a_terminal(capsys):
    code, _, err = outcome(capsys, "bundle", "show", "x\x1b]0;mine\x07\u202e")
    assert code == 2
    assert r"x\x1b]0;mine\x07\u202e" in err and "\x1b" not in err and "\x07" not in err


def test_broken_bundle(capsys, sample):
    (sample.path / "artifacts/unet.0.tflite").write_bytes(b"x")
    code, _, err = outcome(capsys, "bundle", "show", "sample")
    assert code == 2
    assert "artifacts/unet.0.tflite: artifacts[0].file.bytes: has 1 bytes" in err


def test_bench(capsys, sample, tmp_path):
    code, out, err = outcome(
        capsys, "bench", "sample", "--residency", "stream,resident", "--iterations", "2",
        "--no-first-ever",
    )  # fmt: skip
    assert code == 0, err
    assert "resident" in out
    assert "stream" in out
    assert "999.0" in out
    assert "records: records.jsonl" in err
    first, second = read(tmp_path / "records.jsonl")
    assert (first.settings.residency, second.settings.residency) == ("resident", "stream")
    assert first.memory.not_counted


def test_rounds_take_turns(capsys, sample, tmp_path):
    code, _, err = outcome(
        capsys, "bench", "sample", "--residency", "stream,resident", "--rounds", "2",
        "--iterations", "1", "--no-first-ever",
    )  # fmt: skip
    assert code == 0, err
    found = [r.settings.residency for r in read(tmp_path / "records.jsonl")]
    assert found == ["resident", "stream", "stream", "resident"]


def test_bench_json(capsys, sample):
    code, out, _ = outcome(capsys, "bench", "sample", "--no-first-ever", "--json")
    assert code == 0
    (record,) = json.loads(out)["records"]
    assert record["summary"]["median_ms"] > 0
    assert record["status"] == "ok"


@pytest.mark.parametrize("as_json", [False, True])
def test_bench_of_a_wrong_picture_fails(capsys, sample, monkeypatch, as_json):
    monkeypatch.setenv("HANDHELD_FAKE", "wrong")
    args = ["bench", "sample", "--no-first-ever", *(["--json"] if as_json else [])]
    code, out, err = outcome(capsys, *args)
    assert code == 1
    if as_json:
        assert json.loads(out)["records"][0]["status"] == "failed"
    else:
        assert "the picture is wrong" in err


def test_devices_and_doctor(capsys):
    code, out, _ = outcome(capsys, "devices", "--json")
    (device,) = json.loads(out)["devices"]
    assert code == 0
    assert device["engines"] == {"litert": "2.3.0"}
    assert "litert 2.3.0" in outcome(capsys, "devices")[1]
    code, out, _ = outcome(capsys, "doctor", "--json")
    report = json.loads(out)
    assert (code == 0) == report["ok"]
    assert all(f["ok"] or f["remedy"] or f["found"] for f in report["findings"])
    assert "cache folder" in outcome(capsys, "doctor")[1]


def test_doctor_without_harness_or_cache(capsys, monkeypatch, tmp_path):
    monkeypatch.delenv("HANDHELD_HARNESS")
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    code, out, _ = outcome(capsys, "doctor", "--json")
    findings = {f["name"]: f for f in json.loads(out)["findings"]}
    assert code == 1
    assert not findings["cache folder"]["ok"]
    assert findings["harness"]["remedy"] == "handheld harness build"


def test_harness_build(capsys):
    code, out, _ = outcome(capsys, "harness", "build", "--json")
    assert code == 0
    assert json.loads(out)["engines"] == {"litert": "2.3.0"}


def test_schema(capsys, tmp_path):
    _, out, _ = outcome(capsys, "schema")
    assert sorted(json.loads(out)) == ["event", "job", "manifest", "record", "release"]
    assert json.loads(outcome(capsys, "schema", "job")[1])["title"] == "handheld job"
    assert outcome(capsys, "schema", "-o", "out")[0] == 0
    assert len(list((tmp_path / "out").iterdir())) == 5


def test_without_the_exporter(capsys, monkeypatch):
    def missing(name):
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    for name in ("export", "verify"):
        monkeypatch.setattr(cli, "_entries", dict)
        code, _, err = outcome(capsys, name, "x")
        assert code == 2
        assert 'pip install "handheld[export]"' in err
    monkeypatch.undo()
    monkeypatch.setattr(cli, "load", missing)
    code, out, _ = outcome(capsys, "export", "x", "--json")
    assert code == 2
    assert json.loads(out)["error"]["code"] == "missing-dependency"


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (OSError(28, "No space left on device", "/x"), 2, "error: /x: the disk is full"),
        (OSError(30, "Read-only file system", "/x"), 2, "error: /x: the file system is read-only"),
        (PermissionError(13, "Permission denied", "/x"), 2, "error: /x: permission denied"),
        (ValueError("odd"), 70, "internal error: ValueError: odd"),
        (MemoryError(), 2, "memory ran out"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_errors_have_no_traceback(capsys, monkeypatch, error, code, message):
    def fail(name):
        raise error

    monkeypatch.setattr(cli, "load", fail)
    found, _, err = outcome(capsys, "devices")
    assert found == code
    if code != 130:
        assert message in err


def test_debug_shows_the_traceback(monkeypatch):
    monkeypatch.setenv("HANDHELD_DEBUG", "1")
    with pytest.raises(Exception, match="no such bundle"):
        run(["bundle", "show", "missing"])


def test_broken_pipe(sample):
    command = f"{sys.executable} -m handheld schema | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert done.stdout.splitlines()[-1] in ("0", "1")


def test_full_disk(sample):
    done = subprocess.run(
        [*HANDHELD, "bench", "sample", "--no-first-ever", "--records", "/dev/full"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "error: /dev/full: cannot write: the disk is full" in done.stderr
    assert "Traceback" not in done.stderr


def in_terminal(args, during=None, environment=None):
    """Run a command in a pseudo-terminal; return its exit code and what it printed."""
    pid, fd = pty.fork()
    if pid == 0:
        os.environ.update(environment or {}, TERM="xterm-256color")
        os.execv(HANDHELD[0], [*HANDHELD, *args])
    output = b""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        ready, _, _ = select.select([fd], [], [], 0.2)
        if ready:
            try:
                chunk = os.read(fd, 65536)
            except OSError:
                break
            if not chunk:
                break
            output += chunk
        if during is not None and during(output.decode(errors="replace"), fd):
            during = None
    else:
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    os.close(fd)
    return os.waitstatus_to_exitcode(status), output.decode(errors="replace")


def plain(text):
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text).replace("\r", "")


def test_in_a_terminal(sample):
    code, out = in_terminal(["bench", "sample", "--no-first-ever", "--iterations", "2"])
    assert code == 0
    assert "memory" in plain(out)
    assert "\x1b[" in out
    assert "sample" in plain(out)
    code, out = in_terminal(["bundle", "show", "missing"])
    assert code == 2
    assert plain(out).strip() == "error: missing: no such bundle (check the path)"


def test_control_c_in_a_terminal(sample, tmp_path):
    def press(output, fd):
        if not list(tmp_path.rglob("hanging")):
            return False
        time.sleep(0.2)
        os.write(fd, b"\x03")
        return True

    code, out = in_terminal(
        ["bench", "sample", "--no-first-ever"], press, {"HANDHELD_FAKE": "hang"}
    )
    assert code == 130
    assert "Traceback" not in out
    (record,) = read(tmp_path / "records.jsonl")
    assert record.status == "partial"
    with pytest.raises(ProcessLookupError):
        os.kill(record.passes[0].hello.pid, signal.SIG_DFL)
