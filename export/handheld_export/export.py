"""From a checkpoint to a verified bundle.

The steps: write the program, run it once in torch (this gives reference results, examples
and activation ranges), lower each segment in worker processes or take it from the cache,
run the program again with the artifacts, and pack. A second export of the same thing finds
its record in the cache and only packs.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import save_file

from handheld import bundle, noise
from handheld.archive import check_replaceable
from handheld.counting import count_decoder, count_unet
from handheld.errors import CheckpointError, OutputError, TargetError, UsageError
from handheld.execute import execute
from handheld.files import cache_root, output_errors, sha256_file
from handheld.manifest import (
    MOST_SIZES,
    Artifact,
    FileRef,
    Manifest,
    ModelInfo,
    Prefetched,
    Provenance,
    Reference,
    Size,
    SizeReference,
    TextInfo,
    Verification,
)
from handheld.precision import find as find_precision
from handheld.program import MOST_OPS, Call, Program, TensorSpec, check, decoded, halves, renamed
from handheld_export import bands, lowering, measure, sampling, targets
from handheld_export.assemble import LATENT, Draft, assemble, time_embeddings, time_ids
from handheld_export.checkpoint import Checkpoint, Component, read_json
from handheld_export.memory import Budget, need, trim
from handheld_export.quantization import ActivationRange
from handheld_export.reference import TorchArtifacts, decode
from handheld_export.segments import Segment
from handheld_export.targets.base import Target

Array = NDArray[Any]
_STUDENT_WEIGHTS = 500_000_000
_CALIBRATION_RUNS = 3
_REPEATED = 3
"""Segments of one structure from which on converting it twice for all of them pays."""
_IMPORTED_ONCE = ["handheld_export.lowering", "handheld_export.rewrites"]
"""What the server that workers are forked from imports; seconds that each would take of its own."""
_KEEP = 2_000_000_000
"""Bytes up to which a program's float32 weights stay in memory between its calls."""
_SAMPLES = "samples"


@dataclass(frozen=True)
class Options:
    """What to export and how.

    Parameters
    ----------
    target, precision : str
    sizes : tuple of (int, int)
        Width and height of pictures in pixels; the first is drawn by default. None at all takes
        the checkpoint's own size.
    sampler, spacing : str or None
    steps : int or None
    timesteps : tuple of int or None
        Explicit timesteps instead of ``steps`` and ``spacing``.
    guidance : float or None
        1 is none.
    prompts : tuple of str or None
        Prefetched into the bundle; the first one makes the reference picture.
    seed : int
        Of the reference picture.
    references : bool
        Let the reference results of every call travel in the bundle.
    calibrate : bool
        Fix the activation grids of int8 convolutions by calibration, where the student has
        no ranges. Without it XNNPACK finds a grid for every picture, which is more accurate.
    decoder_bands : float, 'auto' or None
        Decode in bands of rows whose largest float32 tensor has this many MB (10^6 bytes); None
        decodes whole pictures; 'auto' takes what :mod:`handheld.banding` chooses for each size, if
        the target draws bands. See :mod:`handheld_export.bands`.
    """

    target: str
    precision: str
    sizes: tuple[tuple[int, int], ...] = ()
    sampler: str | None = None
    steps: int | None = None
    spacing: str | None = None
    timesteps: tuple[int, ...] | None = None
    guidance: float | None = None
    prompts: tuple[str, ...] | None = None
    seed: int = 0
    references: bool = False
    calibrate: bool = False
    decoder_bands: lowering.Bands = "auto"


@dataclass
class Progress:
    """Told how an export goes on; the command line draws it."""

    stage: Callable[[str], None] = field(default=lambda _: None)
    planned: Callable[[int, int], None] = field(default=lambda count, weights: None)
    """Number of segments, counted at each size, and their weights."""
    done: Callable[[str, int, dict[str, Any] | None], None] = field(
        default=lambda segment, weights, meta: None
    )
    """Segment id, its weights, and ``meta.json`` (None if it came from the cache)."""


@dataclass(frozen=True, eq=False)
class _Plan:
    checkpoint: Checkpoint
    options: Options
    target: Target
    size: tuple[int, int]
    latent: tuple[int, int]
    sampler: str
    steps: list[sampling.Step]
    guidance: float
    segments: list[tuple[str, Segment, Component]]
    """Line, segment, component, in program order."""
    bands: float | None
    """MB of the decoder's bands."""
    program: Program
    constants: dict[str, Array]

    @property
    def name(self) -> str:
        """Key of the size."""
        return f"{self.size[1]}x{self.size[0]}"


