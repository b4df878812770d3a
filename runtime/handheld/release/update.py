"""Installing releases on a device and updating them, as an app does it.

A folder holds at most two versions, and one small file says which one counts::

    current.json               the version in use, the one before it, and whether it has run
    seen.json                  the newest version ever trusted: nothing older is taken
    versions/VERSION-ID[.N]/   release.json, model.sig, chunks.json, bundle/
    pieces/                    what has been fetched so far, each piece checked

``current.json`` is replaced by one rename after the new version is complete and checked. Whenever
the process ends, it names a whole version. The version before stays until :func:`confirm` says that
the new one has run.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import numpy as np
from pydantic import ValidationError

from handheld.bundle import Bundle
from handheld.errors import (
    HandheldError,
    MissingDependencyError,
    OutputError,
    ReleaseError,
    TrustError,
)
from handheld.files import locked, output_errors, replaced_folder, write_file
from handheld.program import Model
from handheld.protocol import Residency
from handheld.release import signing
from handheld.release.chunks import (
    MAX_BYTES,
    MAX_LIST_BYTES,
    ChunkedFile,
    ChunkList,
    parse_list,
)
from handheld.release.manifest import (
    AGAIN,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    SIGNATURE,
    ReleaseManifest,
    Variant,
    parse,
)
from handheld.release.publish import (
    BLOCK_BYTES,
    LATEST,
    MAX_PATCH_LIST_BYTES,
    PatchedFile,
    latest,
    object_path,
    parse_patches,
    zstd,
)
from handheld.release.selection import Phone, select
from handheld.release.trust import check_age

CURRENT, SEEN = "current.json", "seen.json"
_TIMEOUT_S = 30.0
_TRIES = 4
_MAX_WINDOW = 2**25
"""Of compressed files: four times what they are written with."""


class Installed(Model):
    """A version on the device."""

    version: int
    variant: str
    residency: Residency
    repaired: int = 0
    """Times it was put together again; each has a folder of its own."""

    @property
    def folder(self) -> str:
        """Its name below ``versions``."""
        again = f".{self.repaired}" if self.repaired else ""
        return f"{self.version}-{self.variant}{again}"


class State(Model):
    """What ``current.json`` says."""

    current: Installed
    previous: Installed | None = None
    """Kept until the current one has run."""
    confirmed: bool = False
    reverted: int | None = None
    """The version that was gone back from; it is not installed again by itself."""


class Seen(Model):
    """What ``seen.json`` says."""

    version: int
    name: str | None = None
    """Of the release: another one's is never taken for it."""


@dataclass(frozen=True)
class Result:
    """What :func:`update` did."""

    state: State
    changed: bool
    fetched_bytes: int
    """Over the network, as compressed."""
    reused_bytes: int
    """Taken from the version before, or from an earlier attempt."""


T = TypeVar("T", bound=Model)
Progress = Callable[[int, int], None]
"""Told of the bytes that have been fetched, and of those that are to be."""


def state(root: str | Path) -> State | None:
    """Return what is installed below a folder, or None.

    Raises
    ------
    ReleaseError
        If ``current.json`` is damaged.
    """
    return _read(Path(root) / CURRENT, State)


def bundle_path(root: str | Path, installed: Installed) -> Path:
    """Return where an installed version's bundle lies."""
    return Path(root) / "versions" / installed.folder / "bundle"


def confirm(root: str | Path) -> State:
    """Say that the current version has run; the one before it is removed.

    Raises
    ------
    ReleaseError
        If nothing is installed.
    """
    home = Path(root)
    with _alone(home):
        found = _must(home)
        if not found.confirmed:
            found = State(current=found.current, confirmed=True, reverted=found.reverted)
            _write(home / CURRENT, found)
        _sweep(home, found)
    return found


def revert(root: str | Path) -> State:
    """Go back to the version before, if the current one has not run yet.

    Raises
    ------
    ReleaseError
        If there is nothing to go back to.
    """
    home = Path(root)
    with _alone(home):
        found = _must(home)
        if found.confirmed or found.previous is None:
            raise ReleaseError(
                "there is no version before this one",
                path=home,
                remedy="it is removed once the new one has run",
            )
        found = State(current=found.previous, confirmed=True, reverted=found.current.version)
        _write(home / CURRENT, found)
        _sweep(home, found)
    return found


