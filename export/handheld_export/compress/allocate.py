"""Bits for each layer: measured sensitivity under a budget of bytes."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from handheld.errors import UsageError
from handheld.planning import Stored
from handheld_export.compress.fakequant import fit
from handheld_export.precision import Choice
from handheld_export.quantization import QuantizedWeight


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


@torch.no_grad()
def sensitivity(
    model: nn.Module,
    evaluate: Callable[[], Tensor],
    candidates: Mapping[str, Sequence[Choice]],
    watch: Callable[[int, int], None] = lambda done, count: None,
) -> dict[str, list[Option]]:
    """Measure what quantizing each layer alone does to the result.

    Parameters
    ----------
    evaluate : callable
        Runs the model on fixed inputs.
    candidates : mapping of layer to choices

    Returns
    -------
    dict
        ``damage`` is the squared error of the result relative to its mean square.
    """
    reference = evaluate()
    power = float(reference.square().mean())
    found: dict[str, list[Option]] = {}
    for i, (name, choices) in enumerate(candidates.items()):
        layer: Any = model.get_submodule(name)
        own = layer.weight.detach()
        found[name] = []
        for choice in choices:
            coded = fit(own.float().cpu().numpy(), choice)
            layer.weight.data = torch.from_numpy(coded.dequantize()).to(own)
            damage = float((evaluate() - reference).square().mean()) / power
            layer.weight.data = own
            found[name].append(Option(choice, nbytes(tuple(own.shape), choice), damage))
        watch(i + 1, len(candidates))
    return found


def bits_per_weight(quantized: Mapping[str, QuantizedWeight]) -> float:
    """Return the average over all quantized weights, scales included."""
    weights = sum(q.codes.size for q in quantized.values())
    total = sum(nbytes(q.codes.shape, Choice(q.grid, q.group_size)) for q in quantized.values())
    return 8 * total / max(1, weights)
