"""Releases as static files that phones update from, on any web server.

::

    latest.json                  {"name", "version"}: a hint, which nobody trusts
    VERSION/release.json.zst     and model.sig.zst: what is trusted
    VERSION/chunks/ID.json.zst   pieces of each variant
    VERSION/patches/OLD/ID.json.zst   differences to an older release's files
    objects/ab/abcd....zst       pieces and differences, by the sha256 of what is inside

Objects never change and are shared by all versions. Everything else of a version is written before
``latest.json`` names it, so a publication that was cut short is one that nobody sees.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import numpy as np
from pydantic import Field, ValidationError

from handheld.bundle import describe_validation
from handheld.documents import parse_object
from handheld.errors import MissingDependencyError, ReleaseError, UsageError
from handheld.files import output_errors, write_file
from handheld.manifest import BundlePath, Sha256
from handheld.program import Model
from handheld.release import signing
from handheld.release.chunks import ChunkList, parse_list
from handheld.release.folder import Release
from handheld.release.manifest import AGAIN, MANIFEST, SIGNATURE, Variant, folder_of, parse
from handheld.release.trust import verify

LATEST = "latest.json"
BLOCK_BYTES: Final = 2**20
MAX_PATCH_LIST_BYTES = 16 * 2**20
_LEVEL = 9
_INSTALL = 'install with  pip install "handheld[release]"'


class PatchedFile(Model):
    """A file as differences to one of the same size: bytes of the new less the old, modulo 256."""

    path: BundlePath
    old_sha256: Sha256
    sha256: Sha256
    blocks: tuple[tuple[Sha256, Annotated[int, Field(ge=0, le=2 * BLOCK_BYTES)]], ...]
    """Per 1 MiB of the file: hash of the differences, and bytes of their object."""

    @property
    def cost(self) -> int:
        """Bytes that are fetched to apply it."""
        return sum(n for _, n in self.blocks)


class PatchList(Model):
    """Differences between a variant's files and those of an older release."""

    schema_version: Literal[1] = 1
    variant: str
    old_version: int
    files: tuple[PatchedFile, ...]


@dataclass(frozen=True)
class Published:
    """What :func:`publish` wrote."""

    version: int
    objects: int
    """New ones."""
    new_bytes: int
    """Of new objects, compressed."""


def zstd() -> Any:
    """Return the module ``zstandard``.

    Raises
    ------
    MissingDependencyError
        If it is not installed.
    """
    try:
        import zstandard
    except ModuleNotFoundError:
        raise MissingDependencyError("needs zstandard, which is missing", remedy=_INSTALL) from None
    return zstandard


def object_path(sha256: str) -> str:
    """Return where an object lies on the site."""
    return f"objects/{sha256[:2]}/{sha256}.zst"


def parse_patches(data: bytes, path: str) -> PatchList:
    """Parse a list of differences.

    Raises
    ------
    ReleaseError
        If it is none.
    """
    if len(data) > MAX_PATCH_LIST_BYTES:
        raise ReleaseError("the list of differences is over the limit", path=path, remedy=AGAIN)
    try:
        return PatchList.model_validate_json(data, strict=True)
    except ValidationError as error:
        message, field = describe_validation(error)
        raise ReleaseError(message, path=path, field=field, remedy=AGAIN) from None


def latest(data: bytes, path: str) -> int:
    """Return the version that ``latest.json`` names.

    Raises
    ------
    ReleaseError
        If it names none.
    """
    tree = parse_object(data, 4096, path, ReleaseError, AGAIN)
    version = tree.get("version")
    if type(version) is not int or not 1 <= version < 2**53:
        raise ReleaseError("names no version", path=path, field="version", remedy=AGAIN)
    return version


def publish(
    path: str | Path,
    site: str | Path,
    older: Sequence[str | Path] = (),
    identity: signing.Identity | None = None,
    progress: Callable[[str, int], None] = lambda name, done: None,
) -> Published:
    """Add a release to a folder of static files.

    Parameters
    ----------
    path : path-like
        A signed release.
    site : path-like
        The folder; what other versions need stays.
    older : sequence of path-like
        Releases to which differences are written, for phones that have them.
    identity : Identity, optional
        Who must have signed; without one it is only known that the release is whole.
    progress : callable
        Told of every new object, and its bytes.

    Raises
    ------
    UsageError
        If the release is not signed, or not newer than what is published.
    TrustError
        If the signature does not hold, or the release has expired.
    ReleaseError, OutputError
    """
    release = verify(path, identity)
    root, manifest = Path(site), release.manifest
    if not release.is_signed:
        raise UsageError(
            "is not signed, and phones take nothing else", path=path, remedy="build it with --key"
        )
    hint = root / LATEST
    if hint.is_file():
        published = latest(hint.read_bytes(), str(hint))
        if published > manifest.version:
            raise UsageError(
                f"version {manifest.version} is older than {published}, which is published",
                path=path,
                remedy="build it again with a larger --version",
            )
        same = root / str(published) / f"{MANIFEST}.zst"
        if same.is_file():
            data = zstd().ZstdDecompressor().decompress(same.read_bytes())
            name = parse(data, same).name
            if name != manifest.name:
                raise UsageError(
                    f"is a release of '{manifest.name}', the site has those of '{name}'",
                    path=path,
                    field="name",
                    remedy="publish to a folder of its own",
                )
            if published == manifest.version and data != (release.path / MANIFEST).read_bytes():
                raise UsageError(
                    f"another version {published} is published",
                    path=path,
                    remedy="build it again with a larger --version",
                )
    writer = _Writer(root, progress)
    home = str(manifest.version)
    for variant in manifest.variants:
        listed = _chunks(release, variant)
        for file in listed.files:
            writer.pieces(release.path / folder_of(variant) / file.path, file.pieces)
        writer.small(f"{home}/chunks/{variant.id}.json", (release.path / variant.chunks.path))
    for old in older:
        _patches(release, Release.open(old), writer, home)
    for name in (SIGNATURE, MANIFEST):
        writer.small(f"{home}/{name}", release.path / name)
    with output_errors(root):
        text = json.dumps({"name": manifest.name, "version": manifest.version}) + "\n"
        write_file(hint, text.encode())
    return Published(manifest.version, writer.objects, writer.new_bytes)


