"""Files written so that a reader sees all of them or nothing, and the places they go to."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from handheld.errors import OutputError

_REMEDIES = {
    errno.ENOSPC: ("the disk is full", "free some space"),
    errno.EDQUOT: ("the disk quota is used up", "free some space"),
    errno.EROFS: ("the file system is read-only", "choose another place"),
    errno.EACCES: ("permission denied", "choose another place or change its permissions"),
    errno.EPERM: ("permission denied", "choose another place or change its permissions"),
    errno.ENOTDIR: ("part of the path is a file, not a folder", "choose another place"),
    errno.EEXIST: ("a file is in the way of a folder", "choose another place"),
    errno.EISDIR: ("it is a folder, not a file", "name a file"),
    errno.ENOENT: ("no such file or folder", "check the path"),
    errno.ENAMETOOLONG: ("the name is too long", "choose a shorter one"),
}


def describe_os_error(error: OSError) -> tuple[str, str | None]:
    """Return what an :class:`OSError` means and what to do about it."""
    known = _REMEDIES.get(error.errno or 0)
    return known if known else (error.strerror or str(error), None)


@contextmanager
def output_errors(path: str | Path) -> Iterator[None]:
    """Turn an :class:`OSError` while writing ``path`` into an :class:`OutputError`."""
    try:
        yield
    except OSError as error:
        message, remedy = describe_os_error(error)
        # Copying names its source, and a temporary name helps nobody.
        named = Path(error.filename) if isinstance(error.filename, str) else Path(path)
        where = named if named.is_relative_to(path) else path
        raise OutputError(f"cannot write: {message}", path=where, remedy=remedy) from error


def cache_root() -> Path:
    """Return the folder for what handheld can make again."""
    base = os.environ.get("XDG_CACHE_HOME")
    root = Path(base) if base else Path.home() / ".cache"
    return root / "handheld"


def sha256_file(path: Path) -> str:
    """Return the sha256 of a file as lower-case hexadecimal digits."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def fsync_folder(path: Path) -> None:
    """Make renames inside a folder durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_file(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` atomically and durably.

    Raises
    ------
    OutputError
        If the place cannot be written.
    """
    with output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        fd, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        temporary = Path(name)
        try:
            with os.fdopen(fd, "wb") as f:
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
            temporary.chmod(0o666 & ~umask())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        fsync_folder(path.parent)


def umask() -> int:
    """Return the process's file mode creation mask."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


_MARK, _RANDOM, _ASIDE = ".handheld-", "????????", ".old"


@contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[bool]:
    """Hold a folder's lock, which ends with the process.

    Gives False if another process holds it, or waits until none does.
    """
    fd = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(fd)


def replace_between(path: Path, begin: str, end: str, text: str) -> None:
    """Write the text between two marks of a file again, and leave the rest.

    Raises
    ------
    OutputError
        If the file lacks the marks.
    """
    whole = path.read_text(encoding="utf-8")
    before, first, rest = whole.partition(begin)
    _, last, after = rest.partition(end)
    if not first or not last:
        raise OutputError(
            f"lacks the marks {begin} and {end}", path=path, remedy="put them where the text goes"
        )
    write_file(path, f"{before}{begin}\n{text.strip()}\n{end}{after}".encode())


def _new_temporary(path: Path, held: contextlib.ExitStack) -> Path:
    """Make a folder beside ``path`` and hold its lock."""
    while True:
        folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}{_MARK}"))
        # Another process may take a folder for a leftover before it is locked.
        with contextlib.suppress(FileNotFoundError):
            if held.enter_context(locked(folder)) and folder.exists():
                return folder


def _clear_leftovers(path: Path) -> None:
    """Remove the temporary folders of :func:`replaced_folder` whose processes are gone."""
    name = f".{glob.escape(path.name)}{_MARK}{_RANDOM}"
    for temporary in path.parent.glob(name):
        with contextlib.suppress(OSError), locked(temporary) as gone:
            old = temporary.with_name(f"{temporary.name}{_ASIDE}")
            if gone and old.exists() and not path.exists():
                old.rename(path)
            if gone:
                shutil.rmtree(temporary, ignore_errors=True)
                shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        for old in path.parent.glob(f"{name}{_ASIDE}"):
            if not old.with_suffix("").exists():
                shutil.rmtree(old, ignore_errors=True)


@contextmanager
def replaced_folder(path: Path) -> Iterator[Path]:
    """Give an empty folder that takes the place of ``path`` once the block has ended well.

    A folder that is at ``path`` already is moved aside first and removed last. Whether it
    may be replaced is the caller's to check. What a killed process left beside ``path`` is
    removed, and put back if it is the folder that was to be replaced.
    """
    with output_errors(path), contextlib.ExitStack() as held:
        path.parent.mkdir(parents=True, exist_ok=True)
        _clear_leftovers(path)
        temporary = _new_temporary(path, held)
        old = temporary.with_name(f"{temporary.name}{_ASIDE}")
        try:
            temporary.chmod(0o777 & ~umask())
            yield temporary
            for folder in [*(p for p in temporary.rglob("*") if p.is_dir()), temporary]:
                fsync_folder(folder)
            if path.exists():
                path.rename(old)
            temporary.rename(path)
            fsync_folder(path.parent)
        finally:
            if old.exists() and not path.exists():
                old.rename(path)
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)


def weights_cache(bundle_sha256: str, threads: int) -> Path:
    """Return the folder for a bundle's packed weights."""
    return cache_root() / "weights" / bundle_sha256[:16] / f"threads{threads}"
