"""What a bundle's ``manifest.json`` says.

The models here are the schema: ``handheld schema manifest`` prints it as JSON Schema.
Reading a bundle from disk, with all its checks, is :mod:`handheld.bundle`.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Final, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from handheld.program import Call, Extent, Model, Name, Ports, Program, Seed, TensorSpec, halves

SCHEMA_VERSION: Final = 3
"""The newest that is read. Bundles are written in the oldest that can say what they are."""
CONTINUED: Final = ("litert", "executorch")
"""Engines whose files are whole, or continued by one part."""
MOST_SIZES: Final = 64
"""Picture sizes that the harness takes."""

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def _inside(path: str) -> str:
    parts = path.split("/")
    if path.startswith("/") or "\\" in path or ":" in path or "\0" in path:
        raise ValueError(f"path '{path}' is not a relative path with forward slashes")
    if any(p in ("", ".", "..") for p in parts):
        raise ValueError(f"path '{path}' leaves the bundle")
    return path


BundlePath = Annotated[str, Field(max_length=512), AfterValidator(_inside)]


class FileRef(Model):
    """A file of the bundle."""

    path: BundlePath
    sha256: Sha256
    bytes: Annotated[int, Field(ge=0)]


class Verification(Model):
    """Numerics of one artifact, or of the whole program, against torch.

    Signal-to-noise ratios are in dB, ``10 log10(sum(ref**2) / sum((ref - x)**2))``; null
    where nothing was measured, and capped at 999 where the results are equal.
    """

    snr_db: float | None = None
    """Against the unquantized checkpoint in fp32."""
    student_snr_db: float | None = None
    """Against the student, that is, torch with the same codes dequantized."""
    max_abs_error: float | None = None
    """Largest absolute difference to the unquantized checkpoint."""
    psnr_db: float | None = None
    """Of the uint8 picture, peak 255 (end to end only)."""


class Artifact(Model):
    """One lowered segment."""

    id: Name
    target: str
    engine: Literal["litert", "executorch", "coreml", "qnn", "onnx"]
    engine_version: str
    file: FileRef
    parts: tuple[FileRef, ...] = ()
    """Further files that the engine finds from the first one: external weights beside it, the rest
    of a package around it. Artifacts may share them. LiteRT and ExecuTorch have at most one, which
    continues the file: offsets beyond its end are in there."""
    ports: Ports
    units: tuple[str, ...]
    """Module paths of the segment, first to last."""
    component: Literal["unet", "decoder"]
    weights: dict[str, int] = {}
    """Number of weights by storage, for example ``{"int4": 1000, "float32": 10}``."""
    held: dict[str, int] = {}
    """Number of weights whose grid the target's kernels cannot read, or compute badly on, by that
    grid and the wider one that holds the same values, for example ``{"int2 as int8": 1000}``."""
    macs: int | None = None
    partitions: int | None = None
    """Delegate partitions in the artifact; null where the engine has no such notion."""
    workspace: Annotated[int, Field(ge=0)] | None = None
    """Bytes of memory that its engine wanted while it ran at export; null where that was not
    measured."""
    tools: dict[str, str] = {}
    """Versions of the packages that made it."""
    options: dict[str, str] = {}
    """What the engine must be told to run it, for example ``{"accelerator": "gpu"}``. A harness
    that does not know an option, or lacks what it names, refuses the artifact."""
    verification: Verification = Verification()

    @property
    def files(self) -> tuple[FileRef, ...]:
        """All files, the one that the engine opens first."""
        return (self.file, *self.parts)

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(f.bytes for f in self.files)


class Size(Model):
    """A picture size and the program that draws it."""

    width: Annotated[int, Field(ge=8, le=8192)]
    height: Annotated[int, Field(ge=8, le=8192)]
    program: Program


class Prefetched(Model):
    """Embeddings of prompts that ship with the bundle."""

    file: FileRef
    """safetensors with ``{i}.prompt_embeds`` and ``{i}.pooled`` for prompt ``i``."""
    prompts: tuple[str, ...]


class TextInfo(Model):
    """Which text encoders the bundle was made for."""

    encoders_sha256: Sha256 | None = None
    tokens: Extent = 77
    width: Extent
    pooled_width: Extent | None = None
    prefetched: Prefetched | None = None


class Reference(Model):
    """A picture the bundle must reproduce: prompt embeddings and seed in, picture out."""

    file: FileRef
    """safetensors: ``input.NAME``, ``picture`` (uint8), and per call ``call.I.PORT``."""
    size: str
    seed: Seed
    prompt: str | None = None


class SizeReference(Reference):
    """The reference of a size that is not the default one, and how exact it is there."""

    verification: Verification = Verification()


class ModelInfo(Model):
    """Name and origin of the model."""

    id: str
    checkpoint_sha256: Sha256
    steps: int
    sampler: str
    guidance: float


class Provenance(Model):
    """Where a bundle comes from. Not part of the bundle's hash."""

    created: str | None = None
    tools: dict[str, str] = {}
    recipe: str | None = None
    options: dict[str, Any] = {}
    history: tuple[dict[str, Any], ...] = ()


