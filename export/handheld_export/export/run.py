"""From a checkpoint to a verified bundle: the steps in order."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError

from handheld import bundle
from handheld.archive import check_replaceable
from handheld.errors import OutputError
from handheld.files import cache_root, output_errors
from handheld.manifest import Manifest
from handheld.precision import find as find_precision
from handheld_export import lowering, targets
from handheld_export.checkpoint import Checkpoint
from handheld_export.export.packing import pack, recorded, remember, write_manifest
from handheld_export.export.plan import Options, Plan, plan_sizes
from handheld_export.export.prompts import encode
from handheld_export.export.reference import Sized, run_reference
from handheld_export.export.runners import measure_picture
from handheld_export.export.sizes import called_artifacts, pack_artifacts
from handheld_export.export.workers import Progress, lower_all, needs_of
from handheld_export.memory import Budget, trim

_KEEP = 2_000_000_000
"""Bytes up to which a program's float32 weights stay in memory between its calls."""


def export(
    checkpoint: Checkpoint,
    options: Options,
    output: Path,
    *,
    jobs: int | None = None,
    memory: int | None = None,
    progress: Progress | None = None,
    use_cache: bool = True,
) -> Manifest:
    """Export a checkpoint to a bundle.

    Parameters
    ----------
    checkpoint : Checkpoint
    options : Options
    output : Path
        The bundle's folder. An existing bundle there is replaced.
    jobs : int, optional
        Most worker processes; by default as many as cores.
    memory : int, optional
        MB (10^6 bytes) that all processes together should stay below; by default a part of what
        is free. Segments are lowered beside each other while that leaves room.
    progress : Progress, optional
    use_cache : bool
        False lowers everything afresh.

    Returns
    -------
    Manifest

    Raises
    ------
    CheckpointError, TargetError, UsageError, OutputError
    """
    progress = progress or Progress()
    check_replaceable(output, bundle.KIND)
    if options.target not in targets.names():
        targets.find(options.target)
    find_precision(options.precision)
    root = cache_root()
    progress.stage("reading the checkpoint")
    key = _export_key(checkpoint, options)
    record = root / "exports" / key
    if use_cache and (manifest := recorded(record, root)) is not None:
        for artifact in manifest.artifacts:
            progress.done(artifact.id, sum(artifact.weights.values()), None)
        progress.stage("packing")
        pack(manifest, record, root, output)
        return manifest

    plans = plan_sizes(checkpoint, options)
    scratch = root / "work"
    with output_errors(scratch):
        scratch.mkdir(parents=True, exist_ok=True)
    lowering.sweep(scratch)
    with (
        _full_disks(root),
        tempfile.TemporaryDirectory(prefix=f"tmp-{os.getpid()}-", dir=scratch) as folder,
    ):
        work = Path(folder)
        manifest, sources = _export(plans, work, root, jobs, memory, progress, use_cache)
        remember(manifest, sources, work, record)
    progress.stage("packing")
    pack(manifest, record, root, output)
    return manifest


@contextmanager
def _full_disks(root: Path) -> Iterator[None]:
    """Say so where the cache cannot be written."""
    try:
        yield
    except (OSError, SafetensorError) as e:
        full = isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
        if full or "o space left" in str(e):
            raise OutputError(
                "cannot write: the disk is full",
                path=root,
                remedy="free some space or set XDG_CACHE_HOME",
            ) from e
        raise


def _export(
    plans: list[Plan],
    work: Path,
    root: Path,
    jobs: int | None,
    memory: int | None,
    progress: Progress,
    use_cache: bool,
) -> tuple[Manifest, dict[str, str]]:
    needs = [need for plan in plans for need in needs_of(plan).values()]
    Budget.of(memory).workers(needs, 1)  # refused now, not in minutes
    progress.stage("encoding prompts")
    texts = encode(plans[0], work)
    keep = _KEEP if memory is None else min(_KEEP, memory * 10**6 // 4)
    sized = []
    for plan in plans:
        progress.stage(f"running the program in torch at {plan.name}")
        folder = work / plan.name
        folder.mkdir()
        sized.append(Sized(plan, folder, *run_reference(plan, texts, folder, keep)))
        trim()
    progress.stage("lowering")
    keys, metas = lower_all(sized, root, jobs, memory, progress, use_cache)
    progress.stage("sharing weights between sizes")
    packed = pack_artifacts(plans, keys, metas, root)
    called = called_artifacts(plans, keys, packed)
    verifications = []
    for one, names in zip(sized, called, strict=True):
        progress.stage(f"verifying end to end at {one.plan.name}")
        paths = {s: [root / path for _, path in packed[n].files] for s, n in names.items()}
        verifications.append(measure_picture(one, texts, paths, keep))
    manifest = write_manifest(sized, texts, metas, packed, called, verifications, work)
    sources = {ref.path: str(path) for one in packed.values() for ref, path in one.files}
    return manifest, sources


def _export_key(checkpoint: Checkpoint, options: Options) -> str:
    from handheld_export.text import encoders_sha256

    essence = {
        "checkpoint": checkpoint.sha256,
        "path": str(checkpoint.path.resolve()),
        "text": encoders_sha256(checkpoint.path) if checkpoint.path.is_dir() else None,
        "options": asdict(options),
        "tools": lowering.tool_versions(),
        "source": lowering.source_sha256(),
    }
    return hashlib.sha256(json.dumps(essence, sort_keys=True).encode()).hexdigest()
