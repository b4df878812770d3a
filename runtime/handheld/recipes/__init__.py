"""Recipes that come along, and what a recipe makes of a model's shape."""

from __future__ import annotations

import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from handheld.bundle import describe_validation
from handheld.errors import UsageError
from handheld.planning import Shape

STACKS = ("stack1", "stack2", "stack3")
TRAINING = ("distill",)
"""Steps that change weights alone."""


def builtin(stack: str, model: str) -> Path:
    """Return the file of a stack's recipe: the model's own if there is one, else SDXL's.

    Raises
    ------
    UsageError
        If there is no such stack.
    """
    root = Path(str(files("handheld.recipes")))
    for family in (model, "sdxl"):
        path = root / family / f"{stack}.toml"
        if path.parent.parent == root and path.is_file():
            return path
    raise UsageError(f"stack '{stack}' is unknown", remedy=f"choose from {', '.join(STACKS)}")


def parse(path: Path) -> dict[str, Any]:
    """Read a recipe's TOML, unchecked.

    Raises
    ------
    UsageError
        If there is no such file, or it is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError("there is no such recipe", path=path) from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as e:
        raise UsageError(f"is not readable TOML: {e}", path=path, remedy="correct it") from None


def shape_after(path: Path, shape: Shape) -> Shape:
    """Return what a recipe makes of a shape; settings of training are not looked at.

    Raises
    ------
    UsageError
        If the recipe or a step is broken, unknown here, or cannot be done on this model.
    """
    from handheld.reshaping import SHAPES

    steps = parse(path).get("steps")
    if not isinstance(steps, list) or not all(isinstance(s, dict) for s in steps):
        raise UsageError("has no list of steps", path=path, field="steps", remedy="correct it")
    for i, step in enumerate(steps):
        kind = step.get("step")
        if kind in TRAINING:
            continue
        cls = SHAPES.get(kind) if isinstance(kind, str) else None
        if cls is None:
            raise UsageError(
                f"step '{kind}' is unknown to the planner",
                path=path,
                field=f"steps[{i}].step",
                remedy=f"it knows {', '.join(sorted((*TRAINING, *SHAPES)))}",
            )
        own = {k: v for k, v in step.items() if k in cls.model_fields}
        try:
            shape = cls.model_validate(own).shape(shape)
        except ValidationError as e:
            message, field = describe_validation(e)
            raise UsageError(
                message, path=path, field=f"steps[{i}].{field}", remedy="correct the recipe"
            ) from None
        except UsageError as e:
            e.path, e.field = str(path), f"steps[{i}]: {e.field}" if e.field else f"steps[{i}]"
            raise
    return shape
