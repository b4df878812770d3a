"""The demonstration: export models, draw with one, and measure them, on this machine.

    python benchmarks/demo.py
    python benchmarks/demo.py --model path/to/checkpoint --precision int4 --output build/other
    python benchmarks/demo.py --update-readme

The last one runs nothing; it writes the figures of the latest run into README.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from handheld.bundle import Bundle
from handheld.errors import HarnessError, UsageError
from handheld.files import replace_between
from stages import (
    COLUMNS,
    RESIDENCIES,
    ROOT,
    Stages,
    build_harness,
    cells,
    command,
    export,
    guarded,
    inside,
    measure,
    print_table,
    row,
    say,
    versions,
    write_summary,
)

TARGETS = ("litert-cpu", "executorch-xnnpack")
STUDENTS = ("critter-stack1", "critter-stack2", "critter-stack3")
MODELS = (*((name, "int8") for name in STUDENTS), ("critter", "fp32"))
"""What is exported, with the precision of layers that have no codes of their own; the first one
draws the picture."""
PROMPT = "a purple horned creature"
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"


def main() -> int:
    """Run the demonstration."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", help="name of a model, or a checkpoint, in place of critter's")
    parser.add_argument("--precision", default="int8", help="of --model")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "demo")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=10, help="timed, per record")
    parser.add_argument("--update-readme", action="store_true", help="write figures, run nothing")
    arguments = parser.parse_args()
    summary = arguments.output / "summary.json"
    if arguments.update_readme:
        return update_readme(summary, ROOT / "README.md")
    return run(arguments, summary)


def run(arguments: argparse.Namespace, summary: Path) -> int:
    """Export, draw, measure, and write the summary."""
    from handheld import models
    from handheld.devices.host import HostDevice

    output: Path = arguments.output
    summary.unlink(missing_ok=True)
    chosen = ((arguments.model, arguments.precision),) if arguments.model else MODELS
    installed = _install_seconds()
    if installed is not None:
        say(f"packages were installed in {installed} s; that is not counted below")
    stages = Stages()
    build_harness(stages)
    device = HostDevice()
    records = output / "records.jsonl"
    rows: list[dict[str, Any]] = []
    facts: dict[str, Any] = {}
    picture: dict[str, Any] | None = None

    for name, precision in chosen:
        checkpoint = models.checkpoint(name)
        for target in TARGETS:
            bundle = export(checkpoint, target, precision, output / "bundles", stages)
            if picture is None:
                picture = draw(bundle, checkpoint, arguments, output / "creature.png", stages)
            for residency in RESIDENCIES:
                record = measure(
                    bundle, device, residency, records, stages, iterations=arguments.iterations
                )
                rows.append(row(record, bundle))
                facts = record.device.model_dump(mode="json")

    write_summary(
        summary,
        {
            "rows": rows,
            "picture": picture,
            "command": list(command()),
            "versions": versions(),
            "device": facts,
            "models": [name for name, _ in chosen],
            "records": inside(records),
            "stages": stages.done,
            "seconds": round(stages.seconds, 1),
            "install_seconds": installed,
        },
    )
    say("")
    print_table(rows, "one picture, whole, on this machine (MB = 10^6 bytes)")
    say(f"picture: {inside(output / 'creature.png')}")
    say(f"figures: {inside(summary)}   records: {inside(records)}")
    say(f"{stages.seconds:.0f} s in all, without installing packages")
    return 0 if all(r["status"] == "ok" for r in rows) else 1


def draw(
    bundle: Bundle, checkpoint: Path, arguments: argparse.Namespace, path: Path, stages: Stages
) -> dict[str, Any]:
    """Draw the creature through the artifacts, in the harness's library."""
    words = ["generate", str(bundle.path), arguments.prompt, "--output", str(path), "--json"]
    words += ["--seed", str(arguments.seed), "--text-checkpoint", str(checkpoint)]
    with stages(f'drawing "{arguments.prompt}"') as end:
        done = subprocess.run(
            [sys.executable, "-m", "handheld", *words], capture_output=True, text=True, check=False
        )
        if done.returncode:
            said = (done.stdout + done.stderr).strip().splitlines()
            raise HarnessError(
                f"`handheld generate` ended with {done.returncode}: {said[-1] if said else ''}"
            )
        facts: dict[str, Any] = json.loads(done.stdout)
        end(f"{facts['ms']:.0f} ms")
    return {
        "file": inside(path),
        "prompt": arguments.prompt,
        "seed": arguments.seed,
        "sha256": facts["sha256"],
        "bundle_sha256": facts["bundle"],
        "target": bundle.manifest.target,
        "precision": bundle.manifest.precision,
    }


def _install_seconds() -> int | None:
    """Return what `make` noted when it installed packages."""
    try:
        return int((ROOT / ".venv" / ".installed").read_text())
    except (OSError, ValueError):
        return None


def update_readme(summary: Path, readme: Path) -> int:
    """Write the figures of a summary between the marks in README.md."""
    try:
        found = json.loads(summary.read_text())
    except OSError:
        raise UsageError("there is no summary", path=summary, remedy="run `make demo`") from None
    replace_between(readme, BEGIN, END, _markdown(found))
    say(f"{inside(readme)}: {len(found['rows'])} rows")
    return 0


def _markdown(summary: dict[str, Any]) -> str:
    device, tools = summary["device"], summary["versions"]
    lines = [
        " | ".join(["", *COLUMNS.values(), ""]).strip(),
        " | ".join(["", *("---" if i < 4 else "---:" for i in range(len(COLUMNS))), ""]).strip(),
        *(" | ".join(["", *cells(r), ""]).strip() for r in summary["rows"]),
    ]
    exporting = sum(s["seconds"] for s in summary["stages"] if s["name"].startswith("exporting"))
    words = {"executorch": "ExecuTorch", "ai-edge-litert": "LiteRT", "torch": "torch"}
    lines += [
        "",
        f"Measured by `make demo` with handheld {tools['handheld']}, "
        + ", ".join(f"{word} {tools[name]}" for name, word in words.items() if name in tools)
        + f", on {device.get('cpu') or 'an unknown processor'}, {device.get('cores')} cores, "
        f"{device.get('os')}. The whole run took {summary['seconds']:.0f} s, "
        f"{exporting:.0f} s of it exports; what was exported before comes from the cache.",
    ]
    noisy = [r for r in summary["rows"] if r["noisy"]]
    if noisy:
        lines.append(
            f"{len(noisy)} of {len(summary['rows'])} records are marked noisy: "
            "the machine did other work, or times spread by more than a tenth."
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(guarded(main))
