"""Models by name: checkpoints in well-known folders, and bundles made from them."""

from __future__ import annotations

import os
from pathlib import Path

from handheld.bundle import MANIFEST
from handheld.errors import UsageError
from handheld.files import cache_root


def roots() -> list[Path]:
    """Return the folders of models: HANDHELD_MODELS, ./models, the checkout's models."""
    listed = [Path(p) for p in os.environ.get("HANDHELD_MODELS", "").split(os.pathsep) if p]
    checkout = Path(__file__).resolve().parents[2] / "models"
    return [*listed, Path("models"), checkout]


def names() -> list[str]:
    """Return the names of all models in :func:`roots`."""
    found = {p.name for r in roots() if r.is_dir() for p in r.iterdir() if (p / "unet").is_dir()}
    return sorted(found)


def is_bundle(path: Path) -> bool:
    """Tell whether a path looks like a bundle: a folder with a manifest, or a file."""
    return path.is_file() or (path / MANIFEST).is_file()


def checkpoint(name: str) -> Path:
    """Return the folder of a checkpoint, given by path or by name.

    Raises
    ------
    UsageError
        If there is none.
    """
    candidates = [Path(name)]
    if os.sep not in name and name not in ("", ".", ".."):
        candidates += [root / name for root in roots()]
    for path in candidates:
        if (path / "unet").is_dir():
            return path
    known = names()
    raise UsageError(
        f"there is no bundle, checkpoint or model '{name}'",
        remedy=f"name a path, or one of: {', '.join(known)}" if known else "name a path",
    )


def bundle_cache(name: str, target: str, precision: str) -> Path:
    """Return where the bundle of a model is kept once it has been made."""
    return cache_root() / "bundles" / f"{name}-{target}-{precision}"
