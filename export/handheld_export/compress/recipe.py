"""Recipes: which steps, in which order, with which settings, data and seeds."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from handheld.bundle import describe_validation
from handheld.errors import UsageError
from handheld.program import Model
from handheld.recipes import STACKS, builtin, extended, parse
from handheld_export.compress.data import Creatures, Dataset, Folder
from handheld_export.compress.step import Step, essential, find, kinds

__all__ = ["STACKS", "Data", "Recipe", "builtin", "read"]


class Data(Model):
    """Where pictures and captions come from."""

    kind: Literal["creatures", "folder"]
    path: str | None = None
    """For ``folder``; ``compress --data`` says it otherwise."""
    pictures: int = Field(default=10_000, ge=1)
    seed: int = 0

    def dataset(self, override: Path | None = None) -> Dataset:
        """Return the dataset.

        Raises
        ------
        UsageError
            If the recipe reads a folder and nobody said which.
        """
        if override is None and self.kind == "creatures":
            return Creatures(self.seed)
        path = override or (Path(self.path) if self.path else None)
        if path is None:
            raise UsageError(
                "the recipe reads captioned pictures, and no folder is named",
                field="data.path",
                remedy="give one with --data",
            )
        return Folder(path)


class _File(Model):
    name: str
    about: str = ""
    extends: str | None = None
    data: Data | None = None
    steps: list[dict[str, Any]] = Field(min_length=1)


class Recipe(Model):
    """A validated recipe.

    Parameters
    ----------
    name : str
    about : str
        One line for people.
    data : Data
    steps : list of Step
    """

    name: str
    about: str
    data: Data
    steps: list[Any]

    def essence(self, upto: int, base: str) -> str:
        """Hash what the result of the first ``upto`` steps depends on."""
        parts = {
            "base": base,
            "steps": [{"step": s.kind} | essential(s) for s in self.steps[:upto]],
            "pictures": self.data.pictures,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def read(path: Path) -> Recipe:
    """Read a recipe.

    Raises
    ------
    UsageError
        Naming the file and the field: not TOML, an unknown step or key, a value out of range,
        a step out of order.
    """
    value = parse(path)
    file = _checked(_File, value, path, "")
    before = extended(path, value)
    base = read(before) if before else None
    data = file.data or (base.data if base else None)
    if data is None:
        raise UsageError("is missing", path=path, field="data", remedy="correct the recipe")
    steps: list[Step] = list(base.steps) if base else []
    for i, entry in enumerate(file.steps):
        at = f"steps[{i}]"
        settings = dict(entry)
        kind = settings.pop("step", None)
        if not isinstance(kind, str):
            raise UsageError(
                "says no step",
                path=path,
                field=f"{at}.step",
                remedy=f"choose from {', '.join(sorted(kinds()))}",
            )
        try:
            cls = find(kind)
        except UsageError as e:
            e.path, e.field = str(path), f"{at}.step"
            raise
        step = _checked(cls, settings, path, f"{at}.")
        _check_order(cls, [s.kind for s in steps], path, at)
        steps.append(step)
    return Recipe(name=file.name, about=file.about, data=data, steps=steps)


def _checked(cls: Any, value: object, path: Path, prefix: str) -> Any:
    try:
        return cls.model_validate(value)
    except ValidationError as e:
        message, field = describe_validation(e)
        raise UsageError(
            message, path=path, field=f"{prefix}{field}", remedy="correct the recipe"
        ) from None


def _check_order(cls: type[Step], earlier: list[str], path: Path, at: str) -> None:
    late = [k for k in earlier if k in cls.before]
    if late:
        raise UsageError(
            f"'{cls.kind}' cannot come after '{late[0]}'",
            path=path,
            field=at,
            remedy="move it up or remove one of them",
        )
    if cls.after and not set(cls.after) & set(earlier):
        raise UsageError(
            f"'{cls.kind}' needs {' or '.join(cls.after)} before it",
            path=path,
            field=at,
            remedy="add that step",
        )
