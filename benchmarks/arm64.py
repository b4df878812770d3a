"""Parity of the arm64 harness with that of x86-64: the same artifacts, given the same tensors.

The harness is cross-built against the engines' arm64 wheels and runs under QEMU, as several
processors. Each target is asked for one linear layer, one convolution and one block of
normalisation, attention and activation, in fp32 and int8, resident and streaming; bundles that are
named are run whole and their pictures compared. Not run on hardware: QEMU computes what an arm64
processor would, but its times say nothing.

    python benchmarks/arm64.py --output build/arm64.json
    python benchmarks/arm64.py build/critter-stack1-litert-cpu-int8

Needs qemu-user-static and g++-aarch64-linux-gnu.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from torch import nn

from handheld import bundle as bundles
from handheld import harness
from handheld.bundle import Bundle
from handheld.errors import MissingDependencyError
from handheld.files import sha256_file
from handheld.kit import Kit
from handheld.manifest import Artifact, FileRef, Manifest, ModelInfo, Size, TextInfo
from handheld.program import Affine, Call, Input, Ports, Program, TensorSpec, Term
from handheld_export import measure, targets
from handheld_export.quantization import ActivationRange, round_to_nearest
from handheld_export.targets.base import SegmentInput

QEMU = "qemu-aarch64-static"
CPUS = ("cortex-a53", "neoverse-n1", "max,sme=off")
"""Plain, with dot products, and with all that QEMU knows but the matrix extension's streaming."""
_PROCESSOR = """processor\t: {number}
BogoMIPS\t: 62.50
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32{more}
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x0
CPU part\t: {part}
CPU revision\t: 4

"""
_PARTS = {"cortex-a53": ("0xd03", "")}
_OTHERS = "0xd0c", " atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp"
TARGETS = ("litert-cpu", "executorch-xnnpack", "onnx")
SHAPE = (1, 16, 16, 32)


