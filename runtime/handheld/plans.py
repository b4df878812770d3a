"""What a model will weigh, compute and occupy, before it exists."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import Field, ValidationError

from handheld import banding, counting, cutting, memory_plan, planning, precision
from handheld.bundle import describe_validation
from handheld.counting import Layer
from handheld.errors import UsageError
from handheld.planning import Shape, Stored
from handheld.program import Model
from handheld.socs import is_soc

CHANNEL_BYTES: Final[Mapping[str, int]] = {"litert-cpu": 8}
"""Of each quantized channel in a file: LiteRT keeps an int64 zero point beside every scale."""
LAYER_BYTES: Final[Mapping[str, int]] = {"executorch-xnnpack": 1400, "litert-cpu": 1000}
"""Operators and tensors around one layer in a file: 1003 to 1023 in LiteRT's files of critter's
students, 943 to 1193 in those of SDXL's; 1310 to 1590 in ExecuTorch's of critter's."""
SEGMENT_BYTES = 64 * 10**6
"""Of one artifact, the size that the exporter aims at."""


PARTS: Final = ("litert-cpu",)
"""Targets for which an export cuts decoders into bands, and large attentions into parts."""
OFF: Final = 0.10
"""How far a run's peak may lie from the plan's; what is closer to a budget is not decided."""
Verdict = Literal["fits", "close", "too much"]


class Engine(Model):
    """What an engine takes in memory besides weights and tensors, fitted to runs.

    Parameters
    ----------
    process_bytes : int
        The harness and the engine's libraries.
    artifact_bytes, layer_bytes : int
        Of each loaded artifact, and of each of its layers.
    source : str
        Where the figures are from.
    """

    process_bytes: int = Field(gt=0)
    artifact_bytes: int = Field(ge=0)
    layer_bytes: int = Field(ge=0)
    source: str = Field(min_length=1)


@cache
def engines() -> Mapping[str, Engine]:
    """Return what is known of engines, by target."""
    text = (files("handheld") / "engine_memory.toml").read_text(encoding="utf-8")
    return {name: Engine.model_validate(row) for name, row in tomllib.loads(text).items()}


class Rate(Model):
    """How fast a device computes.

    Parameters
    ----------
    gmacs_per_second : float
        Sustained on whole models of the target, measured or published.
    source : str
        Where the figure is from.
    """

    gmacs_per_second: float = Field(gt=0)
    source: str = Field(min_length=1)


class Rates(Model):
    """What a device computes: a rate for each target.

    Parameters
    ----------
    device : str
    soc : str, optional
        Other devices with the same one are taken to compute as fast.
    targets : dict of str to Rate
    """

    device: str
    soc: str | None = None
    targets: dict[str, Rate]


@cache
def devices() -> tuple[Rates, ...]:
    """Return the devices whose rates come along."""
    text = (files("handheld") / "device_rates.toml").read_text(encoding="utf-8")
    return tuple(
        Rates.model_validate({"device": row.pop("name"), **row})
        for row in tomllib.loads(text)["device"]
    )


def rates_of(device: str) -> Rates:
    """Return the rates of a device that comes along.

    Raises
    ------
    UsageError
        If there is none of that name.
    """
    for rates in devices():
        if rates.device.casefold() == device.casefold():
            return rates
    raise UsageError(
        f"no rates of '{device}' are known",
        remedy=f"give a table with --rates; known are {'; '.join(r.device for r in devices())}",
    )


def rates_of_soc(soc: str) -> Rates | None:
    """Return the rates of a device with a SoC, None if there is none."""
    return next((r for r in devices() if r.soc and is_soc(soc, r.soc)), None)


def read_rates(path: Path) -> Rates:
    """Read a device table in TOML.

    Raises
    ------
    UsageError
        If there is none, or a field is missing or out of range.
    """
    try:
        return Rates.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except ValidationError as e:
        message, field = describe_validation(e)
        raise UsageError(message, path=path, field=field, remedy="correct the table") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as e:
        raise UsageError(f"is no readable TOML: {e}", path=path, remedy="correct it") from None


