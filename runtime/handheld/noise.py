"""Gaussian noise that every language draws to the bit.

Uniform words come from Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random
numbers: as easy as 1, 2, 3", SC 2011). Element ``i`` of stream ``s`` under ``seed`` is word
``i % 4`` of the block with

- counter ``(b & 0xffffffff, b >> 32, s, 0)`` where ``b = i // 4``,
- key ``(seed & 0xffffffff, seed >> 32)``.

A word ``w`` becomes ``u = (w + 0.5) / 2**32`` and then ``z = q(u)`` with Wichura's inverse
normal distribution (algorithm AS 241, PPND16, Applied Statistics 37, 1988), evaluated in
IEEE binary64 with Horner's rule, no fused multiply-add, and rounded to binary32 at the
end. Where AS 241 takes a logarithm, :func:`_log` is used: it needs only the four basic
operations, so that no platform's libm enters. Elements follow the row-major order of the
program's tensor (``[N, H, W, C]``).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)

_A = (3.3871328727963666080e0, 1.3314166789178437745e2, 1.9715909503065514427e3,
      1.3731693765509461125e4, 4.5921953931549871457e4, 6.7265770927008700853e4,
      3.3430575583588128105e4, 2.5090809287301226727e3)  # fmt: skip
_B = (1.0, 4.2313330701600911252e1, 6.8718700749205790830e2, 5.3941960214247511077e3,
      2.1213794301586595867e4, 3.9307895800092710610e4, 2.8729085735721942674e4,
      5.2264952788528545610e3)  # fmt: skip
_C = (1.42343711074968357734e0, 4.63033784615654529590e0, 5.76949722146069140550e0,
      3.64784832476320460504e0, 1.27045825245236838258e0, 2.41780725177450611770e-1,
      2.27238449892691845833e-2, 7.74545014278341407640e-4)  # fmt: skip
_D = (1.0, 2.05319162663775882187e0, 1.67638483018380384940e0, 6.89767334985100004550e-1,
      1.48103976427480074590e-1, 1.51986665636164571966e-2, 5.47593808499534494600e-4,
      1.05075007164441684324e-9)  # fmt: skip
_E = (6.65790464350110377720e0, 5.46378491116411436990e0, 1.78482653991729133580e0,
      2.96560571828504891230e-1, 2.65321895265761230930e-2, 1.24266094738807843860e-3,
      2.71155556874348757815e-5, 2.01033439929228813265e-7)  # fmt: skip
_F = (1.0, 5.99832206555887937690e-1, 1.36929880922735805310e-1,
      1.48753612908506148525e-2, 7.86869131145613259100e-4, 1.84631831751005468180e-5,
      1.42151175831644588870e-7, 2.04426310338993978564e-15)  # fmt: skip
_LN2 = 0.6931471805599453


def _words(seed: int, stream: int, blocks: NDArray[np.uint64]) -> NDArray[np.uint64]:
    c0, c1 = blocks & _LOW, blocks >> _SHIFT
    c2 = np.full_like(blocks, stream)
    c3 = np.zeros_like(blocks)
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        p0, p1 = _M0 * c0, _M1 * c2
        c0, c1, c2, c3 = (
            (p1 >> _SHIFT) ^ c1 ^ np.uint64(k0),
            p1 & _LOW,
            (p0 >> _SHIFT) ^ c3 ^ np.uint64(k1),
            p0 & _LOW,
        )
        k0, k1 = (k0 + _W0) & 0xFFFFFFFF, (k1 + _W1) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=-1).reshape(-1)


def _horner(coefficients: tuple[float, ...], r: NDArray[np.float64]) -> NDArray[np.float64]:
    value = np.full_like(r, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        value = value * r + c
    return value


def _log(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Natural logarithm of positive normal numbers.

    ``x = m * 2**e`` with ``m`` in [0.5, 1), ``t = (m - 1) / (m + 1)``,
    ``log x = 2 * (t + t**3/3 + ... + t**41/41) + e * LN2``, the series by Horner's rule in
    ``t*t``.
    """
    m, e = np.frexp(x)
    t = (m - 1.0) / (m + 1.0)
    s = t * t
    series = np.full_like(x, 1.0 / 41.0)
    for k in range(39, 0, -2):
        series = series * s + 1.0 / k
    return (2.0 * t) * series + e.astype(np.float64) * _LN2


def _quantile(u: NDArray[np.float64]) -> NDArray[np.float64]:
    q = u - 0.5
    central = np.abs(q) <= 0.425
    r = 0.180625 - q * q
    z = q * _horner(_A, r) / _horner(_B, r)
    r = np.sqrt(-_log(np.where(q < 0.0, u, 1.0 - u)))
    middle = r <= 5.0
    near, far = r - 1.6, r - 5.0
    tail = np.where(
        middle, _horner(_C, near) / _horner(_D, near), _horner(_E, far) / _horner(_F, far)
    )
    return np.where(central, z, np.where(q < 0.0, -tail, tail))


def normal(seed: int, shape: tuple[int, ...], stream: int = 0) -> NDArray[np.float32]:
    """Draw standard normal noise.

    Parameters
    ----------
    seed : int
        0 <= seed < 2**64.
    shape : tuple of int
        Shape of the result.
    stream : int
        0 <= stream < 2**32; independent noise for one seed.

    Returns
    -------
    ndarray of float32

    Raises
    ------
    ValueError
        If seed or stream is out of range.
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed {seed} is not in 0 .. 2**64 - 1")
    if not 0 <= stream < 2**32:
        raise ValueError(f"stream {stream} is not in 0 .. 2**32 - 1")
    count = int(np.prod(shape, dtype=np.int64))
    blocks: NDArray[Any] = np.arange((count + 3) // 4, dtype=np.uint64)
    words = _words(seed, stream, blocks)[:count]
    u = (words.astype(np.float64) + 0.5) * 2.0**-32
    return _quantile(u).astype(np.float32).reshape(shape)
