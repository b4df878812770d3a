"""The U-Net in SDXL's form, and its training on latents encoded once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch.nn import functional

from ..autocast import autocast
from . import data, text, vae
from .loop import (
    LoopConfig,
    Losses,
    load_ema,
    save_atomic,
    step_generator,
    train,
)

BATCH = 24
PICTURES = 12_800
TIME_IDS = (data.SIZE, data.SIZE, 0, 0, data.SIZE, data.SIZE)
TIME_DIM = 32
WEIGHT_LIMIT = 50.0
NOISY_SHARE, NOISY_FROM = 0.5, 500
"""This share of timesteps is drawn from the noisy part, where text decides what the colors are."""
LOOP = LoopConfig(
    steps=10300,
    lr=7e-4,
    seed=4,
    warmup=150,
    decay_from=0.5,
    restarts=((5000, 5e-4), (7200, 5e-4), (8800, 5e-4)),
    ema=0.996,
    save_seconds=120.0,
)
BETAS = (0.00085, 0.012)
TRAIN_STEPS = 1000


def build() -> UNet2DConditionModel:
    """Make the U-Net with random weights."""
    return UNet2DConditionModel(
        sample_size=data.SIZE // 8,
        in_channels=vae.LATENT_CHANNELS,
        out_channels=vae.LATENT_CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 128, 192),
        layers_per_block=2,
        transformer_layers_per_block=[1, 1, 2],
        attention_head_dim=[2, 4, 6],
        cross_attention_dim=sum(text.WIDTHS),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_DIM,
        projection_class_embeddings_input_dim=text.PROJECTION + len(TIME_IDS) * TIME_DIM,
    )


def alphas_cumprod() -> torch.Tensor:
    """Return SDXL's noise schedule, the cumulative products of 1 - beta."""
    betas = torch.linspace(BETAS[0] ** 0.5, BETAS[1] ** 0.5, TRAIN_STEPS) ** 2
    return torch.cumprod(1 - betas, dim=0)


def predict(
    unet: UNet2DConditionModel,
    noisy: torch.Tensor,
    timesteps: torch.Tensor,
    states: torch.Tensor,
    pooled: torch.Tensor,
) -> torch.Tensor:
    """Return the U-Net's noise prediction."""
    ids = torch.tensor(TIME_IDS, dtype=torch.float32).expand(len(noisy), -1)
    out: Any = unet(
        noisy,
        timesteps,
        encoder_hidden_states=states,
        added_cond_kwargs={"text_embeds": pooled, "time_ids": ids},
    )
    return torch.as_tensor(out.sample)


@torch.no_grad()
def encode_pictures(
    model: AutoencoderKL, root: Path, pictures: int = PICTURES
) -> dict[str, torch.Tensor]:
    """Encode training pictures once; the file under `root` is reused while the VAE is the same."""
    path = root / "latents.pt"
    model = model.to(memory_format=torch.channels_last)
    factor = float(model.config["scaling_factor"])
    if path.exists():
        kept: dict[str, Any] = torch.load(path, weights_only=True)
        if kept["factor"] == factor and len(kept["creatures"]) == pictures:
            return kept
    creatures = data.sample_creatures(pictures, "train", step_generator(5, 0))
    means, stds = [], []
    for chunk in torch.split(creatures, BATCH):
        with autocast():
            x = data.to_float(data.compose(chunk)).contiguous(memory_format=torch.channels_last)
            posterior = model.encode(x).latent_dist
        means.append((posterior.mean.float() * factor).contiguous())
        stds.append((posterior.std.float() * factor).contiguous())
    made = {"creatures": creatures, "mean": torch.cat(means), "std": torch.cat(stds)}
    save_atomic({**made, "factor": factor}, path)
    return made