class _Writer:
    """Writes objects that are not there yet."""

    def __init__(self, root: Path, progress: Callable[[str, int], None]) -> None:
        self.root = root
        self.progress = progress
        self.objects = self.new_bytes = 0
        self._compress = zstd().ZstdCompressor(level=_LEVEL).compress
        self._sizes: dict[str, int] = {}

    def pieces(self, path: Path, pieces: Sequence[tuple[str, int]]) -> None:
        """Write a file's pieces."""
        with path.open("rb") as f:
            for sha256, size in pieces:
                data = f.read(size)
                if hashlib.sha256(data).hexdigest() != sha256:
                    raise ReleaseError("is not what its list of pieces says", path=path)
                self.object(sha256, data)

    def packed(self, data: bytes) -> bytes:
        """Return data as an object holds it."""
        return bytes(self._compress(data))

    def object(self, sha256: str, data: bytes) -> int:
        """Write an object; return its size on the site."""
        return self._object(sha256, lambda: self.packed(data))

    def packed_object(self, sha256: str, packed: bytes) -> int:
        """Write an object that is packed already; return its size on the site."""
        return self._object(sha256, lambda: packed)

    def _object(self, sha256: str, packing: Callable[[], bytes]) -> int:
        if sha256 in self._sizes:
            return self._sizes[sha256]
        target = self.root / object_path(sha256)
        if not self._holds(target, sha256):
            packed = packing()
            write_file(target, packed)
            self.objects += 1
            self.new_bytes += len(packed)
            self.progress(sha256, len(packed))
        self._sizes[sha256] = target.stat().st_size
        return self._sizes[sha256]

    def _holds(self, path: Path, sha256: str) -> bool:
        """Tell whether an object is there and not damaged."""
        module = zstd()
        digest = hashlib.sha256()
        try:
            with path.open("rb") as f, module.ZstdDecompressor().stream_reader(f) as reader:
                while data := reader.read(2**20):
                    digest.update(data)
        except (OSError, module.ZstdError):
            return False
        return digest.hexdigest() == sha256

    def size(self, sha256: str) -> int:
        """Return the size on the site of an object that was written."""
        return self._sizes[sha256]

    def small(self, name: str, source: Path | bytes) -> None:
        """Write a file of a version."""
        data = source if isinstance(source, bytes) else source.read_bytes()
        write_file(self.root / f"{name}.zst", self._compress(data))


def _chunks(release: Release, variant: Variant) -> ChunkList:
    path = release.path / variant.chunks.path
    return parse_list(path.read_bytes(), path)


def _patches(release: Release, old: Release, writer: _Writer, home: str) -> None:
    if old.manifest.version >= release.manifest.version:
        raise UsageError("is not an older release", path=old.path)
    before = {v.id: v for v in old.manifest.variants}
    for variant in release.manifest.variants:
        theirs = before.get(variant.id)
        if theirs is None:
            continue
        had = {f.path: f for f in _chunks(old, theirs).files}
        known = {sha256 for f in had.values() for sha256, _ in f.pieces}
        files = []
        for file in _chunks(release, variant).files:
            was = had.get(file.path)
            if was is None or was.bytes != file.bytes or was.sha256 == file.sha256:
                continue
            missing = sum(writer.size(s) for s in dict(file.pieces) if s not in known)
            blocks = _differences(
                old.path / folder_of(theirs) / file.path,
                release.path / folder_of(variant) / file.path,
                writer,
                missing,
            )
            if blocks is not None:
                files.append(
                    PatchedFile(
                        path=file.path, old_sha256=was.sha256, sha256=file.sha256, blocks=blocks
                    )
                )
        if files:
            listed = PatchList(
                variant=variant.id, old_version=old.manifest.version, files=tuple(files)
            )
            name = f"{home}/patches/{old.manifest.version}/{variant.id}.json"
            writer.small(name, listed.model_dump_json().encode())


def _differences(
    old: Path, new: Path, writer: _Writer, limit: int
) -> tuple[tuple[str, int], ...] | None:
    """Write the differences between two files, or return None if pieces would be cheaper."""
    found: list[tuple[str, bytes]] = []
    total = 0
    with old.open("rb") as a, new.open("rb") as b:
        while block := b.read(BLOCK_BYTES):
            was = np.frombuffer(a.read(len(block)), np.uint8)
            data = (np.frombuffer(block, np.uint8) - was).tobytes()
            found.append((hashlib.sha256(data).hexdigest(), writer.packed(data)))
            total += len(found[-1][1])
            if total >= limit:
                return None
    return tuple((sha256, writer.packed_object(sha256, packed)) for sha256, packed in found)
