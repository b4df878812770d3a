"""Write the golden files: python tests/golden/make.py [FOLDER]."""

# ruff: noqa: E402

from __future__ import annotations

import copy
import hashlib
import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load, save

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import samples
from handheld import bundle, memory_plan, noise
from handheld.errors import UsageError
from handheld.execute import execute
from handheld.manifest import Manifest
from handheld.program import (
    Affine,
    Concat,
    Input,
    Moments,
    Normalizer,
    Pad,
    Program,
    Slice,
    Term,
    halves,
)
from handheld.text import oip
from samples import spec

Tree = dict[str, Any]
SIZE = f"{samples.WIDTH}x{samples.HEIGHT}"
PROGRAM = ("sizes", SIZE, "program")
DELETE = object()


OPS, TENSORS = (*PROGRAM, "ops"), (*PROGRAM, "tensors")
ARTIFACT = ("artifacts", 0)
PATH = (*ARTIFACT, "file", "path")
SPEC = {"shape": [1], "dtype": "float32"}
CHANGES: list[tuple[str, tuple[Any, ...], Any, str | None]] = [
    # name, path of what changes, new value, field that is named if it is another one
    ("newer", ("schema_version",), 4, None),
    ("version-zero", ("schema_version",), 0, None),
    ("version-text", ("schema_version",), "1", None),
    ("version-missing", ("schema_version",), DELETE, None),
    ("unknown-field", ("surprise",), 1, None),
    ("unknown-field-deep", (*TENSORS, "top", "unit"), "m", None),
    ("missing-field", ("text",), DELETE, None),
    ("text-for-number", (*ARTIFACT, "file", "bytes"), "18", None),
    ("path-up", PATH, "../manifest.json", None),
    ("path-absolute", PATH, "/etc/hostname", None),
    ("path-backslash", PATH, "a\\b", None),
    ("path-drive", PATH, "c:a", None),
    ("path-dot", PATH, "artifacts/./unet.0.tflite", None),
    ("path-empty", PATH, "", None),
    ("file-missing", PATH, "artifacts/x", None),
    ("bytes-wrong", (*ARTIFACT, "file", "bytes"), 17, None),
    ("sha256-wrong", (*ARTIFACT, "file", "sha256"), "0" * 64, None),
    ("sha256-upper", (*ARTIFACT, "file", "sha256"), "A" * 64, None),
    ("engine-unknown", (*ARTIFACT, "engine"), "steam", None),
    ("artifact-id-twice", ("artifacts",), lambda found: [*found, *found], "artifacts[1].id"),
    ("no-artifacts", ("artifacts",), [], None),
    ("no-sizes", ("sizes",), {}, None),
    ("size-name", ("sizes", SIZE, "width"), 24, f"sizes.{SIZE}"),
    ("name-with-slash", (*TENSORS, "a/b"), SPEC, f"sizes.{SIZE}.program.tensors.a/b.[key]"),
    ("shape-empty", (*TENSORS, "top", "shape"), [], None),
    ("shape-zero", (*TENSORS, "top", "shape", 0), 0, None),
    ("shape-seven", (*TENSORS, "top", "shape"), [1] * 7, None),
    ("shape-huge", (*TENSORS, "top", "shape"), [2**31] * 6, f"sizes.{SIZE}.program.tensors.top"),
    ("dtype-unknown", (*TENSORS, "top", "dtype"), "float64", None),
    ("op-unknown", (*OPS, 0, "op"), "jump", f"sizes.{SIZE}.program.ops[0]"),
    ("read-before-write", OPS, lambda found: found[::-1], f"sizes.{SIZE}.program.ops[0]"),
    ("written-twice", (*OPS, 1, "out"), "top", f"sizes.{SIZE}.program.ops[1]"),
    ("slice-outside", (*OPS, 0, "start"), 5, f"sizes.{SIZE}.program.ops[0]"),
    ("slice-negative", (*OPS, 0, "start"), -1, f"sizes.{SIZE}.program.ops[0].slice.start"),
    ("axis-outside", (*OPS, 5, "axis"), 4, f"sizes.{SIZE}.program.ops[5]"),
    ("groups-do-not-divide", (*OPS, 2, "groups"), 2, f"sizes.{SIZE}.program.ops[2]"),
    ("scale-over-binary32", (*OPS, 8, "bias"), 1e39, f"sizes.{SIZE}.program.ops[8].affine.bias"),
    ("eps-zero", (*OPS, 4, "eps"), 0, f"sizes.{SIZE}.program.ops[4].normalizer.eps"),
    ("call-unknown-artifact", (*OPS, 9, "artifact"), "x", f"sizes.{SIZE}.program.ops[9]"),
    ("call-missing-argument", (*OPS, 9, "args", "x"), DELETE, f"sizes.{SIZE}.program.ops[9]"),
    ("call-extra-argument", (*OPS, 9, "args", "z"), "noise", f"sizes.{SIZE}.program.ops[9]"),
    ("call-wrong-shape", (*OPS, 9, "args", "x"), "top", f"sizes.{SIZE}.program.ops[9]"),
    ("call-missing-result", (*OPS, 9, "results"), {}, f"sizes.{SIZE}.program.ops[9]"),
    ("output-unwritten", (*PROGRAM, "outputs", "picture"), "none", None),
    ("picture-shape", (*PROGRAM, "outputs", "picture"), "noise", f"sizes.{SIZE}.program"),
    ("no-outputs", (*PROGRAM, "outputs"), {}, None),
    ("declared-unwritten", (*TENSORS, "idle"), SPEC, None),
    ("constant-missing", ("constant_specs", "more"), SPEC, "constant_specs"),
    ("constants-without-file", ("constants",), None, "constant_specs"),
    ("text-width", ("text", "width"), 7, f"sizes.{SIZE}.program.inputs[1]"),
    ("reference-size", ("reference", "size"), "1x1", None),
    ("valid", ("licence",), "Apache-2.0", None),
    ("valid-provenance", ("provenance", "options"), {"any": [1, None, {"x": 1.5}]}, None),
    ("valid-without-provenance", ("provenance",), DELETE, None),
    ("valid-without-verification", ("verification",), DELETE, None),
    ("valid-without-reference", ("reference",), None, None),
]


