"""Bundling, signing, verifying and packing a release of full SDXL's size: seconds and memory.

    python benchmarks/release_full_size.py

The bundles have the sizes that the planner gives for SDXL under stack 1, in artifacts of at most
64 MB of random bytes: nothing here can draw. Each stage is a process of its own, whose seconds and
peak of resident memory are reported. A third bundle has a byte per weight of the U-Net, which is
more than one pack of Play's holds, and shows how it is split.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from release import new_key, public_of
from stages import ROOT, command, guarded, say, versions, write_summary

TARGETS = ("litert-cpu", "executorch-xnnpack")
ARTIFACT_BYTES = 64 * 10**6
LIMIT_S, LIMIT_MB = 60.0, 500.0


def planned(target: str) -> int:
    """Return the bytes of SDXL's weights on a target after stack 1, as planned."""
    from handheld import planning, recipes

    shape = recipes.shape_after(recipes.builtin("stack1", "sdxl"), planning.architecture("sdxl"))
    return int(planning.figures(shape)["target_bytes"][target])


def make(folder: Path, target: str, size: int) -> None:
    """Write files of random bytes, and a manifest over them, as an exporter leaves them."""
    rng = np.random.default_rng(TARGETS.index(target))
    folder.mkdir(parents=True)
    sizes = [ARTIFACT_BYTES] * (size // ARTIFACT_BYTES) + [size % ARTIFACT_BYTES]
    for i, n in enumerate(sizes):
        with (folder / f"unet.{i}.bin").open("wb") as f:
            for start in range(0, n, 2**22):
                f.write(rng.bytes(min(2**22, n - start)))


def bundle(folder: Path, target: str, output: Path) -> None:
    """Write a bundle of these files."""
    from handheld import bundle as bundles
    from handheld.manifest import (
        Artifact,
        FileRef,
        Manifest,
        ModelInfo,
        Size,
        TextInfo,
        Verification,
    )
    from handheld.program import Affine, Call, Input, Ports, Program, TensorSpec, Term

    def digest(path: Path) -> str:
        with path.open("rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()

    x = TensorSpec(shape=(1, 8, 8, 3))
    parts = sorted(folder.iterdir(), key=lambda p: int(p.name.split(".")[1]))
    # Invented: this only exercises the release, and says so by its name.
    good = Verification(snr_db=60.0)
    artifacts = tuple(
        Artifact(
            id=f"unet.{i}",
            target=target,
            engine="litert" if target.startswith("litert") else "executorch",
            engine_version="0",
            file=FileRef(path=f"artifacts/{p.name}", sha256=digest(p), bytes=p.stat().st_size),
            ports=Ports(inputs={"x": x}, outputs={"y": x}),
            units=(f"part.{i}",),
            component="unet",
            verification=good,
        )
        for i, p in enumerate(parts)
    )
    tensors = {f"t.{i}": x for i in range(len(parts) + 1)}
    program = Program(
        inputs=(Input(name="t.0", role="noise"),),
        tensors={**tensors, "picture": TensorSpec(shape=(1, 8, 8, 3), dtype="uint8")},
        ops=(
            *(
                Call(artifact=f"unet.{i}", args={"x": f"t.{i}"}, results={"y": f"t.{i + 1}"})
                for i in range(len(parts))
            ),
            Affine(terms=(Term(x=f"t.{len(parts)}", scale=1.0),), bias=0.0, out="picture"),
        ),
        outputs={"picture": "picture"},
    )
    manifest = Manifest(
        model=ModelInfo(
            id="sdxl-size", checkpoint_sha256="0" * 64, steps=1, sampler="none", guidance=0.0
        ),
        target=target,
        precision="int8",
        sizes={"8x8": Size(width=8, height=8, program=program)},
        artifacts=artifacts,
        text=TextInfo(width=2048),
        verification=good,
        licence="none: random bytes",
    )
    bundles.write(manifest, {f"artifacts/{p.name}": p for p in parts}, output)


_LAUNCHER = """
import os, sys, time
began = time.monotonic()
null = os.open(os.devnull, os.O_WRONLY)
actions = [(os.POSIX_SPAWN_DUP2, null, 1)]
pid = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ, file_actions=actions)
_, status, usage = os.wait4(pid, 0)
cpu = usage.ru_utime + usage.ru_stime
print([time.monotonic() - began, cpu, usage.ru_maxrss, os.waitstatus_to_exitcode(status)])
"""


def timed(name: str, words: list[str]) -> dict[str, Any]:
    """Run a process; return its seconds and peak of memory."""
    # A process that was forked counts its parent's memory in its peak: this one would too.
    launched = subprocess.run(
        [sys.executable, "-S", "-c", _LAUNCHER, *words], stdout=subprocess.PIPE, check=True
    )
    seconds, cpu, kilobytes, code = json.loads(launched.stdout)
    row = {
        "stage": name,
        "seconds": round(seconds, 1),
        # What the stage would take on a machine that does nothing else, or less.
        "cpu_seconds": round(cpu, 1),
        "peak_mb": round(kilobytes * 1024 / 1e6, 1),
        "code": code,
    }
    say(
        f"{name}: {row['seconds']} s, {row['cpu_seconds']} s of processor, "
        f"peak {row['peak_mb']} MB, exit code {row['code']}"
    )
    return row


def split(folder: Path, handheld: list[str], key: str, rows: list[dict[str, Any]]) -> str:
    """Pack a bundle with a byte per weight for Play; return what the layout says of it."""
    from handheld import planning

    target, name = TARGETS[0], folder / "int8"
    make(
        folder / "parts" / name.name,
        target,
        int(planning.figures(planning.architecture("sdxl"))["unet_params"]),
    )
    words = [sys.executable, sys.argv[0], "--stage", str(folder / "parts" / name.name), target]
    rows.append(timed("bundling int8", [*words, str(name)]))
    shutil.rmtree(folder / "parts" / name.name)
    release, play = str(folder / "release-int8"), folder / "play-int8"
    force = f"--force=sdxl-size-{target}-int8"
    words = [*handheld, "build", str(name), "--version", "1", "--key", key, force, "-o", release]
    rows.append(timed("building and signing int8", words))
    words = [*handheld, "pack", release, "--store", "play", "-o", str(play)]
    rows.append(timed("packing for Play, int8", words))
    return (play / "handheld-store.txt").read_text()


def main() -> int:
    """Run the stages."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "release_full_size")
    parser.add_argument("--keep", action="store_true", help="keep the gigabytes")
    parser.add_argument("--stage", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stage:
        parts, target, output = arguments.stage
        bundle(Path(parts), target, Path(output))
        return 0
    folder: Path = arguments.output
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    key = new_key(folder)
    public = public_of(key, folder)
    rows, sizes = [], {t: planned(t) for t in TARGETS}
    handheld = [sys.executable, "-m", "handheld", "release"]
    for target in TARGETS:
        make(folder / "parts" / target, target, sizes[target])
        words = [sys.executable, sys.argv[0], "--stage", str(folder / "parts" / target), target]
        rows.append(timed(f"bundling {target}", [*words, str(folder / target)]))
        shutil.rmtree(folder / "parts" / target)
    targets = [str(folder / t) for t in TARGETS]
    forced = [f"--force=sdxl-size-{t}-int8" for t in TARGETS]
    release = str(folder / "release")
    for target in TARGETS:
        # One variant is what a phone gets, and what the limits are asked of.
        one = [*handheld, "build", str(folder / target), "--version", "1", "--key", str(key)]
        force = f"--force=sdxl-size-{target}-int8"
        rows.append(timed(f"building and signing {target}", [*one, force, "-o", release]))
        rows.append(
            timed(f"verifying {target}", [*handheld, "verify", release, "--key", str(public)])
        )
    both = [*handheld, "build", *targets, *forced, "--version", "1", "--key", str(key)]
    rows.append(timed("building and signing both", [*both, "-o", release]))
    rows.append(timed("verifying both", [*handheld, "verify", release, "--key", str(public)]))
    play = folder / "play"
    rows.append(
        timed("packing for Play", [*handheld, "pack", release, "--store", "play", "-o", str(play)])
    )
    notes = (play / "handheld-store.txt").read_text()
    say(notes)
    shutil.rmtree(play)
    notes_int8 = split(folder, handheld, str(key), rows)
    say(notes_int8)
    write_summary(
        folder / "summary.json",
        {
            "command": list(command()),
            "versions": versions(),
            "planned_bytes": sizes,
            "rows": rows,
            "play": notes.splitlines(),
            "play_int8": notes_int8.splitlines(),
        },
    )
    if not arguments.keep:
        for path in folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
    single = [r for r in rows if not r["stage"].endswith(("both", "Play", "int8"))]
    right = all(r["seconds"] <= LIMIT_S and r["peak_mb"] <= LIMIT_MB for r in single)
    return 0 if right and not any(r["code"] for r in rows) else 1


if __name__ == "__main__":
    sys.exit(guarded(main))
