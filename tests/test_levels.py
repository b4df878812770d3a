"""Groups that spread differently, brought to one level before they are normalised."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import target_cases
from handheld_export.litert.rewrites import HalfGroupNorm
from handheld_export.measure import snr_db
from handheld_export.qnn.levels import level
from handheld_export.rewrites import PictureGroupNorm

KINDS = [PictureGroupNorm, HalfGroupNorm]


def unlike(*factors):
    """Return a normalisation of two channels a group, and a picture whose groups spread so."""
    norm = target_cases.randomize(nn.GroupNorm(len(factors), 2 * len(factors), eps=1e-3))
    picture = torch.randn(1, 2 * len(factors), 6, 5, generator=torch.Generator().manual_seed(0))
    return norm, picture * torch.tensor(factors).repeat_interleave(2).reshape(1, -1, 1, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_results_stay_what_they_are(kind):
    norm, x = unlike(300.0, 1.0, 0.03)
    module = nn.Sequential(kind(norm))
    (note,) = level(module, [[x]])
    assert "levelled groups of 1 of 1 normalisations" in note
    with torch.no_grad():
        assert snr_db(norm(x).numpy(), module(x).numpy()) > 110
    assert (module[0].levels.log2().frac() == 0).all(), "powers of two"


@pytest.mark.parametrize("kind", KINDS)
def test_every_group_comes_to_the_level_of_the_largest(kind):
    norm, x = unlike(60.0, 1.0, 10.0)
    module = kind(norm)
    level(module, [[x], [2 * x]])
    spread = (x * module.levels).reshape(1, 3, -1).std(2)
    assert spread.max() / spread.min() < 2.1


def test_a_group_of_nothing_is_multiplied_by_no_more_than_others_may_be():
    norm, x = unlike(9.0, 0.0)
    module = PictureGroupNorm(norm)
    level(module, [[x]])
    assert module.levels.flatten().tolist() == [1, 1, 64, 64]
    with torch.no_grad():
        assert torch.allclose(module(x), norm(x), atol=1e-5)
    with pytest.raises(ValueError, match="already"):
        module.level(torch.ones(2))


@pytest.mark.parametrize("quiet", [0.0, 0.01])
def test_epsilons_stay_below_the_largest_variance(quiet):
    """They are multiplied with the groups, and share the variances' grid."""
    norm, x = unlike(1.0, quiet)
    module = PictureGroupNorm(norm)
    level(module, [[x]])
    assert float(torch.as_tensor(module.eps).max()) <= 1.1 * float(x[:, :2].var())


def test_a_quiet_group_far_from_zero_is_not_raised_above_the_others():
    norm, x = unlike(100.0, 1.0, 1.0)
    x[:, 2:4] += 200
    module = PictureGroupNorm(norm)
    level(module, [[x]])
    peaks = (x * module.levels).abs().amax((0, 2, 3))
    assert peaks[2:].max() <= peaks[:2].max()
    assert module.levels.flatten()[4] == 64


def test_groups_that_spread_much_alike_stay():
    norm, x = unlike(8.0, 1.0)
    module = nn.Sequential(PictureGroupNorm(norm))
    assert level(module, [[x]]) == ()
    assert level(module, [[0 * x]]) == ()
    assert module[0].levels is None
    assert level(nn.Sequential(nn.Linear(2, 2)), []) == ()


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_have_groups_too(kind):
    norm, x = unlike(300.0, 1.0)
    module = nn.Sequential(kind(norm))
    assert level(module, [[x.flatten(2)]])
    with torch.no_grad():
        assert torch.allclose(module(x.flatten(2)), norm(x.flatten(2)), atol=1e-5)
