"""The manifest of a bundle, and the record that lets a second export only pack."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.numpy import save_file

from handheld import bundle
from handheld.files import sha256_file
from handheld.manifest import (
    Artifact,
    FileRef,
    Manifest,
    ModelInfo,
    Provenance,
    Reference,
    Size,
    SizeReference,
    Verification,
)
from handheld.program import TensorSpec, halves, renamed
from handheld_export import lowering
from handheld_export.export.plan import count_macs
from handheld_export.export.prompts import Texts, file_ref
from handheld_export.export.reference import Sized
from handheld_export.export.sizes import Packed, shared_constants
from handheld_export.segments import Segment


def write_manifest(
    sized: Sequence[Sized],
    texts: Texts,
    metas: Mapping[str, dict[str, Any]],
    packed: Mapping[str, Packed],
    called: Sequence[Mapping[str, str]],
    verifications: Sequence[Verification],
    work: Path,
) -> Manifest:
    """Make the manifest, and the files below ``work`` that are the bundle's own."""
    plans = [one.plan for one in sized]
    plan = plans[0]
    constants, names = shared_constants(plans)
    save_file(constants, work / "constants.safetensors")
    found: dict[str, tuple[Segment, int | None]] = {}
    for own, ids in zip(plans, called, strict=True):
        macs = count_macs(own)
        for _, segment, _ in own.segments:
            found.setdefault(ids[segment.id], (segment, macs.get(segment.id)))
    artifacts = []
    for name, made in packed.items():
        segment, count = found[name]
        meta = metas[made.key]
        file, *parts = (ref for ref, _ in made.files)
        artifacts.append(
            Artifact(
                id=name,
                target=plan.target.name,
                engine=plan.target.engine,
                engine_version=meta["engine_version"],
                file=file,
                parts=tuple(parts),
                ports=segment.ports,
                units=tuple(u.name for u in segment.units),
                component=segment.graph.component,
                weights=meta["weights"],
                held=meta["held"],
                macs=count,
                partitions=meta["partitions"],
                workspace=meta["workspace"],
                tools=meta["tools"],
                options=dict(plan.target.options),
                verification=Verification(**meta["verification"]),
            )
        )
    programs = {
        own.name: Size(
            width=own.size[1],
            height=own.size[0],
            program=renamed(own.program, artifacts=ids, tensors=own_names),
        )
        for own, ids, own_names in zip(plans, called, names, strict=True)
    }

    references = []
    for i, (one, verification) in enumerate(zip(sized, verifications, strict=True)):
        name = f"reference.{one.plan.name}.safetensors" if i else "reference.safetensors"
        (one.work / "reference.safetensors").rename(work / name)
        references.append(
            SizeReference(
                file=file_ref(work / name, name),
                size=one.plan.name,
                seed=plan.options.seed,
                prompt=texts.prompts[0] if texts.prompts else None,
                verification=verification,
            )
        )
    card = plan.checkpoint.settings
    return Manifest(
        schema_version=3 if len(plans) > 1 else 2 if halves(plan.program) else 1,
        model=ModelInfo(
            id=plan.checkpoint.name,
            checkpoint_sha256=plan.checkpoint.sha256,
            steps=len(plan.steps),
            sampler=plan.sampler,
            guidance=plan.guidance,
        ),
        target=plan.target.name,
        precision=plan.options.precision,
        sizes=programs,
        artifacts=tuple(artifacts),
        constants=file_ref(work / "constants.safetensors", "constants.safetensors"),
        constant_specs={n: TensorSpec(shape=v.shape) for n, v in constants.items()},
        text=texts.info,
        reference=Reference(**references[0].model_dump(exclude={"verification"})),
        verification=verifications[0],
        references=tuple(references[1:]),
        licence=card.get("licence"),
        provenance=Provenance(
            tools=lowering.tool_versions(),
            options={
                k: v for k, v in asdict(plan.options).items() if v is not None and k != "prompts"
            }
            | {"checkpoint": plan.checkpoint.name, "sizes": [p.name for p in plans]},
            history=tuple(card.get("history", ())),
        ),
    )


def remember(manifest: Manifest, sources: dict[str, str], work: Path, record: Path) -> None:
    """Keep what a second export needs to pack, artifacts by their place in the cache."""
    fresh = work / "record"
    fresh.mkdir()
    for ref in _own_files(manifest):
        shutil.copyfile(work / ref.path, fresh / ref.path)
    stored = {"manifest": manifest.model_dump(mode="json"), "sources": sources}
    (fresh / "export.json").write_text(json.dumps(stored))
    record.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(record, ignore_errors=True)
    try:
        fresh.rename(record)
    except OSError:
        # Another export of the same thing was faster.
        if not (record / "export.json").is_file():
            raise


def recorded(record: Path, root: Path) -> Manifest | None:
    """Return the manifest of an export that was done before, if all it needs is still there."""
    try:
        stored = json.loads((record / "export.json").read_text())
        manifest = Manifest.model_validate(stored["manifest"])
        sources = stored["sources"]
        for ref in _own_files(manifest):
            if sha256_file(record / ref.path) != ref.sha256:
                return None
        entries = {root / Path(*Path(source).parts[:2]) for source in sources.values()}
        if any(lowering.cached(entry.parent, entry.name) is None for entry in entries):
            return None
        wanted = {ref.path: ref.sha256 for a in manifest.artifacts for ref in a.files}
        if any(sha256_file(root / sources[path]) != digest for path, digest in wanted.items()):
            return None
    except (OSError, ValueError, KeyError):
        return None
    return manifest


def _own_files(manifest: Manifest) -> list[FileRef]:
    """List the files of a bundle that are not artifacts."""
    refs = (
        manifest.constants,
        manifest.reference.file if manifest.reference else None,
        *(r.file for r in manifest.references),
        manifest.text.prefetched.file if manifest.text.prefetched else None,
    )
    return [ref for ref in refs if ref is not None]


def pack(manifest: Manifest, record: Path, root: Path, output: Path) -> None:
    """Write the bundle of a recorded export."""
    sources = json.loads((record / "export.json").read_text())["sources"]
    files = {path: root / source for path, source in sources.items()}
    for ref in _own_files(manifest):
        files[ref.path] = record / ref.path
    bundle.write(manifest, files, output)
