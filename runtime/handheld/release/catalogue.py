"""Phones as published: SoC, RAM and system, each with its source. Data in ``phones.toml``."""

from __future__ import annotations

import tomllib
from functools import cache
from importlib.resources import files
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from handheld.errors import UsageError
from handheld.program import Model
from handheld.release.selection import Phone

GB = 2**30


class Entry(Model):
    """One phone and the sizes of memory it is sold with."""

    name: str
    platform: Literal["android", "ios"]
    soc: str
    ram_gb: Annotated[tuple[int, ...], Field(min_length=1)]
    """In GiB, as advertised; what the system reports is less."""
    os: int | None = None
    """Major version of the system that the phone can run, at least."""
    source: str
    """Where the figures are published."""
    app_mb: Annotated[int, Field(gt=0)] | None = None
    """MB (10^6 bytes) that the system gave one app without an entitlement, as somebody saw it;
    absent where nobody published it."""
    app_source: str | None = None
    """Where that is published."""

    @model_validator(mode="after")
    def _sourced(self) -> Self:
        if (self.app_mb is None) != (self.app_source is None):
            raise ValueError(f"{self.name}: app_mb and app_source go together")
        return self


@cache
def entries() -> tuple[Entry, ...]:
    """Return all phones."""
    text = (files("handheld.release") / "phones.toml").read_text(encoding="utf-8")
    return tuple(Entry.model_validate(e) for e in tomllib.loads(text)["phone"])


def phones(entry: Entry) -> list[Phone]:
    """Return an entry as one phone per size of memory."""
    return [
        Phone(
            name=f"{entry.name}, {ram} GB",
            platform=entry.platform,
            soc=entry.soc,
            ram_bytes=ram * GB,
            os=entry.os,
        )
        for ram in entry.ram_gb
    ]


def find(name: str) -> list[Phone]:
    """Return the phones of a name, or all; see :func:`named`."""
    return [p for e in named(name) for p in phones(e)]


def named(name: str) -> list[Entry]:
    """Return the entry of a name, or all.

    Raises
    ------
    UsageError
        If there is none.
    """
    wanted = name.casefold()
    chosen = [e for e in entries() if wanted in ("all", e.name.casefold())]
    if not chosen:
        close = [e.name for e in entries() if wanted in e.name.casefold()]
        raise UsageError(
            f"there is no phone '{name}' in the catalogue",
            remedy=f"did you mean {', '.join(close[:5])}?" if close else "give --soc and --ram",
        )
    return chosen
