"""One safetensors file in the original latent-diffusion naming of SDXL or SD 1.5.

Nothing is copied: diffusers' own converters, which only move the values of a dict, are run
on shapes instead of tensors, and what comes out says where each tensor is. Such a file has
no configuration. The autoencoder's follows from its tensors; the U-Net's does not (numbers
of heads leave no trace), so a U-Net must be exactly SDXL's or SD 1.5's, unless a diffusers
configuration lies beside the file.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from handheld.errors import CheckpointError
from handheld_export.checkpoint import Component, Place, TensorStore, read_json

_UNET, _VAE = "model.diffusion_model.", "first_stage_model."

_COMMON = {
    "_class_name": "UNet2DConditionModel",
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
}
SDXL_UNET: dict[str, Any] = _COMMON | {
    "sample_size": 128,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SD15_UNET: dict[str, Any] = _COMMON | {
    "sample_size": 64,
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
}


@dataclass(frozen=True)
class _Shape:
    """Stands for a tensor in the converters; indexing drops trailing extents of one."""

    place: Place

    @property
    def shape(self) -> tuple[int, ...]:
        return self.place.shape

    @property
    def ndim(self) -> int:
        return len(self.place.shape)

    def __getitem__(self, index: tuple[slice | int, ...]) -> _Shape:
        kept = sum(isinstance(i, slice) for i in index)
        return _Shape(replace(self.place, shape=self.place.shape[:kept]))


def open_component(path: Path, kind: str) -> Component:
    """Open U-Net or autoencoder of a single file.

    Parameters
    ----------
    path : Path
        A safetensors file. A diffusers U-Net configuration beside it, as ``STEM.json`` or
        ``config.json``, says what a U-Net other than SDXL's or SD 1.5's is made of.
    kind : {'unet', 'vae'}

    Raises
    ------
    CheckpointError
        If the file holds something else, or a variant without a configuration.
    """
    places = TensorStore.open([path], str(path)).places
    prefix = _UNET if kind == "unet" else _VAE
    wanted = {n: _Shape(p) for n, p in places.items() if n.startswith(prefix)}
    if not wanted:
        part = "U-Net" if kind == "unet" else "autoencoder"
        raise CheckpointError(
            f"has no {part} in the naming of latent diffusion ({prefix}*); it has {_say(places)}",
            path=path,
            remedy="give SDXL or SD 1.5 in one file, or a folder in diffusers layout",
        )
    if kind == "unet":
        config, origin = _unet_config(path, places)
    else:
        config, origin = _vae_config(path, wanted, f"{_UNET}label_emb.0.0.weight" in places), path
    converted = _convert(path, kind, wanted, config)
    used = {shape.place.name for shape in converted.values()}
    # Training leaves losses and averages beside the autoencoder.
    lost = sorted(n for n in set(wanted) - used if kind == "unet" or n.startswith(f"{_VAE}dec"))
    if lost:
        raise CheckpointError(
            f"tensor '{lost[0]}' has no place in SDXL or SD 1.5",
            path=path,
            remedy="convert it to a folder in diffusers layout",
        )
    store = TensorStore({n: s.place for n, s in converted.items()}, str(path))
    return Component(kind, config, store, origin)


def _convert(
    path: Path, kind: str, wanted: Mapping[str, _Shape], config: dict[str, Any]
) -> dict[str, _Shape]:
    from diffusers.loaders import single_file_utils as utils

    run = utils.convert_ldm_unet_checkpoint if kind == "unet" else utils.convert_ldm_vae_checkpoint
    try:
        converted: dict[str, _Shape] = run(dict(wanted), config)
    except (KeyError, TypeError, AttributeError, IndexError) as e:
        raise CheckpointError(
            f"does not fit its configuration: {e}",
            path=path,
            remedy="is the file complete, and of SDXL or SD 1.5?",
        ) from None
    return converted


def _say(names: Iterable[str]) -> str:
    counts = Counter(n.split(".")[0] for n in names)
    listed = ", ".join(f"{n}.* ({c})" for n, c in counts.most_common(4))
    return f"{listed}{', ...' if len(counts) > 4 else ''}" if counts else "no tensors"


def _unet_config(path: Path, places: Mapping[str, Place]) -> tuple[dict[str, Any], Path]:
    for beside in (path.with_suffix(".json"), path.with_name("config.json")):
        if beside.is_file():
            config = read_json(beside)
            if config.get("_class_name") == "UNet2DConditionModel":
                return config, beside
            if beside.stem == path.stem:
                raise CheckpointError(
                    f"{config.get('_class_name')!r} is not supported",
                    path=beside,
                    field="_class_name",
                    remedy="write the diffusers configuration of the U-Net there",
                )
    if any(n in places for n in ("v_pred", "ztsnr")):
        raise CheckpointError(
            "is a model that predicts v, which is not supported",
            path=path,
            remedy="use a checkpoint that predicts epsilon",
        )
    xl = f"{_UNET}label_emb.0.0.weight" in places
    name, config = ("SDXL base", SDXL_UNET) if xl else ("SD 1.5", SD15_UNET)
    found = _traits({n.removeprefix(_UNET): p.shape for n, p in places.items() if _UNET in n})
    for trait, value in _SDXL_TRAITS.items() if xl else _SD15_TRAITS.items():
        if found.get(trait, 0) != value:
            raise CheckpointError(
                f"is not {name} but a variant: {trait} is {found.get(trait, 0)}, not {value}",
                path=path,
                remedy=f"put the diffusers configuration of its U-Net beside it as "
                f"{path.with_suffix('.json').name}",
            )
    return dict(config), path


def _traits(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Numbers that tell variants apart, in an order that names the plainest first."""
    traits: dict[str, int] = {}
    for name, shape in shapes.items():
        if name == "input_blocks.0.0.weight":
            traits["input channels"] = shape[1]
            traits["first width"] = shape[0]
        elif name.endswith("attn2.to_k.weight"):
            traits["text width"] = shape[1]
        elif name == "label_emb.0.0.weight":
            traits["added embedding's width"] = shape[1]
        if match := re.match(r"(input|output)_blocks\.(\d+)\.", name):
            trait = f"number of {match[1]} blocks"
            traits[trait] = max(traits.get(trait, 0), int(match[2]) + 1)
        if match := re.match(r"(.*_blocks?(?:\.\d+)?)\.1\.transformer_blocks\.(\d+)\.", name):
            trait = f"transformer depth of {match[1]}"
            traits[trait] = max(traits.get(trait, 0), int(match[2]) + 1)
    return traits


