"""The run of a program in torch that artifacts are held against."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from handheld import noise
from handheld.errors import CheckpointError
from handheld.execute import execute
from handheld.precision import find as find_precision
from handheld.program import Call, decoded
from handheld_export import lowering
from handheld_export.assemble import LATENT
from handheld_export.export.plan import Plan, tokens_of
from handheld_export.export.prompts import Texts
from handheld_export.quantization import ActivationRange
from handheld_export.targets.base import Array
from handheld_export.torch_artifacts import TorchArtifacts, decode

_CALIBRATION_RUNS = 3
SAMPLES = "samples"


@dataclass(frozen=True, eq=False)
class Result:
    """What a run of the program gave."""

    picture: NDArray[np.uint8]
    """uint8 [1, H, W, 3]"""
    calls: list[Mapping[str, Array]]
    """Results of the calls, by port; only the last one's unless all were asked for."""
    decoded: Array
    """What the decoder gave, float32 [1, H, W, 3]."""
    latent: Array
    """What it was given, float32 [1, h, w, C]."""


@dataclass(frozen=True, eq=False)
class Sized:
    """What is known of one size on the way to a bundle."""

    plan: Plan
    work: Path
    reference: Result
    ranges: dict[str, ActivationRange]


def run_reference(
    plan: Plan, texts: Texts, work: Path, keep: int
) -> tuple[Result, dict[str, ActivationRange]]:
    """Draw the reference picture in torch, and what else a target wants of such runs.

    It leaves ``reference.safetensors``, an example call of every segment, and samples where the
    target calibrates on them, below ``work``.

    Parameters
    ----------
    keep : int
        Bytes up to which float32 weights stay in memory between calls.

    Returns
    -------
    result : Result
    ranges : dict of layer to ActivationRange
        The student's own, or those that were seen.

    Raises
    ------
    CheckpointError
        If the picture has values that are not finite.
    """
    pairs = [(s, c) for _, s, c in plan.segments]
    student_ranges = plan.checkpoint.unet.activation_ranges | plan.checkpoint.vae.activation_ranges
    precision = find_precision(plan.options.precision)
    wanted = plan.options.calibrate or plan.target.needs_ranges
    observe = wanted and precision.other is not None and not student_ranges
    artifacts = TorchArtifacts(pairs, observe=observe, keep=keep)
    middle = {s.id: 0 for s, _ in pairs}
    calls = len(plan.steps) * (1 if plan.guidance == 1.0 else 2)
    middle |= {s.id: calls // 2 for line, s, _ in plan.segments if line == "unet"}
    examples = work / "examples"
    examples.mkdir()
    artifacts.save_examples(examples, middle)
    samples = sampled(plan)
    if samples:
        artifacts.save_samples(work / SAMPLES, samples[0])
    result = run_program(
        plan,
        artifacts,
        texts.inputs[0],
        plan.options.seed,
        keep_calls=plan.options.references,
    )
    artifacts.stop_examples()
    for i in range(1, max(len(samples), 1 + _CALIBRATION_RUNS if observe else 0)):
        if samples:
            artifacts.save_samples(work / SAMPLES, samples[i])
        inputs = texts.inputs[i % len(texts.inputs)]
        run_program(plan, artifacts, inputs, plan.options.seed + i)
    artifacts.close()
    if plan.bands is not None:
        # Bands are a way to run the decoder, so they are measured, not taken as the truth.
        whole = lowering.lines(plan.checkpoint, plan.latent, tokens_of(plan.checkpoint)).cut(
            "decoder", plan.target, plan.options.precision
        )
        picture, values = decode(whole, plan.checkpoint.vae, result.latent)
        result = replace(result, picture=picture, decoded=values)
    if not np.isfinite(result.decoded).all():
        raise CheckpointError(
            "the reference picture has values that are not finite",
            path=plan.checkpoint.path,
            remedy="the weights overflow; check the checkpoint in diffusers",
        )
    drawn = {
        i.name: noise.normal(plan.options.seed, plan.program.tensors[i.name].shape, i.stream)
        for i in plan.program.inputs
        if i.role == "noise"
    }
    stored = {f"input.{n}": v for n, v in (drawn | texts.inputs[0]).items()}
    stored["picture"] = result.picture
    last = len(result.calls) - 1
    for i, results in enumerate(result.calls):
        if plan.options.references or i == last:
            stored |= {f"call.{i}.{port}": v for port, v in results.items()}
    save_file(stored, work / "reference.safetensors")
    return result, student_ranges or artifacts.ranges


def sampled(plan: Plan) -> list[dict[str, frozenset[int]]]:
    """Return the calls of each run that the target calibrates on, first and last included.

    One run draws one picture. There are as many as the U-Net takes to give its samples: 16 of a
    model of one step. The decoder is called once a picture, and gives one sample of each.
    """
    most = plan.target.samples
    quantized = plan.options.precision not in ("fp32", "fp16")
    coded = plan.target.codes_on_grids and plan.checkpoint.unet.quantized
    if not (most and (quantized or coded)):
        return []
    counts = Counter(op.artifact for op in plan.program.ops if isinstance(op, Call))
    runs = max(1 + _CALIBRATION_RUNS, -(-most // max(counts.values())))
    spread = {
        artifact: [round(i * (count - 1) / max(1, most - 1)) for i in range(most)]
        for artifact, count in counts.items()
    }
    return [{a: frozenset(calls[run::runs]) for a, calls in spread.items()} for run in range(runs)]


def run_program(
    plan: Plan,
    call: Callable[[str, Mapping[str, Array]], Mapping[str, Array]],
    inputs: Mapping[str, Array],
    seed: int,
    *,
    keep_calls: bool = False,
) -> Result:
    """Run a program with whatever computes its artifacts."""
    calls: list[Mapping[str, Array]] = []

    def watched(artifact: str, args: Mapping[str, Array]) -> Mapping[str, Array]:
        results = call(artifact, args)
        if calls and not keep_calls:
            calls[-1] = {}
        calls.append(results)
        return results

    watched_too = {"decoded": decoded(plan.program), "latent": LATENT}
    program = plan.program.model_copy(update={"outputs": plan.program.outputs | watched_too})
    outputs = execute(program, plan.constants, inputs, watched, seed=seed)
    return Result(
        cast(NDArray[np.uint8], outputs["picture"]), calls, outputs["decoded"], outputs["latent"]
    )