WIDE = f"{samples.WIDTH + 8}x{samples.HEIGHT}"


def several_sizes(tree: Tree) -> Tree:
    """Add a second size with an artifact of its own."""

    def widened(specs: Tree) -> Tree:
        def one(n: int) -> int:
            return samples.WIDTH + 8 if n == samples.WIDTH else n

        return {k: v | {"shape": [*map(one, v["shape"])]} for k, v in specs.items()}

    tree["schema_version"] = 3
    first, program = tree["artifacts"][0], copy.deepcopy(tree["sizes"][SIZE]["program"])
    second = copy.deepcopy(first) | {"id": f"unet.0.{WIDE}"}
    second["ports"] = {kind: widened(specs) for kind, specs in first["ports"].items()}
    tree["artifacts"].append(second)
    program["tensors"] = widened(program["tensors"])
    program["ops"][9]["artifact"] = second["id"]
    tree["sizes"][WIDE] = {
        "width": samples.WIDTH + 8,
        "height": samples.HEIGHT,
        "program": program,
    }
    return tree


PART = samples.ref("artifacts/unet.0.tflite", b"not really a model").model_dump()
PARTS = {"parts": [PART]}
PART_PATH = "artifacts[0].parts[0].path"
WIDE_OP = ("sizes", WIDE, "program", "ops", 9)
SIZES_CHANGES: list[tuple[str, tuple[Any, ...], Any, str | None]] = [
    # Of a manifest with two sizes.
    ("valid-sizes", ("licence",), "Apache-2.0", None),
    ("valid-sizes-with-parts", ("artifacts",), lambda found: [a | PARTS for a in found], None),
    ("sizes-two-parts", (*ARTIFACT, "parts"), [PART, PART], None),
    ("sizes-part-missing", (*ARTIFACT, "parts"), [PART | {"path": "artifacts/none"}], PART_PATH),
    ("sizes-part-outside", (*ARTIFACT, "parts"), [PART | {"path": "../x"}], PART_PATH),
    ("sizes-name", ("sizes", WIDE, "width"), samples.WIDTH, f"sizes.{WIDE}"),
    ("sizes-absurd", ("sizes", WIDE, "width"), 2**40, None),
    ("sizes-artifact-of-another", (*WIDE_OP, "artifact"), "unet.0", f"sizes.{WIDE}.program.ops[9]"),
    ("sizes-artifact-missing", (*WIDE_OP, "artifact"), "x", f"sizes.{WIDE}.program.ops[9]"),
    ("sizes-reference-twice", ("references",), [{"size": SIZE}], "references[0].size"),
    ("sizes-reference-of-none", ("references",), [{"size": "1x1"}], "references[0].size"),
]


