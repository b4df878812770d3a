"""Two forms of an int8 linear layer on onnxruntime: what they take, and how near they are.

Blocks: MatMulNBits, which quantizes activations in blocks of a row. Rows: MatMulInteger, on rows
that the graph quantizes, which is what is exported. Layers of SDXL's sizes with random weights.

    python benchmarks/onnx_linear.py
    python benchmarks/onnx_linear.py --threads 2 --json build/onnx_linear.json
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import nn

from handheld_export import measure
from handheld_export.onnx import graphs
from handheld_export.quantization import round_to_nearest

SIZES = ((640, 640, 1024), (640, 2560, 1024), (1280, 1280, 256), (1280, 5120, 256), (2048, 640, 77))
"""Inputs, outputs and rows."""
FORMS = {"blocks": graphs.CodedLinear, "rows": graphs.IntegerLinear}


class Layer(nn.Module):
    """One layer, with a tuple for a result."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.layer(x),)


def compare(size: tuple[int, int, int], threads: int, runs: int, folder: Path) -> dict[str, Any]:
    """Run both forms in turn."""
    inputs, outputs, rows = size
    torch.manual_seed(0)
    layer = nn.Linear(inputs, outputs)
    weight = round_to_nearest(layer.weight.detach().numpy(), "int8")
    x = torch.randn(1, rows, inputs) * torch.exp(0.5 * torch.randn(inputs))
    exact = x.double() @ torch.from_numpy(weight.dequantize()).double().T + layer.bias.double()
    sessions, found = {}, dict[str, Any](inputs=inputs, outputs=outputs, rows=rows)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    for name, form in FORMS.items():
        path = folder / f"{name}.onnx"
        graphs.lower(Layer(form(layer, weight)), [x], ["x"], ["y"], path)
        sessions[name] = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        (y,) = sessions[name].run(None, {"x": x.numpy()})
        found[f"{name}_snr_db"] = measure.snr_db(exact.detach().numpy(), y)
        found[f"{name}_ms"] = float("inf")
    for _ in range(runs):
        for name, session in sessions.items():
            began = time.perf_counter()
            session.run(None, {"x": x.numpy()})
            taken = 1000 * (time.perf_counter() - began)
            found[f"{name}_ms"] = min(found[f"{name}_ms"], taken)
    return found


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=30, help="of each, in turn; the fastest counts")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for size in SIZES:
            one = compare(size, arguments.threads, arguments.runs, Path(folder))
            found.append(one)
            a, b = one["blocks_ms"], one["rows_ms"]
            print(
                f"{one['inputs']:5} to {one['outputs']:4}, {one['rows']:4} rows:  "
                f"blocks {a:6.2f} ms {one['blocks_snr_db']:.1f} dB,  "
                f"rows {b:6.2f} ms {one['rows_snr_db']:.1f} dB,  {b / a:.2f} of the time",
                flush=True,
            )
    if arguments.json:
        machine = {
            "machine": platform.machine(),
            "onnxruntime": onnxruntime.__version__,
            "threads": arguments.threads,
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(machine | {"layers": found}, indent=2))


if __name__ == "__main__":
    main()
