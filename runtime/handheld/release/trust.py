"""Whether a release may be used: who made it, that it is whole, and that it is not too old."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from handheld.errors import TrustError
from handheld.release import signing
from handheld.release.folder import Release, digest_tree, located, read_errors
from handheld.release.manifest import MANIFEST, ReleaseManifest


def verify(
    path: str | Path,
    identity: signing.Identity | None,
    *,
    least_version: int = 1,
    now: datetime | None = None,
) -> Release:
    """Open a release that may come from anybody, and check everything about it.

    Parameters
    ----------
    path : path-like
        A folder or a zip file.
    identity : Identity or None
        Who must have signed it. None checks hashes only: that it is whole, not whose it is.
    least_version : int
        Older ones are refused; see :func:`check_age`.
    now : datetime, optional
        By default the clock's.

    Raises
    ------
    TrustError
        If the signature does not hold, a file is not the one that was signed, the release has
        expired, or it is older than it may be.
    ReleaseError
        If it is not a whole release.
    """
    root = located(path)
    with read_errors(root):
        digests = digest_tree(root)
        if identity is not None:
            signing.check(root, digests, identity)
        release = Release.check(root, digests)
    check_age(release.manifest, root / MANIFEST, least_version, now)
    return release


def check_age(
    manifest: ReleaseManifest, path: Path, least_version: int = 1, now: datetime | None = None
) -> None:
    """Refuse a release that has expired, or is older than one that was seen before.

    Raises
    ------
    TrustError
        In either case.
    """
    if manifest.version < least_version:
        raise TrustError(
            f"version {manifest.version} is older than {least_version}: a release never goes back",
            path=path,
            field="version",
            remedy="fetch the newest release; to withdraw one, publish it again as a newer version",
        )
    now = now or datetime.now(UTC)
    if manifest.expires is not None and now >= manifest.expires:
        raise TrustError(
            f"expired at {manifest.expires.isoformat()}",
            path=path,
            field="expires",
            remedy="fetch a newer release",
        )