def update(
    root: str | Path,
    url: str,
    identity: signing.Identity,
    phone: Phone,
    *,
    repair: bool = False,
    retry: bool = False,
    progress: Progress = lambda done, total: None,
) -> Result:
    """Bring a device to the newest release of a site.

    What was fetched before an interruption is not fetched again. Files of the version in use are
    hashed before anything is made of them, and fetched if they are damaged.

    Parameters
    ----------
    root : path-like
        The device's folder for releases.
    url : str
        The site's address, or the path of a folder.
    identity : Identity
        Who must have signed.
    phone : Phone
        What the device is; decides the variant.
    repair : bool
        Hash the files of the version in use, and replace those that are damaged.
    retry : bool
        Install the newest version again though :func:`revert` went back from it.

    Raises
    ------
    TrustError
        If the signature does not hold, or the release is too old.
    ReleaseError
        If nothing fits the device, the site is not complete, it cannot be reached, or it has only
        a version that was gone back from to repair the one in use with.
    OutputError
        If the space does not suffice.
    """
    home, site = Path(root), _Site(url)
    with _alone(home):
        found = state(home)
        seen = _read(home / SEEN, Seen)
        least = max(seen.version if seen else 1, found.current.version if found else 1)
        version = latest(site.get(LATEST, 4096), f"{url}/{LATEST}")
        if version < least:
            raise TrustError(
                f"the site offers version {version}, after {least}", path=url, field="version",
                remedy="it was set back, or somebody replays an old release",
            )  # fmt: skip
        is_current = found is not None and version == found.current.version
        is_damaged = found is not None and (
            not bundle_path(home, found.current).is_dir()
            or (repair and not _is_whole(home, found, identity))
        )
        is_reverted = found is not None and version == found.reverted and not retry
        if is_damaged and is_reverted:
            raise ReleaseError(
                f"version {found.current.version if found else 0} is damaged, and the site has "
                f"only {version}, which was gone back from",
                path=home,
                remedy="install that again with --retry",
            )
        if found and ((is_current and not is_damaged) or is_reverted):
            # A run that was killed right after the switch has left what it fetched.
            _clean(home, found)
            return Result(found, False, site.fetched, 0)
        name = seen.name if seen and seen.name else _installed_name(home, found)
        manifest = _trusted(home, site, version, identity, least, name)
        new, reused = _install_best(home, site, manifest, phone, found, progress)
        if found and new.version == found.current.version and new.repaired:
            after = found.model_copy(update={"current": new})
        else:
            previous = None
            if found:
                previous = found.current if found.confirmed else found.previous or found.current
            after = State(current=new, previous=previous)
        _write(home / CURRENT, after)
        _clean(home, after)
        return Result(after, True, site.fetched, reused)


