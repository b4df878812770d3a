"""Sizes from configurations alone, without torch."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from handheld import planning
from handheld.errors import CheckpointError
from handheld.planning import Shape, Stored
from test_counting import SDXL, TINY, VAE


def quantized(shape: Shape, grid="int4", group=None) -> Shape:
    grids = {x.name: Stored(grid, group) for x in shape.quantizable}
    return Shape(shape.unet, shape.decoder, shape.latent, grids)


def test_sdxl_is_known_by_name_and_by_its_folder(tmp_path):
    named = planning.architecture("sdxl")
    figures = planning.figures(named)
    assert figures["unet_params"] == 2_567_463_684
    assert figures["unet_bytes"] == 2 * 2_567_463_684
    assert figures["bits_per_weight"] is None
    for part, config in (("unet", named.unet), ("vae", named.decoder)):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text(json.dumps(config))
    assert planning.figures(planning.architecture(str(tmp_path))) == figures


@pytest.mark.parametrize("stack", ["stack1", "stack2", "stack3"])
def test_a_student_is_planned_with_its_own_grids_and_steps(stack):
    folder = f"models/critter-{stack}"
    student, base = planning.architecture(folder), planning.architecture("models/critter")
    own = json.loads(Path(folder, "unet", "quantization.json").read_text())
    layers, floats = own["layers"].items(), own["float_inputs"]
    assert floats
    assert student.grids == {n: Stored(x["grid"], x["group_size"], n in floats) for n, x in layers}
    assert (base.steps, student.steps) == (12, 1)  # six with guidance
    assert base.grids == {}
    plain = dataclasses.replace(student, grids={})
    assert planning.unet_bytes(student) < 0.3 * planning.unet_bytes(plain)


def test_grids_that_nobody_knows_are_refused(tmp_path):
    for part, config in (("unet", SDXL | {"sample_size": 8}), ("vae", VAE)):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text(json.dumps(config))
    for layers in ({"conv": {"grid": "int3"}}, {"conv": "int8"}, ["conv"]):
        (tmp_path / "unet" / "quantization.json").write_text(json.dumps({"layers": layers}))
        with pytest.raises(CheckpointError, match="each with a grid of int8, int4, int2"):
            planning.architecture(str(tmp_path))


def test_macs_follow_the_picture():
    small, large = (planning.architecture("sdxl", size) for size in (512, 1024))
    assert small.latent == (64, 64)
    ratio = planning.figures(large)["decoder_macs"] / planning.figures(small)["decoder_macs"]
    assert 4 <= ratio < 5


def test_scales_count():
    assert Stored("int4").nbytes((10, 64)) == 10 * 64 / 2 + 10 * 4
    assert Stored("int4", 32).nbytes((10, 64)) == 10 * 64 / 2 + 20 * 2
    assert Stored("int2").nbytes((10, 4, 3, 3)) == 10 * 36 / 4 + 10 * 4


def test_layers_with_float_inputs_are_held_wider():
    shape = planning.architecture("sdxl")
    layer = next(x for x in shape.layers if x.kind == "conv3x3" and x.name not in planning.FLOAT)
    for target, nbytes in (("litert-cpu", 1), ("executorch-xnnpack", 4), (None, 0.5)):
        grids = [{layer.name: Stored("int4", None, float_input)} for float_input in (False, True)]
        own, floats = (
            planning.unet_bytes(dataclasses.replace(shape, grids=g), target) for g in grids
        )
        held = 0.5 if target is None else 1
        scales = 4 * layer.shape[0] if nbytes == 4 else 0
        assert floats - own == pytest.approx((nbytes - held) * layer.weights - scales)


def test_targets_hold_narrow_grids_in_wider_ones():
    shape = quantized(planning.architecture("sdxl"), "int2")
    own = planning.unet_bytes(shape)
    litert, xnnpack = (planning.unet_bytes(shape, t) for t in ("litert-cpu", "executorch-xnnpack"))
    assert own < litert < xnnpack
    int8 = quantized(planning.architecture("sdxl"), "int8")
    assert planning.unet_bytes(int8) == planning.unet_bytes(int8, "litert-cpu")


def test_decoders_of_both_kinds_are_counted():
    vae = planning.shape_of(SDXL | {"sample_size": 128}, VAE, 512, "x")
    tiny = planning.shape_of(SDXL | {"sample_size": 128}, TINY, 512, "x")
    assert tiny.latent == vae.latent == (64, 64)
    assert planning.decoder_bytes(tiny) < planning.decoder_bytes(vae)


@pytest.mark.parametrize(
    ("unet", "vae", "words"),
    [
        ("{", "{}", "not readable JSON"),
        ("[]", "{}", "no JSON object"),
        ("{}", "{}", "missing"),
        (json.dumps({"sample_size": 8}), json.dumps(VAE), "missing"),
        (json.dumps(SDXL | {"sample_size": 8, "block_out_channels": "x"}), json.dumps(VAE), ""),
        (json.dumps(SDXL | {"sample_size": 8}), json.dumps(VAE | {"_class_name": "VQ"}), "VQ"),
    ],
)
def test_broken_configurations_are_named(tmp_path, unet, vae, words):
    for part, text in (("unet", unet), ("vae", vae)):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=words):
        planning.architecture(str(tmp_path))


@pytest.mark.parametrize("name", ["nowhere", "../sdxl", "", "."])
def test_unknown_names_list_what_is_known(name):
    with pytest.raises(CheckpointError, match="sdxl"):
        planning.architecture(name)


def test_it_needs_no_torch():
    code = "import sys, handheld.planning; print('torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert said.stdout.strip() == "False"
