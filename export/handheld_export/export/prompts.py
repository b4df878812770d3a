"""Prompts of a bundle, encoded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from handheld.errors import CheckpointError
from handheld.files import sha256_file
from handheld.manifest import FileRef, Prefetched, TextInfo
from handheld.program import Program
from handheld_export.export.plan import Plan
from handheld_export.targets.base import Array


@dataclass(frozen=True, eq=False)
class Texts:
    """Prompts, what the manifest says of them, and what the program takes."""

    prompts: tuple[str, ...]
    info: TextInfo
    inputs: list[dict[str, Array]]
    """Program inputs of each prompt but the noise."""


def encode(plan: Plan, work: Path) -> Texts:
    """Encode the prompts of a bundle into ``prompts.safetensors`` below ``work``.

    A checkpoint without text encoders gets one prompt of random numbers.

    Raises
    ------
    CheckpointError
        If prompts are asked for and cannot be encoded, or the encoders are not this U-Net's.
    """
    from handheld_export.text import LocalTextEncoder

    graph = next(s for line, s, _ in plan.segments if line == "unet").graph
    _, tokens, width = graph.shapes["context"]
    pooled_width = next(
        (s.graph.shapes["pooled"][1] for line, s, _ in plan.segments if line == "embedding"), None
    )
    wanted = plan.options.prompts or tuple(plan.checkpoint.settings.get("prompts") or ())
    try:
        encoder = LocalTextEncoder(plan.checkpoint.path)
    except CheckpointError:
        if plan.options.prompts:
            raise
        generator = np.random.default_rng(0)
        shapes: dict[str, tuple[int, ...]] = {"prompt_embeds": (1, tokens, width)}
        if pooled_width:
            shapes["pooled"] = (1, pooled_width)
        values = {n: generator.standard_normal(s, dtype=np.float32) for n, s in shapes.items()}
        zeros = {f"negative_{n}": np.zeros_like(v) for n, v in values.items()}
        info = TextInfo(tokens=tokens, width=width, pooled_width=pooled_width)
        return Texts((), info, [_only(plan.program, values | zeros)])
    prompts = tuple(dict.fromkeys(wanted or ("a picture",)))
    embeddings = encoder.encode([*prompts, ""])
    if embeddings[0].prompt_embeds.shape != (tokens, width):
        raise CheckpointError(
            f"text encoders give {embeddings[0].prompt_embeds.shape}, "
            f"the U-Net takes {(tokens, width)}",
            path=plan.checkpoint.path,
        )
    stored: dict[str, Array] = {}
    inputs = []
    for i, item in enumerate(embeddings):
        stored[f"{i}.prompt_embeds"] = item.prompt_embeds
        if item.pooled is not None:
            stored[f"{i}.pooled"] = item.pooled
    negative = embeddings[-1]
    for item in embeddings[:-1]:
        values = {"prompt_embeds": item.prompt_embeds[None]}
        values["negative_prompt_embeds"] = negative.prompt_embeds[None]
        if item.pooled is not None and negative.pooled is not None:
            values["pooled"] = item.pooled[None]
            values["negative_pooled"] = negative.pooled[None]
        inputs.append(_only(plan.program, values))
    save_file(stored, work / "prompts.safetensors")
    info = TextInfo(
        encoders_sha256=encoder.encoders_sha256,
        tokens=tokens,
        width=width,
        pooled_width=pooled_width,
        prefetched=Prefetched(
            file=file_ref(work / "prompts.safetensors", "prompts.safetensors"),
            prompts=(*prompts, ""),
        ),
    )
    return Texts(prompts, info, inputs)


def _only(program: Program, values: Mapping[str, Array]) -> dict[str, Array]:
    names = {i.name for i in program.inputs}
    return {n: np.ascontiguousarray(v) for n, v in values.items() if n in names}


def file_ref(path: Path, name: str) -> FileRef:
    """Describe a file of a bundle that is at ``path`` now."""
    return FileRef(path=name, sha256=sha256_file(path), bytes=path.stat().st_size)
