"""Small .tflite files, written without a converter: the same layers at several sizes."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import ai_edge_litert.schema_py_generated as schema
import numpy as np

from handheld import bundle as bundles
from handheld.bundle import Bundle
from handheld.manifest import Artifact, Manifest, ModelInfo, Size, TextInfo
from handheld.program import Affine, Call, Input, Ports, Program, Term
from handheld_export.litert import shared
from handheld_export.litert.tflite import packed
from samples import ref, spec

WIDTH = 64
HEIGHT = 8
SIZES = (16, 24, 8)
"""Widths of pictures."""
CHANNELS = 3


def ports(width: int) -> Ports:
    shape = spec(1, HEIGHT, width, CHANNELS)
    return Ports(inputs={"x": shape}, outputs={"y": shape})


def weights(seed: int = 0) -> list[tuple[Any, Any]]:
    """Kernels ``[out, kh, kw, in]`` in int8 and biases of three 3x3 convolutions."""
    rng = np.random.default_rng(seed)
    widths = (CHANNELS, WIDTH, WIDTH, CHANNELS)
    return [
        (
            rng.integers(-127, 128, (o, 3, 3, i), np.int8),
            # Two layers have the same bias.
            np.zeros(o, np.float32) if o == WIDTH else rng.standard_normal(o).astype(np.float32),
        )
        for i, o in pairwise(widths)
    ]


def convolutions(width: int, layers: Any, scale: float = 1e-3) -> bytes:
    """Three convolutions, and a sum with a constant that has the picture's size."""
    model, graph = schema.ModelT(), schema.SubGraphT()
    model.version, model.buffers, graph.tensors, graph.operators = 3, [schema.BufferT()], [], []
    ops = schema.BuiltinOperator
    model.operatorCodes = [_code(ops.CONV_2D, 5), _code(ops.ADD, 1)]

    def tensor(name: str, shape: Any, data: Any = None) -> int:
        t = schema.TensorT()
        t.name, t.shape = name, list(shape)
        if data is not None:
            buffer = schema.BufferT()
            buffer.data = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
            model.buffers.append(buffer)
            t.buffer = len(model.buffers) - 1
        if data is not None and data.dtype == np.int8:
            t.type = schema.TensorType.INT8
            t.quantization = schema.QuantizationParametersT()
            t.quantization.scale = np.full(len(data), scale, np.float32)
            t.quantization.zeroPoint = np.zeros(len(data), np.int64)
        graph.tensors.append(t)
        return len(graph.tensors) - 1

    def operator(code: int, inputs: list[int], out: int, kind: str, **options: Any) -> None:
        op = schema.OperatorT()
        op.opcodeIndex, op.inputs, op.outputs = code, inputs, [out]
        op.builtinOptionsType = getattr(schema.BuiltinOptions, kind)
        op.builtinOptions = getattr(schema, f"{kind}T")()
        for name, value in options.items():
            setattr(op.builtinOptions, name, value)
        graph.operators.append(op)

    x = first = tensor("x", (1, HEIGHT, width, CHANNELS))
    ramp = np.linspace(0, 1, HEIGHT * width * CHANNELS, dtype=np.float32)
    shift = tensor("shift", (1, HEIGHT, width, CHANNELS), ramp)
    for i, (kernel, bias) in enumerate(layers):
        inputs = [
            x,
            tensor(f"{i}.weight", kernel.shape, kernel),
            tensor(f"{i}.b", bias.shape, bias),
        ]
        x = tensor(f"t{i}", (1, HEIGHT, width, len(kernel)))
        operator(0, inputs, x, "Conv2DOptions", strideH=1, strideW=1)
    last = tensor("y", (1, HEIGHT, width, CHANNELS))
    operator(1, [x, shift], last, "AddOptions")
    graph.inputs, graph.outputs = [first], [last]
    signature = schema.SignatureDefT()
    signature.signatureKey, signature.subgraphIndex = "serving_default", 0
    signature.inputs, signature.outputs = [_map("x", first)], [_map("y", last)]
    model.subgraphs, model.signatureDefs = [graph], [signature]
    return bytes(packed(model))


