"""The noise schedule, conditions and the teacher's sampler, on whatever device trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from handheld_export import sampling


@dataclass(frozen=True)
class Condition:
    """What a U-Net is told besides latent and timestep.

    Parameters
    ----------
    states : Tensor, [n, tokens, width]
        Prompt embeddings.
    pooled : Tensor, [n, width] or None
        Pooled embedding; None where the U-Net takes none.
    time_ids : Tensor, [n, 6] or None
        Picture size, crop and target size in pixels.
    """

    states: Tensor
    pooled: Tensor | None = None
    time_ids: Tensor | None = None

    def __len__(self) -> int:
        return len(self.states)

    def map(self, change: Any) -> Condition:
        """Apply a function to every tensor."""
        return Condition(
            change(self.states),
            None if self.pooled is None else change(self.pooled),
            None if self.time_ids is None else change(self.time_ids),
        )

    def to(self, device: torch.device | str) -> Condition:
        """Move to a device, in float32."""
        return self.map(lambda t: t.to(device, torch.float32))

    def __getitem__(self, rows: slice | Tensor) -> Condition:
        return self.map(lambda t: t[rows])

    def repeat(self, n: int) -> Condition:
        """Repeat a single condition n times."""
        return self.map(lambda t: t.expand(n, *t.shape[1:]))

    @staticmethod
    def join(parts: Sequence[Condition]) -> Condition:
        """Put conditions one after the other."""

        def cat(tensors: list[Tensor | None]) -> Tensor | None:
            known = [t for t in tensors if t is not None]
            return torch.cat(known) if known else None

        states = torch.cat([p.states for p in parts])
        return Condition(states, cat([p.pooled for p in parts]), cat([p.time_ids for p in parts]))


class Schedule(nn.Module):
    """Tables of a variance-preserving noise schedule, float32.

    Parameters
    ----------
    config : mapping
        The scheduler's configuration.
    """

    alphas: Tensor

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        table = torch.from_numpy(sampling.alphas_cumprod(config))
        self.register_buffer("alphas", table.float())

    def __len__(self) -> int:
        return len(self.alphas)

    def signal(self, t: Tensor) -> Tensor:
        """``sqrt(a_t)``, [n, 1, 1, 1]."""
        return self.alphas[t].sqrt().view(-1, 1, 1, 1)

    def noise(self, t: Tensor) -> Tensor:
        """``sqrt(1 - a_t)``, [n, 1, 1, 1]."""
        return (1 - self.alphas[t]).sqrt().view(-1, 1, 1, 1)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """``sqrt(a) x0 + sqrt(1 - a) noise``."""
        return self.signal(t) * x0 + self.noise(t) * noise

    def denoise(self, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """``x0 = (x - sqrt(1 - a) eps) / sqrt(a)``."""
        return (x - self.noise(t) * eps) / self.signal(t)


def picture_loss(made: Tensor, wanted: Tensor, color: float, area: int = 4) -> Tensor:
    """Mean squared error of latents, that of areas' means weighed more.

    A shade of a color is a small part of the squared error and a large part of what one sees; it
    is the same over many latents, which the error of their mean singles out.

    Parameters
    ----------
    made, wanted : Tensor, [n, C, h, w]
    color : float
        Weight of the error of the means of areas of ``area`` x ``area`` latents; 0 is the plain
        error.
    """
    error = made - wanted
    loss = error.square().mean()
    if color:
        loss = loss + color * functional.avg_pool2d(error, area).square().mean()
    return loss


def predict(unet: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
    """Return the noise prediction of a diffusers U-Net, float32 [n, C, h, w]."""
    added = None
    if condition.pooled is not None:
        added = {"text_embeds": condition.pooled, "time_ids": condition.time_ids}
    out = unet(
        x, t, encoder_hidden_states=condition.states, added_cond_kwargs=added, return_dict=False
    )
    return torch.as_tensor(out[0]).float()


def guided(
    unet: nn.Module, x: Tensor, t: Tensor, condition: Condition, empty: Condition, guidance: float
) -> Tensor:
    """Predict with classifier-free guidance (Ho and Salimans, arXiv 2207.12598).

    Parameters
    ----------
    empty : Condition
        Of one empty prompt.
    guidance : float
        1 is none.
    """
    if guidance == 1.0:
        return predict(unet, x, t, condition)
    n = len(x)
    both = Condition.join([condition, empty.repeat(n)])
    eps = predict(unet, torch.cat([x, x]), torch.cat([t, t]), both)
    with_text, without = eps[:n], eps[n:]
    return without + guidance * (with_text - without)


@torch.no_grad()
def sample(
    unet: nn.Module,
    noise: Tensor,
    condition: Condition,
    empty: Condition,
    steps: Sequence[sampling.Step],
    guidance: float,
    fresh: Sequence[Tensor] = (),
) -> Tensor:
    """Run a sampler from noise to clean, scaled latents.

    Parameters
    ----------
    noise : Tensor, [n, C, h, w]
    steps : sequence of Step
        From :func:`handheld_export.sampling.plan`.
    fresh : sequence of Tensor
        Noise for each step that adds some.
    """
    x, kept, extra = noise, torch.zeros_like(noise), iter(fresh)
    for step in steps:
        t = torch.full((len(x),), step.timestep, device=x.device)
        eps = guided(unet, x, t, condition, empty, guidance)
        terms: dict[str, Tensor] = {"x": x, "eps": eps, "x0": kept}
        if "noise" in step.terms:
            terms["noise"] = next(extra)
        following = torch.zeros_like(x)
        for name, coefficient in step.terms.items():
            following = following + coefficient * terms[name]
        if step.x0 is not None:
            kept = step.x0[0] * x + step.x0[1] * eps
        x = following
    return x
