"""Folders as zip files: packing gives the same bytes again, unpacking trusts nothing."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from handheld.errors import HandheldError, OutputError
from handheld.files import describe_os_error, replaced_folder

MAX_ZIP_ENTRIES = 100_000
MAX_ZIP_RATIO = 100
MAX_ZIP_FREE_BYTES = 256 * 2**20
"""An archive may always unpack to this much, however well it is compressed."""
MAX_ZIP_DEPTH = 32
_MAX_READ = 32 * 2**20
"""More than the list of the most entries takes, and than is read of an entry at once."""
_MAX_MANIFEST = 64 * 2**20


@dataclass(frozen=True)
class Kind:
    """What an archive holds.

    Parameters
    ----------
    name : str
        As in "is not a bundle".
    manifest : str
        The file that must be at its root, JSON.
    keys : frozenset of str
        Of the manifest; they tell it from other files of its name.
    error : type
        What is raised.
    remedy : str
    """

    name: str
    manifest: str
    keys: frozenset[str]
    error: type[HandheldError]
    remedy: str


def walk(folder: Path) -> Iterator[Path]:
    """Yield files and symbolic links below ``folder``, in order."""
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.is_symlink():
            yield from walk(path)
        else:
            yield path


def pack(folder: Path, archive: Path) -> None:
    """Zip a folder so that equal files give equal archives."""
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as out:
        for path in walk(folder):
            if path == archive:
                continue
            info = zipfile.ZipInfo(path.relative_to(folder).as_posix())
            info.external_attr = (stat.S_IFREG | 0o644) << 16
            info.file_size = path.stat().st_size
            with path.open("rb") as source, out.open(info, "w") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)


def unpack(path: Path, folder: Path, kind: Kind) -> None:
    """Unpack a zip file into ``folder``, which appears whole or not at all.

    Raises
    ------
    HandheldError
        Of the kind's class: for a broken archive, too many entries or bytes, paths that leave
        it, links, encryption, names that differ in case only, and a missing manifest.
    OutputError
        If it does not fit on the disk.
    """

    def fail(message: str, name: str | None = None) -> HandheldError:
        return kind.error(message, path=path, field=name, remedy=kind.remedy)

    if not zipfile.is_zipfile(path):
        raise fail("is neither a folder nor a zip file")
    try:
        with _opened(path) as archive:
            entries = [e for e in archive.infolist() if not e.is_dir()]
            if len(entries) > MAX_ZIP_ENTRIES:
                raise fail(f"{len(entries)} entries are over the limit")
            prefix = _prefix(entries, kind, fail)
            total = sum(e.file_size for e in entries)
            if total > max(MAX_ZIP_FREE_BYTES, MAX_ZIP_RATIO * path.stat().st_size):
                raise fail(f"would unpack to {total} bytes, which looks like a zip bomb")
            with replaced_folder(folder) as temporary:
                free = shutil.disk_usage(temporary).free
                if total > free:
                    raise OutputError(
                        f"the {kind.name} needs {total} bytes, {free} are free",
                        path=folder.parent,
                        remedy="free some space or set XDG_CACHE_HOME",
                    )
                for entry in entries:
                    target = temporary / entry.filename.removeprefix(prefix)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with archive.open(entry) as source, target.open("xb") as sink:
                        shutil.copyfileobj(source, sink, 1 << 20)
    except (
        zipfile.BadZipFile,
        zipfile.LargeZipFile,
        zlib.error,
        EOFError,
        NotImplementedError,
        RuntimeError,
        ValueError,
        FileExistsError,
    ) as error:
        raise fail(f"broken zip file: {error}") from None
    except OSError as error:
        raise fail(f"broken zip file: {describe_os_error(error)[0]}") from None


class _Bounded(io.BufferedReader):
    """A file whose list of entries is not read if it is too long."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > _MAX_READ:
            raise zipfile.BadZipFile("its list of entries is over the limit")
        return super().read(size)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    with _Bounded(io.FileIO(path)) as file, zipfile.ZipFile(file) as archive:
        yield archive


def check_replaceable(path: Path, kind: Kind, zipped: bool = False) -> None:
    """Check that nothing but an older one of its kind would be overwritten.

    Raises
    ------
    OutputError
        If something else is at ``path``.
    """
    if not path.exists() and not path.is_symlink():
        return
    if zipped:
        replaceable = path.is_file() and _is(kind, _zipped_manifest(path, kind))
    elif path.is_dir() and not path.is_symlink():
        manifest = path / kind.manifest
        held = manifest.read_bytes() if manifest.is_file() else None
        replaceable = _is(kind, held) or not any(path.iterdir())
    else:
        replaceable = False
    if not replaceable:
        raise OutputError(
            f"something that is not a {kind.name} is there already",
            path=path,
            remedy="remove it or choose another place",
        )


def _zipped_manifest(path: Path, kind: Kind) -> bytes | None:
    """Return the manifest at an archive's root, or in the one folder that it holds."""
    broken = (zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, RuntimeError)
    with contextlib.suppress(*broken), _opened(path) as archive:
        names = archive.namelist()
        roots = {n.split("/")[0] for n in names}
        for name in (kind.manifest, *(f"{r}/{kind.manifest}" for r in roots if len(roots) == 1)):
            if name in names:
                with archive.open(name) as f:
                    return f.read(_MAX_MANIFEST)
    return None


def _is(kind: Kind, manifest: bytes | None) -> bool:
    if manifest is None:
        return False
    try:
        tree = json.loads(manifest)
    except (ValueError, RecursionError):
        return False
    return isinstance(tree, dict) and kind.keys <= tree.keys()


def _prefix(entries: list[zipfile.ZipInfo], kind: Kind, fail: Callable[..., HandheldError]) -> str:
    """Check the entries' names; return the folder in which all of them lie, if any."""
    seen: set[str] = set()
    for entry in entries:
        name = entry.filename
        parts = name.split("/")
        if "\\" in name or ":" in name or any(p in ("", ".", "..") for p in parts):
            raise fail("an entry's path leaves the archive", name)
        if not name.isprintable() or len(parts) > MAX_ZIP_DEPTH:
            raise fail("an entry's path is not one of files", name[:200])
        mode = stat.S_IFMT(entry.external_attr >> 16)
        if mode not in (0, stat.S_IFREG):
            raise fail("an entry is neither a file nor a folder", name)
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise fail("an entry is compressed in another way than zip files usually are", name)
        if entry.flag_bits & 0x1:
            raise fail("an entry is encrypted", name)
        if name.casefold() in seen:
            raise fail("an entry occurs twice", name)
        seen.add(name.casefold())
    names = [e.filename for e in entries]
    if kind.manifest in names:
        return ""
    roots = {n.split("/")[0] for n in names}
    if len(roots) == 1 and f"{(root := roots.pop())}/{kind.manifest}" in names:
        return f"{root}/"
    raise fail(f"is not a {kind.name}: it has no {kind.manifest}")