def at_size(shape: Shape, width: int, height: int) -> Shape:
    """Return the shape for another picture size.

    Raises
    ------
    UsageError
        If the decoder cannot draw pictures of this size.
    """
    levels = shape.decoder.get("block_out_channels") or shape.decoder["decoder_block_out_channels"]
    scale = 2 ** (len(levels) - 1)
    if min(width, height) < scale or width % scale or height % scale:
        raise UsageError(
            f"{width}x{height} pixels are no multiple of {scale}", remedy="choose another size"
        )
    return replace(shape, latent=(height // scale, width // scale))


def at_precision(shape: Shape, name: str) -> Shape:
    """Return the shape with the grids of a precision; a student keeps its own.

    Raises
    ------
    UsageError
        If there is no such precision.
    """
    rule = precision.find(name)
    if shape.grids:
        return shape
    grids = {}
    for layer in shape.layers:
        if len(layer.shape) < 2:
            continue
        choice = rule.choose("unet", layer.name, layer.shape)
        if choice is not None:
            grids[layer.name] = Stored(choice.grid, choice.group_size)
    return replace(shape, grids=grids)


def peak_bytes(shape: Shape, target: str) -> dict[str, int] | None:
    """Estimate the peak memory of a run, with packed weights on disk.

    The model is cut as an export cuts it, and :func:`handheld.memory_plan.peak_bytes` says what its
    artifacts take together. Weights are those of files; workspaces and tensors are estimated here.

    Returns
    -------
    dict or None
        Bytes by residency; None where nothing is known of the target's engine.
    """
    engine = engines().get(target)
    if engine is None:
        return None
    grids = planning.decoder_grids(shape)
    unet = cutting.group(cutting.units(shape.layers), cutting.MOST_WEIGHTS[target])
    found = [_part(p, shape.grids, target) for p in unet]
    bands = _bands(shape) if target in PARTS else None
    if bands is None:
        decoder = cutting.group(cutting.units(shape.decoder_layers), cutting.MOST_WEIGHTS[target])
        between = cutting.held_between(decoder)
        found += [_part(p, grids, target) for p in decoder]
    else:
        drawn, between = bands
        found += [_part(p, grids, target, part) for p, part in drawn]
    artifacts = [
        memory_plan.Weights(str(i), nbytes + engine.layer_bytes * count, workspace)
        for i, (nbytes, count, workspace) in enumerate(found)
    ]
    tensors = 4 * max(cutting.held_between(unet), between)
    calls = range(len(artifacts))

    def peak(stay: bool) -> int:
        return memory_plan.peak_bytes(
            [stay for _ in calls], True, tensors, True, artifacts, calls, first=False,
            process=engine.process_bytes, loaded=engine.artifact_bytes,
        )  # fmt: skip

    return {"resident": peak(True), "stream": peak(False)}


def _part(
    units: Sequence[cutting.Unit], grids: Mapping[str, Stored], target: str, rows: float = 1.0
) -> tuple[int, int, int]:
    """Return an artifact's bytes, its number of layers, and the workspace of part of its rows."""
    layers = [x for unit in units for x in unit.layers]
    wanted = _window(layers)
    for x in layers:
        if x.kind == "norm":  # what comes in, without its mean, and normalised
            wanted = max(wanted, 3 * x.outputs)
        elif x.table is not None:  # queries, keys, values, what they give, and copies by heads
            heads, queries, keys = x.table
            if target in PARTS:
                heads, queries = banding.attention(heads, queries, keys)
            wanted = max(wanted, heads * queries * keys + 6 * x.outputs)
    # Codes that the engine widens to float32 when it loads them.
    widened = sum(
        4 * x.weights - round(Stored("int8").nbytes(x.shape))
        for x in layers
        if (stored := grids.get(x.name)) is not None
        and stored.float_input
        and planning.container(target, x.kind, stored, x.weights) == "int8"
    )
    return _file(layers, grids, target) + widened, len(layers), round(4 * wanted * rows)


def _bands(shape: Shape) -> tuple[list[tuple[list[cutting.Unit], float]], int] | None:
    """Cut a decoder into passes over bands of rows as an export does.

    Returns
    -------
    passes : list
        Units of each, and which part of the rows a call works on.
    between : int
        Elements of the tensors between passes.
    None if the decoder is drawn whole.
    """
    units = cutting.units(shape.decoder_layers)
    megabytes = banding.choose(4 * max(u.elements for u in units))
    if megabytes is None:
        return None
    if shape.decoder.get("_class_name") == "AutoencoderTiny":
        return _windows(units, shape.latent, megabytes * 1e6)
    # Passes hold one convolution each. Tensors between them are in float16, half of an element, and
    # those of a pass are freed while the next one writes.
    largest = max(u.elements for u in units)
    part = megabytes * 1e6 / (4 * largest)
    return [([u], part) for u in units], round(largest / 2 + 2 * part * largest)


def _windows(
    units: Sequence[cutting.Unit], latent: tuple[int, int], limit: float
) -> tuple[list[tuple[list[cutting.Unit], float]], int]:
    levels: list[list[cutting.Unit]] = []
    for unit in units:
        if not levels or levels[-1][-1].block != unit.block:
            levels.append([])
        levels[-1].append(unit)
    found, between = [], 0
    height, width = latent
    for i, level in enumerate(levels):
        scale = 2 if i else 1
        layers = [x for u in level for x in u.layers]
        reach = sum(x.kind == "conv3x3" for x in layers)
        source = layers[0].shape[1] * height * width
        row = max(layers[0].shape[1], *(x.shape[0] for x in layers)) * width * scale**2
        cut = banding.windows(height, -(-reach // scale), 4 * row, limit)
        found.append((level, cut.rows / height))
        result, calls = layers[-1].outputs, len(cut.starts)
        between = max(between, source + result)
        if calls > 1:  # what a call reads and gives; it is copied to its place at once
            band = (source + result) * cut.rows // height
            between = max(between, source + result + band)
        height, width = height * scale, width * scale
    return found, between


def verdict(peak: int, least: int, budget: int) -> Verdict:
    """Say whether a run stays within a budget; "close" where an estimate cannot tell."""
    if least > budget or (1 - OFF) * peak > budget:
        return "too much"
    return "fits" if (1 + OFF) * peak <= budget else "close"


def file_bytes(shape: Shape, target: str) -> tuple[int, int]:
    """Return the bytes of the U-Net's and the decoder's files on a target."""
    unet = [x for unit in cutting.units(shape.layers) for x in unit.layers]
    return (
        _file(unet, shape.grids, target),
        _file(shape.decoder_layers, planning.decoder_grids(shape), target),
    )


def _file(layers: Sequence[Layer], grids: Mapping[str, Stored], target: str) -> int:
    channels = sum(x.shape[0] for x in layers if x.name in grids)
    around = CHANNEL_BYTES.get(target, 0) * channels + LAYER_BYTES.get(target, 0) * len(layers)
    # Each of the nine has scales of its own.
    sliced = (
        x for x in layers
        if x.name in grids and planning.sliced(target, x.kind, grids[x.name], x.weights)
    )  # fmt: skip
    each = CHANNEL_BYTES.get(target, 0) + 4
    around += sum(8 * (each * x.shape[0] + LAYER_BYTES.get(target, 0)) for x in sliced)
    return planning.stored_bytes(layers, grids, target) + around


def activation_bytes(shape: Shape) -> int:
    """Estimate the float32 activations of the hungrier half: U-Net with skips, or decoder.

    Counts the three largest neighbours among the layers' outputs (a layer's input, its output and
    the residual), and in the U-Net what waits for the way up. Engines' work space is not counted.
    """
    skips = sum(x.outputs for x in shape.layers if x.name.startswith("conv_in"))
    skips += sum(
        x.outputs
        for x in shape.layers
        if x.name.startswith("down_blocks.") and x.name.endswith((".conv2", ".downsamplers.0.conv"))
    )
    return 4 * max(skips + _window(shape.layers), _window(shape.decoder_layers))


def _window(layers: Sequence[Layer]) -> int:
    outputs = [x.outputs for x in layers]
    return max(sum(outputs[i : i + 3]) for i in range(len(outputs)))


def row(
    shape: Shape, target: str, *, budget: int | None = None, rates: Rates | None = None
) -> dict[str, Any]:
    """Return what a plan says of one model on one target at one size.

    Parameters
    ----------
    budget : int, optional
        Bytes of peak memory that must do.
    rates : Rates, optional
        Without it, or without the target in it, latency is unknown.

    Returns
    -------
    dict
        Bytes, MACs and ``seconds`` (an estimate, or None). By residency: ``peak_bytes``, an
        estimate; ``least_peak_bytes``, what weights and tensors alone take; and, with a budget,
        ``verdict`` and ``exceeds``, which says whether even the least is too much.
    """
    unet, decoder = file_bytes(shape, target)
    activations = activation_bytes(shape)
    # The next artifact is mapped while one runs, and its pages come with its own run.
    streamed = min(SEGMENT_BYTES, max(unet, decoder))
    peaks = {"resident": unet + decoder + activations, "stream": streamed + activations}
    unet_figures = counting.summary(shape.layers)
    decoder_figures = counting.summary(shape.decoder_layers)
    estimated = peak_bytes(shape, target)
    found: dict[str, Any] = {
        "target": target,
        "width": shape.latent[1] * _scale(shape),
        "height": shape.latent[0] * _scale(shape),
        "steps": shape.steps,
        "unet_params": unet_figures["params"],
        "decoder_params": decoder_figures["params"],
        "unet_macs": unet_figures["macs"],
        "decoder_macs": decoder_figures["macs"],
        "bits_per_weight": planning.bits_per_weight(shape),
        "unet_bytes": unet,
        "decoder_bytes": decoder,
        "activation_bytes": activations,
        "least_peak_bytes": peaks,
        "peak_bytes": estimated,
        "peak_source": engines()[target].source if estimated else None,
        "verdict": {k: verdict(p, peaks[k], budget) for k, p in estimated.items()}
        if estimated and budget is not None
        else None,
        "exceeds": {k: v > budget for k, v in peaks.items()} if budget is not None else None,
        "notes": list(shape.notes),
    }
    found["seconds"], found["rate_source"] = seconds(found, rates)
    return found


def seconds(row: Mapping[str, Any], rates: Rates | None) -> tuple[float | None, str | None]:
    """Return how long a picture of a row takes, and where the rate is from; None if unknown."""
    rate = rates.targets.get(row["target"]) if rates else None
    if rate is None:
        return None, None
    macs = row["unet_macs"] * row["steps"] + row["decoder_macs"]
    return macs / (rate.gmacs_per_second * 1e9), rate.source


def _scale(shape: Shape) -> int:
    levels = shape.decoder.get("block_out_channels") or shape.decoder["decoder_block_out_channels"]
    return int(math.pow(2, len(levels) - 1))
