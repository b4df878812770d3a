"""Grids of pictures on the way, so that one sees what training does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image

from handheld_export import sampling
from handheld_export.compress import diffusion
from handheld_export.compress.engine import Trainer
from handheld_export.compress.step import Context, load_vae

COUNT, COLUMNS = 16, 4


def drawer(context: Context, settings: dict[str, Any]) -> Callable[[Trainer], None]:
    """Return what draws the first captions of the dataset, always from the same noise.

    Parameters
    ----------
    context : Context
    settings : dict
        The student's: ``sampler``, ``timesteps`` or ``steps``, ``guidance``.

    Returns
    -------
    callable
        Writes ``samples/STEP.png`` into the step's folder.
    """
    data = context.data
    rows = torch.arange(min(COUNT, len(data)))
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(len(rows), *data.latent_shape, generator=generator)
    chosen = settings.get("timesteps") or sampling.timesteps(
        len(context.schedule), int(settings.get("steps", 20)), "trailing"
    )
    plan = sampling.plan(
        context.teacher.scheduler, str(settings.get("sampler", "ddim")), list(chosen)
    )
    guidance = float(settings.get("guidance", 1.0))
    fresh = [torch.randn(noise.shape, generator=generator) for _ in plan]
    decoders: list[Any] = []

    def draw(trainer: Trainer) -> None:
        device = trainer.device
        condition, empty = data.condition(rows).to(device), data.empty().to(device)
        unet = trainer.models[trainer.main]
        unet.eval()
        with trainer.accelerator.autocast():
            latents = diffusion.sample(
                unet, noise.to(device), condition, empty, plan, guidance,
                [f.to(device) for f in fresh],
            )  # fmt: skip
        unet.train()
        if not trainer.accelerator.is_main_process:
            return
        if not decoders:
            decoders.append(load_vae(context.teacher))
        vae = decoders[0]
        with torch.no_grad():
            pictures = vae.decode(latents.float().cpu() / vae.config["scaling_factor"]).sample
        keep(trainer, pictures)

    return draw


def keep(trainer: Trainer, pictures: torch.Tensor) -> None:
    """Write pictures in -1..1, [n, 3, h, w], into ``samples/STEP.png`` of the step's folder."""
    folder = trainer.folder / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{trainer.step:06}.png"
    partial = path.with_suffix(".partial")
    grid(pictures).save(partial, format="png")
    partial.replace(path)


def grid(pictures: torch.Tensor) -> Image.Image:
    """Lay pictures in -1..1, [n, 3, h, w], out in rows of four."""
    n, _, height, width = pictures.shape
    sheet = Image.new("RGB", (COLUMNS * width, -(-n // COLUMNS) * height))
    values = pictures.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
    for i, value in enumerate(values.permute(0, 2, 3, 1)):
        tile = Image.fromarray(value.contiguous().numpy())
        sheet.paste(tile, (i % COLUMNS * width, i // COLUMNS * height))
    return sheet
