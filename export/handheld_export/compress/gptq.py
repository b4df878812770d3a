"""Error-compensating rounding: GPTQ (Frantar et al., arXiv 2210.17323).

The Hessian is taken over inputs that are scaled token by token, as the kernels' dynamic
quantization sees them. So one token with huge activations, as CLIP's first one has them (MixDQ,
arXiv 2405.17873), weighs as much as any other instead of deciding every code alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from handheld.precision import Choice
from handheld_export.compress.fakequant import fit
from handheld_export.quantization import LIMITS, QuantizedWeight


def token_normalised(x: Tensor) -> Tensor:
    """Scale each row to a largest magnitude of 1."""
    return x / x.abs().amax(dim=-1, keepdim=True).clamp_min(1e-8)


class Hessian:
    """Collects ``X^T X`` of a layer's inputs.

    Parameters
    ----------
    layer : nn.Linear or nn.Conv2d
    per_token : bool
        Normalise each input row first.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, *, per_token: bool = True) -> None:
        inputs = layer.weight[0].numel()
        self.matrix = torch.zeros(inputs, inputs, dtype=torch.float64)
        self.rows = 0
        self._layer, self._per_token = layer, per_token

    def add(self, x: Tensor) -> None:
        """Add a batch of inputs."""
        layer = self._layer
        if isinstance(layer, nn.Conv2d):
            columns = functional.unfold(
                x.float(),
                layer.kernel_size,
                padding=cast(Any, layer.padding),
                stride=layer.stride,
            )
            rows = columns.transpose(1, 2).reshape(-1, columns.shape[1])
        else:
            rows = x.float().reshape(-1, x.shape[-1])
        if self._per_token:
            rows = token_normalised(rows)
        self.matrix += (rows.T @ rows).double().cpu()
        self.rows += len(rows)


def round_layer(
    weight: np.ndarray[Any, Any], hessian: Tensor, choice: Choice, damp: float = 0.01
) -> QuantizedWeight:
    """Round column after column, moving each column's error into the columns still to come.

    Parameters
    ----------
    weight : float32 ndarray, ``[out, in]`` or ``[out, in, kh, kw]``
    hessian : float64 Tensor, ``[in, in]``
    choice : Choice
        Scales are those of :func:`fit`.
    damp : float
        Added to the diagonal, relative to its mean.
    """
    start = fit(weight, choice)
    low, high = LIMITS[choice.grid]
    w = torch.from_numpy(weight.reshape(weight.shape[0], -1)).double().clone()
    h = hessian.clone()
    dead = h.diagonal() == 0
    h[dead, dead] = 1
    h.diagonal().add_(damp * h.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    upper = torch.linalg.cholesky(inverse, upper=True)
    per_column = torch.from_numpy(start.scales).double()
    if choice.group_size:
        per_column = per_column.repeat_interleave(choice.group_size, dim=1)
    else:
        per_column = per_column[:, None].expand(-1, w.shape[1])
    codes = torch.empty_like(w)
    block = 128
    for begin in range(0, w.shape[1], block):
        end = min(begin + block, w.shape[1])
        errors = torch.zeros(len(w), end - begin, dtype=torch.float64)
        for i in range(begin, end):
            scale = per_column[:, i]
            q = (w[:, i] / scale).clamp(low, high).round()
            codes[:, i] = q
            error = (w[:, i] - q * scale) / upper[i, i]
            w[:, i:end] -= error[:, None] * upper[i, i:end]
            errors[:, i - begin] = error
        w[:, end:] -= errors @ upper[begin:end, end:]
    return QuantizedWeight.checked(
        choice.grid,
        codes.to(torch.int8).numpy().reshape(weight.shape),
        start.scales,
        choice.group_size,
    )


@torch.no_grad()
def round_model(
    model: nn.Module,
    choices: Mapping[str, Choice],
    run: Callable[[], object],
    *,
    per_token: bool = True,
    at_once: int = 24,
    watch: Callable[[int, int], None] = lambda done, count: None,
) -> dict[str, QuantizedWeight]:
    """Round all layers of a model, each for the inputs that the layers before it now give.

    Parameters
    ----------
    model : nn.Module
        Its weights are replaced by the rounded ones.
    choices : mapping of layer to Choice
        In the order of the forward pass.
    run : callable
        Runs the model on the calibration inputs.
    at_once : int
        Layers whose Hessians are collected in one run; bounds memory.
    """
    names = list(choices)
    found: dict[str, QuantizedWeight] = {}
    for begin in range(0, len(names), at_once):
        part = names[begin : begin + at_once]
        hessians: dict[str, Hessian] = {}
        hooks = []
        for name in part:
            layer: Any = model.get_submodule(name)
            if choices[name].grid == "int8":
                continue
            hessians[name] = Hessian(layer, per_token=per_token)
            hooks.append(layer.register_forward_pre_hook(_adder(hessians[name])))
        if hooks:
            run()
        for hook in hooks:
            hook.remove()
        for name in part:
            layer = model.get_submodule(name)
            weight = layer.weight.detach().float().cpu().contiguous().numpy()
            if name in hessians and hessians[name].rows:
                found[name] = round_layer(weight, hessians[name].matrix, choices[name])
            else:
                found[name] = fit(weight, choices[name])
            layer.weight.data = torch.from_numpy(found[name].dequantize()).to(layer.weight)
            watch(len(found), len(names))
    return found


def _adder(hessian: Hessian) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    return lambda module, args: hessian.add(args[0])
