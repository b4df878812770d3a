"""Apple: managed asset packs for Background Assets, iOS 26 and newer.

The form is that of ``xcrun ba-package``: one manifest per pack with ``assetPackID``,
``downloadPolicy``, ``fileSelectors`` and ``platforms``; selectors are relative to the folder in
which the tool is run. See https://developer.apple.com/documentation/backgroundassets.

Packs cannot be targeted by RAM or chip, so every variant is a pack on demand, and the app chooses
by release.json, which comes in a small pack of its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from handheld.errors import ReleaseError
from handheld.release.folder import Release
from handheld.release.manifest import MANIFEST, SIGNATURE, folder_of
from handheld.release.stores.base import (
    Layout,
    Pack,
    Store,
    copy,
    files_of,
    for_platform,
    unique,
)

MAX_HOSTED_BYTES = 200_000_000_000
"""Of all packs of an app that Apple hosts."""


class Apple(Store):
    """Asset packs and the script that packages them."""

    name: ClassVar[str] = "apple"

    def fill(self, release: Release, folder: Path) -> Layout:
        """Write contents, manifests and ``package.sh``."""
        variants = for_platform(release, "ios")
        sizes = {v.id: files_of(release, v) for v in variants}
        everything = sum(sum(s.values()) for s in sizes.values())
        if everything > MAX_HOSTED_BYTES:
            raise ReleaseError(
                f"all packs have {everything / 1e9:.0f} GB, Apple hosts 200 GB for an app",
                path=release.path,
                remedy="leave variants out, or host the packs yourself",
            )
        base = _identifier(release.manifest.name)
        index = f"{base}-release"
        (folder / "release").mkdir()
        for name in (MANIFEST, SIGNATURE):
            if (release.path / name).is_file():
                (folder / "release" / name).write_bytes((release.path / name).read_bytes())
        essential = {"essential": {"installationEventTypes": ["firstInstallation"]}}
        _manifest(folder, index, "release", essential)
        size = sum(p.stat().st_size for p in (folder / "release").iterdir())
        packs = [Pack(index, size, tuple(v.id for v in variants), 2)]
        for variant in variants:
            name = unique(f"{base}-{_identifier(variant.id)}", {p.name for p in packs})
            copy(release, variant, sizes[variant.id], folder / folder_of(variant))
            _manifest(folder, name, folder_of(variant), {"onDemand": {}})
            files = sizes[variant.id]
            packs.append(Pack(name, sum(files.values()), (variant.id,), len(files)))
        script = folder / "package.sh"
        script.write_text(_SCRIPT)
        script.chmod(0o755)
        return Layout(
            "apple",
            tuple(packs),
            (
                "Run ./package.sh on a Mac with Xcode 26, then upload the .aar files.",
                "The app reads release/release.json, chooses a variant and asks for its pack.",
                "Not packaged here: Apple's tool runs on macOS only.",
            ),
        )


_SCRIPT = """#!/bin/sh
# Packages every asset pack with Apple's tool; run it in this folder, on a Mac.
set -eu
cd "$(dirname "$0")"
mkdir -p packaged
for manifest in manifests/*.json; do
  name=$(basename "$manifest" .json)
  xcrun ba-package package "$manifest" --output-path "packaged/$name.aar"
done
"""


def _manifest(folder: Path, name: str, directory: str, policy: Mapping[str, object]) -> None:
    tree = {
        "assetPackID": name,
        "downloadPolicy": policy,
        "fileSelectors": [{"directory": directory}],
        "platforms": ["iOS"],
    }
    target = folder / "manifests" / f"{name}.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")


def _identifier(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-")
