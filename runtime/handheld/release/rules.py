"""The tables that selection works with."""

from __future__ import annotations

import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from handheld.bundle import describe_validation
from handheld.errors import UsageError
from handheld.program import Model
from handheld.release.manifest import Budget, Platform, Unit


class Target(Model):
    """What a target asks of a phone."""

    unit: Unit
    platforms: tuple[Platform, ...]
    min_os: dict[Platform, int] = {}
    soc: tuple[str, ...] = ()


class Rules(Model):
    """The content of ``rules.toml``."""

    budget: Budget
    targets: dict[str, Target]

    def target(self, name: str) -> Target:
        """Return what a target asks for; ``NAME:SOC`` is ``NAME`` for one SoC.

        Raises
        ------
        UsageError
            If no table knows it.
        """
        base, _, soc = name.partition(":")
        found = self.targets.get(base)
        if found is None:
            raise UsageError(
                f"no rule says which phones the target '{base}' is for",
                remedy=f"give a table [targets.{base}] with --rules; known are "
                f"{', '.join(sorted(self.targets))}",
            )
        return found.model_copy(update={"soc": (soc,)}) if soc else found


def read(path: Path | None = None) -> Rules:
    """Read the package's tables, and over them those of a file.

    Raises
    ------
    UsageError
        If a file is not readable or does not have this form.
    """
    tree = _tables(Path(str(files("handheld.release") / "rules.toml")))
    if path is not None:
        for name, table in _tables(path).items():
            tree[name] = {**tree.get(name, {}), **table} if isinstance(table, dict) else table
    try:
        return Rules.model_validate(tree)
    except ValidationError as error:
        message, field = describe_validation(error)
        raise UsageError(message, path=path, field=field) from None


def _tables(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise UsageError(f"cannot be read: {e.strerror}", path=path) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise UsageError(f"is not TOML: {e}", path=path) from None
