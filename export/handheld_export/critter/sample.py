"""Reference sampling: a short program of affine updates, as an exported model runs it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from . import data, text, tokenizer
from .loop import step_generator
from .unet import TRAIN_STEPS, alphas_cumprod, predict
from .vae import LATENT_CHANNELS

Sampler = Literal["ddim", "dpmpp2m"]
SAMPLERS: tuple[Sampler, ...] = ("ddim", "dpmpp2m")


@dataclass(frozen=True)
class Update:
    """One step, with eps predicted at `timestep` from x.

    The next x is ``x * self.x + eps * self.eps + x_before * self.x_before + eps_before *
    self.eps_before``, where "before" means the step before this one.
    """

    timestep: int
    x: float
    eps: float
    x_before: float = 0.0
    eps_before: float = 0.0


def timesteps(steps: int) -> list[int]:
    """Return the trailing timesteps: evenly spaced, the noisiest of the training schedule first."""
    return [round(TRAIN_STEPS - i * TRAIN_STEPS / steps) - 1 for i in range(steps)]


def program(sampler: Sampler, steps: int) -> list[Update]:
    """Write a sampler as affine updates.

    Parameters
    ----------
    sampler
        ``ddim`` (eta 0) or ``dpmpp2m`` (DPM-Solver++ 2M, first and last step of first order).
    steps
        How many times the U-Net runs.

    Returns
    -------
    list of Update
        Starting from unit noise, the last update leaves the clean latents.
    """
    alphas = alphas_cumprod().double()
    ts = timesteps(steps)
    signal = [*alphas[ts].sqrt().tolist(), 1.0]
    noise = [*(1 - alphas[ts]).sqrt().tolist(), 0.0]
    log_ratio = (alphas[ts] / (1 - alphas[ts])).log().mul(0.5).tolist()
    updates = []
    for i, t in enumerate(ts):
        hold = noise[i + 1] / noise[i]
        gain = signal[i + 1] - hold * signal[i]
        if sampler == "ddim" or i in (0, steps - 1):
            updates.append(Update(t, hold + gain / signal[i], -gain * noise[i] / signal[i]))
            continue
        h, h_before = log_ratio[i + 1] - log_ratio[i], log_ratio[i] - log_ratio[i - 1]
        w = h / (2 * h_before)
        now, before = gain * (1 + w) / signal[i], -gain * w / signal[i - 1]
        updates.append(Update(t, hold + now, -now * noise[i], before, -before * noise[i - 1]))
    return updates


@dataclass
class Model:
    """A packed model, loaded in fp32."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    first: CLIPTextModel
    second: CLIPTextModelWithProjection
    tokens: text.Tokenizers
    settings: dict[str, Any]

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return prompt embeddings and pooled embeddings of captions."""
        ids, ids_2 = self.tokens(list(captions))
        states, pooled, _ = text.encode(self.first, self.second, ids, ids_2)
        return states, pooled


def load(folder: Path) -> Model:
    """Load a packed model: fp16 weights, computed with in fp32."""
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32)
    vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32)
    first = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
    second = CLIPTextModelWithProjection.from_pretrained(
        folder / "text_encoder_2", dtype=torch.float32
    )
    parts: tuple[nn.Module, ...] = (unet, vae, first, second)
    for part in parts:
        part.eval().requires_grad_(False)
    return Model(
        unet=unet.to(memory_format=torch.channels_last),
        vae=vae.to(memory_format=torch.channels_last),
        first=first,
        second=second,
        tokens=text.Tokenizers(
            tokenizer.load(folder / "tokenizer"), tokenizer.load(folder / "tokenizer_2")
        ),
        settings=json.loads((folder / "handheld.json").read_text()),
    )


@torch.no_grad()
def sample_latents(
    model: Model,
    captions: Sequence[str],
    noise: torch.Tensor,
    *,
    sampler: Sampler,
    steps: int,
    guidance: float,
) -> torch.Tensor:
    """Run the program from noise (n, 8, 16, 16) to clean, scaled latents."""
    states, pooled = model.encode(captions)
    if guidance != 1.0:
        no_states, no_pooled = model.encode([""])
        n = len(captions)
        states = torch.cat([states, no_states.expand(n, -1, -1)])
        pooled = torch.cat([pooled, no_pooled.expand(n, -1)])
    x = noise.contiguous(memory_format=torch.channels_last)
    x_before = eps_before = torch.zeros_like(x)
    for update in program(sampler, steps):
        doubled = x if guidance == 1.0 else torch.cat([x, x])
        t = torch.full((len(doubled),), update.timestep)
        eps = predict(model.unet, doubled, t, states, pooled)
        if guidance != 1.0:
            with_text, without = eps.chunk(2)
            eps = without + guidance * (with_text - without)
        following = x * update.x + eps * update.eps
        following += x_before * update.x_before + eps_before * update.eps_before
        x_before, eps_before, x = x, eps, following
    return x


@torch.no_grad()
def decode(model: Model, latents: torch.Tensor) -> torch.Tensor:
    """Decode scaled latents to uint8 pictures."""
    return data.to_uint8(model.vae.decode(latents / model.vae.config["scaling_factor"]).sample)


def generate(
    model: Model,
    captions: Sequence[str],
    seed: int,
    *,
    batch: int = 32,
    sampler: Sampler | None = None,
    steps: int | None = None,
    guidance: float | None = None,
) -> torch.Tensor:
    """Draw one picture for each caption, by default as the model's handheld.json says.

    Parameters
    ----------
    model
        A loaded model.
    captions
        What to draw.
    seed
        Of the noise.
    batch
        Pictures at a time.
    sampler, steps, guidance
        In place of the model's settings.

    Returns
    -------
    torch.Tensor
        uint8 pictures, (n, 3, 128, 128).
    """
    side = data.SIZE // 8
    noise = torch.randn(
        len(captions), LATENT_CHANNELS, side, side, generator=step_generator(seed, 0)
    )
    rows = []
    for start in range(0, len(captions), batch):
        latents = sample_latents(
            model,
            captions[start : start + batch],
            noise[start : start + batch],
            sampler=sampler or model.settings["sampler"],
            steps=steps or model.settings["steps"],
            guidance=model.settings["guidance"] if guidance is None else guidance,
        )
        rows.append(decode(model, latents))
    return torch.cat(rows)
