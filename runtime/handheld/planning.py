"""What a model weighs and computes on each target, from configurations alone.

Nothing here reads weights or imports torch. A :class:`Shape` is a model before it exists:
two configurations, a picture size, and the grids of its quantized layers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any, Final, Literal

from handheld import counting
from handheld.counting import Config, Layer
from handheld.errors import CheckpointError

Grid = Literal["int8", "int4", "int2", "palette"]
Container = Grid | Literal["float32"]
BITS: Mapping[str, int] = {"int8": 8, "int4": 4, "int2": 2}
FLOAT = ("conv_in", "conv_out", "add_embedding", "time_embedding", "post_quant_conv")
"""Layers that stay in float: a thousandth of the weights, and all of the signal passes them."""


@dataclass(frozen=True)
class Stored:
    """How a layer's weight is kept.

    Parameters
    ----------
    grid : {'int8', 'int4', 'int2'}
        Palettes are no grid that a recipe can choose.
    group_size : int, optional
        Weights that share a scale; a whole output channel if not given.
    float_input : bool
        Whether the layer's input is not to be rounded.
    """

    grid: Grid
    group_size: int | None = None
    float_input: bool = False

    def nbytes(self, shape: tuple[int, ...]) -> float:
        """Return the bytes of codes and scales: float32 per channel, 16 bits per group."""
        weights, size = math.prod(shape), self.group_size
        scale_bits = 32 * shape[0] if size is None else 16 * (weights // size)
        return (weights * BITS[self.grid] + scale_bits) / 8


CONTAINERS: Mapping[str, Mapping[tuple[str, str], Grid]] = {
    "litert-cpu": {
        ("conv3x3", "int4"): "int8",
        ("conv3x3", "int2"): "int8",
        ("conv1x1", "int4"): "int8",
        ("conv1x1", "int2"): "int8",
    },
    "litert-qualcomm": {("conv3x3", "int4"): "int8", ("conv3x3", "int2"): "int8"},
    "onnx": {
        ("conv3x3", "int4"): "int8",
        ("conv3x3", "int2"): "int8",
        ("conv1x1", "int4"): "int8",
        ("conv1x1", "int2"): "int8",
    },
    "onnx-qnn": {
        (kind, grid): "int8"
        for kind in ("linear", "conv3x3", "conv1x1")
        for grid in ("int4", "int2")
    },
    "executorch-xnnpack": {
        ("linear", "int2"): "int4",
        ("conv1x1", "int2"): "int4",
        ("conv3x3", "int4"): "int8",
        ("conv3x3", "int2"): "int8",
    },
}
"""Grids that a target holds in a wider one, because its kernels read no narrower: the codes and
the picture stay the same, the file grows."""

FLOAT_INPUTS: Mapping[str, Mapping[str, Container]] = {
    "litert-cpu": {"linear": "int8", "conv3x3": "int8", "conv1x1": "int8"},
    "executorch-xnnpack": {"linear": "float32", "conv3x3": "float32", "conv1x1": "float32"},
}
"""What holds a layer whose input is not rounded, on targets that round others while running."""


SLICED: Final[dict[str, int]] = {"litert-cpu": 4_000_000}
"""Targets that have narrower kernels for linear layers than for convolutions, and from how many
weights on a 3x3 convolution is nine linear layers, one for each place of its kernel."""


def sliced(target: str, kind: str, stored: Stored, weights: int) -> bool:
    """Return whether a target makes nine linear layers of a convolution."""
    narrow = stored.grid in ("int4", "int2") and stored.group_size is None
    plain = kind == "conv3x3" and not stored.float_input
    return plain and narrow and weights >= SLICED.get(target, math.inf)


def container(target: str, kind: str, stored: Stored, weights: int) -> Container:
    """Return what a target holds a layer's codes in.

    Parameters
    ----------
    target : str
        Without a SoC.
    kind : {'linear', 'conv1x1', 'conv3x3'}
    stored : Stored
    weights : int
        How many the layer has.
    """
    if sliced(target, kind, stored, weights):
        kind = "linear"
    own = FLOAT_INPUTS.get(target, {}) if stored.float_input else {}
    if kind in own:
        plain = stored.group_size is None and stored.grid != "palette"
        return own[kind] if plain else "float32"
    return CONTAINERS.get(target, {}).get((kind, stored.grid), stored.grid)


PLANNED = ("executorch-xnnpack", "litert-cpu")
"""Targets whose file sizes are planned; their files hold codes, scales and float32."""


@dataclass(frozen=True)
class Shape:
    """A model before it exists.

    Parameters
    ----------
    unet, decoder : mapping
        diffusers configurations.
    latent : (int, int)
        Height and width of the latent that is counted.
    grids : mapping of layer to Stored
        Of the U-Net; other layers are float.
    decoder_floats : frozenset of str
        Layers of the decoder whose inputs are not to be rounded.
    steps : int
        U-Net runs for one picture, guidance included.
    notes : tuple of str
        What is estimated.
    """

    unet: Config
    decoder: Config
    latent: tuple[int, int]
    grids: Mapping[str, Stored] = field(default_factory=dict)
    decoder_floats: frozenset[str] = frozenset()
    steps: int = 20
    notes: tuple[str, ...] = ()

    @cached_property
    def layers(self) -> list[Layer]:
        """The U-Net's layers."""
        return counting.count_unet(self.unet, self.latent)

    @cached_property
    def decoder_layers(self) -> list[Layer]:
        """The decoder's layers."""
        return counting.count_decoder(self.decoder, self.latent)

    @property
    def quantizable(self) -> list[Layer]:
        """The U-Net's layers that may carry codes."""
        return [x for x in self.layers if len(x.shape) > 1 and not x.name.startswith(FLOAT)]

    def noted(self, note: str) -> Shape:
        """Return the shape with a note."""
        return replace(self, notes=(*self.notes, note))


