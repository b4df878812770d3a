"""A student's card: what it was made from, how, on what, and what that cost."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from handheld.files import replace_between, write_file
from handheld_export.checkpoint import read_json

BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
WORDS = {
    "warmup": "regression on the teacher's own pairs",
    "dmd": "DMD2",
    "trim": "trimming",
    "quantize": "quantization",
    "distill": "distillation",
    "activations": "choice of the layers that compute in float",
    "decoder": "tiny decoder",
}


def _sampling(settings: Mapping[str, Any]) -> str:
    """Say how a student is sampled: DMD's at its own timesteps, others as their teachers."""
    told = [f"{settings['steps']} step(s)"] if "steps" in settings else []
    told += [str(settings["sampler"])] if "sampler" in settings else []
    told += [f"timesteps {settings['timesteps']}"] if settings.get("timesteps") else []
    told += [f"guidance {settings['guidance']}"] if "guidance" in settings else []
    return ", ".join(told) or "what `handheld export` is told"


def text(settings: Mapping[str, Any]) -> str:
    """Return the card in Markdown.

    Parameters
    ----------
    settings : mapping
        The student's ``handheld.json``: ``made_from``, ``recipe``, ``data`` and ``history``.
    """
    history: Sequence[Mapping[str, Any]] = settings["history"]
    teacher = settings["made_from"]
    machines = (", ".join(f"{k} {v}" for k, v in e.get("machine", {}).items()) for e in history)
    minutes = sum(float(e.get("seconds", 0)) for e in history) / 60
    kinds = ", ".join(WORDS.get(e["step"], e["step"]) for e in history)
    rows = {
        "teacher": f"{teacher['name']}, sha256 {teacher['sha256']}",
        "recipe": f"{settings['recipe']}: {kinds}",
        "data": settings["data"],
        "machine": "; ".join(dict.fromkeys(filter(None, machines))),
        "time": f"{minutes:.0f} minutes",
        "drawn with": _sampling(settings),
    }
    lines = [
        f"# {settings['name']}",
        "",
        f"A student of {teacher['name']}, a checkpoint in diffusers' layout with codes and scales "
        "where layers are quantized.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {k} | {v} |" for k, v in rows.items()),
        "",
        "Made by, and made again by:",
        "",
        f"    {settings['command']}",
        "",
        "## Figures",
        "",
        f"{BEGIN}\nNot measured yet.\n{END}",
        "",
        "## Steps",
        "",
        *_steps(history),
        "## Licence",
        "",
        f"{settings['licence']}."
        if settings.get("licence")
        else f"That of {teacher['name']}, which says nothing in its settings.",
    ]
    return "\n".join(lines) + "\n"


def _steps(history: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for number, entry in enumerate(history, 1):
        yield f"{number}. **{entry['step']}**, {float(entry.get('seconds', 0)) / 60:.1f} minutes"
        figures = {
            k: v
            for k, v in entry.items()
            if k not in ("step", "settings", "seconds", "machine") and v is not None
        }
        yield f"   - settings: `{json.dumps(entry['settings'])}`"
        if figures:
            yield f"   - at its end: `{json.dumps(_short(figures))}`"
    yield ""


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, Mapping):
        return {k: _short(v) for k, v in value.items()}
    return [_short(v) for v in value] if isinstance(value, (list, tuple)) else value


def add_figures(folder: Path, figures: str) -> None:
    """Write figures into a student's card, in place of those there.

    Parameters
    ----------
    folder : Path
        The student's.
    figures : str
        Markdown.

    Raises
    ------
    CheckpointError, OutputError
        If its ``handheld.json`` cannot be read; if its card lacks the place for figures.
    """
    path = folder / "README.md"
    if not path.exists():
        write_file(path, text(read_json(folder / "handheld.json")).encode())
    replace_between(path, BEGIN, END, figures)
