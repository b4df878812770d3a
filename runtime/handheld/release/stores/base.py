"""The seam between a release and a store: one class per store, in one file."""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from handheld.bundle import MANIFEST as BUNDLE_MANIFEST
from handheld.bundle import references
from handheld.errors import OutputError, ReleaseError
from handheld.files import replaced_folder
from handheld.release.folder import Release
from handheld.release.manifest import Variant, folder_of

MARK = "handheld-store.txt"
"""Marks a folder that a store has laid out, and says what to do with it."""


@dataclass(frozen=True)
class Pack:
    """A unit that a store delivers, and the most that one device gets of it."""

    name: str
    bytes: int
    """Uncompressed: an upper bound of what the store counts."""
    variants: tuple[str, ...]
    files: int


@dataclass(frozen=True)
class Layout:
    """What was laid out."""

    store: str
    packs: tuple[Pack, ...]
    notes: tuple[str, ...] = field(default=())
    """Splits and their reasons, variants that were left out, and what to run next."""


class Store(ABC):
    """A store's form of a release."""

    name: ClassVar[str]

    @abstractmethod
    def fill(self, release: Release, folder: Path) -> Layout:
        """Write the files into an empty folder.

        Raises
        ------
        ReleaseError
            If a limit of the store cannot be kept; the remedy proposes what to do.
        """

    def lay_out(self, release: Release, output: Path) -> Layout:
        """Write the files; what an earlier run wrote is replaced.

        Raises
        ------
        OutputError
            If something else is in the way.
        ReleaseError
        """
        taken = output.exists() and (not output.is_dir() or any(output.iterdir()))
        if taken and not (output / MARK).is_file():
            raise OutputError(
                "something that is no store's layout is there already",
                path=output,
                remedy="remove it or choose another place",
            )
        with replaced_folder(output) as folder:
            layout = self.fill(release, folder)
            lines = [f"Release {release.manifest.name}, version {release.manifest.version}", ""]
            lines += [
                f"{p.name}: {p.bytes / 1e6:.1f} MB at most on one device, {p.files} files, "
                f"for {', '.join(p.variants)}"
                for p in layout.packs
            ]
            lines += ["", *layout.notes]
            (folder / MARK).write_text("\n".join(lines) + "\n", encoding="utf-8")
        return layout


def files_of(release: Release, variant: Variant) -> dict[str, int]:
    """Return a variant's files by their path inside the bundle, with their bytes."""
    manifest = release.bundle(variant).manifest
    found = {ref.path: ref.bytes for _, ref in references(manifest)}
    return {BUNDLE_MANIFEST: variant.manifest.bytes, **found}


def copy(release: Release, variant: Variant, names: Iterable[str], target: Path) -> None:
    """Copy some of a variant's files, by links where the disk allows it."""
    for name in names:
        source, destination = release.path / folder_of(variant) / name, target / name
        destination.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, destination)


def split(files: dict[str, int], limit: int, store: str) -> list[list[str]]:
    """Divide files into as few groups as first-fit-decreasing finds, each within a limit.

    Raises
    ------
    ReleaseError
        If a single file is over the limit.
    """
    name, largest = max(files.items(), key=lambda item: item[1])
    if largest > limit:
        raise ReleaseError(
            f"'{name}' has {largest / 1e9:.2f} GB, {store} allows {limit / 1e9:g} GB",
            field=name,
            remedy="export again with smaller segments: lower the target's segment_weights",
        )
    groups: list[tuple[int, list[str]]] = []
    for path, size in sorted(files.items(), key=lambda item: (-item[1], item[0])):
        for i, (used, members) in enumerate(groups):
            if used + size <= limit:
                groups[i] = (used + size, [*members, path])
                break
        else:
            groups.append((size, [path]))
    return [sorted(members) for _, members in groups]


def for_platform(release: Release, platform: str) -> list[Variant]:
    """Return the variants for a platform, preferred first.

    Raises
    ------
    ReleaseError
        If there is none.
    """
    chosen = [v for v in release.manifest.variants if platform in v.needs.platforms]
    if not chosen:
        raise ReleaseError(f"the release has nothing for {platform}", path=release.path)
    return chosen


def unique(name: str, taken: Collection[str]) -> str:
    """Return a name that is not taken: itself, or with a number behind it."""
    number = 2
    found = name
    while found in taken:
        found = f"{name}-{number}"
        number += 1
    return found


def total(files: dict[str, int], names: Sequence[str]) -> int:
    """Return the bytes of some files."""
    return sum(files[name] for name in names)