def _code(builtin: int, version: int) -> Any:
    code = schema.OperatorCodeT()
    code.builtinCode = code.deprecatedBuiltinCode = builtin
    code.version = version
    return code


def _map(name: str, index: int) -> Any:
    item = schema.TensorMapT()
    item.name, item.tensorIndex = name, index
    return item


def program(width: int, *artifacts: str) -> Program:
    """Call artifacts one after the other, and draw what comes out."""
    shape = (1, HEIGHT, width, CHANNELS)
    drawn = [f"drawn.{i}" for i in range(len(artifacts))]
    return Program(
        inputs=(Input(name="noise", role="noise"),),
        tensors={
            **{name: spec(*shape) for name in ("noise", *drawn)},
            "picture": spec(*shape, dtype="uint8"),
        },
        ops=(
            *(
                Call(artifact=artifact, args={"x": x}, results={"y": y})
                for artifact, (x, y) in zip(artifacts, pairwise(("noise", *drawn)), strict=True)
            ),
            Affine(terms=(Term(x=drawn[-1], scale=20.0),), bias=100.0, out="picture"),
        ),
        outputs={"picture": "picture"},
    )


def write(path: Path, artifacts: dict[int, tuple[Path, ...]], engine: Any = "litert") -> Bundle:
    """Write a bundle of one artifact for each width, which is one file or several."""
    made = {f"unet.{w}x{HEIGHT}": (w, files) for w, files in artifacts.items()}
    sizes = {
        f"{w}x{HEIGHT}": Size(width=w, height=HEIGHT, program=program(w, name))
        for name, (w, _) in made.items()
    }
    return _write(path, made, sizes, engine)


def chain(folder: Path, count: int = 3) -> Bundle:
    """Write a bundle of one size that calls artifacts one after the other."""
    width = SIZES[0]
    made: dict[str, tuple[int, tuple[Path, ...]]] = {}
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        file = folder / f"unet.{i}.tflite"
        file.write_bytes(convolutions(width, weights(i)))
        made[f"unet.{i}"] = (width, (file,))
    size = Size(width=width, height=HEIGHT, program=program(width, *made))
    return _write(folder / "bundle", made, {f"{width}x{HEIGHT}": size}, "litert")


def _write(
    path: Path,
    made: dict[str, tuple[int, tuple[Path, ...]]],
    sizes: dict[str, Size],
    engine: Any,
) -> Bundle:
    files = {f"artifacts/{p.name}": p.read_bytes() for _, own in made.values() for p in own}
    artifacts = []
    for name, (width, own) in made.items():
        one, *others = (ref(f"artifacts/{p.name}", files[f"artifacts/{p.name}"]) for p in own)
        artifacts.append(
            Artifact(
                id=name,
                target="litert-cpu",
                engine=engine,
                engine_version="2.3.0",
                file=one,
                parts=tuple(others),
                ports=ports(width),
                workspace=1 << 20,
                units=("conv",),
                component="unet",
            )
        )
    manifest = Manifest(
        schema_version=3,
        model=ModelInfo(id="s", checkpoint_sha256="0" * 64, steps=1, sampler="none", guidance=1.0),
        target="litert-cpu",
        precision="int8",
        sizes=sizes,
        artifacts=tuple(artifacts),
        text=TextInfo(tokens=1, width=1),
    )
    written = bundles.write(manifest, files, path)
    assert written is not None
    return written


def alone(folder: Path, scale: float = 1e-3) -> dict[int, Path]:
    """Write a whole file for each size."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {width: folder / f"unet.{width}x{HEIGHT}.tflite" for width in SIZES}
    for width, path in paths.items():
        path.write_bytes(convolutions(width, weights(), scale))
    return paths


def together(folder: Path, scale: float = 1e-3) -> dict[int, tuple[Path, ...]]:
    """Write files that share weights."""
    before = alone(folder / "alone", scale)
    outputs = {width: folder / path.name for width, path in before.items()}
    common = folder / "unet.weights"
    assert shared.share(list(before.values()), list(outputs.values()), common)
    return {width: (path, common) for width, path in outputs.items()}
