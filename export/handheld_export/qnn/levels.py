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
"""How far apart groups may be, by their spread: so far, by the steps of that grid, the smallest
variance keeps 53 dB, and what is normalised by it 59."""
_MOST: Final = 2.0**6
"""A group that is silent in the samples may not be."""


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
    seen: dict[nn.Module, list[Tensor]] = {}

    def watch(norm: PictureGroupNorm) -> RemovableHandle:
        def look(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            groups = given[0].reshape(given[0].shape[0], norm.groups, -1).double()
            variance, peak = groups.var(2, correction=0).mean(0), groups.abs().amax((0, 2))
            seen.setdefault(norm, []).append(torch.stack([variance, peak]))

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
    for norm, calls in seen.items():
        assert isinstance(norm, PictureGroupNorm)
        found = torch.stack(calls)
        spread = (found[:, 0].mean(0) + norm.eps / norm.factor**2).sqrt()
        apart = spread.max() / spread
        if apart.max() < _UNEVEN:
            continue
        # Far from its mean, a quiet group would need more of the picture's grid than it has.
        peak = found[:, 1].amax(0)
        most = (peak.max() / peak).clamp(max=_MOST)
        norm.level(torch.exp2(torch.floor(torch.log2(torch.minimum(apart, most)))).float())
        ratios.append(float(apart.max()))
    if not ratios:
        return ()
    count = f"{len(ratios)} of {len(norms)}"
    return (f"levelled groups of {count} normalisations, up to {max(ratios):.0f} times apart",)
