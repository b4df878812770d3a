"""LiteRT on GPUs: every operator on the delegate, weights in float16, arithmetic in half."""

from __future__ import annotations

import os
import subprocess
import sys
from ctypes.util import find_library
from pathlib import Path

import ai_edge_litert.schema_py_generated as schema
import numpy as np
import pytest
import torch
from torch import nn

import target_cases
from handheld.errors import TargetError, UsageError
from handheld.program import Ports
from handheld_export import targets
from handheld_export.litert import runtime, tflite
from handheld_export.measure import snr_db
from handheld_export.quantization import round_to_nearest
from handheld_export.targets.litert_gpu import LiteRTGPU

TARGET = LiteRTGPU("cpu")
DRIVER = Path("/usr/lib/chromium/vk_swiftshader_icd.json")
"""Vulkan in software, which Debian's chromium brings."""
KINDS = ("resnet and transformer", "mid block", "tiny decoder")


@pytest.fixture(scope="module")
def lowered(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    made = {}
    for name in KINDS:
        module, shapes = target_cases.CASES[name]()
        item = target_cases.segment(target_cases.randomize(module), shapes)
        path = folder / f"{name}.tflite"
        with torch.no_grad():
            wanted = [y.numpy() for y in item.module(*item.examples)]
        inputs = {f"in{i}": x.numpy() for i, x in enumerate(item.examples)}
        np.savez(path.with_suffix(".npz"), wanted=wanted[0], **inputs)
        path.with_suffix(".json").write_text(item.ports.model_dump_json())
        made[name] = TARGET.lower(item, path), item, wanted[0]
    return made


def on(target, path):
    """Return the SNR of a lowered segment's result."""
    ports = Ports.model_validate_json(path.with_suffix(".json").read_text())
    values = np.load(path.with_suffix(".npz"))
    (result,) = target.load(path, ports)(*(values[n] for n in ports.inputs))
    return snr_db(values["wanted"], result)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_half_precision(lowered, name):
    done, _, _ = lowered[name]
    assert 45 < on(TARGET, done.path) < 90  # more would be float32


@pytest.mark.slow
def test_weights_are_float16(lowered):
    done, item, _ = lowered["mid block"]
    model = schema.ModelT.InitFromPackedBuf(done.path.read_bytes(), 0)
    stored = {t.name.decode(): t for t in model.subgraphs[0].tensors}
    for name in target_cases.layers_of(item.module):
        assert stored[f"{name}.weight"].type == schema.TensorType.FLOAT16
    weights = sum(m.weight.numel() for m in target_cases.layers_of(item.module).values())
    assert done.path.stat().st_size < 2 * weights + 40_000


@pytest.mark.slow
@pytest.mark.system
@pytest.mark.skipif(
    not DRIVER.is_file() or find_library("vulkan") is None,
    reason="needs Vulkan with chromium's driver (apt: chromium libvulkan1)",
)
def test_webgpu_takes_all(lowered):
    paths = [str(done.path) for done, _, _ in lowered.values()]
    env = {**os.environ, "VK_DRIVER_FILES": str(DRIVER)}
    command = [sys.executable, __file__, *paths]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    device, *figures = done.stdout.splitlines()
    assert "SwiftShader" in device
    assert len(figures) == len(paths)
    assert all(float(x) > 60 for x in figures)


def test_operators_that_gpus_do_not_take(tmp_path):
    model = schema.ModelT.InitFromPackedBuf(runtime._sum(), 0)
    model.operatorCodes[0].builtinCode = schema.BuiltinOperator.BROADCAST_TO
    model.operatorCodes[0].deprecatedBuiltinCode = 127
    path = tmp_path / "a.tflite"
    path.write_bytes(tflite.packed(model))
    with pytest.raises(TargetError, match="GPU delegate does not take BROADCAST_TO"):
        runtime.check_gpu(path)
    path.write_bytes(runtime._sum())
    runtime.check_gpu(path)


def test_more_dimensions_than_gpus_take(tmp_path):
    model = schema.ModelT.InitFromPackedBuf(runtime._sum(), 0)
    for tensor in model.subgraphs[0].tensors:
        tensor.shape = [1, 2, 2, 2, 2]
    path = tmp_path / "a.tflite"
    path.write_bytes(tflite.packed(model))
    with pytest.raises(TargetError, match="does not take 5 dimensions"):
        runtime.check_gpu(path)


def test_codes_become_float16():
    layer = nn.Linear(64, 8)
    target_cases.attach(layer, round_to_nearest(layer.weight.detach().numpy(), "int4", None))
    opened = tflite.Open(nn.Sequential(layer), 1)
    assert TARGET.stored(opened.layers[0]).bits == 16


def test_units(monkeypatch):
    monkeypatch.setattr(runtime, "gpu", lambda: None)
    target = targets.find("litert-gpu")
    assert "on the CPU in half precision" in target.caveat()
    assert target.options == {"accelerator": "gpu"}
    with pytest.raises(UsageError, match="no Vulkan driver"):
        target.on("gpu")
    with pytest.raises(UsageError, match="no compute unit 'ane'"):
        target.on("ane")
    monkeypatch.setattr(runtime, "gpu", lambda: "Adreno")
    assert "'Adreno'" in target.caveat()
    assert "on the CPU" in target.on("cpu").caveat()


if __name__ == "__main__":
    target = LiteRTGPU().on("gpu")
    sys.stdout.write(f"{runtime.gpu()}\n")
    for name in sys.argv[1:]:
        sys.stdout.write(f"{on(target, Path(name)):.1f}\n")