def architecture(name: str, size: int | None = None) -> Shape:
    """Read the configurations of a checkpoint's folder, or of an architecture known by name.

    A student's grids are read, too, and how many steps ``handheld.json`` asks for.

    Parameters
    ----------
    name : str
        A folder with ``unet/config.json`` and ``vae/config.json``, or ``sdxl``.
    size : int, optional
        Picture width and height in pixels; the configuration's own by default.

    Raises
    ------
    CheckpointError
        If there is no such folder or name, or a configuration is broken or unsupported.
    """
    known = Path(str(files("handheld"))) / "architectures"
    folder = Path(name)
    if not (folder / "unet" / "config.json").is_file():
        folder = known / name
        if folder.parent != known or not folder.is_dir():
            names = ", ".join(sorted(p.name for p in known.iterdir() if p.is_dir()))
            raise CheckpointError(
                f"there are no configurations under '{name}'",
                remedy=f"give a folder with unet/config.json and vae/config.json, or {names}",
            )
    unet, vae = (_config(folder / part / "config.json") for part in ("unet", "vae"))
    shape = shape_of(unet, vae, size, str(folder))
    return replace(
        shape,
        grids=_grids(folder / "unet"),
        decoder_floats=_float_inputs(folder / "vae"),
        steps=_steps(folder, shape.steps),
    )


def _float_inputs(folder: Path) -> frozenset[str]:
    """Return the layers of a student that compute in float."""
    path = folder / "quantization.json"
    names = _config(path).get("float_inputs", []) if path.is_file() else []
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise CheckpointError("is no list of layers", path=path, field="float_inputs")
    return frozenset(names)


def _grids(folder: Path) -> dict[str, Stored]:
    """Return the grids of a student's layers, none of a checkpoint in float."""
    path = folder / "quantization.json"
    if not path.is_file():
        return {}
    layers, floats = _config(path).get("layers", {}), _float_inputs(folder)
    try:
        grids = {n: Stored(x["grid"], x.get("group_size"), n in floats) for n, x in layers.items()}
        _ = [BITS[stored.grid] for stored in grids.values()]
    except (AttributeError, KeyError, TypeError):
        raise CheckpointError(
            f"is no table of layers, each with a grid of {', '.join(BITS)}",
            path=path,
            field="layers",
        ) from None
    return grids


def _steps(folder: Path, default: int) -> int:
    """Return the U-Net's runs for one picture, two of each step with guidance."""
    path = folder / "handheld.json"
    settings = _config(path) if path.is_file() else {}
    steps = settings.get("steps") or default
    if not isinstance(steps, int):
        raise CheckpointError("is no number of steps", path=path, field="steps")
    return steps * (1 if settings.get("guidance", 1.0) == 1.0 else 2)


