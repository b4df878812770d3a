"""Numerics of a bundle's artifacts, per call and end to end.

The program runs once more with the artifacts in their engine's Python runtime. Every call
is given the reference's tensors, not what the artifacts before it made, so an error is
found where it arises; a second run lets errors accumulate as they do on a phone, and a third one
draws another prompt. The second may be repeated with other noises: one picture's SNR is several dB
above or below another's. The reference is the checkpoint in torch or, where that is not here, what
travels in the bundle (``export --references``). The student is torch with the artifact's codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from handheld import noise, numerics_gates
from handheld.bundle import Bundle
from handheld.errors import CheckpointError, TargetError, UsageError
from handheld.execute import execute
from handheld.manifest import Manifest, Verification
from handheld.models import checkpoint as find_model
from handheld.numerics_gates import Gate
from handheld.precision import find as find_precision
from handheld.program import Call, Program, decoded, halves
from handheld_export import lowering, measure, targets
from handheld_export.assemble import LATENT
from handheld_export.checkpoint import Checkpoint
from handheld_export.export import Runners
from handheld_export.torch_artifacts import TorchArtifacts, decode

Array = NDArray[Any]
_CallFunction = Callable[[str, Mapping[str, Array]], Mapping[str, Array]]


@dataclass(frozen=True)
class Row:
    """Worst figures of one artifact over its calls.

    Parameters
    ----------
    artifact : str
    calls : int
    snr_db : float
        Against the checkpoint.
    student_snr_db : float or None
        Against the student; None if that is the checkpoint.
    max_abs_error : float or None
        Against the checkpoint; None if the artifact does not run.
    text : float or None
        Strength of text, 1 being right; None if it takes none or that was not measured.
    gate : Gate
    partitions : int or None
    """

    artifact: str
    calls: int
    snr_db: float
    student_snr_db: float | None
    max_abs_error: float | None
    text: float | None
    gate: Gate
    partitions: int | None

    @property
    def figure_db(self) -> float:
        """The SNR that the gate is for."""
        if self.gate.against == "student" and self.student_snr_db is not None:
            return self.student_snr_db
        return self.snr_db

    @property
    def passed(self) -> bool:
        """Whether the artifact is as good as the gate asks."""
        return self.figure_db >= self.gate.artifact_db and _text_passes(self.text, self.gate)


@dataclass(frozen=True)
class Report:
    """What :func:`verify` found.

    Parameters
    ----------
    bundle, model, target, precision, size : str
    reference : str
        ``checkpoint``, or ``bundle`` where its own references were compared with.
    rows : tuple of Row
    end_to_end : Verification
        Means over the noises that were drawn; the largest error.
    draws : tuple of Verification
        Each of them, the bundle's own noise first.
    text : float or None
        Strength of text in what the decoder gives.
    gate : Gate
        Of the whole: for the means.
    problems : tuple of str
        Anything else that is wrong, such as a wrong engine version.
    notes : tuple of str
        What was not measured, and why.
    pictures : mapping of caption to uint8 ndarray [H, W, 3]
    """

    bundle: str
    model: str
    target: str
    precision: str
    size: str
    reference: str
    rows: tuple[Row, ...]
    end_to_end: Verification
    draws: tuple[Verification, ...]
    text: float | None
    gate: Gate
    problems: tuple[str, ...]
    notes: tuple[str, ...] = ()
    pictures: Mapping[str, Array] = field(default_factory=dict)

    @property
    def worst_db(self) -> float | None:
        """The least SNR that the gate is for, over all noises."""
        figures = [f for d in self.draws if (f := self.gate.figure(d)) is not None]
        return min(figures, default=None)

    @property
    def whole_passed(self) -> bool:
        """Whether the picture is as good as the gate asks."""
        figure = self.gate.figure(self.end_to_end)
        enough = figure is not None and figure >= self.gate.end_to_end_db
        return enough and _text_passes(self.text, self.gate)

    @property
    def passed(self) -> bool:
        """Whether every gate holds."""
        return self.whole_passed and all(r.passed for r in self.rows) and not self.problems

    def as_dict(self) -> dict[str, Any]:
        """Return the report as a JSON object."""
        return {
            "bundle": self.bundle,
            "model": self.model,
            "target": self.target,
            "precision": self.precision,
            "size": self.size,
            "reference": self.reference,
            "passed": self.passed,
            "gate": asdict(self.gate),
            "end_to_end": self.end_to_end.model_dump() | {"text": self.text},
            "noises": [d.model_dump() for d in self.draws],
            "artifacts": [
                {**vars(r), "gate": asdict(r.gate), "passed": r.passed} for r in self.rows
            ],
            "problems": list(self.problems),
            "notes": list(self.notes),
        }


def _text_passes(text: float | None, gate: Gate) -> bool:
    return text is None or gate.text[0] <= text <= gate.text[1]


def verify(
    bundle: Bundle,
    checkpoint: Path | None = None,
    gate: Path | None = None,
    unit: str | None = None,
    size: str | None = None,
    noises: int = 1,
) -> Report:
    """Verify a bundle at one of its sizes.

    Parameters
    ----------
    bundle : Bundle
    checkpoint : Path, optional
        What to compare with; by default the model that the manifest names. If that is not here,
        the bundle's own references are taken, and how strongly text works is not measured.
    gate : Path, optional
        Thresholds; see :func:`handheld.numerics_gates.gate`.
    unit : str, optional
        Compute unit that artifacts run on, for targets that have several.
    size : str, optional
        Key of the manifest's sizes; by default the one that is drawn by default.
    noises : int
        How many pictures are drawn with the reference's prompt, each from a noise of its own.
        Without the checkpoint there is one.

    Raises
    ------
    UsageError, CheckpointError, TargetError
    """
    return _Verification(bundle, checkpoint, gate, unit, bundle.size(size)[0]).report(noises)


@dataclass
class _Found:
    """What the calls of one artifact gave."""

    snr_db: list[float] = field(default_factory=list)
    student_snr_db: list[float] = field(default_factory=list)
    max_abs_error: list[float | None] = field(default_factory=list)
    text: float | None = None
    asked: bool = False
    """Whether another prompt was tried."""


@dataclass(frozen=True)
class _Draw:
    """One picture, drawn from one noise."""

    figures: Verification
    decoded: Array
    """By the artifacts."""
    student: Array | None
    pictures: Mapping[str, Array]


class _Verification:
    def __init__(
        self,
        bundle: Bundle,
        checkpoint: Path | None,
        gates: Path | None,
        unit: str | None,
        size: str,
    ) -> None:
        manifest = self.manifest = bundle.manifest
        self.bundle = bundle
        self.target = targets.find(manifest.target)
        self.size, reference = size, manifest.reference_of(size)
        if reference is None:
            raise UsageError(
                f"has no reference for {size}", path=bundle.path, remedy="export it again"
            )
        self.artifacts = {a.id: a for a in manifest.called(size)}
        self.gates = {
            a.id: numerics_gates.gate(a.weights, manifest.precision, manifest.target, gates)
            for a in self.artifacts.values()
        }
        self.program = manifest.sizes[size].program
        # Tensors that are kept in half precision cost the whole as much as such arithmetic.
        half = manifest.precision == "fp32" and halves(self.program)
        self.gate = numerics_gates.gate(
            numerics_gates.weights_of(manifest),
            "fp16" if half else manifest.precision,
            manifest.target,
            gates,
        )
        outputs = self.program.outputs | {"decoded": decoded(self.program)}
        if LATENT in self.program.tensors:
            outputs["latent"] = LATENT
        self.watched = self.program.model_copy(update={"outputs": outputs})
        self.whole: Callable[[Array], tuple[Array, Array]] | None = None
        self.seed = reference.seed
        self.constants = bundle.constants()
        self.stored = bundle.reference(size)
        self.inputs = {
            i.name: self.stored[f"input.{i.name}"] for i in self.program.inputs if i.role != "noise"
        }
        self.calls = [op for op in self.program.ops if isinstance(op, Call)]
        caveat = self.target.caveat()
        self.notes: list[str] = [caveat] if caveat else []
        if unit is not None:
            self.target = self.target.on(unit)
            self.notes = [f"{manifest.target}: run on compute unit '{unit}'"]
        self._open(checkpoint)
        paths = {k: [bundle.file(f) for f in a.files] for k, a in self.artifacts.items()}
        self.runners = Runners(self.target, self.artifacts, paths)
        self.failures: dict[str, str] = {}

    def _open(self, path: Path | None) -> None:
        """Find what to compare with."""
        complete = all(
            f"call.{i}.{p}" in self.stored for i, c in enumerate(self.calls) for p in c.results
        )
        self.torch: TorchArtifacts | None = None
        self.student: TorchArtifacts | None = None
        precision = find_precision(self.manifest.precision)
        rounds = bool(precision.linear or precision.other)
        try:
            found = path or find_model(self.manifest.model.id)
            self.torch = _torch(self.bundle, self.size, found)
            self.whole = _whole(self.bundle, self.size, found)
            if rounds:
                self.student = _torch(self.bundle, self.size, found, student=True)
        except (UsageError, CheckpointError) as error:
            judged = {g.against for g in (self.gate, *self.gates.values())}
            if path is not None or not complete or (rounds and "student" in judged):
                raise
            self.torch = None
            self.notes.append(
                f"compared with the bundle's references, strength of text not measured: {error}"
            )

    def report(self, noises: int) -> Report:
        other, other_inputs = _other_text(self.bundle, self.program, self.inputs)
        found, decoded, picture = self._forced(other_inputs)
        pictures = {"reference": picture}
        draws, text = [Verification(snr_db=-measure.CAP_DB)], None
        if not self.failures:
            draw = self._draw((decoded, picture), self.seed)
            draws = [draw.figures, *self._more(noises - 1)]
            pictures |= draw.pictures
            if (torch := self._base()) is not None:
                wanted, pictures[f"torch, {other}"] = self._run(torch, other_inputs)
                given, pictures[f"artifact, {other}"] = self._run(self.runners, other_inputs)
                judged = self.gate.against == "student" and self.student is not None
                base = draw.student if judged and draw.student is not None else decoded
                text = measure.strength((base, wanted), (draw.decoded, given))
        rows = tuple(self._row(a, values) for a, values in found.items() if values.snr_db)
        return Report(
            bundle=str(self.bundle.path),
            model=self.manifest.model.id,
            target=self.manifest.target,
            precision=self.manifest.precision,
            size=self.size,
            reference="bundle" if self.torch is None else "checkpoint",
            rows=rows,
            end_to_end=_mean(draws),
            draws=tuple(draws),
            text=text,
            gate=self.gate,
            problems=tuple(self._problems(rows, text)),
            notes=tuple(self.notes),
            pictures={name: np.asarray(p)[0] for name, p in pictures.items()},
        )

    def _more(self, count: int) -> Iterator[Verification]:
        """Draw further noises with the checkpoint and with the artifacts."""
        if self.torch is None:
            if count > 0:
                self.notes.append("one noise only: references of others need the checkpoint")
            return
        for seed in range(self.seed + 1, self.seed + 1 + count):
            outputs = self._outputs(self.torch, self.inputs, seed)
            yield self._draw(self._reference(outputs), seed).figures

    def _draw(self, reference: tuple[Array, Array], seed: int) -> _Draw:
        """Draw with the artifacts, and with the student if there is one."""
        decoded, picture = reference
        results, drawn = self._run(self.runners, self.inputs, seed)
        pictures, student, student_snr = {}, None, None
        if self.student is not None:
            student, pictures["student"] = self._run(self.student, self.inputs, seed)
            student_snr = measure.snr_db(student, results)
        figures = Verification(
            snr_db=measure.snr_db(decoded, results),
            student_snr_db=student_snr,
            max_abs_error=_max_error(decoded, results),
            psnr_db=measure.psnr_db(picture, drawn),
        )
        return _Draw(figures, results, student, pictures | {"artifact": drawn})

    def _base(self) -> TorchArtifacts | None:
        """Return what the whole is judged against."""
        return self.student if self.gate.against == "student" and self.student else self.torch

    def _run(
        self, call: _CallFunction, inputs: Mapping[str, Array], seed: int | None = None
    ) -> tuple[Array, Array]:
        """Return what the decoder gave, and the picture."""
        outputs = self._outputs(call, inputs, seed)
        return outputs["decoded"], outputs["picture"]

    def _outputs(
        self, call: _CallFunction, inputs: Mapping[str, Array], seed: int | None = None
    ) -> dict[str, Array]:
        seed = self.seed if seed is None else seed
        return execute(self.watched, self.constants, inputs, call, seed=seed)

    def _reference(self, outputs: Mapping[str, Array]) -> tuple[Array, Array]:
        """Return what the decoder gave in torch, without bands, and the picture."""
        if self.whole is None:
            return outputs["decoded"], outputs["picture"]
        picture, decoded = self.whole(outputs["latent"])
        return decoded, picture

    def _forced(self, other: Mapping[str, Array]) -> tuple[dict[str, _Found], Array, Array]:
        """Give every call the reference's tensors."""
        found = {a: _Found() for a in self.artifacts}
        index = 0

        def forced(artifact: str, args: Mapping[str, Array]) -> Mapping[str, Array]:
            nonlocal index
            call = self.calls[index]
            if self.torch is not None:
                wanted: Mapping[str, Array] = self.torch(artifact, args)
            else:
                wanted = {p: self.stored[f"call.{index}.{p}"] for p in call.results}
            index += 1
            changed = {p: other[n] for p, n in call.args.items() if n in other and _differs(n)}
            self._compare(found[artifact], artifact, args, wanted, changed)
            return wanted

        def _differs(name: str) -> bool:
            return other[name] is not self.inputs[name]

        decoded, picture = self._reference(self._outputs(forced, self.inputs))
        return found, decoded, picture

    def _compare(
        self,
        found: _Found,
        artifact: str,
        args: Mapping[str, Array],
        wanted: Mapping[str, Array],
        changed: Mapping[str, Array],
    ) -> None:
        try:
            results = self.runners(artifact, args)
        except TargetError as error:
            self.failures.setdefault(artifact, error.message)
            found.snr_db.append(-measure.CAP_DB)
            found.max_abs_error.append(None)
            return
        found.snr_db.append(_worst(wanted, results))
        found.max_abs_error.append(_max_error(_joined(wanted), _joined(results)))
        base, torch = wanted, self.torch
        if self.student is not None:
            students = self.student(artifact, args)
            found.student_snr_db.append(_worst(students, results))
            if self.gates[artifact].against == "student":
                base, torch = students, self.student
        if changed and torch is not None and not found.asked:
            found.asked = True
            base = dict(base)  # torch's results may be its buffers
            after = torch(artifact, {**args, **changed})
            given = self.runners(artifact, {**args, **changed})
            found.text = measure.strength(
                (_joined(base), _joined(after)), (_joined(results), _joined(given))
            )

    def _row(self, artifact: str, found: _Found) -> Row:
        errors = [e for e in found.max_abs_error if e is not None]
        return Row(
            artifact=artifact,
            calls=len(found.snr_db),
            snr_db=min(found.snr_db),
            student_snr_db=min(found.student_snr_db) if found.student_snr_db else None,
            max_abs_error=max(errors) if len(errors) == len(found.snr_db) else None,
            text=found.text,
            gate=self.gates[artifact],
            partitions=self.artifacts[artifact].partitions,
        )

    def _problems(self, rows: tuple[Row, ...], text: float | None) -> list[str]:
        problems = [f"{a}: {message}" for a, message in self.failures.items()]
        problems += [
            f"{r.artifact}: gives values that are not finite"
            for r in rows
            if r.snr_db == -measure.CAP_DB and r.artifact not in self.failures
        ]
        for name, value, gate in (
            *((r.artifact, r.text, r.gate) for r in rows),
            ("end to end", text, self.gate),
        ):
            if value is not None and not _text_passes(value, gate):
                problems.append(
                    f"{name}: text changes the result {value:.2f} times as strongly as it should"
                )
        engine = next(iter(self.target.versions().values()))
        problems += [
            f"{a.id}: made for engine version {a.engine_version}, {engine} is installed"
            for a in self.artifacts.values()
            if a.engine_version != engine
        ]
        for a in self.artifacts.values():
            path = self.bundle.file(a.files[0])
            problems += [f"{a.id}: {told}" for told in self.target.conflicts(path, a.tools)]
        return problems


