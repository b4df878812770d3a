"""Which artifacts stay in memory within a budget, decided before a run.

The same rule in integers is in the harness (``memory_plan.cpp``); both must give the answers of
``tests/golden/memory_plans.json``. docs/harness-protocol.md has it in words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from handheld.errors import BundleError, UsageError
from handheld.execute import activation_bytes
from handheld.manifest import Manifest
from handheld.program import Call

PROCESS_BYTES: Final = 18_000_000
"""The harness itself and the engines' libraries."""
PACKING: Final = ("litert", "executorch")
"""Engines that keep packed weights in files, which the rule is about."""
KEEPS_WORKSPACE: Final = "executorch"
"""The engine whose workspace stays as large as it ever was, whatever is loaded."""
LOADED_BYTES: Final = 1_250_000
"""What an engine keeps of a loaded artifact besides its weights."""


@dataclass(frozen=True)
class Weights:
    """An artifact as the rule sees it.

    Parameters
    ----------
    id : str
    bytes : int
        Of its files; packed weights take as much.
    workspace : int
        Memory that the engine wants while it runs. It goes with a streamed artifact, and stays
        with one that stays, for all that run later.
    """

    id: str
    bytes: int
    workspace: int


@dataclass(frozen=True)
class MemoryPlan:
    """What stays and what is streamed.

    Parameters
    ----------
    resident : tuple of str
        Artifacts that stay, in the order of their first calls.
    streamed : tuple of str
        The others.
    prefetch : bool
        Whether the next streamed artifact is loaded while one runs.
    peak_bytes : int
        The most that the process will take.
    budget_bytes : int
    """

    resident: tuple[str, ...]
    streamed: tuple[str, ...]
    prefetch: bool
    peak_bytes: int
    budget_bytes: int

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        return {
            "resident": list(self.resident),
            "streamed": list(self.streamed),
            "prefetch": self.prefetch,
            "peak_bytes": self.peak_bytes,
            "budget_bytes": self.budget_bytes,
        }


def plan(
    budget: int, activations: int, packed: bool, artifacts: Sequence[Weights], calls: Sequence[int]
) -> MemoryPlan:
    """Decide what stays.

    Everything is streamed at first. Then artifacts stay one after the other while the peak is
    within the budget: those first that would be loaded most often in a run, then the largest.

    Parameters
    ----------
    budget : int
        Bytes.
    activations : int
        Bytes of the program's tensors and constants.
    packed : bool
        Whether packed weights are kept in files. If not, weights are packed at every load, beside
        the original.
    artifacts : sequence of Weights
        In the order of their first calls.
    calls : sequence of int
        Index of every call's artifact, in order.

    Raises
    ------
    UsageError
        If not even streaming fits; it names the least budget that does.
    """

    def peak(stays: Sequence[bool], prefetch: bool) -> int:
        return peak_bytes(stays, prefetch, activations, packed, artifacts, calls)

    stays = [False] * len(artifacts)
    prefetch = peak(stays, True) <= budget
    least = peak(stays, False)
    if least > budget:
        raise UsageError(
            f"{budget / 1e6:.0f} MB are too little: the least that would do is "
            f"{-(-least // 1_000_000)} MB",
            field="memory_budget",
            remedy="give that much, or export with smaller segments or pictures",
        )
    loads = [0] * len(artifacts)
    for i, call in enumerate(calls):
        loads[call] += i == 0 or calls[i - 1] != call
    order = sorted(range(len(artifacts)), key=lambda i: (-loads[i], -artifacts[i].bytes, i))
    for i in order:
        stays[i] = True
        stays[i] = peak(stays, prefetch) <= budget
    return MemoryPlan(
        resident=tuple(a.id for a, stay in zip(artifacts, stays, strict=True) if stay),
        streamed=tuple(a.id for a, stay in zip(artifacts, stays, strict=True) if not stay),
        prefetch=prefetch,
        peak_bytes=peak(stays, prefetch),
        budget_bytes=budget,
    )


def peak_bytes(
    stays: Sequence[bool],
    prefetch: bool,
    activations: int,
    packed: bool,
    artifacts: Sequence[Weights],
    calls: Sequence[int],
    *,
    first: bool = True,
    process: int = PROCESS_BYTES,
    loaded: int = LOADED_BYTES,
) -> int:
    """Return the most that a process takes where some artifacts stay; see :func:`plan`.

    Parameters
    ----------
    stays : sequence of bool
        Of each artifact; the others are streamed.
    prefetch : bool
        Whether the next streamed artifact is loaded while one runs.
    first : bool
        Whether weights may have to be packed, as in the first run ever.
    process, loaded : int
        Bytes of the process itself, and of each loaded artifact besides its weights.
    """
    staying = [a for a, stay in zip(artifacts, stays, strict=True) if stay]
    held = sum(a.bytes + loaded for a in staying)
    kept = max((a.workspace for a in staying), default=0)
    # What is packed is only mapped until it runs. Else a load sees the original and its copy.
    room = kept + max((0 if packed else a.bytes for a in staying), default=0)
    ahead = [0 if packed else 2 * a.bytes for a in artifacts]
    upcoming: int | None = None
    following: int | None = None  # the streamed artifact after `upcoming` that is another
    for call in reversed(calls):
        if stays[call]:
            continue
        if call != upcoming:
            following, upcoming = upcoming, call
        running = artifacts[call].bytes + max(artifacts[call].workspace, kept) + loaded
        room = max(room, running, ahead[call] + kept + loaded)
        if prefetch and following is not None:
            room = max(room, running + ahead[following] + loaded)
    most = process + activations + held + room
    if not (packed and first):
        return most
    # One artifact is packed after the other, before there is anything else.
    return max(most, process + 2 * max((a.bytes for a in artifacts), default=0))


def plan_bundle(manifest: Manifest, size: str, budget: int, *, packed: bool = True) -> MemoryPlan:
    """Decide what stays of a bundle; see :func:`plan`.

    Parameters
    ----------
    manifest : Manifest
    size : str
        Key of the manifest's sizes.
    budget : int
        Bytes.
    packed : bool
        Whether packed weights are kept in files.

    Raises
    ------
    UsageError
        If not even streaming fits.
    BundleError
        If the manifest does not say what workspace an artifact needs, or its engine holds weights
        in a way that is not known.
    """
    program = manifest.sizes[size].program
    by_id = {a.id: a for a in manifest.artifacts}
    called = [op.artifact for op in program.ops if isinstance(op, Call)]
    index = {name: i for i, name in enumerate(dict.fromkeys(called))}
    artifacts = []
    for name in index:
        workspace, engine = by_id[name].workspace, by_id[name].engine
        if engine not in PACKING:
            raise BundleError(
                f"what '{engine}' takes for weights cannot be planned",
                field=f"artifacts[{manifest.artifacts.index(by_id[name])}].engine",
                remedy=f"export for an engine of {', '.join(PACKING)}, or choose a residency",
            )
        if workspace is None:
            raise BundleError(
                f"does not say what workspace '{name}' needs, so memory cannot be planned",
                field=f"artifacts[{manifest.artifacts.index(by_id[name])}].workspace",
                remedy="export the bundle again",
            )
        artifacts.append(Weights(name, by_id[name].nbytes, workspace))
    if any(by_id[name].engine == KEEPS_WORKSPACE for name in index):
        largest = max(a.workspace for a in artifacts)
        artifacts = [replace(a, workspace=largest) for a in artifacts]
    activations = activation_bytes(program) + sum(
        spec.nbytes for spec in manifest.constant_specs.values()
    )
    return plan(budget, activations, packed, artifacts, [index[name] for name in called])
