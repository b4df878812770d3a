"""The bill of materials of a release, as CycloneDX 1.6: models, and the tools that made them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from handheld.manifest import Manifest

NAME = "sbom.cdx.json"


def make(manifests: Sequence[Manifest], name: str) -> bytes:
    """Return the bill of materials as the bytes of a file.

    It says what the manifests say: which tools made the artifacts, not what is installed now.
    """
    tools: dict[tuple[str, str], dict[str, Any]] = {}
    models: dict[str, dict[str, Any]] = {}
    for manifest in manifests:
        versions = [manifest.provenance.tools, *(a.tools for a in manifest.artifacts)]
        for package, version in {pair for group in versions for pair in group.items()}:
            # A local part such as +cpu belongs to a package URL in escaped form.
            purl = f"pkg:pypi/{package.lower()}@{version.replace('+', '%2B')}"
            tools[package, version] = {
                "type": "application",
                "bom-ref": purl,
                "name": package,
                "version": version,
                "purl": purl,
            }
        model = manifest.model
        entry: dict[str, Any] = {
            "type": "machine-learning-model",
            "bom-ref": f"model:{model.id}@{model.checkpoint_sha256[:16]}",
            "name": model.id,
            "hashes": [{"alg": "SHA-256", "content": model.checkpoint_sha256}],
        }
        if manifest.licence:
            entry["licenses"] = [{"license": {"name": manifest.licence}}]
        models[entry["bom-ref"]] = entry
    tree = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": {"type": "data", "name": name}},
        "components": [models[k] for k in sorted(models)] + [tools[k] for k in sorted(tools)],
    }
    return (json.dumps(tree, indent=1, ensure_ascii=False) + "\n").encode()