def changed(tree: Tree, path: tuple[Any, ...], value: Any) -> Tree:
    node: Any = tree
    for part in path[:-1]:
        node = node[part]
    if value is DELETE:
        del node[path[-1]]
    else:
        node[path[-1]] = value(node[path[-1]]) if callable(value) else value
    return tree


MANIFEST_TEXTS = {
    "broken": '{"schema_version": 1,',
    "not-an-object": "[]",
    "empty": "",
    "key-twice": '{"schema_version": 1, "schema_version": 1}',
    "nan": '{"schema_version": 1, "target": NaN}',
}
JOB: Tree = {"protocol": 1, "bundle": "b", "size": SIZE}
FULL_JOB: Tree = {
    **JOB,
    "seed": 2**64 - 1,
    "inputs": {"prompt_embeds": {"path": "inputs.safetensors", "tensor": "0.prompt_embeds"}},
    "residency": "stream",
    "residency_by_artifact": {"unet.0": "resident"},
    "prefetch": False,
    "threads": 4,
    "cache": "cache",
    "warmup": 0,
    "iterations": 3,
    "min_seconds": 1.5,
    "precision": 0.02,
    "max_seconds": 60.0,
    "verify_hashes": False,
    "reset_peak": True,
    "output": "picture.raw",
    "expect": {"path": "reference.safetensors", "tensor": "picture"},
    "dump_calls": "calls.safetensors",
}
JOBS: dict[str, tuple[bool, Tree]] = {
    "valid-least": (True, JOB),
    "valid-full": (True, FULL_JOB),
    "valid-nulls": (
        True,
        {
            **JOB,
            "cache": None,
            "output": None,
            "dump_calls": None,
            "precision": None,
            "max_seconds": None,
            "memory_budget": None,
            "expect": None,
        },
    ),
    "valid-budget": (True, {**JOB, "memory_budget": 600_000_000}),
    "budget-zero": (False, {**JOB, "memory_budget": 0}),
    "budget-and-exceptions": (
        False,
        {**JOB, "memory_budget": 1, "residency_by_artifact": {"unet.0": "stream"}},
    ),
    "precision-zero": (False, {**JOB, "precision": 0}),
    "precision-over-one": (False, {**JOB, "precision": 1.5}),
    "max-seconds-negative": (False, {**JOB, "max_seconds": -1}),
    "expect-incomplete": (False, {**JOB, "expect": {"path": "x"}}),
    "newer": (False, {**JOB, "protocol": 2}),
    "no-bundle": (False, {"protocol": 1, "size": SIZE}),
    "seed-negative": (False, {**JOB, "seed": -1}),
    "seed-too-large": (False, {**JOB, "seed": 2**64}),
    "seed-text": (False, {**JOB, "seed": "1"}),
    "residency-unknown": (False, {**JOB, "residency": "swap"}),
    "threads-zero": (False, {**JOB, "threads": 0}),
    "iterations-zero": (False, {**JOB, "iterations": 0}),
    "warmup-negative": (False, {**JOB, "warmup": -1}),
    "unknown-field": (False, {**JOB, "surprise": 1}),
    "input-name": (False, {**JOB, "inputs": {"a/b": {"path": "x", "tensor": "y"}}}),
    "input-incomplete": (False, {**JOB, "inputs": {"a": {"path": "x"}}}),
}
EVENTS: dict[str, tuple[bool, Any]] = {
    "hello": (True, {"event": "hello", "t_ms": 0.1, "protocol": 1, "harness": "0.1.0", "pid": 7,
                     "engines": {"litert": "2.3.0"}, "platform": "linux-x86_64",
                     "base_rss_bytes": 5000000, "engine_library_bytes": None}),
    "hello-least": (True, {"event": "hello", "t_ms": 0, "protocol": 1, "harness": "0.1.0",
                           "pid": 7, "engines": {}, "platform": "ios-arm64"}),
    "hello-from-the-future": (True, {"event": "hello", "t_ms": 0.1, "protocol": 1,
                                     "harness": "9.0", "pid": 7, "engines": {},
                                     "platform": "linux-x86_64", "mood": "fine"}),
    "plan": (True, {"event": "plan", "t_ms": 5.0, "resident": ["unet.0"], "streamed": [],
                    "prefetch": False, "peak_bytes": 600000000, "budget_bytes": 700000000}),
    "load-units": (True, {"event": "load", "t_ms": 9.5, "artifact": "unet.0", "ms": 2.25,
                          "cache": "none", "units": {"npu": 30, "cpu": 2}}),
    "load": (True, {"event": "load", "t_ms": 5.5, "artifact": "unet.0", "ms": 2.25,
                    "cache": "hit"}),
    "iteration": (True, {"event": "iteration", "t_ms": 9.0, "index": 0, "kind": "first",
                         "total_ms": 4.5, "engine_ms": 4.0, "load_ms": 0.25,
                         "calls_ms": [1.5, 2.5]}),
    "memory": (True, {"event": "memory", "t_ms": 9.5, "phase": "end", "rss": 1, "peak_rss": 2,
                      "anon": 3, "file": 4, "swap": 0, "phys_footprint": None,
                      "phys_footprint_peak": None, "dma_buf": None, "activations": 5}),
    "thermal": (True, {"event": "thermal", "t_ms": 9.6, "status": None}),
    "output": (True, {"event": "output", "t_ms": 9.7, "role": "picture", "sha256": "0" * 64,
                      "shape": [1, 8, 16, 3], "dtype": "uint8", "file": None}),
    "output-compared": (True, {"event": "output", "t_ms": 9.7, "role": "picture",
                               "sha256": "0" * 64, "shape": [1, 8, 16, 3], "dtype": "uint8",
                               "psnr_db": 46.25}),
    "memory-warning": (True, {"event": "memory", "t_ms": 9.5, "phase": "warning"}),
    "error": (True, {"event": "error", "t_ms": 9.8, "code": "memory", "message": "out of \"it\""}),
    "done": (True, {"event": "done", "t_ms": 9.9, "iterations": 3}),
    "unknown": (False, {"event": "weather", "t_ms": 1.0}),
    "incomplete": (False, {"event": "done", "t_ms": 1.0}),
    "error-code-unknown": (False, {"event": "error", "t_ms": 1.0, "code": "x", "message": "y"}),
    "not-an-object": (False, [1]),
}  # fmt: skip


