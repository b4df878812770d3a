"""Jobs that a harness takes and events that it prints, one JSON object a line.

The same protocol serves the host, Android and iOS. Times are milliseconds on a monotonic
clock, sizes are bytes. Every event carries ``t_ms``, the time since the process started.
What a harness had printed before it died is a valid partial record. Unknown fields in
events are ignored, so that an older reader understands a newer harness.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from handheld.program import Model, Name, Seed

PROTOCOL_VERSION: Final = 1

Residency = Literal["resident", "stream"]


class TensorFile(Model):
    """A tensor inside a safetensors file."""

    path: str
    tensor: str


class Job(Model):
    """What a harness shall do: open a bundle, run it, and report."""

    protocol: Literal[1] = PROTOCOL_VERSION
    bundle: str
    """Folder of the bundle."""
    size: Name
    """Key of the manifest's ``sizes``."""
    seed: Seed = 0
    inputs: dict[Name, TensorFile] = {}
    """Program inputs other than noise. A noise input may be overridden here too."""
    residency: Residency = "resident"
    residency_by_artifact: dict[Name, Residency] = {}
    """Exceptions from ``residency``."""
    memory_budget: Annotated[int, Field(ge=1)] | None = None
    """Bytes that the process may take: what fits stays, the rest is streamed. Takes the place of
    ``residency`` and ``residency_by_artifact``."""
    prefetch: bool = True
    """While streaming, load the next artifact on another thread."""
    threads: Annotated[int, Field(ge=1, le=256)] = 2
    cache: str | None = None
    """Folder for packed weights; null packs in memory."""
    warmup: Annotated[int, Field(ge=0)] = 1
    iterations: Annotated[int, Field(ge=1)] = 1
    min_seconds: Annotated[float, Field(ge=0, le=1e9)] = 0.0
    """Timed iterations go on until both ``iterations`` and this are reached."""
    precision: Annotated[float, Field(gt=0, le=1)] | None = None
    """And until half the width of the 95 % confidence interval of their median is at most
    this part of it."""
    max_seconds: Annotated[float, Field(gt=0, le=1e9)] | None = None
    """But no longer than this."""
    verify_hashes: bool = True
    """Check every file's sha256 against the manifest before it is used."""
    reset_peak: bool = False
    """Reset the process's high-water mark after loading, to see the runs alone."""
    output: str | None = None
    """Where to write the last picture: raw uint8 ``[H, W, 3]``."""
    expect: TensorFile | None = None
    """The picture that must come out, uint8: it is compared where it was drawn."""
    dump_calls: str | None = None
    """Where to write every call's results of the last iteration, as safetensors with names
    ``call.INDEX.PORT``."""

    @model_validator(mode="after")
    def _one_decides(self) -> Job:
        if self.memory_budget is not None and self.residency_by_artifact:
            raise ValueError("'memory_budget' and 'residency_by_artifact' exclude each other")
        return self


class Event(BaseModel):
    """Base of all events."""

    # JSON has no such numbers, and a record with one could not be written.
    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)
    t_ms: float


class Hello(Event):
    """First line: who is speaking."""

    event: Literal["hello"] = "hello"
    protocol: int
    harness: str
    """Version of the harness."""
    pid: int
    engines: dict[str, str]
    """Engine name to version, for the engines built in."""
    platform: str
    """For example ``linux-x86_64``."""
    base_rss_bytes: int | None = None
    """Resident set before any engine was touched."""
    engine_library_bytes: int | None = None
    """Part of ``base_rss_bytes`` that is the engines' own libraries mapped at start."""


class Plan(Event):
    """What stays in memory within a job's ``memory_budget``; before anything is loaded."""

    event: Literal["plan"] = "plan"
    resident: tuple[str, ...]
    streamed: tuple[str, ...]
    prefetch: bool
    peak_bytes: int
    """The most that the process will take, as planned."""
    budget_bytes: int


class Load(Event):
    """An artifact was made ready (resident ones once; streamed ones on first use)."""

    event: Literal["load"] = "load"
    artifact: str
    ms: float
    cache: Literal["none", "built", "hit"] = "none"
    units: dict[str, int] | None = None
    """Operations by compute unit (``cpu``, ``gpu``, ``npu``), where the engine tells."""


class Iteration(Event):
    """One run of the whole program.

    ``kind`` is ``first`` for the first ever in this process, ``warmup`` or ``timed``.
    """

    event: Literal["iteration"] = "iteration"
    index: int
    kind: Literal["first", "warmup", "timed"]
    total_ms: float
    engine_ms: float
    """Sum over calls of the time spent inside the engine's run function."""
    load_ms: float = 0.0
    """Time in which the program waited for artifacts to be loaded."""
    calls_ms: tuple[float, ...] = ()
    """Per call of the program, in order."""


class Memory(Event):
    """Memory of the process, in bytes; null where the platform does not tell."""

    event: Literal["memory"] = "memory"
    phase: Literal["start", "loaded", "first", "end", "warning"]
    """``warning``: resident artifacts were dropped, since memory was short."""
    rss: int | None = None
    peak_rss: int | None = None
    """High-water mark (VmHWM)."""
    anon: int | None = None
    file: int | None = None
    swap: int | None = None
    phys_footprint: int | None = None
    phys_footprint_peak: int | None = None
    dma_buf: int | None = None
    activations: int | None = None
    """Bytes of the program's own tensor arena."""


class Thermal(Event):
    """Thermal state, 0 (none) to 6 (shutdown); null where unknown."""

    event: Literal["thermal"] = "thermal"
    status: int | None = None


class Output(Event):
    """A result of the last iteration."""

    event: Literal["output"] = "output"
    role: str
    sha256: str
    shape: tuple[int, ...]
    dtype: str
    file: str | None = None
    psnr_db: float | None = None
    """Of the picture against the job's ``expect``; 999 if equal."""


BAD_INPUT = frozenset({"job", "bundle", "hash", "engine-missing", "input"})
"""Failures that the job or the bundle is to blame for: exit code 2, others 1."""


class Failure(Event):
    """The job failed; the process exits with 2 for a bad job or bundle, 1 otherwise."""

    event: Literal["error"] = "error"
    code: Literal[
        "job", "bundle", "hash", "engine-missing", "engine", "input", "memory", "cancelled", "io"
    ]
    message: str


class Done(Event):
    """Last line of a job that went well."""

    event: Literal["done"] = "done"
    iterations: int


AnyEvent = Annotated[
    Hello | Plan | Load | Iteration | Memory | Thermal | Output | Failure | Done,
    Field(discriminator="event"),
]
