"""Recipes that come along, and what a recipe makes of a model's shape."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from handheld.bundle import describe_validation
from handheld.errors import UsageError
from handheld.planning import Shape
from handheld.program import Model

STACKS = ("stack1", "stack2", "stack3")
TRAINING = ("distill",)
"""Steps that change weights alone."""


class Data(Model):
    """Where pictures and captions come from."""

    kind: Literal["creatures", "folder"]
    path: str | None = None
    """For ``folder``; ``compress --data`` says it otherwise."""
    pictures: int = Field(default=10_000, ge=1)
    seed: int = 0


class File(Model):
    """What one file says, its steps unchecked."""

    name: str
    about: str = ""
    """One line for people."""
    extends: str | None = None
    data: Data | None = None
    steps: list[dict[str, Any]] = []


def builtin(stack: str, model: str) -> Path:
    """Return the file of a stack's recipe: the model's own if there is one, else SDXL's.

    Raises
    ------
    UsageError
        If there is no such stack.
    """
    known = shipped()
    for family in (model, "sdxl"):
        if (path := known.get(f"{family}/{stack}")) is not None:
            return path
    names = [name.removeprefix("sdxl/") for name in known if name.startswith("sdxl/")]
    raise UsageError(f"stack '{stack}' is unknown", remedy=f"choose from {', '.join(names)}")


def chain(path: Path) -> list[tuple[Path, File]]:
    """Read a recipe and those that it extends.

    ``extends`` names a shipped recipe, ``critter/onestep``, or a ``.toml`` file relative to the
    recipe's folder.

    Returns
    -------
    list of (Path, File)
        The recipe that extends nothing comes first, ``path`` last.

    Raises
    ------
    UsageError
        If one is not there or not TOML, extends itself on the way, or has keys that no recipe has.
    """
    found: list[tuple[Path, File]] = []
    at: Path | None = path
    while at is not None:
        file = _read(at)
        found.append((at, file))
        before, at = at, _extended(at, file)
        if at is not None and at.resolve() in {known.resolve() for known, _ in found}:
            names = " > ".join(str(p) for p, _ in found)
            raise UsageError(
                f"{names} > {at} is a circle",
                path=before,
                field="extends",
                remedy="name another recipe",
            )
    return found[::-1]


def _read(path: Path) -> File:
    try:
        value = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError("there is no such recipe", path=path) from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as e:
        raise UsageError(f"is not readable TOML: {e}", path=path, remedy="correct it") from None
    if unknown := next((name for name in value if name not in File.model_fields), None):
        keys = ", ".join(File.model_fields)
        raise UsageError("is unknown", path=path, field=unknown, remedy=f"a recipe has {keys}")
    _check_tables(value, path)
    file: File = checked(File, value, path)
    return file


def checked(cls: type[Model], value: object, path: Path, prefix: str = "") -> Any:
    """Read a part of a recipe.

    Raises
    ------
    UsageError
        Naming the file and the field, which is below ``prefix``.
    """
    try:
        return cls.model_validate(value)
    except ValidationError as e:
        message, field = describe_validation(e)
        place = ".".join(filter(None, (prefix, field)))
        raise UsageError(
            message, path=path, field=place or None, remedy="correct the recipe"
        ) from None


def _check_tables(value: Mapping[str, Any], path: Path) -> None:
    """Refuse ``extends`` below the head of a table, which TOML takes for one of its keys."""
    steps = value.get("steps")
    tables = {"data": value.get("data")}
    tables |= {f"steps[{i}]": s for i, s in enumerate(steps if isinstance(steps, list) else ())}
    for name, table in tables.items():
        if isinstance(table, dict) and "extends" in table:
            raise UsageError(
                "stands in a table",
                path=path,
                field=f"{name}.extends",
                remedy="write it above [data] and [[steps]]",
            )


def _extended(path: Path, file: File) -> Path | None:
    name = file.extends
    if name is None:
        return None
    found = path.parent / name if name.endswith(".toml") else shipped().get(name)
    try:
        if found is not None and found.is_file():
            return found
    except (OSError, ValueError):
        pass
    raise UsageError(
        f"there is no recipe {name!r}",
        path=path,
        field="extends",
        remedy=f"name a .toml file beside it, or one of {', '.join(shipped())}",
    )


def shipped() -> dict[str, Path]:
    """Return the recipes that are shipped, by family and stack: ``critter/onestep``."""
    found = Path(str(files("handheld.recipes"))).glob("*/*.toml")
    return {f"{p.parent.name}/{p.stem}": p for p in sorted(found)}


def shape_after(path: Path, shape: Shape) -> Shape:
    """Return what a recipe makes of a shape; settings of training are not looked at.

    Raises
    ------
    UsageError
        If the recipe or a step is broken, unknown here, or cannot be done on this model.
    """
    found = chain(path)
    if not any(file.steps for _, file in found):
        raise UsageError("there are none", path=path, field="steps", remedy="add [[steps]]")
    for at, file in found:
        shape = _shape_after(at, file.steps, shape)
    return shape


def _shape_after(path: Path, steps: list[dict[str, Any]], shape: Shape) -> Shape:
    from handheld.reshaping import SHAPES

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
        settings = checked(cls, own, path, f"steps[{i}]")
        try:
            shape = settings.shape(shape)
        except UsageError as e:
            e.path, e.field = str(path), f"steps[{i}]: {e.field}" if e.field else f"steps[{i}]"
            raise
    return shape
