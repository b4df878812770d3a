"""What a release's ``release.json`` says.

The models here are the schema: ``handheld schema release`` prints it as JSON Schema. Trust goes
from this file downwards: it names a bundle's manifest by hash, and that names the bundle's files.
Reading a release from disk, with all its checks, is :mod:`handheld.release.folder`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import AwareDatetime, Field, ValidationError, model_validator

from handheld.bundle import describe_validation
from handheld.documents import json_bytes, parse_object
from handheld.errors import ReleaseError
from handheld.manifest import FileRef, Sha256, Verification
from handheld.program import Model, Name
from handheld.protocol import Residency

SCHEMA_VERSION: Final = 1
MANIFEST = "release.json"
SIGNATURE = "model.sig"
MAX_MANIFEST_BYTES = 4 * 2**20
MAX_VARIANTS = 256
AGAIN = "fetch the release again, or build it again"

Platform = Literal["android", "ios", "host"]
Unit = Literal["npu", "gpu", "cpu"]
Bytes = Annotated[int, Field(ge=0, lt=2**53)]
"""A size; every language reads integers below 2**53 exactly."""


Budget = dict[Platform, Annotated[float, Field(gt=0, le=1)]]
"""The part of RAM that one app may count on, per platform."""


class Needs(Model):
    """What a phone must have, besides memory; empty fields ask nothing."""

    platforms: Annotated[tuple[Platform, ...], Field(min_length=1)]
    soc: tuple[str, ...] = ()
    """Models that the artifacts were compiled for, such as ``SM8650``."""
    min_os: dict[Platform, int] = {}
    """Least major version."""
    engines: Annotated[tuple[str, ...], Field(min_length=1)]
    """What the app's harness library must have built in."""
    storage_bytes: Bytes
    """Size of the variant's files."""


class Mode(Model):
    """A way to run a variant, and the memory that it needs."""

    residency: Residency
    memory_bytes: Bytes
    """Peak resident memory of the process."""
    basis: Literal["measured", "estimated"]
    device: str | None = None
    """Where it was measured."""
    median_ms: Annotated[float, Field(ge=0)] | None = None
    record: str | None = None
    """Id of the run record that the figures are from."""


class Gate(Model):
    """The least SNR that was asked, in dB."""

    artifact_db: float
    end_to_end_db: float


class Variant(Model):
    """One bundle, and the phones it is for."""

    id: Name
    model: str
    target: str
    precision: str
    unit: Unit
    """The processor that does the work."""
    bundle_sha256: Sha256
    manifest: FileRef
    """``manifest.json`` of the bundle."""
    chunks: FileRef
    """Contents in pieces, for updates."""
    records: FileRef | None = None
    """Run records of this bundle."""
    needs: Needs
    modes: Annotated[tuple[Mode, ...], Field(min_length=1, max_length=2)]
    """Preferred first."""
    verification: Verification
    """Of the whole program against torch, when it was exported."""
    gate: Gate | None = None
    """Null if no gate was known for the precision."""
    forced: tuple[str, ...] = ()
    """Why it would have been refused, had its release not been forced; empty if it passed."""


class Source(Model):
    """Where a model comes from."""

    model: str
    checkpoint_sha256: Sha256
    licence: str | None = None
    recipe: str | None = None
    history: tuple[dict[str, Any], ...] = ()


class ReleaseManifest(Model):
    """The manifest of a release."""

    schema_version: Literal[1] = SCHEMA_VERSION
    name: Name
    version: Annotated[int, Field(ge=1, lt=2**53)]
    """Grows with every release of this name; readers refuse to go back."""
    label: Annotated[str, Field(max_length=100)] | None = None
    """The version that people see, such as ``1.2.0``."""
    expires: AwareDatetime | None = None
    """From then on readers refuse it."""
    budget: Budget
    """For phones whose app does not say what it may use."""
    variants: Annotated[tuple[Variant, ...], Field(min_length=1, max_length=MAX_VARIANTS)]
    """Best first: a phone gets the first one that fits."""
    sources: tuple[Source, ...]
    documents: tuple[FileRef, ...] = ()
    """Cards, licences, and the bill of materials."""

    @model_validator(mode="after")
    def _distinct(self) -> ReleaseManifest:
        seen: set[str] = set()
        for variant in self.variants:
            folded = variant.id.casefold()
            if folded in seen:
                raise ValueError(f"two variants are called '{variant.id}'")
            seen.add(folded)
            modes = [m.residency for m in variant.modes]
            if len(set(modes)) < len(modes):
                raise ValueError(f"variant '{variant.id}' has a mode twice")
            for ref, wanted in (
                (variant.manifest, f"{folder_of(variant)}/manifest.json"),
                (variant.chunks, f"chunks/{variant.id}.json"),
                (variant.records, f"records/{variant.id}.jsonl"),
            ):
                if ref is not None and ref.path != wanted:
                    raise ValueError(f"'{ref.path}' should be '{wanted}'")
        for ref in self.documents:
            if not ref.path.startswith("documents/"):
                raise ValueError(f"'{ref.path}' is not in documents/")
        return self

    def variant(self, variant_id: str) -> Variant:
        """Return a variant by its id.

        Raises
        ------
        ReleaseError
            If there is none.
        """
        for variant in self.variants:
            if variant.id == variant_id:
                return variant
        names = ", ".join(v.id for v in self.variants)
        raise ReleaseError(f"there is no variant '{variant_id}'", remedy=f"it has {names}")

    def to_bytes(self) -> bytes:
        """Return the bytes of ``release.json``: the same model, the same bytes."""
        return json_bytes(self.model_dump(mode="json"))


def folder_of(variant: Variant) -> str:
    """Return where a variant's bundle lies in its release."""
    return f"variants/{variant.id}"


def parse(data: bytes, path: str | Path = MANIFEST) -> ReleaseManifest:
    """Parse and validate the text of a release's manifest.

    Raises
    ------
    ReleaseError
        For broken JSON, an unknown schema version, or faults of the fields.
    """
    tree = parse_object(data, MAX_MANIFEST_BYTES, path, ReleaseError, AGAIN)
    version = tree.get("schema_version")
    if type(version) is not int or version < 1:
        raise ReleaseError(
            "is not a release's manifest: there is no version number",
            path=path,
            field="schema_version",
            remedy="name a release that `handheld release build` wrote",
        )
    if version > SCHEMA_VERSION:
        raise ReleaseError(
            f"version {version} was made by a newer handheld, this one reads {SCHEMA_VERSION}",
            path=path,
            field="schema_version",
            remedy="upgrade: pip install --upgrade handheld",
        )
    try:
        return ReleaseManifest.model_validate_json(data, strict=True)
    except ValidationError as error:
        message, field = describe_validation(error)
        raise ReleaseError(message, path=path, field=field, remedy=AGAIN) from None