def programs() -> dict[str, tuple[Program, dict[str, Any], dict[str, Any]]]:
    """Return programs without calls, with their constants and inputs."""
    rng = np.random.default_rng(0)

    def numbers(*shape: int, scale: float = 1.0) -> Any:
        return (rng.standard_normal(shape) * scale).astype(np.float32)

    edges = np.array(
        [0.5, 1.5, 2.5, -0.5, -3.0, 254.5, 255.5, 1e9, -1e9, np.inf, -np.inf, np.nan], np.float32
    )
    bands = Program(
        inputs=(Input(name="x", role="latent"),),
        tensors={
            "x": spec(1, 7, 5, 12),
            **{f"band{i}": spec(1, n, 5, 12) for i, n in enumerate((3, 3, 1))},
            **{f"m{i}": spec(1, 3, 4) for i in range(3)},
            "mean": spec(1, 1, 1, 12),
            "rstd": spec(1, 1, 1, 12),
            "again": spec(1, 7, 5, 12),
        },
        ops=(
            *(
                Slice(x="x", axis=1, start=3 * i, length=n, out=f"band{i}")
                for i, n in enumerate((3, 3, 1))
            ),
            *(Moments(x=f"band{i}", groups=4, out=f"m{i}") for i in range(3)),
            Normalizer(moments=("m0", "m1", "m2"), eps=1e-6, mean="mean", rstd="rstd"),
            Concat(xs=("band0", "band1", "band2"), axis=1, out="again"),
        ),
        outputs={"mean": "mean", "rstd": "rstd", "again": "again"},
    )
    affine = Program(
        inputs=(Input(name="x", role="other"), Input(name="y", role="other")),
        tensors={"x": spec(5), "y": spec(5), "sum": spec(5), "zero": spec(5)},
        ops=(
            Affine(
                terms=(
                    Term(x="x", scale=0.1),
                    Term(x="y", scale=-0.3),
                    Term(x="c", scale=1 / 3),
                ),
                bias=1e-3,
                out="sum",
            ),
            Affine(terms=(Term(x="x", scale=-0.0),), out="zero"),
        ),
        outputs={"sum": "sum", "zero": "zero"},
    )
    rounding = Program(
        inputs=(Input(name="x", role="other"),),
        tensors={"x": spec(len(edges)), "bytes": spec(len(edges), dtype="uint8")},
        ops=(Affine(terms=(Term(x="x", scale=1.0),), out="bytes"),),
        outputs={"bytes": "bytes"},
    )
    dtypes = ("float32", "float16", "uint8", "int8", "int32")
    pads = Program(
        inputs=tuple(Input(name=d, role="other") for d in dtypes),
        tensors={
            **{d: spec(2, 3, dtype=d) for d in dtypes},
            **{f"{d}.p": spec(2, 6, dtype=d) for d in dtypes},
            **{f"{d}.s": spec(1, 6, dtype=d) for d in dtypes},
        },
        ops=(
            *(
                Pad(x=d, axis=1, before=1, after=2, value=v, out=f"{d}.p")
                for d, v in zip(dtypes, (0.1, 0.1, 300.0, -2.5, 3.5), strict=True)
            ),
            *(Slice(x=f"{d}.p", axis=0, start=1, length=1, out=f"{d}.s") for d in dtypes),
        ),
        outputs={d: f"{d}.s" for d in dtypes},
    )
    drawn = Program(
        inputs=(
            Input(name="a", role="noise", stream=0),
            Input(name="b", role="noise", stream=2**32 - 1),
        ),
        tensors={"a": spec(1, 3, 5, 1), "b": spec(1, 3, 5, 1), "ab": spec(1, 3, 5, 2)},
        ops=(Concat(xs=("a", "b"), axis=3, out="ab"),),
        outputs={"ab": "ab"},
    )
    half = Program(
        inputs=(Input(name="x", role="other"), Input(name="h", role="other")),
        tensors={
            "x": spec(len(HALF_EDGES)),
            "h": spec(2**16, dtype="float16"),
            "narrow": spec(len(HALF_EDGES), dtype="float16"),
            "wide": spec(2**16),
            "again": spec(2**16, dtype="float16"),
        },
        ops=(
            Affine(terms=(Term(x="x", scale=1.0),), out="narrow"),
            Affine(terms=(Term(x="h", scale=64.0), Term(x="h", scale=0.3)), bias=0.1, out="wide"),
            Affine(terms=(Term(x="h", scale=1.0),), out="again"),
        ),
        outputs={"narrow": "narrow", "wide": "wide", "again": "again"},
    )
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    large = numbers(1, 7, 5, 12, scale=100) + np.float32(1000)
    return {
        "bands": (bands, {}, {"x": large}),
        "affine": (
            affine,
            {"c": numbers(5, scale=1e6)},
            {"x": numbers(5, scale=1e8), "y": numbers(5)},
        ),
        "rounding": (rounding, {}, {"x": edges}),
        "pads": (pads, {}, {d: np.arange(6).reshape(2, 3).astype(d) for d in dtypes}),
        "noise": (drawn, {}, {}),
        # NaNs have many bits, and what arithmetic makes of them differs between processors.
        "halves": (half, {}, {"x": HALF_EDGES, "h": np.where(np.isnan(every), 0, every)}),
    }  # fmt: skip


