"""The phase that teaches critter's U-Net to begin with noise alone."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

import torch

from handheld_export.critter import terminal, unet
from handheld_export.critter.loop import LoopConfig, step_generator

LATENTS = torch.randn(6, 8, 16, 16, generator=step_generator(1, 0))


def inputs(monkeypatch, latents, share, answer):
    """Return what the model was given, and the losses."""
    seen = []

    def predict(_, noisy, timesteps, *__):
        seen.append((noisy, timesteps))
        return answer(noisy, timesteps)

    monkeypatch.setattr(unet, "predict", predict)
    states = torch.zeros(len(latents), 77, 4)
    losses = unet.noise_loss(
        None, latents, states, states[:, 0], step_generator(2, 0), terminal_share=share
    )
    return *seen[0], losses


def leads_to(latents):
    def answer(noisy, timesteps):
        a = unet.alphas_cumprod()[timesteps].view(-1, 1, 1, 1)
        return (noisy - a.sqrt() * latents) / (1 - a).sqrt()

    return answer


def test_nothing_of_the_picture_is_seen_at_the_last_timestep(monkeypatch):
    noisy, timesteps, _ = inputs(monkeypatch, LATENTS, 1.0, leads_to(LATENTS))
    other, _, _ = inputs(monkeypatch, LATENTS + 5, 1.0, leads_to(LATENTS))
    assert (timesteps == unet.TRAIN_STEPS - 1).all()
    assert torch.equal(noisy, other)


def test_the_right_answer_is_the_one_that_leads_to_the_picture(monkeypatch):
    *_, right = inputs(monkeypatch, LATENTS, 1.0, leads_to(LATENTS))
    *_, wrong = inputs(monkeypatch, LATENTS, 1.0, leads_to(LATENTS + 1))
    assert float(right["loss"]) < 1e-9
    assert float(wrong["loss"]) > 0.01


def test_other_rows_never_have_the_last_timestep(monkeypatch):
    latents = LATENTS.repeat(200, 1, 1, 1)
    noisy, timesteps, _ = inputs(monkeypatch, latents, 0.25, leads_to(latents))
    last = timesteps == unet.TRAIN_STEPS - 1
    assert 0.2 < float(last.float().mean()) < 0.3
    apart, _, _ = inputs(monkeypatch, latents + 1, 0.25, leads_to(latents))
    assert torch.equal(noisy[last], apart[last])
    assert (noisy != apart).flatten(1).any(dim=1)[~last].all()


def test_a_packed_model_is_trained_on_and_packed_again(tmp_path, monkeypatch):
    pytest.importorskip("robohash")
    from diffusers import UNet2DConditionModel

    from handheld_export.critter import pack, sample

    folder = tmp_path / "model"
    pack.write_random(folder)
    before = sample.load(folder).unet.state_dict()
    config = (folder / "unet/config.json").read_text()
    monkeypatch.setattr(unet, "BATCH", 2)
    terminal.run(tmp_path, folder, LoopConfig(steps=1, lr=1e-2, warmup=1, ema=0.0), pictures=4)
    after = UNet2DConditionModel.from_pretrained(folder / "unet").state_dict()
    assert any(not torch.equal(after[k].float(), v) for k, v in before.items())
    assert all(torch.isfinite(v).all() for v in after.values())
    assert (folder / "unet/config.json").read_text() == config
    assert not list(folder.rglob("*.partial"))
