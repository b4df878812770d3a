"""Small bundles that the native harness really runs, on ExecuTorch."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from handheld import bundle as bundles
from handheld.bundle import Bundle
from handheld.manifest import Artifact, FileRef, Manifest, ModelInfo, Size, TextInfo
from handheld.program import (
    Affine,
    Call,
    Concat,
    Input,
    Moments,
    Normalizer,
    Op,
    Pad,
    Ports,
    Program,
    Slice,
    TensorSpec,
    Term,
)
from samples import ref, spec

H, W, C, TEXT = 16, 24, 16, 32
STEPS = 3


def lower(module: Any, examples: tuple[Any, ...], *, planned_io: bool = False) -> bytes:
    """Lower a module for XNNPACK in float32."""
    import torch
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import ExecutorchBackendConfig, to_edge_transform_and_lower
    from executorch.exir.passes import MemoryPlanningPass

    exported = torch.export.export(module.eval(), examples)
    config = ExecutorchBackendConfig(
        memory_planning_pass=MemoryPlanningPass(
            alloc_graph_input=planned_io, alloc_graph_output=planned_io
        )
    )
    lowered = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
    return bytes(lowered.to_executorch(config).buffer)


def artifacts() -> dict[str, tuple[bytes, Ports]]:
    """Two segments of a step and a decoder that works on bands of four rows."""
    import torch
    from torch import nn

    torch.manual_seed(0)

    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.text = nn.Linear(C, 64), nn.Linear(TEXT, 64)
            self.down = nn.Linear(64, C)

        def forward(self, x: Any, text: Any, time: Any) -> Any:
            return self.down(torch.relu(self.up(x + time) + self.text(text)))

    class Second(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(C, C, 3, padding=1)
            self.skip = nn.Linear(C, C)

        def forward(self, x: Any) -> Any:
            y = self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            return self.skip(x) * 0.5, torch.sigmoid(y.contiguous())

    class Band(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(C, 3)

        def forward(self, x: Any, mean: Any, rstd: Any) -> Any:
            return torch.tanh(self.head((x - mean) * rstd))

    x, text, one = torch.randn(1, H, W, C), torch.randn(1, 1, 1, TEXT), torch.randn(1, 1, 1, C)
    band = torch.randn(1, H // 4 + 2, W, C)
    picture = spec(1, H, W, C)
    return {
        "unet.0": (
            lower(First(), (x, text, one)),
            Ports(
                inputs={"x": picture, "text": spec(1, 1, 1, TEXT), "time": spec(1, 1, 1, C)},
                outputs={"y": picture},
            ),
        ),
        "unet.1": (
            lower(Second(), (x,), planned_io=True),
            Ports(inputs={"x": picture}, outputs={"skip": picture, "gate": picture}),
        ),
        "decoder.0": (
            lower(Band(), (band, one, one)),
            Ports(
                inputs={
                    "x": spec(*band.shape),
                    "mean": spec(1, 1, 1, C),
                    "rstd": spec(1, 1, 1, C),
                },
                outputs={"y": spec(1, H // 4 + 2, W, 3)},
            ),
        ),
    }


def normed() -> tuple[bytes, Ports]:
    """Lower a segment whose delegate holds constants that are not packed, in int4."""
    import tempfile

    import torch
    from torch import nn

    from handheld_export.quantization import QuantizedWeight
    from handheld_export.targets.base import SegmentInput
    from handheld_export.targets.executorch_xnnpack import ExecuTorchXNNPACK

    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(64), nn.Linear(64, 64)

        def forward(self, x: Any) -> Any:
            return (self.linear(self.norm(x)),)

    torch.manual_seed(0)
    module = Normed().eval()
    codes = torch.randint(-7, 8, (64, 64), dtype=torch.int8)
    scales = np.full(64, 0.02, np.float32)
    with torch.no_grad():
        nn.init.normal_(module.norm.weight)
        module.linear.weight.copy_(codes * 0.02)
    module.linear.quantized = QuantizedWeight("int4", codes.numpy(), scales)
    ports = Ports(inputs={"x": spec(1, 24, 64)}, outputs={"y": spec(1, 24, 64)})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "normed.pte"
        segment = SegmentInput("normed", module, ports, (torch.randn(1, 24, 64),))
        ExecuTorchXNNPACK().lower(segment, path)
        return path.read_bytes(), ports


def normed_program() -> Program:
    """Two steps through the same segment."""
    x = spec(1, 24, 64)
    return Program(
        inputs=(Input(name="x", role="noise"),),
        tensors={"x": x, "y": x, "z": x},
        ops=(
            Call(artifact="normed", args={"x": "x"}, results={"y": "y"}),
            Call(artifact="normed", args={"x": "y"}, results={"y": "z"}),
        ),
        outputs={"latent": "z"},
    )


class _Writer:
    """Writes a program and works out the shapes."""

    def __init__(self) -> None:
        self.tensors: dict[str, TensorSpec] = {}
        self.ops: list[Op] = []

    def add(self, op: Op, **specs: TensorSpec) -> None:
        self.ops.append(op)
        self.tensors.update({k.replace("__", "."): v for k, v in specs.items()})


def program() -> Program:
    """Three steps, then a decoder in four bands with shared statistics, then odd types."""
    p, x = _Writer(), spec(1, H, W, C)
    inputs = (
        Input(name="noise", role="noise", stream=3),
        Input(name="more", role="noise", stream=4),
        Input(name="text", role="prompt_embeds"),
        Input(name="half", role="other"),
        Input(name="bytes", role="other"),
        Input(name="ints", role="other"),
        Input(name="whole", role="other"),
    )
    p.tensors = {
        "noise": x,
        "more": x,
        "text": spec(1, 1, 1, TEXT),
        "half": spec(3, 5, 7, dtype="float16"),
        "bytes": spec(3, 5, 7, dtype="uint8"),
        "ints": spec(3, 5, 7, dtype="int8"),
        "whole": spec(3, 5, 7, dtype="int32"),
    }
    latent = "noise"
    for i in range(STEPS):
        p.add(
            Call(
                artifact="unet.0",
                args={"x": latent, "text": "text", "time": f"time.{i}"},
                results={"y": f"h.{i}"},
            ),
            **{f"h.{i}": x},
        )
        p.add(
            Call(
                artifact="unet.1",
                args={"x": f"h.{i}"},
                results={"skip": f"skip.{i}", "gate": f"gate.{i}"},
            ),
            **{f"skip.{i}": x, f"gate.{i}": x},
        )
        p.add(
            Affine(
                terms=(
                    Term(x=latent, scale=0.9 - 0.1 * i),
                    Term(x=f"skip.{i}", scale=-0.3),
                    Term(x=f"gate.{i}", scale=1.7),
                    Term(x="more", scale=0.01),
                ),
                bias=-0.125,
                out=f"latent.{i}",
            ),
            **{f"latent.{i}": x},
        )
        latent = f"latent.{i}"
    _decode(p, latent)
    for name in ("half", "bytes", "ints", "whole"):
        _odd(p, name)
    return Program(
        inputs=inputs,
        tensors=p.tensors,
        ops=tuple(p.ops),
        outputs={"picture": "picture", "latent": latent},
    )


def _decode(p: _Writer, latent: str) -> None:
    rows = H // 4
    for b in range(4):
        p.add(
            Slice(x=latent, axis=1, start=rows * b, length=rows, out=f"part.{b}"),
            **{f"part.{b}": spec(1, rows, W, C)},
        )
        p.add(Moments(x=f"part.{b}", groups=4, out=f"m.{b}"), **{f"m.{b}": spec(1, 3, 4)})
    one = spec(1, 1, 1, C)
    p.add(
        Normalizer(moments=tuple(f"m.{b}" for b in range(4)), eps=1e-6, mean="mean", rstd="rstd"),
        mean=one,
        rstd=one,
    )
    p.add(
        Pad(x=latent, axis=1, before=1, after=1, value=0.25, out="tall"),
        tall=spec(1, H + 2, W, C),
    )
    for b in range(4):
        p.add(
            Slice(x="tall", axis=1, start=rows * b, length=rows + 2, out=f"in.{b}"),
            **{f"in.{b}": spec(1, rows + 2, W, C)},
        )
        p.add(
            Call(
                artifact="decoder.0",
                args={"x": f"in.{b}", "mean": "mean", "rstd": "rstd"},
                results={"y": f"out.{b}"},
            ),
            **{f"out.{b}": spec(1, rows + 2, W, 3)},
        )
        p.add(
            Slice(x=f"out.{b}", axis=1, start=1, length=rows, out=f"band.{b}"),
            **{f"band.{b}": spec(1, rows, W, 3)},
        )
    p.add(
        Concat(xs=tuple(f"band.{b}" for b in range(4)), axis=1, out="drawn"),
        drawn=spec(1, H, W, 3),
    )
    p.add(
        Affine(terms=(Term(x="drawn", scale=127.5),), bias=127.5, out="picture"),
        picture=spec(1, H, W, 3, dtype="uint8"),
    )


def _odd(p: _Writer, name: str) -> None:
    dtype = p.tensors[name].dtype
    p.add(
        Slice(x=name, axis=1, start=1, length=3, out=f"{name}.cut"),
        **{f"{name}.cut": spec(3, 3, 7, dtype=dtype)},
    )
    p.add(
        Pad(x=f"{name}.cut", axis=2, before=2, after=1, value=-2.5, out=f"{name}.wide"),
        **{f"{name}.wide": spec(3, 3, 10, dtype=dtype)},
    )
    p.add(
        Pad(x=f"{name}.wide", axis=1, before=1, value=300.1, out=f"{name}.tall"),
        **{f"{name}.tall": spec(3, 4, 10, dtype=dtype)},
    )
    p.add(
        Concat(xs=(f"{name}.tall", f"{name}.wide", f"{name}.wide"), axis=1, out=f"{name}.all"),
        **{f"{name}.all": spec(3, 10, 10, dtype=dtype)},
    )
    p.add(
        Concat(xs=(f"{name}.all", f"{name}.all"), axis=0, out=f"{name}.twice"),
        **{f"{name}.twice": spec(6, 10, 10, dtype=dtype)},
    )


def constants() -> dict[str, Any]:
    rng = np.random.default_rng(1)
    return {f"time.{i}": rng.standard_normal((1, 1, 1, C)).astype(np.float32) for i in range(STEPS)}


def inputs() -> dict[str, Any]:
    rng = np.random.default_rng(2)
    shape = (3, 5, 7)
    return {
        "text": rng.standard_normal((1, 1, 1, TEXT)).astype(np.float32),
        "half": rng.standard_normal(shape).astype(np.float16),
        "bytes": rng.integers(0, 256, shape).astype(np.uint8),
        "ints": rng.integers(-128, 128, shape).astype(np.int8),
        "whole": rng.integers(-(2**31), 2**31, shape).astype(np.int32),
    }


def showing_all(program: Program) -> Program:
    """Make every tensor of a program an output, so that none shares its memory for long."""
    everything = {f"t.{name}": name for name in program.tensors}
    return program.model_copy(update={"outputs": {**program.outputs, **everything}})


def write(
    path: Path, made: dict[str, tuple[bytes, Ports]], program: Program, **changes: Any
) -> Bundle:
    """Write a bundle of lowered artifacts."""
    from safetensors.numpy import save

    files = {f"artifacts/{name}.pte": data for name, (data, _) in made.items()}
    files["constants.safetensors"] = save(constants())
    values: dict[str, Any] = {
        "model": ModelInfo(
            id="tiny", checkpoint_sha256="0" * 64, steps=STEPS, sampler="none", guidance=0.0
        ),
        "target": "executorch-xnnpack",
        "precision": "fp32",
        "sizes": {f"{W}x{H}": Size(width=W, height=H, program=program)},
        "artifacts": tuple(
            Artifact(
                id=name,
                target="executorch-xnnpack",
                engine="executorch",
                engine_version="1.5.1",
                file=_ref(f"artifacts/{name}.pte", data),
                ports=ports,
                workspace=1 << 20,
                units=(name,),
                component="decoder" if name.startswith("decoder") else "unet",
            )
            for name, (data, ports) in made.items()
        ),
        "constants": ref("constants.safetensors", files["constants.safetensors"]),
        "constant_specs": {k: spec(*v.shape) for k, v in constants().items()},
        "text": TextInfo(tokens=1, width=TEXT),
    }
    written = bundles.write(Manifest(**{**values, **changes}), files, path)
    assert written is not None
    return written


def _ref(path: str, data: bytes) -> FileRef:
    return FileRef(path=path, sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))
