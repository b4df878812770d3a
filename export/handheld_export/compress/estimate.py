"""A recipe gone through without weights: sizes, memory and time of every step, all estimated."""

from __future__ import annotations

from typing import Any

from handheld import planning
from handheld.errors import UsageError
from handheld.planning import Shape
from handheld_export.compress.load import Cluster, Load
from handheld_export.compress.recipe import Recipe


def plan(recipe: Recipe, first: Shape, cluster: Cluster) -> list[dict[str, Any]]:
    """Go through a recipe without weights.

    Returns
    -------
    list of dict
        One entry per step: what the model is after it, bytes per device, seconds.

    Raises
    ------
    UsageError
        If a step cannot be done on this architecture, or cannot fit the devices.
    """
    shape, reference, rows = first, first, []
    for step, (path, at) in zip(recipe.steps, recipe.places, strict=True):
        try:
            after = step.shape(shape)
        except UsageError as e:
            e.path, e.field = str(path), f"{at}: {e.field}" if e.field else at
            raise
        load = step.load(after, reference, first)
        if step.imitated:
            reference = shape
        shape = after
        need = load.memory(cluster)
        if load.loop and load.loop.batch % cluster.devices:
            raise UsageError(
                f"batch {load.loop.batch} does not divide among {cluster.devices} devices",
                path=path,
                field=f"{at}.train.batch",
                remedy="choose a multiple, or another number of devices",
            )
        if need > cluster.memory:
            raise UsageError(
                f"'{step.kind}' needs an estimated {need / 1e9:.0f} GB on each of "
                f"{cluster.devices} devices, which have {cluster.memory / 1e9:.0f} GB",
                path=path,
                field=at,
                remedy=_remedy(load, cluster),
            )
        rows.append(
            {
                "step": step.kind,
                **planning.figures(shape),
                "train_steps": load.loop.steps if load.loop else None,
                "device_bytes": round(need),
                "seconds": load.seconds(cluster),
            }
        )
    return rows


def _remedy(load: Load, cluster: Cluster) -> str:
    options = []
    if load.loop and not load.loop.checkpointing:
        options.append("set checkpointing = true")
    if not cluster.fsdp and cluster.devices > 1:
        options.append("shard with --fsdp")
    for devices in (2, 4, 8, 16, 32, 64, 128, 256, 512):
        more = Cluster(devices, cluster.memory, cluster.flops, fsdp=True)
        fits = devices > cluster.devices and load.memory(more) <= cluster.memory
        if fits and load.loop and load.loop.batch % devices == 0:
            options.append(f"use --devices {devices} --fsdp")
            break
    return ", or ".join([*options, "a smaller batch"])
