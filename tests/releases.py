"""Small releases, keys and run records that several tests use."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import samples
from handheld.bundle import Bundle
from handheld.manifest import Artifact, ModelInfo, Verification
from handheld.protocol import Iteration, Memory, Thermal
from handheld.records import (
    BundleFacts,
    Check,
    DeviceFacts,
    MemoryFigures,
    Pass,
    RunRecord,
    Settings,
)
from handheld.release.builder import Options, build
from handheld.release.folder import Release
from handheld.release.manifest import Mode, Needs, ReleaseManifest, Variant
from handheld.release.rules import read as read_rules
from handheld.release.signing import Identity

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
HOST = DeviceFacts(id="host-1", kind="host", cores=2, ram_bytes=8 * 10**9, os="Debian 12")
PIXEL = HOST.model_copy(update={"id": "phone-1", "kind": "android"})
IPHONE = HOST.model_copy(update={"id": "phone-2", "kind": "ios"})
GOOD = Verification(snr_db=50.0, student_snr_db=51.0, max_abs_error=0.01, psnr_db=50.0)


def keys(folder: Path) -> tuple[Path, Path]:
    """Write a key pair; return the private and the public file."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    private, public = folder / "release.pem", folder / "release.pub"
    private.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    public.write_bytes(
        key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    return private, public


def bundle(
    path: Path, model: str = "sample", target: str = "litert-cpu", *, data: bytes = b"", **more: Any
) -> Bundle:
    """Write a verified bundle whose artifact has the given content."""
    manifest, files = samples.content()
    files["artifacts/unet.0.tflite"] = data or f"artifact of {model} for {target}".encode()
    reference = samples.ref("artifacts/unet.0.tflite", files["artifacts/unet.0.tflite"])
    artifact = manifest.artifacts[0].model_copy(
        update={
            "file": reference,
            "target": target,
            "engine": "litert" if target.startswith("litert") else "executorch",
            "verification": GOOD,
            "tools": {"torch": "2.13.0+cpu"},
        }
    )
    values: dict[str, Any] = {
        "model": ModelInfo(
            id=model, checkpoint_sha256="a" * 64, steps=1, sampler="dmd", guidance=1.0
        ),
        "target": target,
        "artifacts": (Artifact.model_validate(artifact.model_dump()),),
        "verification": GOOD,
    }
    from handheld import bundle as bundles

    changed = manifest.model_copy(update={**values, **more})
    written = bundles.write(changed, files, path)
    assert written is not None
    return written


def record(
    of: Bundle | None = None,
    *,
    number: int = 0,
    residency: Any = "resident",
    times: tuple[float, ...] = (40.0, 41.0, 42.0),
    peak: int = 50_000_000,
    device: DeviceFacts = HOST,
    **changes: Any,
) -> RunRecord:
    """Make a record of a good run."""
    iterations = tuple(
        Iteration(t_ms=100.0 * i, index=i, kind="timed", total_ms=t, engine_ms=t * 0.9)
        for i, t in enumerate(times)
    )
    memory = tuple(
        Memory(t_ms=10.0 * i, phase=phase, rss=peak * (i + 1) // 4, peak_rss=peak * (i + 1) // 4,
               anon=peak * (i + 1) // 8, file=peak * (i + 1) // 8, swap=0)
        for i, phase in enumerate(("start", "loaded", "first", "end"))
    )  # fmt: skip
    started = NOW + timedelta(minutes=number)
    passes = (
        Pass(
            purpose="latency",
            started=started,
            finished=started,
            iterations=iterations,
            thermal=(Thermal(t_ms=0.0, status=0), Thermal(t_ms=300.0, status=1)),
            done=True,
        ),
        Pass(purpose="memory", started=started, finished=started, memory=memory, done=True),
    )
    if of is None:
        facts = BundleFacts(sha256="0" * 64, model="sample", target="litert-cpu",
                            precision="int8", size="16x8", steps=1, bytes=1000)  # fmt: skip
    else:
        m = of.manifest
        facts = BundleFacts(sha256=of.sha256, model=m.model.id, target=m.target,
                            precision=m.precision, size="16x8", steps=1,
                            bytes=of.nbytes)  # fmt: skip
    values: dict[str, Any] = {
        "id": f"{started:%Y%m%dT%H%M%SZ}-{number:08x}",
        "status": "ok",
        "started": started,
        "finished": started,
        "handheld": "0.1.0",
        "command": ("handheld", "bench"),
        "device": device,
        "bundle": facts,
        "settings": Settings(residency=residency, threads=2, seed=0, warmup=1,
                             iterations=len(times), min_seconds=0.0),
        "passes": passes,
        "check": Check(sha256="0" * 64, reference_sha256="0" * 64, snr_db=99.0, psnr_db=99.0,
                       max_abs_error=0, min_psnr_db=40.0),
        "memory": MemoryFigures(separate_pass=True, peak_rss=peak, anon=peak // 2, file=peak // 2),
    }  # fmt: skip
    return RunRecord(**{**values, **changes})


def release(
    folder: Path, key: Path | None = None, *, version: int = 1, data: bytes = b""
) -> Release:
    """Build a release of four variants below a folder."""
    bundles, records = [], []
    for i, (model, target) in enumerate(
        (m, t) for m in ("big", "small") for t in ("litert-cpu", "executorch-xnnpack")
    ):
        made = bundle(folder / f"in-{version}" / f"{model}-{target}", model, target, data=data)
        bundles.append(made)
        for j, residency in enumerate(("resident", "stream")):
            peak = (80 if model == "big" else 40) * 10**6 // (j + 1)
            records.append(
                record(
                    made,
                    number=10 * i + j,
                    residency=residency,
                    peak=peak,
                    times=(30.0 + i, 31.0 + i, 32.0 + i),
                )
            )
    path = folder / f"release-{version}"
    options = Options(name="sample", version=version, label=f"1.{version}.0")
    build(bundles, records, path, options, Identity(key=key) if key else None)
    return Release.open(path)


def variant(
    name: str,
    *,
    unit: Any = "cpu",
    soc: tuple[str, ...] = (),
    memory: dict[str, int],
    storage: int = 10**6,
    platforms: tuple[Any, ...] = ("android", "ios", "host"),
    min_os: dict[Any, int] | None = None,
    engines: tuple[str, ...] = ("litert",),
) -> Variant:
    """Make a variant that needs the given memory, per residency."""
    some = samples.ref("x", b"")
    return Variant(
        id=name,
        model="sdxl",
        target="litert-cpu",
        precision="int4",
        unit=unit,
        bundle_sha256="0" * 64,
        manifest=some.model_copy(update={"path": f"variants/{name}/manifest.json"}),
        chunks=some.model_copy(update={"path": f"chunks/{name}.json"}),
        needs=Needs(
            platforms=platforms, soc=soc, min_os=min_os or {}, engines=engines,
            storage_bytes=storage,
        ),
        modes=tuple(
            Mode(residency=r, memory_bytes=n, basis="estimated")  # type: ignore[arg-type]
            for r, n in memory.items()
        ),
        verification=GOOD,
    )  # fmt: skip


def manifest(*variants: Variant) -> ReleaseManifest:
    """Make a release's manifest."""
    return ReleaseManifest(
        name="sdxl", version=1, budget=read_rules().budget, variants=variants, sources=()
    )


def sdxl() -> ReleaseManifest:
    """A release of full SDXL, with memory as a planner would estimate it, not as measured."""
    mb = 10**6
    return manifest(
        variant("qnn-sm8650", unit="npu", soc=("SM8650",), platforms=("android",),
                min_os={"android": 12}, memory={"resident": 2600 * mb}, storage=1700 * mb),
        variant("qnn-sm8550", unit="npu", soc=("SM8550",), platforms=("android",),
                min_os={"android": 12}, memory={"resident": 2600 * mb}, storage=1700 * mb),
        variant("coreml", unit="npu", platforms=("ios",), min_os={"ios": 18},
                memory={"resident": 2000 * mb}, storage=1500 * mb),
        variant("gpu", unit="gpu", platforms=("android",),
                memory={"resident": 3200 * mb}, storage=1700 * mb),
        variant("stack1-cpu", memory={"resident": 2900 * mb, "stream": 1300 * mb},
                storage=1700 * mb),
        variant("stack3-cpu", memory={"resident": 1500 * mb, "stream": 900 * mb},
                storage=900 * mb),
    )  # fmt: skip