class _Site:
    """Static files at an address or in a folder."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.fetched = 0
        try:
            parts = urlsplit(url)
        except ValueError as error:
            raise ReleaseError(
                f"is not an address: {error}", path=url, remedy="use https"
            ) from None
        self._pool: Any = None
        if parts.scheme in ("http", "https"):
            try:
                import urllib3
            except ModuleNotFoundError:
                raise MissingDependencyError(
                    "needs urllib3, which is missing",
                    remedy='install with  pip install "handheld[release]"',
                ) from None
            retries = urllib3.Retry(total=_TRIES, backoff_factor=0.2, status_forcelist=[502, 503])
            self._pool = urllib3.PoolManager(timeout=urllib3.Timeout(_TIMEOUT_S), retries=retries)
        elif parts.scheme not in ("", "file"):
            raise ReleaseError(f"cannot fetch by {parts.scheme}", path=url, remedy="use https")
        else:
            self._folder = Path(parts.path)

    def get(self, name: str, limit: int) -> bytes:
        """Return a file of at most ``limit`` bytes."""
        data = self._remote(name, limit) if self._pool else self._local(name, limit)
        if len(data) > limit:
            raise ReleaseError("is larger than it may be", path=f"{self.url}/{name}", remedy=AGAIN)
        self.fetched += len(data)
        return data

    def unpacked(self, name: str, limit: int) -> bytes:
        """Return the content of a compressed file, of at most ``limit`` bytes."""
        packed = self.get(name, limit + limit // 64 + 1024)
        module = zstd()
        # Read as a stream, since a frame's own word on its size is taken for the limit otherwise.
        unpacking = module.ZstdDecompressor(max_window_size=_MAX_WINDOW)
        try:
            with unpacking.stream_reader(packed) as reader:
                data = reader.read(limit + 1)
        except module.ZstdError as error:
            where = f"{self.url}/{name}"
            raise ReleaseError(f"cannot be unpacked: {error}", path=where, remedy=AGAIN) from None
        if len(data) > limit:
            raise ReleaseError("unpacks to more than it may", path=f"{self.url}/{name}")
        return bytes(data)

    def _local(self, name: str, limit: int) -> bytes:
        try:
            with (self._folder / name).open("rb") as f:
                return f.read(limit + 1)
        except OSError as error:
            raise ReleaseError(
                f"cannot read: {error.strerror}", path=self._folder / name, remedy="publish again"
            ) from None

    def _remote(self, name: str, limit: int) -> bytes:
        import urllib3

        where = f"{self.url}/{name}"
        for attempt in range(_TRIES):
            try:
                response = self._pool.request("GET", where, preload_content=False)
                try:
                    data, whole = _answer(response, where, limit)
                finally:
                    # What is unread would be taken for the next answer.
                    response.close()
                if whole:
                    return data
            except urllib3.exceptions.HTTPError as error:
                if attempt == _TRIES - 1:
                    text = " ".join(str(error).split())[:200]
                    raise ReleaseError(
                        f"cannot be fetched: {text}",
                        path=where,
                        remedy="run it again; what has come stays",
                    ) from None
        raise ReleaseError("ends too early", path=where, remedy="run it again; what has come stays")


def _answer(response: Any, where: str, limit: int) -> tuple[bytes, bool]:
    """Read an answer up to one byte more than ``limit``, and tell whether that is all of it."""
    if response.status != 200:
        raise ReleaseError(f"the server answers {response.status}", path=where)
    wanted = response.headers.get("Content-Length")
    if wanted is not None and not re.fullmatch(r"[0-9]{1,18}", wanted):
        raise ReleaseError("the server gives no sensible length", path=where)
    data = bytes(response.read(limit + 1))
    return data, wanted is None or len(data) >= min(int(wanted), limit + 1)


def _trusted(
    home: Path,
    site: _Site,
    version: int,
    identity: signing.Identity,
    least: int,
    name: str | None,
) -> ReleaseManifest:
    """Fetch a release's manifest and check whose it is."""
    data = site.unpacked(f"{version}/{MANIFEST}.zst", MAX_MANIFEST_BYTES)
    signature = site.unpacked(f"{version}/{SIGNATURE}.zst", signing.MAX_SIGNATURE_BYTES)
    fetched = home / "fetched"
    write_file(fetched / SIGNATURE, signature)
    signed = signing.signed_digests(fetched / SIGNATURE, identity)
    where = f"{site.url}/{version}/{MANIFEST}"
    if signed.get(MANIFEST) != hashlib.sha256(data).hexdigest():
        raise TrustError("is not what was signed", path=where)
    manifest = parse(data, where)
    if manifest.version != version:
        raise TrustError(f"is version {manifest.version}, not {version}", path=where)
    if name not in (None, manifest.name):
        raise TrustError(
            f"is a release of '{manifest.name}', this folder holds '{name}'",
            path=where,
            field="name",
            remedy="update from the right site, or into another folder",
        )
    check_age(manifest, Path(where), least)
    write_file(fetched / MANIFEST, data)
    _write(home / SEEN, Seen(version=version, name=manifest.name))
    return manifest


