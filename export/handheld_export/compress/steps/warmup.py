"""Regression on the teacher's own (noise, picture) pairs, the warm-up of one-step distillation."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from handheld.errors import UsageError
from handheld.planning import Shape
from handheld.reshaping import WarmupShape
from handheld_export import sampling
from handheld_export.compress import diffusion, samples
from handheld_export.compress.data import Prepared, keep
from handheld_export.compress.engine import Draws, Loop, Trained, Trainer
from handheld_export.compress.load import Load, macs, outputs, params, passes
from handheld_export.compress.step import Context, Step, Student, build_unet


class Warmup(WarmupShape, Step):
    """Train one step from noise to what the teacher's sampler makes of that noise.

    DMD2 (arXiv 2405.14867) uses it before the distribution loss where one step is to be enough:
    10,000 pairs, learning rate 1e-5, 2,000 iterations for SDXL.
    """

    kind: ClassVar[str] = "warmup"
    before: ClassVar[tuple[str, ...]] = ("dmd", "quantize", "activations")

    train: Loop
    pairs: int = Field(default=10_000, ge=1)
    sampler: Literal["ddim", "dpmpp2m"] = "dpmpp2m"
    teacher_steps: int = Field(default=25, ge=1)
    guidance: float | None = None
    timestep: int = Field(default=399, ge=0, le=999)
    """The timestep that the pure-noise input is conditioned on."""
    color: float = Field(default=0.0, ge=0)
    """Weight of the error of areas' means, where colors are decided. A second warm-up may have it
    when the first has found the shapes."""
    pairs_seed: int = 1
    """Of noise and captions; warm-ups that agree on it share their pairs."""

    def load(self, after: Shape, reference: Shape, teacher: Shape) -> Load:
        """Count the drawing of pairs and a plain regression."""
        loop = self.train
        runs = self.pairs * self.teacher_steps * (1 if self.guidance == 1.0 else 2)
        work = macs(teacher) * runs + passes(loop) * macs(after) * loop.batch * loop.steps
        saved = outputs(after.layers)
        return Load((params(after),), (), saved, work, loop)

    def run(self, student: Student, context: Context) -> Student:
        """Make the pairs, or read them from the cache, and train."""
        regression = Regression(self, context)
        unet = build_unet(student.unet_config, student.unet)
        network = Trained(unet, self.train.lr, self.train.clip)
        trainer = Trainer(
            self.kind,
            self.train,
            {"generator": network},
            context.machine,
            context.work,
            context.essence,
            context.watch,
        )

        def one(trainer: Trainer) -> dict[str, Tensor]:
            loss = regression.loss(trainer, trainer.draws())
            trainer.update("generator", loss)
            return {"loss": loss}

        losses = trainer.run(
            one,
            samples.drawer(context, {"sampler": "dmd", "timesteps": [self.timestep]}),
            context.sample_every,
        )
        student.unet = trainer.averaged()
        student.settings |= {"sampler": "dmd", "timesteps": [self.timestep], "guidance": 1.0}
        student.settings |= {"steps": 1}
        student.history.append(
            {
                "step": self.kind,
                "settings": self.model_dump() | {"guidance": context.guidance(self.guidance)},
                "loss": _mean(losses),
            }
        )
        return student


class Regression:
    """The loss of a warm-up, on the pairs that it made or finds in the cache."""

    def __init__(self, warmup: Warmup, context: Context) -> None:
        self._pairs = teacher_pairs(
            context,
            warmup.pairs,
            warmup.sampler,
            warmup.teacher_steps,
            warmup.guidance,
            warmup.pairs_seed,
        )
        self._data, self._schedule = context.data, context.schedule
        self.timestep, self._color = warmup.timestep, warmup.color

    @classmethod
    def of(cls, student: Student, context: Context, color: float | None = None) -> Regression:
        """Go on with the student's own warm-up.

        Parameters
        ----------
        color : float, optional
            Weight of areas' means, if not the warm-up's.

        Raises
        ------
        UsageError
            If it had none.
        """
        for entry in reversed(student.history):
            if entry["step"] == Warmup.kind:
                given = {} if color is None else {"color": color}
                return cls(Warmup.model_validate(entry["settings"] | given), context)
        raise UsageError(
            "no warm-up made pairs of noise and picture",
            field="dmd.regression",
            remedy="put a warmup step before, or leave regression out",
        )

    def loss(self, trainer: Trainer, draws: Draws) -> Tensor:
        """Error of the generator's latents on one batch of pairs."""
        picked = draws.integers(0, len(self._pairs)).cpu()
        noise = self._pairs.rows("noise", picked).to(trainer.device)
        wanted = self._pairs.rows("latents", picked).to(trainer.device)
        rows = self._pairs.rows("caption", picked).long()
        condition = self._data.condition(rows).to(trainer.device)
        t = torch.full((len(noise),), self.timestep, device=trainer.device)
        with trainer.accelerator.autocast():
            eps = diffusion.predict(trainer.models["generator"], noise, t, condition)
        made = self._schedule.denoise(noise, eps, t)
        return diffusion.picture_loss(made, wanted, self._color)


