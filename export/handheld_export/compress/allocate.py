"""Bits for each layer and its input: measured sensitivity under a budget."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from handheld.precision import Choice
from handheld.reshaping import Option, nbytes
from handheld_export.compress.fakequant import RoundedInput, fit
from handheld_export.quantization import QuantizedWeight


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


@torch.no_grad()
def float_inputs(
    model: nn.Module,
    evaluate: Callable[[], Tensor],
    macs: Mapping[str, int],
    error: float,
    budget: float,
    watch: Callable[[int, int], None] = lambda done, count: None,
) -> tuple[list[str], float, float]:
    """Choose the layers whose inputs stay in float, the others' being rounded to eight bits.

    Parameters
    ----------
    evaluate : callable
        Runs the model on fixed inputs; the first axis of its result is the picture's.
    macs : mapping of layer to int
        All layers whose inputs would be rounded, and what each computes.
    error : float
        Wanted at most: squared error of a picture's result relative to its square, in the mean.
    budget : float
        MACs that may compute in float.

    Returns
    -------
    chosen : list of str
        Those that do most harm alone for what they compute, as few as suffice.
    before, after : float
        The error with all inputs rounded, and with those of all but the chosen layers.
    """
    reference = evaluate()
    hooks = {name: RoundedInput(model.get_submodule(name)) for name in macs}

    def harm(rounded: Iterable[str]) -> float:
        names = set(rounded)
        for name, hook in hooks.items():
            hook.enabled = name in names
        lost = (evaluate() - reference).square().flatten(1).sum(1)
        return float((lost / reference.square().flatten(1).sum(1)).mean())

    try:
        alone = {}
        for i, name in enumerate(hooks):
            alone[name] = harm([name])
            watch(i + 1, len(hooks))
        order, spent = [], 0.0
        for name in sorted(alone, key=lambda n: -alone[n] / macs[n]):
            if spent + macs[name] <= budget:
                order.append(name)
                spent += macs[name]

        def left(count: int) -> float:
            return harm(n for n in hooks if n not in order[:count])

        before = after = left(0)
        low, high = 0, len(order)
        if before > error:
            after = left(high)
            while high - low > 1:
                middle = (low + high) // 2
                reached = left(middle)
                if reached <= error:
                    high, after = middle, reached
                else:
                    low = middle
        else:
            high = 0
        return order[:high], before, after
    finally:
        for hook in hooks.values():
            hook.remove()


def bits_per_weight(quantized: Mapping[str, QuantizedWeight]) -> float:
    """Return the average over all quantized weights, scales included."""
    weights = sum(q.codes.size for q in quantized.values())
    total = sum(nbytes(q.codes.shape, Choice(q.grid, q.group_size)) for q in quantized.values())
    return 8 * total / max(1, weights)
