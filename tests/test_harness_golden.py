"""The native harness reads the golden files as the other implementations do."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from handheld import harness
from handheld.errors import MissingDependencyError
from handheld.protocol import Job

GOLDEN = Path(__file__).parent / "golden"
INDEX = json.loads((GOLDEN / "index.json").read_text())


@pytest.fixture(scope="module")
def built():
    try:
        return harness.build()
    except MissingDependencyError as error:
        pytest.skip(str(error))


def error_of(built, job):
    result = subprocess.run(
        [built.program, "-"],
        input=job if isinstance(job, str) else json.dumps(job),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    events = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert events[-1]["event"] == "error"
    return result.returncode, events[-1]["code"], events[-1]["message"]


@pytest.mark.parametrize("case", INDEX["manifests"], ids=lambda c: Path(c["file"]).stem)
def test_manifests(built, case, tmp_path):
    folder = tmp_path / "bundle"
    shutil.copytree(GOLDEN / INDEX["bundle"]["folder"], folder)
    shutil.copy(GOLDEN / case["file"], folder / "manifest.json")
    status, code, message = error_of(built, {"bundle": str(folder), "size": "16x8"})
    # The artifact is none that an engine could open, so the best case is an engine's refusal.
    if case["runs"]:
        assert code.startswith("engine"), message
    else:
        assert status == 2
        assert code in ("bundle", "hash"), message
        assert str(folder / "manifest.json") in message
        # Errors name the field, as far as the languages agree about its last part.
        if case["field"] and ".[" not in case["field"]:
            parent = ".".join(case["field"].split(".")[:-1])
            assert (
                parent.replace(".slice", "").replace(".affine", "").replace(".normalizer", "")
                in message
            )


@pytest.mark.parametrize("case", INDEX["jobs"], ids=lambda c: Path(c["file"]).stem)
def test_jobs(built, case):
    _, code, message = error_of(built, (GOLDEN / case["file"]).read_text())
    assert (code != "job") == case["valid"], message


def test_memory_plans(built):
    for case in json.loads((GOLDEN / "memory_plans.json").read_text()):
        result = subprocess.run(
            [built.program, "--plan-memory"],
            input=json.dumps(case),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        if "plan" in case:
            assert json.loads(result.stdout) == case["plan"]
        else:
            assert result.returncode == 2
            assert case["error"] in json.loads(result.stderr)["message"]


@pytest.mark.parametrize(
    "case", INDEX["programs"] + INDEX["half_programs"], ids=lambda c: Path(c["file"]).stem
)
def test_programs(built, case, tmp_path):
    from handheld.native import Session

    program = json.loads((GOLDEN / case["file"]).read_text())
    tensors = load_file(GOLDEN / case["tensors"])
    folder = tmp_path / "bundle"
    shutil.copytree(GOLDEN / INDEX["bundle"]["folder"], folder)
    manifest = json.loads((folder / "manifest.json").read_text())

    def named(kind):
        return {k.removeprefix(f"{kind}."): v for k, v in tensors.items() if k.startswith(kind)}

    manifest["schema_version"] = 2 if case in INDEX["half_programs"] else 1
    manifest["sizes"]["16x8"]["program"] = program
    constants = named("constant")
    manifest["constant_specs"] = {
        k: {"shape": v.shape, "dtype": v.dtype.name} for k, v in constants.items()
    }
    manifest["constants"] = None
    if constants:
        path = folder / "constants.safetensors"
        save_file(constants, path)
        data = path.read_bytes()
        manifest["constants"] = {
            "path": path.name,
            "sha256": hashlib.sha256(data).hexdigest(),
            "bytes": len(data),
        }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    job = Job(bundle=str(folder), size="16x8", seed=case["seed"])
    with Session(job, library=built.library) as session:
        for name, value in named("input").items():
            session.set_input(name, value)
        session.run()
        for role, want in named("output").items():
            have = session.output(role, want.shape, want.dtype)
            assert have.tobytes() == want.tobytes(), role


def test_noise(built):
    from handheld import native

    for case in json.loads((GOLDEN / INDEX["noise"]).read_text()):
        have = native.normal(case["seed"], (case["count"],), case["stream"])
        assert [f"{w:08x}" for w in have[:8].view(np.uint32)] == case["first"]
        assert hashlib.sha256(have.astype("<f4").tobytes()).hexdigest() == case["sha256"]
