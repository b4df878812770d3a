"""Segments of one structure are converted once, to the same bytes as alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from handheld.program import Ports, TensorSpec
from handheld_export import structures
from handheld_export.litert import conversion, tflite
from handheld_export.targets.base import SegmentInput
from handheld_export.targets.litert_cpu import LiteRTCPU


class Small(nn.Module):
    def __init__(self, seed, scale=2.0):
        super().__init__()
        torch.manual_seed(seed)
        self.norm = nn.LayerNorm(16)
        self.up = nn.Linear(16, 32)
        self.down = nn.Linear(32, 16, bias=False)
        for p in self.parameters():
            p.data = torch.randn(p.shape)
        self.scale = scale

    def forward(self, x):
        return (x + self.scale * self.down(torch.relu(self.up(self.norm(x)))),)


class Folded(Small):
    """Its bias comes out of the converter as something else than it went in."""

    def forward(self, x):
        return (super().forward(x)[0] * torch.exp(self.norm.bias),)


PORTS = Ports(inputs={"x": TensorSpec(shape=(4, 16))}, outputs={"y": TensorSpec(shape=(4, 16))})


def segment(module, shared):
    return SegmentInput("s", module.eval(), PORTS, (torch.randn(4, 16),), shared)


@pytest.fixture
def conversions(monkeypatch):
    calls = []
    real = conversion._convert

    def counted(*args):
        calls.append(args)
        return real(*args)

    monkeypatch.setattr(conversion, "_convert", counted)
    return calls


def test_third_of_a_kind_is_not_converted(tmp_path, conversions):
    target = LiteRTCPU()
    for seed in range(3):
        module = Small(seed)
        target.lower(segment(module, tmp_path / "shared"), tmp_path / f"{seed}.tflite")
        assert all(
            torch.equal(t, kept)
            for t, kept in zip(module.parameters(), Small(seed).parameters(), strict=True)
        )
    assert len(conversions) == 2
    target.lower(segment(Small(2), None), tmp_path / "alone.tflite")
    assert (tmp_path / "2.tflite").read_bytes() == (tmp_path / "alone.tflite").read_bytes()
    assert (tmp_path / "0.tflite").read_bytes() != (tmp_path / "1.tflite").read_bytes()


def test_what_differs_in_a_number_is_another_structure():
    inputs = (torch.randn(4, 16),)
    keys = []
    for module in (Small(0), Small(1), Small(0, scale=3.0)):
        opened = tflite.Open(module, 1)
        weights = [layer.weight for layer in opened.layers]
        keys.append(structures._key(opened, (*inputs, *weights), structures._small(opened), {}))
    assert keys[0] == keys[1] != keys[2]


def test_folded_constants_are_converted_alone(tmp_path, conversions):
    target, x = LiteRTCPU(), torch.randn(4, 16)
    module = Folded(1)
    target.lower(segment(module, tmp_path / "shared"), tmp_path / "a.tflite")
    (y,) = target.load(tmp_path / "a.tflite", PORTS)(x.numpy())
    assert torch.allclose(torch.from_numpy(y), module(x)[0], rtol=1e-3, atol=1e-3)
    assert len(conversions) == 3  # two for the attempt


def test_damaged_templates_are_not_read(tmp_path):
    path, small = tmp_path / "t", {"norm.bias": torch.zeros(4)}
    structures._write(path, structures._Template(b"abc", {3: "norm.bias"}))
    read = structures._read(path, small)
    assert read is not None and (read.flatbuffer, read.places) == (b"abc", {3: "norm.bias"})
    assert structures._read(path, {}) is None
    good = path.read_bytes()
    for damaged in (good[:-1], good[:-1] + b"?", b"", b"{}\nabc"):
        path.write_bytes(damaged)
        assert structures._read(path, small) is None


def test_nobody_waits_for_another_process(tmp_path, conversions):
    shared = tmp_path / "shared"
    real = structures._lock
    target = LiteRTCPU()
    shared.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(structures, "_lock", lambda path: held(real, path))
        target.lower(segment(Small(0), shared), tmp_path / "a.tflite")
    assert len(conversions) == 1
    assert not [p for p in shared.iterdir() if p.suffix != ".lock"]


class held:  # noqa: N801
    """A lock that somebody else has already."""

    def __init__(self, lock, path):
        self.first, self.second = lock(path), lock(path)

    def __enter__(self):
        assert self.first.__enter__()
        return self.second.__enter__()

    def __exit__(self, *error):
        self.second.__exit__(None, None, None)
        self.first.__exit__(None, None, None)
