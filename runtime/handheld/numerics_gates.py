"""Gates on numerics: the least signal-to-noise ratio that passes."""

from __future__ import annotations

import tomllib
from importlib.resources import files
from pathlib import Path

from handheld.errors import UsageError


def gates(precision: str, path: Path | None = None) -> tuple[float, float]:
    """Return the least SNR per artifact and end to end, in dB.

    Parameters
    ----------
    precision : str
    path : Path, optional
        A TOML file with a table per precision; by default ``numerics_gates.toml`` of the package.

    Raises
    ------
    UsageError
        If the file is not readable or lacks the precision.
    """
    source = path or Path(str(files("handheld") / "numerics_gates.toml"))
    try:
        table = tomllib.loads(source.read_text(encoding="utf-8"))[precision]
        return float(table["artifact_db"]), float(table["end_to_end_db"])
    except OSError as e:
        raise UsageError(f"cannot be read: {e.strerror}", path=source) from None
    except (tomllib.TOMLDecodeError, KeyError, TypeError, ValueError) as e:
        raise UsageError(
            f"has no usable gates: {e}",
            path=source,
            field=precision,
            remedy="give artifact_db and end_to_end_db",
        ) from None
