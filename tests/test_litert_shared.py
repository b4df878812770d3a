"""Weights that several .tflite files share."""

from __future__ import annotations

import numpy as np
import pytest

import tflites
from handheld_export import sharing
from handheld_export.litert import shared as litert_shared
from handheld_export.targets.litert_cpu import LiteRTCPU


@pytest.fixture
def shared(tmp_path):
    files = list(tflites.together(tmp_path).values())
    return [tmp_path / "alone" / f[0].name for f in files], [f[0] for f in files], files[0][1]


def test_results_are_the_same_bits(shared):
    for width, alone, together in zip(tflites.SIZES, *shared[:2], strict=True):
        x = np.random.default_rng(width).standard_normal((1, 8, width, 3), np.float32)
        runs = [LiteRTCPU().load(p, tflites.ports(width))(x)[0] for p in (alone, together)]
        assert runs[0].any()
        assert runs[0].tobytes() == runs[1].tobytes()


def test_weights_are_there_once(shared):
    alone, outputs, weights = shared
    kernels = sum(kernel.size for kernel, _ in tflites.weights())
    assert kernels <= weights.stat().st_size < 1.2 * kernels
    for path in outputs:
        assert path.stat().st_size == sharing.PAGE < alone[0].stat().st_size
        assert sharing.continued_by(path) == weights
    assert sharing.continued_by(alone[0]) is None


def test_packed_weights_are_known_by_the_same_numbers(shared):
    numbers = []
    for path in shared[1]:
        with sharing.whole(path) as joined:
            numbers.append(litert_shared._File(joined).kernels())
    assert len(numbers[0]) == 3
    assert numbers[0] == numbers[1] == numbers[2]


def test_the_same_files_give_the_same_bytes(shared, tmp_path):
    alone, outputs, weights = shared
    again = [tmp_path / p.name for p in outputs]
    assert litert_shared.share(alone, again, tmp_path / weights.name)
    for a, b in zip((*outputs, weights), (*again, tmp_path / weights.name), strict=True):
        assert a.read_bytes() == b.read_bytes()


@pytest.mark.parametrize("change", ["codes", "scales"])
def test_other_layers_are_not_shared(change, tmp_path):
    paths = list(tflites.alone(tmp_path).values())
    layers = tflites.weights(1 if change == "codes" else 0)
    scale = 2e-3 if change == "scales" else 1e-3
    paths[1].write_bytes(tflites.convolutions(tflites.SIZES[1], layers, scale))
    outputs = [tmp_path / f"s.{p.name}" for p in paths]
    assert not litert_shared.share(paths, outputs, tmp_path / "s.weights")
    assert not any(p.exists() for p in outputs)