@dataclass(frozen=True, eq=False)
class _Sized:
    """What is known of one size on the way to a bundle."""

    plan: _Plan
    work: Path
    reference: _Result
    ranges: dict[str, ActivationRange]


@dataclass(frozen=True)
class _Packed:
    """An artifact of the bundle and where its files come from."""

    segment: str
    key: str
    """Of the cache entry with its figures."""
    files: tuple[tuple[FileRef, Path], ...]
    """In the bundle, and where that is below the cache's folder; first the one engines open."""


def export(
    checkpoint: Checkpoint,
    options: Options,
    output: Path,
    *,
    jobs: int | None = None,
    memory: int | None = None,
    progress: Progress | None = None,
    use_cache: bool = True,
) -> Manifest:
    """Export a checkpoint to a bundle.

    Parameters
    ----------
    checkpoint : Checkpoint
    options : Options
    output : Path
        The bundle's folder. An existing bundle there is replaced.
    jobs : int, optional
        Most worker processes; by default as many as cores.
    memory : int, optional
        MB (10^6 bytes) that all processes together should stay below; by default a part of what
        is free. Segments are lowered beside each other while that leaves room.
    progress : Progress, optional
    use_cache : bool
        False lowers everything afresh.

    Returns
    -------
    Manifest

    Raises
    ------
    CheckpointError, TargetError, UsageError, OutputError
    """
    progress = progress or Progress()
    check_replaceable(output, bundle.KIND)
    if options.target not in targets.names():
        targets.find(options.target)
    find_precision(options.precision)
    root = cache_root()
    progress.stage("reading the checkpoint")
    key = _export_key(checkpoint, options)
    record = root / "exports" / key
    if use_cache and (manifest := _recorded(record, root)) is not None:
        for artifact in manifest.artifacts:
            progress.done(artifact.id, sum(artifact.weights.values()), None)
        progress.stage("packing")
        _pack(manifest, record, root, output)
        return manifest

    plans = _plans(checkpoint, options)
    scratch = root / "work"
    with output_errors(scratch):
        scratch.mkdir(parents=True, exist_ok=True)
    lowering.sweep(scratch)
    with (
        _full_disks(root),
        tempfile.TemporaryDirectory(prefix=f"tmp-{os.getpid()}-", dir=scratch) as folder,
    ):
        work = Path(folder)
        manifest, sources = _export(plans, work, root, jobs, memory, progress, use_cache)
        _remember(manifest, sources, work, record)
    progress.stage("packing")
    _pack(manifest, record, root, output)
    return manifest


@contextmanager
def _full_disks(root: Path) -> Iterator[None]:
    """Say so where the cache cannot be written."""
    try:
        yield
    except (OSError, SafetensorError) as e:
        full = isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
        if full or "o space left" in str(e):
            raise OutputError(
                "cannot write: the disk is full",
                path=root,
                remedy="free some space or set XDG_CACHE_HOME",
            ) from e
        raise


def plan_segments(checkpoint: Checkpoint, options: Options) -> dict[str, Any]:
    """Say how a checkpoint would be cut, without lowering anything."""
    plan, *more = _plans(checkpoint, options)
    return {
        "sizes": [p.name for p in (plan, *more)],
        "steps": len(plan.steps),
        "sampler": plan.sampler,
        "guidance": plan.guidance,
        "segments": [
            {"id": s.id, "units": len(s.units), "weights": s.weights} for _, s, _ in plan.segments
        ],
    }


