"""The training loop of all steps, on accelerate.

Every random number of a step is drawn for the whole batch from a generator seeded with (seed,
step, stream), and each process takes its rows. So a checkpoint needs no generator state, a run
that was killed goes on to the bit, and several processes see what one would.
"""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from pydantic import Field
from torch import Tensor, nn

from handheld.errors import OutputError, UsageError
from handheld.files import locked, write_file
from handheld.program import Model

SHARDED = ("BasicTransformerBlock", "ResnetBlock2D")
"""Blocks that FSDP gathers one at a time."""


class TrainingError(UsageError):
    """Training cannot go on; its checkpoints are kept."""

    code = "training"
    exit_code = 1


class Loop(Model):
    """What every training step of a recipe may say."""

    steps: int = Field(ge=1)
    batch: int = Field(default=16, ge=1)
    """Pictures of one update, over all processes."""
    lr: float = Field(gt=0)
    seed: int = 0
    warmup: int = Field(default=20, ge=0)
    decay_from: float = Field(default=0.6, ge=0, le=1)
    """Fraction of the steps after which the rate falls along a cosine to zero."""
    weight_decay: float = Field(default=0.0, ge=0)
    ema: float = Field(default=0.99, ge=0, lt=1)
    clip: float = Field(default=1.0, gt=0)
    save_seconds: float = Field(default=120.0, gt=0)
    log_every: int = Field(default=10, ge=1)
    sample_every: int = Field(default=0, ge=0)
    """Draw a grid of pictures this often; 0 never does."""
    checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""

    def rate(self, step: int, *, warm_up: bool = True) -> float:
        """Return the learning rate's factor: linear warm-up, constant, cosine to zero."""
        warm = min(1.0, (step + 1) / (self.warmup + 1)) if warm_up else 1.0
        start = self.decay_from * self.steps
        done = 0.0 if step < start else (step - start) / max(1.0, self.steps - start)
        return warm * 0.5 * (1 + math.cos(math.pi * done))


@dataclass
class Watch:
    """Told how training goes on; the command line draws it."""

    step: Callable[[str, int, int, Mapping[str, float]], None] = field(
        default=lambda name, step, steps, losses: None
    )
    stage: Callable[[str], None] = field(default=lambda text: None)


@dataclass(frozen=True)
class Machine:
    """Where training runs.

    Parameters
    ----------
    precision : {'no', 'bf16'}
        Of autocast.
    fsdp : bool
        Shard parameters, gradients and optimizer states over the processes.
    cpu : bool
        Do not use a GPU even if there is one.
    """

    precision: Literal["no", "bf16"] = "bf16"
    fsdp: bool = False
    cpu: bool = False

    @cached_property
    def accelerator(self) -> Accelerator:
        """The process's accelerator.

        Raises
        ------
        UsageError
            If one process alone is to shard.
        """
        # The first process encodes data for longer than others wait by default.
        patient = InitProcessGroupKwargs(timeout=timedelta(days=1))
        acc = Accelerator(
            mixed_precision=self.precision, cpu=self.on_cpu, kwargs_handlers=[patient]
        )
        if self.fsdp and acc.num_processes == 1:
            raise UsageError(
                "--fsdp shards over processes, and there is one",
                remedy="start several with `accelerate launch --num_processes N -m handheld ...`",
            )
        return acc

    @property
    def on_cpu(self) -> bool:
        """Whether there is no GPU to use."""
        return self.cpu or not torch.cuda.is_available()


STREAMS = 4096
"""Of independent random numbers in one training step."""


class Draws:
    """Random tensors of one step, the same however many processes share the batch.

    Parameters
    ----------
    seed, step, stream : int
        Name the generator.
    batch : int
        Rows over all processes.
    rank, world : int
    device : torch.device
    """

    def __init__(
        self,
        seed: int,
        step: int,
        batch: int,
        rank: int = 0,
        world: int = 1,
        device: torch.device | str = "cpu",
        stream: int = 0,
    ) -> None:
        mixed = (seed * 1_000_003 + step) * STREAMS + stream
        self._generator = torch.Generator().manual_seed(mixed % 2**63)
        share = batch // world
        self._rows = slice(rank * share, (rank + 1) * share)
        self._batch, self._device = batch, device

    def _mine(self, tensor: Tensor) -> Tensor:
        return tensor[self._rows].to(self._device)

    def normal(self, shape: tuple[int, ...]) -> Tensor:
        """Draw normal noise [rows, *shape]."""
        return self._mine(torch.randn(self._batch, *shape, generator=self._generator))

    def integers(self, low: int, high: int) -> Tensor:
        """Draw integers in low..high-1, [rows]."""
        return self._mine(torch.randint(low, high, (self._batch,), generator=self._generator))

    def uniform(self) -> Tensor:
        """Draw numbers in 0..1, [rows]."""
        return self._mine(torch.rand(self._batch, generator=self._generator))

    def one(self, high: int) -> int:
        """Draw one integer for the whole batch, in 0..high-1."""
        return int(torch.randint(high, (1,), generator=self._generator))


