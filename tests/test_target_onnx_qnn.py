"""Context binaries through onnxruntime's provider: one graph, its facts, its numbers."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

pytest.importorskip("onnxscript")

import torch
from torch import nn

import target_cases
import tiny
from handheld import qnn
from handheld.errors import TargetError
from handheld.precision import find as find_precision
from handheld_export.onnx import static
from handheld_export.qnn.hexagon import too_small
from handheld_export.quantization import round_to_nearest
from handheld_export.segments import SegmentModule, group, materialize, release, unet_graph
from handheld_export.targets.base import SegmentInput
from handheld_export.targets.onnx_qnn import ONNXQNN

needs_qnn = pytest.mark.skipif(
    qnn.missing("litert") is not None, reason=f"needs QNN: {qnn.missing('litert')}"
)


def test_what_the_engine_is_told():
    target = ONNXQNN.for_soc("SM8550")
    assert (target.name, target.engine) == ("onnx-qnn:SM8550", "onnx")
    assert target.options == {"provider": "qnn", "soc": "SM8550"}
    assert "onnx-qnn: run in QNN's simulation" in target.caveat()


def test_what_is_missing_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("HANDHELD_QNN", str(tmp_path))
    assert ONNXQNN.for_soc("SM8650").missing() == qnn.missing("litert")
    with pytest.raises(TargetError, match="'onnx-qnn:SM8650' lacks QNN"):
        ONNXQNN.for_soc("SM8650").versions()


def test_binary_manifest_and_installation_must_agree(tmp_path):
    target = ONNXQNN.for_soc("SM8650")
    build = "2.41.0.250101000000"
    target.__dict__["sdk"] = SimpleNamespace(build=build)
    path = tmp_path / "a.onnx"
    path.write_bytes(b"..soc_type=SM8650;arch=75;..v%s.." % build.encode())
    told = {"soc": "SM8650", "hexagon": "75", "qnn": build, "torch": "2.13.0"}
    assert target.conflicts(path, told) == []
    assert target.conflicts(path, told | {"soc": "SM8550", "hexagon": "73"}) == [
        "the manifest says soc SM8550, its binary SM8650",
        "the manifest says hexagon 73, its binary 75",
    ]
    target.__dict__["sdk"] = SimpleNamespace(build="2.42.0.260101000000")
    assert target.conflicts(path, told) == [
        f"compiled by QNN {build}, 2.42.0.260101000000 is installed"
    ]
    path.write_bytes(b"nothing")
    assert target.conflicts(path, told) == ["is no context binary of QNN"]


@needs_qnn
@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "soc", "hexagon"),
    [("resnet and transformer", "SM8650", "75"), ("tiny decoder", "SM8750", "79")],
)
def test_compiled_and_run(case, soc, hexagon, tmp_path):
    module, shapes = target_cases.CASES[case]()
    item = target_cases.segment(target_cases.randomize(module), shapes)
    target = ONNXQNN.for_soc(soc)
    lowered, db = target_cases.run(target, item, tmp_path / "a.onnx")
    assert db > 40
    facts = {"soc": soc, "hexagon": hexagon, "qnn": qnn.find("litert").build}
    assert facts.items() <= lowered.tools.items()
    assert (lowered.partitions, lowered.parts, lowered.held) == (1, (), {})
    other = "SM8550"
    with pytest.raises(TargetError, match=f"is compiled for {soc}, not for {other}"):
        ONNXQNN.for_soc(other).load(lowered.path, item.ports)


@needs_qnn
@pytest.mark.slow
def test_the_same_segment_gives_the_same_bytes(tmp_path):
    item = target_cases.segment(
        target_cases.randomize(target_cases.Line(nn.Conv2d(4, 8, 3, padding=1))), [(1, 16, 16, 4)]
    )
    target_cases.quantize(item, lambda *_: ("int4",))
    target = ONNXQNN.for_soc("SM8650")
    one, two = (target.lower(item, tmp_path / n) for n in ("a.onnx", "b.onnx"))
    assert one.path.read_bytes() == two.path.read_bytes()
    assert one.held == {"int4 as fp16": 288}


@needs_qnn
@pytest.mark.slow
def test_operators_outside_are_named(tmp_path):
    class Sine(nn.Module):
        def forward(self, x):
            return (torch.sinh(x + 1),)

    item = target_cases.segment(Sine(), [(1, 4, 4, 8)])
    with pytest.raises(TargetError, match="outside: Sinh"):
        ONNXQNN.for_soc("SM8650").lower(item, tmp_path / "a.onnx")


@needs_qnn
@pytest.mark.slow
def test_codes_on_calibrated_grids(tmp_path):
    def mixed(name, layer):
        return None if name.endswith("proj_in") else ("int4",) if "to_q" in name else ("int8",)

    module, (_, *rest) = target_cases.CASES["resnet and transformer"]()
    target_cases.randomize(module)
    for side, on_grids in ((16, True), (8, False)):
        item = target_cases.segment(module, [(1, side, side, 96), *rest])
        target_cases.quantize(item, mixed)
        item = replace(item, samples=[item.examples, [1.2 * x for x in item.examples]])
        lowered, db = target_cases.run(ONNXQNN.for_soc("SM8650"), item, tmp_path / f"{side}.onnx")
        assert db > 40
        assert (lowered.partitions, lowered.held is None) == (1, on_grids)
        assert any("conv1' at 8x8" in note for note in lowered.notes) is not on_grids


@needs_qnn
@pytest.mark.slow
def test_normalisations_of_pictures_that_spread_less_than_one(tmp_path):
    """Their reciprocals are of numbers on grids that end below 1."""
    norm = nn.GroupNorm(4, 16)
    item = target_cases.segment(
        target_cases.randomize(target_cases.Line(norm, nn.Conv2d(16, 16, 3, padding=1))),
        [(1, 16, 16, 16)],
    )
    target_cases.quantize(item, lambda *_: ("int8",))
    item = replace(item, examples=[0.1 * x for x in item.examples])
    item = replace(item, samples=[item.examples])
    lowered, db = target_cases.run(ONNXQNN.for_soc("SM8650"), item, tmp_path / "a.onnx")
    assert lowered.held is None
    assert db > 50


@needs_qnn
@pytest.mark.slow
def test_a_layer_without_codes_between_grids_keeps_its_weights(tmp_path):
    """onnxruntime would round them to 8 bits, and to one scale."""
    module = target_cases.randomize(
        target_cases.Line(nn.Conv2d(4, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1))
    )
    item = target_cases.segment(module, [(1, 16, 16, 4)])
    target_cases.quantize(item, lambda name, _: None if name == "steps.0" else ("int8",))
    item = replace(item, samples=[item.examples])
    lowered, db = target_cases.run(ONNXQNN.for_soc("SM8650"), item, tmp_path / "a.onnx")
    assert lowered.held is None
    assert db > 60


@needs_qnn
def test_products_of_computed_matrices_keep_16_bits(tmp_path):
    """Of unsigned codes, QNN's provider rounds those on the right to 8 bits."""
    _, db = target_cases.run(ONNXQNN.for_soc("SM8650"), target_cases.product(), tmp_path / "a.onnx")
    assert db > 55


