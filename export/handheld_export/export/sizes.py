"""Artifacts of several sizes in one bundle, and what they share."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from handheld.manifest import FileRef
from handheld_export import lowering
from handheld_export.export.plan import Plan
from handheld_export.targets.base import Array, Target


@dataclass(frozen=True)
class Packed:
    """An artifact of the bundle and where its files come from."""

    segment: str
    key: str
    """Of the cache entry with its figures."""
    files: tuple[tuple[FileRef, Path], ...]
    """In the bundle, and where that is below the cache's folder; first the one engines open."""


def pack_artifacts(
    plans: Sequence[Plan],
    keys: Sequence[Mapping[str, str]],
    metas: Mapping[str, dict[str, Any]],
    root: Path,
) -> dict[str, Packed]:
    """Name the artifacts of a bundle and let those of one segment share weights.

    A segment that is the same artifact at all sizes keeps its name. Otherwise its artifacts are
    called ``SEGMENT.WIDTHxHEIGHT``, by the first size that they are for.
    """
    packed: dict[str, Packed] = {}
    for segment in dict.fromkeys(s for own in keys for s in own):
        first: dict[str, str] = {}
        for plan, own in zip(plans, keys, strict=True):
            if segment in own:
                first.setdefault(own[segment], plan.name)
        everywhere = all(segment in own for own in keys)
        if len(first) == 1 and everywhere:
            (key,) = first
            packed[segment] = Packed(segment, key, _files("artifacts", key, metas[key]))
            continue
        named = {f"{segment}.{size}": key for key, size in first.items()}
        shared = _shared(plans[0].target, segment, named, metas, root) if len(named) > 1 else None
        for name, key in named.items():
            # What does not share keeps its files' names, which may be written in them.
            files = _files("artifacts", key, metas[key], f"{first[key]}/")
            packed[name] = Packed(segment, key, shared[name] if shared else files)
    return packed


def _files(
    store: str, key: str, meta: Mapping[str, Any], folder: str = ""
) -> tuple[tuple[FileRef, Path], ...]:
    return tuple(
        (
            FileRef(path=f"artifacts/{folder}{f['path']}", sha256=f["sha256"], bytes=f["bytes"]),
            Path(store, key, f["path"]),
        )
        for f in meta["files"]
    )


def _shared(
    target: Target,
    segment: str,
    named: Mapping[str, str],
    metas: Mapping[str, dict[str, Any]],
    root: Path,
) -> dict[str, tuple[tuple[FileRef, Path], ...]] | None:
    """Return the files of artifacts that share weights, from the cache or made now."""
    essence = [target.name, named, lowering.source_sha256()]
    key = hashlib.sha256(json.dumps(essence).encode()).hexdigest()
    store = root / "shared"
    store.mkdir(exist_ok=True)
    lowering.sweep(store)
    meta = lowering.cached(store, key)
    if meta is None:
        work = store / f"tmp-{os.getpid()}-{key[:16]}"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        try:
            paths = {n: root / _files("artifacts", k, metas[k])[0][1] for n, k in named.items()}
            made = target.share(paths, f"{segment}.weights", work)
            if made is None:
                return None
            meta = lowering.keep_shared(work, store / key, made)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    files = {source.name: (ref, source) for ref, source in _files("shared", key, meta)}
    return {name: tuple(files[n] for n in own) for name, own in meta["artifacts"].items()}


def called_artifacts(
    plans: Sequence[Plan], keys: Sequence[Mapping[str, str]], packed: Mapping[str, Packed]
) -> list[dict[str, str]]:
    """Return the artifact that is called for each segment, at each size."""
    names = {(p.segment, p.key): name for name, p in packed.items()}
    return [{segment: names[segment, key] for segment, key in own.items()} for own in keys]


def shared_constants(plans: Sequence[Plan]) -> tuple[dict[str, Array], list[dict[str, str]]]:
    """Return the constants of all sizes, and their names at each size.

    What is the same wherever it is read keeps its name.
    """
    constants: dict[str, Array] = {}
    names: list[dict[str, str]] = []
    for plan in plans:
        names.append({})
        for name, value in plan.constants.items():
            others = (p.constants[name] for p in plans if name in p.constants)
            alike = all(np.array_equal(value, other) for other in others)
            names[-1][name] = name if alike else f"{name}.{plan.name}"
            constants[names[-1][name]] = value
    return constants, names