def _mean(draws: Sequence[Verification]) -> Verification:
    """Return means of SNR and PSNR, and the largest error; None where one lacks it."""

    def over(name: str, fold: Callable[[list[float]], float]) -> float | None:
        values = [getattr(d, name) for d in draws]
        return None if None in values else fold(values)

    return Verification(
        snr_db=over("snr_db", fmean),
        student_snr_db=over("student_snr_db", fmean),
        max_abs_error=over("max_abs_error", max),
        psnr_db=over("psnr_db", fmean),
    )


def _worst(wanted: Mapping[str, Array], results: Mapping[str, Array]) -> float:
    return min(measure.snr_db(wanted[p], results[p]) for p in wanted)


def _max_error(wanted: Array, result: Array) -> float | None:
    """Return the largest difference, None where it is not finite."""
    error = measure.max_abs_error(wanted, result)
    return error if np.isfinite(error) else None


def _joined(results: Mapping[str, Array]) -> Array:
    return np.concatenate([np.ravel(results[name]) for name in sorted(results)])


def _other_text(
    bundle: Bundle, program: Program, inputs: Mapping[str, Array]
) -> tuple[str, dict[str, Array]]:
    """Return another prompt's name, and the program's inputs with it."""
    manifest = bundle.manifest
    known = manifest.text.prefetched.prompts if manifest.text.prefetched else ()
    own_prompt = manifest.reference.prompt if manifest.reference else None
    prompt = next((p for p in known if p not in ("", own_prompt)), None)
    stored = None if prompt is None else bundle.prefetched(prompt)
    changed = dict(inputs)
    for stream, item in enumerate(program.inputs):
        if item.role not in ("prompt_embeds", "pooled") or item.negative:
            continue
        before = inputs[item.name]
        own = None if stored is None else stored[0 if item.role == "prompt_embeds" else 1]
        if own is None:
            own = noise.normal(1, before.shape, stream) * np.float32(before.std())
        changed[item.name] = np.ascontiguousarray(own, np.float32).reshape(before.shape)
    return prompt or "random embeddings", changed


