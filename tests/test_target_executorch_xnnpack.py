"""Segments as ExecuTorch programs: one delegate, the student's codes, near torch."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import target_cases
from handheld.errors import TargetError
from handheld.program import Ports, TensorSpec
from handheld_export.executorch import reading, xnnpack
from handheld_export.quantization import QuantizedWeight, round_to_nearest
from handheld_export.targets.executorch_xnnpack import ExecuTorchXNNPACK
from target_cases import CASES, Line, Tuple, attach, layers_of, quantize, randomize, segment

TARGET = ExecuTorchXNNPACK()


GRIDS = {
    "int8": ("int8", None),
    "int4": ("int4", None),
    "int4g32": ("int4", 32),
    "int2": ("int2", None),
}


def run(item, path):
    return target_cases.run(TARGET, item, path)


def stored(path):
    """Each quantized constant of an artifact with the bytes of its codes and scales."""
    graph, data = reading.read(path)
    found = []
    for value in graph["xvalues"]:
        union = value["xvalue_union"]
        if "quant_params" in union and union["tensor_value"]["constant_buffer_idx"]:
            tensor, params = union["tensor_value"], union["quant_params"]
            codes = data(tensor["constant_buffer_idx"])
            found.append((tensor, codes, data(params["scale_buffer_idx"])))
    return found


@pytest.mark.parametrize("case", CASES)
def test_float(case, tmp_path):
    item = segment(*(lambda m, s: (randomize(m), s))(*CASES[case]()))
    lowered, db = run(item, tmp_path / "a.pte")
    assert db >= 90
    assert lowered.partitions == 1
    assert lowered.notes == ()
    graph, _ = reading.read(tmp_path / "a.pte")
    kinds = [n["xnode_union_type"] for n in graph["xnodes"]]
    transposes = 8 if "transformer" in case else 1 if "mid" in case else 0
    assert kinds.count("XNNStaticTranspose") == transposes


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(
    "case",
    ["resnet with shortcut", "transformer", "transformer, convolutions", "mid block"],
)
def test_quantized(case, grid, tmp_path):
    module, shapes = CASES[case]()
    item = segment(randomize(module), shapes)
    quantize(
        item, lambda _, layer: GRIDS[grid] if isinstance(layer, nn.Linear) else (GRIDS[grid][0],)
    )
    lowered, db = run(item, tmp_path / "a.pte")
    assert db >= 35
    assert lowered.partitions == 1
    assert lowered.notes == ()


@pytest.mark.parametrize("case", ["tiny decoder", "upsampler", "downsampler, asymmetric"])
def test_convolutions_run_in_int8(case, tmp_path):
    module, shapes = CASES[case]()
    item = segment(randomize(module), shapes)
    quantize(item, lambda *_: ("int8",))
    _, db = run(item, tmp_path / "a.pte")
    assert db >= 35
    graph, _ = reading.read(tmp_path / "a.pte")
    for node in graph["xnodes"]:
        if node["xnode_union_type"] == "XNNConv2d":
            value = graph["xvalues"][node["xnode_union"]["input1_id"]]["xvalue_union"]
            assert value["tensor_value"]["datatype"] == "xnn_datatype_qint8"


def test_convolutions_in_a_row_stay_in_int8(tmp_path):
    block = nn.Sequential(
        nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1)
    )
    item = segment(randomize(Line(block)), [(1, 8, 8, 32)])
    quantize(item, lambda *_: ("int8",))
    _, db = run(item, tmp_path / "a.pte")
    assert db >= 35
    graph, _ = reading.read(tmp_path / "a.pte")
    kinds = [n["xnode_union_type"] for n in graph["xnodes"]]
    assert kinds == ["XNNConvert", "XNNConv2d", "XNNConv2d", "XNNConvert"]


def mixed(name, layer):
    if isinstance(layer, nn.Conv2d):
        return ("int8",)
    if name.endswith("to_q"):
        return ("int2",)
    if name.endswith("to_k"):
        return ("int4", 32)
    if name.endswith("to_v"):
        return ("int8",)
    if name.endswith("proj_in"):
        return None
    return ("int4",)


def test_mixed_bits_are_stored_bit_for_bit(tmp_path):
    module, shapes = CASES["resnet and transformer"]()
    item = segment(randomize(module), shapes)
    quantize(item, mixed)
    lowered, db = run(item, tmp_path / "a.pte")
    assert db >= 35
    assert all("to_k" in note for note in lowered.notes)
    found = stored(tmp_path / "a.pte")
    for name, layer in layers_of(module).items():
        weight = getattr(layer, "quantized", None)
        if weight is None:
            continue
        parts = [weight]
        if "ff.net.0.proj" in name:
            half = layer.out_features // 2
            parts = [weight.rows(0, half), weight.rows(half, 2 * half)]
        for part in parts:
            assert any(matches(part, *entry) for entry in found), name


def matches(weight, tensor, codes, scales):
    if weight.group_size:
        bits = torch.from_numpy(weight.scales).bfloat16().view(torch.int16).numpy().tobytes()
    else:
        bits = weight.scales.tobytes()
    if weight.codes.ndim == 4 and weight.codes.shape[2:] != (1, 1):
        expected, packed = weight.codes.transpose(0, 2, 3, 1), False
    else:
        expected = weight.codes.reshape(weight.codes.shape[:2])
        packed = weight.grid != "int8"
    if list(expected.shape) != tensor["dims"] or scales != bits:
        return False
    if not packed:
        return codes == np.ascontiguousarray(expected).tobytes()
    low = np.frombuffer(codes, np.uint8).reshape(expected.shape[0], -1)
    both = np.empty(expected.shape, np.int16)
    both[:, ::2], both[:, 1::2] = low & 15, low >> 4
    return np.array_equal(both - 8, expected)


def test_check_finds_a_changed_code(tmp_path):
    module, shapes = CASES["resnet with shortcut"]()
    item = segment(randomize(module), shapes)
    quantize(item, lambda *_: ("int8",))
    result = xnnpack.lower(module, item.examples, tmp_path / "a.pte")
    reading.check(tmp_path / "a.pte", result.layers)
    assert {x.name for x in result.layers} == set(layers_of(module))
    for layer in result.layers:
        codes = layer.weight.codes.copy()
        codes.flat[7] ^= 1
        other = replace(layer, weight=replace(layer.weight, codes=codes))
        with pytest.raises(TargetError, match=f"'{layer.name}'.*codes"):
            reading.check(tmp_path / "a.pte", [other])
        other = replace(layer, weight=replace(layer.weight, scales=layer.weight.scales * 2))
        with pytest.raises(TargetError, match="scales"):
            reading.check(tmp_path / "a.pte", [other])


def test_same_codes_under_other_scales_stay_apart(tmp_path):
    first, second = nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False)
    item = segment(randomize(nn.Sequential(first, second, Tuple())), [(1, 32)])
    weight = round_to_nearest(first.weight.detach().numpy(), "int4")
    attach(first, weight)
    attach(second, replace(weight, scales=weight.scales * 3))
    _, db = run(item, tmp_path / "a.pte")
    assert db >= 35
    graph, _ = reading.read(tmp_path / "a.pte")
    keys = [c["named_key"] for c in graph["constant_data"][1:]]
    assert len(set(keys)) == 4


class Several(nn.Module):
    def forward(self, x, y):
        z = x.permute(0, 3, 1, 2)
        return x, z.permute(0, 2, 3, 1) + y, z.reshape(1, -1), z, torch.cat([x, y] * 3, 3)


def test_results_in_any_layout(tmp_path):
    item = segment(Several(), [(1, 4, 6, 8), (1, 4, 6, 8)])
    _, db = run(item, tmp_path / "a.pte")
    assert db >= 250


def test_a_student_s_other_group_scales_are_rounded_and_noted(tmp_path):
    layer = nn.Linear(64, 32)
    item = segment(randomize(nn.Sequential(layer, Tuple())), [(3, 64)])
    weight = round_to_nearest(layer.weight.detach().numpy(), "int4", 32)
    attach(layer, replace(weight, scales=weight.scales * np.float32(1.001)))
    lowered, db = run(item, tmp_path / "a.pte")
    assert db >= 35
    assert len(lowered.notes) == 1
    assert "rounded to bfloat16" in lowered.notes[0]


def test_convolution_without_range_quantizes_activations_while_running(tmp_path):
    module, shapes = CASES["resnet"]()
    item = segment(randomize(module), shapes)
    quantize(item, lambda *_: ("int8",))
    del module.steps[0].conv2.activation_range
    _, db = run(item, tmp_path / "a.pte")
    assert db >= 38


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("case", ["resnet with shortcut", "transformer, convolutions"])
def test_layers_with_float_inputs_round_nothing(case, grid, tmp_path):
    module, shapes = CASES[case]()
    item = segment(randomize(module), shapes)
    quantize(
        item, lambda _, layer: GRIDS[grid] if isinstance(layer, nn.Linear) else (GRIDS[grid][0],)
    )
    for layer in layers_of(module).values():
        layer.float_input = True
    lowered, db = run(item, tmp_path / "a.pte")
    assert db >= 90, "as exact as float"
    assert lowered.partitions == 1
    graph, _ = reading.read(tmp_path / "a.pte")
    assert "XNNConvert" not in {n["xnode_union_type"] for n in graph["xnodes"]}


def test_a_layer_with_a_float_input_reads_nothing_from_a_fixed_grid(tmp_path):
    block = nn.Sequential(
        nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1)
    )
    item = segment(randomize(Line(block)), [(1, 8, 8, 32)])
    quantize(item, lambda *_: ("int8",))
    block[2].float_input = True
    run(item, tmp_path / "a.pte")
    graph, _ = reading.read(tmp_path / "a.pte")
    kinds = [n["xnode_union_type"] for n in graph["xnodes"]]
    assert kinds == ["XNNConvert", "XNNConv2d", "XNNConv2d"]
    inputs = [
        graph["xvalues"][n["xnode_union"]["input1_id"]]["xvalue_union"]
        for n in graph["xnodes"]
        if n["xnode_union_type"] == "XNNConv2d"
    ]
    types = [v.get("tensor_value", v).get("datatype") for v in inputs]
    assert types == ["xnn_datatype_qdint8", "xnn_datatype_fp32"]


def test_grids_that_do_not_run_are_refused(tmp_path):
    layer = nn.Linear(64, 32)
    item = segment(randomize(nn.Sequential(layer, Tuple())), [(1, 64)])
    codes = np.zeros((32, 64), np.int8)
    palette = QuantizedWeight(
        "palette", codes, np.ones(32, np.float32), None, np.array([0.5], np.float32)
    )
    weight = layer.weight.detach().numpy()
    for quantized, reason in (
        (palette, "palette"),
        (round_to_nearest(weight, "int8", 32), "int8 in groups"),
        (round_to_nearest(weight, "int4", 16), "multiple of 32"),
    ):
        layer.quantized = quantized
        with pytest.raises(TargetError, match=f"layer '0'.*{reason}"):
            TARGET.lower(item, tmp_path / "a.pte")


def test_unknown_operators_are_refused(tmp_path):
    class Sorted(nn.Module):
        def forward(self, x):
            return (torch.sort(x)[0],)

    item = segment(Sorted(), [(1, 8)])
    with pytest.raises(TargetError, match=r"aten\.sort\.default has no XNNPACK form"):
        TARGET.lower(item, tmp_path / "a.pte")


def test_shapes_must_be_those_of_the_ports(tmp_path):
    item = segment(nn.Sequential(nn.Linear(8, 8), Tuple()), [(1, 8)])
    wrong = Ports(inputs=item.ports.inputs, outputs={"y": TensorSpec(shape=(1, 9))})
    with pytest.raises(TargetError, match="shapes"):
        TARGET.lower(replace(item, ports=wrong), tmp_path / "a.pte")


def test_lowering_twice_gives_the_same_bytes(tmp_path):
    module, shapes = CASES["resnet and transformer"]()
    item = segment(randomize(module), shapes)
    quantize(item, mixed)
    TARGET.lower(item, tmp_path / "a.pte")
    TARGET.lower(item, tmp_path / "b.pte")
    assert (tmp_path / "a.pte").read_bytes() == (tmp_path / "b.pte").read_bytes()


def test_versions_and_missing():
    assert TARGET.missing() is None
    assert next(iter(TARGET.versions())) == "executorch"
    assert json.dumps(TARGET.versions())