@needs_qnn
@pytest.mark.slow
def test_groups_that_spread_differently_are_levelled(tmp_path):
    item = target_cases.unlike_groups()
    lowered, db = target_cases.run(ONNXQNN.for_soc("SM8650"), item, tmp_path / "a.onnx")
    assert db > 38
    assert any("levelled" in note for note in lowered.notes)


@needs_qnn
def test_narrow_codes_lose_nothing_in_sums(tmp_path):
    """Codes of -2 to 1 as they are would have 52 dB."""
    item = target_cases.narrow(nn.Conv2d(64, 64, 1), (1, 16, 16, 64))
    _, db = target_cases.run(ONNXQNN.for_soc("SM8650"), item, tmp_path / "a.onnx")
    assert db > 65


def test_groups_are_refused(tmp_path):
    layer = nn.Linear(32, 16)
    item = target_cases.segment(nn.Sequential(layer, target_cases.Tuple()).eval(), [(1, 32)])
    layer.quantized = round_to_nearest(layer.weight.detach().numpy(), "int4", 16)
    with pytest.raises(TargetError, match="layer '0': int4 in groups does not run on QNN"):
        ONNXQNN.for_soc("SM8650").lower(replace(item, samples=[item.examples]), tmp_path / "a.onnx")


def test_codes_that_do_not_arrive_are_found():
    from onnx import TensorProto, helper, numpy_helper

    layer = nn.Linear(4, 2)
    layer.quantized = round_to_nearest(layer.weight.detach().numpy(), "int8")
    module = nn.Sequential(layer)
    static.replace(module, lambda *_: None, lambda weight: weight)
    codes, scales = layer.quantized.codes.T.copy(), layer.quantized.scales
    node = helper.make_node("DequantizeLinear", ["0.codes", "0.scales"], ["w"], axis=1)
    made = helper.make_tensor_value_info("w", TensorProto.FLOAT, [4, 2])
    graph = helper.make_graph(
        [node],
        "g",
        [],
        [made],
        [numpy_helper.from_array(codes, "0.codes"), numpy_helper.from_array(scales, "0.scales")],
    )
    model = helper.make_model(graph)
    static.check(model, module)
    codes[1, 1] += 1
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(codes, "0.codes"))
    with pytest.raises(TargetError, match="layer '0': the graph holds other codes or scales"):
        static.check(model, module)


@pytest.mark.parametrize(("side", "small"), [(64, False), (16, True)])
def test_only_small_pictures_are_kept_in_fp16(side, small, tmp_path):
    """At 64x64 latents three levels are 16x16 at least: narrow models are on grids throughout."""
    config = tiny.SDXL | {
        "block_out_channels": (32, 32, 64),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": 1,
        "attention_head_dim": (2, 2, 4),
    }
    component = tiny.component(tiny.unet(**config), tmp_path)
    graph, _ = unet_graph(component, (side, side), tiny.TOKENS)
    found = {}
    for part in group(graph, 0):
        materialize(part, component, find_precision("16a8w"))
        inputs = [torch.randn(p.shape) for p in part.ports.inputs.values()]
        module = SegmentModule(part).eval()
        found[part.id] = too_small(SegmentInput(part.id, module, part.ports, inputs))
        release(part)
    noted = {name for name, note in found.items() if note}
    assert bool(noted) == small
    if small:
        assert {"mid_block", "down_blocks.2"} <= {n.split(".", 2)[2] for n in noted}


@needs_qnn
def test_an_embedding_whose_silu_reads_values_far_below_zero_is_right(tmp_path):
    item = target_cases.far_below_zero()
    lowered, db = target_cases.run(ONNXQNN.for_soc("SM8650"), item, tmp_path / "a.onnx")
    assert db > 55
    assert any("without sigmoid" in note for note in lowered.notes)


@needs_qnn
@pytest.mark.slow
@pytest.mark.parametrize("factor", [0.8, 1.4])
def test_values_somewhat_beyond_calibration_are_not_cut(factor, tmp_path):
    item = target_cases.beyond_calibration(factor)
    _, db = target_cases.run(ONNXQNN.for_soc("SM8650"), item, tmp_path / "a.onnx")
    assert db > 50