def _install_best(
    home: Path,
    site: _Site,
    manifest: ReleaseManifest,
    phone: Phone,
    found: State | None,
    progress: Progress,
) -> tuple[Installed, int]:
    """Install the best variant for which there is space, beside what stays of the one in use.

    Returns
    -------
    new : Installed
    reused : int
        Bytes that need not be fetched.
    """
    whole = select(manifest, phone)
    roomy = select(manifest, phone.model_copy(update={"free_bytes": None}))
    for answer in (roomy, whole):
        if answer.variant is None or answer.residency is None:
            raise ReleaseError(answer.reason, path=site.url)
        variant = manifest.variant(answer.variant)
        new = Installed(version=manifest.version, variant=variant.id, residency=answer.residency)
        if found and new.folder == f"{found.current.version}-{found.current.variant}":
            new = new.model_copy(update={"repaired": found.current.repaired + 1})
        try:
            reused = _install(home, site, manifest, variant, new, found, phone, progress)
        except _SpaceError:
            if answer is whole or whole.variant in (None, variant.id):
                raise
            continue
        return new, reused
    raise AssertionError


class _SpaceError(OutputError):
    """There is less space than an update needs."""


def _install(
    home: Path,
    site: _Site,
    manifest: ReleaseManifest,
    variant: Variant,
    new: Installed,
    found: State | None,
    phone: Phone,
    progress: Progress,
) -> int:
    """Put a version together; return the bytes that need not be fetched."""
    old = _Old(home, found)
    data = old.chunks_bytes
    if data is None or hashlib.sha256(data).hexdigest() != variant.chunks.sha256:
        data = site.unpacked(f"{new.version}/chunks/{variant.id}.json.zst", MAX_LIST_BYTES)
        if hashlib.sha256(data).hexdigest() != variant.chunks.sha256:
            raise TrustError("the list of pieces is not what was signed", path=site.url)
    chunks = parse_list(data, f"{site.url}/{new.version}/chunks/{variant.id}.json")
    if sum(f.bytes for f in chunks.files) != variant.needs.storage_bytes:
        raise ReleaseError("the pieces are not those of the variant", path=site.url, remedy=AGAIN)
    pieces = home / "pieces"
    with output_errors(pieces):
        pieces.mkdir(parents=True, exist_ok=True)
    patches = _patches(site, new, old, chunks, pieces)
    wanted = _to_fetch(chunks, old, patches, pieces)
    made = sum(f.bytes for f in chunks.files if not _is_same(f, old))
    _check_space(home, made + sum(wanted.values()), phone.free_bytes)
    done, total = 0, sum(wanted.values())
    progress(0, total)
    for sha256, size in wanted.items():
        _fetch(site, sha256, size, pieces)
        done += size
        progress(done, total)
    target = home / "versions" / new.folder
    with replaced_folder(target) as folder:
        for file in chunks.files:
            _assemble(folder / "bundle" / file.path, file, old, patches.get(file.path), pieces)
        write_file(folder / "chunks.json", data)
        for name in (SIGNATURE, MANIFEST):
            # The signed bytes: another program may have written them in another form.
            write_file(folder / name, (home / "fetched" / name).read_bytes())
        _check_bundle(folder / "bundle", variant, chunks)
    shutil.rmtree(home / "fetched", ignore_errors=True)
    return variant.needs.storage_bytes - total if total < variant.needs.storage_bytes else 0


def _check_bundle(path: Path, variant: Variant, chunks: ChunkList) -> None:
    """Check that what was put together is the bundle that the release means."""
    own = next((f for f in chunks.files if f.path == "manifest.json"), None)
    if own is None or own.sha256 != variant.manifest.sha256:
        raise TrustError("is not the bundle that was signed", path=path)
    # Every file has the hash that the list says; the manifest must ask for just these.
    bundle = Bundle.open(path, verify_hashes=True)
    if bundle.sha256 != variant.bundle_sha256:
        raise TrustError("is not the bundle that was signed", path=path)


