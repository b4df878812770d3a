"""Small manifests, bundles and programs that several tests use."""

from __future__ import annotations

import hashlib
import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load, save

from handheld import bundle as bundles
from handheld.bundle import Bundle
from handheld.execute import execute
from handheld.manifest import (
    Artifact,
    FileRef,
    Manifest,
    ModelInfo,
    Prefetched,
    Reference,
    Size,
    TextInfo,
)
from handheld.program import (
    Affine,
    Call,
    Concat,
    Input,
    Moments,
    Normalizer,
    Pad,
    Ports,
    Program,
    Slice,
    TensorSpec,
    Term,
)

PROMPT = "a purple horned creature"
WIDTH, HEIGHT, TOKENS = 16, 8, 4
CONSTANTS = {"time": np.array([[[[0.1, 0.2, 0.3]]]], np.float32)}


def spec(*shape: int, dtype: Any = "float32") -> TensorSpec:
    return TensorSpec(shape=shape, dtype=dtype)


def ref(path: str, data: bytes) -> FileRef:
    return FileRef(path=path, sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))


def program() -> Program:
    """Every operation once: noise -> slice, pad, concat, statistics, call -> picture."""
    shape = (1, HEIGHT, WIDTH, 3)
    return Program(
        inputs=(
            Input(name="noise", role="noise", stream=7),
            Input(name="prompt_embeds", role="prompt_embeds"),
            Input(name="pooled", role="pooled"),
        ),
        tensors={
            "noise": spec(*shape),
            "prompt_embeds": spec(1, TOKENS, 6),
            "pooled": spec(1, 5),
            "top": spec(1, HEIGHT // 2, WIDTH, 3),
            "bottom": spec(1, HEIGHT // 2, WIDTH, 3),
            "top.m": spec(1, 3, 3),
            "bottom.m": spec(1, 3, 3),
            "mean": spec(1, 1, 1, 3),
            "rstd": spec(1, 1, 1, 3),
            "padded": spec(1, HEIGHT // 2 + 1, WIDTH, 3),
            "cut": spec(1, HEIGHT // 2, WIDTH, 3),
            "joined": spec(*shape),
            "mixed": spec(*shape),
            "drawn": spec(*shape),
            "picture": spec(*shape, dtype="uint8"),
        },
        ops=(
            Slice(x="noise", axis=1, start=0, length=HEIGHT // 2, out="top"),
            Slice(x="noise", axis=1, start=HEIGHT // 2, length=HEIGHT // 2, out="bottom"),
            Moments(x="top", groups=3, out="top.m"),
            Moments(x="bottom", groups=3, out="bottom.m"),
            Normalizer(moments=("top.m", "bottom.m"), eps=1e-6, mean="mean", rstd="rstd"),
            Pad(x="bottom", axis=1, before=1, value=0.5, out="padded"),
            Slice(x="padded", axis=1, start=1, length=HEIGHT // 2, out="cut"),
            Concat(xs=("top", "cut"), axis=1, out="joined"),
            Affine(
                terms=(Term(x="joined", scale=0.7), Term(x="noise", scale=-0.1)),
                bias=0.05,
                out="mixed",
            ),
            Call(
                artifact="unet.0",
                args={
                    "x": "mixed",
                    "mean": "mean",
                    "rstd": "rstd",
                    "time": "time",
                    "text": "prompt_embeds",
                    "pooled": "pooled",
                },
                results={"y": "drawn"},
            ),
            Affine(terms=(Term(x="drawn", scale=127.5),), bias=127.5, out="picture"),
        ),
        outputs={"picture": "picture"},
    )


def ports() -> Ports:
    shape = (1, HEIGHT, WIDTH, 3)
    return Ports(
        inputs={
            "x": spec(*shape),
            "mean": spec(1, 1, 1, 3),
            "rstd": spec(1, 1, 1, 3),
            "time": spec(1, 1, 1, 3),
            "text": spec(1, TOKENS, 6),
            "pooled": spec(1, 5),
        },
        outputs={"y": spec(*shape)},
    )


def call(artifact_id: str, args: Any) -> dict[str, Any]:
    """What the artifact of the sample computes."""
    assert artifact_id == "unet.0"
    y = (args["x"] - args["mean"]) * args["rstd"] + args["time"]
    shift = args["text"].mean(dtype=np.float32) + args["pooled"].mean(dtype=np.float32)
    return {"y": (y * np.float32(0.3) + shift).astype(np.float32)}


def embeddings(index: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(index)
    return {
        "prompt_embeds": rng.standard_normal((TOKENS, 6)).astype(np.float32) * 0.1,
        "pooled": rng.standard_normal(5).astype(np.float32) * 0.1,
    }


def picture() -> Any:
    """What the sample draws with its prompt and seed 5."""
    inputs = {k: v[None] for k, v in embeddings().items()}
    return execute(program(), CONSTANTS, inputs, call, seed=5)["picture"]


def content(**changes: Any) -> tuple[Manifest, dict[str, bytes]]:
    """Return a manifest and its files; ``changes`` replace manifest fields."""
    constants, text = CONSTANTS, embeddings()
    reference = {f"input.{k}": v[None] for k, v in text.items()}
    files = {
        "artifacts/unet.0.tflite": b"not really a model",
        "constants.safetensors": save(constants),
        "reference.safetensors": save({**reference, "picture": picture()}),
        "prompts.safetensors": save({f"0.{k}": v for k, v in text.items()}),
    }
    refs = {path: ref(path, data) for path, data in files.items()}
    values: dict[str, Any] = {
        "model": ModelInfo(
            id="sample", checkpoint_sha256="0" * 64, steps=1, sampler="one-step", guidance=0.0
        ),
        "target": "litert-cpu",
        "precision": "int8",
        "sizes": {
            f"{WIDTH}x{HEIGHT}": Size(width=WIDTH, height=HEIGHT, program=program()),
        },
        "artifacts": (
            Artifact(
                id="unet.0",
                target="litert-cpu",
                engine="litert",
                engine_version="2.3.0",
                file=refs["artifacts/unet.0.tflite"],
                ports=ports(),
                units=("conv_in",),
                component="unet",
            ),
        ),
        "constants": refs["constants.safetensors"],
        "constant_specs": {"time": spec(1, 1, 1, 3)},
        "text": TextInfo(
            encoders_sha256="1" * 64,
            tokens=TOKENS,
            width=6,
            pooled_width=5,
            prefetched=Prefetched(file=refs["prompts.safetensors"], prompts=(PROMPT,)),
        ),
        "reference": Reference(
            file=refs["reference.safetensors"], size=f"{WIDTH}x{HEIGHT}", seed=5, prompt=PROMPT
        ),
        "licence": "Apache-2.0",
    }
    return Manifest(**{**values, **changes}), files


def write_bundle(path: Path, **changes: Any) -> Bundle:
    manifest, files = content(**changes)
    written = bundles.write(manifest, files, path)
    assert written is not None
    return written


def write_bundle_with_calls(path: Path) -> Bundle:
    """Write a bundle whose reference holds what its call gives, if not what the sample's gives."""
    manifest, files = content()
    shape = (1, HEIGHT, WIDTH, 3)
    stored = load(files["reference.safetensors"]) | {"call.0.y": np.ones(shape, np.float32)}
    files["reference.safetensors"] = save(stored)
    assert manifest.reference is not None
    file = ref("reference.safetensors", files["reference.safetensors"])
    reference = manifest.reference.model_copy(update={"file": file})
    written = bundles.write(manifest.model_copy(update={"reference": reference}), files, path)
    assert written is not None
    return written


def add_size(folder: Path, verification: dict[str, float]) -> None:
    """Make a bundle draw 24x8, too, with a reference; its artifacts have a part in common."""
    several_sizes = runpy.run_path(str(Path(__file__).parent / "golden" / "make.py"))
    wide = bundles.load_tensors(folder / "reference.safetensors")
    wide["picture"] = np.zeros((1, HEIGHT, WIDTH + 8, 3), np.uint8)
    data = save(wide)
    (folder / "reference.24x8.safetensors").write_bytes(data)
    (folder / "artifacts" / "weights").write_bytes(b"shared")
    path = folder / "manifest.json"
    tree = several_sizes["several_sizes"](json.loads(path.read_text()))
    part = ref("artifacts/weights", b"shared").model_dump()
    for artifact in tree["artifacts"]:
        artifact["parts"] = [part]
    file = ref("reference.24x8.safetensors", data).model_dump()
    more = {"file": file, "size": "24x8", "verification": verification}
    tree["references"] = [tree["reference"] | more]
    path.write_text(json.dumps(tree))
