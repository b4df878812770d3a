"""What the benchmark scripts share: stages, bundles, run records, rows and tables."""

from __future__ import annotations

import json
import logging
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.table import Table

from handheld import bench, records
from handheld.bundle import Bundle
from handheld.devices.base import Device
from handheld.errors import HandheldError
from handheld.files import write_file
from handheld.protocol import Residency
from handheld.records import RunRecord

ROOT = Path(__file__).resolve().parents[1]
RESIDENCIES: tuple[Residency, ...] = get_args(Residency)
_PACKAGES = ("handheld", "torch", "executorch", "ai-edge-litert", "litert-torch", "diffusers")


class Stages:
    """Prints a line when a stage starts and one when it ends, and keeps its seconds."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.done: list[dict[str, Any]] = []

    @property
    def seconds(self) -> float:
        """Seconds since the script started."""
        return time.monotonic() - self.began

    @contextmanager
    def __call__(self, name: str) -> Iterator[Callable[[str], None]]:
        """Run a stage; the block gets a function that takes what to print at its end."""
        start = self.seconds
        said: list[str] = []
        say(f"[{start:4.0f} s] {name} ...")
        yield said.append
        spent = self.seconds - start
        self.done.append({"name": name, "seconds": round(spent, 2)})
        say(f"         {'; '.join([*said, f'{spent:.1f} s'])}")


def say(text: str) -> None:
    """Print a line at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def guarded(main: Callable[[], int]) -> int:
    """Run a script's main function; turn what a user can cause into a line and a code."""
    _quiet()
    try:
        return main()
    except HandheldError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted; what is done stays in the cache\n")
        return 130


