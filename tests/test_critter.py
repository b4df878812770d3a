"""The model that ships: what it is, and that its card says what was measured."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

import torch

from handheld import models
from handheld_export.checkpoint import Checkpoint
from handheld_export.critter import evaluate, judge, sample
from handheld_export.segments import unet_graph

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "models" / "critter"
ENCODERS = ("text_encoder", "text_encoder_2")


@pytest.fixture(scope="module")
def checkpoint():
    return Checkpoint(models.checkpoint("critter"))


def test_found_by_name():
    assert models.checkpoint("critter").resolve() == FOLDER.resolve()
    assert "critter" in models.names()


def test_small_enough():
    size = sum(p.stat().st_size for p in (ROOT / "models").rglob("*") if p.is_file())
    assert size <= 120e6


def test_topology_of_sdxl(checkpoint):
    config = json.loads((FOLDER / "unet/config.json").read_text())
    assert config["addition_embed_type"] == "text_time"
    depths = config["transformer_layers_per_block"]
    assert depths == sorted(depths)
    assert config["down_block_types"][0] == "DownBlock2D"
    encoders = [json.loads((FOLDER / e / "config.json").read_text()) for e in ENCODERS]
    assert [e["architectures"] for e in encoders] == [
        ["CLIPTextModel"],
        ["CLIPTextModelWithProjection"],
    ]
    assert all(e["max_position_embeddings"] == 77 for e in encoders)
    assert config["cross_attention_dim"] == sum(e["hidden_size"] for e in encoders)
    scheduler = checkpoint.scheduler
    assert scheduler["prediction_type"] == "epsilon"
    assert scheduler["num_train_timesteps"] == 1000
    store = checkpoint.unet.store
    assert 5e6 <= sum(math.prod(store.shape(name)) for name in store) <= 25e6
    assert unet_graph(checkpoint.unet, (16, 16))


def test_card_says_what_was_measured():
    spec = importlib.util.spec_from_file_location(
        "critter_quality", ROOT / "benchmarks/critter_quality.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["critter_quality"] = module
    spec.loader.exec_module(module)
    figures = json.loads((FOLDER / "quality.json").read_text())
    assert module.card(figures) in (FOLDER / "README.md").read_text()
    settings = json.loads((FOLDER / "handheld.json").read_text())
    assert figures["settings"] == settings, "measured with other settings"
    assert figures["pictures"] >= 500


def test_measured_well_enough():
    figures = json.loads((FOLDER / "quality.json").read_text())
    for way in ("nearest_truth", "classifier"):
        for attribute in ("face_color", "head"):
            assert figures["generated"][way][attribute] >= 0.85
    assert figures["vae"]["psnr_mean_db"] >= 28


@pytest.mark.slow
def test_draws_what_is_asked():
    pytest.importorskip("robohash")
    _, asked, captions = evaluate.prompts(48, "test", seed=51, only=("face_color", "head"))
    pictures = sample.generate(sample.load(FOLDER), captions, seed=52)
    for read in (judge.read_all(pictures), judge.classify(judge.load(FOLDER), pictures)):
        right = judge.accuracy(read, asked)
        assert right["head"] >= 0.9
        assert right["face_color"] >= 0.75


def test_judge_reads_real_pictures():
    pytest.importorskip("robohash")
    from handheld_export.critter import data

    creatures = data.sample_creatures(64, "test", torch.Generator().manual_seed(53))
    read = judge.classify(judge.load(FOLDER), data.compose(creatures))
    assert judge.accuracy(read, creatures)["head"] == 1.0
