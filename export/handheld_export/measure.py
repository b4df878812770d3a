"""Distances between results."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

CAP_DB = 999.0


def snr_db(reference: NDArray[Any], value: NDArray[Any]) -> float:
    """Signal-to-noise ratio, ``10 log10(sum(ref**2) / sum((ref - value)**2))``.

    Returns
    -------
    float
        In dB; 999 where the arrays are equal, -999 where ``value`` is not finite.
    """
    a, b = reference.astype(np.float64), value.astype(np.float64)
    if not np.isfinite(b).all():
        return -CAP_DB
    noise = float(np.sum((a - b) ** 2))
    signal = float(np.sum(a**2))
    if noise == 0:
        return CAP_DB
    return -CAP_DB if signal == 0 else min(CAP_DB, 10 * float(np.log10(signal / noise)))


def psnr_db(reference: NDArray[np.uint8], value: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio of pictures, peak 255, in dB (999 where equal)."""
    error = float(np.mean((reference.astype(np.float64) - value.astype(np.float64)) ** 2))
    return CAP_DB if error == 0 else min(CAP_DB, 10 * float(np.log10(255.0**2 / error)))


def max_abs_error(reference: NDArray[Any], value: NDArray[Any]) -> float:
    """Largest absolute difference."""
    return float(np.max(np.abs(reference.astype(np.float64) - value.astype(np.float64))))


def strength(
    reference: tuple[NDArray[Any], NDArray[Any]], value: tuple[NDArray[Any], NDArray[Any]]
) -> float | None:
    """How strongly a change of the input changes the result, 1 being as strongly as it should.

    Parameters
    ----------
    reference, value : (array, array)
        Results before and after the change.

    Returns
    -------
    float or None
        The part of the reference's change that is found in the values, so that noise does not
        count; None if there is no change to be found, or a value is not finite.
    """
    (a, b), (c, d) = ([x.astype(np.float64) for x in pair] for pair in (reference, value))
    wanted = b - a
    power = float(np.sum(wanted**2))
    if power == 0 or not (np.isfinite(c).all() and np.isfinite(d).all()):
        return None
    found = d - c
    return float(np.sum(wanted * found)) / power