class _Old:
    """What the version in use offers to the next one."""

    def __init__(self, home: Path, found: State | None) -> None:
        self.version = found.current.version if found else None
        self.chunks_bytes: bytes | None = None
        self.files: dict[str, ChunkedFile] = {}
        self.places: dict[str, tuple[Path, int, int]] = {}
        self._intact: dict[str, bool] = {}
        if found is None:
            return
        folder = home / "versions" / found.current.folder
        self.bundle = folder / "bundle"
        try:
            data = (folder / "chunks.json").read_bytes()
            chunks = parse_list(data, folder / "chunks.json")
        except (OSError, HandheldError):
            # A damaged version is no help; everything is fetched.
            return
        self.chunks_bytes = data
        for file in chunks.files:
            self.files[file.path] = file
            offset = 0
            for sha256, size in file.pieces:
                self.places.setdefault(sha256, (self.bundle / file.path, offset, size))
                offset += size

    def is_intact(self, path: str) -> bool:
        """Tell whether a file still has the content that its version's list says."""
        if path not in self._intact:
            file = self.files.get(path)
            same = False
            with contextlib.suppress(OSError):
                same = file is not None and _sha256(self.bundle / path) == file.sha256
            self._intact[path] = same
        return self._intact[path]

    def piece(self, sha256: str) -> bytes | None:
        """Return a piece of the version in use, if its file is not damaged."""
        place = self.places.get(sha256)
        if place is None:
            return None
        path, offset, size = place
        with contextlib.suppress(OSError), path.open("rb") as f:
            f.seek(offset)
            data = f.read(size)
            if hashlib.sha256(data).hexdigest() == sha256:
                return data
        return None


def _to_fetch(
    chunks: ChunkList, old: _Old, patches: dict[str, PatchedFile], pieces: Path
) -> dict[str, int]:
    """Return the pieces that must come over the network, with their bytes."""
    wanted: dict[str, int] = {}
    for file in chunks.files:
        if (patch := patches.get(file.path)) is not None:
            left = file.bytes
            for sha256, _ in patch.blocks:
                wanted[sha256] = min(BLOCK_BYTES, left)
                left -= min(BLOCK_BYTES, left)
        elif not _is_same(file, old):
            wanted.update((s, n) for s, n in file.pieces if old.piece(s) is None)
    return {s: n for s, n in wanted.items() if not _is_there(pieces / s)}


def _is_there(piece: Path) -> bool:
    """Tell whether a piece was fetched before; one that did not survive is removed."""
    with contextlib.suppress(OSError):
        if _sha256(piece) == piece.name:
            return True
        piece.unlink()
    return False


def _is_same(file: ChunkedFile, old: _Old) -> bool:
    was = old.files.get(file.path)
    return was is not None and was.sha256 == file.sha256 and old.is_intact(file.path)


