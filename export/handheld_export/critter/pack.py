"""Writing the model in diffusers' layout."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel

from . import text, tokenizer, unet, vae

SETTINGS: dict[str, Any] = {
    "name": "critter",
    "size": 128,
    "sampler": "ddim",
    "steps": 6,
    "guidance": 1.75,
    "timestep_spacing": "trailing",
    "prompts": [
        "a purple horned creature",
        "a lime antennaed monster with a pink spiky body",
        "a drawing of a blue shaggy critter with an orange riveted body and angry eyes",
        "a yellow crested creature, a turquoise plated body, a laughing mouth",
    ],
}
"""How the model is meant to be sampled, chosen by `benchmarks/critter_quality.py --sweep`."""


def scheduler() -> EulerDiscreteScheduler:
    """Return SDXL's scheduler with trailing timesteps."""
    return EulerDiscreteScheduler(
        num_train_timesteps=unet.TRAIN_STEPS,
        beta_start=unet.BETAS[0],
        beta_end=unet.BETAS[1],
        beta_schedule="scaled_linear",
        prediction_type="epsilon",
        timestep_spacing="trailing",
        steps_offset=1,
    )


def write_layout(
    folder: Path,
    unet_model: UNet2DConditionModel,
    vae_model: AutoencoderKL,
    encoders: text.TextEncoders,
    settings: Mapping[str, Any],
) -> None:
    """Write all parts as fp16 safetensors in SDXL's layout.

    Parameters
    ----------
    folder
        Where the model goes; its parts are replaced, other files are left.
    unet_model, vae_model, encoders
        The parts; they are cast to fp16 in place.
    settings
        What handheld.json says about sampling.
    """
    parts = {
        "unet": unet_model,
        "vae": vae_model,
        "text_encoder": encoders.first,
        "text_encoder_2": encoders.second,
    }
    for name, part in parts.items():
        shutil.rmtree(folder / name, ignore_errors=True)
        part.to(torch.float16).to(memory_format=torch.contiguous_format)
        part.save_pretrained(folder / name, safe_serialization=True)
    scheduler().save_pretrained(folder / "scheduler")
    for name, pad in (("tokenizer", tokenizer.EOS), ("tokenizer_2", "!")):
        shutil.rmtree(folder / name, ignore_errors=True)
        tokenizer.write(folder / name, pad)
    index = {
        "_class_name": "StableDiffusionXLPipeline",
        "_diffusers_version": "0.42.0",
        "force_zeros_for_empty_prompt": False,
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    (folder / "handheld.json").write_text(json.dumps(dict(settings), indent=2) + "\n")


def write_random(folder: Path, seed: int = 0) -> None:
    """Write the layout with random weights, for work that needs only the shapes."""
    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    encoders = text.TextEncoders(len(tokenizer.vocabulary()[0]))
    write_layout(folder, unet.build(), vae.build(), encoders, SETTINGS)


def write_trained(root: Path, folder: Path, settings: Mapping[str, Any]) -> None:
    """Write the averaged weights of the checkpoints under `root`."""
    folder.mkdir(parents=True, exist_ok=True)
    reader, _ = text.load_reader(root)
    write_layout(folder, unet.load(root), vae.load(root), reader.encoders, settings)