HALF_EDGES = np.array(
    [0.0, -0.0, 1.0, 1.00048828125, 1.000488281250001, 1.00146484375, 65504.0, 65519.996, 65520.0,
     -1e9, np.inf, -np.inf, 6.103515625e-05, 6.1e-05, 5.960464477539063e-08, 2.9802322387695312e-08,
     2.98023224e-08, 2.99e-08, 8.940696716308594e-08, -1e-10, 0.1, -1234.567],
    np.float32,
)  # fmt: skip
"""Ties, subnormals and what leaves float16."""


SEED = 2**63 + 5
NOISE = [(0, 0), (1, 0), (0, 1), (2**64 - 1, 2**32 - 1), (0x0123456789ABCDEF, 77)]


VERSION = "0123456789abcdef" * 4
EMBEDS = np.array([[[0.0, 1.0, -1.5, 0.1], [65504.0, 6e-8, -0.25, 3.0]]], np.float32)
POOLED = np.array([[1.0, -2.0, 0.5]], np.float32)


def answer(datatype: oip.Datatype) -> bytes:
    """What a text server writes for one prompt of 4 tokens, by encoders that read 2."""
    tensors = {
        **oip.to_wire("prompt_embeds", EMBEDS, datatype),
        **oip.to_wire("pooled", POOLED, datatype),
        "tokens": np.array([[4, 4]], "<i4"),
    }
    names = {"<f4": "FP32", "<f2": "FP16", "|i1": "INT8", "<i4": "INT32"}
    outputs = [
        {
            "name": name,
            "shape": list(value.shape),
            "datatype": names[value.dtype.str],
            "parameters": {"binary_data_size": value.nbytes},
        }
        for name, value in tensors.items()
    ]
    head = {
        "id": "7",
        "model_name": "text",
        "model_version": VERSION,
        "outputs": outputs,
        "parameters": {"encoders_sha256": VERSION, "truncated": 1},
    }
    front = json.dumps(head, separators=(",", ":")).encode()
    return front + b"".join(v.tobytes() for v in tensors.values())


