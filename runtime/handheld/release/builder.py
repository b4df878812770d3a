"""From verified bundles and run records to a release.

The bytes of a release are a function of bundles, records, documents and options: no clock, no
machine, no order of folders.
"""

from __future__ import annotations

import math
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import get_args

from pydantic import ValidationError

from handheld import numerics_gates
from handheld.archive import check_replaceable, pack
from handheld.bundle import MANIFEST as BUNDLE_MANIFEST
from handheld.bundle import Bundle, describe_validation, references
from handheld.errors import BundleError, GateError, UsageError
from handheld.estimates import peak_bytes
from handheld.files import fsync_folder, output_errors, replaced_folder
from handheld.manifest import FileRef, Manifest
from handheld.protocol import Residency
from handheld.records import RunRecord
from handheld.release import sbom, signing
from handheld.release.chunks import ChunkList, chunked
from handheld.release.folder import KIND, Release, digest_file, digest_tree
from handheld.release.manifest import (
    MANIFEST,
    Gate,
    Mode,
    Needs,
    ReleaseManifest,
    Source,
    Variant,
)
from handheld.release.rules import Rules
from handheld.release.rules import read as read_rules

_UNITS = ("npu", "gpu", "cpu")


@dataclass(frozen=True)
class Options:
    """What a release is called, and what it takes.

    Parameters
    ----------
    name : str
    version : int
        Grows with every release.
    label : str, optional
        The version that people see.
    expires : datetime, optional
    force : frozenset of str
        Ids of variants that are taken though they fail.
    gates : Path, optional
        Gates on numerics; by default the package's.
    rules : Path, optional
        Tables over those of the package.
    documents : tuple of Path
        Cards and licences that travel along.
    """

    name: str
    version: int
    label: str | None = None
    expires: datetime | None = None
    force: frozenset[str] = frozenset()
    gates: Path | None = None
    rules: Path | None = None
    documents: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Candidate:
    """A bundle that may become a variant."""

    id: str
    bundle: Bundle
    records: tuple[RunRecord, ...]
    gate: Gate | None
    faults: tuple[str, ...] = field(default=())
    """Why it would be refused; empty if it passes."""


def variant_id(manifest: Manifest) -> str:
    """Return the id of a bundle's variant: model, target and precision."""
    text = f"{manifest.model.id}-{manifest.target}-{manifest.precision}"
    return re.sub(r"[^A-Za-z0-9_.@-]+", "-", text)[:128]


def examine(
    bundles: Sequence[Bundle], records: Sequence[RunRecord], options: Options
) -> list[Candidate]:
    """Look at bundles and say of each why it would be refused.

    Raises
    ------
    UsageError
        If two bundles are the same variant, a record belongs to no bundle, or ``force`` names
        something else.
    """
    ids = [variant_id(b.manifest) for b in bundles]
    for name, n in Counter(ids).items():
        if n > 1:
            raise UsageError(
                f"{n} bundles are '{name}'", remedy="give one bundle per model, target, precision"
            )
    if unknown := sorted(options.force - set(ids)):
        raise UsageError(
            f"there is no '{unknown[0]}' to force",
            field="--force",
            remedy=f"the variants are {', '.join(ids)}",
        )
    hashes = {b.sha256 for b in bundles}
    for record in records:
        if record.bundle.sha256 not in hashes:
            raise UsageError(
                f"record {record.id} is of another bundle, {record.bundle.sha256[:16]}",
                remedy="give its bundle too, or leave the record out",
            )
    found = []
    rules = read_rules(options.rules)
    for name, bundle in zip(ids, bundles, strict=True):
        own: dict[str, RunRecord] = {}
        for record in records:
            if record.bundle.sha256 != bundle.sha256:
                continue
            if own.setdefault(record.id, record) != record:
                raise UsageError(
                    f"two different records are called {record.id}",
                    remedy="leave the wrong one out",
                )
        mine = tuple(own[key] for key in sorted(own))
        gate = _gate(bundle, options)
        platforms = rules.target(bundle.manifest.target).platforms
        found.append(
            Candidate(
                name, bundle, mine, gate, _faults(bundle, mine, gate, options.gates, platforms)
            )
        )
    return found