def _export(
    plans: list[_Plan],
    work: Path,
    root: Path,
    jobs: int | None,
    memory: int | None,
    progress: Progress,
    use_cache: bool,
) -> tuple[Manifest, dict[str, str]]:
    needs = [need for plan in plans for need in _needs(plan).values()]
    Budget.of(memory).workers(needs, 1)  # refused now, not in minutes
    progress.stage("encoding prompts")
    texts = _texts(plans[0], work)
    keep = _KEEP if memory is None else min(_KEEP, memory * 10**6 // 4)
    sized = []
    for plan in plans:
        progress.stage(f"running the program in torch at {plan.name}")
        folder = work / plan.name
        folder.mkdir()
        sized.append(_Sized(plan, folder, *_reference(plan, texts, folder, keep)))
        trim()
    progress.stage("lowering")
    keys, metas = _lower_all(sized, root, jobs, memory, progress, use_cache)
    progress.stage("sharing weights between sizes")
    packed = _packed(plans, keys, metas, root)
    called = _called(plans, keys, packed)
    verifications = []
    for one, names in zip(sized, called, strict=True):
        progress.stage(f"verifying end to end at {one.plan.name}")
        paths = {s: [root / path for _, path in packed[n].files] for s, n in names.items()}
        verifications.append(_verify(one, texts, paths, keep))
    manifest = _manifest(sized, texts, metas, packed, called, verifications, work)
    sources = {ref.path: str(path) for one in packed.values() for ref, path in one.files}
    return manifest, sources


def _export_key(checkpoint: Checkpoint, options: Options) -> str:
    from handheld_export.text import encoders_sha256

    essence = {
        "checkpoint": checkpoint.sha256,
        "path": str(checkpoint.path.resolve()),
        "text": encoders_sha256(checkpoint.path) if checkpoint.path.is_dir() else None,
        "options": asdict(options),
        "tools": lowering.tool_versions(),
        "source": lowering.source_sha256(),
    }
    return hashlib.sha256(json.dumps(essence, sort_keys=True).encode()).hexdigest()


# --- planning ----------------------------------------------------------------------------


def _plans(checkpoint: Checkpoint, options: Options) -> list[_Plan]:
    """Plan each size, the default one first."""
    for size, count in Counter(options.sizes).items():
        if count > 1:
            raise UsageError(f"the size {size[0]}x{size[1]} is given twice")
    if len(options.sizes) > MOST_SIZES:
        raise UsageError(f"{len(options.sizes)} sizes are given, a bundle holds {MOST_SIZES}")
    factor = _downsampling(checkpoint.vae)
    own = checkpoint.settings.get("size") or checkpoint.unet.config.get("sample_size", 64) * factor
    sizes = options.sizes or ((int(own), int(own)),)
    return [_plan(checkpoint, options, width, height) for width, height in sizes]


def _plan(checkpoint: Checkpoint, options: Options, width: int, height: int) -> _Plan:
    target = targets.find(options.target)
    if options.precision not in target.precisions:
        raise UsageError(
            f"target '{target.name}' does not run precision '{options.precision}'",
            remedy=f"choose from {', '.join(target.precisions)}",
        )
    if isinstance(options.decoder_bands, int | float) and not target.bands:
        raise UsageError(
            f"target '{target.name}' does not decode in bands",
            remedy="leave out --decoder-bands, or export for litert-cpu",
        )
    settings = checkpoint.settings
    factor = _downsampling(checkpoint.vae)
    for name, value in (("width", width), ("height", height)):
        if value % factor or not 8 <= value <= 8192:
            raise UsageError(f"{name} {value} does not divide by {factor} or leaves 8..8192")
    latent = (height // factor, width // factor)
    parts = lowering.lines(checkpoint, latent, _tokens(checkpoint))
    band = parts.bands(target, options.decoder_bands)
    segments = [
        (line, segment, checkpoint.component(segment.graph.component))
        for line in ("embedding", "unet", "decoder")
        for segment in parts.cut(line, target, options.precision, band)
    ]
    by_line = {
        line: [s for at, s, _ in segments if at == line]
        for line in ("embedding", "unet", "decoder")
    }
    if parts.unet.shapes["sample"][1] != parts.decoder.shapes["latent"][1]:
        raise CheckpointError(
            "U-Net and autoencoder have different latent channels", path=checkpoint.path
        )
    sampler = options.sampler or settings.get("sampler") or "ddim"
    chosen = _timesteps(checkpoint, options)
    steps = sampling.plan(checkpoint.scheduler, sampler, chosen)
    guidance = options.guidance
    if guidance is None:
        guidance = float(settings.get("guidance", 1.0))
    vae = checkpoint.vae.config
    scale = 1.0 / float(vae.get("scaling_factor") or 1.0)

    def decoder(draft: Draft, z: str) -> str:
        if band is None:
            return draft.calls(by_line["decoder"], "", {"latent": z})
        return bands.write(draft, bands.passes(parts.decoder, band), z)

    embedded = time_embeddings(checkpoint.unet, parts.unet, sorted({s.timestep for s in steps}))
    program, constants = assemble(
        unet=by_line["unet"],
        embedding=by_line["embedding"],
        decode=decoder,
        steps=steps,
        embedded=embedded,
        size_ids=time_ids(parts.unet, (height, width)) if parts.embedding else None,
        guidance=guidance,
        latent_scale=(scale, float(vae.get("shift_factor") or 0.0)),
    )
    if len(program.ops) > MOST_OPS:
        raise UsageError(
            f"the program has {len(program.ops)} operations, a harness takes {MOST_OPS}",
            remedy="give a larger --decoder-bands, or fewer steps",
        )
    check(
        program,
        {s.id: s.ports for _, s, _ in segments},
        {n: TensorSpec(shape=v.shape) for n, v in constants.items()},
    )
    return _Plan(
        checkpoint,
        options,
        target,
        (height, width),
        latent,
        sampler,
        steps,
        guidance,
        segments,
        band,
        program,
        cast(dict[str, Array], constants),
    )


def _downsampling(vae: Component) -> int:
    blocks = vae.config.get("block_out_channels") or vae.config.get("decoder_block_out_channels")
    if not isinstance(blocks, list) or not blocks:
        raise CheckpointError("is missing", path=vae.origin, field="block_out_channels")
    return int(2 ** (len(blocks) - 1))


def _tokens(checkpoint: Checkpoint) -> int:
    config = checkpoint.path / "text_encoder" / "config.json"
    if checkpoint.path.is_dir() and config.is_file():
        return int(read_json(config).get("max_position_embeddings", 77))
    return 77


def _timesteps(checkpoint: Checkpoint, options: Options) -> list[int]:
    settings = checkpoint.settings
    if options.timesteps:
        return list(options.timesteps)
    if options.steps is None and options.spacing is None and settings.get("timesteps"):
        return [int(t) for t in settings["timesteps"]]
    scheduler = checkpoint.scheduler
    return sampling.timesteps(
        int(scheduler.get("num_train_timesteps", 1000)),
        options.steps or int(settings.get("steps", 8)),
        options.spacing or settings.get("timestep_spacing", "trailing"),
        int(scheduler.get("steps_offset", 0)),
    )


# --- text --------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Texts:
    prompts: tuple[str, ...]
    info: TextInfo
    inputs: list[dict[str, Array]]
    """Program inputs of each prompt but the noise."""


def _texts(plan: _Plan, work: Path) -> _Texts:
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
        return _Texts((), info, [_only(plan.program, values | zeros)])
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
            file=_ref(work / "prompts.safetensors", "prompts.safetensors"),
            prompts=(*prompts, ""),
        ),
    )
    return _Texts(prompts, info, inputs)


