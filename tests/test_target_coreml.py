"""Segments as Core ML packages: the student's codes, near torch by the evaluator.

Not run on hardware: Core ML's own runtime exists on Apple's systems only.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("coremltools")

import torch
from torch import nn

import target_cases
from handheld.errors import TargetError
from handheld_export.coreml import packages
from handheld_export.coreml.mil import Package
from handheld_export.quantization import QuantizedWeight, round_to_nearest
from handheld_export.rewrites import rewrite
from handheld_export.targets.coreml import CoreML
from target_cases import CASES, Tuple, attach, layers_of, quantize, randomize, segment

TARGET = CoreML()


def make(case):
    module, shapes = CASES[case]()
    return segment(randomize(module), shapes)


def mixed(name, layer):
    if isinstance(layer, nn.Conv2d):
        return ("int2",) if name.endswith("conv1") else ("int4",)
    if name.endswith("to_q"):
        return ("int2",)
    if name.endswith("to_k"):
        return ("int4", 32)
    if name.endswith("to_v"):
        return ("int8",)
    return None if name.endswith("proj_in") else ("int4",)


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A segment with every grid, lowered."""
    item = make("resnet and transformer")
    quantize(item, mixed)
    lowered, db = target_cases.run(TARGET, item, tmp_path_factory.mktemp("coreml") / "a.mlpackage")
    return item, lowered, db


def layers(item):
    return packages.compress(rewrite(item.module), TARGET.held)


def test_every_grid_runs_near_the_student(student):
    _, lowered, db = student
    assert db >= 50
    assert lowered.path.name == "Manifest.json"
    assert {p.name for p in lowered.parts} == {"model.mlmodel", "weight.bin"}


def test_weights_are_compressed_in_the_file(student):
    _, lowered, _ = student
    kinds = set(Package(lowered.path.parent).operations)
    assert {"constexpr_lut_to_dense", "constexpr_blockwise_shift_scale"} <= kinds
    weights = sum(m.weight.numel() for m in layers_of(student[0].module).values())
    stored = next(p for p in lowered.parts if p.name == "weight.bin").stat().st_size
    assert stored < weights  # fp16 would be two bytes each


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_float(case, tmp_path):
    _, db = target_cases.run(TARGET, make(case), tmp_path / "a.mlpackage")
    assert db >= 50