def _asked(manifest: Manifest) -> lowering.Bands:
    """Return what bands an export was asked for."""
    asked = manifest.provenance.options.get("decoder_bands")
    if asked == "auto":
        return "auto"
    return float(asked) if isinstance(asked, int | float) else None


def _lines(bundle: Bundle, size: str, checkpoint: Checkpoint) -> lowering.Lines:
    """Build the graphs that a bundle was made from."""
    program = bundle.manifest.sizes[size].program
    noise_input = next(i.name for i in program.inputs if i.role == "noise")
    _, h, w, _ = program.tensors[noise_input].shape
    return lowering.lines(checkpoint, (h, w), bundle.manifest.text.tokens)


def _whole(bundle: Bundle, size: str, path: Path) -> Callable[[Array], tuple[Array, Array]] | None:
    """Return what decodes a latent without bands, in torch; None if the bundle has no bands."""
    checkpoint = Checkpoint(path)
    target = targets.find(bundle.manifest.target)
    lines = _lines(bundle, size, checkpoint)
    if lines.bands(target, _asked(bundle.manifest)) is None:
        return None
    segments = lines.cut("decoder", target, bundle.manifest.precision)
    return partial(decode, segments, checkpoint.vae)


def _torch(bundle: Bundle, size: str, path: Path, *, student: bool = False) -> TorchArtifacts:
    checkpoint = Checkpoint(path)
    manifest: Manifest = bundle.manifest
    if checkpoint.sha256 != manifest.model.checkpoint_sha256:
        raise UsageError(
            "is not the checkpoint that the bundle was made from",
            path=path,
            remedy="give the right one with --checkpoint",
        )
    lines = _lines(bundle, size, checkpoint)
    target = targets.find(manifest.target)
    bands = lines.bands(target, _asked(manifest))
    pairs = [
        (s, checkpoint.component(s.graph.component))
        for line in ("embedding", "unet", "decoder")
        for s in lines.cut(line, target, manifest.precision, bands)
    ]
    called = {manifest.segment(a.id): a for a in manifest.called(size)}
    if {s.id: s.ports for s, _ in pairs} != {name: a.ports for name, a in called.items()}:
        raise UsageError(
            "was cut in another way than this handheld cuts",
            path=bundle.path,
            remedy="export it again",
        )
    named = [(replace(s, id=called[s.id].id), c) for s, c in pairs]
    return TorchArtifacts(named, precision=find_precision(manifest.precision) if student else None)
