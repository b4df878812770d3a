"""JSON Schemas of everything that handheld persists or speaks.

``python -m handheld.schema FOLDER`` writes them; docs/schema holds them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from handheld.files import write_file
from handheld.manifest import Manifest
from handheld.protocol import AnyEvent, Job
from handheld.records import RunRecord
from handheld.release.manifest import ReleaseManifest

_TYPES: dict[str, Any] = {
    "manifest": Manifest,
    "job": Job,
    "event": AnyEvent,
    "record": RunRecord,
    "release": ReleaseManifest,
}
NAMES = tuple(_TYPES)


def schema(name: str) -> dict[str, Any]:
    """Return the JSON Schema of one kind of object."""
    tree = TypeAdapter(_TYPES[name]).json_schema()
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"handheld {name}",
        **{k: v for k, v in tree.items() if k != "title"},
    }


def text(name: str) -> str:
    """Return the JSON Schema as the text of its file."""
    return json.dumps(schema(name), indent=2, ensure_ascii=False) + "\n"


def write(folder: Path) -> list[Path]:
    """Write all schemas to a folder as ``NAME.json``."""
    paths = []
    for name in NAMES:
        path = folder / f"{name}.json"
        write_file(path, text(name).encode())
        paths.append(path)
    return paths


if __name__ == "__main__":
    write(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/schema"))