def travelled(value: Any, datatype: oip.Datatype) -> Any:
    found = oip.from_wire("x", oip.to_wire("x", value, datatype))
    assert found is not None
    return found.tolist()


def text_api() -> tuple[dict[str, bytes], list[Tree]]:
    """Requests and answers of the text API, and how long their JSON is."""
    asked, length = oip.write_request(["a robot"], datatype="FP16", request_id="7")
    out = {"text/request.bin": asked}
    listed: list[Tree] = [{"file": "text/request.bin", "json_length": length}]
    for datatype in oip.DATATYPES:
        name = f"text/answer-{datatype.lower()}.bin"
        out[name] = answer(datatype)
        end = out[name].rindex(b"}}") + 2
        listed.append(
            {
                "file": name,
                "json_length": end,
                "prompt_embeds": travelled(EMBEDS, datatype),
                "pooled": travelled(POOLED, datatype),
                "tokens": [[4, 4]],
            }
        )
    return out, listed


PACKAGE = "artifacts/unet.0.mlpackage"


def packages() -> tuple[Manifest, dict[str, bytes], bytes]:
    """Return a bundle with a package of Core ML, its files, and what the engine sees."""
    weights = f"{PACKAGE}/Data/com.apple.CoreML/weights/weight.bin"
    package = {
        f"{PACKAGE}/Manifest.json": b"{}\n",
        f"{PACKAGE}/Data/com.apple.CoreML/model.mlmodel": b"not really a model",
        weights: b"not really weights",
        # Files of the same content are one object on a phone.
        weights.replace("weight.bin", "again.bin"): b"not really weights",
    }
    manifest, files = samples.content(target="coreml", precision="fp16")
    first, *parts = (samples.ref(path, data) for path, data in package.items())
    changes = {"target": "coreml", "engine": "coreml", "file": first, "parts": tuple(parts)}
    artifact = manifest.artifacts[0].model_copy(update=changes)
    # Core ML names tensors by their position among the ports.
    features: dict[str, Any] = {}

    def call(name: str, args: Any) -> dict[str, Any]:
        results = samples.call(name, args)
        features.update({f"in{i}": args[port] for i, port in enumerate(artifact.ports.inputs)})
        features.update({f"out{i}": results[port] for i, port in enumerate(artifact.ports.outputs)})
        return results

    inputs = {k: v[None] for k, v in samples.embeddings().items()}
    execute(samples.program(), samples.CONSTANTS, inputs, call, seed=5)
    stored = load(files["reference.safetensors"]) | {"call.0.y": features["out0"]}
    del files["artifacts/unet.0.tflite"]
    files |= package | {"reference.safetensors": save(stored)}
    assert manifest.reference is not None
    file = samples.ref("reference.safetensors", files["reference.safetensors"])
    reference = manifest.reference.model_copy(update={"file": file})
    manifest = manifest.model_copy(update={"artifacts": (artifact,), "reference": reference})
    return manifest, files, save({k: np.ascontiguousarray(v) for k, v in features.items()})


