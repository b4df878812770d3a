"""Segments as ONNX graphs: onnxruntime's kernels, the student's codes, near torch."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

import torch
from torch import nn

import target_cases
from handheld.errors import TargetError
from handheld.files import sha256_file
from handheld_export.onnx import graphs
from handheld_export.quantization import BITS, QuantizedWeight, round_to_nearest
from handheld_export.rewrites import rewrite
from handheld_export.targets.onnx import ONNX
from target_cases import CASES, Tuple, attach, layers_of, quantize, randomize, segment

TARGET = ONNX()
GRIDS = {"int8": ("int8",), "int4": ("int4",), "int4g32": ("int4", 32), "int2": ("int2",)}


def make(case):
    module, shapes = CASES[case]()
    return segment(randomize(module), shapes)


def load(path):
    import onnx

    return onnx.load(str(path))


@pytest.mark.parametrize("case", CASES)
def test_float(case, tmp_path):
    lowered, db = target_cases.run(TARGET, make(case), tmp_path / "a.onnx")
    assert db >= 90
    # Phones keep files by their hash, and the graph names this one.
    assert [p.name for p in lowered.parts] == [sha256_file(p) for p in lowered.parts]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("case", ["resnet with shortcut", "transformer", "mid block"])
def test_quantized_layers_run_from_codes(case, grid, tmp_path):
    item = make(case)
    quantize(item, lambda _, m: GRIDS[grid] if isinstance(m, nn.Linear) else ("int8",))
    _, db = target_cases.run(TARGET, item, tmp_path / "a.onnx")
    assert db >= 35
    kinds = Counter(n.op_type for n in load(tmp_path / "a.onnx").graph.node)
    layers = layers_of(rewrite(item.module)).values()
    linear = [m for m in layers if isinstance(m, nn.Linear)]
    by_rows = sum(m.quantized.grid == "int8" for m in linear)  # of int4 models, 1x1 convolutions
    assert (kinds["MatMulInteger"], kinds["MatMulNBits"]) == (by_rows, len(linear) - by_rows)
    assert kinds["ConvInteger"] == sum(isinstance(m, nn.Conv2d) for m in layers)
    assert not kinds["MatMul"] or "transformer" in case or "mid" in case  # attention's own


@pytest.mark.parametrize("case", ["tiny decoder", "upsampler", "downsampler, asymmetric"])
def test_convolutions_run_in_int8(case, tmp_path):
    item = make(case)
    quantize(item, lambda *_: ("int8",))
    _, db = target_cases.run(TARGET, item, tmp_path / "a.onnx")
    assert db >= 35


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("case", ["resnet with shortcut", "transformer"])
def test_layers_with_float_inputs_round_nothing(case, grid, tmp_path):
    item = make(case)
    quantize(item, lambda _, m: GRIDS[grid] if isinstance(m, nn.Linear) else ("int8",))
    for layer in layers_of(item.module).values():
        layer.float_input = True
    _, db = target_cases.run(TARGET, item, tmp_path / "a.onnx")
    assert db >= 90, "as exact as float"
    kinds = Counter(n.op_type for n in load(tmp_path / "a.onnx").graph.node)
    assert not kinds["ConvInteger"]


def old_x86():
    """Whether onnxruntime's fast integer products overflow here."""
    from handheld_export.targets import onnx

    return onnx._saturates()


@pytest.mark.skipif(old_x86(), reason="x86-64 without VNNI")
def test_int8_rows_give_the_bits_that_their_definition_gives(tmp_path):
    """Every processor computes them: integers, and single operations of float32."""
    layer = nn.Linear(72, 40)
    item = segment(randomize(nn.Sequential(layer, Tuple())), [(2, 9, 72)])
    quantize(item, lambda *_: ("int8",))
    item.examples[0][0, 3] = 0
    TARGET.lower(item, tmp_path / "a.onnx")
    x = item.examples[0].numpy()
    (y,) = TARGET.load(tmp_path / "a.onnx", item.ports)(x)

    one = np.float32
    largest = np.maximum(np.abs(x).max(-1, keepdims=True), one(1e-20))
    codes = np.rint(x * (one(127) / largest) + one(128)).astype(np.int32) - 128
    assert np.abs(codes).max() == 127
    sums = codes @ layer.quantized.codes.T.astype(np.int32)
    scale = largest * one(1 / 127)
    expected = sums.astype(one) * layer.quantized.scales * scale + layer.bias.detach().numpy()
    assert np.array_equal(y, expected)
    assert np.array_equal(y[0, 3], layer.bias.detach().numpy())
    kinds = {n.op_type for n in load(tmp_path / "a.onnx").graph.node}
    assert not kinds & {"Reciprocal", "Clip"}, "engines have kernels of their own for these"


@pytest.mark.parametrize("bad", [np.inf, -np.inf])
def test_int8_rows_do_not_hide_infinity(bad, tmp_path):
    item = segment(randomize(nn.Sequential(nn.Linear(16, 8), Tuple())), [(3, 16)])
    quantize(item, lambda *_: ("int8",))
    TARGET.lower(item, tmp_path / "a.onnx")
    x = item.examples[0].numpy().copy()
    x[1, 2] = bad
    (y,) = TARGET.load(tmp_path / "a.onnx", item.ports)(x)
    assert np.isfinite(y).all(-1).tolist() == [True, False, True]


