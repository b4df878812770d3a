"""Lowering one segment, in a worker process, through the cache.

The cache holds one folder per key with the artifact and ``meta.json``. A key is the hash of
everything that decides what the artifact looks like: weights, configuration, grids,
activation ranges, target, tool versions and our own source. Folders appear by rename, so a
killed export leaves either a whole entry or none.
"""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.numpy import load_file

import handheld
from handheld import banding
from handheld.errors import TargetError
from handheld.files import sha256_file
from handheld.precision import find as find_precision
from handheld_export import measure, targets, workspace
from handheld_export.bands import passes
from handheld_export.checkpoint import Checkpoint, Component
from handheld_export.memory import trim
from handheld_export.quantization import ActivationRange, QuantizedWeight
from handheld_export.segments import (
    Graph,
    Segment,
    SegmentModule,
    decoder_graph,
    forget_floats,
    group,
    layers,
    materialize,
    release,
    stored_bytes,
    unet_graph,
)
from handheld_export.targets.base import SegmentInput, Target

_TOOLS = (
    "torch",
    "executorch",
    "torchao",
    "litert-torch",
    "litert-converter",
    "ai-edge-litert",
    "coremltools",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "diffusers",
    "transformers",
    "numpy",
)
_RUNTIME = (
    "banding",
    "counting",
    "execute",
    "manifest",
    "noise",
    "planning",
    "precision",
    "program",
    "qnn",
    "socs",
)
"""Modules of `handheld` that artifacts and manifests depend on."""


@cache
def tool_versions() -> dict[str, str]:
    """Versions of the packages that exports depend on."""
    found = {"handheld": handheld.__version__}
    for name in _TOOLS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@cache
def source_sha256() -> str:
    """Hash of the source that turns checkpoints into bundles."""
    here = Path(__file__).parent
    others = {"compress", "critter", "serve"}
    files = {
        str(p.relative_to(here)): p
        for p in here.rglob("*.py")
        if p.relative_to(here).parts[0] not in others
    }
    runtime = Path(handheld.__file__).parent
    files |= {f"handheld/{name}": runtime / f"{name}.py" for name in _RUNTIME}
    h = hashlib.sha256()
    for name, file in sorted(files.items()):
        h.update(name.encode() + file.read_bytes())
    return h.hexdigest()


@dataclass(frozen=True)
class Task:
    """What a worker needs to lower one segment. Everything pickles."""

    checkpoint: str
    latent: tuple[int, int]
    tokens: int
    line: str
    """``unet``, ``embedding`` or ``decoder``."""
    segment: str
    target: str
    precision: str
    ranges: dict[str, ActivationRange]
    example: str
    key: str
    cache: str
    threads: int
    shared: str | None = None
    """Folder for what segments of this structure share."""
    samples: tuple[str, ...] = ()
    """Files of inputs to calibrate on."""
    bands: float | None = None
    """MB of the decoder's bands; see :func:`handheld_export.bands.passes`."""


Bands = float | Literal["auto"] | None
"""MB of a decoder's bands, None for whole pictures, or what :mod:`handheld.banding` chooses."""


@dataclass(frozen=True)
class Lines:
    """The graphs of a checkpoint at one size."""

    checkpoint: Checkpoint
    unet: Graph
    embedding: Graph | None
    decoder: Graph

    def bands(self, target: Target, asked: Bands) -> float | None:
        """MB of the decoder's bands on a target, None if it is drawn whole."""
        if asked != "auto":
            return asked
        if not target.bands:
            return None
        return banding.choose(4 * max(math.prod(s) for s in self.decoder.shapes.values()))

    def cut(
        self, line: str, target: Target, precision: str, bands: float | None = None
    ) -> list[Segment]:
        """Segments of one graph by a target's policy, or a decoder's passes over bands."""
        if line == "decoder" and bands is not None:
            return [step.segment for step in passes(self.decoder, bands)]
        graph: Graph | None = getattr(self, line)
        if graph is None:
            return []
        size = None
        if (most := target.segment_bytes) is not None:
            size = partial(
                stored_bytes,
                graph,
                component=self.checkpoint.component(graph.component),
                precision=find_precision(precision),
            )
        most = most or target.segment_weights
        return group(graph, most, line, across_blocks=target.across_blocks, size=size)


