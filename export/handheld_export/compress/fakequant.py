"""Layers that compute with the weights their codes will give, and learn through the rounding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from handheld.precision import Choice
from handheld_export.quantization import LIMITS, QuantizedWeight


def _round(x: Tensor) -> Tensor:
    """Round, with the identity's gradient (Bengio et al., arXiv 1308.3432)."""
    return x + (x.round() - x).detach()


def _bfloat16(x: Tensor) -> Tensor:
    return x + (x.bfloat16().to(x.dtype) - x).detach()


class FakeQuantized(nn.Module):
    """What quantized layers share; the weight stays in float and is rounded in every pass.

    The scale is learned with the step size's gradient (LSQ, Esser et al., arXiv 1902.08153). It is
    kept as its logarithm, so that it stays positive whatever the optimizer does.
    """

    weight: Tensor
    log_scale: nn.Parameter
    grid: str
    group_size: int | None

    def set_up(self, start: QuantizedWeight) -> None:
        """Take grid, scales and codes from a quantized weight.

        Where rounding compensated errors, a code is not that of the nearest value; the weight then
        moves to what its code says, so that training starts from the codes given.
        """
        self.grid, self.group_size = start.grid, start.group_size
        self.log_scale = nn.Parameter(torch.from_numpy(start.scales).log())
        same = torch.from_numpy(self.frozen().codes == start.codes).to(self.weight.device)
        given = torch.from_numpy(start.dequantize()).to(self.weight)
        with torch.no_grad():
            self.weight.copy_(torch.where(same, self.weight, given))

    def scale(self) -> Tensor:
        """Scales as they ship: float32 [out], or bfloat16 values [out, groups]."""
        low, high = LIMITS[self.grid]
        gain = (self.weight.numel() / self.log_scale.numel() * max(-low, high)) ** -0.5
        damped = self.log_scale * gain + (self.log_scale * (1 - gain)).detach()
        scale = damped.float().exp()
        return _bfloat16(scale) if self.group_size else scale

    def _laid_out(self) -> tuple[Tensor, Tensor]:
        scale = self.scale()
        if self.group_size is None:
            return self.weight, scale.view(-1, *([1] * (self.weight.ndim - 1)))
        grouped = self.weight.view(*scale.shape, self.group_size)
        return grouped, scale[..., None]

    def rounded(self) -> Tensor:
        """Return ``code * scale`` in the weight's shape."""
        low, high = LIMITS[self.grid]
        weight, scale = self._laid_out()
        codes = _round((weight.float() / scale).clamp(low, high))
        return (codes * scale).view(self.weight.shape)

    @torch.no_grad()
    def frozen(self) -> QuantizedWeight:
        """Return codes and scales as they ship."""
        low, high = LIMITS[self.grid]
        weight, scale = self._laid_out()
        codes = (weight.float() / scale).clamp(low, high).round()
        return QuantizedWeight.checked(
            self.grid,
            codes.view(self.weight.shape).to(torch.int8).cpu().numpy().copy(),
            self.scale().float().cpu().numpy().copy(),
            self.group_size,
        )


class FakeLinear(nn.Linear, FakeQuantized):
    """A linear layer with a rounded weight."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        return functional.linear(input, self.rounded(), self.bias)


class FakeConv2d(nn.Conv2d, FakeQuantized):
    """A convolution with a rounded weight."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        made: Tensor = self._conv_forward(input, self.rounded(), self.bias)
        return made


def layers(model: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """Return all linear layers and convolutions by module path."""
    return {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}


def insert(model: nn.Module, start: Mapping[str, QuantizedWeight]) -> None:
    """Let layers compute with rounded weights, from the given scales on."""
    for name, quantized in start.items():
        layer = model.get_submodule(name)
        # The class alone differs: parameters, hooks and names stay as they are.
        layer.__class__ = FakeLinear if isinstance(layer, nn.Linear) else FakeConv2d
        cast(Any, layer).set_up(quantized)


def extract(model: nn.Module) -> dict[str, QuantizedWeight]:
    """Return the codes of all layers that :func:`insert` changed."""
    found = model.named_modules()
    return {n: m.frozen() for n, m in found if isinstance(m, FakeQuantized)}


def round_all(
    weights: Mapping[str, Tensor], choices: Mapping[str, Choice]
) -> dict[str, QuantizedWeight]:
    """Round weights with scales by alternating optimisation."""
    return {n: fit(weights[f"{n}.weight"].numpy(), c) for n, c in choices.items()}


def fit(weight: np.ndarray[Any, Any], choice: Choice, rounds: int = 12) -> QuantizedWeight:
    """Quantize with scales of least squared error, by alternating optimisation.

    Codes for the scale, then the scale for the codes, ``s = <w, q> / <q, q>``, as BitsFusion starts
    (arXiv 2406.04333); from several first scales, of which the best result stays.
    For int8 that is rounding to nearest, where nothing is to be gained.

    Parameters
    ----------
    weight : float32 ndarray, ``[out, in]`` or ``[out, in, kh, kw]``
    choice : Choice
    """
    from handheld_export.quantization import round_to_nearest

    start = round_to_nearest(np.ascontiguousarray(weight, dtype=np.float32), choice.grid,
                             choice.group_size)  # fmt: skip
    if choice.grid == "int8":
        return start
    low, high = LIMITS[choice.grid]
    flat = torch.from_numpy(weight.reshape(*start.scales.shape, -1)).float()
    peak = flat.abs().amax(-1, keepdim=True).clamp_min(1e-12)
    best_scale = torch.from_numpy(start.scales)[..., None].clone()
    least = torch.full_like(best_scale, torch.inf)
    for fraction in (0.2, 0.35, 0.5, 0.7, 1.0):
        scale = peak * fraction / (2 if choice.grid == "int2" else high) * 2
        for _ in range(rounds):
            codes = (flat / scale).clamp(low, high).round()
            norm = codes.square().sum(-1, keepdim=True)
            new = (flat * codes).sum(-1, keepdim=True) / norm.clamp_min(1)
            scale = torch.where((norm > 0) & (new > 0), new, scale)
        if choice.group_size:
            scale = scale.bfloat16().float()
        codes = (flat / scale).clamp(low, high).round()
        error = (codes * scale - flat).square().sum(-1, keepdim=True)
        best_scale = torch.where(error < least, scale, best_scale)
        least = torch.minimum(error, least)
    codes = (flat / best_scale).clamp(low, high).round().to(torch.int8)
    return QuantizedWeight.checked(
        choice.grid,
        codes.numpy().reshape(weight.shape),
        np.ascontiguousarray(best_scale[..., 0].numpy(), dtype=np.float32),
        choice.group_size,
    )


class RoundedInput:
    """Rounds what a layer reads as CPU kernels do while running, as long as it is ``enabled``.

    Eight bits with a zero point: a linear layer's input has one scale for each token, a
    convolution's one for the whole picture.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.enabled = False
        self._axes = (1, 2, 3) if isinstance(layer, nn.Conv2d) else (-1,)
        self._handle = layer.register_forward_pre_hook(self._round)

    def remove(self) -> None:
        """Leave the layer as it was."""
        self._handle.remove()

    def _round(self, layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not self.enabled:
            return None
        x: Tensor = inputs[0]
        low = x.amin(self._axes, keepdim=True).clamp(max=0)
        high = x.amax(self._axes, keepdim=True).clamp(min=0)
        scale = ((high - low) / 255).clamp_min(torch.finfo(torch.float32).tiny)
        zero = (-128 - low / scale).round()
        codes = ((x / scale).round() + zero).clamp(-128, 127)
        return ((codes - zero) * scale, *inputs[1:])