def shape_of(unet: Config, vae: Config, size: int | None, path: str) -> Shape:
    """Make a shape from configurations, and count it once so that what is wrong shows.

    Raises
    ------
    CheckpointError
        If a configuration lacks what is needed or is not supported.
    """
    try:
        levels = len(vae.get("block_out_channels") or vae["decoder_block_out_channels"])
        scale = 2 ** (levels - 1)
        side = int(unet["sample_size"]) if size is None else size // scale
        if side < 1 or (size is not None and size % scale):
            raise CheckpointError(
                f"{size} pixels are no multiple of {scale}", path=path, remedy="choose another size"
            )
        shape = Shape(dict(unet), dict(vae), (side, side))
        _ = shape.layers, shape.decoder_layers
    except KeyError as e:
        raise CheckpointError("is missing", path=path, field=str(e.args[0])) from None
    except (TypeError, ValueError, IndexError) as e:
        raise CheckpointError(f"has a configuration that cannot be counted: {e}", path=path) from e
    return shape


def _config(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError("is missing", path=path, remedy="complete the checkpoint") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as e:
        raise CheckpointError(f"is not readable JSON: {e}", path=path) from None
    if not isinstance(value, dict):
        raise CheckpointError("is no JSON object", path=path)
    return value


def bits_per_weight(shape: Shape) -> float | None:
    """Return the mean over quantized weights, scales included; None without any."""
    held = [x for x in shape.layers if x.name in shape.grids]
    weights = sum(x.weights for x in held)
    if not weights:
        return None
    return 8 * sum(shape.grids[x.name].nbytes(x.shape) for x in held) / weights


def unet_bytes(shape: Shape, target: str | None = None, other_bits: int = 32) -> int:
    """Return the bytes of the U-Net's parameters.

    Parameters
    ----------
    target : str, optional
        Counts the containers that this target needs; without one, the grids themselves.
    other_bits : int
        Of biases, norms and layers that stay in float.
    """
    return stored_bytes(shape.layers, shape.grids, target, other_bits)


def decoder_bytes(shape: Shape, target: str | None = None, other_bits: int = 32) -> int:
    """Return the bytes of the decoder's parameters; see :func:`decoder_grids`."""
    return stored_bytes(shape.decoder_layers, decoder_grids(shape), target, other_bits)


def decoder_grids(shape: Shape) -> dict[str, Stored]:
    """Return the grids of the decoder's layers: int8, or none where the U-Net has none."""
    if not shape.grids:
        return {}
    return {
        x.name: Stored("int8", float_input=x.name in shape.decoder_floats)
        for x in shape.decoder_layers
        if len(x.shape) > 1 and not x.name.endswith(("conv_in", "conv_out", "post_quant_conv"))
    }


def stored_bytes(
    layers: Sequence[Layer],
    grids: Mapping[str, Stored],
    target: str | None = None,
    other_bits: int = 32,
) -> int:
    """Return the bytes of layers' parameters; see :func:`unet_bytes`."""
    total = 0.0
    for layer in layers:
        stored = grids.get(layer.name)
        if stored is None:
            total += layer.params * other_bits / 8
            continue
        held = container(target or "", layer.kind, stored, layer.weights)
        if held == "float32":
            total += layer.weights * 4
        else:
            total += (stored if held == stored.grid else Stored(held)).nbytes(layer.shape)
        total += (layer.params - layer.weights) * other_bits / 8
    return round(total)


def figures(shape: Shape) -> dict[str, Any]:
    """Return what the tables show of a shape; MACs of one U-Net run at batch 1."""
    unet = counting.summary(shape.layers)
    decoder = counting.summary(shape.decoder_layers)
    float_bytes = unet_bytes(replace(shape, grids={}), other_bits=16)
    ours = unet_bytes(shape, other_bits=16)
    return {
        "unet_params": unet["params"],
        "unet_macs": unet["macs"],
        "decoder_params": decoder["params"],
        "decoder_macs": decoder["macs"],
        "steps": shape.steps,
        "bits_per_weight": bits_per_weight(shape),
        "unet_bytes": ours,
        "times_smaller_than_fp16": float_bytes / ours,
        "target_bytes": {t: unet_bytes(shape, t) + decoder_bytes(shape, t) for t in PLANNED},
        "notes": list(shape.notes),
    }
