"""A training loop that can be killed at any moment and goes on, to the bit, from its checkpoint.

Every random number of a step comes from a generator seeded with (seed, step), so a checkpoint
needs no generator state: the step number is the state.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

Losses = Mapping[str, torch.Tensor]
LossFunction = Callable[[int, torch.Generator], Losses]


@dataclass(frozen=True)
class LoopConfig:
    """What a training phase needs to know besides its loss."""

    steps: int
    lr: float
    seed: int = 0
    warmup: int = 100
    schedule: int | None = None
    """Length of the learning rate's (first) schedule where it is cut short."""
    decay_from: float = 0.5
    """Fraction of the schedule after which the rate falls along a cosine; constant before."""
    restarts: tuple[tuple[int, float], ...] = ()
    """Steps at which the schedule starts again, with their peak rates (SGDR, arXiv 1608.03983)."""
    weight_decay: float = 0.0
    ema: float = 0.998
    clip: float = 1.0
    save_seconds: float = 150.0
    log_every: int = 20


def step_generator(seed: int, step: int) -> torch.Generator:
    """Return the generator of one step, a function of seed and step alone."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def learning_rate(config: LoopConfig, step: int) -> float:
    """Return the learning rate of a step: linear warm-up, constant, cosine to zero."""
    peak, begin = config.lr, 0
    ends = [*(at for at, _ in config.restarts), config.steps]
    length = config.schedule or ends[0]
    for (at, again), end in zip(config.restarts, ends[1:], strict=True):
        if step >= at:
            peak, begin, length = again, at, end - at
    step -= begin
    warm = min(1.0, (step + 1) / config.warmup)
    start = config.decay_from * length
    done = 0.0 if step < start else (step - start) / (length - start)
    return peak * warm * 0.5 * (1 + math.cos(math.pi * done))


def save_atomic(state: object, path: Path) -> None:
    """Write a checkpoint so that a reader sees the old one or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("wb") as handle:
        torch.save(state, handle)
        handle.flush()
        os.fsync(handle.fileno())
    partial.replace(path)


def load_ema(module: nn.Module, path: Path) -> int:
    """Load the averaged weights of a checkpoint into a module and return the checkpoint's step."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    module.load_state_dict(state["ema"])
    return int(state["step"])


@torch.no_grad()
def _update_average(ema: dict[str, torch.Tensor], module: nn.Module, share: float) -> None:
    for name, value in module.state_dict().items():
        if value.is_floating_point():
            ema[name].lerp_(value, share)
        else:
            ema[name].copy_(value)


def train(
    module: nn.Module, loss: LossFunction, config: LoopConfig, checkpoint: Path, log: Path
) -> list[float]:
    """Train until `config.steps`, going on from `checkpoint` if it exists.

    Parameters
    ----------
    module
        What is trained, in place.
    loss
        Called with (step, generator); its "loss" entry is minimised, the others are logged.
    config
        Steps, learning rate and the like.
    checkpoint
        File with the weights, the averaged weights, the optimizer's state and the step.
    log
        JSON lines, one each `config.log_every` steps.

    Returns
    -------
    list of float
        The losses of the steps that this call ran.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters,
        lr=config.lr,
        betas=(0.9, 0.99),
        weight_decay=config.weight_decay,
        fused=True,
    )
    start = 0
    ema = {name: value.detach().clone() for name, value in module.state_dict().items()}
    if checkpoint.exists():
        state: dict[str, Any] = torch.load(checkpoint, map_location="cpu", weights_only=True)
        module.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        ema, start = state["ema"], int(state["step"])
    log.parent.mkdir(parents=True, exist_ok=True)
    history: list[float] = []

    def save(step: int) -> None:
        state = {
            "model": module.state_dict(),
            "ema": ema,
            "optimizer": optimizer.state_dict(),
            "step": step,
        }
        save_atomic(state, checkpoint)

    module.train()
    saved = began = time.monotonic()
    for step in range(start, config.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        losses = loss(step, step_generator(config.seed, step))
        losses["loss"].backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, config.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        rate = min(config.ema, (step + 1) / (step + 10))
        _update_average(ema, module, 1 - rate)
        history.append(float(losses["loss"].detach()))
        if (step + 1) % config.log_every == 0:
            entry: dict[str, float] = {k: float(v.detach()) for k, v in losses.items()}
            entry |= {
                "step": step + 1,
                "seconds_per_step": (time.monotonic() - began) / (step + 1 - start),
            }
            with log.open("a") as handle:
                handle.write(json.dumps(entry) + "\n")
        if time.monotonic() - saved > config.save_seconds:
            save(step + 1)
            saved = time.monotonic()
    if start < config.steps:
        save(config.steps)
    return history
