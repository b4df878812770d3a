"""Sums of narrow codes that QNN would round too much, and what is noted of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import target_cases
from handheld_export.qnn.hexagon import counted, note_on, sums_db
from handheld_export.targets.executorch_qnn import ExecuTorchQNN
from handheld_export.targets.litert_qualcomm import LiteRTQualcomm
from handheld_export.targets.onnx_qnn import ONNXQNN

EXECUTORCH, LITERT, ONNX = (t.for_soc("SM8650") for t in (ExecuTorchQNN, LiteRTQualcomm, ONNXQNN))
LAYERS = [(nn.Linear(64, 32), (1, 9, 64)), (nn.Conv2d(16, 8, 3, padding=1), (1, 16, 9, 9))]


def item(layer, shape, grid, outlier=1.0):
    made = target_cases.segment(
        target_cases.randomize(nn.Sequential(layer, target_cases.Tuple())), [shape]
    )
    target_cases.quantize(made, lambda *_: (grid,))
    sample = made.examples[0].clone()
    sample[(0,) * sample.dim()] = outlier
    return replace(made, samples=[[sample]])


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=["linear", "conv"])
def test_an_outlier_drowns_the_sums_of_narrow_codes(layer, shape):
    """The input's grid must reach it, so all else is in small codes."""
    assert EXECUTORCH.drowned(item(layer, shape, "int2")) == {}
    found = EXECUTORCH.drowned(item(layer, shape, "int2", 100.0))
    assert list(found) == ["0"]
    assert 20 < found["0"] < 40
    assert EXECUTORCH.drowned(item(layer, shape, "int8", 100.0)) == {}
    wider = sums_db(item(layer, shape, "int4", 100.0), lambda weight: weight)
    assert found["0"] + 6 < wider["0"] < found["0"] + 18


def test_what_is_held_as_int8_anyway_does_not_drown():
    linear, conv = (item(layer, shape, "int2", 100.0) for layer, shape in LAYERS)
    assert (list(LITERT.drowned(linear)), LITERT.drowned(conv)) == (["0"], {})
    assert (ONNX.drowned(linear), ONNX.drowned(conv)) == ({}, {})


def test_nothing_runs_where_nothing_could_drown():
    def refuse(*_):
        raise AssertionError("ran")

    layer, shape = nn.Linear(64, 32), (1, 9, 64)
    made = item(layer, shape, "int8")
    layer.register_forward_hook(refuse)
    assert EXECUTORCH.drowned(made) == {}


def test_what_a_bias_adds_is_no_part_of_a_sum():
    layer, shape = nn.Linear(64, 32), (1, 9, 64)
    made = item(layer, shape, "int2", 100.0)
    before = EXECUTORCH.drowned(made)["0"]
    with torch.no_grad():
        layer.bias += 1000
    assert EXECUTORCH.drowned(made)["0"] == pytest.approx(before, abs=0.1)


def test_of_nothing_nothing_is_told():
    layer, shape = nn.Linear(64, 32), (1, 9, 64)
    empty = item(layer, shape, "int2", 0.0)
    assert EXECUTORCH.drowned(replace(empty, samples=[[torch.zeros(shape)]])) == {}
    assert note_on({}) == ()


def test_the_worst_layer_is_named():
    (note,) = note_on({"a": 39.94, "b": 33.2, "c": 35.0})
    assert "layer 'b' (estimated 33.2 dB) and 2 more" in note
    assert note_on({"a": 39.94})[0].endswith("layer 'a' (estimated 39.9 dB)")


def test_only_what_is_held_wider_is_counted():
    one = target_cases.narrow(nn.Conv2d(4, 4, 1), (1, 2, 2, 4)).module.steps[0].quantized
    pairs = [(one, "int2"), (one, "int8"), (one, "fp16"), (one, "int8")]
    assert counted(pairs) == {"int2 as fp16": 16, "int2 as int8": 32}