class Manifest(Model):
    """The manifest of a bundle."""

    schema_version: Literal[1, 2, 3] = 1
    """2 where a program computes with float16, 3 where there are references of several sizes or
    files of LiteRT or ExecuTorch that share weights."""
    model: ModelInfo
    target: str
    precision: str
    sizes: Annotated[dict[Name, Size], Field(min_length=1, max_length=MOST_SIZES)]
    """``WIDTHxHEIGHT`` to program. Programs share artifacts and constants."""
    artifacts: Annotated[tuple[Artifact, ...], Field(min_length=1)]
    constants: FileRef | None = None
    constant_specs: dict[Name, TensorSpec] = {}
    text: TextInfo
    reference: Reference | None = None
    """Of the size that is drawn by default."""
    verification: Verification = Verification()
    """Of that size."""
    references: tuple[SizeReference, ...] = ()
    """Of the other sizes."""
    licence: str | None = None
    provenance: Provenance = Provenance()

    @model_validator(mode="after")
    def _old_enough(self) -> Self:
        for name, size in self.sizes.items():
            if self.schema_version < 2 and halves(size.program):
                raise ValueError(f"schema_version 1 has no float16 in affine, as size {name} has")
        if self.schema_version < 3:
            old = f"schema_version {self.schema_version} has no"
            if self.references:
                raise ValueError(f"{old} references of several sizes")
            for artifact in self.artifacts:
                if artifact.engine in CONTINUED and artifact.parts:
                    raise ValueError(f"{old} parts of {artifact.engine}, as {artifact.id} has")
        return self

    @property
    def default_size(self) -> str:
        """Key of the size that is drawn where none is asked for."""
        return self.reference.size if self.reference else next(iter(self.sizes))

    def reference_of(self, size: str) -> Reference | None:
        """Return the reference of a size."""
        all_of_them = (*([self.reference] if self.reference else []), *self.references)
        return next((r for r in all_of_them if r.size == size), None)

    def verification_of(self, size: str) -> Verification:
        """Return the figures of a size's program against torch."""
        own = (r.verification for r in self.references if r.size == size)
        return next(own, self.verification if size == self.default_size else Verification())

    def called(self, size: str) -> tuple[Artifact, ...]:
        """Return the artifacts that a size's program calls."""
        calls = (op for op in self.sizes[size].program.ops if isinstance(op, Call))
        names = {op.artifact for op in calls}
        return tuple(a for a in self.artifacts if a.id in names)

    def segment(self, artifact: str) -> str:
        """Return the segment that an artifact is of: its id without a size."""
        name, _, size = artifact.rpartition(".")
        return name if size in self.sizes else artifact

    @property
    def nbytes(self) -> int:
        """Bytes of all artifacts; files that several share count once."""
        return sum({f.path: f.bytes for a in self.artifacts for f in a.files}.values())

    @property
    def sha256(self) -> str:
        """Hash of what determines the picture: programs, artifacts and constants."""
        essence = {
            "schema_version": self.schema_version,
            "sizes": {k: v.model_dump(mode="json") for k, v in sorted(self.sizes.items())},
            "artifacts": sorted(
                # Ports go to the engine by position, so their order counts as well.
                [
                    a.id,
                    a.engine,
                    a.file.sha256,
                    a.ports.model_dump(mode="json"),
                    list(a.ports.inputs),
                    list(a.ports.outputs),
                    *([[p.path, p.sha256] for p in a.parts]),
                    *([a.options] if a.options else []),
                ]
                for a in self.artifacts
            ),
            "constants": self.constants.sha256 if self.constants else None,
        }
        text = json.dumps(essence, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()