def draw(
    latents: dict[str, torch.Tensor], generator: torch.Generator
) -> tuple[torch.Tensor, list[str]]:
    """Draw a batch of encoded pictures, (n, 8, 16, 16), and a caption for each."""
    picked = torch.randint(len(latents["creatures"]), (BATCH,), generator=generator)
    mean, std = latents["mean"][picked], latents["std"][picked]
    x = mean + std * torch.randn(mean.shape, generator=generator)
    captions, _ = text.captioned(latents["creatures"][picked], generator)
    return x, captions


def noise_loss(
    unet: UNet2DConditionModel,
    latents: torch.Tensor,
    states: torch.Tensor,
    pooled: torch.Tensor,
    generator: torch.Generator,
    terminal_share: float = 0.0,
    color: float = 0.0,
) -> dict[str, torch.Tensor]:
    """Return the epsilon loss, weighted up (to `WEIGHT_LIMIT`) where the signal is small.

    `color` is the weight of the same error in the means of 4 x 4 latents, where hues are.

    SDXL's schedule leaves a little of the picture at its last timestep, enough to read its mean
    colors from, and sampling starts without it (arXiv 2305.08891). Of `terminal_share` of the rows
    the model therefore sees nothing but noise at that timestep, and has to take the colors from
    the text: its noise prediction is then the one that leads from there to the picture.
    """
    alphas = alphas_cumprod()
    count = (len(latents),)
    noisy_part = torch.rand(count, generator=generator) < NOISY_SHARE
    timesteps = torch.where(
        noisy_part,
        torch.randint(NOISY_FROM, TRAIN_STEPS, count, generator=generator),
        torch.randint(TRAIN_STEPS, count, generator=generator),
    )
    noise = torch.randn(latents.shape, generator=generator)
    terminal = torch.zeros(count, dtype=torch.bool)
    if terminal_share:
        terminal = torch.rand(count, generator=generator) < terminal_share
        timesteps = torch.where(terminal, TRAIN_STEPS - 1, timesteps.clamp(max=TRAIN_STEPS - 2))
    a = alphas[timesteps].view(-1, 1, 1, 1)
    noisy = a.sqrt() * latents + (1 - a).sqrt() * noise
    wanted = noise
    if terminal_share:
        rows = terminal.view(-1, 1, 1, 1)
        noisy = torch.where(rows, noise, noisy)
        wanted = torch.where(rows, (noise - a.sqrt() * latents) / (1 - a).sqrt(), noise)
    noisy = noisy.contiguous(memory_format=torch.channels_last)
    with autocast():
        predicted = predict(unet, noisy, timesteps, states, pooled)
    off = predicted.float() - wanted
    error = off.square().flatten(1).mean(dim=1)
    # Averages of 16 independent values have a sixteenth of their variance.
    means = 16 * functional.avg_pool2d(off, 4).square().flatten(1).mean(dim=1)
    weight = ((1 - a) / a).flatten().clamp(1.0, WEIGHT_LIMIT)
    loss = (weight * (error + color * means)).mean()
    return {"loss": loss, "mse": error.mean(), "means": means.mean()}


def run(root: Path, loop: LoopConfig = LOOP, pictures: int = PICTURES) -> None:
    """Train the U-Net, or go on training it; VAE and text encoders stay as they are."""
    latents = encode_pictures(vae.load(root), root, pictures)
    reader, tokens = text.load_reader(root)
    torch.manual_seed(loop.seed)
    unet = build().to(memory_format=torch.channels_last)
    unet.set_attn_processor(AttnProcessor())  # on CPU twice as fast backwards as the fused kernel

    def loss(step: int, generator: torch.Generator) -> Losses:
        x, captions = draw(latents, generator)
        with torch.no_grad(), autocast():
            states, pooled, _ = reader.encoders(*tokens(captions))
        return noise_loss(unet, x, states.float(), pooled.float(), generator)

    train(unet, loss, loop, root / "unet.pt", root / "unet.log")


def load(root: Path) -> UNet2DConditionModel:
    """Load the averaged U-Net."""
    unet = build().eval()
    load_ema(unet, root / "unet.pt")
    return unet.requires_grad_(False)
