"""Checkpoints of random weights: layout, scales, codes and memory."""

from __future__ import annotations

import json
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny
from handheld import planning, recipes
from handheld.counting import count_unet
from handheld.errors import UsageError
from handheld.planning import Stored
from handheld_export.checkpoint import Checkpoint
from handheld_export.segments import decoder_graph, group, unet_graph
from handheld_export.torch_artifacts import TorchArtifacts

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "make_sdxl.py"
UNET = {"_class_name": "UNet2DConditionModel", **tiny.SDXL}
GRIDS = {
    "down_blocks.0.resnets.0.conv1": Stored("int8"),
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": Stored("int4"),
    "down_blocks.1.attentions.0.transformer_blocks.0.ff.net.2": Stored("int2"),
}


@pytest.fixture(scope="module")
def make_sdxl():
    sys.path.insert(0, str(SCRIPT.parent))
    import make_sdxl

    yield make_sdxl
    sys.path.remove(str(SCRIPT.parent))


@pytest.fixture(scope="module")
def made(make_sdxl, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "sdxl"
    make_sdxl.make(
        folder,
        unet=UNET,
        decoder={"_class_name": "AutoencoderKL", **tiny.KL},
        grids=GRIDS,
        name="small",
        most=300_000,
    )
    return Checkpoint(folder)


def test_shards_and_index(made):
    index = json.loads(
        (made.path / "unet" / "diffusion_pytorch_model.safetensors.index.json").read_text()
    )
    files = set(index["weight_map"].values())
    assert len(files) > 1 and all((made.path / "unet" / f).is_file() for f in files)
    assert all((made.path / "unet" / f).stat().st_size < 500_000 for f in files)
    assert set(index["weight_map"]) == set(made.unet.store)


def test_codes_are_read_and_fit_their_scales(made):
    assert made.unet.quantized == set(GRIDS)
    for layer, stored in GRIDS.items():
        weight = made.unet.quantized_weight(layer)
        assert weight.grid == stored.grid
        fan_in = weight.codes[0].size
        rms = float(np.sqrt(np.mean(weight.dequantize() ** 2)) * np.sqrt(fan_in))
        assert 0.3 < rms < 2.5, layer


def test_what_passes_keeps_its_scale(made):
    unet, embedding = unet_graph(made.unet, (8, 8), 8)
    assert embedding is not None
    decoder = decoder_graph(made.vae, (8, 8))
    generator = torch.Generator().manual_seed(0)
    for graph, component in ((unet, made.unet), (decoder, made.vae)):
        segments = group(graph, 0)
        run = TorchArtifacts([(s, component) for s in segments])
        known = {
            n: torch.randn(s.shape, generator=generator).numpy()
            for segment in segments
            for n, s in segment.ports.inputs.items()
            if n in graph.inputs
        }
        for segment in segments:
            known |= run(segment.id, {n: known[n] for n in segment.inputs})
        for name, value in known.items():
            assert np.isfinite(value).all()
            assert 0.05 < float(value.std()) < 30, name
            assert np.abs(value).max() < 65504, name
        run.close()


def test_outliers_are_planted(make_sdxl):
    rows = make_sdxl.values(0, "a.to_q.weight", (64, 4096), False)(0, 64)
    columns = np.abs(rows).mean(axis=0)
    outliers = columns > 4 * np.median(columns)
    assert 0 < outliers.sum() < 40
    assert np.array_equal(make_sdxl.values(0, "a.to_q.weight", (64, 4096), False)(0, 64), rows)


def test_same_seed_same_bytes(make_sdxl, made, tmp_path):
    make_sdxl.make(
        tmp_path / "again",
        unet=UNET,
        decoder={"_class_name": "AutoencoderKL", **tiny.KL},
        grids=GRIDS,
        name="small",
        most=300_000,
    )
    assert Checkpoint(tmp_path / "again").sha256 == made.sha256


def test_nothing_is_overwritten(make_sdxl, made):
    with pytest.raises(UsageError, match="in the way"):
        make_sdxl.make(made.path, unet=UNET, decoder={}, grids={}, name="small")


def test_shapes_of_the_real_ones(make_sdxl):
    base = planning.architecture("sdxl")
    trimmed = recipes.shape_after(recipes.builtin("stack2", "sdxl"), base)
    configs = {
        2567.5: base.unet,
        1331.0: {**base.unet, **make_sdxl.SSD_1B},
        1439.2: trimmed.unet,
    }
    for millions, config in configs.items():
        shapes = make_sdxl.shapes_of(config)
        parameters = sum(int(np.prod(s)) for s in shapes.values())
        assert parameters == pytest.approx(millions * 1e6, rel=1e-3)
        if config is not base.unet:
            continue
        weights = sum(x.params for x in count_unet(config, (64, 64)))
        assert parameters == weights


@pytest.mark.parametrize("grid", ["int8", "int4", "int2"])
def test_memory_does_not_grow_with_a_tensor(make_sdxl, tmp_path, grid):
    tensors = make_sdxl.coded(0, "a", (4096, 2560), Stored(grid))
    tracemalloc.start()
    try:
        with (tmp_path / "a.safetensors").open("wb") as file:
            make_sdxl.write(file, tensors)
        assert tracemalloc.get_traced_memory()[1] < 12 * 4 * make_sdxl.BLOCK
    finally:
        tracemalloc.stop()