def test_reading_back_finds_a_changed_code_and_a_changed_scale(student):
    item, lowered, _ = student
    package = lowered.path.parent
    found = layers(item)
    packages.read_back(package, found)
    for layer in found[:: len(found) // 5]:
        codes = layer.weight.codes.copy()
        codes.flat[7] ^= 1
        for other in (
            replace(layer, weight=replace(layer.weight, codes=codes)),
            replace(layer, weight=replace(layer.weight, scales=layer.weight.scales * 2)),
        ):
            with pytest.raises(TargetError, match=f"'{layer.name}'.*other codes or scales"):
                packages.read_back(package, [other])


def test_a_transposed_palette_is_found(student, tmp_path):
    import shutil

    item, lowered, _ = student
    copy = tmp_path / "b.mlpackage"
    shutil.copytree(lowered.path.parent, copy)
    opened = Package(copy)
    given = (
        o.inputs["indices"].arguments[0].value
        for o in opened._block.operations
        if o.type == "constexpr_lut_to_dense"
    )
    value = next(v for v in given if v.type.tensorType.dataType == 35)
    shape = [int(d.constant.size) for d in value.type.tensorType.dimensions]
    offset, count = int(value.blobFileValue.offset), int(np.prod(shape))
    weights = next(copy.rglob("weight.bin"))
    data = np.fromfile(weights, np.uint8)
    start = int(data[offset + 16 : offset + 24].view("<u8")[0])
    raw = data[start : start + count // 2]
    codes = np.stack([raw & 15, raw >> 4], 1).reshape(shape[0], -1)
    turned = codes.T.reshape(-1, 2)
    data[start : start + count // 2] = turned[:, 0] | (turned[:, 1] << 4)
    data.tofile(weights)
    with pytest.raises(TargetError, match="other codes or scales"):
        packages.read_back(copy, layers(item))


def test_palettes_of_the_student_are_kept(tmp_path):
    layer = nn.Linear(32, 16)
    rng = np.random.default_rng(1)
    book = np.array([-0.75, -0.125, 0.25, 1.5], np.float32)
    codes = rng.integers(0, 4, (16, 32)).astype(np.int8)
    attach(layer, QuantizedWeight.checked("palette", codes, np.ones(16, np.float32), None, book))
    item = segment(nn.Sequential(layer, Tuple()).eval(), [(3, 32)])
    _, db = target_cases.run(TARGET, item, tmp_path / "a.mlpackage")
    assert db >= 60
    ((values, scales),) = Package(tmp_path / "a.mlpackage").compressed()
    assert scales is None
    assert np.array_equal(values, book[codes])


def test_lowering_twice_gives_the_same_bytes(tmp_path):
    item = segment(randomize(nn.Sequential(nn.Linear(64, 32), Tuple())), [(1, 64)])
    quantize(item, lambda *_: ("int4",))
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        TARGET.lower(item, tmp_path / name / "a.mlpackage")
    one, two = (
        {
            p.relative_to(tmp_path / n): p.read_bytes()
            for p in (tmp_path / n).rglob("*")
            if p.is_file()
        }
        for n in ("one", "two")
    )
    assert one == two
    assert len(one) == 3
    assert str(Path.cwd()).encode() not in b"".join(one.values())
    assert json.loads(one[Path("a.mlpackage/Manifest.json")])["rootModelIdentifier"]


def test_grids_that_core_ml_does_not_take_are_refused(tmp_path):
    layer = nn.Linear(64, 32)
    item = segment(randomize(nn.Sequential(layer, Tuple())), [(1, 64)])
    attach(layer, round_to_nearest(layer.weight.detach().numpy(), "int8", 32))
    with pytest.raises(TargetError, match=r"layer '0'.*int8 in groups"):
        TARGET.lower(item, tmp_path / "a.mlpackage")


def test_unknown_operators_are_refused(tmp_path):
    class Bessel(nn.Module):
        def forward(self, x):
            return (torch.special.bessel_j0(x),)

    with pytest.raises(TargetError, match="cannot convert it"):
        TARGET.lower(segment(Bessel(), [(1, 8)]), tmp_path / "a.mlpackage")


def test_versions_and_missing(monkeypatch):
    assert TARGET.missing() is None
    assert next(iter(TARGET.versions())) == "coremltools"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "handheld[coreml]" in str(TARGET.missing())


def test_compute_units(monkeypatch, tmp_path):
    """The way to Core ML itself, with coremltools' model played by the evaluator."""
    import coremltools

    from handheld.errors import UsageError
    from handheld.program import Ports, TensorSpec
    from handheld_export.coreml import packages
    from handheld_export.coreml.mil import Package
    from handheld_export.targets.coreml import CoreML

    with pytest.raises(UsageError, match="macOS only"):
        CoreML().on("ane")
    with pytest.raises(UsageError, match="no compute unit 'npu'"):
        CoreML().on("npu")
    x = torch.randn(1, 4)
    files = packages.convert(torch.nn.Linear(4, 3).eval(), [x], 1, tmp_path / "a.mlpackage")
    opened = []

    class Model:
        def __init__(self, path, compute_units):
            opened.append((path, compute_units))

        def predict(self, given):
            return Package(tmp_path / "a.mlpackage").run(given)

    monkeypatch.setattr("sys.platform", "darwin")
    monkeypatch.setattr(coremltools.models, "MLModel", Model)
    ports = Ports(inputs={"x": TensorSpec(shape=(1, 4))}, outputs={"y": TensorSpec(shape=(1, 3))})
    (found,) = CoreML().on("ane").load(files[0], ports)(x.numpy())
    (wanted,) = CoreML().load(files[0], ports)(x.numpy())
    assert (found == wanted).all()
    assert opened == [(str(tmp_path / "a.mlpackage"), coremltools.ComputeUnit.CPU_AND_NE)]
