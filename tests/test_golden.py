from __future__ import annotations

import hashlib
import json
import runpy
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError
from safetensors.numpy import load_file

from handheld import harness, noise
from handheld.bundle import Bundle
from handheld.errors import BundleError, MissingDependencyError
from handheld.execute import execute
from handheld.program import Program, check
from handheld.protocol import AnyEvent, Job

GOLDEN = Path(__file__).parent / "golden"
INDEX = json.loads((GOLDEN / "index.json").read_text())


def cases(kind):
    return [pytest.param(case, id=Path(case["file"]).stem) for case in INDEX[kind]]


def test_files_are_current():
    wanted = runpy.run_path(str(GOLDEN / "make.py"))["files"]()
    for path, data in wanted.items():
        assert (GOLDEN / path).read_bytes() == data, f"{path}: run tests/golden/make.py"
    have = {p.relative_to(GOLDEN).as_posix() for p in GOLDEN.rglob("*") if p.is_file()}
    # Releases are kept as they were made, by make_releases.py; tests/test_release_folder.py reads
    # them.
    others = ("releases/", "selection/", "__pycache__/")
    extra = {p for p in have - set(wanted) if not p.startswith(others)}
    assert extra == {"README.md", "make.py", "make_releases.py"}


@pytest.mark.parametrize("kind", ["bundle", "packages"])
def test_the_bundles(kind):
    case = INDEX[kind]
    assert Bundle.open(GOLDEN / case["folder"]).sha256 == case["sha256"]


def test_what_the_engine_of_a_package_sees_and_answers_draws_the_reference():
    case = INDEX["packages"]
    bundle = Bundle.open(GOLDEN / case["folder"])
    (artifact,) = bundle.manifest.artifacts
    assert all(ref.path.startswith(f"{case['package']}/") for ref in artifact.files)
    features, reference = load_file(GOLDEN / case["features"]), bundle.reference()
    names = {f"in{i}" for i in range(len(artifact.ports.inputs))}
    assert set(features) == names | {"out0"}

    def call(name, args):
        assert name == artifact.id
        for i, port in enumerate(artifact.ports.inputs):
            assert args[port].tobytes() == features[f"in{i}"].tobytes()
        return {port: features[f"out{i}"] for i, port in enumerate(artifact.ports.outputs)}

    program = bundle.size()[1].program
    inputs = {k.removeprefix("input."): v for k, v in reference.items() if k.startswith("input.")}
    drawn = execute(program, bundle.constants(), inputs, call, seed=case["seed"])
    assert drawn["picture"].tobytes() == reference["picture"].tobytes()
    assert reference["call.0.y"].tobytes() == features["out0"].tobytes()


@pytest.mark.parametrize("case", cases("manifests") + cases("sizes_manifests"))
def test_manifests(case, tmp_path):
    folder = tmp_path / "bundle"
    shutil.copytree(GOLDEN / "bundle", folder)
    shutil.copy(GOLDEN / case["file"], folder / "manifest.json")
    if case["valid"]:
        Bundle.open(folder)
        return
    with pytest.raises(BundleError) as e:
        Bundle.open(folder)
    if case["field"]:
        assert e.value.field == case["field"], str(e.value)


@pytest.mark.parametrize(("kind", "model"), [("jobs", Job), ("events", AnyEvent)])
def test_jobs_and_events(kind, model):
    adapter = TypeAdapter(model)
    for case in INDEX[kind]:
        data = (GOLDEN / case["file"]).read_bytes()
        if case["valid"]:
            value = adapter.validate_json(data, strict=True)
            again = json.loads(adapter.dump_json(value))
            # Written in full, it says what the file says, but for what only newer ones know.
            given = {k: v for k, v in json.loads(data).items() if k != "mood"}
            assert given.items() <= again.items()
        else:
            with pytest.raises(ValidationError):
                adapter.validate_json(data, strict=True)


@pytest.mark.parametrize("case", [*cases("programs"), *cases("half_programs")])
def test_programs(case):
    program = Program.model_validate_json((GOLDEN / case["file"]).read_bytes(), strict=True)
    tensors = load_file(GOLDEN / case["tensors"])

    def part(kind):
        return {k.removeprefix(kind): v for k, v in tensors.items() if k.startswith(kind)}

    results = execute(program, part("constant."), part("input."), None, seed=case["seed"])
    wanted = part("output.")
    assert set(results) == set(wanted)
    for role, value in wanted.items():
        assert np.ascontiguousarray(results[role]).tobytes() == value.tobytes()
    assert check(program, {}, {k: _spec(v) for k, v in part("constant.").items()}) is None


def _spec(value):
    from handheld.program import TensorSpec

    return TensorSpec(shape=value.shape, dtype=str(value.dtype))


def test_noise():
    for case in json.loads((GOLDEN / INDEX["noise"]).read_text()):
        values = noise.normal(case["seed"], (case["count"],), case["stream"]).astype("<f4")
        assert [f"{v:08x}" for v in values[:8].view("<u4")] == case["first"]
        assert hashlib.sha256(values.tobytes()).hexdigest() == case["sha256"]


@pytest.fixture(scope="module")
def program():
    try:
        return harness.build().program
    except MissingDependencyError as error:
        pytest.skip(str(error))


def native(program, job, tmp_path):
    """Run the real harness on a job's text; return its exit code and its last event."""
    (tmp_path / "job.json").write_bytes(job)
    done = subprocess.run(
        [program, tmp_path / "job.json"], capture_output=True, timeout=60, check=False
    )
    return done.returncode, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", cases("manifests") + cases("sizes_manifests"))
def test_manifests_in_the_harness(program, case, tmp_path):
    folder = tmp_path / "bundle"
    shutil.copytree(GOLDEN / "bundle", folder)
    shutil.copy(GOLDEN / case["file"], folder / "manifest.json")
    job = Job(bundle=str(folder), size="16x8")
    code, last = native(program, job.model_dump_json().encode(), tmp_path)
    assert last["event"] == "error"
    if case["runs"]:
        assert last["code"] in ("engine", "engine-missing", "input"), last
    else:
        assert (code, last["code"]) in ((2, "bundle"), (2, "hash"), (1, "hash")), last


@pytest.mark.parametrize("case", cases("jobs"))
def test_jobs_in_the_harness(program, case, tmp_path):
    code, last = native(program, (GOLDEN / case["file"]).read_bytes(), tmp_path)
    assert code == 2
    assert last["event"] == "error"
    assert last["code"] == ("bundle" if case["valid"] else "job"), last
