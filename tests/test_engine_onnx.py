"""The harness's onnxruntime engine."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
from pydantic import TypeAdapter

from handheld import bundle as bundles
from handheld import harness, noise
from handheld.devices import android
from handheld.manifest import Artifact, Manifest, ModelInfo, Size, TextInfo
from handheld.program import Affine, Call, Input, Ports, Program, Term
from handheld.protocol import AnyEvent
from samples import ref, spec

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

EVENT = TypeAdapter(AnyEvent)
H, W, C = 8, 16, 3
WEIGHT = np.random.default_rng(0).standard_normal((C, C)).astype(np.float32)
WEIGHTS = WEIGHT.tobytes()
DATA = hashlib.sha256(WEIGHTS).hexdigest()
"""Exports call the file of weights so."""


def graph(shape=(1, H, W, C)):
    """A product whose weight lies in a file of its own."""
    from onnx import TensorProto, helper

    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=(C, C))
    weight.data_location = TensorProto.EXTERNAL
    for key, value in {"location": DATA, "length": str(4 * C * C)}.items():
        weight.external_data.add(key=key, value=value)
    made = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "a",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [weight],
    )
    return helper.make_model(
        made, opset_imports=[helper.make_opsetid("", 21)], ir_version=10
    ).SerializeToString()


def write(folder, data, weights=WEIGHTS):
    picture = spec(1, H, W, C)
    program = Program(
        inputs=(Input(name="noise", role="noise", stream=0),),
        tensors=dict.fromkeys(("noise", "y", "z"), picture)
        | {"p": spec(1, H, W, C, dtype="uint8")},
        ops=(
            Call(artifact="a", args={"x": "noise"}, results={"y": "y"}),
            Call(artifact="a", args={"x": "y"}, results={"y": "z"}),
            Affine(terms=(Term(x="z", scale=20.0),), bias=128.0, out="p"),
        ),
        outputs={"picture": "p"},
    )
    manifest = Manifest(
        model=ModelInfo(
            id="tiny", checkpoint_sha256="0" * 64, steps=1, sampler="none", guidance=0.0
        ),
        target="onnx",
        precision="fp32",
        sizes={f"{W}x{H}": Size(width=W, height=H, program=program)},
        artifacts=(
            Artifact(
                id="a",
                target="onnx",
                engine="onnx",
                engine_version="1",
                file=ref("artifacts/a.onnx", data),
                parts=(ref(f"artifacts/{DATA}", weights),),
                ports=Ports(inputs={"x": picture}, outputs={"y": picture}),
                units=("a",),
                component="unet",
            ),
        ),
        text=TextInfo(tokens=1, width=1),
    )
    files = {"artifacts/a.onnx": data, f"artifacts/{DATA}": weights}
    written = bundles.write(manifest, files, folder)
    assert written is not None
    return written


def run(tmp_path, bundle, **changes):
    job = tmp_path / "job.json"
    job.write_text(
        json.dumps({"bundle": str(bundle.path), "size": f"{W}x{H}", "seed": 5, **changes})
    )
    result = subprocess.run(
        [harness.build().program, job],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    return [EVENT.validate_json(line) for line in result.stdout.splitlines()]


def test_engine_is_built_in():
    assert harness.engines()["onnx"]


@pytest.mark.parametrize("residency", ["resident", "stream"])
def test_runs(tmp_path, residency):
    bundle = write(tmp_path / "bundle", graph())
    raw = tmp_path / "picture.raw"
    events = run(tmp_path, bundle, residency=residency, output=str(raw))
    assert events[-1].event == "done", events[-1]
    drawn = noise.normal(5, (1, H, W, C), 0) @ WEIGHT @ WEIGHT
    wanted = np.clip(np.rint(drawn * 20 + 128), 0, 255).ravel()
    found = np.frombuffer(raw.read_bytes(), np.uint8)
    assert np.abs(found - wanted).max() <= 1


def test_files_that_lie_flat_by_their_hash_are_found_as_on_phones(tmp_path):
    bundle = write(tmp_path / "bundle", graph())
    flat = tmp_path / "flat"
    (flat / "objects").mkdir(parents=True)
    (flat / "manifest.json").write_text(json.dumps(android.flattened(bundle)))
    for file in (*bundle.manifest.artifacts[0].files, bundle.manifest.constants):
        if file is not None:
            shutil.copy(bundle.file(file), flat / "objects" / file.sha256)
    raw = [tmp_path / "a.raw", tmp_path / "b.raw"]
    for folder, output in zip((bundle.path, flat), raw, strict=True):
        events = run(tmp_path, SimpleNamespace(path=folder), output=str(output))
        assert events[-1].event == "done", events[-1]
    assert raw[0].read_bytes() == raw[1].read_bytes()


def test_refuses_what_the_manifest_does_not_say(tmp_path):
    bundle = write(tmp_path / "bundle", graph((1, H, W + 1, C)))
    error = run(tmp_path, bundle)[-1]
    assert (error.event, error.code) == ("error", "bundle")
    assert "tensor 'x' is not what the manifest says" in error.message


@pytest.mark.parametrize("data", [b"", b"not a graph" * 10])
def test_refuses_what_is_no_graph(tmp_path, data):
    error = run(tmp_path, write(tmp_path / "bundle", data))[-1]
    assert error.event == "error"
    assert error.code in ("engine", "bundle")
    assert "artifact 'a'" in error.message or "artifacts/a.onnx" in error.message


def test_truncated_weights_are_refused(tmp_path):
    error = run(tmp_path, write(tmp_path / "bundle", graph(), WEIGHTS[:-4]))[-1]
    assert (error.event, error.code) == ("error", "engine")
    assert "artifact 'a'" in error.message
