"""Recipes: which steps, in which order, with which settings, data and seeds."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from handheld.errors import UsageError
from handheld.program import Model
from handheld.recipes import STACKS, Data, builtin, chain, checked
from handheld_export.compress.data import Creatures, Dataset, Folder
from handheld_export.compress.step import Step, essential, find, kinds

__all__ = ["STACKS", "Recipe", "builtin", "dataset", "read"]


def dataset(data: Data, override: Path | None = None) -> Dataset:
    """Return a recipe's dataset.

    Parameters
    ----------
    data : Data
    override : Path, optional
        A folder to read instead.

    Raises
    ------
    UsageError
        If the recipe reads a folder and nobody said which.
    """
    if override is None and data.kind == "creatures":
        return Creatures(data.seed)
    path = override or (Path(data.path) if data.path else None)
    if path is None:
        raise UsageError(
            "the recipe reads captioned pictures, and no folder is named",
            field="data.path",
            remedy="give one with --data",
        )
    return Folder(path)


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
    files = chain(path)
    last = files[-1][1]
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
    step: Step = checked(cls, settings, place.path, place.field)
    _check_order(cls, earlier, place)
    return step


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
