"""Core ML's chunks of SDXL's U-Net, counted from shapes: no weight is made or read."""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
from functools import cache
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn

from handheld_export.checkpoint import Checkpoint
from handheld_export.lowering import lines
from handheld_export.segments import layers
from handheld_export.targets.coreml import CoreML

SHARE = {
    "fp16": (2, 2),
    "int8": (1, 1),
    "int4": (0.5, 1),
    "int4g32": (0.5625, 1),
    "int2": (0.25, 1),
}
"""Bytes of a weight in a transformer's linear layers, and in others that are quantized."""
BYTES = {"I8": 1, "F32": 4}


def write(path, tensors):
    """Write a file of tensors that takes no room on the disk: all of it is a hole."""
    header, at = {}, 0
    for name, (dtype, shape) in tensors.items():
        end = at + math.prod(shape) * BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path, 8 + len(text) + at)


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    """Make SDXL, its transformers' linear layers on a grid if one is given."""
    source = Path(str(files("handheld"))) / "architectures" / "sdxl"

    @cache
    def make(grid=None):
        folder = tmp_path_factory.mktemp("sdxl")
        shutil.copytree(source, folder, dirs_exist_ok=True)
        for part, kind in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL)):
            with torch.device("meta"):
                model = kind.from_config(json.loads((folder / part / "config.json").read_text()))
            coded = {n for n, m in model.named_modules() if grid and linear(n, m)}
            tensors = {}
            for name, value in model.state_dict().items():
                if name.removesuffix(".weight") in coded:
                    tensors[f"{name}.codes"] = ("I8", value.shape)
                    tensors[f"{name}.scales"] = ("F32", value.shape[:1])
                else:
                    tensors[name] = ("F32", value.shape)
            write(folder / part / "diffusion_pytorch_model.safetensors", tensors)
            if coded:
                about = {"schema_version": 2, "layers": {n: {"grid": grid} for n in sorted(coded)}}
                (folder / part / "quantization.json").write_text(json.dumps(about))
        return Checkpoint(folder)

    return make


def linear(name, layer):
    return isinstance(layer, nn.Linear) and (
        ".transformer_blocks." in name or name.endswith(("proj_in", "proj_out"))
    )


def megabytes(chunk, narrow, wide):
    """Count what a package keeps, without scales."""
    total = 2 * chunk.weights
    for name, layer in layers(chunk):
        if name in ("conv_in", "conv_out") or name.startswith(("add_", "time_embedding")):
            continue
        total += layer.weight.numel() * ((narrow if linear(name, layer) else wide) - 2)
    return total / 1e6


def chunks(checkpoint, precision):
    return lines(checkpoint, (128, 128), 77).cut("unet", CoreML(), precision)


@pytest.mark.parametrize(
    ("precision", "count"), [("fp16", 7), ("int8", 4), ("int4", 2), ("int4g32", 2), ("int2", 2)]
)
def test_chunks_of_sdxl(precision, count, sdxl):
    found = chunks(sdxl(), precision)
    sizes = [megabytes(c, *SHARE[precision]) for c in found]
    assert len(sizes) == count
    assert max(sizes) < 1000
    assert min(sizes) > max(sizes) / 2


@pytest.mark.parametrize(("grid", "narrow", "count"), [("int4", 0.5, 3), ("int2", 0.25, 2)])
def test_a_students_codes_decide_not_the_precision(grid, narrow, count, sdxl):
    student = sdxl(grid)
    found = chunks(student, "fp16")
    assert len(found) == count
    assert max(megabytes(c, narrow, 2) for c in found) < 1000
    # A student says itself what stays in float, so the precision rounds nothing more.
    assert [c.units for c in chunks(student, "int8")] == [c.units for c in found]