@lru_cache(maxsize=2)
def lines(checkpoint: Checkpoint, latent: tuple[int, int], tokens: int) -> Lines:
    """Build the graphs of a checkpoint."""
    unet, embedding = unet_graph(checkpoint.unet, latent, tokens)
    return Lines(checkpoint, unet, embedding, decoder_graph(checkpoint.vae, latent))


@lru_cache(maxsize=2)
def _open(path: str) -> Checkpoint:
    return Checkpoint(path)


def segment_key(
    segment: Segment,
    component: Component,
    target: str,
    options: dict[str, Any],
    ranges: dict[str, ActivationRange],
) -> str:
    """Cache key of a segment.

    Parameters
    ----------
    segment : Segment
    component : Component
    target : str
    options : dict
        Everything else that the artifact depends on.
    ranges : dict
        Activation ranges of the segment's layers; empty if the target needs none.
    """
    h = hashlib.sha256()
    for name in sorted(_stored_names(segment, component)):
        for value in component.store.read([name]).values():
            h.update(f"{name}|{value.dtype}|{tuple(value.shape)}".encode())
            h.update(value.contiguous().flatten().view(torch.uint8).numpy().data)
    essence = {
        "id": segment.id,  # the artifact's files are named by it
        "units": [u.name for u in segment.units],
        "ports": segment.ports.model_dump(mode="json"),
        "order": [segment.inputs, segment.outputs],
        "config": component.config,
        "target": target,
        "options": options,
        "ranges": {k: list(vars(v).values()) for k, v in sorted(ranges.items())},
        "float_inputs": [n for n, _ in layers(segment) if n in component.float_inputs],
        "tools": tool_versions(),
        "source": source_sha256(),
    }
    h.update(json.dumps(essence, sort_keys=True, default=str).encode())
    return h.hexdigest()


def _stored_names(segment: Segment, component: Component) -> set[str]:
    prefixes = tuple(f"{p}." for p in segment.prefixes)
    return {n for n in component.store if n.startswith(prefixes)}


def segment_ranges(
    segment: Segment, ranges: dict[str, ActivationRange]
) -> dict[str, ActivationRange]:
    """Return the part of ``ranges`` that belongs to a segment's layers."""
    return {name: ranges[name] for name, _ in layers(segment) if name in ranges}


