"""The command ``handheld compress``."""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from handheld import models, planning
from handheld.errors import UsageError
from handheld_export.cli import quiet


def compress(
    checkpoint: Annotated[
        str,
        typer.Argument(
            help="Folder in diffusers layout, .safetensors file, or model name; with --dry-run "
            "also 'sdxl', or a folder that has only configurations."
        ),
    ],
    stack: Annotated[
        str | None,
        typer.Option(
            "--stack",
            "-s",
            help="stack1, stack2, stack3; onestep: DMD2 alone; int4: 4 bits without training.",
        ),
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", "-r", help="A TOML recipe instead of a stack.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of the student.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Pictures with .txt captions beside them, or webdataset .tar shards."),
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(help="LoRA file to fuse first, as FILE or FILE:STRENGTH; repeatable."),
    ] = None,
    work: Annotated[
        Path | None,
        typer.Option(help="Folder of training checkpoints and logs; a second run goes on there."),
    ] = None,
    precision: Annotated[
        str, typer.Option(help="Of autocast: bf16, no, or auto: bf16 where the processor has it.")
    ] = "auto",
    fsdp: Annotated[
        bool, typer.Option("--fsdp", help="Shard weights and optimizer over the processes.")
    ] = False,
    cpu: Annotated[bool, typer.Option("--cpu", help="Do not use a GPU.")] = False,
    threads: Annotated[int | None, typer.Option(help="CPU threads; torch's choice if not set.")] = (
        None
    ),
    sample_every: Annotated[
        int, typer.Option(help="Draw a grid of pictures every N training steps.")
    ] = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Estimate sizes, memory and time, and stop.")
    ] = False,
    devices: Annotated[int, typer.Option(help="For --dry-run: number of GPUs.")] = 1,
    device_memory: Annotated[float, typer.Option(help="For --dry-run: GB of each GPU.")] = 80.0,
    tflops: Annotated[
        float, typer.Option(help="For --dry-run: TFLOP/s that each GPU sustains in training.")
    ] = 200.0,
    size: Annotated[
        int | None, typer.Option(help="For --dry-run: pixels of the trained picture.")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Distil, trim and quantize a checkpoint to a student.

    A run that was stopped goes on where it was. Several GPUs: put
    `accelerate launch --num_processes 8 -m handheld` in the place of `handheld`.

    \b
    handheld compress critter --stack stack1 -o build/student
    handheld compress ./sdxl --stack stack3 --data ./pictures --lora style.safetensors:0.8 -o out
    handheld compress sdxl --stack stack2 --dry-run --devices 8 --fsdp
    """  # noqa: D301
    quiet()
    if (stack is None) == (recipe is None):
        raise UsageError("say --stack NAME or --recipe FILE, one of them")
    for name, value in (
        ("--devices", devices),
        ("--device-memory", device_memory),
        ("--tflops", tflops),
        ("--threads", 1 if threads is None else threads),
        ("--sample-every", sample_every + 1),
    ):
        if not (math.isfinite(value) and value > 0):
            raise UsageError(f"{name} {value:g} is out of range")
    if precision not in ("auto", "bf16", "no"):
        raise UsageError(f"--precision '{precision}' is unknown", remedy="auto, bf16 or no")
    if dry_run:
        _dry_run(
            checkpoint, stack, recipe, size, json_output,
            {"devices": devices, "memory": device_memory * 1e9, "flops": tflops * 1e12,
             "fsdp": fsdp},
        )  # fmt: skip
        return
    if size is not None:
        raise UsageError("--size is for --dry-run; a run takes the checkpoint's own size")
    if output is None:
        raise UsageError("no place for the student", remedy="give one with --output")
    import torch

    from handheld_export.autocast import computes_bf16
    from handheld_export.checkpoint import Checkpoint
    from handheld_export.compress import recipe as recipes
    from handheld_export.compress import run
    from handheld_export.compress.engine import Machine
    from handheld_export.lora import Lora, fused

    if threads is not None:
        torch.set_num_threads(threads)
    path = Path(checkpoint)
    path = path if path.exists() or os.sep in checkpoint else models.checkpoint(checkpoint)
    if precision == "auto":
        on = "cuda" if torch.cuda.is_available() and not cpu else "cpu"
        precision = "bf16" if computes_bf16(torch.device(on)) else "no"
    machine = Machine(precision=precision, fsdp=fsdp, cpu=cpu)  # type: ignore[arg-type]
    main = machine.accelerator.is_main_process
    if lora:
        with machine.accelerator.main_process_first():
            path = fused(path, [Lora.parse(text) for text in lora])
    source = Checkpoint(path)
    chosen = recipes.read(recipe or recipes.builtin(str(stack), source.name))
    began = time.perf_counter()
    with _Bars(Console(stderr=True), shown=main) as bars:
        student = run.compress(
            source,
            chosen,
            output,
            dataset=recipes.dataset(chosen.data, data),
            machine=machine,
            work=work,
            watch=bars.watch,
            sample_every=sample_every,
            command=_again(checkpoint, stack, recipe, data, lora, precision),
        )
    if not main:
        return
    report = {
        "student": str(output),
        "recipe": chosen.name,
        "seconds": round(time.perf_counter() - began, 1),
        "history": student.history,
    }
    if json_output:
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
    else:
        Console().print(f"{output}: {' > '.join(student.steps)}", highlight=False)
        Console().print(f"next: handheld export {output} -o BUNDLE", highlight=False)


def _again(
    checkpoint: str,
    stack: str | None,
    recipe: Path | None,
    data: Path | None,
    lora: list[str] | None,
    precision: str,
) -> str:
    """Return the command without places that only this machine has, and with what it chose."""
    words = ["handheld", "compress", Path(checkpoint).name]
    words += ["--stack", stack] if stack else ["--recipe", recipe.name if recipe else ""]
    words += ["--data", data.name] if data else []
    for one in lora or ():
        words += ["--lora", Path(one).name]
    words += ["--precision", precision]
    return shlex.join([*words, "--output", "STUDENT"])


def _dry_run(
    checkpoint: str,
    stack: str | None,
    recipe: Path | None,
    size: int | None,
    json_output: bool,
    cluster: Mapping[str, Any],
) -> None:
    from handheld_export.checkpoint import read_json
    from handheld_export.compress import estimate
    from handheld_export.compress import recipe as recipes
    from handheld_export.compress.load import Cluster

    name = checkpoint
    if os.sep not in checkpoint and checkpoint in models.names():
        name = str(models.checkpoint(checkpoint))
    shape = planning.architecture(name, size)
    settings = Path(name) / "handheld.json"
    if settings.is_file():
        family = str(read_json(settings).get("name") or Path(name).stem)
    else:
        family = Path(name).stem
    chosen = recipes.read(recipe or recipes.builtin(str(stack), family))
    rows = estimate.plan(chosen, shape, Cluster(**cluster))
    first = planning.figures(shape)
    report = {
        "checkpoint": checkpoint,
        "recipe": chosen.name,
        "estimate": True,
        "latent": list(shape.latent),
        "cluster": dict(cluster),
        "before": first,
        "steps": rows,
        "seconds": sum(r["seconds"] for r in rows),
        "device_bytes": max(r["device_bytes"] for r in rows),
    }
    if json_output:
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
        return
    _print_plan(report)


def _print_plan(report: dict[str, Any]) -> None:
    height, width = report["latent"]
    table = Table(
        title=f"{report['recipe']}: estimates, latent {height}x{width}, MB = 10^6 bytes",
        caption="U-Net at fp16 where not quantized; targets hold U-Net and int8 decoder",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    columns = ["step", "params\nM", "GMACs", "bits", "U-Net\nMB"]
    targets = list(report["before"]["target_bytes"])
    for column in [*columns, *(t.replace("-", "\n") for t in targets), "GB per\ndevice", "time"]:
        table.add_column(column, justify="left" if column == "step" else "right")
    for row in [{"step": "(before)"} | report["before"], *report["steps"]]:
        bits = row["bits_per_weight"]
        quantized = bits is not None
        memory = row.get("device_bytes")
        table.add_row(
            row["step"],
            _short(row["unet_params"] / 1e6),
            _short(row["unet_macs"] / 1e9),
            f"{bits:.2f}" if quantized else "",
            _short(row["unet_bytes"] / 1e6),
            *(_short(row["target_bytes"][t] / 1e6) if quantized else "" for t in targets),
            f"{memory / 1e9:.1f}" if memory else "",
            _duration(row["seconds"]) if "seconds" in row else "",
        )
    console = Console()
    console.print(table)
    for note in dict.fromkeys(n for r in report["steps"] for n in r["notes"]):
        console.print(f"estimate: {note}", highlight=False)
    cluster = report["cluster"]
    console.print(
        f"estimate: {report['device_bytes'] / 1e9:.1f} GB on each of {cluster['devices']} devices, "
        f"{_duration(report['seconds'])} at {cluster['flops'] / 1e12:g} TFLOP/s sustained by each",
        highlight=False,
    )


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


class _Bars:
    """One line per step: how far it is, its losses, and the time that is left."""

    def __init__(self, console: Console, *, shown: bool) -> None:
        from handheld_export.compress.engine import Watch

        self._shown, self._console = shown, console
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            TextColumn("{task.fields[losses]}"),
            console=console,
            disable=not (shown and console.is_terminal),
        )
        self._tasks: dict[str, Any] = {}
        self._first: dict[str, tuple[float, int]] = {}
        self._said = 0.0
        self.watch = Watch(self._step, self._stage)

    def __enter__(self) -> _Bars:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def _stage(self, text: str) -> None:
        self._tasks.clear()
        if self._shown:
            self._console.print(text, highlight=False)

    def _step(self, name: str, step: int, steps: int, losses: Mapping[str, float]) -> None:
        if not self._shown:
            return
        now = time.monotonic()
        if name not in self._tasks:
            self._tasks[name] = self._bar.add_task(name, total=steps, left="", losses="")
            self._first[name] = (now, step)
        at, first = self._first[name]
        left = ""
        if step > first:
            left = f"{_duration((now - at) / (step - first) * (steps - step))} left"
        shown = "  ".join(f"{k} {v:.3g}" for k, v in losses.items())
        self._bar.update(self._tasks[name], completed=step, left=left, losses=shown)
        if not self._console.is_terminal and (now - self._said > 30 or step == steps):
            self._said = now
            self._console.print(f"{name} {step}/{steps}  {left}  {shown}", highlight=False)
