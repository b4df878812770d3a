"""What the steps of recipes do to a model's shape and bits, without weights or torch."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from handheld import counting
from handheld.counting import Layer
from handheld.errors import UsageError
from handheld.planning import BITS, FLOAT, Shape, Stored
from handheld.precision import Choice
from handheld.program import Model

Config = dict[str, Any]
Middle = Literal["keep", "drop"]
Grid = Literal["int8", "int4", "int2"]


class Reshaping(Model):
    """Settings of a step that changes the model's shape."""

    def shape(self, shape: Shape) -> Shape:
        """Return what the step makes of a shape.

        Raises
        ------
        UsageError
            If it cannot be done.
        """
        raise NotImplementedError


class WarmupShape(Reshaping):
    """One step of the sampler."""

    def shape(self, shape: Shape) -> Shape:
        """Set one step."""
        return replace(shape, steps=1)


class DMDShape(Reshaping):
    """The student's own steps."""

    timesteps: list[int] = Field(default=[399], min_length=1)

    @field_validator("timesteps")
    @classmethod
    def _fall(cls, value: list[int]) -> list[int]:
        if sorted(set(value), reverse=True) != value or not all(0 <= t < 1000 for t in value):
            raise ValueError("timesteps must fall, within 999..0")
        return value

    def shape(self, shape: Shape) -> Shape:
        """Set the number of steps."""
        return replace(shape, steps=len(self.timesteps))


class TrimShape(Reshaping):
    """Take blocks out of the U-Net, by name or as a budget."""

    pairs: list[int] | None = None
    """Pairs to keep in each stage on the way down; the way up keeps one more."""
    depth: list[int] | None = None
    """Transformer layers to keep in each stage."""
    middle: Middle = "keep"
    remove: float | None = Field(default=None, gt=0, lt=1)
    """Budget: this fraction of the U-Net goes, by importance."""
    of: Literal["params", "macs"] = "params"

    @model_validator(mode="after")
    def _one_way(self) -> TrimShape:
        named = self.pairs is not None or self.depth is not None or self.middle != "keep"
        if named == (self.remove is not None):
            raise ValueError("say either what to keep (pairs, depth, middle) or remove = FRACTION")
        return self

    def shape(self, shape: Shape) -> Shape:
        """Make the U-Net smaller; with a budget, the largest pieces go first."""
        if self.remove is None:
            return replace(
                shape, unet=trimmed_config(shape.unet, self.pairs, self.depth, self.middle)
            )

        def size(of: Shape) -> float:
            return float(counting.summary(of.layers)[self.of])

        now, goal = shape, (1 - self.remove) * size(shape)
        while size(now) > goal:
            options = [replace(shape, unet=c) for c in smaller(now.unet)]
            options = [o for o in options if size(o) < size(now)]
            if not options:
                raise self.exhausted(1 - size(now) / size(shape))
            now = min(options, key=size)
        return now.noted("which pieces go is measured in the run; here the largest go first")

    def exhausted(self, reached: float) -> UsageError:
        """Return what to say when there is nothing left."""
        return UsageError(
            f"nothing is left to trim at {reached:.0%} of {self.of}, and {self.remove:.0%} are "
            "to go",
            field="trim.remove",
            remedy="ask for less",
        )