def _gate(bundle: Bundle, options: Options) -> Gate | None:
    try:
        gate = _numerics(bundle.manifest, numerics_gates.weights_of(bundle.manifest), options.gates)
    except UsageError:
        if options.gates is not None:
            raise
        return None
    return Gate(artifact_db=gate.artifact_db, end_to_end_db=gate.end_to_end_db)


def _numerics(
    manifest: Manifest, weights: Mapping[str, int], path: Path | None
) -> numerics_gates.Gate:
    return numerics_gates.gate(weights, manifest.precision, manifest.target, path)


def _faults(
    bundle: Bundle,
    records: tuple[RunRecord, ...],
    gate: Gate | None,
    gates: Path | None,
    platforms: Sequence[str],
) -> tuple[str, ...]:
    manifest = bundle.manifest
    faults = [] if gate else [f"there is no gate for the precision {manifest.precision}"]
    whole = numerics_gates.weights_of(manifest)
    measured = [
        *(
            (
                f"the picture at {size}" if len(manifest.sizes) > 1 else "the picture",
                whole,
                manifest.verification_of(size),
                "end_to_end_db",
            )
            for size in manifest.sizes
        ),
        *(
            (f"artifact {a.id}", a.weights, a.verification, "artifact_db")
            for a in manifest.artifacts
        ),
    ]
    for what, weights, verification, kind in measured:
        if verification.snr_db is None:
            faults.append(f"{what} was not verified against torch")
        elif gate:
            own = _numerics(manifest, weights, gates)
            snr, least = own.figure(verification), getattr(own, kind)
            if snr is None or snr < least:
                faults.append(f"{what} has {snr:.1f} dB, the gate asks {least:g}")
    if not records:
        faults.append("no run record says that it ran on a device")
    for record in records:
        if record.status != "ok":
            faults.append(f"run {record.id} {record.status}: {record.error or 'no reason given'}")
        elif record.check is not None and not record.check.matches:
            faults.append(f"run {record.id} drew a wrong picture")
    good = [r for r in records if r.status == "ok"]
    if good and not any(r.check is not None for r in good):
        faults.append("no run compared its picture with the bundle's reference")
    if good and len(manifest.sizes) > 1:
        ran = {r.bundle.size for r in good}
        faults += [f"no good run drew {size}" for size in manifest.sizes if size not in ran]
    if good and not any(r.device.kind in platforms for r in good):
        kinds = ", ".join(sorted({r.device.kind for r in good}))
        faults.append(f"it ran on {kinds} only, and is for {', '.join(platforms)}")
    if records and not any(_is_measured(r) for r in records):
        faults.append("no good run, resident or streamed, has a peak of memory")
    return tuple(faults)


def build(
    bundles: Sequence[Bundle],
    records: Sequence[RunRecord],
    path: str | Path,
    options: Options,
    identity: signing.Identity | None = None,
    *,
    zipped: bool = False,
    progress: Callable[[str, int], None] = lambda name, done: None,
) -> ReleaseManifest:
    """Build a release.

    Parameters
    ----------
    bundles : sequence of Bundle
        May be opened without hashing: their files are hashed here. Models are preferred in the
        order in which they come first.
    records : sequence of RunRecord
    path : path-like
        The release. One that is there already is replaced.
    options : Options
    identity : Identity, optional
        Who signs.
    zipped : bool
        Write one zip file instead of a folder.
    progress : callable
        Told of every file that is done, and its bytes.

    Raises
    ------
    GateError
        If a bundle fails that was not forced by name.
    UsageError, OutputError, BundleError
    """
    target = Path(path)
    check_replaceable(target, KIND, zipped)
    chosen = examine(bundles, records, options)
    refused = [c for c in chosen if c.faults and c.id not in options.force]
    if refused:
        lines = "".join(f"\n  {c.id}: {fault}" for c in refused for fault in c.faults[:5])
        raise GateError(
            f"{len(refused)} of {len(chosen)} bundles fail:{lines}\n ",
            remedy="repair them, leave them out, or take one as it is with --force ID",
        )
    rules = read_rules(options.rules)
    manifests: list[ReleaseManifest] = []

    def fill(folder: Path) -> None:
        manifests.append(_fill(folder, chosen, options, rules, identity, progress))

    if not zipped:
        with replaced_folder(target) as temporary:
            fill(temporary)
        return manifests[0]
    with output_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as name:
            folder = Path(name) / "release"
            folder.mkdir()
            fill(folder)
            archive = Path(name) / "release.zip"
            pack(folder, archive)
            archive.replace(target)
        fsync_folder(target.parent)
    return manifests[0]


