"""Sums of narrow codes that QNN would round too much, and what is told of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import target_cases
from handheld_export.qnn.hexagon import counted, faint, told


def item(layer, shape, grid, outlier=1.0):
    made = target_cases.segment(
        target_cases.randomize(nn.Sequential(layer, target_cases.Tuple())), [shape]
    )
    target_cases.quantize(made, lambda *_: (grid,))
    sample = made.examples[0].clone()
    sample[(0,) * sample.dim()] = outlier
    return replace(made, samples=[[sample]])


LAYERS = [(nn.Linear(64, 32), (1, 9, 64)), (nn.Conv2d(16, 8, 3, padding=1), (1, 16, 9, 9))]


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=["linear", "conv"])
def test_an_outlier_drowns_the_sums_of_narrow_codes(layer, shape):
    """The input's grid must reach it, so all else is in small codes."""
    assert faint(item(layer, shape, "int2")) == {}
    found = faint(item(layer, shape, "int2", 100.0))
    assert list(found) == ["0"]
    assert 20 < found["0"] < 40
    assert faint(item(layer, shape, "int4", 100.0)).get("0", 40) > found["0"] + 6
    assert faint(item(layer, shape, "int8", 100.0)) == {}


def test_what_a_bias_adds_is_no_part_of_a_sum():
    layer, shape = LAYERS[0]
    before = faint(item(layer, shape, "int2", 100.0))
    with torch.no_grad():
        drowned = item(layer, shape, "int2", 100.0)
        layer.bias += 1000
    assert faint(drowned)["0"] == pytest.approx(before["0"], abs=0.1)


def test_of_nothing_nothing_is_told():
    layer, shape = nn.Linear(64, 32), (1, 9, 64)
    empty = item(layer, shape, "int2", 0.0)
    assert faint(replace(empty, samples=[[torch.zeros(shape)]])) == {}
    assert told({}) == ()


def test_the_worst_layer_is_told():
    (note,) = told({"a": 39.0, "b": 33.2, "c": 35.0})
    assert "layer 'b' (estimated 33 dB) and 2 more" in note
    assert "more" not in told({"a": 39.0})[0].split("dB")[1]


def test_only_what_is_held_wider_is_counted():
    one = target_cases.narrow(nn.Conv2d(4, 4, 1), (1, 2, 2, 4)).module.steps[0].quantized
    pairs = [(one, "int2"), (one, "int8"), (one, "fp16"), (one, "int8")]
    assert counted(pairs) == {"int2 as fp16": 16, "int2 as int8": 32}
