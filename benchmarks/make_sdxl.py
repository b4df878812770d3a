"""A checkpoint of full SDXL's size with random weights, in diffusers layout.

    python benchmarks/make_sdxl.py -o build/sdxl
    python benchmarks/make_sdxl.py --stack stack2 -o build/sdxl-stack2
    python benchmarks/make_sdxl.py --model ssd-1b -o build/ssd-1b

Weights keep the scale of what passes through them, norms differ by channel, and a few channels are
outliers, as in trained models. A picture of it is noise: speed, memory and parity can be measured,
quality cannot. With ``--stack`` it is the student that the stack's recipe would give, with codes.
One tensor is written after the other, in blocks of rows, so memory does not grow with the model.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from handheld import planning, recipes
from handheld.errors import UsageError
from handheld.files import output_errors
from handheld.planning import Stored
from stages import guarded, say

Array = NDArray[Any]
BLOCK = 500_000
"""Elements that are made at once."""
EXITS = ("conv2", "to_out.0", "ff.net.2", "proj_out")
"""Layers that end a residual branch; smaller ones keep sums of many branches in range."""
OUTLIERS = 8.0
SSD_1B = {
    "mid_block_type": "UNetMidBlock2D",
    "transformer_layers_per_block": [1, [2, 2], [4, 4]],
    "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
}
"""What Segmind's SSD-1B changes in SDXL's U-Net."""
TEXT = {
    "text_encoder": ("CLIPTextModel", 768, 3072, 12, 12, "quick_gelu", 768),
    "text_encoder_2": ("CLIPTextModelWithProjection", 1280, 5120, 32, 20, "gelu", 1280),
}
"""Class, width, inner width, layers, heads, activation and projection of SDXL's encoders."""


@dataclass(frozen=True)
class Tensor:
    """A tensor of a file, made when it is written.

    Parameters
    ----------
    name, dtype : str
        As safetensors calls them.
    shape : tuple of int
    rows : callable
        Gives the bytes of rows ``[start, stop)``.
    block : int
        Rows that are made at once.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    rows: Callable[[int, int], bytes]
    block: int

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * {"F16": 2, "F32": 4, "U8": 1, "I8": 1}[self.dtype]


def _block(shape: tuple[int, ...]) -> int:
    return max(1, BLOCK // math.prod(shape[1:]))


def write(file: BinaryIO, tensors: list[Tensor]) -> None:
    """Write a safetensors file, a block of rows at a time."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for t in tensors:
        header[t.name] = {
            "dtype": t.dtype,
            "shape": list(t.shape),
            "data_offsets": [at, at + t.nbytes],
        }
        at += t.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for t in tensors:
        for start in range(0, t.shape[0], t.block):
            file.write(t.rows(start, min(start + t.block, t.shape[0])))


def write_shards(folder: Path, stem: str, tensors: list[Tensor], most: int) -> int:
    """Write tensors into as many files as needed, with an index; return their bytes."""
    shards: list[list[Tensor]] = [[]]
    for t in tensors:
        if shards[-1] and sum(x.nbytes for x in shards[-1]) + t.nbytes > most:
            shards.append([])
        shards[-1].append(t)
    total = sum(t.nbytes for t in tensors)
    names = [
        f"{stem}.safetensors"
        if len(shards) == 1
        else f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors"
        for i in range(1, len(shards) + 1)
    ]
    for name, shard in zip(names, shards, strict=True):
        with (folder / name).open("wb") as file:
            write(file, shard)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": total},
            "weight_map": {t.name: n for n, s in zip(names, shards, strict=True) for t in s},
        }
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=1))
    return total


# --- weights -----------------------------------------------------------------------------


def _generator(seed: int, name: str, row: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.SFC64([seed, zlib.crc32(name.encode()), row]))


def _gain(name: str, taesd: bool) -> float:
    layer = name.removesuffix(".weight")
    if taesd:  # no norms: what ReLU takes away is given back, branches end small
        return 0.5 if layer.endswith("conv.4") else math.sqrt(2)
    return 0.5 if layer.endswith(EXITS) else 1.0