def _mean(losses: list[dict[str, float]]) -> float | None:
    last = [entry["loss"] for entry in losses[-50:]]
    return sum(last) / len(last) if last else None


@torch.no_grad()
def teacher_pairs(
    context: Context, count: int, sampler: str, steps: int, guidance: float | None, seed: int
) -> Prepared:
    """Draw with the teacher from known noise, in resumable pieces of 64 pairs.

    Returns
    -------
    Prepared
        ``noise`` and ``latents`` [count, C, h, w], ``caption`` [count], rows of the dataset.
    """
    data = context.data
    guidance = context.guidance(guidance)
    key = context.key(
        data=data.folder.name, unet=context.teacher.unet_sha256,
        scheduler=dict(context.teacher.scheduler), sampler=sampler, steps=steps,
        guidance=guidance, count=count, seed=seed,
    )  # fmt: skip
    folder = context.cache / f"pairs-{key}"
    if (folder / "meta.json").is_file():
        return Prepared(folder)
    acc = context.machine.accelerator
    chosen = sampling.timesteps(len(context.schedule), steps, "trailing")
    plan = sampling.plan(context.teacher.scheduler, sampler, chosen)
    parts = folder.with_name(folder.name + ".parts")
    parts.mkdir(parents=True, exist_ok=True)
    empty = data.empty().to(context.device)
    teacher = context.load_teacher()
    size = 64
    pieces = -(-count // size)
    for piece in range(acc.process_index, pieces, acc.num_processes):
        path = parts / f"{piece:06}"
        if (path / "meta.json").is_file():
            continue
        generator = torch.Generator().manual_seed(seed * 1_000_003 + piece)
        n = min(size, count - piece * size)
        noise = torch.randn(n, *data.latent_shape, generator=generator)
        caption = torch.randint(len(data), (n,), generator=generator)
        condition = data.condition(caption).to(context.device)
        with acc.autocast():
            made = diffusion.sample(
                teacher, noise.to(context.device), condition, empty, plan, guidance
            )
        tensors = {"noise": noise.half(), "latents": made.half().cpu(), "caption": caption}
        keep(path, tensors, {"count": n})
        context.watch.step("teacher pairs", piece + 1, pieces, {})
    acc.wait_for_everyone()
    if acc.is_main_process:
        read = [Prepared(parts / f"{i:06}") for i in range(pieces)]
        joined = {k: torch.cat([p.whole(k) for p in read]) for k in ("noise", "latents", "caption")}
        keep(folder, joined, {"count": count, "guidance": guidance, "sampler": sampler})
    acc.wait_for_everyone()
    return Prepared(folder)
