"""Numerics of a bundle's artifacts, per call and end to end.

The program runs once more with the artifacts in their engine's Python runtime. Every call
is given the reference's tensors, not what the artifacts before it made, so an error is
found where it arises; a second run lets errors accumulate as they do on a phone. The
reference is what travels in the bundle (``export --references``) or the checkpoint in
torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from handheld.bundle import Bundle
from handheld.errors import TargetError, UsageError
from handheld.execute import execute
from handheld.manifest import Verification
from handheld.models import checkpoint as find_model
from handheld.numerics_gates import gates
from handheld.program import Call
from handheld_export import lowering, measure, targets
from handheld_export.checkpoint import Checkpoint
from handheld_export.export import Runners
from handheld_export.reference import TorchArtifacts

Array = NDArray[Any]


@dataclass(frozen=True)
class Row:
    """Worst figures of one artifact over its calls."""

    artifact: str
    calls: int
    snr_db: float
    max_abs_error: float | None
    """None if the artifact does not run."""
    gate_db: float
    partitions: int | None

    @property
    def passed(self) -> bool:
        """Whether the artifact is as good as the gate asks."""
        return self.snr_db >= self.gate_db


@dataclass(frozen=True)
class Report:
    """What :func:`verify` found."""

    bundle: str
    target: str
    precision: str
    reference: str
    rows: tuple[Row, ...]
    end_to_end: Verification
    gate_db: float
    problems: tuple[str, ...]
    """Anything else that is wrong, such as a wrong engine version."""

    @property
    def passed(self) -> bool:
        """Whether every gate holds."""
        whole = self.end_to_end.snr_db is not None and self.end_to_end.snr_db >= self.gate_db
        return whole and all(r.passed for r in self.rows) and not self.problems

    def as_dict(self) -> dict[str, Any]:
        """Return the report as a JSON object."""
        return {
            "bundle": self.bundle,
            "target": self.target,
            "precision": self.precision,
            "reference": self.reference,
            "passed": self.passed,
            "gate_db": self.gate_db,
            "end_to_end": self.end_to_end.model_dump(),
            "artifacts": [{**vars(r), "passed": r.passed} for r in self.rows],
            "problems": list(self.problems),
        }


def verify(bundle: Bundle, checkpoint: Path | None = None, gate: Path | None = None) -> Report:
    """Verify a bundle.

    Parameters
    ----------
    bundle : Bundle
    checkpoint : Path, optional
        Where the fp32 reference comes from if the bundle does not carry it; by default the
        model that the manifest names.
    gate : Path, optional
        Thresholds; see :func:`handheld.numerics_gates.gates`.

    Raises
    ------
    UsageError, CheckpointError, TargetError
    """
    manifest = bundle.manifest
    target = targets.find(manifest.target)
    least, least_whole = gates(manifest.precision, gate)
    if manifest.reference is None:
        raise UsageError("has no reference", path=bundle.path, remedy="export it again")
    program = manifest.sizes[manifest.reference.size].program
    stored = bundle.reference()
    inputs = {
        i.name: stored[f"input.{i.name}"] for i in program.inputs if f"input.{i.name}" in stored
    }
    calls = [op for op in program.ops if isinstance(op, Call)]
    complete = all(f"call.{i}.{p}" in stored for i, c in enumerate(calls) for p in c.results)
    torch_call = None
    if checkpoint is not None or not complete:
        torch_call = _torch(bundle, checkpoint or find_model(manifest.model.id))

    artifacts = {a.id: a for a in manifest.artifacts}
    runners = Runners(target, artifacts, {k: bundle.file(a.file) for k, a in artifacts.items()})
    found: dict[str, list[tuple[float, float | None]]] = {a: [] for a in artifacts}
    index = 0
    failures: dict[str, str] = {}

    def forced(artifact: str, args: Mapping[str, Array]) -> Mapping[str, Array]:
        nonlocal index
        try:
            results = runners(artifact, args)
        except TargetError as e:
            failures.setdefault(artifact, e.message)
            results = {}
        if torch_call is not None:
            wanted: Mapping[str, Array] = torch_call(artifact, args)
        else:
            wanted = {p: stored[f"call.{index}.{p}"] for p in calls[index].results}
        index += 1
        found[artifact].append(
            (
                min(measure.snr_db(wanted[p], results[p]) for p in wanted),
                max(measure.max_abs_error(wanted[p], results[p]) for p in wanted),
            )
            if results
            else (-measure.CAP_DB, None)
        )
        return wanted

    constants = bundle.constants()
    seed = manifest.reference.seed
    execute(program, constants, inputs, forced, seed=seed)

    final: dict[str, Mapping[str, Array]] = {}

    def free(artifact: str, args: Mapping[str, Array]) -> Mapping[str, Array]:
        final["results"] = runners(artifact, args)
        return final["results"]

    last = len(calls) - 1
    decoded = {p: stored[f"call.{last}.{p}"] for p in calls[last].results}
    if failures:
        whole = Verification(snr_db=-measure.CAP_DB)
    else:
        outputs = execute(program, constants, inputs, free, seed=seed)
        whole = Verification(
            snr_db=min(measure.snr_db(decoded[p], final["results"][p]) for p in decoded),
            max_abs_error=max(
                measure.max_abs_error(decoded[p], final["results"][p]) for p in decoded
            ),
            psnr_db=measure.psnr_db(stored["picture"], outputs["picture"]),
            student_snr_db=manifest.verification.student_snr_db,
        )
    rows = tuple(
        Row(
            artifact=a,
            calls=len(values),
            snr_db=min(v[0] for v in values),
            max_abs_error=None
            if any(v[1] is None for v in values)
            else max(v[1] or 0.0 for v in values),
            gate_db=least,
            partitions=artifacts[a].partitions,
        )
        for a, values in found.items()
        if values
    )
    return Report(
        bundle=str(bundle.path),
        target=manifest.target,
        precision=manifest.precision,
        reference="checkpoint" if torch_call is not None else "bundle",
        rows=rows,
        end_to_end=whole,
        gate_db=least_whole,
        problems=(
            *(f"{a}: {message}" for a, message in failures.items()),
            *_problems(bundle, target.versions()),
        ),
    )


def _problems(bundle: Bundle, versions: Mapping[str, str]) -> list[str]:
    engine = next(iter(versions.values()))
    return [
        f"{a.id}: made for engine version {a.engine_version}, {engine} is installed"
        for a in bundle.manifest.artifacts
        if a.engine_version != engine
    ]


def _torch(bundle: Bundle, path: Path) -> TorchArtifacts:
    checkpoint = Checkpoint(path)
    manifest = bundle.manifest
    if checkpoint.sha256 != manifest.model.checkpoint_sha256:
        raise UsageError(
            "is not the checkpoint that the bundle was made from",
            path=path,
            remedy="give the right one with --checkpoint",
        )
    reference = manifest.reference
    program = manifest.sizes[reference.size].program if reference else None
    assert program is not None
    noise = next(i.name for i in program.inputs if i.role == "noise")
    _, h, w, _ = program.tensors[noise].shape
    lines = lowering.lines(checkpoint, (h, w), manifest.text.tokens)
    most = targets.find(manifest.target).segment_weights
    pairs = [
        (s, checkpoint.component(s.graph.component))
        for line in ("embedding", "unet", "decoder")
        for s in lines.segments(line, most)
    ]
    have, want = {s.id: s.ports for s, _ in pairs}, {a.id: a.ports for a in manifest.artifacts}
    if have != want:
        raise UsageError(
            "was cut in another way than this handheld cuts",
            path=bundle.path,
            remedy="export it again",
        )
    return TorchArtifacts(pairs)
