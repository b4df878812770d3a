from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from handheld_export.quantization import (
    BITS,
    LIMITS,
    QuantizedWeight,
    pack,
    round_to_nearest,
    unpack,
)

floats = st.floats(-1e3, 1e3, width=32, allow_subnormal=False).filter(
    lambda v: v == 0 or abs(v) > 1e-3
)
linear = hnp.array_shapes(min_dims=2, max_dims=2, max_side=9)
convolution = st.tuples(st.integers(1, 5), st.integers(1, 4), st.just(3), st.just(3))
weights = (linear | convolution).flatmap(lambda s: hnp.arrays(np.float32, s, elements=floats))


signed = st.sampled_from(["int8", "int4", "int2"]).flatmap(
    lambda grid: st.tuples(
        st.just(grid),
        (linear | convolution).flatmap(
            lambda s: hnp.arrays(np.int8, s, elements=st.integers(*LIMITS[grid]))
        ),
    )
)


def per_channel(scales, weight):
    return scales.reshape(-1, *([1] * (weight.ndim - 1)))


@settings(max_examples=80, deadline=None)
@given(weight=weights, grid=st.sampled_from(["int8", "int4"]))
def test_error_is_at_most_half_a_step(weight, grid):
    q = round_to_nearest(weight, grid)
    low, high = LIMITS[grid]
    assert q.codes.dtype == np.int8
    assert q.codes.shape == weight.shape
    assert q.codes.min() >= low
    assert q.codes.max() <= high
    error = np.abs(q.dequantize().astype(np.float64) - weight)
    assert (error <= per_channel(q.scales, weight) * 0.5 * (1 + 1e-5)).all()
    # The largest magnitude of a channel takes the largest code.
    flat = weight.reshape(len(weight), -1)
    peaks = np.abs(q.codes.reshape(len(weight), -1)).max(1)
    assert (peaks[np.abs(flat).max(1) > 0] == high).all()
    QuantizedWeight.checked(q.grid, q.codes, q.scales)


@settings(max_examples=25, deadline=None)
@given(weight=hnp.arrays(np.float32, (4, 96), elements=floats))
def test_groups_of_32(weight):
    q = round_to_nearest(weight, "int4", 32)
    assert q.scales.shape == (4, 3)
    steps = np.repeat(q.scales, 32, axis=1)
    assert (np.abs(q.dequantize() - weight) <= steps * 0.5 * (1 + 1e-5)).all()
    for g in range(3):
        part = slice(32 * g, 32 * g + 32)
        alone = round_to_nearest(np.ascontiguousarray(weight[:, part]), "int4")
        assert np.allclose(alone.scales, q.scales[:, g], rtol=2**-8, atol=0)
    assert not (q.scales.view(np.uint32) & 0xFFFF).any(), "scales are not bfloat16"
    QuantizedWeight.checked(q.grid, q.codes, q.scales, 32)


@settings(max_examples=60, deadline=None)
@given(weight=weights)
def test_two_bits(weight):
    q = round_to_nearest(weight, "int2")
    assert set(np.unique(q.codes)) <= {-2, -1, 0, 1}
    assert (q.scales > 0).all()
    QuantizedWeight.checked(q.grid, q.codes, q.scales)
    # No worse than the scales that a plain rule would choose.
    flat = weight.reshape(len(weight), -1).astype(np.float64)
    peak = np.abs(flat).max(1, keepdims=True)
    error = np.square(q.dequantize().reshape(flat.shape) - flat).sum(1)
    assert (error <= np.square(flat).sum(1) * (1 + 1e-5) + 1e-9).all() or (peak == 0).any()


@pytest.mark.parametrize("grid", ["int8", "int4", "int2"])
def test_channels_of_zeros(grid):
    weight = np.zeros((3, 8), np.float32)
    weight[1] = np.linspace(-1, 1, 8)
    q = round_to_nearest(weight, grid)
    assert (q.codes[[0, 2]] == 0).all()
    assert (q.scales > 0).all()
    assert (q.dequantize()[[0, 2]] == 0).all()


def test_tiny_weights_keep_a_positive_scale():
    weight = np.full((1, 4), np.float32(1e-45))
    q = round_to_nearest(weight, "int8")
    QuantizedWeight.checked(q.grid, q.codes, q.scales)


@pytest.mark.parametrize(("group", "shape"), [(None, (6, 8)), (4, (6, 8)), (None, (6, 2, 3, 3))])
def test_rows(group, shape):
    weight = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    q = round_to_nearest(weight, "int4", group)
    part = q.rows(2, 5)
    assert np.array_equal(part.dequantize(), q.dequantize()[2:5])
    assert part.sha256() != q.sha256()
    assert q.rows(0, 6).sha256() == q.sha256()


def test_palette():
    book = np.array([-1.0, 0.5, 2.0], np.float32)
    codes = np.array([[0, 1], [2, 2]], np.int8)
    q = QuantizedWeight.checked("palette", codes, np.ones(2, np.float32), None, book)
    assert np.array_equal(q.dequantize(), [[-1.0, 0.5], [2.0, 2.0]])
    assert np.array_equal(q.rows(1, 2).dequantize(), [[2.0, 2.0]])


