"""Checkpoints with the structure of the real ones and as few weights as possible."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from diffusers.schedulers import EulerDiscreteScheduler

from handheld_export.checkpoint import SDXL_SCHEDULER, Checkpoint, Component

TOKENS, WIDTHS, POOLED = 8, (16, 24), 20

SDXL = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2),
    "attention_head_dim": (2, 4),
    "cross_attention_dim": sum(WIDTHS),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": POOLED + 48,
}
# One resolution, transformers on the way down and in the middle: the fewest segments.
SMALLEST = SDXL | {
    "block_out_channels": (32,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "transformer_layers_per_block": 1,
    "attention_head_dim": 2,
}
SD15 = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": 4,
    "cross_attention_dim": 24,
}
KL = {
    "block_out_channels": (32, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "scaling_factor": 0.5,
}
SMALLEST_KL = KL | {
    "block_out_channels": (32,),
    "down_block_types": ("DownEncoderBlock2D",),
    "up_block_types": ("UpDecoderBlock2D",),
}
TINY = {
    "encoder_block_out_channels": (32, 32),
    "decoder_block_out_channels": (32, 32),
    "num_encoder_blocks": (1, 1),
    "num_decoder_blocks": (2, 1),
    "latent_channels": 4,
}


def randomize(model, seed=0):
    """Fill in weights that keep the scale of what passes through."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim == 1:
                p.copy_(1 + 0.2 * noise if "norm" in name and "weight" in name else 0.1 * noise)
            else:
                p.copy_(noise / p[0].numel() ** 0.5)
    return model.eval()


def unet(seed=0, **config):
    return randomize(UNet2DConditionModel(**config), seed)


def vae(seed=1, **config):
    cls = AutoencoderTiny if "num_decoder_blocks" in config else AutoencoderKL
    return randomize(cls(**config), seed)


def component(model, folder: Path) -> Component:
    """Save a model and open it again."""
    kind = "unet" if isinstance(model, UNet2DConditionModel) else "vae"
    model.save_pretrained(folder / kind)
    if kind == "vae":
        (folder / "unet").mkdir(exist_ok=True)
        (folder / "unet" / "config.json").write_text("{}")
    return getattr(Checkpoint(folder), kind)


def write_tokenizer(folder: Path) -> None:
    """Write a CLIP tokenizer without merges."""
    keep = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in keep]
    letters += [chr(256 + i) for i in range(256 - len(keep))]
    words = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    special = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
    }
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            special | {"model_max_length": TOKENS, "tokenizer_class": "CLIPTokenizer"},
        )
    )


def write_text(folder: Path) -> None:
    """Write tokenizers and text encoders."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    for i, cls in enumerate((CLIPTextModel, CLIPTextModelWithProjection)):
        name = "" if i == 0 else "_2"
        torch.manual_seed(i)
        config = CLIPTextConfig(
            vocab_size=514,
            hidden_size=WIDTHS[i],
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            max_position_embeddings=TOKENS,
            projection_dim=POOLED,
            bos_token_id=512,
            eos_token_id=513,
            pad_token_id=513,
        )
        cls(config).save_pretrained(folder / f"text_encoder{name}")
        write_tokenizer(folder / f"tokenizer{name}")


def write_checkpoint(folder: Path, unet_config, vae_config, *, text=True, **settings) -> Path:
    """Write a whole checkpoint; ``settings`` go to ``handheld.json``."""
    unet(**unet_config).save_pretrained(folder / "unet")
    vae(**vae_config).save_pretrained(folder / "vae")
    scheduler = {k: v for k, v in SDXL_SCHEDULER.items() if k != "_class_name"}
    EulerDiscreteScheduler(**scheduler).save_pretrained(folder / "scheduler")
    if text:
        write_text(folder)
    (folder / "handheld.json").write_text(json.dumps({"name": folder.name} | settings))
    return folder


def copied(source: Path, folder: Path) -> Path:
    """Copy a checkpoint to break it."""
    return Path(shutil.copytree(source, folder))
