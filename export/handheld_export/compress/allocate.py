"""Bits for each layer: measured sensitivity under a budget of bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from handheld.precision import Choice
from handheld.reshaping import Option, nbytes
from handheld_export.compress.fakequant import fit
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


def bits_per_weight(quantized: Mapping[str, QuantizedWeight]) -> float:
    """Return the average over all quantized weights, scales included."""
    weights = sum(q.codes.size for q in quantized.values())
    total = sum(nbytes(q.codes.shape, Choice(q.grid, q.group_size)) for q in quantized.values())
    return 8 * total / max(1, weights)
