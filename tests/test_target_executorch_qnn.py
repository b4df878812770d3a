"""Segments for Qualcomm's NPU: the student's codes, run in QNN's simulation near torch.

Not run on hardware.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("executorch")

import torch
from torch import nn

import target_cases
from handheld import qnn
from handheld.errors import TargetError, UsageError
from handheld_export import targets
from handheld_export.qnn.hexagon import facts
from handheld_export.qnn.process import Process
from handheld_export.quantization import QuantizedWeight, round_to_nearest
from handheld_export.targets.executorch_qnn import ExecuTorchQNN
from target_cases import CASES, Tuple, attach, quantize, randomize, segment

here = pytest.mark.skipif(
    qnn.missing("executorch") is not None, reason=str(qnn.missing("executorch"))
)


@pytest.fixture(scope="module")
def target():
    return ExecuTorchQNN.for_soc("SM8650")


def make(case):
    module, shapes = CASES[case]()
    return segment(randomize(module), shapes)


def mixed(name, layer):
    if isinstance(layer, nn.Conv2d):
        return ("int2",) if name.endswith("conv1") else ("int4",)
    if name.endswith("to_q"):
        return ("int2",)
    if name.endswith("to_v"):
        return ("int8",)
    return None if name.endswith("proj_in") else ("int4",)


def test_names():
    names = targets.names()
    assert {"executorch-qnn:SM8550", "executorch-qnn:SM8650", "executorch-qnn:SM8750"} <= {*names}
    assert "executorch-qnn" not in names
    ours = [n for n in targets.one_each() if n.startswith("executorch-qnn")]
    assert ours == ["executorch-qnn:SM8650"]
    for name in ("executorch-qnn:SM1", "executorch-qnn"):
        with pytest.raises(UsageError, match="not compiled for") as e:
            targets.find(name)
        assert "executorch-qnn:SM8750" in e.value.remedy
    with pytest.raises(UsageError, match=r"'litert-cpu' is not compiled for 'SM8650'.*litert-cpu"):
        targets.find("litert-cpu:SM8650")


def test_missing_libraries_are_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("HANDHELD_QNN", str(tmp_path))
    monkeypatch.setattr("platform.system", lambda: "Linux")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    with pytest.raises(TargetError, match="lacks its tools") as e:
        targets.find("executorch-qnn:SM8650")
    assert e.value.remedy == "handheld qnn install --for executorch"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "handheld[qnn]" in str(ExecuTorchQNN().missing())


def blocks(layer, size):
    """Give scales to blocks of inputs, which convolutions of a student cannot have."""
    weight = round_to_nearest(layer.weight.detach().numpy(), "int4")
    scales = np.repeat(weight.scales[:, None], layer.weight.shape[1] // size, 1)
    layer.quantized = QuantizedWeight("int4", weight.codes, scales, size)


@pytest.mark.parametrize("kind", ["convolution", "linear"])
def test_planted_blockwise_scales_are_refused(kind, target, tmp_path):
    """Blockwise 3x3 convolutions come out wrong on QNN without a word."""
    layer = nn.Conv2d(32, 16, 3) if kind == "convolution" else nn.Linear(32, 16)
    shape = (1, 32, 16, 16) if kind == "convolution" else (1, 32)
    item = segment(nn.Sequential(layer, Tuple()).eval(), [shape])
    blocks(layer, 16)
    with pytest.raises(TargetError, match="layer '0': int4 in groups does not run on QNN"):
        target.lower(item, tmp_path / "a.pte")


def test_palettes_are_refused(target, tmp_path):
    layer = nn.Linear(32, 16)
    codes = np.zeros((16, 32), np.int8)
    book = np.array([0.5, 1], np.float32)
    attach(layer, QuantizedWeight.checked("palette", codes, np.ones(16, np.float32), None, book))
    with pytest.raises(TargetError, match="layer '0': palettes do not run on QNN"):
        target.lower(segment(nn.Sequential(layer, Tuple()).eval(), [(1, 32)]), tmp_path / "a.pte")


def test_other_files_are_refused(target, tmp_path):
    path = tmp_path / "a.pte"
    path.write_bytes(b"ET12" * 100)
    with pytest.raises(TargetError, match="no context binary of QNN"):
        target.load(path, None)
    path.write_bytes(b"..soc_type=SM8750;arch=79;..v2.49.40.260810104044.")
    assert facts(path.read_bytes(), path) == {
        "soc": "SM8750",
        "hexagon": "79",
        "qnn": "2.49.40.260810104044",
    }
    with pytest.raises(TargetError, match="compiled for SM8750, not for SM8650"):
        target.load(path, None)


class Here(qnn.Sdk):
    def environment(self):
        import os

        return dict(os.environ)


def test_a_process_that_ends_is_told(tmp_path):
    process = Process(Here(tmp_path, None, ""))
    with pytest.raises(TargetError, match="'explode'"):
        process({"do": "explode"})
    process._child.kill()
    with pytest.raises(TargetError, match="QNN ended with code -9"):
        process({"do": "explode"})
    process.drop(0)
    with pytest.raises(TargetError, match="'explode'"):  # it is started again
        process({"do": "explode"})


def test_codes_that_do_not_arrive_are_found():
    from torchao.quantization.pt2e import MinMaxObserver
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import (
        QuantizationAnnotation,
        QuantizationSpec,
        Quantizer,
    )

    from handheld_export.qnn.executorch import _ANNOTATION, _WEIGHTED, _Weights

    class Plain(Quantizer):
        def annotate(self, model):
            for node in model.graph.nodes:
                if node.target in _WEIGHTED:
                    spec = QuantizationSpec(
                        torch.uint8, MinMaxObserver, 0, 255, torch.per_tensor_affine
                    )
                    node.meta[_ANNOTATION] = QuantizationAnnotation({node.args[0]: spec})
            weights.annotate(model)
            return model

        def validate(self, model):
            pass

    layer = nn.Linear(32, 16)
    attach(layer, round_to_nearest(layer.weight.detach().numpy(), "int4"))
    stored = {
        "0.codes": torch.from_numpy(layer.quantized.codes),
        "0.scales": torch.from_numpy(layer.quantized.scales),
        "0.bits": torch.tensor(4),
    }
    weights = _Weights(stored)
    x = torch.randn(2, 32)
    prepared = prepare_pt2e(torch.export.export(nn.Sequential(layer), (x,)).module(), Plain())
    prepared(x)
    graph = convert_pt2e(prepared)
    weights.check(graph)
    stored["0.codes"] = stored["0.codes"].clone()
    stored["0.codes"][3, 4] += 1
    with pytest.raises(TargetError, match="layer '0': the graph holds other codes or scales"):
        weights.check(graph)
    weights = _Weights({k.replace("0.", "1."): v for k, v in stored.items()})
    with pytest.raises(TargetError, match="layer '1'"):
        weights.check(graph)


@here
@pytest.mark.slow
def test_fp16_and_small_pictures(target, tmp_path):
    item = make("resnet with shortcut")
    lowered, db = target_cases.run(target, item, tmp_path / "a.pte")
    assert db >= 55
    assert not lowered.notes
    assert lowered.tools["qnn"].startswith("2.49.40.")
    quantize(item, lambda *_: ("int8",))
    lowered, db = target_cases.run(target, item, tmp_path / "b.pte")
    assert db >= 55
    assert "kept in fp16" in lowered.notes[0]
    assert "conv1' at 8x8" in lowered.notes[0]
    assert set(lowered.held) == {"int8 as fp16"}


@here
@pytest.mark.slow
def test_an_embedding_whose_silu_reads_values_far_below_zero_is_right(target, tmp_path):
    lowered, db = target_cases.run(target, target_cases.far_below_zero(), tmp_path / "a.pte")
    assert db > 55
    assert any("without sigmoid" in note for note in lowered.notes)


@here
@pytest.mark.slow
def test_every_grid_of_linear_layers(target, tmp_path):
    item = make("transformer")
    quantize(item, mixed)
    lowered, db = target_cases.run(target, item, tmp_path / "a.pte")
    assert db >= 35
    assert (lowered.held, lowered.partitions) == ({}, 1)
    assert lowered.tools["hexagon"] == "75"


@here
@pytest.mark.slow
@pytest.mark.parametrize(
    ("soc", "hexagon", "grid"), [("SM8550", "73", "int2"), ("SM8750", "79", "int4")]
)
def test_convolutions_on_other_socs(soc, hexagon, grid, tmp_path):
    item = segment(randomize(target_cases.Line(nn.Conv2d(32, 32, 3, padding=1))), [(1, 16, 16, 32)])
    quantize(item, lambda *_: (grid,))
    other = ExecuTorchQNN.for_soc(soc)
    lowered, db = target_cases.run(other, item, tmp_path / "a.pte")
    assert db >= 35
    assert (lowered.tools["soc"], lowered.tools["hexagon"]) == (soc, hexagon)
    assert lowered.held == {}
    again = replace(item, samples=[item.examples])
    other.lower(again, tmp_path / "b.pte")
    assert (tmp_path / "a.pte").read_bytes() == (tmp_path / "b.pte").read_bytes()


@here
@pytest.mark.slow
def test_group_normalisations_on_grids_keep_what_layers_do(target, tmp_path):
    """QNN's own GroupNorm has 48 dB."""
    item = segment(
        randomize(target_cases.Line(nn.GroupNorm(4, 16), nn.Conv2d(16, 16, 3, padding=1))),
        [(1, 16, 16, 16)],
    )
    quantize(item, lambda *_: ("int8",))
    _, db = target_cases.run(target, item, tmp_path / "a.pte")
    assert db > 65


