"""Trimming: fewer resnet-attention pairs, fewer transformer layers, no middle block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from handheld import counting
from handheld.planning import Shape
from handheld.reshaping import CHANGED, Config, TrimShape, pairs_of, smaller, stages, trimmed_config
from handheld_export.compress.load import Load, macs, params
from handheld_export.compress.step import Context, Step, Student, build_unet
from handheld_export.compress.steps.quantize import calibration


class Trim(TrimShape, Step):
    """Take blocks out of the U-Net, by name or by measured importance.

    BK-SDM (arXiv 2305.15798) drops a resnet-attention pair of every stage, the second on the way
    down and a middle one on the way up, and perhaps the middle block. KOALA (arXiv 2312.04005)
    keeps the first transformer layers of each stage. With a budget, pieces go one by one, least
    harm per saved parameter (or MAC) first.
    """

    kind: ClassVar[str] = "trim"
    imitated: ClassVar[bool] = True
    before: ClassVar[tuple[str, ...]] = ("quantize", "activations")

    calibration: int = Field(default=16, ge=1)
    seed: int = 0

    def load(self, after: Shape, reference: Shape, teacher: Shape) -> Load:
        """Count the forward passes that measure importance."""
        work = 0.0 if self.remove is None else 40 * self.calibration * macs(reference)
        return Load((), (params(reference),), 0.0, work)

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
                raise self.exhausted(1 - size(now) / before[self.of])
            harm = [float((outcome(c) - reference).square().mean()) for c in options]
            gains = [size(now) - size(c) for c in options]
            now = min(zip(harm, gains, options, strict=True), key=lambda o: o[0] / o[1])[2]
            share = (before[self.of] - size(now)) / (before[self.of] - goal)
            context.watch.step("trimming", min(100, int(100 * share)), 100, {})
        return now


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
    count = stages(config)
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
