"""Cutting by configuration gives what cutting modules gives."""

from __future__ import annotations

import math

import pytest

import tiny
from handheld import cutting
from handheld.counting import count_decoder, count_unet
from handheld_export import segments

UNETS = {
    "SDXL": tiny.SDXL | {"layers_per_block": 2},
    "SD 1.5": tiny.SD15,
    "no mid block": tiny.SDXL | {"mid_block_type": None},
    "plain mid block": tiny.SDXL | {"mid_block_type": "UNetMidBlock2D"},
}


def parts(graph, most):
    return [
        (
            [u.name for u in s.units],
            s.weights,
            math.prod(graph.shapes[s.units[-1].name]),
        )
        for s in segments.group(graph, most)
    ]


@pytest.mark.parametrize("most", [0, 3000, 10**9])
@pytest.mark.parametrize("name", UNETS)
def test_unets_are_cut_as_modules_are(name, most, tmp_path):
    model = tiny.unet(**UNETS[name])
    graph, _ = segments.unet_graph(tiny.component(model, tmp_path), (8, 16), tiny.TOKENS)
    found = cutting.units(count_unet(model.config, (8, 16), tokens=tiny.TOKENS))
    found = [u for u in found if u.block != "add_embedding"]
    assert [
        ([u.name for u in p], sum(u.weights for u in p), p[-1].elements)
        for p in cutting.group(found, most)
    ] == parts(graph, most)
    made = {u.name for u in graph.units}
    wanted = {u.name: {n for n in u.inputs if n in made} for u in graph.units}
    assert {u.name: set(u.inputs) for u in found} == wanted


@pytest.mark.parametrize("config", [tiny.KL, tiny.TINY], ids=["KL", "tiny"])
def test_decoders_are_cut_as_modules_are(config, tmp_path):
    model = tiny.vae(**config)
    graph = segments.decoder_graph(tiny.component(model, tmp_path), (8, 16))
    found = cutting.group(cutting.units(count_decoder(model.config, (8, 16))), 10**9)
    assert [(sum(u.weights for u in p), p[-1].elements) for p in found] == [
        (weights, elements) for _, weights, elements in parts(graph, 10**9)
    ]


def test_tensors_stay_until_they_are_read():
    units = [
        cutting.Unit("a", "1", elements=10),
        cutting.Unit("b", "2", elements=3, inputs=("a",)),
        cutting.Unit("c", "3", elements=2, inputs=("b", "a")),
    ]
    assert cutting.held_between([[u] for u in units]) == 15
    assert cutting.held_between([units[:2], units[2:]]) == 15
    assert cutting.held_between([units]) == 2
