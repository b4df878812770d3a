"""SDXL's full decoder alone, whole and in bands: memory, time, and whether they draw the same.

    python benchmarks/decoder.py --json build/decoder.json
    python benchmarks/decoder.py --size 768x768 --bands 16 --no-whole --json build/decoder.json

Weights are random (``make_sdxl.py``), the latent is smooth noise. The decoder is cut out of an
exported bundle. Peaks are high-water marks of the harness's whole process, weights streamed from
packed files.
A seam would show as a step between the last row of a band and the first of the next: ``seams`` is
the mean step there over the mean step between other rows; whole pictures have about 1, too.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save, save_file

import make_sdxl
from handheld import bundle as bundles
from handheld import harness, planning
from handheld.bundle import Bundle
from handheld.errors import HandheldError
from handheld.manifest import FileRef, Manifest, Size
from handheld.native import Session
from handheld.program import Affine, Call, Input, Op, decoded, reads, writes
from handheld.protocol import Job
from stages import ROOT, Stages, build_harness, guarded, say, versions, write_summary

Array = NDArray[Any]
UNET: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [32, 64],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 1],
    "attention_head_dim": [2, 4],
    "cross_attention_dim": 32,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 68,
}
"""As little as can be in front of the decoder: it is left out of what is measured."""
SMOOTH = 8
"""Pixels of the latent from one random value to the next."""


def export(
    source: Path, size: str, precision: str, bands: float | None, folder: Path, stages: Stages
) -> Bundle:
    """Export a bundle, and return its decoder alone."""
    name = f"{precision}-{size}" + ("-whole" if bands is None else f"-bands{bands:g}")
    words = [
        *(sys.executable, "-m", "handheld", "export", str(source), "-o", str(folder / name)),
        *("--target", "litert-cpu", "--precision", precision, "--json"),
        *("--size", size),
        *("--decoder-bands", "off" if bands is None else str(bands)),
    ]
    with stages(f"exporting {name}") as end, (folder / "export.log").open("ab") as log:
        done = subprocess.run(words, stdout=subprocess.PIPE, stderr=log, check=False)
        if done.returncode:
            raise HandheldError("the export failed", path=folder / "export.log")
        (told,) = json.loads(done.stdout)
        end(f"{told['artifacts']} artifacts, {told['bytes'] / 1e6:.1f} MB, {told['snr_db']:.1f} dB")
    return alone(Bundle.open(folder / name), folder / f"{name}-decoder")


def alone(bundle: Bundle, path: Path) -> Bundle:
    """Write the decoder of a bundle as one whose input is the latent."""
    manifest = bundle.manifest
    (key,) = manifest.sizes
    program = manifest.sizes[key].program
    used = [a for a in manifest.artifacts if a.component == "decoder"]
    start = next(
        i for i, op in enumerate(program.ops) if isinstance(op, Affine) and op.out == "latent"
    )
    ops: tuple[Op, ...] = program.ops[start + 1 :]
    made = {n for op in ops for n in writes(op)} | {"latent"}
    cut = program.model_copy(
        update={
            "inputs": (Input(name="latent", role="latent"),),
            "ops": ops,
            "tensors": {n: spec for n, spec in program.tensors.items() if n in made},
            "outputs": program.outputs | {"decoded": decoded(program)},
        }
    )
    wanted = {n for op in ops for n in reads(op)}
    kept = {n: v for n, v in bundle.constants().items() if n in wanted}
    files: dict[str, Path | bytes] = {r.path: bundle.file(r) for a in used for r in a.files}
    constants = None
    if kept:
        data = save({n: np.ascontiguousarray(v) for n, v in kept.items()})
        files["constants.safetensors"] = data
        constants = FileRef(
            path="constants.safetensors", sha256=hashlib.sha256(data).hexdigest(), bytes=len(data)
        )
    only = Manifest(
        **{
            **dict(manifest),
            "sizes": {
                key: Size(
                    width=manifest.sizes[key].width,
                    height=manifest.sizes[key].height,
                    program=cut,
                )
            },
            "artifacts": tuple(used),
            "constants": constants,
            "constant_specs": {n: s for n, s in manifest.constant_specs.items() if n in kept},
            "reference": None,
            "text": manifest.text.model_copy(update={"prefetched": None}),
        }
    )
    written = bundles.write(only, files, path)
    assert written is not None
    return written


def latent(size: str) -> Array:
    """Return smooth noise, so that a picture has areas in which a seam would show."""
    width, height = (int(n) // 8 for n in size.split("x"))
    coarse = np.random.default_rng(0).standard_normal(
        (height // SMOOTH + 2, width // SMOOTH + 2, 4)
    )
    for axis, count in ((0, height), (1, width)):
        at = np.arange(count) / SMOOTH
        low = at.astype(int)
        part = (at - low).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
        coarse = coarse.take(low, axis) * (1 - part) + coarse.take(low + 1, axis) * part
    return coarse.astype(np.float32)[None]


def run(
    bundle: Bundle, z: Array, job: dict[str, Any], folder: Path, stages: Stages
) -> dict[str, Any]:
    """Run the decoder in a process of its own; return times and memory."""
    inputs = folder / "latent.safetensors"
    save_file({"latent": z}, inputs)
    given = Job.model_validate(
        {
            "bundle": str(bundle.path),
            "size": next(iter(bundle.manifest.sizes)),
            "inputs": {"latent": {"path": str(inputs), "tensor": "latent"}},
            "cache": str(folder / "packed"),
            "warmup": 0,
            **job,
        }
    )
    with stages(f"running {bundle.path.name}") as end:
        done = subprocess.run(
            [harness.build().program, "-"],
            input=given.model_dump_json().encode(),
            capture_output=True,
            check=False,
        )
        events = [json.loads(x) for x in done.stdout.splitlines() if x.startswith(b"{")]
        if done.returncode:
            raise HandheldError(f"the harness failed: {events[-1].get('message')}")
        memory = next(e for e in events if e["event"] == "memory" and e["phase"] == "end")
        timed = [e for e in events if e["event"] == "iteration" and e["kind"] == "timed"]
        figures = {
            "peak_rss_mb": round(memory["peak_rss"] / 1e6, 1),
            "anon_mb": round(memory["anon"] / 1e6, 1),
            "tensors_mb": round(memory["activations"] / 1e6, 1),
            "total_ms": round(statistics.median(e["total_ms"] for e in timed), 1),
            "engine_ms": round(statistics.median(e["engine_ms"] for e in timed), 1),
            "plan": next((e for e in events if e["event"] == "plan"), None),
        }
        end(f"peak {figures['peak_rss_mb']} MB, {figures['total_ms']} ms")
    return figures


def draw(bundle: Bundle, z: Array, folder: Path) -> tuple[Array, Array]:
    """Return what the decoder gives, float32 [H, W, 3], and the picture."""
    (key,) = bundle.manifest.sizes
    size = bundle.manifest.sizes[key]
    shape = (1, size.height, size.width, 3)
    job = Job(bundle=str(bundle.path), size=key, residency="stream", cache=str(folder / "packed"))
    with Session(job) as session:
        session.set_input("latent", z)
        session.run()
        values = session.output("decoded", shape, np.float32)[0].copy()
        return values, session.output("picture", shape, np.uint8)[0].copy()


def borders(bundle: Bundle) -> list[int]:
    """Return the first rows of all bands but the first, where bands end in the last pass."""
    (size,) = bundle.manifest.sizes.values()
    last = [op for op in size.program.ops if isinstance(op, Call)][-1].artifact
    bands = sum(isinstance(op, Call) and op.artifact == last for op in size.program.ops)
    return [i * size.height // bands for i in range(1, bands)]


def seams(values: Array, rows: list[int]) -> float:
    """Return the mean step at rows over the mean step elsewhere."""
    steps = np.abs(np.diff(values.astype(np.float64), axis=0)).mean((1, 2))
    at = np.zeros(len(steps), bool)
    at[[r - 1 for r in rows]] = True
    return round(float(steps[at].mean() / steps[~at].mean()), 4)


def snr(a: Array, b: Array) -> float:
    """Return the signal-to-noise ratio in dB."""
    from handheld_export.measure import snr_db

    return round(snr_db(a, b), 2)


def picture(path: Path, whole: Array, banded: Array) -> None:
    """Write the middle of the whole picture, of the one in bands, and 16 times their difference."""
    from PIL import Image

    whole, banded = (np.ascontiguousarray(_middle(p)) for p in (whole, banded))
    apart = np.clip(128 + 16 * (banded.astype(int) - whole.astype(int)), 0, 255).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate([whole, banded, apart], axis=1), "RGB").save(path)


def _middle(pixels: Array) -> Array:
    """Return the middle half of the columns: bands are rows."""
    width = pixels.shape[1]
    return pixels[:, width // 4 : width - width // 4]


def in_torch(source: Path, z: Array) -> Array:
    """Return what diffusers' decoder gives in float32, [H, W, 3]."""
    from handheld_export.checkpoint import Checkpoint
    from handheld_export.segments import decoder_graph, group
    from handheld_export.torch_artifacts import decode

    vae = Checkpoint(source).vae
    segments = group(decoder_graph(vae, (z.shape[1], z.shape[2])), 80_000_000)
    values: Array = decode(segments, vae, z)[1][0]
    return values


