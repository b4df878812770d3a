"""Bits per layer under a budget."""

from __future__ import annotations

import itertools

import pytest

pytest.importorskip("torch")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from handheld.counting import Layer
from handheld.errors import UsageError
from handheld.precision import Choice
from handheld.reshaping import Option, assign, nbytes
from handheld_export.compress.allocate import bits_per_weight, float_inputs, sensitivity
from handheld_export.compress.fakequant import fit

GRIDS = ("int2", "int4", "int8")
layer = st.tuples(*(st.floats(0, 10) for _ in GRIDS)).map(lambda d: sorted(d, reverse=True))


def options(damages, size=64):
    return [
        Option(Choice(g), nbytes((8, size), Choice(g)), d)
        for g, d in zip(GRIDS, damages, strict=True)
    ]


@given(st.lists(layer, min_size=1, max_size=4), st.floats(0, 1))
@settings(max_examples=200)
def test_budget_holds_and_no_upgrade_on_a_hull_is_left(damages, share):
    given_ = {f"l{i}": options(d, 64 * (i + 1)) for i, d in enumerate(damages)}
    least = sum(o[0].nbytes for o in given_.values())
    most = sum(o[-1].nbytes for o in given_.values())
    budget = least + share * (most - least)
    chosen = assign(given_, budget)
    spent = {n: next(o for o in given_[n] if o.choice == c) for n, c in chosen.items()}
    assert sum(o.nbytes for o in spent.values()) <= budget
    assert set(chosen) == set(given_)
    left = budget - sum(o.nbytes for o in spent.values())
    for name, own in spent.items():
        better = [o for o in given_[name] if o.nbytes > own.nbytes and o.damage < own.damage]
        if better:
            steepest = max(better, key=lambda o: (own.damage - o.damage) / (o.nbytes - own.nbytes))
            assert steepest.nbytes - own.nbytes > left - 1e-6
    least_damage = sum(min(o.damage for o in v) for v in given_.values())
    if share == 1:
        assert sum(o.damage for o in spent.values()) == pytest.approx(least_damage)


@given(st.lists(layer, min_size=1, max_size=4), st.floats(0, 1))
@settings(max_examples=100)
def test_damage_is_near_the_best_there_is(damages, share):
    given_ = {f"l{i}": options(d) for i, d in enumerate(damages)}
    least = sum(o[0].nbytes for o in given_.values())
    most = sum(o[-1].nbytes for o in given_.values())
    budget = least + share * (most - least)
    chosen = assign(given_, budget)
    got = sum(o.damage for n, v in given_.items() for o in v if o.choice == chosen[n])
    best = min(
        sum(o.damage for o in mix)
        for mix in itertools.product(*given_.values())
        if sum(o.nbytes for o in mix) <= budget
    )
    # Greedy on convex hulls is off by at most one layer's last upgrade.
    assert got <= best + max(v[0].damage for v in given_.values()) + 1e-9


def test_sensitive_layers_get_the_bits():
    given_ = {"calm": options([0.1, 0.01, 0.0]), "touchy": options([9.0, 1.0, 0.1])}
    budget = sum(o[0].nbytes for o in given_.values()) + 8 * 64 * 2 / 8
    assert assign(given_, budget) == {"calm": Choice("int2"), "touchy": Choice("int4")}


def test_a_budget_that_cannot_be_met_says_what_would_do():
    with pytest.raises(UsageError, match=r"cannot be met.*need 0\.00 MB"):
        assign({"a": options([1, 0.5, 0])}, 10)


def test_sensitivity_restores_the_weights_and_sees_which_layer_matters():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 16))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(16) * 0.01 + model[0].weight)
        model[1].weight.mul_(0).add_(torch.eye(16))  # exact on every grid
    x = torch.randn(32, 16)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = sensitivity(
        model, lambda: model(x), {n: [Choice("int2"), Choice("int8")] for n in ("0", "1")}
    )
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert found["0"][0].damage > 100 * found["0"][1].damage
    assert found["1"][0].damage == pytest.approx(0, abs=1e-9)


def test_bits_per_weight_count_scales():
    weight = torch.randn(8, 64).numpy()
    assert bits_per_weight({"a": fit(weight, Choice("int2"))}) == pytest.approx(2 + 32 / 64)
    assert bits_per_weight({"a": fit(weight, Choice("int4", 32))}) == pytest.approx(4 + 16 / 32)
    assert bits_per_weight({}) == 0


class Mixed(torch.nn.Module):
    """Two layers, of which one reads a value beside which all others vanish in eight bits."""

    def __init__(self):
        super().__init__()
        self.plain, self.planted = torch.nn.Linear(32, 32), torch.nn.Linear(33, 32)
        with torch.no_grad():
            self.planted.weight[:, 32] = 1e-4

    def forward(self, x):
        outlier = torch.full_like(x[..., :1], 1e4)
        return self.plain(x) + self.planted(torch.cat([x, outlier], -1))


def test_the_layer_with_an_outlier_is_kept_in_float():
    torch.manual_seed(0)
    model, x = Mixed(), torch.randn(4, 8, 32)
    layers = {
        n: Layer(n, "linear", (32, w), bias=True, macs=32 * w, outputs=32)
        for n, w in (("plain", 32), ("planted", 33))
    }

    def chosen(error, macs=1e9, weights=1e9):
        return float_inputs(model, lambda: model(x), layers, error, macs, weights)

    names, before, after = chosen(1e-3)
    assert names == ["planted"]
    assert before > 0.1
    assert after < 1e-3
    assert chosen(1.0)[0] == [], "nothing is done without need"
    names, _, after = chosen(0.0)
    assert set(names) == set(layers) and after == 0
    for budgets in ({"macs": 32 * 32}, {"weights": 32 * 32}, {"macs": 1}):
        names, before, after = chosen(1e-3, **budgets)
        assert "planted" not in names, "the budget holds"
        assert after == pytest.approx(before, rel=0.1)
    assert not model.plain._forward_pre_hooks, "the model is as it was"
