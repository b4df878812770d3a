"""The arithmetic of DMD2, on distributions where the right answer is known."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("torch")
pytest.importorskip("accelerate")

import contextlib

import torch
from torch import nn

from handheld_export.compress.diffusion import Condition, Schedule
from handheld_export.compress.engine import Draws, Loop, Machine, Trained, Trainer
from handheld_export.compress.steps.dmd import DMD, Matching, matching_gradient

SHAPE = (2, 4, 4)


@pytest.fixture
def schedule():
    return Schedule({"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012,
                     "beta_schedule": "scaled_linear"})  # fmt: skip


class Gaussian(nn.Module):
    """Predicts the noise of pictures that are all `mean`, and keeps what it was asked."""

    def __init__(self, schedule, mean):
        super().__init__()
        self.schedule, self.mean = schedule, mean
        self.asked = []

    def noise(self, x, t):
        return (x - self.schedule.signal(t) * self.mean) / self.schedule.noise(t)

    def forward(self, x, t, states=None, pooled=None, time_ids=None, **_):
        self.asked.append((x.detach().clone(), t.clone()))
        if states is not None:
            return self.noise(x, t), x.mean(dim=(1, 2, 3))
        return (self.noise(x, t),)


class Generator(nn.Module):
    """Draws `mean` whatever it is given."""

    def __init__(self, schedule, mean):
        super().__init__()
        self.schedule, self.mean = schedule, nn.Parameter(torch.tensor(mean))
        self.asked = []

    def forward(self, x, t, **_):
        self.asked.append((x.detach().clone(), t.clone()))
        return ((x - self.schedule.signal(t) * self.mean) / self.schedule.noise(t),)


def trainer(fake):
    accelerator = SimpleNamespace(autocast=contextlib.nullcontext)
    return SimpleNamespace(accelerator=accelerator, bare=lambda key: fake)


def condition(n=4):
    return Condition(torch.zeros(n, 1, 1), torch.zeros(n, 1), torch.zeros(n, 6))


def matching(schedule, teacher, timesteps=(399,), gan=0.0):
    return Matching(
        timesteps=timesteps, latent=SHAPE, schedule=schedule, teacher=teacher,
        empty=condition(1), guidance=1.0, gan_generator=gan, gan_head=gan,
    )  # fmt: skip


def test_the_gradient_leads_from_what_is_drawn_to_what_is_real(schedule):
    real, fake = Gaussian(schedule, 1.0), Gaussian(schedule, -1.0)
    generator = Generator(schedule, -1.0)
    method = matching(schedule, real)
    loss, x0, _ = method.generator_loss(trainer(fake), generator, Draws(0, 0, 4), condition())
    assert torch.allclose(x0, torch.full_like(x0, -1.0), atol=1e-4)
    loss.backward()
    assert generator.mean.grad < 0


def test_nothing_moves_once_both_scores_agree(schedule):
    real = Gaussian(schedule, 0.5)
    generator = Generator(schedule, 0.0)
    loss, _, _ = matching(schedule, real).generator_loss(
        trainer(Gaussian(schedule, 0.5)), generator, Draws(0, 0, 4), condition()
    )
    loss.backward()
    assert abs(float(generator.mean.grad)) < 1e-3


def test_directions_are_relative_to_the_distance_of_each_picture():
    x0 = torch.zeros(2, *SHAPE)
    real = torch.stack([torch.full(SHAPE, 0.1), torch.full(SHAPE, 10.0)])
    found = matching_gradient(x0, real, torch.zeros_like(x0))
    assert torch.allclose(found, torch.full_like(found, -1.0))


def test_the_head_pulls_towards_what_looks_real(schedule):
    score = Gaussian(schedule, 0.0)
    generator = Generator(schedule, 0.0)
    loss, _, figures = matching(schedule, score, gan=1.0).generator_loss(
        trainer(score), generator, Draws(0, 0, 4), condition()
    )
    loss.backward()
    # This head finds bright pictures real.
    assert generator.mean.grad < 0
    assert figures["gan"] > 0


def test_several_timesteps_see_the_generators_own_pictures(schedule):
    score = Gaussian(schedule, 0.0)
    generator = Generator(schedule, 3.0)
    method = matching(schedule, score, timesteps=(999, 499))
    seen = set()
    for seed in range(8):
        generator.asked.clear()
        x0 = method.generate(trainer(score), generator, Draws(seed, 0, 64), condition(64))
        assert x0.requires_grad
        times = [int(t[0]) for _, t in generator.asked]
        seen.add(tuple(times))
        first = generator.asked[0][0]
        assert abs(float(first.mean())) < 0.1
        assert abs(float(first.std()) - 1) < 0.1
        if len(times) == 2:
            t = torch.tensor([499])
            wanted = 3.0 * float(schedule.signal(t))
            assert abs(float(generator.asked[1][0].mean()) - wanted) < 0.1
    assert seen == {(999,), (999, 499)}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"low": 0.5, "high": 0.4}, "below high"),
        ({"gan_head": 0.0}, "head that learns"),
        ({"timesteps": [499, 999]}, "must fall"),
        ({"color": 2.0}, "give regression"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        DMD.model_validate({"train": {"steps": 1, "lr": 1e-3}, **settings})


def test_parts_learn_at_rates_of_their_own(tmp_path):
    both = nn.ModuleDict({"unet": nn.Linear(1, 1), "head": nn.Linear(1, 1)})
    before = {n: p.detach().clone() for n, p in both.named_parameters()}
    trained = Trained(both, 1e-3, 10.0, {"head.": 1e-1})
    loop = Loop(steps=1, batch=1, lr=1e-3, warmup=0)
    machine = Machine(precision="no", cpu=True)
    trainer = Trainer("dmd", loop, {"generator": trained}, machine, tmp_path)
    one = torch.ones(1, 1)
    trainer.update("generator", (both["head"](one) + both["unet"](one)).sum())
    moved = {n: float((p.detach() - before[n]).abs()) for n, p in both.named_parameters()}
    # Adam's first step is as long as the rate.
    assert moved["unet.weight"] == pytest.approx(1e-3, rel=1e-2)
    assert moved["head.weight"] == pytest.approx(1e-1, rel=1e-2)
