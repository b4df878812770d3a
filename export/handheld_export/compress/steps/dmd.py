"""DMD2: distribution matching distillation to one step or a few.

Yin et al., "Improved Distribution Matching Distillation for Fast Image Synthesis",
arXiv 2405.14867.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from handheld.errors import UsageError
from handheld.planning import Shape
from handheld.reshaping import DMDShape
from handheld_export.compress import diffusion, samples
from handheld_export.compress.diffusion import Condition, Schedule
from handheld_export.compress.engine import STREAMS, Draws, Loop, Trained, Trainer
from handheld_export.compress.load import Load, macs, outputs, params, passes
from handheld_export.compress.step import Context, Step, Student, build_unet, read_all
from handheld_export.compress.steps.warmup import Regression


class FakeScore(nn.Module):
    """The score of what the generator draws, with a real-or-generated head on its features.

    Parameters
    ----------
    unet : UNet2DConditionModel
        Starts as the teacher.
    seed : int
        Of the head's first weights.
    """

    def __init__(self, unet: Any, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.unet = unet
        channels = int(unet.config["block_out_channels"][-1])
        groups = next(g for g in (32, 16, 8, 4, 2, 1) if channels % g == 0)
        self.head = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.GroupNorm(groups, channels),
            nn.SiLU(),
            nn.Conv2d(channels, 1, 1),
        )
        inner = unet.mid_block if unet.mid_block is not None else unet.down_blocks[-1]
        self._features: list[Tensor] = []
        inner.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, args: Any, output: Any) -> None:
        self._features[:] = [output[0] if isinstance(output, tuple) else output]

    def forward(
        self, x: Tensor, t: Tensor, states: Tensor, pooled: Tensor | None, time_ids: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the noise prediction and one logit per picture, larger where it looks real."""
        eps = diffusion.predict(self.unet, x, t, Condition(states, pooled, time_ids))
        logits = self.head(self._features.pop()).float().mean(dim=(1, 2, 3))
        return eps, logits


