"""Trimming: fewer resnet-attention pairs, fewer transformer layers, no middle block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from handheld import counting
from handheld.errors import UsageError
from handheld.planning import Shape
from handheld_export.compress.load import Load, macs, params
from handheld_export.compress.step import Context, Step, Student, build_unet
from handheld_export.compress.steps.quantize import calibration

Config = dict[str, Any]
Middle = Literal["keep", "drop"]


class Trim(Step):
    """Take blocks out of the U-Net, by name or by measured importance.

    BK-SDM (arXiv 2305.15798) drops a resnet-attention pair of every stage, the second on the way
    down and a middle one on the way up, and perhaps the middle block. KOALA (arXiv 2312.04005)
    keeps the first transformer layers of each stage. With a budget, pieces go one by one, least
    harm per saved parameter (or MAC) first.
    """

    kind: ClassVar[str] = "trim"
    imitated: ClassVar[bool] = True
    before: ClassVar[tuple[str, ...]] = ("quantize",)

    pairs: list[int] | None = None
    """Pairs to keep in each stage on the way down; the way up keeps one more."""
    depth: list[int] | None = None
    """Transformer layers to keep in each stage."""
    middle: Middle = "keep"
    remove: float | None = Field(default=None, gt=0, lt=1)
    """Budget: this fraction of the U-Net goes, by importance."""
    of: Literal["params", "macs"] = "params"
    calibration: int = Field(default=16, ge=1)
    seed: int = 0

    @model_validator(mode="after")
    def _one_way(self) -> Trim:
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
            return params(of) if self.of == "params" else macs(of)

        now, goal = shape, (1 - self.remove) * size(shape)
        while size(now) > goal:
            options = [replace(shape, unet=c) for c in smaller(now.unet)]
            options = [o for o in options if size(o) < size(now)]
            if not options:
                raise self._exhausted(1 - size(now) / size(shape))
            now = min(options, key=size)
        return now.noted("which pieces go is measured in the run; here the largest go first")

    def load(self, after: Shape, reference: Shape, teacher: Shape) -> Load:
        """Count the forward passes that measure importance."""
        work = 0.0 if self.remove is None else 40 * self.calibration * macs(reference)
        return Load((), (params(reference),), 0.0, work)

    def _exhausted(self, reached: float) -> UsageError:
        return UsageError(
            f"nothing is left to trim at {reached:.0%} of {self.of}, and {self.remove:.0%} are "
            "to go",
            field="trim.remove",
            remedy="ask for less",
        )

    def run(self, student: Student, context: Context) -> Student:
        """Choose, cut, and keep the uncut student as reference for distillation."""
        config = student.unet_config
        side = int(config["sample_size"])
        before = counting.summary(counting.count_unet(config, (side, side)))
        if self.remove is None:
            trimmed = trimmed_config(config, self.pairs, self.depth, self.middle)
        else:
            trimmed = self._by_importance(student, context, before)
        after = counting.summary(counting.count_unet(trimmed, (side, side)))
        student.reference_config, student.reference = config, student.unet
        student.unet = trimmed_weights(config, trimmed, student.unet)
        student.unet_config = trimmed
        student.history.append(
            {
                "step": self.kind,
                "settings": self.model_dump(),
                "params": [before["params"], after["params"]],
                "macs": [before["macs"], after["macs"]],
                "config": {k: trimmed.get(k) for k in CHANGED},
            }
        )
        return student

    def _by_importance(self, student: Student, context: Context, before: Any) -> Config:
        assert self.remove is not None
        config, side = student.unet_config, int(student.unet_config["sample_size"])

        def size(of: Config) -> int:
            return int(counting.summary(counting.count_unet(of, (side, side)))[self.of])

        def outcome(of: Config) -> Tensor:
            unet = build_unet(of, trimmed_weights(config, of, student.unet))
            unet = unet.to(context.device).eval()
            make = calibration(student, context, unet, self.calibration, self.seed)
            result: Tensor = make()
            return result

        now, goal = config, (1 - self.remove) * before[self.of]
        reference = outcome(config)
        while size(now) > goal:
            options = [c for c in smaller(now) if size(c) < size(now)]
            if not options:
                raise self._exhausted(1 - size(now) / before[self.of])
            harm = [float((outcome(c) - reference).square().mean()) for c in options]
            gains = [size(now) - size(c) for c in options]
            now = min(zip(harm, gains, options, strict=True), key=lambda o: o[0] / o[1])[2]
            share = (before[self.of] - size(now)) / (before[self.of] - goal)
            context.watch.step("trimming", min(100, int(100 * share)), 100, {})
        return now


CHANGED = (
    "layers_per_block",
    "transformer_layers_per_block",
    "reverse_transformer_layers_per_block",
    "mid_block_type",
)


def _stages(config: Mapping[str, Any]) -> int:
    return len(config["block_out_channels"])


def _listed(value: Any, count: int) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value] * count


def pairs_of(config: Mapping[str, Any]) -> list[int]:
    """Return the resnet-attention pairs of each stage on the way down."""
    return [int(v) for v in _listed(config.get("layers_per_block", 2), _stages(config))]


def depth_of(config: Mapping[str, Any]) -> list[int]:
    """Return the transformer layers of each stage."""
    depth = _listed(config.get("transformer_layers_per_block", 1), _stages(config))
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
    for i in range(_stages(config)):
        if pairs[i] > 1:
            found.append(trimmed_config(config, [*pairs[:i], pairs[i] - 1, *pairs[i + 1 :]]))
        if depth[i] > 1 and attends[i]:
            less = [*depth[:i], depth[i] - 1, *depth[i + 1 :]]
            found.append(trimmed_config(config, depth=less))
    if config.get("mid_block_type", "UNetMidBlock2DCrossAttn") is not None:
        found.append(trimmed_config(config, middle="drop"))
    return found


def trimmed_weights(
    config: Mapping[str, Any], trimmed: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Take from a U-Net's weights those that a trimmed one keeps, under its names.

    The first pairs of a stage stay on the way down; on the way up the first ones and the last,
    whose inputs no other has. Of each transformer the first layers stay.
    """
    names = source_names(config, trimmed)
    with torch.device("meta"):
        wanted = build_empty(trimmed).state_dict()
    result = {}
    for name, meta in wanted.items():
        source = _source(name, names)
        tensor = weights[source]
        if tensor.shape != meta.shape:
            raise AssertionError(f"{name}: {tuple(tensor.shape)} for {tuple(meta.shape)}")
        result[name] = tensor.clone()
    return result


def build_empty(config: Mapping[str, Any]) -> Any:
    """Make a U-Net of the current default device, without loading anything."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_config(dict(config))


def source_names(config: Mapping[str, Any], trimmed: Mapping[str, Any]) -> dict[str, str]:
    """Map the module paths of pairs that move to where they were before."""
    count = _stages(config)
    moved = {}
    for i, (old, new) in enumerate(zip(pairs_of(config), pairs_of(trimmed), strict=True)):
        if old != new:
            up = f"up_blocks.{count - 1 - i}"
            for part in ("resnets", "attentions"):
                moved[f"{up}.{part}.{new}."] = f"{up}.{part}.{old}."
    return moved


def _source(name: str, moved: Mapping[str, str]) -> str:
    for new, old in moved.items():
        if name.startswith(new):
            return old + name.removeprefix(new)
    return name
