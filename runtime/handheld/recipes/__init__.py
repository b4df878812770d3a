"""Recipes that come along, and what a recipe makes of a model's shape."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
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
    root = _root()
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


def extended(path: Path, value: Mapping[str, Any]) -> Path | None:
    """Return the recipe whose steps come before those of this one.

    Parameters
    ----------
    path : Path
        The recipe.
    value : mapping
        What `parse` read from it. ``extends`` is a recipe that comes along, ``critter/onestep``,
        or a ``.toml`` file, seen from the recipe's folder.

    Raises
    ------
    UsageError
        If there is no such recipe, or one extends itself on the way.
    """
    found = _next(path, value)
    seen, at = {path.resolve()}, found
    while at is not None:
        if at.resolve() in seen:
            raise UsageError(
                "extends itself", path=path, field="extends", remedy="name another recipe"
            )
        seen.add(at.resolve())
        at = _next(at, parse(at))
    return found


def _next(path: Path, value: Mapping[str, Any]) -> Path | None:
    name = value.get("extends")
    if name is None:
        return None
    known = {f"{p.parent.name}/{p.stem}": p for p in _root().glob("*/*.toml")}
    if isinstance(name, str):
        found = path.parent / name if name.endswith(".toml") else known.get(name)
        if found is not None and found.is_file():
            return found
    raise UsageError(
        f"there is no recipe {name!r}",
        path=path,
        field="extends",
        remedy=f"name a .toml file beside it, or one of {', '.join(sorted(known))}",
    )


def _root() -> Path:
    return Path(str(files("handheld.recipes")))


def shape_after(path: Path, shape: Shape) -> Shape:
    """Return what a recipe makes of a shape; settings of training are not looked at.

    Raises
    ------
    UsageError
        If the recipe or a step is broken, unknown here, or cannot be done on this model.
    """
    from handheld.reshaping import SHAPES

    value = parse(path)
    if (base := extended(path, value)) is not None:
        shape = shape_after(base, shape)
    steps = value.get("steps")
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
