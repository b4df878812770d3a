"""Our bundles against stable-diffusion.cpp: same machine, same threads, same size, one run.

    CMAKE_ARGS=-DGGML_NATIVE=ON pip install stable-diffusion-cpp-python==0.4.7 \\
        --no-binary stable-diffusion-cpp-python
    python benchmarks/full_size.py --decoder tiny --decoder full
    python benchmarks/against_peers.py build/full_size/bundles/* --json build/against_peers.json

The peer gets an fp16 checkpoint of the same shapes with random weights, which it converts to q4_0
and q2_k once; loading is measured from the converted file. It encodes its prompt itself, which is
timed apart; the memory of its text encoders is part of its peak. Every configuration is a process
of its own, and its peak is the high-water mark of that process. A U-Net step is what its log calls
sampling, with one step. Run records of both sides are appended to one file beside the summary: a
peer's picture is without its text encoding, and its calls are U-Net and decoder. A page shows them.
Exit code 1 says that a configuration failed or that a promised ratio is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from html import escape
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import full_size_promises as promised
import watch
from full_size import MAKE, decoder_kind, parts
from handheld import __version__, records
from handheld.bundle import Bundle
from handheld.devices.host import HostDevice
from handheld.errors import HandheldError, MissingDependencyError
from handheld.files import sha256_file, write_file
from handheld.protocol import Iteration, Load, Memory
from handheld.records import BundleFacts, MemoryFigures, Pass, RunRecord, Settings
from handheld.report import page, plots
from make_sdxl import peak
from promises import Line, show, verdict
from stages import (
    ROOT,
    Stages,
    build_harness,
    command,
    guarded,
    measure,
    row,
    say,
    stderr_to,
    versions,
    write_summary,
)

PACKAGE = "stable-diffusion-cpp-python"
CONFIGURATIONS: Mapping[str, Mapping[str, bool]] = {
    "default": {},
    "flash": {"flash_attn": True, "diffusion_flash_attn": True},
    "flash, direct": {
        "flash_attn": True,
        "diffusion_flash_attn": True,
        "diffusion_conv_direct": True,
        "vae_conv_direct": True,
    },
}
"""Each is tried, and the best time of each part counts for the peer."""
PREFIXES: Mapping[str, str] = {
    "unet/diffusion_pytorch_model.safetensors": "unet.",
    "vae/diffusion_pytorch_model.safetensors": "vae.",
    "text_encoder/model.safetensors": "cond_stage_model.transformer.",
    "text_encoder_2/model.safetensors": "cond_stage_model.1.transformer.",
}
"""What the peer's names begin with. It reads folders as well, but takes the two text encoders of
one for a single one, and the model for SD 1.x."""
STAGES = {
    "text_ms": r"get_learned_condition completed, taking ([\d.]+)s",
    "unet_step_ms": r"\bsampling completed, taking ([\d.]+)s",
    "decoder_ms": r"decode_first_stage completed, taking ([\d.]+)s",
    "total_ms": r"generate_image completed in ([\d.]+)s",
}


def checkpoint(folder: Path, stages: Stages) -> tuple[Path, Path]:
    """Make the peer's checkpoint, unless it is there; return it and the tiny decoder's weights."""
    path, tiny = folder / "sdxl-fp16", folder / "tiny"
    single = path.with_suffix(".safetensors")
    for place, words in (
        (path, ("--decoder", "full", "--text")),
        (tiny, ("--stack", "stack1", "--decoder", "tiny")),
    ):
        done = folder / f"{place.name}.done"
        if done.is_file():
            continue
        shutil.rmtree(place, ignore_errors=True)
        with stages(f"making {place.name}") as end:
            # The peer reads no shards.
            run = [sys.executable, str(MAKE), *words, "--shard-mb", "100000", "-o", str(place)]
            seen = watch.run(run)
            if seen.code:
                raise HandheldError(f"make_sdxl.py failed: {seen.errors.strip()}", path=place)
            end(f"peak {seen.peak / 1e6:.0f} MB")
        if place == tiny:
            shutil.rmtree(place / "unet")
        else:
            join(place, single)
            shutil.rmtree(place)
        done.touch()
    return single, tiny / "vae" / "diffusion_pytorch_model.safetensors"


def join(folder: Path, output: Path) -> None:
    """Write the components of a checkpoint as one safetensors file, named as the peer wants it."""
    header: dict[str, Any] = {}
    parts, end = [], 0
    for name, prefix in PREFIXES.items():
        with (folder / name).open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            tensors = json.loads(file.read(length))
        tensors.pop("__metadata__", None)
        for tensor, entry in tensors.items():
            places = [end + at for at in entry["data_offsets"]]
            header[prefix + tensor] = entry | {"data_offsets": places}
        end = max(entry["data_offsets"][1] for entry in header.values())
        parts.append((folder / name, 8 + length))
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with output.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for path, skipped in parts:
            with path.open("rb") as file:
                file.seek(skipped)
                shutil.copyfileobj(file, out, 1 << 24)


def convert(source: Path, kind: str, stages: Stages) -> Path:
    """Convert a checkpoint to the peer's own format, unless that is there."""
    output = source.parent / f"sdxl-{kind}.gguf"
    if not output.is_file():
        partial = output.with_suffix(".partial.gguf")
        with stages(f"converting to {kind}") as end:
            words = [sys.executable, __file__, "--convert", str(source), kind, str(partial)]
            seen = watch.run(words)
            if seen.code or not partial.is_file():
                raise HandheldError(f"the peer cannot convert: {last(seen.errors)}", path=source)
            partial.replace(output)
            end(f"{output.stat().st_size / 1e6:.0f} MB, peak {seen.peak / 1e6:.0f} MB")
    return output


