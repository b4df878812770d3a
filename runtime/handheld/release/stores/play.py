"""Google Play: AI packs with device targeting.

Form and limits are those of https://developer.android.com/google/play/on-device-ai: packs of at
most 1.5 GB (compressed), 4 GB for an app; device groups in the order of the XML file, of at most
five selectors each, by RAM and SoC; folders ending in ``#group_NAME`` go to their group only.

``ai_edge_litert.aot.ai_pack`` writes such packs too, for one compiled model whose variants differ
by NPU. A bundle is many files, and its variants differ by memory and engine as well, so it does
not fit.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import ClassVar
from xml.sax.saxutils import quoteattr

from handheld.errors import ReleaseError
from handheld.release.folder import Release
from handheld.release.manifest import MANIFEST, SIGNATURE, Mode, Variant
from handheld.release.stores.base import (
    Layout,
    Pack,
    Store,
    copy,
    files_of,
    for_platform,
    split,
    total,
)

MAX_PACK_BYTES = 1_500_000_000
MAX_APP_BYTES = 4_000_000_000
QUALCOMM = ("Qualcomm", "QTI")
"""Phones with the same SoC report either."""


class Play(Store):
    """AI packs, device groups and Gradle files for an Android app."""

    name: ClassVar[str] = "play"

    def fill(self, release: Release, folder: Path) -> Layout:
        """Write packs, ``device_targeting_config.xml`` and Gradle files."""
        variants = for_platform(release, "android")
        base = _identifier(release.manifest.name)
        groups = {v.id: f"g{i}_{_identifier(v.id)}" for i, v in enumerate(variants)}
        sizes = {v.id: files_of(release, v) for v in variants}
        parts = {v.id: split(sizes[v.id], MAX_PACK_BYTES, "a Play AI pack") for v in variants}
        largest = max(sum(s.values()) for s in sizes.values())
        if largest > MAX_APP_BYTES:
            raise ReleaseError(
                f"a variant has {largest / 1e9:.2f} GB, Play allows 4 GB for an app",
                path=release.path,
                remedy="leave the largest variant out",
            )
        count = max(map(len, parts.values()))
        names = [base if i == 0 else f"{base}_{i + 1}" for i in range(count)]
        packs = []
        for i, name in enumerate(names):
            assets = folder / name / "src" / "main" / "assets"
            here = [v for v in variants if i < len(parts[v.id])]
            for variant in here:
                target = assets / f"bundle#group_{groups[variant.id]}"
                copy(release, variant, parts[variant.id][i], target)
            if i == 0:
                assets.mkdir(parents=True, exist_ok=True)
                (assets / MANIFEST).write_bytes((release.path / MANIFEST).read_bytes())
                if release.is_signed:
                    (assets / SIGNATURE).write_bytes((release.path / SIGNATURE).read_bytes())
            (folder / name / "build.gradle.kts").write_text(_pack_gradle(name))
            packs.append(
                Pack(
                    name=name,
                    bytes=max(total(sizes[v.id], parts[v.id][i]) for v in here),
                    variants=tuple(v.id for v in here),
                    files=sum(len(parts[v.id][i]) for v in here),
                )
            )
        (folder / "device_targeting_config.xml").write_text(
            _targeting(release, variants, groups), encoding="utf-8"
        )
        (folder / "settings.snippet.gradle.kts").write_text(
            "".join(f'include(":{name}")\n' for name in names)
        )
        (folder / "app.snippet.gradle.kts").write_text(_app_gradle(names))
        (folder / "gradle.snippet.properties").write_text(
            "android.experimental.enableDeviceTargetingConfigApi=true\n"
        )
        return Layout("play", tuple(packs), tuple(_notes(sizes, parts, count)))


def _notes(
    sizes: dict[str, dict[str, int]], parts: dict[str, list[list[str]]], count: int
) -> list[str]:
    notes = [
        f"{variant}: {sum(sizes[variant].values()) / 1e9:.2f} GB is more than one pack's 1.5 GB; "
        f"its files are in {len(groups)} packs of "
        f"{', '.join(f'{total(sizes[variant], g) / 1e9:.2f}' for g in groups)} GB, which the app "
        "reads from one folder each"
        for variant, groups in parts.items()
        if len(groups) > 1
    ]
    if count == 1:
        notes.append("Every variant fits one pack; no split is needed.")
    notes += [
        "Sizes are uncompressed, an upper bound of what Play counts.",
        "Copy the packs beside app/, device_targeting_config.xml into app/, and take over the "
        "snippets. Needs Android Gradle Plugin 8.10 or newer.",
        "Not uploaded anywhere: Play Console's own checks have not run.",
    ]
    return notes


def _targeting(release: Release, variants: list[Variant], groups: dict[str, str]) -> str:
    part = release.manifest.budget.get("android", 1.0)
    lines = [
        "<config:device-targeting-config",
        '    xmlns:config="http://schemas.android.com/apk/config">',
    ]
    for variant in variants:
        # A phone gets the files if any way to run them fits; the app chooses the way.
        least = min(variant.modes, key=lambda m: m.memory_bytes)
        lines.append(f"    <config:device-group name={quoteattr(groups[variant.id])}>")
        lines += _selectors(variant, least, part)
        lines.append("    </config:device-group>")
    lines.append("</config:device-targeting-config>")
    return "\n".join(lines) + "\n"


def _selectors(variant: Variant, mode: Mode, part: float) -> list[str]:
    ram = int(mode.memory_bytes / part)
    start = f'        <config:device-selector ram-min-bytes="{ram}"'
    if not variant.needs.soc:
        return [f"{start}/>"]
    lines = [f"{start}>"]
    for soc in variant.needs.soc:
        lines += [
            f"            <config:system-on-chip manufacturer={quoteattr(maker)} "
            f"model={quoteattr(soc)}/>"
            for maker in _makers(soc)
        ]
    return [*lines, "        </config:device-selector>"]


def _makers(soc: str) -> tuple[str, ...]:
    if re.match(r"(SM|SDM|QCM|MSM)\d", soc):
        return QUALCOMM
    if soc.startswith("MT"):
        return ("Mediatek",)
    if soc.lower().startswith(("exynos", "s5e")):
        return ("Samsung",)
    return ("Google",)


def _identifier(text: str) -> str:
    """Return a name that Play allows: a letter, then letters, digits and underscores."""
    name = re.sub(r"[^A-Za-z0-9]+", "_", text).strip("_").lower()
    return name if name[:1].isalpha() else f"m_{name}"


def _pack_gradle(name: str) -> str:
    return (
        'plugins { id("com.android.ai-pack") }\n\n'
        f'aiPack {{\n    packName = "{name}"\n'
        '    dynamicDelivery { deliveryType = "on-demand" }\n}\n'
    )


def _app_gradle(names: list[str]) -> str:
    packs = ", ".join(f'":{name}"' for name in names)
    return (
        "android {\n"
        f"    assetPacks += listOf({packs})\n"
        "    bundle {\n"
        '        deviceTargetingConfig = file("device_targeting_config.xml")\n'
        "        deviceGroup {\n"
        "            enableSplit = true\n"
        '            defaultGroup = "other"\n'
        "        }\n    }\n}\n\n"
        'dependencies { implementation("com.google.android.play:ai-delivery:0.1.1-alpha01") }\n'
    )
