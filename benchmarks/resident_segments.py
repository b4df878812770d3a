"""What many resident segments cost in memory, and what streaming costs in time.

Lowers one transformer segment of SDXL's size with random weights, makes a bundle whose
program runs N different files of it one after the other, and runs that on the harness with
one and with N segments.

    python benchmarks/resident_segments.py --engine executorch --copies 40
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import numpy as np

from handheld import bundle as bundles
from handheld import harness
from handheld.files import cache_root, sha256_file
from handheld.manifest import Artifact, FileRef, Manifest, ModelInfo, Size, TextInfo
from handheld.program import Affine, Call, Input, Ports, Program, Slice, TensorSpec, Term
from handheld.protocol import Job

TARGETS = {"executorch": "executorch-xnnpack", "litert": "litert-cpu"}
WIDTH, HEIGHT = 16, 8


def spec(*shape: int, dtype: Any = "float32") -> TensorSpec:
    return TensorSpec(shape=shape, dtype=dtype)


def target(engine: str) -> Any:
    from importlib.metadata import entry_points

    (entry,) = [e for e in entry_points(group="handheld.targets") if e.name == TARGETS[engine]]
    return entry.load()()


def segment(channels: int, tokens: int, blocks: int, bits: int) -> Any:
    """Return transformer blocks with integer weights, random."""
    import torch
    from diffusers.models.attention import BasicTransformerBlock
    from torch import nn

    from handheld_export.quantization import LIMITS, Grid, QuantizedWeight
    from handheld_export.targets.base import SegmentInput

    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(
                BasicTransformerBlock(
                    channels, max(1, channels // 64), min(64, channels), cross_attention_dim=2048
                )
                for _ in range(blocks)
            )

        def forward(self, x: Any, text: Any) -> Any:
            for block in self.blocks:
                x = block(x, encoder_hidden_states=text)
            return (x,)

    torch.manual_seed(0)
    module = Blocks().eval()
    grid = cast("Grid", f"int{bits}")
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, nn.Linear):
                scales = layer.weight.abs().amax(1).clamp_min(1e-6) / LIMITS[grid][1]
                codes = (layer.weight / scales[:, None]).round().clamp(*LIMITS[grid])
                layer.weight.copy_(codes * scales[:, None])
                quantized = QuantizedWeight(grid, codes.to(torch.int8).numpy(), scales.numpy())
                layer.quantized = quantized  # type: ignore[assignment]
    x, text = torch.randn(1, tokens, channels), torch.randn(1, 77, 2048)
    ports = Ports(
        inputs={"x": spec(*x.shape), "text": spec(*text.shape)}, outputs={"y": spec(*x.shape)}
    )
    return SegmentInput("segment", module, ports, (x, text))


def program(copies: int, ports: Ports) -> Program:
    x = ports.inputs["x"]
    tensors = {"x": x, "text": ports.inputs["text"]}
    ops: list[Any] = []
    for i in range(copies):
        args = {"x": f"y.{i - 1}" if i else "x", "text": "text"}
        ops.append(Call(artifact=f"segment.{i}", args=args, results={"y": f"y.{i}"}))
        tensors[f"y.{i}"] = x
    flat = WIDTH * HEIGHT * 3
    tensors |= {"cut": spec(1, 1, flat)}
    ops.append(Slice(x=f"y.{copies - 1}", axis=1, start=0, length=1, out="row"))
    tensors["row"] = spec(1, 1, x.shape[2])
    ops.append(Slice(x="row", axis=2, start=0, length=flat, out="cut"))
    ops.append(Affine(terms=(Term(x="cut", scale=1.0),), out="values"))
    tensors["values"] = spec(1, 1, flat)
    return Program(
        inputs=(Input(name="x", role="noise"), Input(name="text", role="noise", stream=1)),
        tensors=tensors,
        ops=tuple(ops),
        outputs={"latent": "values"},
    )


def make(folder: Path, lowered: Path, engine: str, copies: int, ports: Ports) -> Path:
    """Write a bundle of ``copies`` files that differ in a few bytes behind their end."""
    path = folder / f"{copies}"
    if (path / "manifest.json").exists():
        return path
    (path / "artifacts").mkdir(parents=True, exist_ok=True)
    artifacts = []
    for i in range(copies):
        name = f"artifacts/segment.{i}{lowered.suffix}"
        (path / name).write_bytes(lowered.read_bytes() + bytes(16 + 16 * i))
        file = FileRef(
            path=name, sha256=sha256_file(path / name), bytes=(path / name).stat().st_size
        )
        artifacts.append(
            Artifact(
                id=f"segment.{i}",
                target=TARGETS[engine],
                engine=engine,
                engine_version="",
                file=file,
                ports=ports,
                units=("segment",),
                component="unet",
            )
        )
    manifest = Manifest(
        model=ModelInfo(
            id="segments", checkpoint_sha256="0" * 64, steps=1, sampler="none", guidance=0.0
        ),
        target=TARGETS[engine],
        precision="int4",
        sizes={
            f"{WIDTH}x{HEIGHT}": Size(width=WIDTH, height=HEIGHT, program=program(copies, ports))
        },
        artifacts=tuple(artifacts),
        text=TextInfo(tokens=77, width=2048),
    )
    (path / bundles.MANIFEST).write_text(manifest.model_dump_json())
    return path


def run(bundle: Path, cache: Path | None, options: argparse.Namespace, residency: Any) -> Any:
    job = Job(
        bundle=str(bundle),
        size=f"{WIDTH}x{HEIGHT}",
        residency=residency,
        threads=options.threads,
        cache=str(cache) if cache else None,
        warmup=options.warmup,
        iterations=options.iterations,
        verify_hashes=False,
    )
    path = bundle.parent / f"job-{bundle.name}-{os.getpid()}.json"
    path.write_text(job.model_dump_json())
    try:
        result = subprocess.run(
            [harness.binary(), path], capture_output=True, text=True, check=False
        )
    finally:
        path.unlink()
    events = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    if result.returncode:
        errors = [e["message"] for e in events if e["event"] == "error"]
        sys.exit(f"the harness ended with {result.returncode}: {errors} {result.stderr[-2000:]}")
    end = next(e for e in events if e["event"] == "memory" and e["phase"] == "end")
    timed = [e for e in events if e["event"] == "iteration" and e["kind"] == "timed"]
    best = min(timed, key=lambda e: e["total_ms"])
    return {
        "segments": int(bundle.name),
        "residency": residency,
        "cache": "none" if cache is None else sorted({e["cache"] for e in events if "cache" in e}),
        "load_ms": round(sum(e["ms"] for e in events if e["event"] == "load"), 1),
        "first_ms": round(next(e["total_ms"] for e in events if e["event"] == "iteration"), 1),
        "total_ms": round(best["total_ms"], 2),
        "engine_ms": round(best["engine_ms"], 2),
        "wait_ms": round(best["load_ms"], 2),
        "engine_share": round(float(np.median([e["engine_ms"] / e["total_ms"] for e in timed])), 4),
        "anon_mb": round(end["anon"] / 1e6, 1),
        "file_mb": round(end["file"] / 1e6, 1),
        "peak_rss_mb": round(end["peak_rss"] / 1e6, 1),
        "output": next(e["sha256"] for e in events if e["event"] == "output"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", choices=sorted(TARGETS), required=True)
    parser.add_argument("--copies", type=int, default=40)
    parser.add_argument("--channels", type=int, default=1280)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--bits", type=int, choices=(2, 4, 8), default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--stream", action="store_true", help="also measure streaming")
    parser.add_argument("--no-cache", action="store_true", help="also measure without a cache")
    parser.add_argument("--folder", type=Path, help="where to work; some GB")
    options = parser.parse_args()
    if options.channels < WIDTH * HEIGHT * 3:
        parser.error(f"--channels must be at least {WIDTH * HEIGHT * 3}")
    shape = f"{options.channels}x{options.blocks}-{options.tokens}-int{options.bits}"
    folder = options.folder or cache_root() / "resident-segments" / f"{options.engine}-{shape}"
    folder.mkdir(parents=True, exist_ok=True)
    engine = target(options.engine)
    made = segment(options.channels, options.tokens, options.blocks, options.bits)
    lowered = folder / f"segment{engine.suffix}"
    if not lowered.exists():
        temporary = folder / f"new{engine.suffix}"
        engine.lower(made, temporary)
        temporary.replace(lowered)
    one, many = (make(folder, lowered, options.engine, n, made.ports) for n in (1, options.copies))
    cache = folder / "packed"
    run(many, cache, options, "stream")  # packs, one segment at a time
    results = [run(one, cache, options, "resident"), run(many, cache, options, "resident")]
    per_segment = (results[1]["anon_mb"] - results[0]["anon_mb"]) / max(1, options.copies - 1)
    if options.stream:
        results.append(run(many, cache, options, "stream"))
    if options.no_cache:
        results += [run(many, None, options, r) for r in ("resident", "stream")]
    for result in results:
        print(json.dumps(result))
    megabytes = round(lowered.stat().st_size / 1e6, 1)
    summary = {"segment_mb": megabytes, "anon_mb_per_further_segment": round(per_segment, 2)}
    print(json.dumps(summary))
    if len({r["output"] for r in results[1:]}) > 1:
        sys.exit("the outputs differ")


if __name__ == "__main__":
    main()
