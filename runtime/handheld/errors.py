"""Errors whose text is shown to the user.

Every error that a user can cause derives from :class:`HandheldError`, one class per
meaning. The command line prints the text and exits with :attr:`HandheldError.exit_code`.
"""

from __future__ import annotations

import traceback
from pathlib import Path


def unexpected(error: BaseException) -> str:
    """Return a line about an exception that is not one of these."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" in {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return f"unexpected {type(error).__name__}{where}: {error} (report it)"


class HandheldError(Exception):
    """Base of all errors with a message meant for users.

    Parameters
    ----------
    message : str
        What is wrong.
    path : path-like, optional
        The file or folder concerned.
    field : str, optional
        The field inside it, as a path such as ``artifacts[2].sha256``.
    remedy : str, optional
        What the user can do about it.
    """

    exit_code = 2
    code = "error"

    def __init__(
        self,
        message: str,
        *,
        path: str | Path | None = None,
        field: str | None = None,
        remedy: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.path = None if path is None else str(path)
        self.field = field
        self.remedy = remedy

    def __str__(self) -> str:
        where = ": ".join(p for p in (self.path, self.field) if p)
        text = f"{where}: {self.message}" if where else self.message
        return f"{text} ({self.remedy})" if self.remedy else text

    def as_dict(self) -> dict[str, str | None]:
        """Return the error as the JSON object that ``--json`` prints."""
        return {
            "code": self.code,
            "message": self.message,
            "path": self.path,
            "field": self.field,
            "remedy": self.remedy,
        }


class UsageError(HandheldError):
    """The command line or an argument is wrong."""

    code = "usage"


class CheckpointError(HandheldError):
    """A checkpoint or student cannot be read or is not supported."""

    code = "checkpoint"


class BundleError(HandheldError):
    """A bundle is malformed, incomplete or does not match its hashes."""

    code = "bundle"


class TargetError(HandheldError):
    """A target is unknown, lacks its tools or cannot lower a segment."""

    code = "target"


class HarnessError(HandheldError):
    """The native harness is missing, cannot run a job or reported an error."""

    code = "harness"


class OutputError(HandheldError):
    """Output cannot be written (read-only, disk full, exists already)."""

    code = "output"


class MissingDependencyError(HandheldError):
    """An optional part of the product is not installed."""

    code = "missing-dependency"


class GateError(HandheldError):
    """A verification or benchmark gate failed."""

    exit_code = 1
    code = "gate"


class RecordError(HandheldError):
    """A file of run records cannot be read."""

    code = "record"


class DeviceError(HandheldError):
    """A device is unknown, gone or cannot do what was asked."""

    code = "device"


class DeviceBusyError(DeviceError):
    """Somebody else is using a device."""


class TextServerError(HandheldError):
    """A text server cannot be reached in time, refuses, or answers wrongly."""

    code = "text-server"


class ReleaseError(HandheldError):
    """A release is malformed, incomplete or cannot be made."""

    code = "release"


class TrustError(HandheldError):
    """A release is not what its signature says, or too old to be used."""

    exit_code = 1
    code = "trust"
