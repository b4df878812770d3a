from __future__ import annotations

import random
import re
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("robohash")
pytest.importorskip("diffusers")

import torch
from torch import nn

from handheld_export.critter import data, judge, sample, tokenizer, unet
from handheld_export.critter.loop import LoopConfig, step_generator, train

TINY = LoopConfig(steps=6, lr=1e-2, seed=9, warmup=2)


def test_split_is_disjoint_and_complete() -> None:
    parts = {s: set(map(tuple, data.combinations(s).tolist())) for s in ("train", "val", "test")}
    assert not parts["train"] & parts["val"]
    assert not parts["train"] & parts["test"]
    assert not parts["val"] & parts["test"]
    assert sum(map(len, parts.values())) == 10 * 16 * 10 * 10
    assert 0.08 < len(parts["test"]) / 16_000 < 0.12


def test_drawn_creatures_stay_in_their_split() -> None:
    for split in ("train", "val", "test"):
        for creature in data.sample_creatures(64, split, step_generator(1, 0)).tolist():
            assert data.split_of(creature) == split


def test_every_value_has_its_own_name_and_layer() -> None:
    for attribute in data.ATTRIBUTES:
        files = {p.stem for p in (data.layer_root() / attribute.folder).glob("*.png")}
        assert {file for file, _ in attribute.values} == files
        assert len(set(attribute.names)) == len(files)


def test_both_palettes_name_the_same_colors() -> None:
    for color in data.ATTRIBUTES[0].names:
        shades = []
        for i in (0, 2):
            layer = data.layers()[i]
            value = data.ATTRIBUTES[i].index(color)
            opaque = layer.clear[value, 0] == 0
            shades.append(layer.color[value][:, opaque].mean(dim=1))
        assert torch.allclose(shades[0], shades[1], atol=0.02), color


def test_captions_name_only_true_attributes() -> None:
    rng = random.Random(5)
    for creature in data.sample_creatures(300, "train", step_generator(2, 0)).tolist():
        words, named = data.caption(creature, rng)
        said = set(re.findall(r"[a-z-]+", words))
        true = {
            a.names[v] for a, v in zip(data.ATTRIBUTES, creature, strict=True) if a.name in named
        }
        every = {name for a in data.ATTRIBUTES for name in a.names}
        assert said & every == true, words


def test_captions_leave_attributes_free_and_can_be_empty() -> None:
    rng = random.Random(5)
    told = [data.caption([0] * 7, rng)[1] for _ in range(200)]
    assert len(set(told)) > 20
    assert data.caption([0] * 7, rng, empty_rate=1.0) == ("", ())


def test_composition_is_deterministic_and_over_white() -> None:
    creatures = data.sample_creatures(5, "train", step_generator(3, 0))
    first, second = data.compose(creatures), data.compose(creatures)
    assert torch.equal(first, second)
    assert torch.equal(data.compose(creatures[2:3])[0], first[2])
    assert first.shape == (5, 3, data.SIZE, data.SIZE)
    assert (first[:, :, 0, 0] == 255).all()
    assert torch.equal(data.to_uint8(data.to_float(first)), first)


def test_nearest_truth_reads_composed_pictures_exactly() -> None:
    creatures = data.sample_creatures(24, "test", step_generator(4, 0))
    read = judge.read_all(data.compose(creatures))
    assert torch.equal(read[:, :4], creatures[:, :4])
    assert (read == creatures).float().mean() > 0.97


def test_tokenizer_round_trip(tmp_path: Path) -> None:
    tokenizer.write(tmp_path)
    tokens = tokenizer.load(tmp_path)
    assert len(tokens) <= tokenizer.VOCAB_SIZE
    words = "a purple horned creature with a lime body and sleepy eyes"
    ids = tokens(words)["input_ids"]
    assert len(ids) == len(words.split()) + 2
    assert tokens.decode(ids, skip_special_tokens=True) == words
    odd = "ünïcödé 日本語 🦖 ¿\u0000?"
    again = tokens.decode(tokens(odd)["input_ids"], skip_special_tokens=True)
    assert again.replace(" ", "") == odd.replace(" ", "")
    padded = tokens(words * 20, padding="max_length", truncation=True, max_length=77)
    assert len(padded["input_ids"]) == 77


def test_merges_are_learnt_in_order_of_frequency() -> None:
    merges = tokenizer.learn_merges(Counter({"aab": 5, "ab": 2}), 2)
    assert merges == [("a", "b</w>"), ("a", "ab</w>")]


@pytest.mark.parametrize("sampler", sample.SAMPLERS)
def test_program_recovers_a_known_picture(sampler: sample.Sampler) -> None:
    alphas = unet.alphas_cumprod().double()
    clean = torch.randn(4, dtype=torch.float64)
    x = x_before = torch.randn(4, dtype=torch.float64)
    eps_before = torch.zeros_like(x)
    for update in sample.program(sampler, 8):
        a = alphas[update.timestep]
        eps = (x - a.sqrt() * clean) / (1 - a).sqrt()
        following = x * update.x + eps * update.eps
        following = following + x_before * update.x_before + eps_before * update.eps_before
        x_before, eps_before, x = x, eps, following
    assert torch.allclose(x, clean, atol=1e-6)


def test_ddim_program_is_diffusers_euler() -> None:
    from handheld_export.critter import pack

    euler = pack.scheduler()
    euler.set_timesteps(8)
    assert [int(t) for t in euler.timesteps] == sample.timesteps(8)
    x = torch.randn(1, 2, 4, 4)
    scaled = x * (euler.sigmas[0] ** 2 + 1).sqrt()
    for update, t in zip(sample.program("ddim", 8), euler.timesteps, strict=True):
        eps = torch.sin(3 * euler.scale_model_input(scaled, t))
        scaled = euler.step(eps, t, scaled).prev_sample
        x = x * update.x + torch.sin(3 * x) * update.eps
    assert torch.allclose(x, scaled, atol=1e-4)


def _train(folder: Path, config: LoopConfig, stop_at: int | None = None) -> list[float]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU(), nn.Conv2d(4, 3, 3))

    def loss(step: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        if step == stop_at:
            raise KeyboardInterrupt
        pictures = data.to_float(data.compose(data.sample_creatures(2, "train", generator)))
        noise = torch.randn(pictures.shape, generator=generator)
        guess = model(pictures + noise)
        return {"loss": (guess - noise[..., 2:-2, 2:-2]).square().mean()}

    return train(model, loss, config, folder / "tiny.pt", folder / "tiny.log")


def test_resumed_training_is_bit_exact(tmp_path: Path) -> None:
    often = LoopConfig(**{**TINY.__dict__, "save_seconds": 0.0})
    whole = _train(tmp_path / "whole", often)
    with pytest.raises(KeyboardInterrupt):
        _train(tmp_path / "parts", often, stop_at=3)
    rest = _train(tmp_path / "parts", often)
    assert rest == whole[3:]
    kept = [torch.load(tmp_path / d / "tiny.pt", weights_only=True) for d in ("whole", "parts")]
    for name, value in kept[0]["ema"].items():
        assert torch.equal(value, kept[1]["ema"][name])
