"""What single layers keep on each road to Qualcomm's NPU, on 16-bit grids.

    python benchmarks/qnn_layers.py
    python benchmarks/qnn_layers.py --target onnx-qnn:SM8750 --output build/qnn_layers.json

Each case has random weights and inputs, is calibrated on its own input, compiled, and run in QNN's
simulation; the table gives dB against torch with the same codes, and first what is estimated where
codes of 4 and 2 bits go to the NPU as they are. Not run on hardware. Targets whose tools are
missing are named and passed over.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Final

import torch
from torch import nn

from handheld.errors import TargetError
from handheld.files import write_file
from handheld.program import Ports, TensorSpec
from handheld_export import measure, targets
from handheld_export.qnn.hexagon import sums_db
from handheld_export.quantization import Grid, round_to_nearest
from handheld_export.targets.base import SegmentInput

TARGETS: Final = ("executorch-qnn:SM8650", "litert-qualcomm:SM8650", "onnx-qnn:SM8650")
GRIDS: Final[tuple[Grid, ...]] = ("int8", "int4", "int2")
OUTLIER: Final = 200.0


class Rows(nn.Module):
    """Layers over tokens, ``[1, tokens, channels]``."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (self.layers(x),)


class Picture(Rows):
    """Layers over a picture, ``[1, height, width, channels]`` outside."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (self.layers(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1),)


class First(nn.Module):
    """Multiplies the first channels of a picture."""

    factors: torch.Tensor

    def __init__(self, channels: int, first: int, factor: float) -> None:
        super().__init__()
        factors = torch.ones(1, channels, 1, 1)
        factors[:, :first] = factor
        self.register_buffer("factors", factors)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factors


class Product(nn.Module):
    """A product of two computed matrices, as attention has them."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = (nn.Linear(32, 32, bias=False) for _ in range(2))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (torch.bmm(self.left(x), self.right(x).transpose(1, 2)),)


def conv(inputs: int, outputs: int) -> nn.Conv2d:
    """Return a 3x3 convolution that keeps the size."""
    return nn.Conv2d(inputs, outputs, 3, padding=1)


Case = tuple[Callable[[], nn.Module], tuple[int, ...], Callable[[str], Grid | None], float, float]
"""Module, shape of its input, grid of each layer, the input's spread, and its one outlier."""


def _all(grid: Grid, name: str) -> Grid:
    return grid


def cases() -> dict[str, Case]:
    """Return the cases by name."""
    found: dict[str, Case] = {}
    for grid in GRIDS:
        coded = partial(_all, grid)
        found[f"linear layer, {grid}"] = (
            lambda: Rows(nn.Linear(320, 64)), (1, 64, 320), coded, 1.0, 0.0,
        )  # fmt: skip
        found[f"3x3 convolution, {grid}"] = (
            lambda: Picture(conv(64, 64)), (1, 16, 16, 64), coded, 1.0, 0.0,
        )  # fmt: skip
        found[f"linear layer, {grid}, an input {OUTLIER:.0f} times the rest"] = (
            lambda: Rows(nn.Linear(320, 64)), (1, 64, 320), coded, 1.0, OUTLIER,
        )  # fmt: skip
    found["product of computed matrices"] = (
        Product, (1, 64, 32), partial(_all, "int8"), 1.0, 0.0,
    )  # fmt: skip
    found["group normalisation"] = (
        lambda: Picture(nn.GroupNorm(4, 16), conv(16, 16)),
        (1, 16, 16, 16), partial(_all, "int8"), 1.0, 0.0,
    )  # fmt: skip
    found["group normalisation, one group 100 times the others"] = (
        lambda: Picture(First(16, 4, 100.0), nn.GroupNorm(4, 16), conv(16, 16)),
        (1, 16, 16, 16), partial(_all, "int8"), 1.0, 0.0,
    )  # fmt: skip
    found["layer normalisation"] = (
        lambda: Rows(nn.Linear(64, 64), nn.LayerNorm(64)),
        (1, 64, 64), partial(_all, "int8"), 1.0, 0.0,
    )  # fmt: skip
    found["GELU"] = (
        lambda: Rows(nn.Linear(64, 64), nn.GELU()), (1, 64, 64), partial(_all, "int8"), 1.0, 0.0,
    )  # fmt: skip
    found["group normalisation of what spreads less than 1"] = (
        lambda: Picture(nn.GroupNorm(4, 16), conv(16, 16)),
        (1, 16, 16, 16), partial(_all, "int8"), 0.1, 0.0,
    )  # fmt: skip
    found["convolution without codes between grids"] = (
        lambda: Picture(conv(4, 16), conv(16, 16)),
        (1, 16, 16, 4), lambda name: "int8" if name.endswith("1") else None, 1.0, 0.0,
    )  # fmt: skip
    return found


def segment(case: Case) -> SegmentInput:
    """Make a case's segment, rounded, with its input as example and sample."""
    make, shape, grid_of, spread, outlier = case
    torch.manual_seed(0)
    module = make().eval()
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d) and (grid := grid_of(name)):
            weight = round_to_nearest(layer.weight.detach().numpy(), grid)
            layer.weight = nn.Parameter(torch.from_numpy(weight.dequantize()), requires_grad=False)
            layer.quantized = weight  # type: ignore[assignment]
    x = spread * torch.randn(shape, generator=torch.Generator().manual_seed(1))
    if outlier:
        x.view(-1)[0] = outlier
    with torch.no_grad():
        (y,) = module(x)
    ports = Ports(
        inputs={"x": TensorSpec(shape=shape)}, outputs={"y": TensorSpec(shape=tuple(y.shape))}
    )
    return SegmentInput("layer", module, ports, [x], samples=[[x]])


def measured(name: str, case: Case, folder: Path) -> float:
    """Compile a case for a target, run it in the simulation, and return its dB."""
    target, item = targets.find(name), segment(case)
    with torch.no_grad():
        (expected,) = item.module(*item.examples)
    lowered = target.lower(item, folder / f"layer{target.suffix}")
    (result,) = target.load(lowered.path, item.ports)(*(x.numpy() for x in item.examples))
    return measure.snr_db(expected.numpy(), result)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--target", action="append", help=f"by default {', '.join(TARGETS)}")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    given = parser.parse_args(arguments)
    names, versions = [], {}
    for name in given.target or TARGETS:
        try:
            versions[name] = targets.find(name).versions()
            names.append(name)
        except TargetError as error:
            print(f"{name} is left out: {error.message} ({error.remedy})")
    table: dict[str, dict[str, float]] = {}
    print("| dB | estimate | " + " | ".join(names) + " |\n|---|---:" + "|---:" * len(names) + "|")
    with tempfile.TemporaryDirectory() as folder:
        for what, case in cases().items():
            estimate = min(sums_db(segment(case), lambda weight: weight).values(), default=None)
            table[what] = {} if estimate is None else {"estimate": round(estimate, 1)}
            found: dict[str, float] = {}
            for name in names:
                try:
                    found[name] = round(measured(name, case, Path(folder)), 1)
                except TargetError as error:
                    print(f"{name}, {what}: {error}", file=sys.stderr)
            figures = " | ".join(str(found.get(n, "")) for n in names)
            print(f"| {what} | {table[what].get('estimate', '')} | {figures} |", flush=True)
            table[what] |= found
    if given.output:
        record = {"versions": versions, "db": table}
        write_file(given.output, json.dumps(record, indent=2).encode())


if __name__ == "__main__":
    main()