class QuantizeShape(Reshaping):
    """Give every layer of the U-Net a grid, under a budget or without."""

    linear: Annotated[list[Grid], Field(min_length=1)] = ["int4"]
    convolution: Annotated[list[Grid], Field(min_length=1)] = ["int8"]
    embedding: Annotated[list[Grid], Field(min_length=1)] = ["int8"]
    """For the projections of the time embedding inside resnets."""
    group_size: int | None = Field(default=None, ge=1)
    bits: float | None = Field(default=None, gt=0)
    """Budget: bits per weight over the quantized layers, scales included."""
    megabytes: float | None = Field(default=None, gt=0)
    """Budget in bytes instead; MB = 10^6 bytes."""
    keep: list[str] = []
    """Layers that stay in float, with ``*`` for any part of a name, beside those that always do.
    Kernels round activations, too, and where a layer's output is nearly the U-Net's, nothing after
    it makes that error smaller."""

    def candidates(self, layers: Sequence[Layer]) -> dict[str, list[Choice]]:
        """Return the choices for every layer that is quantized at all.

        Raises
        ------
        UsageError
            If a pattern in ``keep`` matches no layer.
        """
        for pattern in self.keep:
            if not any(fnmatchcase(layer.name, pattern) for layer in layers):
                raise UsageError(
                    f"'{pattern}' matches no layer",
                    field="quantize.keep",
                    remedy="name layers as the checkpoint does, with * for any part",
                )
        found: dict[str, list[Choice]] = {}
        for layer in layers:
            if len(layer.shape) < 2 or layer.name.startswith(FLOAT):
                continue
            if any(fnmatchcase(layer.name, pattern) for pattern in self.keep):
                continue
            if layer.kind != "linear":
                grids = self.convolution
            elif layer.name.endswith("time_emb_proj"):
                grids = self.embedding
            else:
                grids = self.linear
            group = self.group_size
            if group and (layer.kind != "linear" or layer.shape[1] % group):
                group = None
            found[layer.name] = [Choice(g, group if g == "int4" else None) for g in grids]
        return found

    def budget(
        self, shapes: Mapping[str, tuple[int, ...]], candidates: Mapping[str, list[Choice]]
    ) -> float:
        """Return the budget in bytes; infinite where the recipe sets none.

        Raises
        ------
        UsageError
            If even the smallest grids take more.
        """
        budget = float("inf")
        if self.megabytes is not None:
            budget = self.megabytes * 1e6
        elif self.bits is not None:
            budget = self.bits / 8 * sum(math.prod(s) for s in shapes.values())
        least = sum(min(nbytes(shapes[n], c) for c in given) for n, given in candidates.items())
        if least > budget:
            bits = 8 * least / sum(math.prod(s) for s in shapes.values())
            raise UsageError(
                f"the budget of {budget / 1e6:.2f} MB cannot be met: the smallest grids need "
                f"{least / 1e6:.2f} MB, {bits:.3f} bits per weight",
                field="quantize.bits" if self.bits else "quantize.megabytes",
                remedy="raise the budget or allow smaller grids",
            )
        return budget

    @model_validator(mode="after")
    def _one_budget(self) -> QuantizeShape:
        if self.megabytes is not None and self.bits is not None:
            raise ValueError("say bits or megabytes, not both")
        lists = (self.linear, self.convolution, self.embedding)
        if self.bits is None and self.megabytes is None and any(len(g) > 1 for g in lists):
            raise ValueError("several grids need a budget to choose by: give bits or megabytes")
        return self

    def shape(self, shape: Shape) -> Shape:
        """Give every layer a grid; under a budget, as if all weights were equally sensitive."""
        shapes = {x.name: x.shape for x in shape.layers}
        candidates = self.candidates(shape.layers)
        budget = self.budget({n: shapes[n] for n in candidates}, candidates)
        if budget == float("inf"):
            chosen = {n: given[0] for n, given in candidates.items()}
        else:
            options = {
                n: [
                    Option(c, nbytes(shapes[n], c), math.prod(shapes[n]) * 4.0 ** -BITS[c.grid])
                    for c in given
                ]
                for n, given in candidates.items()
            }
            chosen = assign(options, budget)
            shape = shape.noted(
                "which layers get more bits is measured in the run; here all are equally sensitive"
            )
        return replace(shape, grids={n: Stored(c.grid, c.group_size) for n, c in chosen.items()})


class DecoderShape(Reshaping):
    """A tiny decoder, AutoencoderTiny, in place of the VAE's."""

    width: int = Field(default=64, ge=1)
    """Channels of every layer."""
    blocks: list[Annotated[int, Field(ge=0)]] = Field(default=[3, 3, 3, 1], min_length=2)
    """Residual blocks at each resolution, smallest first."""

    def config(self, vae: dict[str, Any]) -> dict[str, Any]:
        """Return the tiny autoencoder's configuration."""
        factor = len(vae["block_out_channels"])
        if len(self.blocks) != factor:
            raise UsageError(
                f"the VAE has {factor} resolutions",
                field="decoder.blocks",
                remedy=f"give {factor} numbers",
            )
        return {
            "_class_name": "AutoencoderTiny",
            "in_channels": 3,
            "out_channels": 3,
            "encoder_block_out_channels": [self.width] * factor,
            "decoder_block_out_channels": [self.width] * factor,
            "num_encoder_blocks": self.blocks[::-1],
            "num_decoder_blocks": self.blocks,
            "latent_channels": vae["latent_channels"],
            "upsampling_scaling_factor": 2,
            "act_fn": "relu",
            "upsample_fn": "nearest",
            "latent_magnitude": 3,
            "latent_shift": 0.5,
            "force_upcast": False,
            "scaling_factor": 1.0,
            "shift_factor": 0.0,
        }

    def shape(self, shape: Shape) -> Shape:
        """Replace the decoder."""
        return replace(shape, decoder=self.config(dict(shape.decoder)))


class ActivationsShape(Reshaping):
    """Layers that compute in float."""

    def shape(self, shape: Shape) -> Shape:
        """Leave it, and say so."""
        return shape.noted("which layers compute in float is measured in the run; here none does")


SHAPES: Mapping[str, type[Reshaping]] = {
    "warmup": WarmupShape,
    "dmd": DMDShape,
    "trim": TrimShape,
    "quantize": QuantizeShape,
    "decoder": DecoderShape,
    "activations": ActivationsShape,
}
"""By their names in recipes; other steps of ours change weights alone."""

CHANGED = (
    "layers_per_block",
    "transformer_layers_per_block",
    "reverse_transformer_layers_per_block",
    "mid_block_type",
)


def stages(config: Mapping[str, Any]) -> int:
    """Return how many resolutions a U-Net has."""
    return len(config["block_out_channels"])


