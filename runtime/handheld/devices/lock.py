"""A device is used by one handheld of this machine at a time."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager

from handheld.errors import DeviceBusyError
from handheld.files import cache_root, output_errors


@contextmanager
def held(device: str, serial: str | None) -> Iterator[None]:
    """Keep other processes of this machine from cleaning up what is in use.

    Parameters
    ----------
    device : str
        Its id.
    serial : str or None
        For the error.

    Raises
    ------
    DeviceBusyError
        If another process holds it.
    """
    path = cache_root() / "devices" / f"{device}.lock"
    with output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.open("a")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DeviceBusyError(
                "another handheld is using this phone", field=serial, remedy="wait for it to end"
            ) from None
        yield
