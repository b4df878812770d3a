"""Releases: signed sets of bundles, one of which fits a phone.

from handheld import release

opened = release.verify("build/release", release.Identity(key=Path("release.pub")))
answer = release.select(opened.manifest, release.Phone(platform="android", ram_bytes=8 * 10**9))
"""

from handheld.release.builder import Options, build
from handheld.release.folder import Release
from handheld.release.manifest import ReleaseManifest, Variant
from handheld.release.selection import Answer, Phone, select
from handheld.release.signing import Identity
from handheld.release.trust import verify

__all__ = [
    "Answer",
    "Identity",
    "Options",
    "Phone",
    "Release",
    "ReleaseManifest",
    "Variant",
    "build",
    "select",
    "verify",
]