def values(seed: int, name: str, shape: tuple[int, ...], taesd: bool) -> Callable[..., Array]:
    """Return a function that makes rows of a weight in float32, the same ones at every call."""
    norm = ".norm" in name or "_norm" in name or "layer_norm" in name or "group_norm" in name

    def rows(start: int, stop: int) -> Array:
        generator = _generator(seed, name, start)
        noise: Array = generator.standard_normal((stop - start, *shape[1:]), dtype=np.float32)
        if len(shape) == 1:
            if not (norm and name.endswith("weight")):
                return np.float32(0.02) * noise
            noise = np.float32(1) + np.float32(0.2) * noise
            return noise * _outliers(generator, stop - start)
        if "embedding" in name and name.startswith("text_model."):
            return np.float32(0.02) * noise
        noise *= np.float32(_gain(name, taesd) / math.sqrt(math.prod(shape[1:])))
        if len(shape) == 2:
            # Columns are the same ones for all rows, so they have a generator of their own.
            noise *= _outliers(_generator(seed, name, 1 << 30), shape[1])
        return noise

    return rows


def _outliers(generator: np.random.Generator, count: int) -> Array:
    """Return ones, and for about a channel in 500 a large factor."""
    chosen = generator.random(count) < 1 / 500
    return np.where(chosen, np.float32(OUTLIERS), np.float32(1)).astype(np.float32)


def plain(seed: int, name: str, shape: tuple[int, ...], taesd: bool) -> Tensor:
    """Return a weight in float16."""
    made = values(seed, name, shape, taesd)

    def rows(start: int, stop: int) -> bytes:
        return made(start, stop).astype(np.float16).tobytes()

    return Tensor(name, "F16", shape, rows, _block(shape))