def _patches(
    site: _Site, new: Installed, old: _Old, chunks: ChunkList, pieces: Path
) -> dict[str, PatchedFile]:
    """Return the differences that are cheaper than pieces, by path."""
    if old.version is None or not old.files:
        return {}
    if all(_is_same(f, old) for f in chunks.files):
        return {}
    name = f"{new.version}/patches/{old.version}/{new.variant}.json.zst"
    try:
        listed = parse_patches(site.unpacked(name, MAX_PATCH_LIST_BYTES), name)
    except ReleaseError:
        # Differences are an offer; most old versions have none.
        return {}
    wanted = {f.path: f for f in chunks.files}
    found = {}
    for patch in listed.files:
        file, was = wanted.get(patch.path), old.files.get(patch.path)
        if file is None or was is None or was.bytes != file.bytes:
            continue
        fits = (patch.old_sha256, patch.sha256) == (was.sha256, file.sha256)
        blocks = -(-file.bytes // BLOCK_BYTES)
        missing = sum(n for s, n in file.pieces if s not in old.places)
        cheaper = len(patch.blocks) == blocks and patch.cost < missing
        if fits and cheaper and old.is_intact(patch.path):
            found[patch.path] = patch
    return found


def _fetch(site: _Site, sha256: str, size: int, pieces: Path) -> None:
    data = site.unpacked(object_path(sha256), max(MAX_BYTES, BLOCK_BYTES))
    if len(data) != size or hashlib.sha256(data).hexdigest() != sha256:
        raise ReleaseError(
            "is not the piece that its name says",
            path=f"{site.url}/{object_path(sha256)}",
            remedy="publish again",
        )
    with output_errors(pieces):
        # A piece is checked again when it is used, so it need not be durable.
        temporary = pieces / f".{sha256}"
        temporary.write_bytes(data)
        temporary.replace(pieces / sha256)


def _piece(sha256: str, old: _Old, pieces: Path) -> bytes:
    if (data := old.piece(sha256)) is not None:
        return data
    try:
        data = (pieces / sha256).read_bytes()
    except FileNotFoundError:
        data = b""
    if hashlib.sha256(data).hexdigest() != sha256:
        (pieces / sha256).unlink(missing_ok=True)
        raise ReleaseError("a piece was damaged on disk", path=pieces / sha256, remedy="try again")
    return data


def _assemble(
    target: Path, file: ChunkedFile, old: _Old, patch: PatchedFile | None, pieces: Path
) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if patch is None and _is_same(file, old):
        source = old.bundle / file.path
        try:
            # Versions are never written to, so they may share files.
            os.link(source, target)
        except OSError:
            shutil.copyfile(source, target)
        return
    digest = hashlib.sha256()
    with target.open("xb") as sink:
        for data in _parts(file, old, patch, pieces):
            digest.update(data)
            sink.write(data)
        sink.flush()
        os.fsync(sink.fileno())
    if digest.hexdigest() != file.sha256:
        raise ReleaseError(
            "is not the file that was signed", path=target, remedy="the site is damaged"
        )


def _parts(
    file: ChunkedFile, old: _Old, patch: PatchedFile | None, pieces: Path
) -> Iterator[bytes]:
    if patch is None:
        for sha256, _ in file.pieces:
            yield _piece(sha256, old, pieces)
        return
    with (old.bundle / file.path).open("rb") as f:
        for sha256, _ in patch.blocks:
            block = np.frombuffer(_piece(sha256, old, pieces), np.uint8)
            was = np.frombuffer(f.read(len(block)), np.uint8)
            if len(was) != len(block):
                raise ReleaseError("the old file is damaged", path=old.bundle / file.path)
            yield (was + block).tobytes()


def _is_whole(home: Path, found: State, identity: signing.Identity) -> bool:
    """Tell whether every file of the version in use is what was signed."""
    folder = home / "versions" / found.current.folder
    try:
        signed = signing.signed_digests(folder / SIGNATURE, identity)
        data = (folder / MANIFEST).read_bytes()
        if signed.get(MANIFEST) != hashlib.sha256(data).hexdigest():
            return False
        listed = parse(data, folder / MANIFEST).variant(found.current.variant).chunks
    except (OSError, HandheldError):
        return False
    old = _Old(home, found)
    if old.chunks_bytes is None or hashlib.sha256(old.chunks_bytes).hexdigest() != listed.sha256:
        return False
    return all(old.is_intact(path) for path in old.files)


def _installed_name(home: Path, found: State | None) -> str | None:
    """Return the name of the release in use, for want of one in ``seen.json``."""
    if found is None:
        return None
    path = home / "versions" / found.current.folder / MANIFEST
    try:
        return parse(path.read_bytes(), path).name
    except (OSError, HandheldError):
        return None


def _sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _check_space(home: Path, need: int, told: int | None) -> None:
    free = shutil.disk_usage(home).free
    free = free if told is None else min(free, told)
    if need > free:
        raise _SpaceError(
            f"the update needs {need} bytes, {free} are free", path=home, remedy="free some space"
        )


@contextlib.contextmanager
def _alone(home: Path) -> Iterator[None]:
    with output_errors(home):
        home.mkdir(parents=True, exist_ok=True)
    with locked(home) as mine:
        if not mine:
            raise ReleaseError(
                "another update is under way", path=home, remedy="wait for it to end"
            )
        yield


def _must(home: Path) -> State:
    found = state(home)
    if found is None:
        raise ReleaseError("nothing is installed", path=home, remedy="update first")
    return found


def _read(path: Path, model: type[T]) -> T | None:
    try:
        return model.model_validate_json(path.read_bytes()[:65536])
    except FileNotFoundError:
        return None
    except ValidationError:
        raise ReleaseError("is damaged", path=path, remedy="remove the folder and update") from None


def _write(path: Path, value: Model) -> None:
    write_file(path, (value.model_dump_json() + "\n").encode())


def _sweep(home: Path, after: State) -> None:
    """Remove versions that nobody needs any more."""
    keep = {after.current.folder} | ({after.previous.folder} if after.previous else set())
    versions = home / "versions"
    for folder in versions.iterdir() if versions.is_dir() else ():
        if folder.name not in keep:
            shutil.rmtree(folder, ignore_errors=True)


def _clean(home: Path, after: State) -> None:
    """Remove all that belongs to no version that counts."""
    _sweep(home, after)
    shutil.rmtree(home / "pieces", ignore_errors=True)