def matching_gradient(x0: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """Return the direction in which a picture becomes less likely.

    Parameters
    ----------
    x0, real, fake : Tensor, [n, C, h, w]
        What the generator drew; what real and fake score make of it once noised.

    Returns
    -------
    Tensor
        ``(fake - real) / mean |x0 - real|``, the mean over each picture; eq. 8 of DMD
        (arXiv 2311.18828).
    """
    weight = (x0 - real).abs().mean(dim=(1, 2, 3), keepdim=True)
    return (fake - real) / weight.clamp_min(1e-6)


def matching_macs(
    student: float, teacher: float, fake_updates: float, passes: int, steps: int = 1
) -> float:
    """Return the MACs of one round of both updates for one picture."""
    drawing = (steps - 1) / 2 * student
    fake = drawing + student + 2 * passes * teacher
    real = 2 * teacher + teacher
    gan = passes * teacher
    return fake_updates * fake + drawing + passes * student + real + gan


def check_matching(low: float, high: float, gan_generator: float, gan_head: float) -> None:
    """Refuse settings that contradict each other.

    Raises
    ------
    ValueError
    """
    if low >= high:
        raise ValueError("low must be below high")
    if gan_generator and not gan_head:
        raise ValueError("gan_generator needs a head that learns: give gan_head, or set both to 0")


class DMD(DMDShape, Step):
    """Match the distribution of the teacher's pictures in one step or a few."""

    kind: ClassVar[str] = "dmd"
    before: ClassVar[tuple[str, ...]] = ("dmd", "quantize", "activations")

    train: Loop
    """``steps`` counts updates of the generator."""
    fake_lr: float | None = Field(default=None, gt=0)
    """Learning rate of the fake score; the generator's if not given."""
    head_lr: float | None = Field(default=None, gt=0)
    """Learning rate of the head on its features; the fake score's if not given. The head starts
    from nothing, and a few hundred updates at a rate that suits a trained U-Net teach it nothing:
    its loss then stays at ``2 ln 2``."""
    fake_updates: int = Field(default=5, ge=1)
    """Updates of the fake score for each of the generator."""
    fake_first: int = Field(default=0, ge=0)
    """Updates of the fake score before the first of the generator: it starts as the teacher, whose
    pictures are not the generator's."""
    fake_weight: float = Field(default=1.0, ge=1)
    """Largest weight of a timestep in the fake score's loss; weights are ``1 / SNR``, and 1 is the
    plain loss. A small error of the noise is a large one of the picture where little signal is
    left, and colors are decided there; give what the teacher was trained with."""
    guidance: float | None = None
    """Of the real score."""
    regression: float = Field(default=0.0, ge=0)
    """Weight of the warm-up's loss, on its pairs, which DMD kept on and DMD2 did without: it holds
    the student where batches are small and the distribution loss is noisy."""
    color: float | None = Field(default=None, ge=0)
    """Weight of areas' means in that loss, as in a warm-up; the warm-up's if not given."""
    gan_generator: float = Field(default=5e-3, ge=0)
    gan_head: float = Field(default=1e-2, ge=0)
    low: float = Field(default=0.02, ge=0, lt=1)
    high: float = Field(default=0.98, gt=0, le=1)
    """Fractions of the schedule between which scores are compared. What the student draws must be
    right in its large parts before the upper one can be low: little noise hides little."""

    @model_validator(mode="after")
    def _consistent(self) -> DMD:
        check_matching(self.low, self.high, self.gan_generator, self.gan_head)
        if self.color is not None and not self.regression:
            raise ValueError("color is of the regression's loss: give regression, too")
        return self

    def load(self, after: Shape, reference: Shape, teacher: Shape) -> Load:
        """Count generator, fake score, which sees two batches, and teacher."""
        loop, own, whole = self.train, macs(after), macs(teacher)
        updates = self.fake_updates + self.fake_first / loop.steps
        turns = matching_macs(own, whole, updates, passes(loop), len(self.timesteps))
        if self.regression:
            turns += passes(loop) * own
        trained = (params(after), params(teacher))
        saved = max(outputs(after.layers), 2 * outputs(teacher.layers))
        return Load(trained, (params(teacher),), saved, turns * loop.batch * loop.steps, loop)

    def run(self, student: Student, context: Context) -> Student:
        """Train generator and fake score by turns."""
        data, schedule = context.data, context.schedule
        teacher = context.load_teacher()
        guidance = context.guidance(self.guidance)
        empty = data.empty().to(context.device)
        loop = self.train
        fake_lr = self.fake_lr or loop.lr
        rates = {"head.": self.head_lr} if self.head_lr else {}
        fake = FakeScore(
            build_unet(
                context.teacher.unet.config,
                read_all(context.teacher, "unet"),
            ),
            loop.seed,
        )
        trainer = Trainer(
            self.kind,
            loop,
            {
                "generator": Trained(
                    build_unet(student.unet_config, student.unet), loop.lr, loop.clip
                ),
                "fake": Trained(fake, fake_lr, loop.clip, rates),
            },
            context.machine,
            context.work,
            context.essence,
            context.watch,
        )
        matching = Matching(
            timesteps=tuple(self.timesteps),
            latent=data.latent_shape,
            schedule=schedule,
            teacher=teacher,
            empty=empty,
            guidance=guidance,
            gan_generator=self.gan_generator,
            gan_head=self.gan_head,
            fake_weight=self.fake_weight,
            low=self.low,
            high=self.high,
        )

        regression = Regression.of(student, context, self.color) if self.regression else None
        if regression is not None and regression.timestep != self.timesteps[0]:
            raise UsageError(
                f"the warm-up's timestep is {regression.timestep}, the first one here "
                f"{self.timesteps[0]}",
                field="dmd.regression",
                remedy="give both the same, or leave regression out",
            )

        def one(trainer: Trainer) -> dict[str, Tensor]:
            losses: dict[str, Tensor] = {}
            first = self.fake_first if trainer.step == 0 else 0
            for turn in range(first + self.fake_updates):
                draws = trainer.draws(1 + turn)
                rows = draws.integers(0, len(data)).cpu()
                condition = data.condition(rows).to(trainer.device)
                real = data.rows("latents", rows).to(trainer.device)
                losses |= matching.update_fake(trainer, draws, condition, real)
            draws = trainer.draws()
            condition = data.condition(draws.integers(0, len(data)).cpu()).to(trainer.device)
            generator = trainer.models["generator"]
            loss, _, figures = matching.generator_loss(trainer, generator, draws, condition)
            if regression is not None:
                figures["regression"] = regression.loss(trainer, trainer.draws(STREAMS - 1))
                loss = loss + self.regression * figures["regression"]
            trainer.update("generator", loss)
            return losses | {"loss": loss} | figures

        losses = trainer.run(
            one,
            samples.drawer(context, {"sampler": "dmd", "timesteps": self.timesteps}),
            context.sample_every,
        )
        student.unet = trainer.averaged()
        student.settings |= {
            "sampler": "dmd",
            "timesteps": self.timesteps,
            "steps": len(self.timesteps),
            "guidance": 1.0,
        }
        student.history.append(
            {
                "step": self.kind,
                "settings": self.model_dump() | {"guidance": guidance},
                "losses": losses[-1] if losses else None,
            }
        )
        return student


class Matching:
    """The two updates of DMD2, for any generator that predicts noise.

    Parameters
    ----------
    timesteps : tuple of int
        At which the generator is evaluated, noisiest first.
    latent : tuple of int
        Shape of one picture's latents, [C, h, w].
    schedule : Schedule
    teacher : nn.Module
        The real score.
    empty : Condition
        Of one empty prompt, for guidance.
    fake_weight : float
        Largest weight of a timestep in the fake score's loss.
    """

    def __init__(
        self,
        *,
        timesteps: tuple[int, ...],
        latent: tuple[int, ...],
        schedule: Schedule,
        teacher: nn.Module,
        empty: Condition,
        guidance: float,
        gan_generator: float,
        gan_head: float,
        fake_weight: float = 1.0,
        low: float = 0.02,
        high: float = 0.98,
    ) -> None:
        self.timesteps = timesteps
        self.latent = latent
        self.schedule = schedule
        self.teacher = teacher
        self.empty = empty
        self.guidance = guidance
        self.gan_generator = gan_generator
        self.gan_head = gan_head
        self.fake_weight = fake_weight
        count = len(schedule)
        self.range = (int(low * count), int(high * count))
        # The fake score learns a little beyond where it is asked, as published: all of it.
        self.reach = min(count, int((high + 0.02) * count))

    def generate(
        self, trainer: Trainer, generator: nn.Module, draws: Draws, condition: Condition
    ) -> Tensor:
        """Draw with the generator; gradients flow through its last evaluation.

        With several timesteps this is backward simulation: the latents that the last evaluation
        sees are the generator's own.
        """
        last = draws.one(len(self.timesteps))
        x, x0 = draws.normal(self.latent), None
        for i, step in enumerate(self.timesteps[: last + 1]):
            t = torch.full((len(x),), step, device=x.device)
            if x0 is not None:
                x = self.schedule.add_noise(x0, draws.normal(self.latent), t)
            with torch.set_grad_enabled(i == last and torch.is_grad_enabled()):
                with trainer.accelerator.autocast():
                    eps = diffusion.predict(generator, x, t, condition)
                x0 = self.schedule.denoise(x, eps, t)
        assert x0 is not None
        return x0

    def update_fake(
        self, trainer: Trainer, draws: Draws, condition: Condition, real: Tensor
    ) -> dict[str, Tensor]:
        """Teach the fake score what the generator draws, and the head to tell it from real."""
        with torch.no_grad():
            made = self.generate(trainer, trainer.models["generator"], draws, condition)
        n = len(made)
        t = draws.integers(0, self.reach)
        noise = draws.normal(self.latent)
        noisy = self.schedule.add_noise(made, noise, t)
        if self.gan_head == 0:
            with trainer.accelerator.autocast():
                eps, logits = _call(trainer.models["fake"], noisy, t, condition)
            # The head has a part of nothing in the loss: data parallel expects all gradients.
            loss = self._denoising(eps, noise, t) + 0 * logits.sum()
            trainer.update("fake", loss)
            return {"fake": loss}
        other = self.schedule.add_noise(real, draws.normal(self.latent), t)
        both = Condition.join([condition, condition])
        with trainer.accelerator.autocast():
            eps, logits = _call(
                trainer.models["fake"], torch.cat([noisy, other]), torch.cat([t, t]), both
            )
        denoising = self._denoising(eps[:n], noise, t)
        head = functional.softplus(logits[:n]).mean() + functional.softplus(-logits[n:]).mean()
        trainer.update("fake", denoising + self.gan_head * head)
        right = torch.cat([logits[:n] < 0, logits[n:] > 0]).float().mean()
        return {"fake": denoising, "head": head, "head_right": right}

    def _denoising(self, eps: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        weight = (self.schedule.noise(t) / self.schedule.signal(t)).square()
        return (weight.clamp(1.0, self.fake_weight) * (eps - noise).square()).mean()

    def generator_loss(
        self,
        trainer: Trainer,
        generator: nn.Module,
        draws: Draws,
        condition: Condition,
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the loss whose gradient is DMD2's, the drawn latents, and figures for the log."""
        x0 = self.generate(trainer, generator, draws, condition)
        fake = trainer.bare("fake")
        t = draws.integers(*self.range)
        noise = draws.normal(self.latent)
        with torch.no_grad(), trainer.accelerator.autocast():
            noisy = self.schedule.add_noise(x0, noise, t)
            eps = diffusion.guided(self.teacher, noisy, t, condition, self.empty, self.guidance)
            real_x0 = self.schedule.denoise(noisy, eps, t)
            eps, _ = _call(fake, noisy, t, condition)
            fake_x0 = self.schedule.denoise(noisy, eps, t)
            direction = matching_gradient(x0, real_x0, fake_x0)
        figures = {"matching": direction.square().mean()}
        if self.gan_generator:
            # Only the pictures' gradient is wanted, so the fake score's weights get none.
            point = x0.detach().requires_grad_()
            t = draws.integers(0, self.reach)
            with torch.enable_grad(), trainer.accelerator.autocast():
                noisy = self.schedule.add_noise(point, draws.normal(self.latent), t)
                _, logits = _call(fake, noisy, t, condition)
                gan = functional.softplus(-logits)
            (slope,) = torch.autograd.grad(gan.sum(), point)
            pixels = x0[0].numel()
            direction = direction + self.gan_generator * slope * pixels
            figures["gan"] = gan.detach().mean()
        wanted = (x0 - direction).detach()
        return 0.5 * functional.mse_loss(x0, wanted), x0, figures


def _call(fake: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
    eps, logits = fake(x, t, condition.states, condition.pooled, condition.time_ids)
    return eps, logits