def text(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def memory_plans() -> list[Tree]:
    """Return cases of the rule that decides what stays within a memory budget."""
    rng = random.Random(6)
    cases = []
    for _ in range(25):
        n = rng.randint(1, 12)
        artifacts = [
            {
                "id": f"a{i}",
                # Few different sizes, so that ties are decided too.
                "bytes": rng.choice([0, 1_000_000, 17_000_001, 40_000_000, 64_000_000]),
                "workspace": rng.choice([0, 1 << 20, 22 << 20]),
            }
            for i in range(n)
        ]
        calls = [*range(n), *(rng.randrange(n) for _ in range(rng.randint(0, 8)))]
        case = {
            "activations": rng.randrange(50_000_000),
            "packed": rng.random() < 0.7,
            "artifacts": artifacts,
            "calls": calls,
        }
        weights = [memory_plan.Weights(**a) for a in artifacts]

        def answer(budget: int, case: Tree = case, weights: Any = weights) -> Tree:
            try:
                plan = memory_plan.plan(
                    budget, case["activations"], case["packed"], weights, case["calls"]
                )
            except UsageError as error:
                return {"budget": budget, **case, "error": error.message}
            answered = plan.to_json()
            del answered["budget_bytes"]
            return {"budget": budget, **case, "plan": answered}

        total = sum(a["bytes"] for a in artifacts)
        cases += [answer(rng.randrange(24_000_000, 100_000_000 + 2 * total)) for _ in range(3)]
    return cases


def files() -> dict[str, bytes]:
    """Return every golden file by its path."""
    manifest, content = samples.content()
    out = {f"bundle/{name}": data for name, data in content.items()}
    out["bundle/manifest.json"] = bundle.manifest_bytes(manifest)
    index: dict[str, Any] = {
        "version": 1,
        "manifests": [],
        "sizes_manifests": [],
        "jobs": [],
        "events": [],
        "programs": [],
        "half_programs": [],
    }
    for name, path, value, field in CHANGES:
        file = f"manifests/{name}.json"
        out[file] = text(changed(json.loads(out["bundle/manifest.json"]), path, value))
        valid = name.startswith("valid")
        named = None if valid else field or bundle.field_path(path)
        # A runtime reads neither text nor reference, so it may run what they spoil.
        runs = valid or name in ("text-width", "reference-size")
        index["manifests"].append({"file": file, "valid": valid, "runs": runs, "field": named})
    for name, path, value, field in SIZES_CHANGES:
        file = f"manifests/{name}.json"
        tree = several_sizes(json.loads(out["bundle/manifest.json"]))
        tree["references"] = []
        tree = changed(tree, path, value)
        tree["references"] = [tree["reference"] | one for one in tree["references"]]
        out[file] = text(tree)
        valid = name.startswith("valid")
        named = None if valid else field or bundle.field_path(path)
        # That file continues nothing, since it does not begin where a page ends.
        runs = (valid and name != "valid-sizes-with-parts") or path == ("references",)
        index["sizes_manifests"].append(
            {"file": file, "valid": valid, "runs": runs, "field": named}
        )
    for name, broken in MANIFEST_TEXTS.items():
        path = f"manifests/{name}.json"
        out[path] = broken.encode()
        index["manifests"].append({"file": path, "valid": False, "runs": False, "field": None})
    for kind, cases in (("jobs", JOBS), ("events", EVENTS)):
        for name, (valid, tree) in cases.items():
            path = f"{kind}/{name}.json"
            out[path] = (json.dumps(tree) + "\n").encode()
            index[kind].append({"file": path, "valid": valid})
    for name, (program, constants, inputs) in programs().items():
        results = execute(program, constants, inputs, _no_call, seed=SEED)
        tensors = {
            **{f"input.{k}": v for k, v in inputs.items()},
            **{f"constant.{k}": v for k, v in constants.items()},
            **{f"output.{k}": np.ascontiguousarray(v) for k, v in results.items()},
        }
        out[f"programs/{name}.json"] = text(program.model_dump(mode="json"))
        out[f"programs/{name}.safetensors"] = save(tensors)
        # Apart, since these want manifests of version 2.
        index["half_programs" if halves(program) else "programs"].append(
            {
                "file": f"programs/{name}.json",
                "tensors": f"programs/{name}.safetensors",
                "seed": SEED,
            }
        )
    plans = ",\n".join(json.dumps(case) for case in memory_plans())
    out["memory_plans.json"] = f"[\n{plans}\n]\n".encode()
    vectors = []
    for seed, stream in NOISE:
        values = noise.normal(seed, (100_000,), stream).astype("<f4")
        vectors.append(
            {
                "seed": seed,
                "stream": stream,
                "first": [f"{v:08x}" for v in values[:8].view("<u4")],
                "count": len(values),
                "sha256": hashlib.sha256(values.tobytes()).hexdigest(),
            }
        )
    out["noise.json"] = text(vectors)
    index["noise"] = "noise.json"
    index["bundle"] = {"folder": "bundle", "sha256": manifest.sha256}
    packed, content, seen = packages()
    out |= {f"packages/{name}": data for name, data in content.items()}
    out["packages/manifest.json"] = bundle.manifest_bytes(packed)
    out["features.safetensors"] = seen
    index["packages"] = {
        "folder": "packages",
        "sha256": packed.sha256,
        "package": PACKAGE,
        "features": "features.safetensors",
        "seed": 5,
    }
    made, index["text"] = text_api()
    out |= made
    out["index.json"] = text(index)
    return out


def _no_call(artifact_id: str, args: Any) -> Any:
    raise AssertionError(artifact_id)


def main(folder: Path) -> None:
    for path, data in files().items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