def _quiet() -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    quiet = {
        "PYTHONWARNINGS": "ignore",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    for name, value in quiet.items():
        os.environ.setdefault(name, value)


def build_harness(stages: Stages) -> None:
    """Build the native harness, unless it is there already."""
    from handheld import harness

    with stages("building the native harness") as end:
        paths = harness.build()
        end(", ".join(f"{name} {number}" for name, number in sorted(paths.engines.items())))


def export(
    checkpoint: Path,
    target: str,
    precision: str,
    folder: Path,
    stages: Stages,
    *,
    sizes: Sequence[str] = (),
) -> Bundle:
    """Export a bundle through the cache, of several sizes or of the checkpoint's own."""
    from handheld.commands.plan import picture_size
    from handheld_export.checkpoint import Checkpoint
    from handheld_export.export import Options, Progress
    from handheld_export.export import export as run

    path = folder / "-".join((checkpoint.name, target, precision, *sizes))
    cached = 0

    def count(segment: str, weights: int, meta: dict[str, Any] | None) -> None:
        nonlocal cached
        cached += meta is None

    name = f"exporting {checkpoint.name} for {target}, {precision}"
    with stages(name) as end, stderr_to(folder / "export.log"):
        options = Options(target, precision, sizes=tuple(map(picture_size, sizes)))
        manifest = run(Checkpoint(checkpoint), options, path, progress=Progress(done=count))
        size = manifest.nbytes
        end(f"{len(manifest.artifacts)} artifacts ({cached} from the cache), {size / 1e6:.1f} MB")
        if (snr := manifest.verification.snr_db) is not None:
            end(f"{snr:.1f} dB")
    return Bundle.open(path)


@contextmanager
def stderr_to(path: Path) -> Iterator[None]:
    """Send what engines and converters say, also in worker processes, to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with path.open("ab") as f:
            os.dup2(f.fileno(), 2)
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)


def measure(
    bundle: Bundle,
    device: Device,
    residency: Residency,
    file: Path,
    stages: Stages,
    **options: Any,
) -> RunRecord:
    """Make a run record of a bundle and append it to a file."""
    with stages(f"measuring {bundle.path.name}, {residency}") as end:
        record = bench.run(
            bundle,
            device,
            bench.Options(residency=residency, **options),
            command=command(),
            keep=lambda r: records.append(file, r),
        )
        figures = record.summary()
        if figures["median_ms"] is not None and figures["peak_rss"] is not None:
            end(f"{figures['median_ms']:.0f} ms, peak {float(figures['peak_rss']) / 1e6:.0f} MB")
        if record.error:
            end(f"{record.status}: {record.error.splitlines()[0]}")
    return record


def row(record: RunRecord, bundle: Bundle) -> dict[str, Any]:
    """Return the figures of a record that tables show; MB are 10^6 bytes."""
    figures = record.summary()
    memory = record.memory
    check = record.check
    return {
        "model": bundle.manifest.model.id,
        "bundle": bundle.path.name,
        "target": record.bundle.target,
        "precision": record.bundle.precision,
        "residency": record.settings.residency,
        "median_ms": _rounded(figures["median_ms"]),
        "p95_ms": _rounded(figures["p95_ms"]),
        "first_ms": _rounded(figures["first_ms"]),
        "load_ms": _rounded(figures["load_ms"]),
        "peak_rss_mb": megabytes(memory.peak_rss if memory else None),
        "rss_anon_mb": megabytes(memory.anon if memory else None),
        "artifact_mb": megabytes(sum(a.nbytes for a in bundle.manifest.artifacts)),
        "snr_db": _rounded(check.snr_db if check else None),
        "psnr_db": _rounded(check.psnr_db if check else None),
        "export_snr_db": _rounded(bundle.manifest.verification.snr_db),
        "iterations": figures["timed"],
        "status": record.status,
        "noisy": list(record.noisy),
        "record": record.id,
        "bundle_sha256": record.bundle.sha256,
    }


def _rounded(value: Any) -> float | None:
    return None if value is None else round(float(value), 2)


def megabytes(value: int | None) -> float | None:
    """Return bytes as MB (10^6 bytes)."""
    return None if value is None else round(value / 1e6, 2)


COLUMNS = {
    "model": "model",
    "target": "target",
    "precision": "precision",
    "residency": "residency",
    "median_ms": "median ms",
    "p95_ms": "p95 ms",
    "first_ms": "first ms",
    "load_ms": "load ms",
    "peak_rss_mb": "peak MB",
    "rss_anon_mb": "anon MB",
    "artifact_mb": "files MB",
    "snr_db": "SNR dB",
}


def cells(row: dict[str, Any]) -> list[str]:
    """Return a row's cells as text."""
    out = []
    for key in COLUMNS:
        value = row[key]
        if value is None:
            out.append("-")
        elif key == "snr_db":
            out.append("equal" if value >= bench.CAP_DB else f"{value:.1f}")
        else:
            out.append(f"{value:.1f}" if isinstance(value, float) else str(value))
    return out


def print_table(rows: Sequence[dict[str, Any]], title: str) -> None:
    """Print rows as a table."""
    table = Table(title=title)
    for i, heading in enumerate(COLUMNS.values()):
        table.add_column(heading, justify="left" if i < 4 else "right", overflow="fold")
    for one in rows:
        table.add_row(*cells(one))
    console = Console()
    if not console.is_terminal:
        console.width = 120
    console.print(table)
    for one in rows:
        if one["status"] != "ok":
            say(f"{one['target']} {one['precision']} {one['residency']}: {one['status']}")
        for reason in one["noisy"]:
            say(f"noisy: {one['target']} {one['precision']} {one['residency']}: {reason}")


def command() -> tuple[str, ...]:
    """Return the command line that this script was started with."""
    script = Path(sys.argv[0]).resolve()
    name = script.relative_to(ROOT) if script.is_relative_to(ROOT) else Path(script.name)
    return ("python", name.as_posix(), *sys.argv[1:])


def versions() -> dict[str, str]:
    """Return the versions that the figures depend on."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def inside(path: Path) -> str:
    """Return a path relative to the checkout, if it is in there."""
    full = path.resolve()
    return full.relative_to(ROOT).as_posix() if full.is_relative_to(ROOT) else str(path)


def write_summary(path: Path, summary: dict[str, Any]) -> None:
    """Write a summary as JSON, all of it or nothing."""
    write_file(path, (json.dumps(summary, indent=2, allow_nan=False) + "\n").encode())
