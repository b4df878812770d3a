"""Segments lowered beside each other in worker processes, within a memory budget."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from handheld.errors import TargetError
from handheld.files import sha256_file
from handheld.precision import find as find_precision
from handheld_export import lowering
from handheld_export.checkpoint import Component
from handheld_export.export.plan import Plan, tokens_of
from handheld_export.export.reference import SAMPLES, Sized
from handheld_export.memory import Budget, need
from handheld_export.segments import Segment

_REPEATED = 3
"""Segments of one structure from which on converting it twice for all of them pays."""
_IMPORTED_ONCE = ["handheld_export.lowering", "handheld_export.rewrites"]
"""What the server that workers are forked from imports; seconds that each would take of its own."""


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


def lower_all(
    sized: Sequence[Sized],
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
    most = [n for plan in plans for n in needs_of(plan).values()]
    workers = budget.workers(most, jobs or os.cpu_count() or 1)
    threads = max(1, (os.cpu_count() or 1) // workers)
    segments = [(one, *item) for one in sized for item in one.plan.segments]
    progress.planned(len(segments), sum(s.weights for _, _, s, _ in segments))
    for one in sized:
        keys.append({})
        structures = Counter(s.structure for _, s, _ in one.plan.segments)
        own_needs = needs_of(one.plan)
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
        metas |= in_workers(
            tasks, min(workers, len(tasks)), threads, budget, needs, progress, weights
        )
    return keys, metas


def _task(
    one: Sized, line: str, segment: Segment, component: Component, store: Path, threads: int
) -> lowering.Task:
    plan = one.plan
    own = lowering.segment_ranges(segment, one.ranges)
    samples = sorted((one.work / SAMPLES / segment.id).glob("*.safetensors"))
    decides = {"precision": plan.options.precision, "samples": [*map(sha256_file, samples)]}
    return lowering.Task(
        checkpoint=str(plan.checkpoint.path),
        latent=plan.latent,
        tokens=tokens_of(plan.checkpoint),
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


def needs_of(plan: Plan) -> dict[str, int]:
    """Return the bytes of memory that lowering each segment takes."""
    precision = find_precision(plan.options.precision)
    coded = bool(precision.linear or plan.checkpoint.unet.quantized)
    return {s.id: need(s, quantized=coded) for _, s, _ in plan.segments}


def in_workers(
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
