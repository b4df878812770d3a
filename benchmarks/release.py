"""From checkpoints to a signed release in one command, and what an update of it costs.

    python benchmarks/release.py -o build/release
    python benchmarks/release.py -o elsewhere --records build/release/records.jsonl \
        --key build/release/release.pem

Exports critter's students for both engines, measures each bundle once resident and once streamed,
builds and signs a release, and verifies it. The first run makes a key and records; given those
again, another folder gets the same bytes. Then two made-up updates of one variant are published
and fetched: an equal release, and fine-tunes that change a tenth of the bytes of its weights.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from handheld import bundle as bundles
from handheld import models, records
from handheld.bundle import Bundle, references
from handheld.devices.host import HostDevice
from handheld.manifest import FileRef
from handheld.release import Identity, Options, Phone, build, verify
from handheld.release.publish import publish
from handheld.release.update import update
from stages import ROOT, Stages, build_harness, command, export, guarded, measure, say, versions
from stages import write_summary as write

TARGETS = ("litert-cpu", "executorch-xnnpack")
MODELS = ("critter-stack1", "critter-stack2", "critter-stack3")


def new_key(folder: Path) -> Path:
    """Write a key pair and return the private file."""
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    private = folder / "release.pem"
    descriptor = os.open(private, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as f:
        f.write(key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption()))
    return private


def public_of(private: Path, folder: Path) -> Path:
    """Write the public half of a key and return its file."""
    from cryptography.hazmat.primitives import serialization as s

    key = s.load_pem_private_key(private.read_bytes(), None)
    public = folder / "release.pub"
    public.write_bytes(
        key.public_key().public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo)
    )
    return public


def tree_hash(path: Path) -> str:
    """Return one hash over the names and contents of all files of a folder."""
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        content = hashlib.sha256(file.read_bytes()).hexdigest()
        digest.update(f"{file.relative_to(path).as_posix()} {content}\n".encode())
    return digest.hexdigest()


def changed(source: Bundle, target: Path, how: str) -> Bundle:
    """Write a bundle whose artifacts differ in a tenth of their bytes; its figures are invented."""
    rng = np.random.default_rng(1)
    manifest = source.manifest
    files: dict[str, Path | bytes] = {
        ref.path: source.path / ref.path for _, ref in references(manifest)
    }
    artifacts = []
    for artifact in manifest.artifacts:
        data = np.fromfile(source.path / artifact.file.path, np.uint8)
        count = len(data) // 10
        if how == "layers":
            start = len(data) // 2
            data[start : start + count] = rng.integers(0, 256, count, np.uint8)
        else:
            places = rng.choice(len(data), count, replace=False)
            data[places] += rng.choice(np.array([1, 255], np.uint8), count)
        files[artifact.file.path] = data.tobytes()
        ref = FileRef(
            path=artifact.file.path,
            sha256=hashlib.sha256(data.tobytes()).hexdigest(),
            bytes=len(data),
        )
        artifacts.append(artifact.model_copy(update={"file": ref}))
    made = bundles.write(manifest.model_copy(update={"artifacts": tuple(artifacts)}), files, target)
    assert made is not None
    return made


def updates(source: Bundle, identity: Identity, key: Path) -> dict[str, Any]:
    """Publish releases of one variant and fetch each after the first one; return their bytes."""
    phone = Phone(platform="android", ram_bytes=8 * 2**30, os=14)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        name_of = source.manifest.model.id

        def release(bundle: Bundle, version: int) -> Path:
            path = folder / f"r{version}"
            options = Options("update", version, force=frozenset({variant}))
            build([bundle], [], path, options, Identity(key=key))
            return path

        variant = f"{name_of}-{source.manifest.target}-{source.manifest.precision}"
        first = release(source, 1)
        cases = {
            "equal": source,
            "layers": changed(source, folder / "layers", "layers"),
            "codes": changed(source, folder / "codes", "codes"),
        }
        for i, (case, bundle) in enumerate(cases.items(), 2):
            site, device = folder / f"site-{case}", folder / f"device-{case}"
            publish(first, site)
            full = update(device, str(site), identity, phone).fetched_bytes
            publish(release(bundle, i), site, [first])
            fetched = update(device, str(site), identity, phone).fetched_bytes
            found[case] = {"full_bytes": full, "fetched_bytes": fetched, "part": fetched / full}
            say(f"         update, {case}: {fetched:,} of {full:,} bytes, {fetched / full:.1%}")
    return found


def main() -> int:
    """Make the release."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "build" / "release")
    parser.add_argument("--model", action="append", help="repeatable; by default the students")
    parser.add_argument("--precision", default="int8", help="of layers without codes of their own")
    parser.add_argument("--version", type=int, default=1)
    parser.add_argument("--records", type=Path, help="run records from before")
    parser.add_argument("--key", type=Path, help="private key; by default a new one")
    parser.add_argument("--gate", type=Path, default=ROOT / "benchmarks" / "release_gates.toml")
    parser.add_argument("--no-updates", action="store_true", help="skip the updates")
    arguments = parser.parse_args()
    folder: Path = arguments.output
    folder.mkdir(parents=True, exist_ok=True)
    chosen = arguments.model or list(MODELS)
    stages = Stages()
    made = [
        export(models.checkpoint(m), t, arguments.precision, folder / "bundles", stages)
        for m in chosen
        for t in TARGETS
    ]
    file = arguments.records or folder / "records.jsonl"
    if arguments.records is None:
        build_harness(stages)
        device = HostDevice()
        have = {r.bundle.sha256 for r in records.read(file)} if file.exists() else set()
        for bundle in made:
            for residency in ("resident", "stream") if bundle.sha256 not in have else ():
                measure(bundle, device, residency, file, stages, iterations=10, first_ever=False)
    key = arguments.key or folder / "release.pem"
    if not key.exists():
        key = new_key(folder)
    public = public_of(key, folder)
    identity = Identity(key=public)
    hashes = {b.sha256 for b in made}
    runs = [r for r in records.read(file) if r.bundle.sha256 in hashes]
    documents = [models.checkpoint(m) / "README.md" for m in ["critter", *chosen]]
    target = folder / "release"
    with stages("building and signing") as end:
        options = Options(
            "critter-students",
            arguments.version,
            label=f"1.0.{arguments.version}",
            gates=arguments.gate,
            documents=tuple(d for d in documents if d.is_file()),
        )
        manifest = build(made, runs, target, options, Identity(key=key))
        end(f"{len(manifest.variants)} variants")
    with stages("verifying") as end:
        opened = verify(target, identity)
        end(f"{len(opened.digests)} files")
    whole = tree_hash(target)
    size = sum(p.stat().st_size for p in target.rglob("*") if p.is_file())
    say(f"release {whole}, {size / 1e6:.1f} MB: {target}")
    found = {} if arguments.no_updates else updates(made[0], identity, key)
    write(
        folder / "summary.json",
        {
            "command": list(command()),
            "versions": versions(),
            "device": HostDevice().facts().model_dump(mode="json"),
            "stages": stages.done,
            "tree_sha256": whole,
            "bytes": size,
            "variants": [v.id for v in manifest.variants],
            "updates": found,
        },
    )
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
