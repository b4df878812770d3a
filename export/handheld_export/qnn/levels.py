"""Group normalisations on grids, whose groups may spread very differently.

The variances of all groups are on one grid. Where one group spreads a hundred times as much as
another, the other's variance is a few steps of that grid. So such groups are multiplied first, each
by a power of two that brings it up to the largest; the normalisation takes that out again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from handheld_export.rewrites import PictureGroupNorm

_UNEVEN: Final = 16.0
"""How many times another's spread: up to here variances keep 59 dB by the steps of their grid."""
_MOST: Final = 2.0**10


def level(module: nn.Module, samples: Sequence[Sequence[Tensor]]) -> tuple[str, ...]:
    """Bring groups of normalisations to one level, in place; results stay what they are.

    Parameters
    ----------
    module : torch.nn.Module
        A rewritten segment.
    samples : sequence of sequences of float32 tensors
        Inputs that show how far groups spread.

    Returns
    -------
    tuple of str
        What was done and why; empty if nothing was.
    """
    norms = [m for m in module.modules() if isinstance(m, PictureGroupNorm)]
    seen: dict[nn.Module, Tensor] = {}

    def watch(norm: PictureGroupNorm) -> RemovableHandle:
        def look(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            groups = given[0].reshape(given[0].shape[0], norm.groups, -1).double()
            seen[norm] = seen.get(norm, torch.zeros(())) + groups.var(2, correction=0).mean(0)

        return norm.register_forward_pre_hook(look)

    hooks = [watch(norm) for norm in norms]
    try:
        if norms:
            with torch.no_grad():
                for sample in samples:
                    module(*sample)
    finally:
        for hook in hooks:
            hook.remove()
    ratios = []
    for norm in norms:
        if norm not in seen or not seen[norm].max():
            continue
        below = (seen[norm].max() / seen[norm]).sqrt().clamp(max=_MOST)
        if below.max() >= _UNEVEN:
            norm.level(torch.exp2(torch.floor(torch.log2(below))).float())
            ratios.append(float(below.max()))
    if not ratios:
        return ()
    return (f"{len(ratios)} normalisations of groups {max(ratios):.0f} times apart, levelled",)
