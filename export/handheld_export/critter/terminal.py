"""The last phases of the U-Net: its first step of sampling, which starts from noise alone.

They go on from the packed model, on latents of the packed VAE, and pack the U-Net again.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import save_file

from ..autocast import autocast
from . import sample, unet
from .loop import LoopConfig, Losses, load_ema, train

SHARE = 0.2
"""Of the rows of a batch."""


@dataclass(frozen=True)
class Phase:
    """One training of the packed U-Net."""

    loop: LoopConfig
    color: float
    """Weight of the error in means of latents, beside that in each."""


PHASES = {
    "terminal": Phase(
        LoopConfig(
            steps=1150,
            lr=3e-4,
            seed=8,
            warmup=30,
            decay_from=0.3,
            restarts=((350, 4e-4),),
            ema=0.99,
            save_seconds=120.0,
        ),
        color=3.0,
    ),
    "colors": Phase(
        LoopConfig(
            steps=1600,
            lr=3e-4,
            seed=9,
            warmup=30,
            decay_from=0.3,
            ema=0.995,
            save_seconds=120.0,
        ),
        color=20.0,
    ),
}


def run(root: Path, folder: Path, name: str, pictures: int = unet.PICTURES) -> None:
    """Train the packed U-Net on, or go on with that; VAE and text encoders stay as they are.

    Parameters
    ----------
    root
        Folder of the checkpoint and the log.
    folder
        The packed model. Its U-Net is replaced at the end.
    name
        One of `PHASES`.
    pictures
        How many pictures of the training split are encoded.
    """
    phase = PHASES[name]
    model = sample.load(folder)
    latents = unet.encode_pictures(model.vae, root, pictures)
    student = model.unet.train().requires_grad_(True)
    student.set_attn_processor(AttnProcessor())

    def loss(step: int, generator: torch.Generator) -> Losses:
        x, captions = unet.draw(latents, generator)
        with autocast():
            states, pooled = model.encode(captions)
        return unet.noise_loss(
            student, x, states.float(), pooled.float(), generator, SHARE, phase.color
        )

    checkpoint = root / f"{name}.pt"
    train(student, loss, phase.loop, checkpoint, root / f"{name}.log")
    load_ema(student, checkpoint)
    write(student, folder)


def write(student: UNet2DConditionModel, folder: Path) -> None:
    """Replace the weights of a packed model's U-Net, in fp16; its configuration stays."""
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    made = path.with_suffix(".partial")
    state = student.to(torch.float16).to(memory_format=torch.contiguous_format).state_dict()
    save_file(state, made, metadata={"format": "pt"})
    made.replace(path)