def _fill(
    folder: Path,
    chosen: Sequence[Candidate],
    options: Options,
    rules: Rules,
    identity: signing.Identity | None,
    progress: Callable[[str, int], None],
) -> ReleaseManifest:
    variants = [_variant(folder, c, rules, c.id in options.force, progress) for c in chosen]
    models = list(dict.fromkeys(c.bundle.manifest.model.id for c in chosen))
    groups: dict[tuple[int, int], list[Candidate]] = {}
    for candidate, variant in zip(chosen, variants, strict=True):
        rank = (_UNITS.index(variant.unit), models.index(variant.model))
        groups.setdefault(rank, []).append(candidate)
    order = [c.id for _, group in sorted(groups.items()) for c in _fastest_first(group)]
    variants.sort(key=lambda v: order.index(v.id))
    manifests = [c.bundle.manifest for c in chosen]
    try:
        manifest = ReleaseManifest(
            name=options.name,
            version=options.version,
            label=options.label,
            expires=options.expires,
            budget=rules.budget,
            variants=tuple(variants),
            sources=_sources(manifests),
            documents=_documents(folder, manifests, options),
        )
    except ValidationError as error:
        message, place = describe_validation(error)
        raise UsageError(
            f"this release cannot be: {message}",
            field=place,
            remedy="--name takes letters, digits and . _ -",
        ) from None
    (folder / MANIFEST).write_bytes(manifest.to_bytes())
    digests = digest_tree(folder)
    # A release that exists is a release that opens.
    Release.check(folder, digests)
    if identity is not None:
        name = f"{options.name}-{options.version}"
        signing.sign(folder, digests, name, identity)
    return manifest


def _is_measured(record: RunRecord) -> bool:
    """Tell whether a run shows what a mode of its bundle takes."""
    return bool(
        record.status == "ok"
        and record.settings.memory_budget is None
        and record.memory
        and record.memory.peak_rss
    )


def _fastest_first(group: Sequence[Candidate]) -> list[Candidate]:
    """Return variants by time, measured alike on a device; as they are if none ran them all."""
    times = []
    for candidate in group:
        found: dict[tuple[str, int, str], list[float]] = {}
        for r in filter(_is_measured, candidate.records):
            if isinstance(value := r.summary()["median_ms"], float):
                key = (r.device.id, r.settings.threads, r.bundle.size)
                found.setdefault(key, []).append(value)
        times.append({k: min(v) for k, v in found.items()})
    shared = sorted(set.intersection(*map(set, times)))
    if not shared:
        return list(group)
    # On several devices, by the mean of ratios: each counts alike.
    means = [sum(math.log(t[k]) for k in shared) for t in times]
    return [c for _, _, c in sorted(zip(means, range(len(group)), group, strict=True))]


