"""Harnesses for other devices: a folder of files that runs wherever it is copied."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

from pydantic import Field, ValidationError

from handheld.errors import HarnessError
from handheld.files import cache_root, sha256_file
from handheld.program import Model

OVERRIDE: Final = "HANDHELD_KITS"
"""Environment variable: a folder with kits that were made elsewhere, one folder each."""
MARK: Final = "kit.json"

NAMES: Final = {
    "android-arm64": "Android's own libraries, arm64-v8a",
    "linux-arm64": "arm64 Linux with its own loader and C library, CPU engines only",
    "linux-x86_64": "x86-64 Linux with its own loader and C library, CPU engines only",
}
"""The kits that there can be, and what the records of their runs say."""

FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.+-]{0,127}$")]


class KitInfo(Model):
    """What ``kit.json`` says."""

    name: str
    engines: dict[str, str]
    command: Annotated[tuple[str, ...], Field(min_length=1)]
    """How to start the harness from inside the folder."""
    environment: dict[Annotated[str, Field(pattern=r"^[A-Z_][A-Z0-9_]*$")], str] = {}
    files: dict[FileName, Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]]
    """Name to sha256."""
    sources: str | None = None
    """Hash of the sources that it was built from; null if it was made elsewhere."""


@dataclass(frozen=True)
class Kit:
    """A harness that can be copied to a device."""

    folder: Path
    info: KitInfo

    @property
    def sha256(self) -> str:
        """Hash of all files and how they are started."""
        text = json.dumps(self.info.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def label(self) -> str:
        """What records say about it; another build is another one."""
        what = NAMES.get(self.info.name, "made elsewhere")
        return f"{self.info.name}: {what}, build {self.sha256[:12]}"


def folder(name: str) -> Path:
    """Return where a kit belongs."""
    override = os.environ.get(OVERRIDE)
    return (Path(override) if override else cache_root() / "kits") / name


def find(*names: str) -> Kit | None:
    """Return the first of some kits that is there.

    Raises
    ------
    HarnessError
        If one is there and broken.
    """
    for name in names:
        path = folder(name) / MARK
        if not path.is_file():
            continue
        try:
            info = KitInfo.model_validate_json(path.read_bytes())
        except (OSError, ValidationError):
            info = None
        if info is None or any(not (path.parent / n).is_file() for n in info.files):
            raise HarnessError(
                "this harness for other devices is broken",
                path=path,
                remedy=f"run `handheld harness build --for {name}`",
            )
        return Kit(path.parent, info)
    return None


def write(
    target: Path,
    name: str,
    engines: dict[str, str],
    command: tuple[str, ...],
    environment: dict[str, str],
    sources: str | None = None,
) -> KitInfo:
    """Write ``kit.json`` for the files that are in a folder."""
    files = {
        p.name: sha256_file(p)
        for p in sorted(target.iterdir())
        if p.suffix not in (".json", ".txt")
    }
    info = KitInfo(
        name=name,
        engines=engines,
        command=command,
        environment=environment,
        files=files,
        sources=sources,
    )
    (target / MARK).write_text(info.model_dump_json(indent=2))
    return info
