"""Error-compensating rounding, and the token that would spoil it."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

import torch
from torch import nn

from handheld.precision import Choice
from handheld_export.compress.fakequant import fit
from handheld_export.compress.gptq import Hessian, round_layer, round_model


def correlated(rows, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator) / width**0.5
    return torch.randn(rows, width, generator=generator) @ mix @ mix


def error(layer, coded, x):
    with torch.no_grad():
        wanted = layer(x)
        made = nn.functional.linear(x, torch.from_numpy(coded.dequantize()), layer.bias)
    return float((made - wanted).square().mean())


@pytest.mark.parametrize("grid", ["int4", "int2"])
def test_it_beats_plain_rounding_on_inputs_it_has_not_seen(grid):
    torch.manual_seed(0)
    layer = nn.Linear(64, 48)
    hessian = Hessian(layer)
    inputs = correlated(1024, 64)
    hessian.add(inputs[:768])
    weight = layer.weight.detach().numpy()
    gptq = round_layer(weight, hessian.matrix, Choice(grid))
    plain = fit(weight, Choice(grid))
    assert error(layer, gptq, inputs[768:]) < 0.8 * error(layer, plain, inputs[768:])


def test_convolutions_count_as_matrices_of_patches():
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, 3, padding=1)
    hessian = Hessian(layer, per_token=False)
    x = torch.randn(2, 4, 5, 5)
    hessian.add(x)
    patches = nn.functional.unfold(x, 3, padding=1).transpose(1, 2).reshape(-1, 36)
    assert torch.allclose(hessian.matrix, (patches.T @ patches).double(), rtol=1e-5)
    assert hessian.rows == 50


def test_a_planted_first_token_does_not_decide_the_codes():
    """As CLIP's first token does: hundreds of times larger, in one direction."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 48)
    tokens = correlated(64 * 16, 64).view(64, 16, 64)
    tokens[:, 0] = 800 * torch.nn.functional.one_hot(torch.tensor(3), 64)
    tokens[:, 0] += 300 * torch.nn.functional.one_hot(torch.tensor(40), 64)
    rest = tokens[:, 1:].reshape(-1, 64)
    weight = layer.weight.detach().numpy()
    errors = {}
    for per_token in (False, True):
        hessian = Hessian(layer, per_token=per_token)
        hessian.add(tokens)
        coded = round_layer(weight, hessian.matrix, Choice("int4"))
        errors[per_token] = error(layer, coded, rest)
    clean = Hessian(layer)
    clean.add(rest)
    best = error(layer, round_layer(weight, clean.matrix, Choice("int4")), rest)
    assert errors[True] < 1.1 * best
    assert errors[False] > 1.5 * best


def test_whole_models_are_rounded_layer_after_layer():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16), nn.Linear(16, 8))
    x = correlated(256, 32)
    with torch.no_grad():
        wanted = net(x)
    choices = {"0": Choice("int4"), "2": Choice("int4"), "3": Choice("int8")}
    plain = {n: fit(net.get_submodule(n).weight.detach().numpy(), c) for n, c in choices.items()}
    naive = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16), nn.Linear(16, 8))
    naive.load_state_dict(net.state_dict())
    with torch.no_grad():
        for name, weight in plain.items():
            naive.get_submodule(name).weight.copy_(torch.from_numpy(weight.dequantize()))
    done = []
    found = round_model(net, choices, lambda: net(x), at_once=2, watch=lambda i, n: done.append(i))
    assert done == [1, 2, 3]
    assert {n: q.grid for n, q in found.items()} == {n: c.grid for n, c in choices.items()}
    with torch.no_grad():
        ours, theirs = ((m(x) - wanted).square().mean() for m in (net, naive))
    assert ours < theirs
