"""Weights that several ExecuTorch programs share."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tflites
from handheld_export import sharing
from handheld_export.executorch import shared as executorch_shared
from handheld_export.quantization import QuantizedWeight
from handheld_export.targets.base import SegmentInput
from handheld_export.targets.executorch_xnnpack import ExecuTorchXNNPACK


class Layers(nn.Module):
    """A convolution in float and a linear layer in int8, on pictures of any size."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Conv2d(tflites.CHANNELS, 64, 3, padding=1)
        self.last = nn.Linear(64, tflites.CHANNELS)
        with torch.no_grad():
            weight = self.last.weight
            scales = weight.abs().amax(1) / 127
            codes = (weight / scales[:, None]).round().clamp(-127, 127)
            weight.copy_(codes * scales[:, None])
        self.last.quantized = QuantizedWeight("int8", codes.to(torch.int8).numpy(), scales.numpy())

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        hidden = torch.relu(self.first(x.permute(0, 3, 1, 2)))
        return (self.last(hidden.permute(0, 2, 3, 1)),)


def lower(path: Path, width: int, seed: int = 0) -> Path:
    ports = tflites.ports(width)
    example = torch.randn(ports.inputs["x"].shape)
    ExecuTorchXNNPACK().lower(SegmentInput("s", Layers(seed).eval(), ports, [example]), path)
    return path


def made(folder: Path) -> tuple[dict[int, tuple[Path, ...]], dict[int, Path]]:
    """Return the files of each width: those that share weights, and those that do not."""
    names = {w: f"unet.{w}x{tflites.HEIGHT}" for w in tflites.SIZES}
    (folder / "whole").mkdir()
    alone = {w: lower(folder / "whole" / f"{name}.pte", w) for w, name in names.items()}
    paths = {names[w]: path for w, path in alone.items()}
    shared = ExecuTorchXNNPACK().share(paths, "unet.weights", folder)
    assert shared is not None
    return {w: shared[name] for w, name in names.items()}, alone


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    return made(tmp_path_factory.mktemp("programs"))


def test_programs_are_read_by_a_process_that_has_written_none(both):
    code = "import sys, pathlib; from handheld_export.executorch.shared import _Program as P; "
    code += "print(len(P(pathlib.Path(sys.argv[1])).names))"
    path = next(iter(both[1].values()))
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) > 0


def test_results_are_the_same_bits(both):
    shared, alone = both
    for width, path in alone.items():
        x = np.random.default_rng(width).standard_normal((1, 8, width, 3)).astype(np.float32)
        files = path, shared[width][0]
        before, after = (ExecuTorchXNNPACK().load(f, tflites.ports(width))(x)[0] for f in files)
        assert before.any()
        assert before.tobytes() == after.tobytes()


def test_weights_are_there_once(both):
    shared, alone = both
    (weights,) = {part for _, part in shared.values()}
    for width, path in alone.items():
        program = shared[width][0]
        assert program.stat().st_size % sharing.PAGE == 0
        assert program.stat().st_size - sharing.PAGE < path.stat().st_size - weights.stat().st_size
        with sharing.whole(program) as joined:
            have, wanted = executorch_shared._Program(joined), executorch_shared._Program(path)
            assert {n: have.content(n) for n in have.names} == {
                n: wanted.content(n) for n in wanted.names
            }


def test_other_weights_are_not_shared(both, tmp_path):
    paths = [both[1][16], lower(tmp_path / "other.pte", 24, seed=1)]
    outputs = [tmp_path / "u.16x8.pte", tmp_path / "u.24x8.pte"]
    assert not executorch_shared.share(paths, outputs, tmp_path / "u.weights")
    assert not any(p.exists() for p in (*outputs, tmp_path / "u.weights"))
