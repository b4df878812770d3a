"""Write the golden files of releases again: ``python tests/golden/make_releases.py``.

``selection/`` holds a manifest and the answers for the phones of the catalogue, which every
implementation of selection must give. ``releases/vN.zip`` is a release of schema version N; such a
file is written once and never again.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import releases  # noqa: E402
from handheld.archive import pack  # noqa: E402
from handheld.release import catalogue  # noqa: E402
from handheld.release.manifest import SCHEMA_VERSION  # noqa: E402
from handheld.release.selection import Phone, select  # noqa: E402


def selection() -> None:
    """Write the manifest and the answers."""
    folder = HERE / "selection"
    folder.mkdir(exist_ok=True)
    release = releases.sdxl()
    (folder / "release.json").write_bytes(release.to_bytes())
    gb = 2**30
    odd = [
        Phone(platform="android", soc="sm8650-ac", ram_bytes=12 * gb, os=12),
        Phone(platform="android", soc="SM8650", ram_bytes=12 * gb, os=11),
        Phone(platform="android", soc="QTI SM8650", ram_bytes=12 * gb, os=14),
        Phone(platform="android", soc="Qualcomm  sm8650-ac", ram_bytes=12 * gb, os=14),
        Phone(platform="android", soc="SM8650P", ram_bytes=12 * gb, os=14),
        Phone(platform="android", soc="SM8650", ram_bytes=12 * gb, os=14, free_bytes=10**9),
        Phone(platform="android", ram_bytes=12 * gb, engines=("executorch",)),
        Phone(platform="android", ram_bytes=12 * gb, budget_bytes=10**9),
        Phone(platform="android"),
        Phone(platform="ios", ram_bytes=8 * gb, os=18),
        Phone(platform="ios", ram_bytes=8 * gb, os=17),
        Phone(platform="host", ram_bytes=2 * gb),
    ]
    cases = []
    for phone in [*catalogue.find("all"), *odd]:
        answer = select(release, phone)
        cases.append(
            {
                "phone": phone.model_dump(mode="json", exclude_none=True),
                "variant": answer.variant,
                "residency": answer.residency,
            }
        )
    text = json.dumps(cases, indent=1, ensure_ascii=False) + "\n"
    (folder / "cases.json").write_text(text)


def release() -> None:
    """Write the release of this schema version, unless it is there."""
    folder = HERE / "releases"
    folder.mkdir(exist_ok=True)
    archive = folder / f"v{SCHEMA_VERSION}.zip"
    if archive.exists():
        return
    with tempfile.TemporaryDirectory() as name:
        private, public = releases.keys(Path(name))
        made = releases.release(Path(name), private)
        pack(made.path, archive)
        (folder / f"v{SCHEMA_VERSION}.pub").write_bytes(public.read_bytes())


if __name__ == "__main__":
    selection()
    release()