def coded(seed: int, layer: str, shape: tuple[int, ...], stored: Stored) -> list[Tensor]:
    """Return codes and scales of a weight."""
    from handheld_export.quantization import (
        BITS,
        LIMITS,
        QuantizedWeight,
        pack,
        round_to_nearest,
    )

    if stored.group_size is not None:
        raise UsageError(f"layer '{layer}' is coded in groups, which is not written here")
    made = values(seed, f"{layer}.weight", shape, taesd=False)

    def quantized(start: int, stop: int) -> QuantizedWeight:
        weight = made(start, stop)
        if stored.grid != "int2":
            return round_to_nearest(weight, stored.grid)
        # For normal values this is next to the best scale, and 32 candidates take minutes.
        low, high = LIMITS["int2"]
        flat = weight.reshape(len(weight), -1)
        scales = np.maximum(flat.std(axis=1), 1e-8).astype(np.float32)
        codes = np.clip(np.rint(flat / scales[:, None]), low, high).astype(np.int8)
        return QuantizedWeight("int2", codes.reshape(weight.shape), scales)

    scales: list[Array] = []

    def codes(start: int, stop: int) -> bytes:
        weight = quantized(start, stop)
        scales.append(weight.scales)
        if stored.grid == "int8":
            return weight.codes.tobytes()
        return pack(weight.codes, BITS[stored.grid]).tobytes()

    # Values depend on where a block begins, so scales are kept while codes are written.
    count, block = shape[0], _block(shape)
    layout = shape
    if stored.grid != "int8":
        layout = (count, -(-math.prod(shape[1:]) * BITS[stored.grid] // 8))
    kind = ("codes", "I8") if stored.grid == "int8" else ("packed", "U8")
    return [
        Tensor(f"{layer}.weight.{kind[0]}", kind[1], layout, codes, block),
        Tensor(
            f"{layer}.weight.scales",
            "F32",
            (count,),
            lambda *_: np.concatenate(scales).tobytes(),
            count,
        ),
    ]


def component(
    folder: Path,
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    grids: Mapping[str, Stored],
    seed: int,
    most: int,
) -> int:
    """Write U-Net or autoencoder; return the bytes of its weights."""
    folder.mkdir(parents=True)
    taesd = config.get("_class_name") == "AutoencoderTiny"
    tensors: list[Tensor] = []
    layers: dict[str, Any] = {}
    for name, shape in shapes.items():
        layer = name.removesuffix(".weight")
        if name.endswith(".weight") and layer in grids:
            stored = grids[layer]
            tensors += coded(seed, layer, shape, stored)
            layers[layer] = {"grid": stored.grid, "group_size": None}
            if stored.grid != "int8":
                layers[layer]["shape"] = list(shape)
        else:
            tensors.append(plain(seed, name, shape, taesd))
    size = write_shards(folder, "diffusion_pytorch_model", tensors, most)
    (folder / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n")
    if layers:
        (folder / "quantization.json").write_text(
            json.dumps({"schema_version": 2, "layers": layers, "activations": {}}, indent=1) + "\n"
        )
    return size


def shapes_of(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a diffusers model's tensors."""
    import diffusers
    import torch

    with torch.device("meta"):
        model = getattr(diffusers, str(config["_class_name"])).from_config(dict(config))
    return {n: tuple(t.shape) for n, t in model.state_dict().items()}


def text(folder: Path, seed: int, most: int) -> Iterator[tuple[str, int]]:
    """Write text encoders of SDXL's size; their tokenizers are not among them."""
    import torch
    import transformers

    for part, (name, width, inner, depth, heads, act, projection) in TEXT.items():
        config = transformers.CLIPTextConfig(
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            hidden_act=act,
            projection_dim=projection,
        )
        with torch.device("meta"):
            model = getattr(transformers, name)(config)
        place = folder / part
        place.mkdir(parents=True)
        tensors = []
        for key, value in model.state_dict().items():
            # transformers 5 dropped this prefix from the class without a projection; readers of
            # SDXL's files look for it.
            full = (
                key if key.startswith(("text_model.", "text_projection.")) else f"text_model.{key}"
            )
            tensors.append(plain(seed, full, tuple(value.shape), taesd=False))
        yield part, write_shards(place, "model", tensors, most)
        (place / "config.json").write_text(
            json.dumps({"architectures": [name], **config.to_dict()})
        )


def make(
    folder: Path,
    *,
    unet: Mapping[str, Any],
    decoder: Mapping[str, Any],
    grids: Mapping[str, Stored],
    name: str,
    seed: int = 0,
    most: int = 500_000_000,
) -> dict[str, int]:
    """Write a checkpoint; return the bytes of each part.

    Parameters
    ----------
    folder : Path
        Must not exist, or be empty.
    unet, decoder : mapping
        diffusers configurations.
    grids : mapping of layer to Stored
        Of the U-Net's layers that carry codes.
    name : str
        Of the model, in ``handheld.json``.
    seed : int
    most : int
        Bytes of one file.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError("is in the way", path=folder, remedy="remove it or choose another place")
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {"unet": component(folder / "unet", unet, shapes_of(unet), grids, seed, most)}
    sizes["vae"] = component(folder / "vae", decoder, shapes_of(decoder), {}, seed + 1, most)
    settings = {
        "name": name,
        "size": 512,
        "sampler": "dmd",
        "steps": 1,
        "timesteps": [399],
        "guidance": 1.0,
        "licence": "none: random weights",
    }
    (folder / "handheld.json").write_text(json.dumps(settings, indent=2) + "\n")
    return sizes


def main() -> int:
    """Write the checkpoint that was asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", choices=("sdxl", "ssd-1b"), default="sdxl")
    parser.add_argument("--stack", choices=recipes.STACKS, help="a student instead of fp16")
    parser.add_argument("--decoder", choices=("full", "tiny"), help="by default the stack's own")
    parser.add_argument("--text", action="store_true", help="text encoders too, for other programs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard-mb", type=int, default=500)
    parser.add_argument("--output", "-o", type=Path, required=True)
    arguments = parser.parse_args()
    shape = planning.architecture("sdxl")
    if arguments.model == "ssd-1b":
        if arguments.stack:
            raise UsageError("--stack is for sdxl", remedy="leave out --model or --stack")
        unet: dict[str, Any] = {**shape.unet, **SSD_1B}
    else:
        if arguments.stack:
            shape = recipes.shape_after(recipes.builtin(arguments.stack, "sdxl"), shape)
        unet = dict(shape.unet)
    decoder = dict(shape.decoder)
    if arguments.decoder:
        other = planning.architecture("sdxl")
        if arguments.decoder == "tiny":
            other = recipes.shape_after(recipes.builtin("stack1", "sdxl"), other)
        decoder = dict(other.decoder)
    began, most = time.monotonic(), arguments.shard_mb * 10**6
    with output_errors(arguments.output):
        sizes = make(
            arguments.output,
            unet=unet,
            decoder=decoder,
            grids=shape.grids,
            name="-".join(filter(None, (arguments.model, arguments.stack, "random"))),
            seed=arguments.seed,
            most=most,
        )
        if arguments.text:
            sizes |= dict(text(arguments.output, arguments.seed + 2, most))
    for part, size in sizes.items():
        say(f"{part}: {size / 1e6:.1f} MB")
    say(f"{arguments.output}: {time.monotonic() - began:.0f} s, peak {peak() / 1e6:.0f} MB")
    return 0


def peak() -> int:
    """Return the high-water mark of this process's memory in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise UsageError("this system does not tell its processes' peak of memory")


if __name__ == "__main__":
    sys.exit(guarded(main))
