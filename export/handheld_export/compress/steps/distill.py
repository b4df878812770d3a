"""Distillation of a trimmed or quantized student from the float student that it is to imitate."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from handheld.errors import UsageError
from handheld.planning import Shape
from handheld_export.compress import diffusion, samples
from handheld_export.compress.allocate import bits_per_weight
from handheld_export.compress.diffusion import Condition, Schedule
from handheld_export.compress.engine import STREAMS, Loop, Trained, Trainer
from handheld_export.compress.fakequant import extract, insert
from handheld_export.compress.load import Load, macs, outputs, params, passes
from handheld_export.compress.step import Context, Step, Student, build_unet, read_all
from handheld_export.compress.steps.dmd import FakeScore, Matching, check_matching, matching_macs
from handheld_export.compress.steps.trim import source_names


class Distill(Step):
    """Train on the float student's output and features; quantized layers learn through rounding.

    ``output`` and ``features`` are BK-SDM's losses (arXiv 2305.15798), ``attention`` is KOALA's on
    self-attention (arXiv 2312.04005). ``matching`` keeps DMD2's distribution loss on, so that a
    one-step student goes on learning from the teacher and not from one picture per noise alone.
    Two of these steps in a row are BitsFusion's two stages (arXiv 2406.04333); a student of many
    steps is then trained where its quantization error is, ``error_aware``.
    """

    kind: ClassVar[str] = "distill"
    after: ClassVar[tuple[str, ...]] = ("trim", "quantize")
    before: ClassVar[tuple[str, ...]] = ("activations",)

    train: Loop
    output: float = Field(default=1.0, ge=0)
    color: float = Field(default=0.0, ge=0)
    """Weight of the error of areas' means in ``output``, where colors are decided."""
    features: float = Field(default=0.1, ge=0)
    attention: float = Field(default=0.0, ge=0)
    matching: float = Field(default=0.0, ge=0)
    fake_updates: int = Field(default=2, ge=1)
    fake_first: int = Field(default=0, ge=0)
    fake_lr: float | None = Field(default=None, gt=0)
    fake_weight: float = Field(default=1.0, ge=1)
    guidance: float | None = None
    gan_generator: float = Field(default=5e-3, ge=0)
    gan_head: float = Field(default=1e-2, ge=0)
    low: float = Field(default=0.02, ge=0, lt=1)
    high: float = Field(default=0.98, gt=0, le=1)
    error_aware: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> Distill:
        check_matching(self.low, self.high, self.gan_generator, self.gan_head)
        return self

    def load(self, after: Shape, reference: Shape, teacher: Shape) -> Load:
        """Count student and reference, and with ``matching`` what DMD2 needs."""
        loop, own = self.train, macs(after)
        work = passes(loop) * own + macs(reference)
        trained, frozen = [params(after)], [params(reference)]
        saved = outputs(after.layers)
        if self.matching:
            work += matching_macs(
                own, macs(teacher), self.fake_updates + self.fake_first / loop.steps, passes(loop)
            )
            trained.append(params(teacher))
            frozen.append(params(teacher))
            saved = max(2 * saved, 2 * outputs(teacher.layers))
        return Load(tuple(trained), tuple(frozen), saved, work * loop.batch * loop.steps, loop)

    def run(self, student: Student, context: Context) -> Student:
        """Train."""
        data, schedule = context.data, context.schedule
        unet = build_unet(student.unet_config, student.unet)
        insert(unet, student.quantized)
        reference = context.frozen(student.reference_config, student.reference)
        own = student.settings.get("timesteps")
        one_step = student.settings.get("sampler") == "dmd" and own
        timesteps = tuple(int(t) for t in own) if one_step and own else None
        if self.matching and not timesteps:
            raise UsageError(
                "only a student of DMD matches distributions",
                field="distill.matching",
                remedy="put a dmd step before, or leave matching out",
            )
        levels = _levels(timesteps, schedule)
        if self.error_aware and len(levels) == 1:
            raise UsageError(
                "a student of one step has one timestep",
                field="distill.error_aware",
                remedy="leave it out",
            )
        networks = {"generator": Trained(unet, self.train.lr, self.train.clip)}
        matching = None
        if self.matching and timesteps:
            teacher = context.load_teacher()
            score = build_unet(context.teacher.unet.config, read_all(context.teacher, "unet"))
            fake = FakeScore(score, self.train.seed)
            lr = self.fake_lr or self.train.lr
            networks["fake"] = Trained(fake, lr, self.train.clip)
            matching = Matching(
                timesteps=timesteps,
                latent=data.latent_shape,
                schedule=schedule,
                teacher=teacher,
                empty=data.empty().to(context.device),
                guidance=context.guidance(self.guidance),
                gan_generator=self.gan_generator,
                gan_head=self.gan_head,
                fake_weight=self.fake_weight,
                low=self.low,
                high=self.high,
            )
        trainer = Trainer(
            self.kind,
            self.train,
            networks,
            context.machine,
            context.work,
            context.essence,
            context.watch,
        )
        taps = Taps(trainer.bare("generator"), reference, student, self.features, self.attention)
        if self.error_aware:
            levels = by_error(
                unet, reference, levels, data, context, self.train.seed, pure=timesteps is not None
            )

        def one(trainer: Trainer) -> dict[str, Tensor]:
            losses: dict[str, Tensor] = {}
            if matching is not None:
                first = self.fake_first if trainer.step == 0 else 0
                for turn in range(first + self.fake_updates):
                    draws = trainer.draws(1 + turn)
                    rows = draws.integers(0, len(data)).cpu()
                    condition = data.condition(rows).to(trainer.device)
                    real = data.rows("latents", rows).to(trainer.device)
                    losses |= matching.update_fake(trainer, draws, condition, real)
            draws = trainer.draws()
            rows = draws.integers(0, len(data)).cpu()
            condition = data.condition(rows).to(trainer.device)
            latents = data.rows("latents", rows).to(trainer.device)
            t = levels.to(latents.device)[draws.integers(0, len(levels))]
            noise = draws.normal(data.latent_shape)
            x = _inputs(latents, noise, t, levels, schedule, pure=timesteps is not None)
            total, figures = self._imitate(
                trainer, taps, reference, x, t, condition, schedule if timesteps else None
            )
            if matching is not None:
                extra, _, more = matching.generator_loss(
                    trainer, trainer.models["generator"], trainer.draws(STREAMS - 1), condition
                )
                total = total + self.matching * extra
                figures |= more
            trainer.update("generator", total)
            return losses | {"loss": total} | figures

        losses = trainer.run(one, samples.drawer(context, student.settings), context.sample_every)
        taps.close()
        averaged = trainer.averaged()
        if student.quantized:
            whole = build_unet(student.unet_config, student.unet)
            insert(whole, student.quantized)
            whole.load_state_dict(averaged)
            student.quantized = extract(whole)
            averaged = state_without_scales(averaged)
        student.unet = averaged
        student.history.append(
            {
                "step": self.kind,
                "settings": self.model_dump()
                | ({"guidance": context.guidance(self.guidance)} if self.matching else {}),
                "bits_per_weight": bits_per_weight(student.quantized) or None,
                "losses": losses[-1] if losses else None,
            }
        )
        return student

    def _imitate(
        self,
        trainer: Trainer,
        taps: Taps,
        reference: nn.Module,
        x: Tensor,
        t: Tensor,
        condition: Condition,
        schedule: Schedule | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compare pictures with a schedule, predicted noise without."""
        with trainer.accelerator.autocast():
            with torch.no_grad():
                wanted = diffusion.predict(reference, x, t, condition)
            made = diffusion.predict(trainer.models["generator"], x, t, condition)
        if schedule is not None:
            made, wanted = schedule.denoise(x, made, t), schedule.denoise(x, wanted, t)
        output = diffusion.picture_loss(made, wanted, self.color)
        total = self.output * output
        figures = {"output": output}
        for name, weight in (("features", self.features), ("attention", self.attention)):
            if weight:
                figures[name] = taps.distance(name)
                total = total + weight * figures[name]
        return total, figures


_STAGE = re.compile(r"mid_block|(down|up)_blocks\.\d+")


class Taps:
    """Features of student and reference, side by side.

    ``features`` are what every stage gives; ``attention`` is what self-attention layers give that
    both have.
    """

    def __init__(
        self,
        unet: nn.Module,
        reference: nn.Module,
        student: Student,
        features: float,
        attention: float,
    ) -> None:
        own, other = dict(unet.named_modules()), dict(reference.named_modules())
        moved = source_names(student.reference_config, student.unet_config)
        pairs: dict[str, dict[str, str]] = {"features": {}, "attention": {}}
        for name in own:
            source = name
            for new, old in moved.items():
                if f"{name}.".startswith(new):
                    source = (old + f"{name}.".removeprefix(new)).removesuffix(".")
            if features and source in other and _STAGE.fullmatch(name):
                pairs["features"][name] = source
            if attention and name.endswith(".attn1") and source in other:
                pairs["attention"][name] = source
        self._pairs = pairs
        self._kept: dict[tuple[bool, str], Tensor] = {}
        self._hooks = []
        for given in pairs.values():
            for name, source in given.items():
                self._hooks.append(own[name].register_forward_hook(self._keeper(False, name)))
                self._hooks.append(other[source].register_forward_hook(self._keeper(True, source)))

    def _keeper(self, reference: bool, name: str) -> Any:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            value = output[0] if isinstance(output, tuple) else output
            self._kept[reference, name] = value

        return keep

    def distance(self, kind: str) -> Tensor:
        """Mean over layers and pictures of the squared distance, relative to the mean square."""
        found = []
        for name, source in self._pairs[kind].items():
            wanted = self._kept[True, source].float()
            error = (self._kept[False, name].float() - wanted).square().flatten(1).mean(dim=1)
            found.append((error / wanted.square().flatten(1).mean(dim=1).clamp_min(1e-6)).mean())
        return torch.stack(found).mean()

    def close(self) -> None:
        """Take the hooks away."""
        for hook in self._hooks:
            hook.remove()


def _levels(timesteps: tuple[int, ...] | None, schedule: Schedule) -> Tensor:
    """Timesteps to draw from, each as often as it is to be trained."""
    return torch.arange(len(schedule)) if timesteps is None else torch.tensor(timesteps)


def _inputs(
    latents: Tensor, noise: Tensor, t: Tensor, levels: Tensor, schedule: Schedule, *, pure: bool
) -> Tensor:
    """Latents as the U-Net sees them in use: pure noise in a distilled student's first step."""
    noisy = schedule.add_noise(latents, noise, t)
    if not pure:
        return noisy
    first = (t == int(levels.max())).view(-1, 1, 1, 1)
    return torch.where(first, noise, noisy)


@torch.no_grad()
def by_error(
    unet: nn.Module,
    reference: nn.Module,
    levels: Tensor,
    data: Any,
    context: Context,
    seed: int,
    *,
    pure: bool,
    size: int = 1000,
) -> Tensor:
    """Return timesteps as often as their share of the quantization error says.

    The error of the predicted noise at 20 levels, interpolated; half of the draws stay uniform, so
    that no level is forgotten. Measured once, before training, from fixed noise.
    """
    schedule = context.schedule
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(len(data), (8,), generator=generator)
    latents = data.rows("latents", rows).to(context.device)
    noise = torch.randn(latents.shape, generator=generator).to(context.device)
    condition: Condition = data.condition(rows).to(context.device)
    at = torch.linspace(0, len(levels) - 1, 20).round().long()
    errors = []
    for level in levels[at]:
        t = torch.full((len(rows),), int(level), device=context.device)
        x = _inputs(latents, noise, t, levels, schedule, pure=pure)
        with context.machine.accelerator.autocast():
            made = diffusion.predict(unet, x, t, condition)
            wanted = diffusion.predict(reference, x, t, condition)
        difference = made - wanted
        errors.append(float(difference.square().mean()))
    curve = torch.tensor(errors, dtype=torch.float64)
    place = torch.linspace(0, len(at) - 1, len(levels), dtype=torch.float64)
    low = place.floor().long().clamp_max(len(at) - 2)
    share = curve[low] + (curve[low + 1] - curve[low]) * (place - low)
    share = 0.5 * share / share.sum() + 0.5 / len(levels)
    cumulative = share.cumsum(0)
    picks = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    return levels[torch.searchsorted(cumulative, picks).clamp_max(len(levels) - 1)]


def state_without_scales(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Drop what only training needs."""
    return {k: v for k, v in state.items() if not k.endswith(".log_scale")}