def main() -> int:
    """Export, run, compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--size", action="append", help="WIDTHxHEIGHT, default 512x512")
    parser.add_argument("--bands", action="append", type=float, help="MB, default 8")
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--whole", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--budget", type=int, help="MB; a run within it, too")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--picture", type=Path, help="PNG of the first size")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "decoder")
    parser.add_argument("--json", type=Path, default=ROOT / "build" / "decoder.json")
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    stages = Stages()
    build_harness(stages)
    source = folder / "checkpoint"
    if not (source / "handheld.json").is_file():
        shape = planning.architecture("sdxl")
        make_sdxl.make(
            source, unet=UNET, decoder=dict(shape.decoder), grids={}, name="sdxl-decoder-random"
        )
    summary: dict[str, Any] = {"command": sys.argv, "versions": versions(), "runs": []}
    for size in arguments.size or ["512x512"]:
        z = latent(size)
        exact = in_torch(source, z)
        ways: list[float | None] = [None] if arguments.whole else []
        ways += arguments.bands or [8.0]
        whole: tuple[Array, Array] | None = None
        for bands in ways:
            bundle = export(source, size, arguments.precision, bands, folder, stages)
            drawn = draw(bundle, z, folder)
            jobs: list[dict[str, Any]] = [{"residency": "stream"}]
            if arguments.budget and bands is not None:
                jobs.append({"memory_budget": arguments.budget * 10**6})
            for job in jobs:
                figures = {"size": size, "bands_mb": bands, "job": job}
                timing = {"threads": arguments.threads, "iterations": arguments.iterations}
                figures |= run(bundle, z, {**job, **timing}, folder, stages)
                figures["torch_snr_db"] = snr(exact, drawn[0])
                if whole is not None:
                    figures["snr_db"] = snr(whole[0], drawn[0])
                    figures["whole_seams"] = seams(whole[0], borders(bundle))
                if bands is not None:
                    figures["seams"] = seams(drawn[0], borders(bundle))
                summary["runs"].append(figures)
                say(json.dumps(figures))
            if bands is None:
                whole = drawn
            elif whole is not None and arguments.picture:
                picture(arguments.picture, whole[1], drawn[1])
            write_summary(arguments.json, summary)
    say(f"written: {arguments.json}")
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
