"""The last phase of the U-Net: its first step of sampling, which starts from noise alone.

It goes on from the packed model, on latents of the packed VAE, and packs the U-Net again.
"""

from __future__ import annotations

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
COLOR = 3.0
"""Weight of the error in means of latents, beside that in each."""
LOOP = LoopConfig(
    steps=1150,
    lr=3e-4,
    seed=8,
    warmup=30,
    decay_from=0.3,
    restarts=((350, 4e-4),),
    ema=0.99,
    save_seconds=120.0,
)


def run(root: Path, folder: Path, loop: LoopConfig = LOOP, pictures: int = unet.PICTURES) -> None:
    """Train the packed U-Net on, or go on with that; VAE and text encoders stay as they are.

    Parameters
    ----------
    root
        Folder of the checkpoint and the log.
    folder
        The packed model. Its U-Net is replaced at the end.
    loop
        How long, and how.
    pictures
        How many pictures of the training split are encoded.
    """
    model = sample.load(folder)
    latents = unet.encode_pictures(model.vae, root, pictures)
    student = model.unet.train().requires_grad_(True)
    student.set_attn_processor(AttnProcessor())

    def loss(step: int, generator: torch.Generator) -> Losses:
        x, captions = unet.draw(latents, generator)
        with autocast():
            states, pooled = model.encode(captions)
        return unet.noise_loss(student, x, states.float(), pooled.float(), generator, SHARE, COLOR)

    checkpoint = root / "terminal.pt"
    train(student, loss, loop, checkpoint, root / "terminal.log")
    load_ema(student, checkpoint)
    write(student, folder)


def write(student: UNet2DConditionModel, folder: Path) -> None:
    """Replace the weights of a packed model's U-Net, in fp16; its configuration stays."""
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    made = path.with_suffix(".partial")
    state = student.to(torch.float16).to(memory_format=torch.contiguous_format).state_dict()
    save_file(state, made, metadata={"format": "pt"})
    made.replace(path)
