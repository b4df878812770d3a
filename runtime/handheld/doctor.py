"""What is missing on this machine, and how to get it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import shutil
import tempfile
from dataclasses import asdict, dataclass

from handheld import __version__, devices, harness, models, qnn
from handheld.errors import HandheldError
from handheld.files import cache_root, describe_os_error

FREE_BYTES = 10 * 10**9
"""Less free space than this is not enough to export a full-size model."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str
    ok: bool
    found: str | None
    """What is there, or why it is not usable."""
    needed_for: str
    remedy: str | None = None
    required: bool = True

    def as_dict(self) -> dict[str, str | bool | None]:
        """Return the finding as JSON values."""
        return asdict(self)


def examine() -> list[Finding]:
    """Look at everything that commands need."""
    return [
        Finding("handheld", True, f"{__version__}, Python {platform.python_version()}", "all"),
        _cache(),
        *_harness(),
        *_devices(),
        _exporter(),
        *(_package(*row) for row in _PACKAGES),
        _qnn(),
        _models(),
    ]


_PACKAGES = (
    ("torch", "torch", "export, verify, text encoders"),
    ("diffusers", "diffusers", "export"),
    ("transformers", "transformers", "text encoders"),
    ("litert-torch", "litert_torch", "export --target litert-cpu"),
    ("executorch", "executorch", "export --target executorch-xnnpack"),
    ("kserve", "kserve", "serve-text"),
)
_EXTRA = 'pip install "handheld[export]"'


def _cache() -> Finding:
    root = cache_root()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            free = shutil.disk_usage(root).free
    except OSError as error:
        return Finding(
            "cache folder", False, f"{root}: {describe_os_error(error)[0]}", "all",
            "set XDG_CACHE_HOME to a folder that can be written",
        )  # fmt: skip
    text = f"{root}, {free / 1e9:.1f} GB free"
    if free < FREE_BYTES:
        return Finding(
            "cache folder", False, text, "export of full-size models",
            "free some space or set XDG_CACHE_HOME", required=False,
        )  # fmt: skip
    return Finding("cache folder", True, text, "all")


def _harness() -> list[Finding]:
    purpose = "bench, generate"
    try:
        paths = harness.find()
    except HandheldError as error:
        return [Finding("harness", False, str(error), purpose, error.remedy)]
    if paths is not None:
        engines = ", ".join(f"{k} {v}" for k, v in paths.engines.items())
        return [Finding("harness", bool(paths.engines), engines or "no engine", purpose)]
    lacking = [r for r in harness.requirements() if not r.ok]
    found = [
        Finding(r.name, False, r.found_version, "harness build", r.remedy, required=not r.optional)
        for r in lacking
    ]
    built = Finding("harness", False, "not built yet", purpose, "handheld harness build")
    return [built, *found]


def _devices() -> list[Finding]:
    findings = []
    for name, provider in devices.providers().items():
        obstacles = [] if name == "host" else provider.obstacles()
        count = len(provider.attached())
        findings.append(
            Finding(
                f"devices: {name}",
                not obstacles,
                "; ".join(str(o) for o in obstacles) or f"{count} attached",
                "bench",
                required=False,
            )
        )
    return findings


def _exporter() -> Finding:
    if importlib.util.find_spec("handheld_export") is not None:
        return Finding("handheld_export", True, "installed", "export, verify", required=False)
    return Finding("handheld_export", False, None, "export, verify", _EXTRA, required=False)


def _package(name: str, module: str, purpose: str) -> Finding:
    try:
        found = importlib.util.find_spec(module) is not None
        version = importlib.metadata.version(name) if found else None
    except (ImportError, ValueError, importlib.metadata.PackageNotFoundError):
        version = None
    missing = version is None
    extra = _EXTRA.replace("export", "serve") if purpose == "serve-text" else _EXTRA
    return Finding(name, not missing, version, purpose, extra if missing else None, required=False)


def _qnn() -> Finding:
    sdk = qnn.find("executorch")
    return Finding(
        "QNN", sdk is not None, sdk.build if sdk else None, "export --target executorch-qnn:SOC",
        qnn.missing("executorch"), required=False,
    )  # fmt: skip


def _models() -> Finding:
    names = models.names()
    if names:
        return Finding("models", True, ", ".join(names), "generate MODEL", required=False)
    return Finding(
        "models", False, None, "generate MODEL",
        "set HANDHELD_MODELS to a folder of checkpoints", required=False,
    )  # fmt: skip
