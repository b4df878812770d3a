"""Bits for each layer and its input: measured sensitivity under a budget."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from handheld.counting import Layer
from handheld.precision import Choice
from handheld.reshaping import Option, nbytes
from handheld_export.compress.fakequant import RoundedInput, fit
from handheld_export.quantization import QuantizedWeight

_NEAR = 1.02
"""Errors that are as good as the least."""


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
    layers: Mapping[str, Layer],
    error: float,
    macs: float,
    weights: float,
    watch: Callable[[int, int], None] = lambda done, count: None,
) -> tuple[list[str], float, float]:
    """Choose the layers whose inputs stay in float, the others' being rounded to eight bits.

    Parameters
    ----------
    evaluate : callable
        Runs the model on fixed inputs; the first axis of its result is the picture's.
    layers : mapping of name to Layer
        All whose inputs would be rounded.
    error : float
        Wanted at most: squared error of a picture's result relative to its square, in the mean.
    macs, weights : float
        Multiply-accumulates that may compute in float, and weights that they may have.

    Returns
    -------
    chosen : list of str
        Those that do most harm alone for what they compute: as few as suffice, or as come near
        (2 %) the least error that the budgets allow.
    before, after : float
        The error with all inputs rounded, and with those of all but the chosen layers.
    """
    reference = evaluate()
    hooks = {name: RoundedInput(model.get_submodule(name)) for name in layers}

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
        order = []
        for name in sorted(alone, key=lambda n: -alone[n] / layers[n].macs):
            layer = layers[name]
            if alone[name] > 0 and layer.macs <= macs and layer.weights <= weights:
                order.append(name)
                macs, weights = macs - layer.macs, weights - layer.weights

        def left(count: int) -> float:
            return harm(n for n in hooks if n not in order[:count])

        before = after = left(0)
        low, high = 0, len(order)
        if before > error and order:
            after = left(high)
            error = max(error, _NEAR * after)
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