@dataclass(frozen=True)
class Trained:
    """A network in training.

    Parameters
    ----------
    module : nn.Module
    lr : float
        Peak learning rate.
    clip : float
        Largest norm of the gradient.
    rates : mapping of str to float
        Peak learning rates of parts, by what their parameters' names start with.
    """

    module: nn.Module
    lr: float
    clip: float
    rates: Mapping[str, float] = field(default_factory=dict)

    def rate(self, name: str) -> float:
        """Return the peak learning rate of a parameter."""
        return next((r for start, r in self.rates.items() if name.startswith(start)), self.lr)


class Trainer:
    """Trains the networks of one step together.

    Parameters
    ----------
    name : str
        For logs.
    loop : Loop
    networks : mapping of str to Trained
        The first one is averaged (EMA) and is what the step is for.
    machine : Machine
    folder : Path
        Gets ``checkpoint.pt``, ``log.jsonl`` and TensorBoard's events.
    essence : str
        What the checkpoint belongs to; another one is refused.
    """

    def __init__(
        self,
        name: str,
        loop: Loop,
        networks: Mapping[str, Trained],
        machine: Machine,
        folder: Path,
        essence: str = "",
        watch: Watch | None = None,
    ) -> None:
        self.name, self.loop, self.folder = name, loop, folder
        self.accelerator = machine.accelerator
        self.watch = watch or Watch()
        self.essence = essence
        world = self.accelerator.num_processes
        if loop.batch % world:
            raise UsageError(
                f"batch {loop.batch} does not divide among {world} processes",
                field=f"{name}.batch",
                remedy="choose a multiple",
            )
        self.local_batch = loop.batch // world
        self._parts = dict(networks)
        self.main = next(iter(networks))
        self.models: dict[str, nn.Module] = {}
        self._optimizers: dict[str, Any] = {}
        for key, part in networks.items():
            self._prepare(key, part, fsdp=machine.fsdp)
        self.step = 0
        self.losses: list[dict[str, float]] = []
        self._average: dict[str, Tensor] = {}

    def _prepare(self, key: str, part: Trained, *, fsdp: bool) -> None:
        acc = self.accelerator
        module = part.module
        if self.loop.checkpointing:
            for child in module.modules():
                enable: Any = getattr(child, "enable_gradient_checkpointing", None)
                if enable is not None:
                    enable()
        if fsdp:
            whole: Any = module
            module = whole.to(memory_format=torch.contiguous_format)  # all that it can shard
        if fsdp:
            # accelerate prepares a sharded model with its optimizer only, and never on CPUs. This
            # is the call that it makes.
            from torch.distributed.fsdp import fully_shard

            module = module.to(acc.device)
            for child in module.modules():
                if type(child).__name__ in SHARDED:
                    fully_shard(child)
            fully_shard(module)
            model = module
        else:
            model = acc.prepare_model(module.to(acc.device))
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in acc.unwrap_model(model).named_parameters():
            if parameter.requires_grad:
                # A quantized layer's scale is kept as its logarithm: zero is no smaller scale.
                decay = 0.0 if name.endswith("log_scale") else self.loop.weight_decay
                groups.setdefault((part.rate(name), decay), []).append(parameter)
        optimizer = torch.optim.AdamW(
            [
                {"params": own, "peak": peak, "weight_decay": decay}
                for (peak, decay), own in groups.items()
            ],
            lr=part.lr,
            betas=(0.9, 0.99),
            fused=True,
        )
        self.models[key] = model
        self._optimizers[key] = optimizer

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return torch.device(self.accelerator.device)

    def draws(self, stream: int = 0) -> Draws:
        """Return the random tensors of the current step."""
        acc = self.accelerator
        return Draws(
            self.loop.seed,
            self.step,
            self.loop.batch,
            acc.process_index,
            acc.num_processes,
            self.device,
            stream,
        )

    def bare(self, key: str) -> nn.Module:
        """Return a network without the wrapper that synchronises its gradients."""
        return self.accelerator.unwrap_model(self.models[key], keep_fp32_wrapper=True)  # type: ignore[no-any-return]

    def update(self, key: str, loss: Tensor) -> None:
        """Take one optimizer step on a network.

        Raises
        ------
        TrainingError
            If the loss or its gradient is not finite; the last checkpoint stays as it is.
        """
        self._expect_finite("loss", key, self.accelerator.reduce(loss.detach(), "mean"))
        part, optimizer = self._parts[key], self._optimizers[key]
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * self.loop.rate(self.step, warm_up=key == self.main)
        self.accelerator.backward(loss)
        parameters = [p for p in self.models[key].parameters() if p.grad is not None]
        # One tensor at a time: the order of additions is then the same sharded or not.
        norm = torch.nn.utils.clip_grad_norm_(parameters, part.clip, foreach=False)
        self._expect_finite("gradient", key, _whole(norm))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def _expect_finite(self, what: str, key: str, value: Tensor) -> None:
        if not bool(torch.isfinite(value)):
            raise TrainingError(
                f"{self.name}: the {what} of '{key}' is {float(value)} in step {self.step + 1}",
                path=self.folder / "checkpoint.pt",
                remedy="lower the recipe's learning rate; this step then starts afresh, "
                "and those before it are kept",
            )

    def _agree(self, *flags: bool) -> list[bool]:
        """Tell of each flag whether any process has set it: all must save in the same step."""
        if self.accelerator.num_processes == 1:
            return list(flags)
        own = torch.tensor([float(f) for f in flags], device=self.device)
        return [bool(x > 0) for x in self.accelerator.reduce(own, "sum")]

    def run(
        self,
        one: Callable[[Trainer], Mapping[str, Tensor]],
        sample: Callable[[Trainer], None] | None = None,
        sample_every: int = 0,
    ) -> list[dict[str, float]]:
        """Train to the end, going on from the checkpoint if there is one.

        Parameters
        ----------
        one : callable
            Does the updates of one step and returns losses for the log.
        sample : callable, optional
            Draws a grid every ``sample_every`` steps.
        sample_every : int
            0 leaves it to the recipe.

        Returns
        -------
        list of dict
            The losses of the last steps, at least of those that this call ran.

        Raises
        ------
        TrainingError, UsageError
            If a loss is not finite; if another process trains in the same folder.
        KeyboardInterrupt
            After SIGINT or SIGTERM, once the current step has ended and is saved.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.accelerator.is_main_process:
            return self._run(one, sample, sample_every)
        with locked(self.folder) as ours:
            if not ours:
                raise UsageError(
                    "another run trains here",
                    path=self.folder,
                    remedy="wait for it, or choose another --work folder",
                )
            return self._run(one, sample, sample_every)

    def _run(
        self,
        one: Callable[[Trainer], Mapping[str, Tensor]],
        sample: Callable[[Trainer], None] | None,
        sample_every: int,
    ) -> list[dict[str, float]]:
        self._start()
        writer = _Writer(self.folder) if self.accelerator.is_main_process else None
        saved = began = time.monotonic()
        first = self.step
        for model in self.models.values():
            model.train()
        with _Interrupt(self.watch) as interrupt:
            while self.step < self.loop.steps:
                losses = {
                    k: float(self.accelerator.reduce(v.detach().float(), "mean"))
                    for k, v in one(self).items()
                }
                self._follow()
                self.step += 1
                self.losses.append(losses)
                self.watch.step(self.name, self.step, self.loop.steps, losses)
                if writer and (self.step % self.loop.log_every == 0 or self.step == 1):
                    pace = (time.monotonic() - began) / (self.step - first)
                    writer.write(self.step, losses | {"seconds_per_step": pace})
                often = sample_every or self.loop.sample_every
                if sample and often and self.step % often == 0:
                    sample(self)
                due = time.monotonic() - saved > self.loop.save_seconds
                due, stop = self._agree(due, interrupt.asked)
                if due or stop:
                    self._save()
                    saved = time.monotonic()
                if stop:
                    self.watch.stage(
                        f"{self.name} stopped after step {self.step}; the same command goes on"
                    )
                    raise KeyboardInterrupt
        if self.step > first:
            self._save()
        return self.losses

    def averaged(self) -> dict[str, Tensor]:
        """Return the averaged weights of the main network, whole, on the CPU."""
        return {k: _whole(v).cpu() for k, v in self._average.items()}

    # --- state ---------------------------------------------------------------------------

    def _main_state(self) -> dict[str, Tensor]:
        return self.bare(self.main).state_dict()

    def _start(self) -> None:
        path = self.folder / "checkpoint.pt"
        if not path.exists():
            self._average = {k: v.detach().clone() for k, v in self._main_state().items()}
            return
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as e:
            raise OutputError(
                f"is not a readable training checkpoint: {e}",
                path=path,
                remedy="remove it to train this step from its start",
            ) from None
        if state["essence"] != self.essence:
            raise UsageError(
                "belongs to another recipe, checkpoint or data",
                path=path,
                remedy="choose another --work folder, or remove this one to train afresh",
            )
        self.step = int(state["step"])
        self.losses = list(state["losses"])
        if self.accelerator.is_main_process:
            _cut_log(self.folder, self.step)
        for key in self.models:
            _load(self.bare(key), state["models"][key])
            _load_optimizer(self._optimizers[key], state["optimizers"][key])
        own = self._main_state()
        self._average = {k: _like(v, own[k]) for k, v in state["average"].items()}

    def _save(self) -> None:
        def whole(tree: Any) -> Any:
            if isinstance(tree, Tensor):
                full = _whole(tree)  # all processes take part, one of them keeps it
                return full.cpu() if self.accelerator.is_main_process else None
            if isinstance(tree, Mapping):
                return {k: whole(v) for k, v in tree.items()}
            return [whole(v) for v in tree] if isinstance(tree, list) else tree

        state = {
            "step": self.step,
            "essence": self.essence,
            "losses": self.losses[-50:],
            "models": {k: whole(self.bare(k).state_dict()) for k in self.models},
            "optimizers": {k: whole(o.state_dict()) for k, o in self._optimizers.items()},
            "average": whole(self._average),
        }
        if self.accelerator.is_main_process:
            save_atomic(state, self.folder / "checkpoint.pt")
        self.accelerator.wait_for_everyone()

    @torch.no_grad()
    def _follow(self) -> None:
        share = 1 - min(self.loop.ema, (self.step + 1) / (self.step + 10))
        for name, value in self._main_state().items():
            if value.is_floating_point():
                self._average[name].lerp_(value, share)
            else:
                self._average[name].copy_(value)


def _whole(tensor: Tensor) -> Tensor:
    full = getattr(tensor, "full_tensor", None)
    return (full() if full is not None else tensor).detach()


def _like(value: Tensor, own: Tensor) -> Tensor:
    """Lay a whole tensor out as ``own`` is, sharded or not."""
    mesh = getattr(own, "device_mesh", None)
    if mesh is None:
        return value.to(own.device, copy=True)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(own.device), mesh, own.placements)  # type: ignore[attr-defined]


@torch.no_grad()
def _load(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    for name, own in module.state_dict().items():
        own.copy_(_like(state[name], own))


def _load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    parameters = [p for g in optimizer.param_groups for p in g["params"]]
    laid = {
        i: {
            k: _like(v, parameters[i]) if isinstance(v, Tensor) and v.ndim else v
            for k, v in entry.items()
        }
        for i, entry in state["state"].items()
    }
    # Rates are the recipe's.
    groups = [
        {**kept, "peak": own["peak"]}
        for kept, own in zip(state["param_groups"], optimizer.param_groups, strict=True)
    ]
    optimizer.load_state_dict({"state": laid, "param_groups": groups})


def save_atomic(state: object, path: Path) -> None:
    """Write with torch.save so that a reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("wb") as handle:
        torch.save(state, handle)
        handle.flush()
        os.fsync(handle.fileno())
    partial.replace(path)


class _Interrupt:
    """Makes of the first SIGINT or SIGTERM a wish to stop; the second stops at once.

    An optimizer step half done would not be gone on with to the bit.
    """

    def __init__(self, watch: Watch) -> None:
        self.asked = False
        self._watch = watch
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> _Interrupt:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)

    def _ask(self, *_: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        self._watch.stage("stopping after this step; once more stops at once")


class _Writer:
    """JSON lines, and TensorBoard's events where it is installed."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "log.jsonl"
        self._board: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        self._board = SummaryWriter(str(folder / "tensorboard"))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        with self._path.open("a") as handle:
            handle.write(json.dumps({"step": step, **values}) + "\n")
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)


def _cut_log(folder: Path, step: int) -> None:
    """Drop what was logged after the checkpoint: it is run again."""
    path = folder / "log.jsonl"
    if path.exists():
        kept = [e for e in read_log(folder) if e["step"] <= step]
        write_file(path, "".join(json.dumps(e) + "\n" for e in kept).encode())


def read_log(folder: Path) -> Iterator[dict[str, float]]:
    """Read the log of a training step, oldest entry first."""
    path = folder / "log.jsonl"
    if path.exists():
        for line in path.read_text().splitlines():
            yield json.loads(line)
