"""Releases on disk: reading them is a trust boundary.

A release is a folder, or a zip file of one::

    release.json                what is in it, and which phone gets what
    model.sig                   OpenSSF model signature over every other file
    variants/ID/...             bundles
    chunks/ID.json              their contents in pieces, for updates
    records/ID.jsonl            run records
    documents/...               cards, licences, bill of materials
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from handheld.archive import Kind, unpack
from handheld.bundle import MAX_MANIFEST_BYTES as MAX_BUNDLE_MANIFEST
from handheld.bundle import Bundle, parse_manifest, references
from handheld.errors import BundleError, ReleaseError
from handheld.files import cache_root, describe_os_error, sha256_file
from handheld.manifest import FileRef
from handheld.release.manifest import (
    AGAIN,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    SIGNATURE,
    ReleaseManifest,
    Variant,
    folder_of,
    parse,
)

MAX_FILES = 20_000
MAX_DEPTH = 32
KIND = Kind("release", MANIFEST, frozenset({"version", "variants"}), ReleaseError, AGAIN)
_BLOCK = 1 << 20
_WORKERS = 2

Digests = Mapping[str, tuple[str, int]]
"""Relative path to sha256 and bytes."""


@dataclass(frozen=True)
class Release:
    """An opened release, all of whose hashes have passed; who made it is another question."""

    path: Path
    """Folder that holds the files."""
    manifest: ReleaseManifest
    digests: Digests
    """Of every file but the signature."""

    @classmethod
    def open(cls, path: str | Path) -> Release:
        """Open a release and check that it holds exactly what its manifest says.

        Parameters
        ----------
        path : path-like
            A folder, or a zip file, which is unpacked into the cache first.

        Raises
        ------
        ReleaseError
            For the first thing that is wrong, naming the file and the field.
        """
        root = located(path)
        with read_errors(root):
            digests = digest_tree(root)
            return cls.check(root, digests)

    @classmethod
    def check(cls, root: Path, digests: Digests) -> Release:
        """Open a folder whose files have been hashed."""
        if MANIFEST not in digests:
            raise ReleaseError(
                f"is not a release: it has no {MANIFEST}",
                path=root,
                remedy="name a folder that `handheld release build` wrote",
            )
        data = _as_hashed(root, MANIFEST, MAX_MANIFEST_BYTES, digests)
        manifest = parse(data, root / MANIFEST)
        named = {MANIFEST}
        for field, ref in own_files(manifest):
            _compare(root, ref, digests, root / MANIFEST, field)
            named.add(ref.path)
        for i, variant in enumerate(manifest.variants):
            named |= _check_variant(root, variant, digests, f"variants[{i}]")
        if extra := sorted(set(digests) - named):
            raise ReleaseError("no manifest names this file", path=root / extra[0], remedy=AGAIN)
        return cls(root, manifest, digests)

    @property
    def is_signed(self) -> bool:
        """Whether there is a signature, whoever made it."""
        return (self.path / SIGNATURE).is_file()

    def bundle(self, variant: Variant) -> Bundle:
        """Open a variant's bundle; its hashes have been compared already."""
        return Bundle.open(self.path / folder_of(variant), verify_hashes=False)


def located(path: str | Path) -> Path:
    """Return the folder of a release; a zip file is unpacked into the cache first."""
    root = Path(path)
    with read_errors(root):
        if root.is_file() and not root.is_symlink():
            # The archive is what counts, not what may be in the cache already.
            folder = cache_root() / "releases" / sha256_file(root)
            unpack(root, folder, KIND)
            return folder
    if not root.is_dir():
        raise ReleaseError("no such release", path=root, remedy="check the path")
    return root


@contextmanager
def read_errors(path: Path) -> Iterator[None]:
    """Turn an :class:`OSError` while reading a release into a :class:`ReleaseError`."""
    try:
        yield
    except OSError as error:
        message, remedy = describe_os_error(error)
        where = error.filename if isinstance(error.filename, str) else path
        raise ReleaseError(f"cannot read: {message}", path=where, remedy=remedy) from error


def own_files(manifest: ReleaseManifest) -> Iterator[tuple[str, FileRef]]:
    """Yield the files that the release's manifest itself names, with their fields."""
    for i, variant in enumerate(manifest.variants):
        yield f"variants[{i}].manifest", variant.manifest
        yield f"variants[{i}].chunks", variant.chunks
        if variant.records:
            yield f"variants[{i}].records", variant.records
    for i, ref in enumerate(manifest.documents):
        yield f"documents[{i}]", ref