@here
@pytest.mark.slow
@pytest.mark.parametrize(("outlier", "held"), [(1.0, {}), (200.0, {"int2 as int8": 8192})])
def test_layers_keep_narrow_codes_unless_their_sums_would_drown(outlier, held, target, tmp_path):
    item = target_cases.drowning(outlier)
    lowered, db = target_cases.run(target, item, tmp_path / "a.pte")
    assert db > 40
    assert lowered.held == held
    assert any("held as int8" in note for note in lowered.notes) == bool(held)


@here
@pytest.mark.slow
def test_products_of_computed_matrices_keep_16_bits(target, tmp_path):
    _, db = target_cases.run(target, target_cases.product(), tmp_path / "a.pte")
    assert db > 55


@here
@pytest.mark.slow
def test_groups_that_spread_differently_are_levelled(target, tmp_path):
    lowered, db = target_cases.run(target, target_cases.unlike_groups(), tmp_path / "a.pte")
    assert db > 38
    assert any("levelled" in note for note in lowered.notes)


@here
@pytest.mark.slow
def test_a_decoders_attention_is_on_grids(target, tmp_path):
    """Its normalisation is of tokens."""
    module, _ = target_cases.CASES["mid block"]()
    item = segment(randomize(module), [(1, 16, 16, 64)])
    quantize(item, lambda *_: ("int8",))
    lowered, db = target_cases.run(target, item, tmp_path / "a.pte")
    assert lowered.held == {}
    assert db > 45


@here
@pytest.mark.slow
@pytest.mark.parametrize("factor", [0.8, 1.4])
def test_values_somewhat_beyond_calibration_are_not_cut(factor, tmp_path):
    item = target_cases.beyond_calibration(factor)
    _, db = target_cases.run(ExecuTorchQNN.for_soc("SM8650"), item, tmp_path / "a.pte")
    assert db > 45