def _depths(inputs: Mapping[int, int], middle: int, outputs: Mapping[int, int]) -> dict[str, int]:
    return {
        **{f"transformer depth of input_blocks.{i}": d for i, d in inputs.items()},
        "transformer depth of middle_block": middle,
        **{f"transformer depth of output_blocks.{i}": d for i, d in outputs.items()},
    }


_SDXL_TRAITS = {
    "input channels": 4,
    "first width": 320,
    "text width": 2048,
    "added embedding's width": 2816,
    "number of input blocks": 9,
    "number of output blocks": 9,
    **_depths({1: 0, 4: 2, 5: 2, 7: 10, 8: 10}, 10, {0: 10, 1: 10, 2: 10, 3: 2, 4: 2, 5: 2, 6: 0}),
}
_SD15_TRAITS = {
    "input channels": 4,
    "first width": 320,
    "text width": 768,
    "number of input blocks": 12,
    "number of output blocks": 12,
    **_depths(
        {1: 1, 2: 1, 4: 1, 5: 1, 7: 1, 8: 1, 10: 0}, 1, {2: 0} | dict.fromkeys(range(3, 12), 1)
    ),
}


def _vae_config(path: Path, wanted: Mapping[str, _Shape], xl: bool) -> dict[str, Any]:
    shapes = {n.removeprefix(_VAE): s.shape for n, s in wanted.items()}
    widths: list[int] = []
    while (block := f"decoder.up.{len(widths)}.block.0.conv1.weight") in shapes:
        widths.append(shapes[block][0])
    first = shapes.get("decoder.conv_in.weight")
    if not widths or first is None or len(first) != 4 or any(w % 32 for w in widths):
        raise CheckpointError(
            "has no autoencoder like that of SDXL or SD 1.5",
            path=path,
            remedy="convert it to a folder in diffusers layout",
        )
    depth = 0
    while f"decoder.up.0.block.{depth}.conv1.weight" in shapes:
        depth += 1
    return {
        "_class_name": "AutoencoderKL",
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "layers_per_block": depth - 1,
        "latent_channels": first[1],
        "mid_block_add_attention": "decoder.mid.attn_1.q.weight" in shapes,
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
        "scaling_factor": 0.13025 if xl else 0.18215,
    }