def _listed(value: Any, count: int) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value] * count


def pairs_of(config: Mapping[str, Any]) -> list[int]:
    """Return the resnet-attention pairs of each stage on the way down."""
    return [int(v) for v in _listed(config.get("layers_per_block", 2), stages(config))]


def depth_of(config: Mapping[str, Any]) -> list[int]:
    """Return the transformer layers of each stage."""
    depth = _listed(config.get("transformer_layers_per_block", 1), stages(config))
    if any(isinstance(v, (list, tuple)) for v in depth) or config.get(
        "reverse_transformer_layers_per_block"
    ):
        raise UsageError(
            "transformer depths that differ inside a stage cannot be trimmed",
            field="transformer_layers_per_block",
        )
    return [int(v) for v in depth]


def trimmed_config(
    config: Mapping[str, Any],
    pairs: list[int] | None = None,
    depth: list[int] | None = None,
    middle: Middle = "keep",
) -> Config:
    """Return the configuration of a trimmed U-Net.

    Raises
    ------
    UsageError
        If more is asked for than there is, or a list has another length than there are stages.
    """
    result = dict(config)
    for field, key, wanted, own in (
        ("trim.pairs", "layers_per_block", pairs, pairs_of(config)),
        ("trim.depth", "transformer_layers_per_block", depth, depth_of(config)),
    ):
        if wanted is None:
            continue
        if len(wanted) != len(own) or any(
            not 1 <= w <= o for w, o in zip(wanted, own, strict=True)
        ):
            raise UsageError(
                f"{wanted} does not fit a U-Net with {own}",
                field=field,
                remedy="give one number per stage, at least 1 and at most what is there",
            )
        result[key] = list(wanted)
    if middle == "drop":
        result["mid_block_type"] = None
    return result


def smaller(config: Mapping[str, Any]) -> list[Config]:
    """Return all configurations that are one piece smaller."""
    found = []
    pairs, depth = pairs_of(config), depth_of(config)
    attends = ["CrossAttn" in kind for kind in config["down_block_types"]]
    for i in range(stages(config)):
        if pairs[i] > 1:
            found.append(trimmed_config(config, [*pairs[:i], pairs[i] - 1, *pairs[i + 1 :]]))
        if depth[i] > 1 and attends[i]:
            less = [*depth[:i], depth[i] - 1, *depth[i + 1 :]]
            found.append(trimmed_config(config, depth=less))
    if config.get("mid_block_type", "UNetMidBlock2DCrossAttn") is not None:
        found.append(trimmed_config(config, middle="drop"))
    return found


def nbytes(shape: tuple[int, ...], choice: Choice) -> float:
    """Return the bytes of a weight's codes and scales."""
    return Stored(choice.grid, choice.group_size).nbytes(shape)


@dataclass(frozen=True)
class Option:
    """One way to store a layer."""

    choice: Choice
    nbytes: float
    damage: float


def assign(options: Mapping[str, Sequence[Option]], budget: float) -> dict[str, Choice]:
    """Choose one option per layer so that total damage is small within a budget.

    The classic greedy on the lower convex hull of each layer's (bytes, damage): from the cheapest
    options on, always the step that removes most damage per byte, as long as it fits.

    Parameters
    ----------
    options : mapping of layer to options
    budget : float
        Bytes, scales included.

    Raises
    ------
    UsageError
        If not even the cheapest options fit; the message says what would do.
    """
    hulls = {name: _hull(list(given)) for name, given in options.items()}
    at = dict.fromkeys(hulls, 0)
    spent = sum(h[0].nbytes for h in hulls.values())
    if spent > budget:
        raise UsageError(
            f"the budget of {budget / 1e6:.2f} MB cannot be met: the smallest grids need "
            f"{spent / 1e6:.2f} MB",
            remedy="raise the budget or allow smaller grids",
        )
    heap: list[tuple[float, str]] = []

    def offer(name: str) -> None:
        hull, i = hulls[name], at[name]
        if i + 1 < len(hull):
            gain = (hull[i].damage - hull[i + 1].damage) / (hull[i + 1].nbytes - hull[i].nbytes)
            heapq.heappush(heap, (-gain, name))

    for name in hulls:
        offer(name)
    while heap:
        _, name = heapq.heappop(heap)
        hull, i = hulls[name], at[name]
        more = hull[i + 1].nbytes - hull[i].nbytes
        if spent + more <= budget:
            spent += more
            at[name] = i + 1
            offer(name)
    return {name: hulls[name][i].choice for name, i in at.items()}


def _hull(options: list[Option]) -> list[Option]:
    """Keep the options that no mixture of two others beats, cheapest first."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda o: (o.nbytes, o.damage)):
        if kept and option.damage >= kept[-1].damage:
            continue
        while len(kept) > 1 and _slope(kept[-2], option) >= _slope(kept[-2], kept[-1]):
            kept.pop()
        kept.append(option)
    return kept


def _slope(a: Option, b: Option) -> float:
    return (a.damage - b.damage) / (b.nbytes - a.nbytes)
