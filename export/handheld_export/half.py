"""Decoders whose values stay within fp16.

In SDXL's decoder the sums that run from block to block leave fp16, and pictures turn black. All
that reads these sums is either linear or normalises them first, so they can be kept at a power of
two of their size without changing a result: what is added to them is scaled, and epsilons with it.
Squares inside normalisations leave fp16 much earlier, from 256 on, and are scaled likewise.

What to scale is read off a run in float32 on a real input, see :func:`fit`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from diffusers.models.activations import FP32SiLU
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from handheld.errors import TargetError
from handheld_export.rewrites import (
    ExplicitAttention,
    PictureGroupNorm,
    Resnet,
    SiLU,
    SteadySiLU,
    Upsample,
    quantized_of,
)
from handheld_export.segments import Plain

LARGEST = 65504.0
"""The largest number in fp16."""
_ROOM = 8.0
"""Other pictures may reach this many times what the examined one does."""
_FAR = -8.0
"""Normalised pictures stay above it, and keep the two operators that a sigmoid takes."""


def fit(module: nn.Module, examples: Sequence[Tensor]) -> tuple[str, ...]:
    """Scale a rewritten segment, in place, so that its values stay within fp16.

    Parameters
    ----------
    module : torch.nn.Module
        A rewritten :class:`~handheld_export.segments.SegmentModule`; only whole decoders are
        scaled between blocks.
    examples : sequence of float32 tensors
        A real input.

    Returns
    -------
    tuple of str
        What was done and why; empty if nothing was.

    Raises
    ------
    TargetError
        If sums between blocks leave fp16 and the segment is no whole decoder.
    """
    notes = []
    between, _ = _examine(module, examples)
    if between * _ROOM > LARGEST:
        factor = _power(LARGEST / _ROOM / between)
        if _ends(module) is not None:
            scale_stream(module, factor)
            notes.append(
                f"sums between blocks reach {between:.3g} and are kept at 1/{1 / factor:.0f}"
            )
        elif between > LARGEST:
            raise TargetError(
                f"values reach {between:.3g}, more than fp16 holds, and no whole decoder is here "
                "to be scaled",
                remedy="export for another target",
            )
    _, centred = _examine(module, examples)
    most, scaled = math.sqrt(LARGEST), 0
    for name, largest in centred.items():
        if largest * _ROOM > most:
            factor = _power(most / _ROOM / largest)
            norm = module.get_submodule(name)
            assert isinstance(norm, PictureGroupNorm)
            norm.scale(factor)
            scaled += 1
    if scaled:
        largest = max(centred.values())
        notes.append(f"{scaled} normalisations square values up to {largest:.3g}, scaled")
    return tuple(notes)


def steady(module: nn.Module, examples: Sequence[Tensor]) -> tuple[str, ...]:
    """Compute SiLUs that read values far below zero without a sigmoid, in place.

    In QNN's simulation of fp16 the added embedding of critter's stack 3, where a SiLU reads -19,
    had 21.8 dB; a clipped input or a tanh in place of the sigmoid gave 39 to 40, and this 67.8.

    Parameters
    ----------
    module : torch.nn.Module
        A segment, rewritten or not.
    examples : sequence of float32 tensors
        A real input.

    Returns
    -------
    tuple of str
        What was done and why; empty if nothing was.
    """
    least: dict[str, float] = {}

    def watch(name: str, part: nn.Module) -> RemovableHandle:
        def look(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            least[name] = float(given[0].min())

        return part.register_forward_pre_hook(look)

    kinds = (SiLU, nn.SiLU, FP32SiLU)
    hooks = [watch(n, part) for n, part in module.named_modules() if isinstance(part, kinds)]
    try:
        with torch.no_grad():
            module(*examples)
    finally:
        for hook in hooks:
            hook.remove()
    far = {name: x for name, x in least.items() if x < _FAR}
    for name in far:
        parent, _, own = name.rpartition(".")
        setattr(module.get_submodule(parent), own, SteadySiLU())
    if not far:
        return ()
    return (f"{len(far)} SiLUs read values down to {min(far.values()):.3g}: without sigmoid",)


def scale_stream(module: nn.Module, factor: float) -> None:
    """Scale the sums between a whole decoder's blocks by a power of two, in place.

    Results stay what they are; codes do too, their scales are multiplied.
    """
    ends = _ends(module)
    assert ends is not None
    first, norm = ends
    _scale(first, factor)
    norm.eps *= factor**2
    for part in module.modules():
        if isinstance(part, Resnet | ResnetBlock2D):
            part.norm1.eps *= factor**2
            _scale(part.conv2, factor)
            if part.conv_shortcut is not None:
                _scale(part.conv_shortcut, factor, bias_only=True)
        elif isinstance(part, ExplicitAttention) and part.residual:
            part.group_norm.eps *= factor**2
            _scale(part.to_out, factor)
        elif isinstance(part, Upsample) and part.conv is not None:
            _scale(part.conv, factor, bias_only=True)


def _ends(module: nn.Module) -> tuple[nn.Conv2d, PictureGroupNorm] | None:
    """Return where the sums of a whole decoder begin and end."""
    units = list(getattr(module, "units", ()))
    if len(units) < 2 or not isinstance(units[0], Plain) or not isinstance(units[-1], Plain):
        return None
    first, norm = units[0].modules_[-1], units[-1].modules_[0]
    if not isinstance(first, nn.Conv2d) or not isinstance(norm, PictureGroupNorm):
        return None
    return first, norm


def _scale(layer: nn.Linear | nn.Conv2d, factor: float, *, bias_only: bool = False) -> None:
    # Parameters are shared with the module that was rewritten.
    if layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias.detach() * factor, requires_grad=False)
    if bias_only:
        return
    layer.weight = nn.Parameter(layer.weight.detach() * factor, requires_grad=False)
    if (q := quantized_of(layer)) is not None:
        book = None if q.codebook is None else q.codebook * q.codebook.dtype.type(factor)
        scales = q.scales if book is not None else q.scales * q.scales.dtype.type(factor)
        layer.quantized = replace(q, scales=scales, codebook=book)  # type: ignore[assignment]


def _examine(module: nn.Module, examples: Sequence[Tensor]) -> tuple[float, dict[str, float]]:
    """Return the largest value between units, and what each normalisation squares."""
    between: list[float] = [0.0]
    centred: dict[str, float] = {}
    handles = [
        unit.register_forward_hook(lambda _m, _x, y: between.append(float(y.abs().max())))
        for unit in getattr(module, "units", ())
    ]

    def watch(name: str, norm: PictureGroupNorm) -> None:
        def look(_m: nn.Module, given: tuple[Tensor, ...]) -> None:
            x = given[0].unsqueeze(3) if given[0].dim() == 3 else given[0]
            centred[name] = float((x - norm._group_mean(x)).abs().max())

        handles.append(norm.register_forward_pre_hook(look))

    for name, part in module.named_modules():
        if isinstance(part, PictureGroupNorm):
            watch(name, part)
    try:
        with torch.no_grad():
            module(*examples)
    finally:
        for handle in handles:
            handle.remove()
    return max(between), centred


def _power(factor: float) -> float:
    """Return the power of two that is next below."""
    return float(2.0 ** math.floor(math.log2(factor)))