class Linear(nn.Module):
    """One linear layer over pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(SHAPE[3], SHAPE[3])

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        n, h, w, c = x.shape
        return (self.layer(x.reshape(n, h * w, c)).reshape(n, h, w, c),)


class Conv(nn.Module):
    """One 3x3 convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(SHAPE[3], SHAPE[3], 3, padding=1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (self.layer(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1),)


class Block(nn.Module):
    """What is computed in float whatever the weights are."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.token_norm = nn.GroupNorm(8, SHAPE[3]), nn.LayerNorm(SHAPE[3])
        self.act, self.gelu = nn.SiLU(), nn.GELU()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = self.act(self.norm(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        n, h, w, c = y.shape
        t = self.token_norm(y.reshape(n, h * w, c))
        t = torch.bmm(torch.softmax(torch.bmm(t, t.transpose(1, 2)) * c**-0.5, dim=-1), t)
        return (self.gelu(t).reshape(n, h, w, c),)


KINDS: dict[str, type[nn.Module]] = {
    "linear": Linear, "conv": Conv, "fixed": Conv, "block": Block,
}  # fmt: skip
"""``fixed`` is a convolution whose results lie on a calibrated int8 grid."""
LIMITS = {"fp32": 1e-5, "int8": 2e-7}
"""Largest relative error. Sums of int8 products are equal to the bit; where they are multiplied by
scales, processors with fused multiply-add may differ in the last bit of a float."""


@dataclass(frozen=True)
class Row:
    """One artifact, or one picture, on one processor."""

    cpu: str
    target: str
    precision: str
    what: str
    residency: str
    equal: bool
    """To the bit."""
    relative_error: float
    """Largest difference over the largest value."""
    psnr_db: float | None = None


def layers(target_name: str, precision: Literal["fp32", "int8"], folder: Path) -> Bundle:
    """Write a bundle with one artifact of each kind, all given the same noise."""
    target = targets.find(target_name)
    ports = Ports(inputs={"x": TensorSpec(shape=SHAPE)}, outputs={"y": TensorSpec(shape=SHAPE)})
    example = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    files: dict[str, Path | bytes] = {}
    artifacts = []
    for kind, make in KINDS.items():
        fixed = kind == "fixed"
        if precision != ("fp32" if kind == "block" else "int8" if fixed else precision):
            continue
        if fixed and target_name != "executorch-xnnpack":  # the only one with such grids
            continue
        torch.manual_seed(0)
        module = make().eval()
        layer = getattr(module, "layer", None)
        if layer is not None and precision != "fp32":
            weight = round_to_nearest(layer.weight.detach().numpy(), precision)
            layer.weight = nn.Parameter(torch.from_numpy(weight.dequantize()), requires_grad=False)
            layer.quantized = weight
            if fixed:
                layer.activation_range = ActivationRange(-4.0, 4.0, -3.0, 3.0)
        work = folder.parent / f"{folder.name}.work"
        work.mkdir(parents=True, exist_ok=True)
        lowered = target.lower(
            SegmentInput(kind, module, ports, [example]), work / f"{kind}{target.suffix}"
        )
        refs = []
        for path in (lowered.path, *lowered.parts):
            name = f"artifacts/{path.relative_to(work).as_posix()}"
            files[name] = path
            refs.append(FileRef(path=name, sha256=sha256_file(path), bytes=path.stat().st_size))
        artifacts.append(
            Artifact(
                id=kind, target=target.name, engine=target.engine,
                engine_version=next(iter(target.versions().values())), file=refs[0],
                parts=tuple(refs[1:]), ports=ports, units=(kind,), component="unet",
            )
        )  # fmt: skip
    tensors = {"noise": TensorSpec(shape=SHAPE)} | {
        a.id: TensorSpec(shape=SHAPE) for a in artifacts
    }
    calls = tuple(Call(artifact=a.id, args={"x": "noise"}, results={"y": a.id}) for a in artifacts)
    last = Affine(terms=(Term(x=artifacts[-1].id, scale=1.0),), bias=0.0, out="result")
    program = Program(
        inputs=(Input(name="noise", role="noise", stream=0),),
        tensors=tensors | {"result": TensorSpec(shape=SHAPE)},
        ops=(*calls, last),
        outputs={"result": "result"},
    )
    manifest = Manifest(
        model=ModelInfo(
            id="layers", checkpoint_sha256="0" * 64, steps=1, sampler="none", guidance=1.0
        ),
        target=target.name,
        precision=precision,
        sizes={"128x128": Size(width=128, height=128, program=program)},
        artifacts=tuple(artifacts),
        text=TextInfo(tokens=1, width=1),
    )
    made = bundles.write(manifest, files, folder)
    assert made is not None
    return made


def kit() -> Kit:
    """Return the arm64 harness, built if need be.

    Raises
    ------
    MissingDependencyError
        If the cross-compiler or QEMU is missing.
    """
    if shutil.which(QEMU) is None:
        raise MissingDependencyError(
            "there is nothing to run arm64 programs", remedy="apt install qemu-user-static"
        )
    return harness.build_kit("linux-arm64")


def compare(bundle: Bundle, made: Kit, cpu: str, residency: str, folder: Path) -> Iterator[Row]:
    """Run a bundle here and as an arm64 processor, and compare the results of every call."""
    here, drawn_here = _run(bundle, [str(harness.binary())], {}, residency, folder / "here", None)
    # Engines read /proc/cpuinfo, and fall over that of another architecture.
    part, more = _PARTS.get(cpu, _OTHERS)
    listing = folder / "root" / "proc" / "cpuinfo"
    listing.parent.mkdir(parents=True, exist_ok=True)
    listing.write_text(
        "".join(
            _PROCESSOR.format(number=n, part=part, more=more) for n in range(os.cpu_count() or 1)
        )
    )
    command = [QEMU, "-L", str(folder / "root"), "-cpu", cpu, *made.info.command]
    there, drawn = _run(
        bundle, command, made.info.environment, residency, folder / "there", made.folder
    )
    program = next(iter(bundle.manifest.sizes.values())).program
    calls = [op for op in program.ops if isinstance(op, Call)]
    for i, call in enumerate(calls):
        ours = [here[f"call.{i}.{p}"] for p in call.results]
        theirs = [there[f"call.{i}.{p}"] for p in call.results]
        error = max(
            float(np.abs(a - b).max() / (np.abs(a).max() or 1))
            for a, b in zip(ours, theirs, strict=True)
        )
        equal = all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))
        yield _row(bundle, cpu, call.artifact, residency, equal, error)
    if drawn_here is not None and drawn is not None:
        psnr = measure.psnr_db(drawn_here, drawn)
        difference = np.abs(drawn_here.astype(int) - drawn.astype(int)).max() / 255
        equal = np.array_equal(drawn_here, drawn)
        yield _row(bundle, cpu, "picture", residency, equal, float(difference), psnr)


def _row(
    bundle: Bundle, cpu: str, what: str, residency: str, equal: bool, error: float,
    psnr: float | None = None,
) -> Row:  # fmt: skip
    m = bundle.manifest
    return Row(cpu, m.target, m.precision, what, residency, equal, error, psnr)


def _run(
    bundle: Bundle,
    command: Sequence[str],
    environment: dict[str, str],
    residency: str,
    folder: Path,
    where: Path | None,
) -> tuple[dict[str, NDArray[Any]], NDArray[np.uint8] | None]:
    folder.mkdir(parents=True, exist_ok=True)
    manifest = bundle.manifest
    size, details = next(iter(manifest.sizes.items()))
    job: dict[str, Any] = {
        "bundle": str(bundle.path.resolve()), "size": size, "seed": 3, "residency": residency,
        "warmup": 0, "dump_calls": str((folder / "calls.safetensors").resolve()),
    }  # fmt: skip
    if manifest.reference is not None:
        stored = bundle.reference()
        given = {
            i.name: stored[f"input.{i.name}"] for i in details.program.inputs if i.role != "noise"
        }
        save_file(given, folder / "inputs.safetensors")
        path = str((folder / "inputs.safetensors").resolve())
        job["inputs"] = {n: {"path": path, "tensor": n} for n in given}
        job["output"] = str((folder / "picture.raw").resolve())
    (folder / "job.json").write_text(json.dumps(job))
    done = subprocess.run(
        [*command, str((folder / "job.json").resolve())],
        cwd=where, env=os.environ | environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stdout[-400:]} {done.stderr[-400:]}")
    picture = None
    if "output" in job:
        raw = np.frombuffer((folder / "picture.raw").read_bytes(), np.uint8)
        picture = raw.reshape(details.height, details.width, 3)
    return load_file(folder / "calls.safetensors"), picture


def main() -> None:
    """Print a table, and write it as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("bundles", nargs="*", type=Path, help="run these whole as well")
    parser.add_argument("--cpu", action="append", help=f"by default {', '.join(CPUS)}")
    parser.add_argument("--target", action="append", choices=TARGETS)
    parser.add_argument("--output", type=Path, help="JSON file")
    arguments = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = kit()
        precisions: tuple[Literal["fp32", "int8"], ...] = ("fp32", "int8")
        wanted = [
            layers(t, p, folder / f"{t}-{p}")
            for t in arguments.target or TARGETS
            for p in precisions
        ]
        wanted += [Bundle.open(b) for b in arguments.bundles]
        for bundle in wanted:
            for cpu in arguments.cpu or CPUS:
                for residency in ("resident", "stream"):
                    for row in compare(bundle, made, cpu, residency, folder / "work"):
                        rows.append(row)
                        picture = "" if row.psnr_db is None else f"{row.psnr_db:.1f} dB"
                        print(
                            f"{row.target:20} {row.precision:5} {row.cpu:12} {row.residency:9}"
                            f"{row.what:28} {'equal' if row.equal else f'{row.relative_error:.1e}'}"
                            f" {picture}",
                            flush=True,
                        )
    if arguments.output:
        engines = made.info.engines
        version = subprocess.run([QEMU, "--version"], capture_output=True, text=True, check=True)
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(
            json.dumps(
                {
                    "x86": platform.processor() or platform.machine(),
                    "qemu": version.stdout.split("\n", 1)[0],
                    "engines": engines,
                    "rows": [asdict(r) for r in rows],
                },
                indent=2,
            )
        )
    bad = [r for r in rows if not _passes(r)]
    if bad:
        sys.exit(f"{len(bad)} of {len(rows)} differ by more than they may: {bad[0]}")


def _passes(row: Row) -> bool:
    """Whole bundles have to give the same picture, to 40 dB; layers are held to LIMITS."""
    if row.what not in KINDS:
        return row.psnr_db is None or row.psnr_db >= 40
    if row.what == "fixed" or (row.target, row.precision) == ("onnx", "int8"):
        return row.equal
    return row.relative_error <= LIMITS[row.precision]


if __name__ == "__main__":
    main()
