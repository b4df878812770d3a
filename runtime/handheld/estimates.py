"""Memory that a bundle needs, from its manifest alone."""

from __future__ import annotations

from handheld.execute import activation_bytes
from handheld.manifest import Manifest
from handheld.protocol import Residency


def peak_bytes(manifest: Manifest, residency: Residency) -> int:
    """Estimate the peak memory of a run: weights that are held, and the program's tensors.

    Streaming holds one artifact while the next is prefetched. Of several sizes, the one that takes
    most counts. What engines allocate besides, and the process itself, is not counted.

    Returns
    -------
    int
        Bytes; a lower bound rather than a promise.
    """

    def peak(name: str) -> int:
        artifacts = sorted((a.nbytes for a in manifest.called(name)), reverse=True)
        held = sum(artifacts) if residency == "resident" else sum(artifacts[:2])
        return held + activation_bytes(manifest.sizes[name].program)

    return max(map(peak, manifest.sizes))