def start_worker(threads: int) -> None:
    """Prepare a worker process: leave Ctrl-C to the parent, and die with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    # The one that asked for it, not the server that it was forked from.
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def lower(task: Task) -> dict[str, Any]:
    """Lower and verify one segment; put artifact and ``meta.json`` into the cache.

    Returns
    -------
    dict
        The contents of ``meta.json``.

    Raises
    ------
    TargetError
        If the target cannot lower or run the segment.
    CheckpointError
        If its weights cannot be read.
    """
    try:
        return _lower(task)
    finally:
        trim()


def _lower(task: Task) -> dict[str, Any]:
    began = time.perf_counter()
    checkpoint = _open(task.checkpoint)
    target = targets.find(task.target)
    parts = lines(checkpoint, task.latent, task.tokens)
    cut = parts.cut(task.line, target, task.precision, task.bands)
    segment = next(s for s in cut if s.id == task.segment)
    component = checkpoint.component(segment.graph.component)
    example = load_file(task.example)
    inputs = [torch.from_numpy(example[f"in.{n}"]) for n in segment.inputs]
    try:
        quantized = materialize(segment, component, find_precision(task.precision))
        for name, layer in layers(segment):
            if name in task.ranges:
                layer.activation_range = task.ranges[name]  # type: ignore[assignment]
        module = SegmentModule(segment).eval()
        with torch.no_grad():
            student = [np.ascontiguousarray(v.numpy()) for v in module(*inputs)]
        if not target.reads_floats:
            forget_floats(segment)
            trim()
        storage = _storage(segment, quantized)

        entry = Path(task.cache) / task.key
        work = Path(task.cache) / f"tmp-{os.getpid()}-{task.key[:16]}"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        try:
            path = work / f"{segment.id}{target.suffix}"
            shared = None if task.shared is None else Path(task.shared)
            samples = _samples(task, segment)
            given = SegmentInput(segment.id, module, segment.ports, inputs, shared, samples)
            try:
                lowered = target.lower(given, path)
            except TargetError as e:
                message = f"segment '{segment.id}': {e.message}"
                raise TargetError(message, remedy=e.remedy) from e
            trim()  # an engine that is given used pages would not be seen to take any
            outputs, wanted = workspace.measure(
                lambda: target.load(lowered.path, segment.ports),
                [x.numpy() for x in inputs],
                sum(p.stat().st_size for p in (lowered.path, *lowered.parts)),
            )
            reference = [example[f"out.{n}"] for n in segment.outputs]
            meta = {
                "files": [_file(p, work) for p in (lowered.path, *lowered.parts)],
                "partitions": lowered.partitions,
                "workspace": wanted if target.runs_here else None,
                "notes": list(lowered.notes),
                "weights": storage,
                "held": _held(target, quantized, component)
                if lowered.held is None
                else dict(lowered.held),
                "tools": dict(lowered.tools) or target.versions(),
                "engine_version": next(iter(target.versions().values())),
                "verification": {
                    "snr_db": _worst(reference, outputs),
                    "student_snr_db": _worst(student, outputs),
                    "max_abs_error": max(
                        measure.max_abs_error(a, b) for a, b in zip(reference, outputs, strict=True)
                    ),
                },
                "seconds": time.perf_counter() - began,
            }
            _keep(work, entry, meta)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    finally:
        release(segment)
    return meta


def keep_shared(work: Path, entry: Path, artifacts: Mapping[str, Sequence[Path]]) -> dict[str, Any]:
    """Put what :meth:`~handheld_export.targets.base.Target.share` wrote into the cache.

    Returns
    -------
    dict
        The contents of ``meta.json``: ``files``, and ``artifacts`` with the names of each one's.
    """
    paths = dict.fromkeys(path for own in artifacts.values() for path in own)
    meta = {
        "files": [_file(path, work) for path in paths],
        "artifacts": {name: [p.name for p in own] for name, own in artifacts.items()},
    }
    _keep(work, entry, meta)
    return meta


def _keep(work: Path, entry: Path, meta: dict[str, Any]) -> None:
    """Make a folder an entry of the cache, unless another process was faster."""
    (work / "meta.json").write_text(json.dumps(meta, indent=2, sort_keys=True))
    try:
        work.rename(entry)
    except OSError:
        if not (entry / "meta.json").is_file():
            raise


def _samples(task: Task, segment: Segment) -> list[list[torch.Tensor]]:
    loaded = (load_file(path) for path in task.samples)
    return [[torch.from_numpy(one[f"in.{n}"]) for n in segment.inputs] for one in loaded]


def cached(root: Path, key: str) -> dict[str, Any] | None:
    """Return the ``meta.json`` of a cache entry, or None where it is absent or damaged."""
    if not (root / key).exists():
        return None
    try:
        meta: dict[str, Any] = json.loads((root / key / "meta.json").read_text())
        if meta["files"] and all(
            _file(root / key / f["path"], root / key) == f for f in meta["files"]
        ):
            return meta
    except (OSError, ValueError, KeyError):
        pass
    shutil.rmtree(root / key, ignore_errors=True)
    return None


def _file(path: Path, folder: Path) -> dict[str, Any]:
    return {
        "path": path.relative_to(folder).as_posix(),
        "sha256": sha256_file(path),
        "bytes": path.stat().st_size,
    }


def sweep(root: Path) -> None:
    """Remove what killed workers left in the cache."""
    for path in root.glob("tmp-*"):
        pid = path.name.split("-")[1]
        if pid.isdigit() and not _alive(int(pid)):
            shutil.rmtree(path, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _worst(reference: Sequence[Any], outputs: Sequence[Any]) -> float:
    if len(reference) != len(outputs):
        raise TargetError(f"the artifact gives {len(outputs)} results, not {len(reference)}")
    return min(measure.snr_db(a, b) for a, b in zip(reference, outputs, strict=True))


def _held(
    target: Target, quantized: dict[str, QuantizedWeight], component: Component
) -> dict[str, int]:
    counts: dict[str, int] = {}
    for layer, weight in quantized.items():
        wider = target.container(weight, float_input=layer in component.float_inputs)
        if wider != weight.grid:
            name = f"{weight.grid} as {wider}"
            counts[name] = counts.get(name, 0) + weight.codes.size
    return dict(sorted(counts.items()))


def _storage(segment: Segment, quantized: dict[str, QuantizedWeight]) -> dict[str, int]:
    counts: dict[str, int] = {}
    total = segment.weights
    for weight in quantized.values():
        counts[weight.grid] = counts.get(weight.grid, 0) + weight.codes.size
        total -= weight.codes.size
    return {**dict(sorted(counts.items())), "float32": total}