def test_hash_depends_on_everything():
    weight = np.random.default_rng(0).standard_normal((4, 8)).astype(np.float32)
    a, b = round_to_nearest(weight, "int8"), round_to_nearest(weight, "int4")
    c, d = round_to_nearest(weight, "int4", 4), round_to_nearest(weight * 2, "int4")
    assert len({x.sha256() for x in (a, b, c, d)}) == 4
    assert round_to_nearest(weight.copy(), "int8").sha256() == a.sha256()


CODES, SCALES = np.zeros((4, 8), np.int8), np.ones(4, np.float32)
BOOK = np.zeros(2, np.float32)


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("int3", CODES, SCALES), "grid 'int3' is unknown; known: int8, int4, int2, palette"),
        (("int8", CODES.astype(np.int16), SCALES), "codes are not int8"),
        (("int8", CODES[0], SCALES), "codes are not int8 of 2 or 4"),
        (("int8", CODES, SCALES.astype(np.float64)), "scales are not finite"),
        (("int8", CODES, SCALES * np.float32(np.nan)), "scales are not finite"),
        (("int8", CODES, SCALES * np.float32(np.inf)), "scales are not finite"),
        (("int8", CODES, -SCALES), "scales are not finite, positive"),
        (("int8", CODES, SCALES * 0), "scales are not finite, positive"),
        (("int8", CODES, SCALES[:3]), r"scales have shape \(3,\), not \(4,\)"),
        (("int4", CODES, SCALES, 3), "group size 3 does not divide"),
        (("int4", CODES, SCALES, 0), "group size 0 does not divide"),
        (("int4", CODES, SCALES, 4), r"not \(4, 2\)"),
        (("int4", np.zeros((4, 8, 3, 3), np.int8), SCALES, 4), "group size"),
        (("int8", CODES + np.int8(-128), SCALES), "codes leave -127..127"),
        (("int4", CODES + 8, SCALES), "codes leave -7..7"),
        (("int4", CODES - 8, SCALES), "codes leave -7..7"),
        (("int2", CODES + 2, SCALES), "codes leave -2..1"),
        (("palette", CODES, SCALES), "no float32 codebook"),
        (("palette", CODES, SCALES, None, BOOK.astype(np.float64)), "no float32 codebook"),
        (("palette", CODES, SCALES, None, BOOK * np.float32(np.nan)), "codebook has values"),
        (("palette", CODES + 2, SCALES, None, BOOK), "codes leave 0..1"),
    ],
)
def test_checked_refuses(arguments, what):
    with pytest.raises(ValueError, match=what):
        QuantizedWeight.checked(*arguments)


def test_rounding_refuses():
    with pytest.raises(ValueError, match="not finite"):
        round_to_nearest(np.array([[np.nan]], np.float32), "int8")
    with pytest.raises(ValueError, match="does not divide 6"):
        round_to_nearest(np.ones((2, 6), np.float32), "int4", 4)
    with pytest.raises(ValueError, match="does not divide"):
        round_to_nearest(np.ones((2, 4, 1, 1), np.float32), "int4", 4)


@pytest.mark.parametrize("grid", ["int4", "int2"])
@pytest.mark.parametrize("shape", [(3, 8), (2, 7), (4, 5, 3, 3), (1, 1)])
def test_codes_come_out_of_bytes_as_they_went_in(grid, shape):
    low, high = LIMITS[grid]
    codes = np.random.default_rng(0).integers(low, high + 1, shape).astype(np.int8)
    packed = pack(codes, BITS[grid])
    assert packed.shape == (shape[0], -(-codes[0].size * BITS[grid] // 8))
    assert np.array_equal(unpack(packed, BITS[grid], shape), codes)
    with pytest.raises(ValueError, match="packed"):
        unpack(packed[:, :-1], BITS[grid], shape)


def test_the_first_code_is_in_the_lowest_bits():
    assert pack(np.array([[1, -1, -7]], np.int8), 4).tolist() == [[0xF1, 0x09]]
    assert pack(np.array([[1, 0, -1, -2, 1]], np.int8), 2).tolist() == [[0b10_11_00_01, 0b01]]


@given(given=signed, seed=st.integers(0, 9))
def test_stretched_codes_stand_for_the_same_values(given, seed):
    grid, codes = given
    scales = np.random.default_rng(seed).uniform(1e-3, 9, len(codes)).astype(np.float32)
    weight = QuantizedWeight(grid, codes, scales)
    wide = weight.stretched()
    QuantizedWeight.checked(wide.grid, wide.codes, wide.scales)
    assert wide.grid == "int8"
    assert np.array_equal(wide.dequantize(), weight.dequantize())
    peak = np.abs(wide.codes.reshape(len(codes), -1).astype(int)).max(axis=1)
    assert ((peak == 0) | (2 * peak > 127)).all()


def test_only_codes_of_channels_are_stretched():
    grouped = round_to_nearest(np.ones((2, 8), np.float32), "int4", 4)
    palette = QuantizedWeight(
        "palette", np.zeros((1, 2), np.int8), np.ones(1, np.float32), None, np.ones(4, np.float32)
    )
    for weight in (grouped, palette):
        with pytest.raises(ValueError, match="one scale per channel"):
            weight.stretched()
