"""LiteRT compiled for Hexagon: one binary, its facts, its numbers in QNN's simulation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import target_cases
from handheld import qnn
from handheld.errors import TargetError, UsageError
from handheld_export import targets
from handheld_export.litert import npu, runtime
from handheld_export.quantization import QuantizedWeight, round_to_nearest
from handheld_export.targets.litert_qualcomm import LiteRTQualcomm

needs_qnn = pytest.mark.skipif(
    qnn.missing("litert") is not None, reason=f"needs QNN: {qnn.missing('litert')}"
)


def test_what_is_missing_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("HANDHELD_QNN", str(tmp_path))
    with pytest.raises(TargetError) as caught:
        targets.find("litert-qualcomm:SM8650")
    assert caught.value.remedy == qnn.missing("litert")


def test_socs():
    assert "litert-qualcomm:SM8750" in targets.names()
    with pytest.raises(UsageError, match="not compiled for 'SM1'"):
        targets.find("litert-qualcomm:SM1")
    options = LiteRTQualcomm.for_soc("SM8550").options
    assert options == {"accelerator": "npu", "soc": "SM8550"}


def test_what_is_no_binary(tmp_path):
    path = tmp_path / "a.tflite"
    path.write_bytes(runtime._sum())
    with pytest.raises(TargetError, match="not compiled for an NPU"):
        npu.binary(path)
    path.write_bytes(b"nothing")
    with pytest.raises(TargetError, match="not compiled for an NPU"):
        npu.binary(path)


@needs_qnn
@pytest.mark.slow
def test_compiled_and_run(tmp_path):
    module, shapes = target_cases.CASES["resnet and transformer"]()
    item = target_cases.segment(target_cases.randomize(module), shapes)
    target = targets.find("litert-qualcomm:SM8650")
    lowered, db = target_cases.run(target, item, tmp_path / "a.tflite")
    assert db > 40
    assert lowered.tools["soc"] == "SM8650"
    assert lowered.tools["hexagon"] == "75"
    assert lowered.tools["qnn"] == qnn.find("litert").build
    with pytest.raises(TargetError, match="is compiled for SM8650, not for SM8750"):
        LiteRTQualcomm.for_soc("SM8750").load(lowered.path, item.ports)
    damaged = tmp_path / "damaged.tflite"
    damaged.write_bytes(lowered.path.read_bytes()[:-1000])
    with pytest.raises(TargetError, match="holds no whole context binary"):
        target.load(damaged, item.ports)


def samples(item, count=4):
    generator = torch.Generator().manual_seed(3)
    more = [
        [torch.randn(x.shape, generator=generator) for x in item.examples] for _ in range(count - 1)
    ]
    return [item.examples, *more]


def mixed(name, layer):
    if name.endswith(("conv1", "to_q")):
        return ("int2",)
    if name.endswith(("conv2", "to_v")):
        return ("int4",)
    return None if name.endswith("proj_in") else ("int8",)


@needs_qnn
@pytest.mark.slow
def test_codes_on_calibrated_grids(tmp_path):
    module, shapes = target_cases.CASES["resnet and transformer"]()
    item = target_cases.segment(target_cases.randomize(module), shapes)
    target_cases.quantize(item, mixed)
    for layer in target_cases.layers_of(module).values():
        layer.float_input = True  # 16-bit grids hold what eight bits do not
    item = replace(item, samples=samples(item))
    target = targets.find("litert-qualcomm:SM8650")
    lowered, db = target_cases.run(target, item, tmp_path / "a.tflite")
    assert db > 40
    assert lowered.partitions == 1
    convolutions = {
        grid: sum(
            layer.quantized.codes.size
            for layer in module.modules()
            if isinstance(layer, nn.Conv2d)
            and layer.kernel_size == (3, 3)
            and layer.quantized.grid == grid
        )
        for grid in ("int2", "int4")
    }
    assert lowered.held == {f"{grid} as int8": n for grid, n in convolutions.items()}


@needs_qnn
@pytest.mark.slow
def test_without_samples_codes_are_held_in_fp16(tmp_path):
    module, shapes = target_cases.CASES["convolution"]()
    item = target_cases.segment(target_cases.randomize(module), shapes)
    target_cases.quantize(item, lambda *_: ("int4",))
    target = LiteRTQualcomm.for_soc("SM8750")
    half, _ = target_cases.run(target, item, tmp_path / "a.tflite")
    assert half.held == {"int4 as fp16": 2304}
    item = replace(item, samples=samples(item))
    lowered, db = target_cases.run(target, item, tmp_path / "b.tflite")
    assert db > 40
    assert lowered.tools["hexagon"] == "79"
    assert target.container(item.module.steps[0].quantized) == "int8"
    again = target.lower(item, tmp_path / "c.tflite")
    assert again.path.read_bytes() == lowered.path.read_bytes()


@needs_qnn
@pytest.mark.slow
def test_an_embedding_whose_silu_reads_values_far_below_zero_is_right(tmp_path):
    item = target_cases.far_below_zero()
    lowered, db = target_cases.run(LiteRTQualcomm.for_soc("SM8650"), item, tmp_path / "a.tflite")
    assert db > 55
    assert any("without sigmoid" in note for note in lowered.notes)


@needs_qnn
@pytest.mark.slow
def test_products_of_computed_matrices_keep_16_bits(tmp_path):
    item = target_cases.product()
    _, db = target_cases.run(LiteRTQualcomm.for_soc("SM8650"), item, tmp_path / "a.tflite")
    assert db > 55


@needs_qnn
@pytest.mark.slow
def test_groups_that_spread_differently_are_levelled(tmp_path):
    item = target_cases.unlike_groups()
    lowered, db = target_cases.run(LiteRTQualcomm.for_soc("SM8650"), item, tmp_path / "a.tflite")
    assert db > 38
    assert any("levelled" in note for note in lowered.notes)


@needs_qnn
@pytest.mark.slow
def test_narrow_codes_of_convolutions_lose_nothing_in_sums(tmp_path):
    """Codes of -2 to 1 as they are would have 52 dB."""
    item = target_cases.narrow(nn.Conv2d(64, 64, 3, padding=1), (1, 16, 16, 64))
    _, db = target_cases.run(LiteRTQualcomm.for_soc("SM8650"), item, tmp_path / "a.tflite")
    assert db > 65


@needs_qnn
@pytest.mark.slow
@pytest.mark.parametrize(("outlier", "held"), [(1.0, {}), (200.0, {"int2 as int8": 8192})])
def test_linear_layers_keep_narrow_codes_unless_their_sums_would_drown(outlier, held, tmp_path):
    item = target_cases.drowning(outlier)
    lowered, db = target_cases.run(LiteRTQualcomm.for_soc("SM8650"), item, tmp_path / "a.tflite")
    assert db > 40
    assert lowered.held == held
    assert any("held as int8" in note for note in lowered.notes) == bool(held)


@pytest.mark.parametrize("grid", ["int8", "int4"])
def test_groups_are_refused(grid, tmp_path):
    layer = nn.Linear(32, 16)
    item = target_cases.segment(nn.Sequential(layer, target_cases.Tuple()).eval(), [(1, 32)])
    weight = round_to_nearest(layer.weight.detach().numpy(), grid)
    scales = np.repeat(weight.scales[:, None], 2, 1)
    layer.quantized = QuantizedWeight(grid, weight.codes, scales, 16)
    item = replace(item, samples=samples(item))
    with pytest.raises(TargetError, match=f"layer '0': {grid} in groups does not run on QNN"):
        LiteRTQualcomm.for_soc("SM8650").lower(item, tmp_path / "a.tflite")


@needs_qnn
@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "said"), [("convolution", "0 of 1 .* 0 graphs"), ("resnet", " of .* [1-9] graphs")]
)
def test_operators_outside_are_named(tmp_path, case, said):
    module, shapes = target_cases.CASES[case]()
    item = target_cases.segment(target_cases.randomize(module), shapes)
    target_cases.quantize(item, lambda *_: ("int8", None))
    source = tmp_path / "a.tflite"
    targets.find("litert-cpu").lower(item, source)
    with pytest.raises(TargetError, match=f"{said}; outside: CONV_2D"):
        npu.compile_for(qnn.find("litert"), "SM8650", source, tmp_path / "b.tflite")


@needs_qnn
@pytest.mark.slow
@pytest.mark.parametrize("factor", [0.8, 1.4])
def test_values_somewhat_beyond_calibration_are_not_cut(factor, tmp_path):
    item = target_cases.beyond_calibration(factor)
    _, db = target_cases.run(targets.find("litert-qualcomm:SM8650"), item, tmp_path / "a.tflite")
    assert db > 50