def mixed(name, layer):
    if isinstance(layer, nn.Conv2d):
        return ("int2",)
    if name.endswith("to_q"):
        return ("int2",)
    if name.endswith("to_k"):
        return ("int4", 32)
    return None if name.endswith("proj_in") else ("int4",)


def test_narrow_convolutions_are_held_in_int8_and_all_else_as_it_is(tmp_path):
    item = make("resnet and transformer")
    quantize(item, mixed)
    _, db = target_cases.run(TARGET, item, tmp_path / "a.onnx")
    assert db >= 35
    bits = {
        a.i for n in load(tmp_path / "a.onnx").graph.node for a in n.attribute if a.name == "bits"
    }
    assert bits == {2, 4}


def test_reading_back_finds_a_changed_code_and_a_changed_scale(tmp_path):
    item = make("resnet and transformer")
    quantize(item, mixed)
    module = rewrite(item.module)
    layers = graphs.replace(module, TARGET.held)
    names = list(item.ports.inputs), list(item.ports.outputs)
    graphs.lower(module, item.examples, *names, tmp_path / "a.onnx")
    graphs.read_back(tmp_path / "a.onnx", layers)
    assert len(layers) > 10
    for layer in layers:
        codes = layer.weight.codes.copy()
        codes.flat[7] ^= 1
        other = replace(layer, weight=replace(layer.weight, codes=codes))
        with pytest.raises(TargetError, match=f"'{layer.name}'.*other codes"):
            graphs.read_back(tmp_path / "a.onnx", [other])
        other = replace(layer, weight=replace(layer.weight, scales=layer.weight.scales * 2))
        with pytest.raises(TargetError, match="scales"):
            graphs.read_back(tmp_path / "a.onnx", [other])
    with pytest.raises(TargetError, match="holds no codes under nowhere"):
        graphs.read_back(tmp_path / "a.onnx", [replace(layers[0], initializers=("nowhere.codes",))])


@pytest.mark.parametrize("inputs", [10, 48, 200])
@pytest.mark.parametrize("grid", ["int2", "int4", "int8"])
def test_layers_of_any_width_fill_their_last_block(inputs, grid, tmp_path):
    item = segment(randomize(nn.Sequential(nn.Linear(inputs, 24), Tuple())), [(3, inputs)])
    quantize(item, lambda *_: (grid,))
    _, db = target_cases.run(TARGET, item, tmp_path / "a.onnx")
    assert db >= 35


def test_a_layer_used_twice_is_stored_once(tmp_path):
    layer = nn.Linear(64, 64)
    item = segment(randomize(nn.Sequential(layer, layer, Tuple())), [(2, 64)])
    quantize(item, lambda *_: ("int4",))
    _, db = target_cases.run(TARGET, item, tmp_path / "a.onnx")
    assert db >= 35
    stored = load(tmp_path / "a.onnx").graph.initializer
    assert sum(t.name.endswith(".codes") for t in stored) == 1


def test_grids_that_do_not_run_are_refused(tmp_path):
    layer = nn.Linear(64, 32)
    item = segment(randomize(nn.Sequential(layer, Tuple())), [(1, 64)])
    codes = np.zeros((32, 64), np.int8)
    palette = QuantizedWeight(
        "palette", codes, np.ones(32, np.float32), None, np.array([0.5], np.float32)
    )
    weight = layer.weight.detach().numpy()
    for quantized, reason in (
        (palette, "palettes"),
        (round_to_nearest(weight, "int4", 8), "groups of 8"),
    ):
        attach(layer, quantized)
        with pytest.raises(TargetError, match=f"layer '0'.*{reason}"):
            TARGET.lower(item, tmp_path / "a.onnx")


def test_unknown_operators_are_refused(tmp_path):
    class Sliding(nn.Module):
        def forward(self, x):
            return (torch.special.bessel_j0(x),)

    with pytest.raises(TargetError, match="cannot export it"):
        TARGET.lower(segment(Sliding(), [(1, 8)]), tmp_path / "a.onnx")


def test_lowering_twice_gives_the_same_bytes_and_names_no_folder(tmp_path):
    item = make("resnet and transformer")
    quantize(item, mixed)
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (data,) = TARGET.lower(item, tmp_path / folder / "a.onnx").parts
    for name in ("a.onnx", data.name):
        first, second = ((tmp_path / f / name).read_bytes() for f in ("one", "two"))
        assert first == second
        assert b"/handheld" not in first


def test_every_code_of_every_grid_survives_the_layout(tmp_path):
    for grid, bits in BITS.items():
        low, high = -(1 << (bits - 1)) + (bits > 2), (1 << (bits - 1)) - 1
        codes = np.resize(np.arange(low, high + 1, dtype=np.int8), (8, 256))
        layer = nn.Linear(256, 8)
        attach(layer, QuantizedWeight.checked(grid, codes, np.full(8, 0.5, np.float32)))
        item = segment(nn.Sequential(layer, Tuple()).eval(), [(1, 256)])
        TARGET.lower(item, tmp_path / f"{grid}.onnx")


def test_versions_and_missing(monkeypatch):
    assert TARGET.missing() is None
    assert next(iter(TARGET.versions())) == "onnxruntime"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "handheld[onnx]" in str(TARGET.missing())


def test_codes_and_scales_lie_in_blocks():
    weight = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    layer = nn.Linear(64, 4)
    coded = graphs.CodedLinear(layer, round_to_nearest(weight, "int4"))
    assert coded.codes.shape == (4, 1, 32)
    assert coded.scales.shape == (4, 1)
