"""Find the first segment of a program whose results are wrong on a device."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from handheld import harness
from handheld.bundle import Bundle, load_tensors
from handheld.devices import process
from handheld.errors import HandheldError, HarnessError
from handheld.program import Call
from handheld.protocol import Job

WRONG_SNR_DB: Final = 20.0
"""Results that are further away than this were not rounded, they are wrong."""
ACCUMULATED_DB: Final = 15.0
"""Nor are those that are no further from torch than this below what the export measured of the
coarsest segment so far: in a whole run the roundings of all of them add up."""
CAP_DB: Final = 999.0

Array = NDArray[Any]


@dataclass(frozen=True)
class Wrong:
    """The first call whose results are wrong."""

    call: int
    artifact: str
    snr_db: float
    against: str
    """What the results were compared with."""

    def __str__(self) -> str:
        return (
            f"the first segment that went wrong is '{self.artifact}' "
            f"(call {self.call}, {self.snr_db:.1f} dB against {self.against})"
        )


def calls(bundle: Bundle, size: str) -> list[Call]:
    """Return the calls of a size's program, in order."""
    return [op for op in bundle.manifest.sizes[size].program.ops if isinstance(op, Call)]


def snr_db(wanted: Array, have: Array) -> float:
    """Return ``10 log10(sum(wanted**2) / sum((wanted - have)**2))``, capped at 999 dB."""
    ours, theirs = have.astype(np.float64).ravel(), wanted.astype(np.float64).ravel()
    if ours.shape != theirs.shape or not np.isfinite(ours).all():
        return -CAP_DB
    noise, signal = float(((ours - theirs) ** 2).sum()), float((theirs**2).sum())
    if noise == 0.0:
        return CAP_DB
    return float(np.clip(10 * np.log10(signal / noise), -CAP_DB, CAP_DB)) if signal else -CAP_DB


def first_wrong(
    bundle: Bundle,
    size: str,
    wanted: Mapping[str, Array],
    have: Mapping[str, Array],
    against: str,
    measured: Mapping[str, float] | None = None,
) -> Wrong | None:
    """Compare the results of all calls; both map ``call.INDEX.PORT`` to an array.

    ``measured`` says of artifacts how many dB they are from ``wanted`` when they are right.

    Returns
    -------
    The first call that is wrong; if none is for certain, and some differ at all, the one that
    is furthest below what is right, since the picture is wrong for some reason.
    """
    worst: tuple[float, Wrong] | None = None
    right = CAP_DB
    for index, call in enumerate(calls(bundle, size)):
        keys = [f"call.{index}.{port}" for port in call.results]
        if any(k not in wanted or k not in have for k in keys):
            continue
        found = Wrong(index, call.artifact, min(snr_db(wanted[k], have[k]) for k in keys), against)
        # What a coarse segment lost, those after it cannot have.
        right = min(right, (measured or {}).get(call.artifact, CAP_DB))
        if found.snr_db < min(WRONG_SNR_DB, right - ACCUMULATED_DB):
            return found
        if worst is None or right - found.snr_db > worst[0]:
            worst = (right - found.snr_db, found)
    return worst[1] if worst is not None and worst[1].snr_db < CAP_DB else None


def find(bundle: Bundle, job: Job, run: Callable[[Job], None]) -> Wrong | None:
    """Run a program once more on a device, with all results, and say where it goes wrong.

    Parameters
    ----------
    bundle : Bundle
    job : Job
        What gave the wrong picture.
    run : callable
        Runs a job on the device.

    Returns
    -------
    None if there is nothing to compare with: the bundle's reference holds no results, and
    this machine cannot run it.
    """
    with tempfile.TemporaryDirectory(prefix="handheld-") as folder:
        path = Path(folder) / "calls.safetensors"
        once = {"iterations": 1, "warmup": 0, "min_seconds": 0.0, "precision": None,
                "output": None, "expect": None, "cache": None}  # fmt: skip
        run(job.model_copy(update={**once, "dump_calls": str(path)}))
        if not path.is_file():
            raise HarnessError("the harness wrote no results of its calls")
        have = load_tensors(path)
        wanted, against = bundle.reference(job.size), "the bundle's reference"
        measured: dict[str, float] | None = {
            a.id: a.verification.snr_db
            for a in bundle.manifest.artifacts
            if a.verification.snr_db is not None
        }
        keys = {f"call.{i}.{p}" for i, c in enumerate(calls(bundle, job.size)) for p in c.results}
        if not keys <= set(wanted):
            here = Path(folder) / "here.safetensors"
            found = _run_here(
                job.model_copy(update={**once, "dump_calls": str(here)}), Path(folder)
            )
            if not found:
                return None
            wanted, against, measured = load_tensors(here), "this machine", None
        return first_wrong(bundle, job.size, wanted, have, against, measured)


def _run_here(job: Job, folder: Path) -> bool:
    """Run a job on this machine, if its harness can."""
    try:
        found = harness.find()
        if found is None:
            return False
        path = folder / "job.json"
        path.write_text(job.model_dump_json())
        for _ in process.run([str(found.program), str(path)], timeout_s=3600):
            pass
    except HandheldError:
        return False
    return True
