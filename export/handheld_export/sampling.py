"""Samplers as affine arithmetic.

A deterministic sampler, once its timesteps are chosen, is a list of linear combinations of
the current latent, the noise prediction, earlier predictions and fresh noise. Here the
coefficients are computed in float64; the program applies them.

Notation: ``a`` is the cumulative product of ``1 - beta`` at a timestep,
``x0 = (x - sqrt(1 - a) eps) / sqrt(a)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from handheld.errors import CheckpointError, UsageError

SAMPLERS = ("ddim", "dpmpp2m", "dmd")


@dataclass(frozen=True)
class Step:
    """One evaluation of the U-Net and the update after it.

    Parameters
    ----------
    timestep : int
    terms : dict
        Coefficients of ``x`` (the latent), ``eps`` (this prediction), ``x0`` (the previous
        step's denoised latent) and ``noise`` (fresh noise) in the next latent.
    x0 : (float, float) or None
        Coefficients of ``x`` and ``eps`` in this step's denoised latent, where the next
        step reads it.
    """

    timestep: int
    terms: dict[str, float]
    x0: tuple[float, float] | None = None


def alphas_cumprod(config: Mapping[str, Any]) -> NDArray[np.float64]:
    """Cumulative product of ``1 - beta`` for every training timestep.

    Raises
    ------
    CheckpointError
        For a schedule or prediction type that is not supported.
    """
    try:
        count = int(config.get("num_train_timesteps", 1000))
        start, end = float(config.get("beta_start", 1e-4)), float(config.get("beta_end", 0.02))
    except (TypeError, ValueError) as e:
        raise CheckpointError(
            f"is not a noise schedule: {e}", path="scheduler/scheduler_config.json"
        ) from None
    if not (1 <= count <= 100_000 and 0 < start < 1 and 0 < end < 1):
        raise CheckpointError(
            f"{count} timesteps with betas from {start} to {end} are no noise schedule",
            path="scheduler/scheduler_config.json",
            field="beta_start",
        )
    for option in ("trained_betas", "rescale_betas_zero_snr"):
        if config.get(option):
            raise CheckpointError(
                "is not supported",
                path="scheduler/scheduler_config.json",
                field=option,
                remedy="use a checkpoint with a linear or scaled_linear schedule as it is",
            )
    schedule = config.get("beta_schedule", "linear")
    if config.get("prediction_type", "epsilon") != "epsilon":
        raise CheckpointError(
            f"{config['prediction_type']!r} is not supported",
            path="scheduler/scheduler_config.json",
            field="prediction_type",
            remedy="use a checkpoint that predicts epsilon",
        )
    if schedule == "scaled_linear":
        betas = np.linspace(start**0.5, end**0.5, count) ** 2
    elif schedule == "linear":
        betas = np.linspace(start, end, count)
    else:
        raise CheckpointError(
            f"{schedule!r} is not supported",
            path="scheduler/scheduler_config.json",
            field="beta_schedule",
            remedy="use linear or scaled_linear",
        )
    return np.cumprod(1.0 - betas, dtype=np.float64)


def timesteps(count: int, steps: int, spacing: str, offset: int = 0) -> list[int]:
    """Choose timesteps, noisiest first.

    Parameters
    ----------
    count : int
        Number of training timesteps.
    steps : int
    spacing : {'trailing', 'leading', 'linspace'}
        Table 2 of Lin et al., "Common diffusion noise schedules and sample steps are
        flawed" (arXiv 2305.08891).
    offset : int
        Added for ``leading``.
    """
    if not 1 <= steps <= count:
        raise UsageError(f"{steps} steps are not in 1..{count}")
    match spacing:
        case "trailing":
            chosen = np.round(np.arange(count, 0, -count / steps))[:steps] - 1
        case "leading":
            chosen = np.round(np.arange(steps) * (count // steps))[::-1] + offset
        case "linspace":
            chosen = np.round(np.linspace(0, count - 1, steps))[::-1]
        case _:
            raise UsageError(
                f"timestep spacing '{spacing}' is unknown",
                remedy="choose trailing, leading or linspace",
            )
    return [int(t) for t in chosen]


def plan(config: Mapping[str, Any], sampler: str, chosen: list[int]) -> list[Step]:
    """Write a sampler as affine steps.

    Parameters
    ----------
    config : mapping
        The scheduler's configuration.
    sampler : {'ddim', 'dpmpp2m', 'dmd'}
        ``ddim``: Song et al., arXiv 2010.02502, eta 0. ``dpmpp2m``: DPM-Solver++(2M), Lu et
        al., arXiv 2211.01095, first order in the first and last step. ``dmd``: predict the
        picture, noise it afresh to the next timestep (Yin et al., arXiv 2405.14867).
    chosen : list of int
        Timesteps, noisiest first.

    Returns
    -------
    list of Step
        The last step's latent is the denoised one.
    """
    if sampler not in SAMPLERS:
        raise UsageError(
            f"sampler '{sampler}' is unknown", remedy=f"choose one of {', '.join(SAMPLERS)}"
        )
    a_all = alphas_cumprod(config)
    if (
        not chosen
        or any(not 0 <= t < len(a_all) for t in chosen)
        or sorted(set(chosen), reverse=True) != chosen
    ):
        raise UsageError(f"timesteps {chosen} do not fall within {len(a_all) - 1}..0")
    result: list[Step] = []
    for i, t in enumerate(chosen):
        last = i + 1 == len(chosen)
        a = float(a_all[t])
        x0 = (1 / a**0.5, -(((1 - a) / a) ** 0.5))
        if last:
            result.append(Step(t, {"x": x0[0], "eps": x0[1]}))
            continue
        b = float(a_all[chosen[i + 1]])
        if sampler == "dmd":
            terms = {"x": b**0.5 * x0[0], "eps": b**0.5 * x0[1], "noise": (1 - b) ** 0.5}
            result.append(Step(t, terms))
        elif sampler == "ddim":
            terms = {"x": b**0.5 * x0[0], "eps": b**0.5 * x0[1] + (1 - b) ** 0.5}
            result.append(Step(t, terms))
        else:
            result.append(Step(t, _dpmpp2m(a_all, chosen, i, x0), x0))
    return result


def _dpmpp2m(
    a_all: NDArray[np.float64], chosen: list[int], i: int, x0: tuple[float, float]
) -> dict[str, float]:
    def log_snr(t: int) -> float:
        return 0.5 * float(np.log(a_all[t] / (1 - a_all[t])))

    a, b = float(a_all[chosen[i]]), float(a_all[chosen[i + 1]])
    h = log_snr(chosen[i + 1]) - log_snr(chosen[i])
    ratio = ((1 - b) / (1 - a)) ** 0.5
    gain = -(b**0.5) * float(np.expm1(-h))
    if i == 0:
        return {"x": ratio + gain * x0[0], "eps": gain * x0[1]}
    r = (log_snr(chosen[i]) - log_snr(chosen[i - 1])) / h
    now, before = 1 + 0.5 / r, -0.5 / r
    return {
        "x": ratio + gain * now * x0[0],
        "eps": gain * now * x0[1],
        "x0": gain * before,
    }
