"""The autoencoder: 128 px pictures to 16x16 latents and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch.nn import functional

from ..autocast import autocast
from . import data
from .loop import LoopConfig, Losses, load_ema, step_generator, train

LATENT_CHANNELS = 8
BATCH = 8
SMALL_BATCH_FROM, SMALL_BATCH = 563, 4
"""After the first steps, more steps are worth more than larger batches."""
KL_WEIGHT = 1e-5
L1_WEIGHT = 0.05
COLOR_FROM, COLOR_WEIGHT, COLOR_POOL = 3338, 10.0, 8
"""From this step on, areas count by their mean color too: without it two of the ten colors, close
neighbours, come out as one."""
LOOP = LoopConfig(steps=4338, schedule=4600, lr=1e-3, seed=1, restarts=((3338, 6e-4),))


def build(scaling_factor: float = 1.0) -> AutoencoderKL:
    """Make the autoencoder with random weights."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(24, 48, 96, 192),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=data.SIZE,
        scaling_factor=scaling_factor,
        force_upcast=False,
    )


def reconstruction_loss(
    vae: AutoencoderKL,
    pictures: torch.Tensor,
    generator: torch.Generator,
    color_weight: float = 0.0,
) -> dict[str, Any]:
    """Return the training loss on a batch of pictures in -1..1."""
    with autocast():
        posterior = vae.encode(pictures).latent_dist
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    noise = torch.randn(mean.shape, generator=generator)
    latents = mean + (0.5 * logvar).exp() * noise
    with autocast():
        decoded = vae.decode(latents).sample
    error = decoded.float() - pictures
    mse, l1 = error.square().mean(), error.abs().mean()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    color = functional.avg_pool2d(error, COLOR_POOL).square().mean()
    loss = mse + L1_WEIGHT * l1 + KL_WEIGHT * kl + color_weight * color
    return {"loss": loss, "mse": mse, "kl": kl, "color": color}


def run(root: Path, loop: LoopConfig = LOOP) -> None:
    """Train the autoencoder, or go on training it."""
    torch.manual_seed(loop.seed)
    vae = build().to(memory_format=torch.channels_last)

    def loss(step: int, generator: torch.Generator) -> Losses:
        small = SMALL_BATCH_FROM <= step < COLOR_FROM
        batch = SMALL_BATCH if small else BATCH
        pictures = data.to_float(data.compose(data.sample_creatures(batch, "train", generator)))
        return reconstruction_loss(
            vae,
            pictures.contiguous(memory_format=torch.channels_last),
            generator,
            COLOR_WEIGHT if step >= COLOR_FROM else 0.0,
        )

    train(vae, loss, loop, root / "vae.pt", root / "vae.log")


def psnr(pictures: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Return the PSNR in dB of each picture against its pair, both uint8."""
    error = (pictures.float() - others.float()).square().flatten(1).mean(dim=1)
    return 10 * torch.log10(255.0**2 / error)


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, pictures: torch.Tensor, batch: int = 32) -> torch.Tensor:
    """Encode (to the mean) and decode uint8 pictures in fp32."""
    rows = []
    for chunk in torch.split(pictures, batch):
        latents = vae.encode(data.to_float(chunk)).latent_dist.mode()
        rows.append(data.to_uint8(vae.decode(latents).sample))
    return torch.cat(rows)


@torch.no_grad()
def latent_statistics(vae: AutoencoderKL, n: int = 512, seed: int = 7) -> dict[str, Any]:
    """Return mean and standard deviation of training latents, for each channel and over all."""
    generator = step_generator(seed, 0)
    values = []
    for _ in range(n // 32):
        pictures = data.to_float(data.compose(data.sample_creatures(32, "train", generator)))
        values.append(vae.encode(pictures).latent_dist.mean)
    latents = torch.cat(values)
    return {
        "mean": latents.mean(dim=(0, 2, 3)).tolist(),
        "std": latents.std(dim=(0, 2, 3)).tolist(),
        "overall_std": float(latents.std()),
    }


@torch.no_grad()
def equalise(vae: AutoencoderKL, statistics: dict[str, Any]) -> None:
    """Give every latent channel zero mean and the overall deviation, by the 1x1 convolutions alone.

    The picture that comes out is the same. Without this the channels that carry color are so weak
    beside the others that the U-Net learns them last.
    """
    mean = torch.tensor(statistics["mean"])
    gain = statistics["overall_std"] / torch.tensor(statistics["std"])
    into, out = vae.quant_conv, vae.post_quant_conv
    into.weight[:LATENT_CHANNELS] *= gain.view(-1, 1, 1, 1)
    into.bias[:LATENT_CHANNELS] = (into.bias[:LATENT_CHANNELS] - mean) * gain
    into.bias[LATENT_CHANNELS:] += 2 * gain.log()
    out.bias += out.weight[:, :, 0, 0] @ mean
    out.weight /= gain.view(1, -1, 1, 1)


def load(root: Path) -> AutoencoderKL:
    """Load the averaged autoencoder, its channels equalised and scaled to unit variance."""
    vae = build().eval()
    step = load_ema(vae, root / "vae.pt")
    path = root / "vae.json"
    known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if known.get("step") != step or "overall_std" not in known:
        known = {"step": step, **latent_statistics(vae)}
        path.write_text(json.dumps(known))
    equalise(vae, known)
    vae.register_to_config(scaling_factor=1.0 / known["overall_std"])
    return vae.requires_grad_(False)


def report(root: Path, n: int = 256) -> dict[str, float]:
    """Measure the reconstruction of held-out pictures."""
    vae = load(root)
    pictures = data.compose(data.sample_creatures(n, "test", step_generator(11, 0)))
    ratios = psnr(pictures, reconstruct(vae, pictures))
    return {
        "pictures": n,
        "psnr_mean_db": float(ratios.mean()),
        "psnr_of_mean_error_db": float(-10 * torch.log10((10 ** (-ratios / 10)).mean())),
        "psnr_min_db": float(ratios.min()),
    }
