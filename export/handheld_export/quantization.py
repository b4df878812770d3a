"""Quantization as data: explicit codes, scales and codebooks per layer.

A weight of shape ``[out, in]`` (linear) or ``[out, in, kh, kw]`` (convolution) is stored as
integer codes and

- ``channel``: one float32 scale per output channel, ``w = code * scale``;
- ``group``: one scale per output channel and group of ``group_size`` neighbouring inputs;
- ``palette``: ``w = codebook[code]`` with one codebook per output channel group.

All integer grids are symmetric about zero point 0: int8 uses -127..127, int4 -7..7 (group
and channel), int2 -2..1. Codes are held as int8 whatever their width.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

Grid = Literal["int8", "int4", "int2", "palette"]
LIMITS: dict[str, tuple[int, int]] = {"int8": (-127, 127), "int4": (-7, 7), "int2": (-2, 1)}
BITS: dict[str, int] = {"int8": 8, "int4": 4, "int2": 2}
ROOM: Final = 2.0
"""Calibrated 16-bit grids reach this many times as far as what calibration has seen.

That takes one of their bits. A normalisation's factor beyond its grid is cut, and its whole token
or picture comes out smaller; a bit less is hardly seen.
"""


def pack(codes: NDArray[np.int8], bits: int) -> NDArray[np.uint8]:
    """Put several codes into a byte, the first one into its lowest bits.

    Parameters
    ----------
    codes : int8 ndarray, ``[out, ...]``
    bits : {2, 4}
        Of a code, in two's complement.

    Returns
    -------
    uint8 ndarray, ``[out, ceil(inputs * bits / 8)]``
        Each output channel begins a new byte.
    """
    per = 8 // bits
    rows = codes.reshape(codes.shape[0], -1).astype(np.uint8) & ((1 << bits) - 1)
    rows = np.pad(rows, ((0, 0), (0, -rows.shape[1] % per)))
    shifted = rows.reshape(len(rows), -1, per) << (np.arange(per, dtype=np.uint8) * bits)
    packed: NDArray[np.uint8] = np.bitwise_or.reduce(shifted, axis=2).astype(np.uint8)
    return packed


def unpack(packed: NDArray[np.generic], bits: int, shape: tuple[int, ...]) -> NDArray[np.int8]:
    """Read what :func:`pack` wrote, int8 of the given shape.

    Raises
    ------
    ValueError
        If the bytes do not hold that shape.
    """
    inputs = math.prod(shape[1:])
    wanted = (shape[0], -(-inputs * bits // 8))
    if packed.dtype != np.uint8 or packed.shape != wanted:
        raise ValueError(f"packed codes are not uint8 of shape {wanted}")
    shifts = np.arange(8 // bits, dtype=np.uint8) * bits
    spread = (packed.astype(np.uint8)[..., None] >> shifts) & ((1 << bits) - 1)
    codes = spread.reshape(shape[0], -1)[:, :inputs].astype(np.int8)
    half = 1 << (bits - 1)
    return ((codes ^ half) - half).reshape(shape)


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """Codes and scales of one weight.

    Parameters
    ----------
    grid : {'int8', 'int4', 'int2', 'palette'}
    codes : int8 ndarray, the weight's shape (``[out, in]`` or ``[out, in, kh, kw]``)
    scales : float32 ndarray, ``[out]`` per channel or ``[out, in / group_size]`` per group
    group_size : int or None
        Inputs per scale; None for one scale per output channel.
    codebook : float32 ndarray or None
        ``[entries]``; only for ``palette``, whose scales are all one.
    """

    grid: Grid
    codes: NDArray[np.int8]
    scales: NDArray[np.float32]
    group_size: int | None = None
    codebook: NDArray[np.float32] | None = None

    @classmethod
    def checked(
        cls,
        grid: str,
        codes: NDArray[np.generic],
        scales: NDArray[np.generic],
        group_size: int | None = None,
        codebook: NDArray[np.generic] | None = None,
    ) -> QuantizedWeight:
        """Build from data that nobody has checked yet.

        Raises
        ------
        ValueError
            If grid, shapes, dtypes or ranges do not fit together.
        """
        if grid not in (*LIMITS, "palette"):
            raise ValueError(f"grid '{grid}' is unknown; known: {', '.join(LIMITS)}, palette")
        if codes.dtype != np.int8 or codes.ndim not in (2, 4):
            raise ValueError("codes are not int8 of 2 or 4 dimensions")
        if scales.dtype != np.float32 or not bool(np.all((scales > 0) & (scales < np.inf))):  # type: ignore[operator]
            raise ValueError("scales are not finite, positive float32")
        if group_size is None:
            wanted: tuple[int, ...] = (codes.shape[0],)
        elif codes.ndim != 2 or group_size < 1 or codes.shape[1] % group_size:
            raise ValueError(f"group size {group_size} does not divide the inputs")
        else:
            wanted = (codes.shape[0], codes.shape[1] // group_size)
        if scales.shape != wanted:
            raise ValueError(f"scales have shape {scales.shape}, not {wanted}")
        if grid == "palette":
            if codebook is None or codebook.dtype != np.float32 or codebook.ndim != 1:
                raise ValueError("the palette has no float32 codebook of one dimension")
            if not np.isfinite(codebook).all():
                raise ValueError("the codebook has values that are not finite")
            low, high = 0, len(codebook) - 1
        else:
            low, high = LIMITS[grid]
        if codes.size and (codes.min() < low or codes.max() > high):
            raise ValueError(f"codes leave {low}..{high}")
        return cls(grid, codes, scales, group_size, codebook)  # type: ignore[arg-type]

    def dequantize(self) -> NDArray[np.float32]:
        """Return the float32 weight, in the codes' shape."""
        if self.codebook is not None:
            return self.codebook[self.codes].astype(np.float32)
        values = self.codes.astype(np.float32)
        if self.group_size is None:
            values *= self.scales.reshape(-1, *([1] * (values.ndim - 1)))
        else:
            values.reshape(*self.scales.shape, self.group_size)[...] *= self.scales[:, :, None]
        return values

    def rows(self, start: int, stop: int) -> QuantizedWeight:
        """Return the part that makes output channels ``start`` to ``stop``."""
        return QuantizedWeight(
            self.grid,
            self.codes[start:stop],
            self.scales[start:stop],
            self.group_size,
            self.codebook,
        )

    def stretched(self) -> QuantizedWeight:
        """Return the same values on the int8 grid, in codes as large as it takes.

        Codes of a channel are multiplied by a power of two and its scale is divided by it, so that
        no bit of a value changes. For kernels that drop the last bits of their sums.

        Raises
        ------
        ValueError
            If scales are per group, or codes stand for a palette.
        """
        if self.group_size is not None or self.codebook is not None:
            raise ValueError("only codes with one scale per channel can be stretched")
        rows = self.codes.reshape(len(self.codes), -1).astype(np.int16)
        peak = np.abs(rows).max(axis=1, initial=0)
        factor = np.exp2(np.floor(np.log2(LIMITS["int8"][1] // np.maximum(peak, 1))))
        factor = np.where(peak == 0, 1, factor).astype(np.float32)
        codes = (rows * factor[:, None]).astype(np.int8).reshape(self.codes.shape)
        return QuantizedWeight("int8", codes, self.scales / factor)

    def sha256(self) -> str:
        """Hash of grid, codes and scales."""
        h = hashlib.sha256(f"{self.grid}|{self.group_size}|{self.codes.shape}".encode())
        for array in (self.codes, self.scales, self.codebook):
            h.update(b"" if array is None else np.ascontiguousarray(array).tobytes())
        return h.hexdigest()


@dataclass(frozen=True)
class ActivationRange:
    """Range of one layer's input and output over the calibration set."""

    input_min: float
    input_max: float
    output_min: float
    output_max: float


def round_to_nearest(
    weight: NDArray[np.float32], grid: Grid, group_size: int | None = None
) -> QuantizedWeight:
    """Quantize a weight by rounding to the nearest code.

    Parameters
    ----------
    weight : float32 ndarray, ``[out, in]`` or ``[out, in, kh, kw]``
    grid : {'int8', 'int4', 'int2'}
    group_size : int, optional
        Only for ``[out, in]``; must divide ``in``.

    Returns
    -------
    QuantizedWeight
        The scale of a channel or group makes its largest magnitude the largest code; on
        the lopsided int2 grid -2..1 it is the scale of least squared error among 32
        candidates. Scales of groups are then rounded to bfloat16, the most that CPU kernels
        hold, and codes are chosen for the rounded scale.

    Raises
    ------
    ValueError
        If the group size does not divide the inputs or the weight is not finite.
    """
    if not np.isfinite(weight).all():
        raise ValueError("the weight has values that are not finite")
    out = weight.shape[0]
    flat: NDArray[np.float32] = weight.reshape(out, -1)
    if group_size is not None:
        if weight.ndim != 2 or flat.shape[1] % group_size:
            raise ValueError(f"group size {group_size} does not divide {flat.shape[1]} inputs")
        flat = flat.reshape(out, -1, group_size)
    low, high = LIMITS[grid]
    peak = np.abs(flat).max(axis=-1, keepdims=True)
    scale = _least_squares_scale(flat, peak, low, high) if grid == "int2" else peak / high
    scale = np.where(scale == 0, 1.0, scale).astype(np.float32)
    if group_size is not None:
        scale = _nearest_bfloat16(scale)
    codes = np.clip(np.rint(flat / scale), low, high).astype(np.int8)
    return QuantizedWeight(
        grid, codes.reshape(weight.shape), np.ascontiguousarray(scale[..., 0]), group_size
    )


def _nearest_bfloat16(value: NDArray[np.float32]) -> NDArray[np.float32]:
    """Round positive values to bfloat16, ties to even; it is float32's upper half."""
    bits = value.view(np.uint32)
    rounded = bits + 0x7FFF + (bits >> 16 & 1)
    return (rounded & np.uint32(0xFFFF0000)).view(np.float32)


def _least_squares_scale(
    flat: NDArray[np.float32], peak: NDArray[np.float32], low: int, high: int
) -> NDArray[np.floating[Any]]:
    best: NDArray[np.floating[Any]] = peak / 2
    least = np.full_like(peak, np.inf)
    for fraction in np.linspace(0.15, 1.0, 32, dtype=np.float32):
        scale = np.where(peak == 0, 1, peak) * fraction
        error = np.square(np.clip(np.rint(flat / scale), low, high) * scale - flat)
        error = error.sum(axis=-1, keepdims=True)
        best = np.where(error < least, scale, best)
        least = np.minimum(error, least)
    return best
