"""Recipes: which steps, in which order, with which settings, data and seeds."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field, ValidationError

from handheld.bundle import describe_validation
from handheld.errors import UsageError
from handheld.program import Model
from handheld.recipes import STACKS, builtin, chain
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
    steps: list[dict[str, Any]] = []


class Place(NamedTuple):
    """Where a step stands: its file, and there ``steps[1]``."""

    path: Path
    field: str


class Recipe(Model):
    """A validated recipe, with the steps of those that it extends.

    Parameters
    ----------
    name : str
    about : str
        One line for people.
    data : Data
    steps : list of Step
    places : list of Place
        Where each step comes from.
    """

    name: str
    about: str
    data: Data
    steps: list[Any]
    places: list[Place]

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
        Naming the file and the field: not TOML, no data or steps, an unknown step or key, a value
        out of range, a step out of order, an extended recipe that is not there.
    """
    files = [(at, _checked(_File, value, at, "")) for at, value in chain(path)]
    last: _File = files[-1][1]
    steps: list[Step] = []
    places: list[Place] = []
    for at, file in files:
        for i, entry in enumerate(file.steps):
            place = Place(at, f"steps[{i}]")
            steps.append(_step(entry, place, [s.kind for s in steps]))
            places.append(place)
    data = next((file.data for _, file in reversed(files) if file.data), None)
    if data is None:
        raise UsageError(
            "is missing", path=path, field="data", remedy="add [data], or extend a recipe"
        )
    if not steps:
        raise UsageError("there are none", path=path, field="steps", remedy="add [[steps]]")
    return Recipe(name=last.name, about=last.about, data=data, steps=steps, places=places)


def _step(entry: dict[str, Any], place: Place, earlier: list[str]) -> Step:
    settings = dict(entry)
    kind = settings.pop("step", None)
    if not isinstance(kind, str):
        raise UsageError(
            "says no step",
            path=place.path,
            field=f"{place.field}.step",
            remedy=f"choose from {', '.join(sorted(kinds()))}",
        )
    try:
        cls = find(kind)
    except UsageError as e:
        e.path, e.field = str(place.path), f"{place.field}.step"
        raise
    step: Step = _checked(cls, settings, place.path, f"{place.field}.")
    _check_order(cls, earlier, place)
    return step


def _checked(cls: Any, value: object, path: Path, prefix: str) -> Any:
    try:
        return cls.model_validate(value)
    except ValidationError as e:
        message, field = describe_validation(e)
        raise UsageError(
            message, path=path, field=f"{prefix}{field}", remedy="correct the recipe"
        ) from None


def _check_order(cls: type[Step], earlier: list[str], place: Place) -> None:
    late = [k for k in earlier if k in cls.before]
    if late:
        raise UsageError(
            f"'{cls.kind}' cannot come after '{late[0]}'",
            path=place.path,
            field=place.field,
            remedy="move it up or remove one of them",
        )
    if cls.after and not set(cls.after) & set(earlier):
        raise UsageError(
            f"'{cls.kind}' needs {' or '.join(cls.after)} before it",
            path=place.path,
            field=place.field,
            remedy="add that step",
        )
