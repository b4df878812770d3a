"""What an export makes of a checkpoint at each size, before anything is lowered."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, cast

from handheld.counting import count_decoder, count_unet
from handheld.errors import CheckpointError, UsageError
from handheld.manifest import MOST_SIZES
from handheld.program import MOST_OPS, Call, Program, TensorSpec, check
from handheld_export import bands, lowering, sampling, targets
from handheld_export.assemble import Draft, assemble, time_embeddings, time_ids
from handheld_export.checkpoint import Checkpoint, Component, read_json
from handheld_export.segments import Segment
from handheld_export.targets.base import Array, Target


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


@dataclass(frozen=True, eq=False)
class Plan:
    """How a checkpoint is exported at one size."""

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


def plan_segments(checkpoint: Checkpoint, options: Options) -> dict[str, Any]:
    """Say how a checkpoint would be cut, without lowering anything."""
    plan, *more = plan_sizes(checkpoint, options)
    return {
        "sizes": [p.name for p in (plan, *more)],
        "steps": len(plan.steps),
        "sampler": plan.sampler,
        "guidance": plan.guidance,
        "segments": [
            {"id": s.id, "units": len(s.units), "weights": s.weights} for _, s, _ in plan.segments
        ],
    }


def plan_sizes(checkpoint: Checkpoint, options: Options) -> list[Plan]:
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


def _plan(checkpoint: Checkpoint, options: Options, width: int, height: int) -> Plan:
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
    parts = lowering.lines(checkpoint, latent, tokens_of(checkpoint))
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
    return Plan(
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


def tokens_of(checkpoint: Checkpoint) -> int:
    """Return how many tokens a prompt has."""
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


def count_macs(plan: Plan) -> dict[str, int]:
    """Count the multiply-accumulates of one call of each artifact."""
    tokens = tokens_of(plan.checkpoint)
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
