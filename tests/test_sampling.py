from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

from handheld.errors import CheckpointError, UsageError
from handheld_export.checkpoint import SDXL_SCHEDULER
from handheld_export.sampling import alphas_cumprod, plan, timesteps

BETAS = {k: SDXL_SCHEDULER[k] for k in ("beta_start", "beta_end", "beta_schedule")}
SHAPE = (1, 2, 3, 4)


def model(x, t):
    """A noise prediction that depends on everything."""
    return np.tanh(x * 0.7 + t / 1000) + 0.1 * x


def run(steps, x, noise=None):
    """The steps as a program applies them, in float64."""
    before = None
    for i, step in enumerate(steps):
        eps = model(x, step.timestep)
        values = {"x": x, "eps": eps, "x0": before, "noise": None if noise is None else noise[i]}
        if step.x0 is not None:
            before = step.x0[0] * x + step.x0[1] * eps
        x = sum(values[k] * s for k, s in step.terms.items())
    return x


def run_diffusers(scheduler, x, steps):
    scheduler.set_timesteps(steps)
    x = torch.from_numpy(x)
    for t in scheduler.timesteps:
        eps = torch.from_numpy(model(x.numpy(), int(t)))
        x = scheduler.step(eps, t, x).prev_sample
    return x.numpy()


def start(seed=0):
    return np.random.default_rng(seed).standard_normal(SHAPE)


def relative(a, b):
    return np.abs(a - b).max() / np.abs(b).max()


@pytest.mark.parametrize("schedule", ["scaled_linear", "linear"])
def test_alphas(schedule):
    config = BETAS | {"beta_schedule": schedule}
    expected = DDIMScheduler(**config).alphas_cumprod.numpy()
    assert relative(alphas_cumprod(config), expected) < 1e-5


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
@pytest.mark.parametrize("steps", [1, 2, 4, 7, 8, 20, 25, 50])
def test_timesteps_are_those_of_diffusers(spacing, steps):
    if spacing == "linspace" and steps == 1:
        return  # diffusers starts without noise
    scheduler = DDIMScheduler(**BETAS, timestep_spacing=spacing, steps_offset=1)
    scheduler.set_timesteps(steps)
    assert timesteps(1000, steps, spacing, 1) == scheduler.timesteps.tolist()


@pytest.mark.parametrize("spacing", ["trailing", "leading"])
@pytest.mark.parametrize("steps", [1, 2, 4, 8, 20, 50])
def test_ddim(spacing, steps):
    scheduler = DDIMScheduler(
        **BETAS, timestep_spacing=spacing, steps_offset=1, clip_sample=False, set_alpha_to_one=True
    )
    expected = run_diffusers(scheduler, start(), steps)
    chosen = timesteps(1000, steps, spacing, 1)
    assert relative(run(plan(BETAS, "ddim", chosen), start()), expected) < 1e-4


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
@pytest.mark.parametrize("steps", [2, 3, 4, 8, 14])
def test_dpmpp2m(spacing, steps):
    scheduler = DPMSolverMultistepScheduler(
        **BETAS, timestep_spacing=spacing, steps_offset=1, final_sigmas_type="zero"
    )
    scheduler.set_timesteps(steps)
    chosen = [int(t) for t in scheduler.timesteps]
    expected = run_diffusers(scheduler, start(), steps)
    assert relative(run(plan(BETAS, "dpmpp2m", chosen), start()), expected) < 1e-3


def test_dmd_with_fresh_noise():
    chosen = [999, 749, 499, 249]
    noise = [start(10 + i) for i in range(4)]
    steps = plan(BETAS, "dmd", chosen)
    assert ["noise" in s.terms for s in steps] == [True, True, True, False]
    a = alphas_cumprod(BETAS)
    x = start()
    for i, t in enumerate(chosen):
        x0 = (x - np.sqrt(1 - a[t]) * model(x, t)) / np.sqrt(a[t])
        if i < 3:
            b = a[chosen[i + 1]]
            x = np.sqrt(b) * x0 + np.sqrt(1 - b) * noise[i]
    assert relative(run(steps, start(), noise), x0) < 1e-12


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp2m", "dmd"])
def test_one_step_predicts_the_picture(sampler):
    (step,) = plan(BETAS, sampler, [999])
    a = alphas_cumprod(BETAS)[999]
    assert step.terms == pytest.approx({"x": a**-0.5, "eps": -(((1 - a) / a) ** 0.5)})


def test_coefficients_hit_the_truth():
    """A prediction that is right leads back to the picture, whatever the sampler."""
    a = alphas_cumprod(BETAS)
    picture, noise = start(1), start(2)
    for sampler in ("ddim", "dpmpp2m"):
        chosen = timesteps(1000, 8, "trailing")
        x = np.sqrt(a[chosen[0]]) * picture + np.sqrt(1 - a[chosen[0]]) * noise
        before = None
        for step in plan(BETAS, sampler, chosen):
            t = a[step.timestep]
            eps = (x - np.sqrt(t) * picture) / np.sqrt(1 - t)
            values = {"x": x, "eps": eps, "x0": before}
            if step.x0 is not None:
                before = step.x0[0] * x + step.x0[1] * eps
                assert relative(before, picture) < 1e-9
            x = sum(values[k] * s for k, s in step.terms.items())
        assert relative(x, picture) < 1e-9


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({"prediction_type": "v_prediction"}, "prediction_type"),
        ({"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
        ({"trained_betas": [0.1]}, "trained_betas"),
        ({"beta_start": 0}, "beta_start"),
        ({"beta_end": 2.0}, "beta_start"),
        ({"num_train_timesteps": 0}, "beta_start"),
        ({"beta_end": "much"}, None),
        ({"num_train_timesteps": None}, None),
    ],
)
def test_schedules_that_are_refused(config, field):
    with pytest.raises(CheckpointError) as e:
        alphas_cumprod(BETAS | config)
    assert e.value.field == field
    assert "scheduler_config.json" in e.value.path


def test_bad_arguments():
    with pytest.raises(UsageError, match="sampler 'euler' is unknown"):
        plan(BETAS, "euler", [999])
    for chosen in ([1000], [-1], [1, 2], [5, 5], [9, 3, 4]):
        with pytest.raises(UsageError, match="do not fall"):
            plan(BETAS, "ddim", chosen)
    for steps in (0, -1, 1001):
        with pytest.raises(UsageError, match=r"not in 1\.\.1000"):
            timesteps(1000, steps, "trailing")
    with pytest.raises(UsageError, match="spacing 'karras'"):
        timesteps(1000, 4, "karras")
    with pytest.raises(UsageError):
        plan(BETAS, "ddim", [])
