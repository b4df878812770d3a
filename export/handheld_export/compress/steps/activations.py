"""Mixed precision of activations: the layers whose inputs eight bits do not hold."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from handheld import counting
from handheld.planning import Shape
from handheld.precision import find as find_precision
from handheld.reshaping import ActivationsShape
from handheld_export.compress.allocate import float_inputs
from handheld_export.compress.load import Load, macs, params
from handheld_export.compress.painter import load_decoder, picture_scale
from handheld_export.compress.step import Context, Step, Student, build_unet
from handheld_export.compress.steps.quantize import calibration

_PIXELS = 4 * 128 * 128
"""Decoded at once, and one picture at least: a large VAE takes gigabytes for one of 1024 pixels."""


class Activations(ActivationsShape, Step):
    """Find the layers that are to compute in float.

    CPU kernels round what a layer reads to eight bits while running: a linear layer's input for
    each token, a convolution's for the whole picture. Most layers bear it. The few that do not are
    measured, and keep their codes, but targets leave their inputs alone.
    """

    kind: ClassVar[str] = "activations"
    before: ClassVar[tuple[str, ...]] = ("activations",)

    unet_db: float = Field(default=48.0, gt=0)
    """What rounded inputs are to leave of the U-Net's result, an SNR in dB."""
    decoder_db: float = Field(default=44.0, gt=0)
    most: float = Field(default=0.2, gt=0, le=1)
    """Largest share of the multiply-accumulates, of U-Net and decoder each, that is in float."""
    most_weights: float = Field(default=0.2, gt=0, le=1)
    """Largest share of the weights: engines may hold a layer that computes in float in float32."""
    calibration: int = Field(default=8, ge=1)
    """Pictures' worth of prompts and noise."""
    seed: int = 0

    def load(self, after: Shape, reference: Shape, teacher: Shape) -> Load:
        """Count forward passes: every layer is rounded alone once."""
        decoder = counting.summary(after.decoder_layers)
        work = len(after.quantizable) * macs(after)
        work += len(after.decoder_layers) * float(decoder["macs"])
        return Load((), (params(after), int(decoder["params"])), 0.0, work * self.calibration)

    def run(self, student: Student, context: Context) -> Student:
        """Measure U-Net and decoder, each by what it gives."""
        side = int(student.unet_config["sample_size"])
        unet = build_unet(student.unet_config, _dequantized(student)).to(context.device).eval()
        evaluate = calibration(student, context, unet, self.calibration, self.seed)
        counted = counting.count_unet(student.unet_config, (side, side))
        choices = _rounded("unet", counted, student.quantized)
        found = {"unet": self._choose(unet, evaluate, choices, self.unet_db, context)}

        latents = evaluate()
        vae, decode, factor = load_decoder(student.vae_config, student.vae)
        vae.to(context.device)
        pixels = (side * picture_scale(student.vae_config)) ** 2

        def pictures() -> Tensor:
            parts = torch.split(latents / factor, max(1, _PIXELS // pixels))
            return torch.cat([decode(part.to(context.device)).clamp(-1, 1) for part in parts])

        counted = counting.count_decoder(student.vae_config, (side, side))
        choices = _rounded("decoder", counted, {})
        found["vae"] = self._choose(vae, pictures, choices, self.decoder_db, context)
        student.float_inputs = {name: layers for name, (layers, _) in found.items()}
        student.history.append(
            {
                "step": self.kind,
                "settings": self.model_dump(),
                **{name: figures for name, (_, figures) in found.items()},
            }
        )
        return student

    def _choose(
        self,
        model: nn.Module,
        evaluate: Callable[[], Tensor],
        choices: Mapping[str, counting.Layer],
        wanted_db: float,
        context: Context,
    ) -> tuple[list[str], dict[str, Any]]:
        macs = sum(x.macs for x in choices.values())
        weights = sum(x.weights for x in choices.values())
        watch = context.watch
        chosen, before, after = float_inputs(
            model,
            evaluate,
            choices,
            10 ** (-wanted_db / 10),
            self.most * macs,
            self.most_weights * weights,
            lambda i, n: watch.step("rounding inputs", i, n, {}),
        )
        reached = -10 * math.log10(max(after, 1e-20))
        if reached < wanted_db:
            watch.stage(
                f"{self.kind}: {wanted_db:g} dB are wanted, and {reached:.1f} are reached within "
                f"{self.most:.1%} of the MACs and {self.most_weights:.1%} of the weights"
            )
        figures = {
            "layers_in_float": len(chosen),
            "macs_in_float": sum(choices[n].macs for n in chosen) / macs,
            "weights_in_float": sum(choices[n].weights for n in chosen) / weights,
            "snr_db": [-10 * math.log10(max(before, 1e-20)), reached],
        }
        return sorted(chosen), figures


def _dequantized(student: Student) -> dict[str, Tensor]:
    coded = {f"{n}.weight": q.dequantize() for n, q in student.quantized.items()}
    return student.unet | {n: torch.from_numpy(v) for n, v in coded.items()}


def _rounded(
    component: str, counted: Sequence[counting.Layer], own: Mapping[str, Any]
) -> dict[str, counting.Layer]:
    """Return the layers whose inputs CPU kernels round."""
    int8 = find_precision("int8")
    found = {}
    for layer in counted:
        if own:
            rounded = layer.name in own
        else:
            coded = len(layer.shape) > 1
            rounded = coded and int8.choose(component, layer.name, layer.shape) is not None
        if rounded:
            found[layer.name] = layer
    return found
