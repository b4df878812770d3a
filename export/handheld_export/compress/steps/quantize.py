"""Post-training quantization: bits by sensitivity, then rounding that compensates its errors."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from handheld import counting
from handheld.planning import Shape
from handheld.reshaping import QuantizeShape, assign
from handheld_export.compress import diffusion
from handheld_export.compress.allocate import bits_per_weight, sensitivity
from handheld_export.compress.fakequant import fit
from handheld_export.compress.gptq import round_model
from handheld_export.compress.load import Load, macs, params
from handheld_export.compress.step import Context, Step, Student, build_unet


class Quantize(QuantizeShape, Step):
    """Give every layer of the U-Net codes and scales.

    Layers get the first grid of their list at least. What the budget leaves goes to the layers
    whose rounding harms the picture most, one grid up at a time.
    """

    kind: ClassVar[str] = "quantize"
    imitated: ClassVar[bool] = True
    before: ClassVar[tuple[str, ...]] = ("quantize", "activations")

    method: Literal["round", "gptq"] = "gptq"
    calibration: int = Field(default=32, ge=1)
    """Pictures' worth of prompts and noise."""
    seed: int = 0
    timestep: int | None = Field(default=None, ge=0, le=999)
    """Where a student of many steps is measured; one of DMD has its own."""

    def load(self, after: Shape, reference: Shape, teacher: Shape) -> Load:
        """Count forward passes: sensitivity runs the U-Net once for each layer and grid."""
        runs = 2.0
        if self.bits or self.megabytes:
            runs += sum(len(c) for c in self.candidates(after.layers).values())
        return Load((), (2 * params(after),), 0.0, runs * self.calibration * macs(after))

    def run(self, student: Student, context: Context) -> Student:
        """Measure, assign, round."""
        unet = build_unet(student.unet_config, student.unet).to(context.device).eval()
        evaluate = calibration(student, context, unet, self.calibration, self.seed, self.timestep)
        side = int(student.unet_config["sample_size"])
        counted = counting.count_unet(student.unet_config, (side, side))
        candidates = self.candidates(counted)
        shapes = {x.name: x.shape for x in counted if x.name in candidates}
        budget = self.budget(shapes, candidates)
        if budget == float("inf"):
            chosen = {n: given[0] for n, given in candidates.items()}
        else:
            measured = sensitivity(
                unet,
                evaluate,
                candidates,
                lambda i, n: context.watch.step("sensitivity", i, n, {}),
            )
            chosen = assign(measured, budget)
        student.reference_config, student.reference = dict(student.unet_config), dict(student.unet)
        reference = evaluate()
        if self.method == "gptq":
            found = round_model(
                unet,
                chosen,
                evaluate,
                watch=lambda i, n: context.watch.step("rounding", i, n, {}),
            )
        else:
            found = {n: fit(student.unet[f"{n}.weight"].numpy(), c) for n, c in chosen.items()}
            for name, coded in found.items():
                layer = unet.get_submodule(name)
                layer.weight.data = torch.from_numpy(coded.dequantize()).to(layer.weight)
        error = float((evaluate() - reference).square().mean() / reference.square().mean())
        student.quantized = found
        counts: dict[str, int] = {}
        for coded in found.values():
            counts[coded.grid] = counts.get(coded.grid, 0) + 1
        student.history.append(
            {
                "step": self.kind,
                "settings": self.model_dump(),
                "bits_per_weight": bits_per_weight(found),
                "layers": counts,
                "relative_error": error,
            }
        )
        return student


def calibration(
    student: Student,
    context: Context,
    unet: nn.Module,
    count: int,
    seed: int,
    timestep: int | None = None,
) -> Any:
    """Return a function that runs the U-Net on fixed prompts and noise, and gives x0.

    A student of DMD is run where it is used: at its own timesteps, of which the first sees pure
    noise. Otherwise noised latents of the dataset are taken, at all noise levels or at
    ``timestep``.
    """
    data, schedule = context.data, context.schedule
    generator = torch.Generator().manual_seed(seed * 1_000_003 + 5)
    rows = torch.randint(len(data), (count,), generator=generator)
    latents = data.rows("latents", rows)
    noise = torch.randn(latents.shape, generator=generator)
    own: list[int] = student.settings.get("timesteps") or []
    distilled = student.settings.get("sampler") == "dmd" and bool(own)
    if distilled:
        t = torch.tensor([own[i % len(own)] for i in range(count)])
    elif timestep is None:
        t = torch.linspace(0, len(schedule) - 1, count).round().long()
    else:
        t = torch.full((count,), timestep)
    noisy = schedule.add_noise(
        latents.to(schedule.alphas), noise.to(schedule.alphas), t.to(schedule.alphas.device)
    ).cpu()
    if distilled:
        first = (t == own[0]).view(-1, 1, 1, 1)
        noisy = torch.where(first, noise, noisy)
    condition = data.condition(rows)
    device = context.device

    @torch.no_grad()
    def evaluate() -> Tensor:
        made = []
        for part in torch.split(torch.arange(count), 16):
            x, at = noisy[part].to(device), t[part].to(device)
            eps = diffusion.predict(unet, x, at, condition[part].to(device))
            made.append(schedule.denoise(x, eps, at))
        return torch.cat(made)

    return evaluate
