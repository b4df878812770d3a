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
