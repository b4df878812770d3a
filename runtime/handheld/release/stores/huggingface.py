"""Hugging Face: a model repository with the release, a card and LFS rules."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import ClassVar

from handheld.archive import walk
from handheld.errors import ReleaseError
from handheld.release.folder import Release
from handheld.release.stores.base import Layout, Pack, Store

MAX_FILE_BYTES = 50_000_000_000
"""Of one file that the hub takes."""


class HuggingFace(Store):
    """The release as it is, beside a model card."""

    name: ClassVar[str] = "huggingface"

    def fill(self, release: Release, folder: Path) -> Layout:
        """Copy the release, and write ``README.md`` and ``.gitattributes``."""
        for name, (_, size) in release.digests.items():
            if size > MAX_FILE_BYTES:
                raise ReleaseError(
                    f"has {size / 1e9:.0f} GB, the hub takes files of 50 GB",
                    path=release.path / name,
                    remedy="export again with smaller segments",
                )
        # In a folder of its own, so that the signature covers all of it and nothing else.
        shutil.copytree(release.path, folder / "release")
        (folder / "README.md").write_text(_card(release), encoding="utf-8")
        (folder / ".gitattributes").write_text(
            "".join(
                f"*.{suffix} filter=lfs diff=lfs merge=lfs -text\n"
                for suffix in ("tflite", "pte", "safetensors", "onnx", "bin")
            )
        )
        files = list(walk(folder))
        pack = Pack(
            name=release.manifest.name,
            bytes=sum(p.stat().st_size for p in files),
            variants=tuple(v.id for v in release.manifest.variants),
            files=len(files),
        )
        return Layout(
            "huggingface",
            (pack,),
            (
                "Upload with: hf upload OWNER/NAME . --revision VERSION",
                "Not uploaded here.",
            ),
        )


def _card(release: Release) -> str:
    m = release.manifest
    licences = sorted({s.licence for s in m.sources if s.licence})
    rows = []
    for v in m.variants:
        memory = " / ".join(f"{mode.memory_bytes / 1e6:.0f} ({mode.basis})" for mode in v.modes)
        snr = v.verification.snr_db
        rows.append(
            f"| {v.id} | {v.unit} | {', '.join(v.needs.platforms)} | {v.precision} "
            f"| {v.needs.storage_bytes / 1e6:.1f} | {memory} "
            f"| {'-' if snr is None else f'{snr:.1f}'} |"
        )
    forced = [f"- {v.id}: {fault}" for v in m.variants for fault in v.forced]
    parts = [
        "---",
        "license: other",
        # A JSON string is a YAML string.
        f"license_name: {json.dumps('; '.join(licences) or 'not stated', ensure_ascii=False)}",
        "library_name: handheld",
        "pipeline_tag: text-to-image",
        "tags: [on-device, sdxl]",
        "---",
        f"# {m.name} {m.label or ''}".rstrip(),
        "",
        f"Release {m.version}, for phones. `release/release.json` says which variant fits which "
        "phone.",
        "",
        "| variant | unit | for | precision | MB | memory MB | SNR dB |",
        "| --- | --- | --- | --- | ---: | ---: | ---: |",
        *rows,
        "",
        "Memory is that of the device where it was measured, which release.json names.",
        "",
        "    handheld release verify release --key PUBLIC-KEY",
        "",
    ]
    if forced:
        parts += ["## Taken though they fail", "", *forced, ""]
    parts += ["## Sources", ""]
    parts += [
        f"- {s.model}: checkpoint {s.checkpoint_sha256}, licence {s.licence or 'not stated'}, "
        f"recipe {s.recipe or 'not stated'}"
        for s in m.sources
    ]
    return "\n".join(parts) + "\n"
