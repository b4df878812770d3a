"""Running the programs that reach phones: no shell, no terminal, bounded in time."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from handheld.errors import DeviceError

MAX_OUTPUT_BYTES = 16 * 2**20


class TooLongError(DeviceError):
    """A program did not end in time."""

    said = ""
    """What it had printed to standard error by then."""


@dataclass(frozen=True)
class Ended:
    """How a program ended, and what it said."""

    code: int
    out: str
    err: str


def call(
    name: str,
    command: Sequence[str],
    timeout_s: float,
    *,
    field: str | None = None,
    remedy: str = "plug the phone in again",
) -> Ended:
    """Run a program to its end.

    Parameters
    ----------
    name : str
        For messages.
    command : sequence of str
        The program's path, then its arguments.
    timeout_s : float
        Then it is killed. What it started goes on, as adb's server must.
    field, remedy : str
        Of the error if it takes too long.

    Raises
    ------
    DeviceError
        If it cannot be started; a :class:`TooLongError` if it takes too long.
    """
    try:
        done = subprocess.run(
            list(command),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout_s,
            check=False,
            start_new_session=True,
        )
    except subprocess.TimeoutExpired as expired:
        error = TooLongError(
            f"{name} did not answer within {timeout_s:.0f} s", field=field, remedy=remedy
        )
        error.said = (expired.stderr or b"")[:MAX_OUTPUT_BYTES].decode(errors="replace")
        raise error from None
    except OSError as error:
        raise DeviceError(f"cannot be started: {error.strerror}", path=command[0]) from None
    out, err = (
        data[:MAX_OUTPUT_BYTES].decode(errors="replace") for data in (done.stdout, done.stderr)
    )
    return Ended(done.returncode, out, err)