def last(text: str) -> str:
    """Return the last line that says something."""
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return lines[-1] if lines else "no reason given"


def parse(log: str) -> dict[str, list[float]]:
    """Return the milliseconds of each stage, one value per picture, from the peer's log."""
    return {name: [1e3 * float(s) for s in re.findall(e, log)] for name, e in STAGES.items()}


def generate(settings: dict[str, Any]) -> None:
    """Load the peer and draw pictures; prints what it took. Runs in a process of its own."""
    import stable_diffusion_cpp

    size = settings.pop("size")
    pictures = settings.pop("pictures")
    began = time.monotonic()
    model = stable_diffusion_cpp.StableDiffusion(**settings, vae_decode_only=True, verbose=True)
    load_ms = 1e3 * (time.monotonic() - began)
    loaded = peak()
    for seed in range(pictures):
        images = model.generate_image(
            prompt="a picture", width=size[0], height=size[1], cfg_scale=1.0,
            sample_method="euler", sample_steps=1, seed=seed,
        )  # fmt: skip
        if len(images) != 1 or images[0].size != tuple(size):
            raise SystemExit("the peer drew no picture")
    say(json.dumps({"load_ms": load_ms, "loaded_peak": loaded, "peak": peak()}))


def as_record(
    figures: Mapping[str, Any],
    times: Mapping[str, Sequence[float]],
    model: BundleFacts,
    arguments: Any,
    started: datetime,
) -> RunRecord:
    """Return what was seen of one configuration of the peer as a run record.

    Parameters
    ----------
    figures : mapping
        Of the configuration; ``failed`` says why there is no more.
    times : mapping of stage to milliseconds
        One value per picture, the first of which warms up.
    """
    finished = datetime.now(UTC)
    failed = figures.get("failed")
    pictures = range(0 if failed else len(times["total_ms"]))
    iterations = tuple(
        Iteration(
            t_ms=sum(times["total_ms"][: i + 1]),
            index=i,
            kind="timed" if i else "first",
            total_ms=times["total_ms"][i] - times["text_ms"][i],
            engine_ms=times["unet_step_ms"][i] + times["decoder_ms"][i],
            calls_ms=(times["unet_step_ms"][i], times["decoder_ms"][i]),
        )
        for i in pictures
    )
    mark = None if failed else round(figures["peak_rss_mb"] * 1e6)
    seen = Pass(
        purpose="latency",
        started=started,
        finished=finished,
        loads=() if failed else (Load(t_ms=0.0, artifact="model", ms=figures["load_ms"]),),
        iterations=iterations,
        memory=() if failed else (Memory(t_ms=0.0, phase="end", peak_rss=mark),),
        done=not failed,
        error=failed,
    )
    facts = HostDevice().facts()
    return RunRecord(
        id=records.new_id(started),
        status="failed" if failed else "ok",
        error=failed,
        started=started,
        finished=finished,
        handheld=__version__,
        command=command(),
        device=facts.model_copy(update={"engines": _peer_version()}),
        bundle=model,
        settings=Settings(
            residency="resident",
            threads=arguments.threads,
            seed=0,
            warmup=0,
            iterations=arguments.pictures,
            min_seconds=0.0,
            cache=False,
        ),
        passes=(seen,),
        memory=None if failed else MemoryFigures(separate_pass=False, peak_rss=mark),
    )


