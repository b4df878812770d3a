"""What several picture sizes in one bundle cost, against a bundle for each.

Lowers one transformer segment of SDXL's size with random weights for LiteRT at three picture
sizes, shares its weights between them, and runs each size on the harness from both, with packed
weights on disk: those of the first size serve the others.

    python benchmarks/picture_sizes.py --json build/picture_sizes.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from handheld import bundle as bundles
from handheld import harness
from handheld.bundle import Bundle
from handheld.files import cache_root, sha256_file
from handheld.manifest import Artifact, FileRef, Manifest, ModelInfo, Size, TextInfo
from handheld.program import Affine, Call, Input, Ports, Program, Term
from handheld.protocol import Job, Residency
from handheld_export.targets.litert_cpu import LiteRTCPU
from resident_segments import segment, spec

SIZES = ((512, 512), (768, 512), (768, 768))
SCALE = 32
"""Pixels of one token, each way."""


def key(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def program(artifact: str, ports: Ports) -> Program:
    """One call; its result, added to itself, is the only output."""
    x = ports.inputs["x"]
    return Program(
        inputs=(Input(name="x", role="noise"), Input(name="text", role="noise", stream=1)),
        tensors={"x": x, "text": ports.inputs["text"], "y": x, "out": x},
        ops=(
            Call(artifact=artifact, args={"x": "x", "text": "text"}, results={"y": "y"}),
            Affine(terms=(Term(x="y", scale=1.0),), out="out"),
        ),
        outputs={"latent": "out"},
    )


def write(folder: Path, files: dict[tuple[int, int], tuple[Path, ...]], channels: int) -> Bundle:
    """Write a bundle of one artifact for each size."""
    contents: dict[str, Path | bytes] = {}
    artifacts, sizes = [], {}
    for size, paths in files.items():
        refs = []
        for path in paths:
            name = f"artifacts/{path.name}"
            contents[name] = path
            refs.append(FileRef(path=name, sha256=sha256_file(path), bytes=path.stat().st_size))
        x = spec(1, size[0] * size[1] // SCALE**2, channels)
        ports = Ports(inputs={"x": x, "text": spec(1, 77, 2048)}, outputs={"y": x})
        artifact = Artifact(
            id=f"segment.{key(size)}",
            target="litert-cpu",
            engine="litert",
            engine_version="",
            file=refs[0],
            parts=tuple(refs[1:]),
            ports=ports,
            units=("segment",),
            component="unet",
        )
        artifacts.append(artifact)
        sizes[key(size)] = Size(width=size[0], height=size[1], program=program(artifact.id, ports))
    manifest = Manifest(
        schema_version=3,
        model=ModelInfo(
            id="segment", checkpoint_sha256="0" * 64, steps=1, sampler="none", guidance=1.0
        ),
        target="litert-cpu",
        precision="int4",
        sizes=sizes,
        artifacts=tuple(artifacts),
        text=TextInfo(tokens=77, width=2048),
    )
    made = bundles.write(manifest, contents, folder)
    assert made is not None
    return made


def run(bundle: Bundle, size: str, cache: Path, residency: Residency, times: int) -> dict[str, Any]:
    """Run one process; return what it took."""
    job = Job(
        bundle=str(bundle.path),
        size=size,
        residency=residency,
        cache=str(cache),
        warmup=1,
        iterations=times,
        verify_hashes=False,
    )
    path = bundle.path.parent / f"job-{os.getpid()}.json"
    path.write_text(job.model_dump_json())
    done = subprocess.run([harness.binary(), path], capture_output=True, text=True, check=False)
    path.unlink()
    events = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode:
        sys.exit(f"the harness ended with {done.returncode}: {events[-1:]} {done.stderr[-2000:]}")
    end = next(e for e in events if e["event"] == "memory" and e["phase"] == "end")
    timed = [e["total_ms"] for e in events if e["event"] == "iteration" and e["kind"] == "timed"]
    return {
        "load_ms": sum(e["ms"] for e in events if e["event"] == "load"),
        "median_ms": statistics.median(timed),
        "best_ms": min(timed),
        "peak_rss_mb": end["peak_rss"] / 1e6,
        "anon_mb": end["anon"] / 1e6,
        "cache": sorted({e["cache"] for e in events if e["event"] == "load"}),
        "output": next(e["sha256"] for e in events if e["event"] == "output"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--channels", type=int, default=1280)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--bits", type=int, choices=(2, 4, 8), default=4)
    parser.add_argument("--iterations", type=int, default=7)
    parser.add_argument("--rounds", type=int, default=3, help="processes of each kind")
    parser.add_argument("--folder", type=Path, help="where to work; some hundred MB")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    shape = f"{options.channels}x{options.blocks}-int{options.bits}"
    folder = options.folder or cache_root() / "picture-sizes" / shape
    folder.mkdir(parents=True, exist_ok=True)
    target = LiteRTCPU()
    whole = {}
    for size in SIZES:
        tokens = size[0] * size[1] // SCALE**2
        whole[size] = folder / f"segment.{key(size)}.tflite"
        if not whole[size].exists():
            made = segment(options.channels, tokens, options.blocks, options.bits)
            temporary = folder / "new.tflite"
            target.lower(made, temporary)
            temporary.replace(whole[size])
    (folder / "shared").mkdir(exist_ok=True)
    named = {f"segment.{key(size)}": path for size, path in whole.items()}
    shared = target.share(named, "segment.weights", folder / "shared")
    assert shared is not None
    together = write(
        folder / "three", {s: shared[f"segment.{key(s)}"] for s in SIZES}, options.channels
    )
    alone = {s: write(folder / key(s), {s: (whole[s],)}, options.channels) for s in SIZES}
    rows: list[dict[str, Any]] = []
    for size in SIZES:
        for residency in ("resident", "stream"):
            row: dict[str, Any] = {"size": key(size), "residency": residency}
            kinds = {"alone": alone[size], "together": together}
            for bundle in kinds.values():  # packs, the first time
                run(bundle, key(size), folder / "packed" / bundle.path.name, residency, 1)
            runs: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
            for _ in range(options.rounds):  # in turn, so that both see the same machine
                for kind, bundle in kinds.items():
                    cache = folder / "packed" / bundle.path.name
                    runs[kind].append(run(bundle, key(size), cache, residency, options.iterations))
            for kind, seen in runs.items():
                row[kind] = {
                    n: round(statistics.median(s[n] for s in seen), 2)
                    for n in ("load_ms", "median_ms", "best_ms", "peak_rss_mb", "anon_mb")
                } | {"cache": seen[0]["cache"]}
            row["same_bits"] = len({s["output"] for own in runs.values() for s in own}) == 1
            rows.append(row)
            print(json.dumps(row))
    packed = [p for p in (folder / "packed" / "three").rglob("*") if p.suffix == ".packed"]
    summary = {
        "alone_bytes": {key(s): b.manifest.nbytes for s, b in alone.items()},
        "together_bytes": together.manifest.nbytes,
        "ratio": round(together.manifest.nbytes / alone[SIZES[0]].manifest.nbytes, 4),
        "packed_files": len(packed),
        "packed_bytes": sum(p.stat().st_size for p in packed),
    }
    print(json.dumps(summary))
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"rows": rows, "summary": summary}, indent=1) + "\n")
    if not all(row["same_bits"] for row in rows):
        sys.exit("the results differ")


if __name__ == "__main__":
    main()