def _only(program: Program, values: Mapping[str, Array]) -> dict[str, Array]:
    names = {i.name for i in program.inputs}
    return {n: np.ascontiguousarray(v) for n, v in values.items() if n in names}


# --- reference ---------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Result:
    picture: Array
    """uint8 [1, H, W, 3]"""
    calls: list[Mapping[str, Array]]
    """Results of the calls, by port; only the last one's unless all were asked for."""
    decoded: Array
    """What the decoder gave, float32 [1, H, W, 3]."""
    latent: Array
    """What it was given, float32 [1, h, w, C]."""


def _reference(
    plan: _Plan, texts: _Texts, work: Path, keep: int
) -> tuple[_Result, dict[str, ActivationRange]]:
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
    samples = _sampled(plan)
    if samples:
        artifacts.save_samples(work / _SAMPLES, samples[0])
    result = _run(
        plan,
        artifacts,
        texts.inputs[0],
        plan.options.seed,
        keep_calls=plan.options.references,
    )
    artifacts.stop_examples()
    for i in range(1, max(len(samples), 1 + _CALIBRATION_RUNS if observe else 0)):
        if samples:
            artifacts.save_samples(work / _SAMPLES, samples[i])
        inputs = texts.inputs[i % len(texts.inputs)]
        _run(plan, artifacts, inputs, plan.options.seed + i)
    artifacts.close()
    if plan.bands is not None:
        # Bands are a way to run the decoder, so they are measured, not taken as the truth.
        whole = lowering.lines(plan.checkpoint, plan.latent, _tokens(plan.checkpoint)).cut(
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


def _sampled(plan: _Plan) -> list[dict[str, frozenset[int]]]:
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


def _run(
    plan: _Plan,
    call: Callable[[str, Mapping[str, Array]], Mapping[str, Array]],
    inputs: Mapping[str, Array],
    seed: int,
    *,
    keep_calls: bool = False,
) -> _Result:
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
    return _Result(outputs["picture"], calls, outputs["decoded"], outputs["latent"])


# --- lowering ----------------------------------------------------------------------------


def _lower_all(
    sized: Sequence[_Sized],
    root: Path,
    jobs: int | None,
    memory: int | None,
    progress: Progress,
    use_cache: bool,
) -> tuple[list[dict[str, str]], dict[str, dict[str, Any]]]:
    """Lower the segments of all sizes; those that do not depend on the size once.

    Returns
    -------
    keys : list of dict of segment to key, one for each size
    metas : dict of key to ``meta.json``
    """
    store = root / "artifacts"
    store.mkdir(parents=True, exist_ok=True)
    lowering.sweep(store)
    metas: dict[str, dict[str, Any]] = {}
    keys: list[dict[str, str]] = []
    tasks: list[lowering.Task] = []
    needs: dict[str, int] = {}
    plans = [one.plan for one in sized]
    budget = Budget.of(memory)
    most = [n for plan in plans for n in _needs(plan).values()]
    workers = budget.workers(most, jobs or os.cpu_count() or 1)
    threads = max(1, (os.cpu_count() or 1) // workers)
    segments = [(one, *item) for one in sized for item in one.plan.segments]
    progress.planned(len(segments), sum(s.weights for _, _, s, _ in segments))
    for one in sized:
        keys.append({})
        structures = Counter(s.structure for _, s, _ in one.plan.segments)
        own_needs = _needs(one.plan)
        for line, segment, component in one.plan.segments:
            repeated = structures[segment.structure] >= _REPEATED
            task = _task(one, line, segment, component, store, threads)
            keys[-1][segment.id] = task.key
            if task.key in metas or task.key in needs:
                progress.done(segment.id, segment.weights, None)
                continue
            meta = lowering.cached(store, task.key) if use_cache else None
            if meta is not None:
                metas[task.key] = meta
                progress.done(segment.id, segment.weights, None)
                continue
            if not use_cache:
                shutil.rmtree(store / task.key, ignore_errors=True)
            needs[task.key] = own_needs[segment.id]
            shared = str(root / "structures") if repeated else None
            tasks.append(replace(task, shared=shared))
    if tasks:
        # The largest first, so that none of them is left for the end alone.
        tasks.sort(key=lambda t: -needs[t.key])
        weights = {keys[i][s.id]: s.weights for i, p in enumerate(plans) for _, s, _ in p.segments}
        metas |= _in_workers(
            tasks, min(workers, len(tasks)), threads, budget, needs, progress, weights
        )
    return keys, metas


def _task(
    one: _Sized, line: str, segment: Segment, component: Component, store: Path, threads: int
) -> lowering.Task:
    plan = one.plan
    own = lowering.segment_ranges(segment, one.ranges)
    samples = sorted((one.work / _SAMPLES / segment.id).glob("*.safetensors"))
    decides = {"precision": plan.options.precision, "samples": [*map(sha256_file, samples)]}
    return lowering.Task(
        checkpoint=str(plan.checkpoint.path),
        latent=plan.latent,
        tokens=_tokens(plan.checkpoint),
        line=line,
        segment=segment.id,
        target=plan.target.name,
        precision=plan.options.precision,
        ranges=own,
        example=str(one.work / "examples" / f"{segment.id}.safetensors"),
        samples=tuple(map(str, samples)),
        key=lowering.segment_key(segment, component, plan.target.name, decides, own),
        cache=str(store),
        threads=threads,
        bands=plan.bands,
    )


def _needs(plan: _Plan) -> dict[str, int]:
    """Return the bytes of memory that lowering each segment takes."""
    precision = find_precision(plan.options.precision)
    coded = bool(precision.linear or plan.checkpoint.unet.quantized)
    return {s.id: need(s, quantized=coded) for _, s, _ in plan.segments}


def _in_workers(
    tasks: Sequence[lowering.Task],
    workers: int,
    threads: int,
    budget: Budget,
    needs: Mapping[str, int],
    progress: Progress,
    weights: Mapping[str, int],
) -> dict[str, dict[str, Any]]:
    """Lower tasks within the budget; ``needs``, ``weights`` and what is returned are by key."""
    metas: dict[str, dict[str, Any]] = {}
    context = get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED_ONCE)
    pool = ProcessPoolExecutor(
        workers,
        mp_context=context,
        initializer=lowering.start_worker,
        initargs=(threads,),
    )
    try:
        waiting = list(tasks)
        pending: dict[Future[dict[str, Any]], lowering.Task] = {}
        while waiting or pending:
            for task in list(waiting):
                running = [needs[t.key] for t in pending.values()]
                if len(running) < workers and budget.fits(running, needs[task.key], workers):
                    waiting.remove(task)
                    pending[pool.submit(lowering.lower, task)] = task
            finished, _ = wait(pending, return_when=FIRST_COMPLETED)
            for future in finished:
                task = pending.pop(future)
                try:
                    meta = future.result()
                except BrokenProcessPool:
                    raise TargetError(
                        "a worker process died",
                        field=task.segment,
                        remedy="probably out of memory: give less --memory; what is done is kept",
                    ) from None
                metas[task.key] = meta
                progress.done(task.segment, weights[task.key], meta)
    except BaseException:
        for process in list((pool._processes or {}).values()):
            process.kill()
        pool.shutdown(wait=True, cancel_futures=True)
        raise
    pool.shutdown()
    return metas


# --- sizes -------------------------------------------------------------------------------


def _packed(
    plans: Sequence[_Plan],
    keys: Sequence[Mapping[str, str]],
    metas: Mapping[str, dict[str, Any]],
    root: Path,
) -> dict[str, _Packed]:
    """Name the artifacts of a bundle and let those of one segment share weights.

    A segment that is the same artifact at all sizes keeps its name. Otherwise its artifacts are
    called ``SEGMENT.WIDTHxHEIGHT``, by the first size that they are for.
    """
    packed: dict[str, _Packed] = {}
    for segment in dict.fromkeys(s for own in keys for s in own):
        first: dict[str, str] = {}
        for plan, own in zip(plans, keys, strict=True):
            if segment in own:
                first.setdefault(own[segment], plan.name)
        everywhere = all(segment in own for own in keys)
        if len(first) == 1 and everywhere:
            (key,) = first
            packed[segment] = _Packed(segment, key, _files("artifacts", key, metas[key]))
            continue
        named = {f"{segment}.{size}": key for key, size in first.items()}
        shared = _shared(plans[0].target, segment, named, metas, root) if len(named) > 1 else None
        for name, key in named.items():
            # What does not share keeps its files' names, which may be written in them.
            files = _files("artifacts", key, metas[key], f"{first[key]}/")
            packed[name] = _Packed(segment, key, shared[name] if shared else files)
    return packed


def _files(
    store: str, key: str, meta: Mapping[str, Any], folder: str = ""
) -> tuple[tuple[FileRef, Path], ...]:
    return tuple(
        (
            FileRef(path=f"artifacts/{folder}{f['path']}", sha256=f["sha256"], bytes=f["bytes"]),
            Path(store, key, f["path"]),
        )
        for f in meta["files"]
    )


def _shared(
    target: Target,
    segment: str,
    named: Mapping[str, str],
    metas: Mapping[str, dict[str, Any]],
    root: Path,
) -> dict[str, tuple[tuple[FileRef, Path], ...]] | None:
    """Return the files of artifacts that share weights, from the cache or made now."""
    essence = [target.name, named, lowering.source_sha256()]
    key = hashlib.sha256(json.dumps(essence).encode()).hexdigest()
    store = root / "shared"
    store.mkdir(exist_ok=True)
    lowering.sweep(store)
    meta = lowering.cached(store, key)
    if meta is None:
        work = store / f"tmp-{os.getpid()}-{key[:16]}"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        try:
            paths = {n: root / _files("artifacts", k, metas[k])[0][1] for n, k in named.items()}
            made = target.share(paths, f"{segment}.weights", work)
            if made is None:
                return None
            meta = lowering.keep_shared(work, store / key, made)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    files = {source.name: (ref, source) for ref, source in _files("shared", key, meta)}
    return {name: tuple(files[n] for n in own) for name, own in meta["artifacts"].items()}


def _called(
    plans: Sequence[_Plan], keys: Sequence[Mapping[str, str]], packed: Mapping[str, _Packed]
) -> list[dict[str, str]]:
    """Return the artifact that is called for each segment, at each size."""
    names = {(p.segment, p.key): name for name, p in packed.items()}
    return [{segment: names[segment, key] for segment, key in own.items()} for own in keys]


def _constants(plans: Sequence[_Plan]) -> tuple[dict[str, Array], list[dict[str, str]]]:
    """Return the constants of all sizes, and their names at each size.

    What is the same wherever it is read keeps its name.
    """
    constants: dict[str, Array] = {}
    names: list[dict[str, str]] = []
    for plan in plans:
        names.append({})
        for name, value in plan.constants.items():
            others = (p.constants[name] for p in plans if name in p.constants)
            alike = all(np.array_equal(value, other) for other in others)
            names[-1][name] = name if alike else f"{name}.{plan.name}"
            constants[names[-1][name]] = value
    return constants, names


# --- verification and packing ------------------------------------------------------------


def _verify(
    one: _Sized, texts: _Texts, paths: Mapping[str, Sequence[Path]], keep: int
) -> Verification:
    plan, reference = one.plan, one.reference
    runners = Runners(plan.target, {s.id: s for _, s, _ in plan.segments}, paths, keep // 2)
    result = _run(plan, runners, texts.inputs[0], plan.options.seed)
    student_snr = None
    precision = find_precision(plan.options.precision)
    quantized = precision.linear or precision.other or plan.checkpoint.unet.quantized
    if quantized and sum(s.weights for _, s, _ in plan.segments) <= _STUDENT_WEIGHTS:
        student = TorchArtifacts([(s, c) for _, s, c in plan.segments], precision=precision)
        student_snr = measure.snr_db(
            _run(plan, student, texts.inputs[0], plan.options.seed).decoded, result.decoded
        )
        student.close()
    return Verification(
        snr_db=measure.snr_db(reference.decoded, result.decoded),
        student_snr_db=student_snr,
        max_abs_error=measure.max_abs_error(reference.decoded, result.decoded),
        psnr_db=measure.psnr_db(reference.picture, result.picture),
    )


class Runners:
    """The call function of a program, with a target's artifacts in Python.

    Parameters
    ----------
    target : Target
    segments : mapping of artifact id to something with ``ports``
    paths : mapping of artifact id to files, first the one that the engine opens
    keep : int
        Bytes of artifacts up to which all stay loaded.
    """

    def __init__(
        self,
        target: Target,
        segments: Mapping[str, Any],
        paths: Mapping[str, Sequence[Path]],
        keep: int = 1_000_000_000,
    ) -> None:
        self._target = target
        self._segments = segments
        self._paths = paths
        files = {path for own in paths.values() for path in own}
        self._keep = sum(p.stat().st_size for p in files) <= keep
        self._ready: dict[str, Any] = {}

    def __call__(self, artifact: str, args: Mapping[str, Array]) -> dict[str, Array]:
        """Run an artifact.

        Raises
        ------
        TargetError
            If it does not run or gives something else than its ports say.
        """
        ports = self._segments[artifact].ports
        path = self._paths[artifact][0]
        try:
            runner = self._ready.get(artifact) or self._target.load(path, ports)
            if self._keep:
                self._ready[artifact] = runner
            outputs = runner(*(np.ascontiguousarray(args[n]) for n in ports.inputs))
        except Exception as e:  # engines raise whatever they like
            raise TargetError(f"does not run: {e}", path=path, field=artifact) from e
        shapes = [tuple(x.shape) for x in outputs]
        if shapes != (wanted := [spec.shape for spec in ports.outputs.values()]):
            raise TargetError(f"gives {shapes} instead of {wanted}", path=path, field=artifact)
        return dict(zip(ports.outputs, outputs, strict=True))


def _manifest(
    sized: Sequence[_Sized],
    texts: _Texts,
    metas: Mapping[str, dict[str, Any]],
    packed: Mapping[str, _Packed],
    called: Sequence[Mapping[str, str]],
    verifications: Sequence[Verification],
    work: Path,
) -> Manifest:
    plans = [one.plan for one in sized]
    plan = plans[0]
    constants, names = _constants(plans)
    save_file(constants, work / "constants.safetensors")
    found: dict[str, tuple[Segment, int | None]] = {}
    for own, ids in zip(plans, called, strict=True):
        macs = _macs(own)
        for _, segment, _ in own.segments:
            found.setdefault(ids[segment.id], (segment, macs.get(segment.id)))
    artifacts = []
    for name, made in packed.items():
        segment, count = found[name]
        meta = metas[made.key]
        file, *parts = (ref for ref, _ in made.files)
        artifacts.append(
            Artifact(
                id=name,
                target=plan.target.name,
                engine=plan.target.engine,
                engine_version=meta["engine_version"],
                file=file,
                parts=tuple(parts),
                ports=segment.ports,
                units=tuple(u.name for u in segment.units),
                component=segment.graph.component,
                weights=meta["weights"],
                held=meta["held"],
                macs=count,
                partitions=meta["partitions"],
                workspace=meta["workspace"],
                tools=meta["tools"],
                options=dict(plan.target.options),
                verification=Verification(**meta["verification"]),
            )
        )
    programs = {
        own.name: Size(
            width=own.size[1],
            height=own.size[0],
            program=renamed(own.program, artifacts=ids, tensors=own_names),
        )
        for own, ids, own_names in zip(plans, called, names, strict=True)
    }

    references = []
    for i, (one, verification) in enumerate(zip(sized, verifications, strict=True)):
        name = f"reference.{one.plan.name}.safetensors" if i else "reference.safetensors"
        (one.work / "reference.safetensors").rename(work / name)
        references.append(
            SizeReference(
                file=_ref(work / name, name),
                size=one.plan.name,
                seed=plan.options.seed,
                prompt=texts.prompts[0] if texts.prompts else None,
                verification=verification,
            )
        )
    card = plan.checkpoint.settings
    return Manifest(
        schema_version=3 if len(plans) > 1 else 2 if halves(plan.program) else 1,
        model=ModelInfo(
            id=plan.checkpoint.name,
            checkpoint_sha256=plan.checkpoint.sha256,
            steps=len(plan.steps),
            sampler=plan.sampler,
            guidance=plan.guidance,
        ),
        target=plan.target.name,
        precision=plan.options.precision,
        sizes=programs,
        artifacts=tuple(artifacts),
        constants=_ref(work / "constants.safetensors", "constants.safetensors"),
        constant_specs={n: TensorSpec(shape=v.shape) for n, v in constants.items()},
        text=texts.info,
        reference=Reference(**references[0].model_dump(exclude={"verification"})),
        verification=verifications[0],
        references=tuple(references[1:]),
        licence=card.get("licence"),
        provenance=Provenance(
            tools=lowering.tool_versions(),
            options={
                k: v for k, v in asdict(plan.options).items() if v is not None and k != "prompts"
            }
            | {"checkpoint": plan.checkpoint.name, "sizes": [p.name for p in plans]},
            history=tuple(card.get("history", ())),
        ),
    )


def _macs(plan: _Plan) -> dict[str, int]:
    """Count the multiply-accumulates of one call of each artifact."""
    tokens = _tokens(plan.checkpoint)
    try:
        counted = {
            "unet": count_unet(plan.checkpoint.unet.config, plan.latent, tokens=tokens),
            "decoder": count_decoder(plan.checkpoint.vae.config, plan.latent),
        }
    except CheckpointError:  # segments take a little more than the counting knows
        return {}
    result = {}
    calls = Counter(op.artifact for op in plan.program.ops if isinstance(op, Call))
    for _, segment, _ in plan.segments:
        prefixes = tuple(f"{p}." for p in segment.prefixes)
        units = {u.name for u in segment.units}  # attention's products have no weights
        macs = sum(
            layer.macs
            for layer in counted[segment.graph.component]
            if f"{layer.name}.".startswith(prefixes) or layer.name in units
        )
        banded = segment.graph.component == "decoder"
        result[segment.id] = macs // calls[segment.id] if banded else macs
    return result


def _ref(path: Path, name: str) -> FileRef:
    return FileRef(path=name, sha256=sha256_file(path), bytes=path.stat().st_size)


def _remember(manifest: Manifest, sources: dict[str, str], work: Path, record: Path) -> None:
    fresh = work / "record"
    fresh.mkdir()
    for ref in _own_files(manifest):
        shutil.copyfile(work / ref.path, fresh / ref.path)
    stored = {"manifest": manifest.model_dump(mode="json"), "sources": sources}
    (fresh / "export.json").write_text(json.dumps(stored))
    record.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(record, ignore_errors=True)
    try:
        fresh.rename(record)
    except OSError:
        # Another export of the same thing was faster.
        if not (record / "export.json").is_file():
            raise


def _recorded(record: Path, root: Path) -> Manifest | None:
    try:
        stored = json.loads((record / "export.json").read_text())
        manifest = Manifest.model_validate(stored["manifest"])
        sources = stored["sources"]
        for ref in _own_files(manifest):
            if sha256_file(record / ref.path) != ref.sha256:
                return None
        entries = {root / Path(*Path(source).parts[:2]) for source in sources.values()}
        if any(lowering.cached(entry.parent, entry.name) is None for entry in entries):
            return None
        wanted = {ref.path: ref.sha256 for a in manifest.artifacts for ref in a.files}
        if any(sha256_file(root / sources[path]) != digest for path, digest in wanted.items()):
            return None
    except (OSError, ValueError, KeyError):
        return None
    return manifest


def _own_files(manifest: Manifest) -> list[FileRef]:
    """List the files of a bundle that are not artifacts."""
    refs = (
        manifest.constants,
        manifest.reference.file if manifest.reference else None,
        *(r.file for r in manifest.references),
        manifest.text.prefetched.file if manifest.text.prefetched else None,
    )
    return [ref for ref in refs if ref is not None]


def _pack(manifest: Manifest, record: Path, root: Path, output: Path) -> None:
    sources = json.loads((record / "export.json").read_text())["sources"]
    files = {path: root / source for path, source in sources.items()}
    for ref in _own_files(manifest):
        files[ref.path] = record / ref.path
    bundle.write(manifest, files, output)