@cache
def _digest(path: Path) -> str:
    return sha256_file(path)


def facts_of(model: Path, kind: str, decoder: str, configuration: str, size: str) -> BundleFacts:
    """Return what a record says of the peer's model and configuration."""
    return BundleFacts(
        sha256=_digest(model),
        model=f"sdxl-random, {decoder} decoder",
        target=f"stable-diffusion.cpp, {configuration}",
        precision=kind,
        size=size,
        steps=1,
        bytes=model.stat().st_size,
    )


def peer(
    model: Path,
    kind: str,
    tiny: Path | None,
    name: str,
    arguments: Any,
    log: Path,
    stages: Stages,
) -> dict[str, Any]:
    """Measure one configuration of the peer; append a record."""
    decoder = "tiny" if tiny else "full"
    facts = facts_of(model, kind, decoder, name, arguments.size)
    started = datetime.now(UTC)
    figures, times = _peer(model, kind, tiny, name, arguments, stages)
    record = as_record(figures, times, facts, arguments, started)
    records.append(log, record)
    return figures | {"peer_record": record.id}


def _peer(
    model: Path, kind: str, tiny: Path | None, name: str, arguments: Any, stages: Stages
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    width, height = (int(n) for n in arguments.size.split("x"))
    settings = {
        "model_path": str(model),
        "n_threads": arguments.threads,
        "enable_mmap": arguments.mmap,
        "size": [width, height],
        "pictures": arguments.pictures + 1,
        **({"taesd_path": str(tiny)} if tiny else {}),
        **CONFIGURATIONS[name],
    }
    decoder = "tiny" if tiny else "full"
    with stages(f"{PACKAGE} {kind}, {decoder} decoder, {name}") as end:
        seen = watch.run([sys.executable, __file__, "--generate", json.dumps(settings)])
        figures: dict[str, Any] = {
            "who": f"stable-diffusion.cpp {kind}",
            "decoder": decoder,
            "configuration": name,
            "size": arguments.size,
        }
        times = parse(seen.errors)
        if seen.code or any(len(v) != arguments.pictures + 1 for v in times.values()):
            end(f"failed with code {seen.code}: {last(seen.errors)}")
            return figures | {"failed": last(seen.errors)}, times
        own = json.loads(last(seen.output))
        # The first picture warms up.
        figures |= {k: round(statistics.median(v[1:]), 1) for k, v in times.items()}
        figures["picture_ms"] = round(figures["total_ms"] - figures["text_ms"], 1)
        figures["load_ms"] = round(own["load_ms"], 1)
        figures["peak_rss_mb"] = round(own["peak"] / 1e6, 1)
        end(f"step {figures['unet_step_ms']:.0f} ms, peak {figures['peak_rss_mb']:.0f} MB")
    return figures, times


def ours(bundle: Bundle, arguments: Any, log: Path, folder: Path, stages: Stages) -> dict[str, Any]:
    """Measure one of our bundles, resident."""
    with stderr_to(folder / "runs.log"):
        record = measure(
            bundle, HostDevice(), "resident", log, stages,
            threads=arguments.threads, iterations=max(3, arguments.pictures), size=arguments.size,
        )  # fmt: skip
    figures = row(record, bundle)
    return {
        "who": f"handheld {bundle.path.name}",
        "model": bundle.manifest.model.id,
        "target": bundle.manifest.target,
        "decoder": decoder_kind(bundle),
        "configuration": "resident",
        "size": record.bundle.size,
        "picture_ms": figures["median_ms"],
        "load_ms": figures["load_ms"],
        "peak_rss_mb": figures["peak_rss_mb"],
        "record": record.id,
        **parts(record, bundle),
    }


def ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Say how many times each of our bundles is faster than the best of each kind of peer."""
    good = [r for r in rows if "failed" not in r]
    found = []
    for mine in (r for r in good if "record" in r):
        same = [
            r for r in good
            if "record" not in r and (r["decoder"], r["size"]) == (mine["decoder"], mine["size"])
        ]  # fmt: skip
        for who in dict.fromkeys(r["who"] for r in same):
            theirs = [r for r in same if r["who"] == who]
            entry = {"ours": mine["who"], "theirs": who}
            entry |= {k: mine[k] for k in ("model", "target", "decoder", "size")}
            for key in ("unet_step_ms", "decoder_ms", "picture_ms", "load_ms", "peak_rss_mb"):
                best = min(r[key] for r in theirs)
                entry[key] = round(best / mine[key], 2) if mine[key] else None
            found.append(entry)
    return found


def print_rows(rows: list[dict[str, Any]]) -> None:
    """Print a table of all that was measured."""
    console = Console()
    if not console.is_terminal:
        console.width = 140
    keys = ("unet_step_ms", "decoder_ms", "picture_ms", "load_ms", "peak_rss_mb", "text_ms")
    table = Table(title="one picture, one step (picture without text encoding; MB = 10^6 bytes)")
    for name in ("who", "decoder", "configuration", *keys):
        table.add_column(name, overflow="fold")
    for r in rows:
        cells = (
            [r["failed"]]
            if "failed" in r
            else ["-" if r.get(k) is None else str(r[k]) for k in keys]
        )
        table.add_row(r["who"], r["decoder"], r["configuration"], *cells)
    console.print(table)


def draw(summary: Mapping[str, Any], lines: Sequence[Line], path: Path) -> None:
    """Write a page with tables and plots; every part has a scale of its own for each decoder."""
    sections = [
        "<h1>SDXL beside stable-diffusion.cpp</h1>",
        f"<p>{escape(' '.join(summary['command']))}</p>",
        page.table(
            "Promises",
            "How many times faster than the best configuration of the peer.",
            ("what", "where", "value", "promised", ""),
            [_tds(x.what, x.where, x.value, x.wanted, verdict(x)) for x in lines],
        ),
    ]
    for kind in ("tiny", "full"):
        rows = [r for r in summary["rows"] if r["decoder"] == kind and "failed" not in r]
        if not rows:
            continue
        slowest = max(r["picture_ms"] or 0 for r in rows)
        biggest = max(r["peak_rss_mb"] or 0 for r in rows)
        made = []
        for r in rows:
            step, decoding = r["unet_step_ms"] or 0, r["decoder_ms"] or 0
            times = plots.bars(
                [("U-Net step", step, "one"), ("decoder", decoding, "two")], slowest, "ms"
            )
            memory = plots.bars([("peak", r["peak_rss_mb"] or 0, "one")], biggest, "MB")
            made.append(
                _tds(r["who"], r["configuration"])
                + f"<td>{_text(r['picture_ms'])} ms{times}</td>"
                + f"<td>{_text(r['peak_rss_mb'])} MB{memory}</td>"
                + _tds(_text(r["load_ms"]))
            )
        names = ("who", "configuration", "U-Net step and decoder", "peak", "load ms")
        note = "One picture, one step; text encoding is not in the time, but in the peer's peak."
        sections.append(page.table(f"With the {kind} decoder", note, names, made))
    write_file(path, page.document("SDXL beside stable-diffusion.cpp", sections).encode())


def _tds(*values: object) -> str:
    return "".join(f"<td>{escape(str(v))}</td>" for v in values)


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def main() -> int:
    """Measure peers and bundles, compare."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n", 1)[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("bundles", nargs="*", type=Path, help="ours, from full_size.py")
    parser.add_argument("--type", action="append", choices=("q4_0", "q2_K"), help="default both")
    parser.add_argument("--configuration", action="append", choices=CONFIGURATIONS, help="or all")
    parser.add_argument("--decoder", action="append", choices=("tiny", "full"), help="default both")
    parser.add_argument("--size", default="512x512")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pictures", type=int, default=2, help="timed, after one that is not")
    parser.add_argument("--mmap", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "against_peers")
    parser.add_argument("--json", type=Path, default=ROOT / "build" / "against_peers.json")
    parser.add_argument("--convert", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--generate", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if find_spec("stable_diffusion_cpp") is None:
        raise MissingDependencyError(
            f"{PACKAGE} is not installed",
            remedy=f"CMAKE_ARGS=-DGGML_NATIVE=ON pip install {PACKAGE}==0.4.7 "
            f"--no-binary {PACKAGE}",
        )
    if arguments.convert:
        return converted(*arguments.convert)
    if arguments.generate:
        generate(json.loads(arguments.generate))
        return 0
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    stages = Stages()
    bundles = [Bundle.open(p) for p in arguments.bundles]
    if bundles:
        build_harness(stages)
    source, tiny = checkpoint(folder, stages)
    summary: dict[str, Any] = {"command": list(command()), "versions": versions()}
    summary["versions"] |= _peer_version()
    rows: list[dict[str, Any]] = []
    summary |= {"size": arguments.size, "threads": arguments.threads, "cores": os.cpu_count()}
    summary |= {"rows": rows, "ratios": []}
    log = arguments.json.with_suffix(".records.jsonl")
    for bundle in bundles:
        rows.append(ours(bundle, arguments, log, folder, stages))
        write_summary(arguments.json, summary)
    for kind in arguments.type or ("q4_0", "q2_K"):
        model = convert(source, kind, stages)
        for decoder in arguments.decoder or ("full", "tiny"):
            for name in arguments.configuration or CONFIGURATIONS:
                taesd = tiny if decoder == "tiny" else None
                rows.append(peer(model, kind, taesd, name, arguments, log, stages))
                write_summary(arguments.json, summary)
    summary["ratios"] = ratios(rows)
    write_summary(arguments.json, summary)
    print_rows(rows)
    lines = promised.against(summary)
    missed = show(lines, "times faster than the peer's best") if lines else 0
    draw(summary, lines, arguments.json.with_suffix(".html"))
    say(f"written: {arguments.json}, {log}, {arguments.json.with_suffix('.html')}")
    return 1 if missed or any("failed" in r for r in rows) else 0


def converted(source: str, kind: str, output: str) -> int:
    """Convert a checkpoint, in this process."""
    import stable_diffusion_cpp
    from stable_diffusion_cpp.stable_diffusion import GGML_TYPE_MAP

    done = stable_diffusion_cpp.convert(
        source.encode(), b"", output.encode(), int(GGML_TYPE_MAP[kind.lower()]), b"", True
    )
    return 0 if done else 1


def _peer_version() -> dict[str, str]:
    try:
        return {PACKAGE: version(PACKAGE)}
    except PackageNotFoundError:
        return {}


if __name__ == "__main__":
    sys.exit(guarded(main))