def bundle_files(data: bytes, variant: Variant, path: Path) -> dict[str, FileRef]:
    """Return the files of a variant by their path inside the bundle, from its manifest.

    Raises
    ------
    BundleError
        If the manifest is broken or contradicts itself.
    """
    manifest = parse_manifest(data, path)
    if manifest.sha256 != variant.bundle_sha256:
        raise BundleError("is another bundle than the release says", path=path, remedy=AGAIN)
    files: dict[str, FileRef] = {}
    for field, ref in references(manifest):
        if files.setdefault(ref.path, ref) != ref:
            raise BundleError("contradicts another field", path=path, field=field, remedy=AGAIN)
    return files


def _check_variant(root: Path, variant: Variant, digests: Digests, field: str) -> set[str]:
    folder = folder_of(variant)
    path = root / folder / "manifest.json"
    try:
        data = _as_hashed(root, f"{folder}/manifest.json", MAX_BUNDLE_MANIFEST, digests)
        files = bundle_files(data, variant, path)
        for name, ref in files.items():
            inside = ref.model_copy(update={"path": f"{folder}/{name}"})
            _compare(root, inside, digests, path, name)
        Bundle.open(root / folder, verify_hashes=False)
    except BundleError as error:
        raise ReleaseError(
            error.message, path=error.path, field=error.field or field, remedy=AGAIN
        ) from None
    total = len(data) + sum(ref.bytes for ref in files.values())
    if total != variant.needs.storage_bytes:
        raise ReleaseError(
            f"the files have {total} bytes",
            path=root / MANIFEST,
            field=f"{field}.needs.storage_bytes",
            remedy=AGAIN,
        )
    return {variant.manifest.path, *(f"{folder}/{name}" for name in files)}


def _compare(root: Path, ref: FileRef, digests: Digests, source: Path, field: str) -> None:
    found = digests.get(ref.path)
    if found is None:
        raise ReleaseError("the file is missing", path=root / ref.path, remedy=AGAIN)
    if found != (ref.sha256, ref.bytes):
        raise ReleaseError(
            f"is not the file of {found[1]} bytes and sha256 {found[0]} that is there: "
            f"'{ref.path}'",
            path=source,
            field=field,
            remedy=AGAIN,
        )


def _as_hashed(root: Path, name: str, limit: int, digests: Digests) -> bytes:
    """Read a file that was hashed, and notice if it has been replaced since."""
    data = read_limited(root / name, limit)
    known = digests.get(name)
    if known is not None and len(data) <= limit and hashlib.sha256(data).hexdigest() != known[0]:
        raise ReleaseError("changed while it was read", path=root / name, remedy=AGAIN)
    return data


def read_limited(path: Path, limit: int) -> bytes:
    """Read a file that should be small; a longer one is cut, which parsers refuse."""
    with path.open("rb") as f:
        return f.read(limit + 1)


def digest_tree(root: Path) -> dict[str, tuple[str, int]]:
    """Hash every file below a folder but the signature.

    Raises
    ------
    ReleaseError
        For links, devices, empty folders, names that differ in case only, and too many files.
    """
    paths: list[str] = []
    seen: set[str] = set()
    for name in _files(root, "", 0):
        folded = name.casefold()
        if folded in seen:
            raise ReleaseError("another name differs in case only", path=root / name, remedy=AGAIN)
        seen.add(folded)
        paths.append(name)
        if len(paths) > MAX_FILES:
            raise ReleaseError("too many files", path=root, remedy=AGAIN)
    paths = sorted(p for p in paths if p != SIGNATURE)
    with ThreadPoolExecutor(_WORKERS) as pool:
        return dict(zip(paths, pool.map(lambda p: digest_file(root / p), paths), strict=True))


def digest_file(path: Path) -> tuple[str, int]:
    """Return the sha256 of a file and the number of bytes that were hashed."""
    digest, total = hashlib.sha256(), 0
    with path.open("rb", buffering=0) as f:
        while block := f.read(_BLOCK):
            digest.update(block)
            total += len(block)
    return digest.hexdigest(), total


def _files(root: Path, prefix: str, depth: int) -> Iterator[str]:
    if depth > MAX_DEPTH:
        raise ReleaseError("folders are nested too deeply", path=root / prefix, remedy=AGAIN)
    folder = root / prefix
    count = 0
    with os.scandir(folder) as entries:
        for entry in entries:
            count += 1
            name = f"{prefix}{entry.name}"
            mode = entry.stat(follow_symlinks=False).st_mode
            if stat.S_ISDIR(mode):
                yield from _files(root, f"{name}/", depth + 1)
            elif stat.S_ISREG(mode):
                yield name
            else:
                raise ReleaseError("is neither a file nor a folder", path=root / name, remedy=AGAIN)
    if count == 0 and prefix:
        raise ReleaseError("an empty folder belongs to no release", path=folder, remedy=AGAIN)