def _variant(
    folder: Path,
    candidate: Candidate,
    rules: Rules,
    is_forced: bool,
    progress: Callable[[str, int], None],
) -> Variant:
    bundle, manifest = candidate.bundle, candidate.bundle.manifest
    wants = rules.target(manifest.target)
    home = folder / "variants" / candidate.id
    files = {ref.path: ref for _, ref in references(manifest)}
    done = []
    for name in sorted([*files, BUNDLE_MANIFEST]):
        destination = home / name
        destination.parent.mkdir(parents=True, exist_ok=True)
        copied = chunked(bundle.path / name, name, destination)
        if name in files and (copied.sha256, copied.bytes) != (
            files[name].sha256,
            files[name].bytes,
        ):
            raise BundleError("is not the file that the manifest names", path=bundle.path / name)
        done.append(copied)
        progress(f"{candidate.id}/{name}", copied.bytes)
    own = next(f for f in done if f.path == BUNDLE_MANIFEST)
    chunks = ChunkList(variant=candidate.id, files=tuple(done)).to_bytes()
    records = "".join(f"{r.model_dump_json()}\n" for r in candidate.records).encode()
    return Variant(
        id=candidate.id,
        model=manifest.model.id,
        target=manifest.target,
        precision=manifest.precision,
        unit=wants.unit,
        bundle_sha256=bundle.sha256,
        manifest=FileRef(
            path=f"variants/{candidate.id}/{BUNDLE_MANIFEST}", sha256=own.sha256, bytes=own.bytes
        ),
        chunks=_write(folder, f"chunks/{candidate.id}.json", chunks),
        records=_write(folder, f"records/{candidate.id}.jsonl", records) if records else None,
        needs=Needs(
            platforms=wants.platforms,
            soc=wants.soc,
            min_os=wants.min_os,
            engines=tuple(sorted({a.engine for a in manifest.artifacts})),
            storage_bytes=sum(f.bytes for f in done),
        ),
        modes=modes(bundle, candidate.records),
        verification=manifest.verification,
        gate=candidate.gate,
        forced=candidate.faults if is_forced else (),
    )


def modes(bundle: Bundle, records: Sequence[RunRecord]) -> tuple[Mode, ...]:
    """Return the ways to run a bundle that its records show; estimates without any.

    The memory of a mode is the largest peak that was measured, its time the median of the runs'
    medians on the device of that peak, with as many threads and of the same size.
    """
    found = []
    for residency in get_args(Residency):
        good = [
            r
            for r in records
            if r.settings.mode == residency and r.status == "ok" and r.memory and r.memory.peak_rss
        ]
        if not good:
            continue
        peak = max(good, key=lambda r: ((r.memory and r.memory.peak_rss) or 0, r.id))
        times = [
            float(value)
            for r in good
            if (r.device.id, r.settings.threads, r.bundle.size)
            == (peak.device.id, peak.settings.threads, peak.bundle.size)
            and isinstance(value := r.summary()["median_ms"], float)
        ]
        assert peak.memory is not None
        found.append(
            Mode(
                residency=peak.settings.residency,
                memory_bytes=peak.memory.peak_rss or 0,
                basis="measured",
                device=peak.device.id,
                median_ms=round(median(times), 3) if times else None,
                record=peak.id,
            )
        )
    if found:
        return tuple(found)
    return tuple(
        Mode(residency=r, memory_bytes=peak_bytes(bundle.manifest, r), basis="estimated")
        for r in get_args(Residency)
    )


def _sources(manifests: Sequence[Manifest]) -> tuple[Source, ...]:
    found = {
        (m.model.id, m.model.checkpoint_sha256): Source(
            model=m.model.id,
            checkpoint_sha256=m.model.checkpoint_sha256,
            licence=m.licence,
            recipe=m.provenance.recipe,
            history=m.provenance.history,
        )
        for m in manifests
    }
    return tuple(found[key] for key in sorted(found))


def _documents(
    folder: Path, manifests: Sequence[Manifest], options: Options
) -> tuple[FileRef, ...]:
    written = [_write(folder, f"documents/{sbom.NAME}", sbom.make(manifests, options.name))]
    names = {sbom.NAME.casefold()}
    for path in options.documents:
        name = _document_name(path)
        if name.casefold() in names:
            raise UsageError("two documents have this name", path=path)
        names.add(name.casefold())
        try:
            written.append(_write(folder, f"documents/{name}", path.read_bytes()))
        except FileNotFoundError:
            raise UsageError("no such document", path=path) from None
    return tuple(sorted(written, key=lambda ref: ref.path))


def _document_name(path: Path) -> str:
    """Return a document's name; a README takes its folder's name, since all would be alike."""
    name = path.name
    if path.stem.upper() in ("README", "LICENSE", "LICENCE"):
        name = f"{path.resolve().parent.name}-{name}"
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name)


def _write(folder: Path, name: str, data: bytes) -> FileRef:
    target = folder / name
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(data)
    sha256, size = digest_file(target)
    return FileRef(path=name, sha256=sha256, bytes=size)
