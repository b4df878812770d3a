"""Gates on numerics: the least signal-to-noise ratio that passes."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from handheld.errors import UsageError
from handheld.manifest import Manifest, Verification

_NARROWEST_FIRST = ("int2", "int4", "palette", "int8", "fp16", "fp32")
_Side = Literal["checkpoint", "student"]
_SIDES: Mapping[str, _Side] = {"checkpoint": "checkpoint", "student": "student"}
_BY_PRECISION = {"int4g32": "int4", "16a8w": "int8", "16a4w": "int4", "16a2w": "int2"}


@dataclass(frozen=True)
class Gate:
    """What an artifact and a whole bundle have to reach.

    Parameters
    ----------
    level : str
        Table of the file: the narrowest grid that holds weights.
    against : {'checkpoint', 'student'}
        What is compared with.
    artifact_db, end_to_end_db : float
        Least SNR.
    text : (float, float)
        Least and greatest strength of text.
    """

    level: str
    against: _Side
    artifact_db: float
    end_to_end_db: float
    text: tuple[float, float]

    def figure(self, measured: Verification) -> float | None:
        """Return the SNR that this gate is for, in dB.

        A student that was not run is stood in for by the checkpoint, which is the harder gate.
        """
        if self.against == "student" and measured.student_snr_db is not None:
            return measured.student_snr_db
        return measured.snr_db


def level(weights: Mapping[str, int], precision: str) -> str:
    """Return the narrowest grid among those that hold weights and that of the precision.

    Parameters
    ----------
    weights : mapping of storage to number of weights
        As in :class:`~handheld.manifest.Artifact`.
    precision : str
    """
    here = {name for name, count in weights.items() if count}
    here.add(_BY_PRECISION.get(precision, precision))
    return next((name for name in _NARROWEST_FIRST if name in here), precision)


def gate(weights: Mapping[str, int], precision: str, target: str, path: Path | None = None) -> Gate:
    """Return the gate for weights that are held in some way.

    Parameters
    ----------
    weights : mapping of storage to number of weights
    precision, target : str
    path : Path, optional
        A TOML file; by default ``numerics_gates.toml`` of the package.

    Raises
    ------
    UsageError
        If the file is not readable or lacks the table.
    """
    source = path or Path(str(files("handheld") / "numerics_gates.toml"))
    name = level(weights, precision)
    try:
        tables = tomllib.loads(source.read_text(encoding="utf-8"))
        table: dict[str, Any] = {"against": "checkpoint", **tables[name]}
        table |= table.get(target, {})
        text = {"least": 0.8, "most": 1.25, **tables.get("text", {})}
        return Gate(
            name,
            _SIDES[table["against"]],
            float(table["artifact_db"]),
            float(table["end_to_end_db"]),
            (float(text["least"]), float(text["most"])),
        )
    except OSError as e:
        raise UsageError(f"cannot be read: {e.strerror}", path=source) from None
    except (tomllib.TOMLDecodeError, KeyError, TypeError, ValueError) as e:
        raise UsageError(
            f"has no usable gates: {e}",
            path=source,
            field=name,
            remedy="give artifact_db and end_to_end_db",
        ) from None


def weights_of(manifest: Manifest) -> dict[str, int]:
    """Return the number of weights of a whole bundle by storage; those of one size, if several."""
    counts: dict[str, int] = {}
    for artifact in manifest.called(manifest.default_size):
        for name, count in artifact.weights.items():
            counts[name] = counts.get(name, 0) + count
    return counts
