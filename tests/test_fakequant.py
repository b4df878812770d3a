"""Training through rounding ends at exactly the codes that ship."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

import numpy as np
import torch
from torch import nn

from handheld.precision import Choice
from handheld_export.compress.fakequant import RoundedInput, extract, fit, insert
from handheld_export.quantization import LIMITS, round_to_nearest

CHOICES = [Choice("int8"), Choice("int4"), Choice("int2"), Choice("int4", 32)]


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 16, 64))


def coded(net, choice):
    own = {"0": Choice(choice.grid), "2": choice}
    return {n: fit(net.get_submodule(n).weight.detach().numpy(), c) for n, c in own.items()}


@pytest.mark.parametrize("choice", CHOICES)
def test_what_is_trained_is_what_ships(choice):
    net = model()
    insert(net, coded(net, choice))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    x, goal = torch.randn(8, 4, 4, 4), torch.randn(8, 64)
    for _ in range(5):
        loss = (net(x) - goal).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    shipped = extract(net)
    plain = model()
    plain.load_state_dict({k: v for k, v in net.state_dict().items() if "log_scale" not in k})
    with torch.no_grad():
        for name, weight in shipped.items():
            low, high = LIMITS[weight.grid]
            assert weight.codes.min() >= low
            assert weight.codes.max() <= high
            plain.get_submodule(name).weight.copy_(torch.from_numpy(weight.dequantize()))
        assert torch.allclose(net(x), plain(x), atol=1e-6)


@pytest.mark.parametrize("choice", CHOICES)
def test_inserting_changes_nothing_but_the_rounding(choice):
    net = model()
    start = coded(net, choice)
    insert(net, start)
    for name, weight in extract(net).items():
        assert np.array_equal(weight.codes, start[name].codes)
        assert np.allclose(weight.scales, start[name].scales, rtol=1e-6)


@pytest.mark.parametrize("choice", CHOICES)
def test_training_starts_from_codes_that_are_not_the_nearest(choice):
    net = model()
    start = coded(net, choice)
    low, high = LIMITS[choice.grid]
    for weight in start.values():
        moved = np.random.default_rng(1).integers(-1, 2, weight.codes.shape)
        weight.codes[:] = np.clip(weight.codes + moved, low, high)
    insert(net, start)
    for name, weight in extract(net).items():
        assert np.array_equal(weight.codes, start[name].codes)


def test_weights_scales_and_biases_learn():
    net = model()
    insert(net, coded(net, Choice("int4")))
    net(torch.randn(2, 4, 4, 4)).square().mean().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("grid", ["int4", "int2"])
def test_alternating_optimisation_beats_rounding_to_nearest(grid):
    weight = np.random.default_rng(0).standard_normal((32, 128)).astype(np.float32)
    best = np.square(fit(weight, Choice(grid)).dequantize() - weight).mean()
    plain = np.square(round_to_nearest(weight, grid, None).dequantize() - weight).mean()
    assert best <= plain


def test_rows_of_zeros_and_single_values_survive():
    weight = np.zeros((4, 32), np.float32)
    weight[1] = 1e-20
    weight[2] = 3.0
    for choice in CHOICES:
        found = fit(weight, choice)
        assert np.isfinite(found.scales).all()
        assert np.allclose(found.dequantize()[2], 3.0, rtol=0.02)
        assert not found.dequantize()[0].any()


def test_a_rounded_input_has_256_values_and_zero_for_each_token_or_picture():
    torch.manual_seed(0)
    seen = []
    linear, conv = nn.Linear(512, 1), nn.Conv2d(4, 1, 1)
    for layer, x in ((linear, torch.randn(2, 3, 512) + 5), (conv, torch.randn(2, 4, 32, 32))):
        hook = RoundedInput(layer)
        layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        layer(x)
        assert seen.pop() is x, "only while it is enabled"
        hook.enabled = True
        layer(x)
        rounded = seen.pop()
        rows = rounded.flatten(0, 1) if layer is linear else rounded.flatten(1)
        wanted = x.reshape(rows.shape)
        span = wanted.amax(1).clamp(min=0) - wanted.amin(1).clamp(max=0)
        assert all(len(row.unique()) <= 256 for row in rows)
        # Ends of the range may move by half a step more, as zero falls on a code.
        assert ((rows - wanted).abs().amax(1) <= span / 255 * 1.01).all()
        hook.remove()
        layer(x)
        assert seen.pop() is x
