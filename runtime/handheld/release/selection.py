"""Which variant of a release a phone gets.

The variants of a release stand in order of preference, and so do the modes of a variant. The
answer is the first mode for which every rule of :data:`RULES` holds, or nothing. The rules look at
the release's manifest and the phone only, so an app in any language gives the same answer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Annotated

from pydantic import Field

from handheld.program import Model
from handheld.protocol import Residency
from handheld.records import DeviceFacts
from handheld.release.manifest import Bytes, Mode, Platform, ReleaseManifest, Variant
from handheld.socs import is_soc


class Phone(Model):
    """What is known of a phone; null where it does not tell."""

    name: str | None = None
    platform: Platform
    soc: str | None = None
    """Free text, as ``ro.soc.model`` gives it: ``SM8650-AC``, ``Tensor G3``."""
    ram_bytes: Bytes | None = None
    budget_bytes: Bytes | None = None
    """What the app may use in all, where the system says so."""
    os: Annotated[int, Field(ge=0)] | None = None
    """Major version."""
    free_bytes: Bytes | None = None
    engines: tuple[str, ...] | None = None
    """Of the app's harness library; null: all."""

    @classmethod
    def of(cls, facts: DeviceFacts) -> Phone:
        """Return what a device of a run record says about itself."""
        version = re.search(r"(?:Android|iOS|iPadOS)\D*(\d+)", facts.os or "")
        return cls(
            name=facts.model or facts.id,
            platform=facts.kind,
            soc=facts.soc,
            ram_bytes=facts.ram_bytes,
            os=int(version.group(1)) if version else None,
            free_bytes=facts.free_bytes,
            engines=tuple(facts.engines) or None,
        )


class Verdict(Model):
    """Why a mode of a variant fits a phone, or does not."""

    variant: str
    residency: Residency
    rule: str | None
    """The first rule that does not hold; null if all hold."""
    reason: str

    @property
    def fits(self) -> bool:
        """Whether every rule holds."""
        return self.rule is None


class Answer(Model):
    """What a phone gets."""

    variant: str | None
    """Null: nothing fits."""
    residency: Residency | None
    budget_bytes: int | None
    """What an app may use there; null if unknown."""
    verdicts: tuple[Verdict, ...]
    """Of every mode that was looked at, in order; the last one is the choice if there is one."""

    @property
    def reason(self) -> str:
        """The choice in one line."""
        if self.variant is None:
            return f"nothing fits: {'; '.join(f'{v.variant}: {v.reason}' for v in self.verdicts)}"
        return self.verdicts[-1].reason


def select(release: ReleaseManifest, phone: Phone) -> Answer:
    """Return the variant that a phone gets, and why it gets none of those before it."""
    verdicts: list[Verdict] = []
    budget = budget_bytes(release, phone)
    for variant, mode in candidates(release):
        verdict = _judge(release, variant, mode, phone)
        verdicts.append(verdict)
        if verdict.fits:
            return Answer(
                variant=variant.id,
                residency=mode.residency,
                budget_bytes=budget,
                verdicts=tuple(verdicts),
            )
    return Answer(variant=None, residency=None, budget_bytes=budget, verdicts=tuple(verdicts))


def candidates(release: ReleaseManifest) -> Iterator[tuple[Variant, Mode]]:
    """Yield every mode of every variant, best first."""
    for variant in release.variants:
        for mode in variant.modes:
            yield variant, mode


def budget_bytes(release: ReleaseManifest, phone: Phone) -> int | None:
    """Return the memory that an app may use on a phone, or None if nobody knows."""
    if phone.budget_bytes is not None:
        return phone.budget_bytes
    part = release.budget.get(phone.platform)
    if phone.ram_bytes is None or part is None:
        return None
    return int(phone.ram_bytes * part)


Rule = Callable[[ReleaseManifest, Variant, Mode, Phone], str | None]


def _platform(release: ReleaseManifest, variant: Variant, mode: Mode, phone: Phone) -> str | None:
    if phone.platform in variant.needs.platforms:
        return None
    return f"is for {_list(variant.needs.platforms)}, not {phone.platform}"


def _engine(release: ReleaseManifest, variant: Variant, mode: Mode, phone: Phone) -> str | None:
    have = variant.needs.engines if phone.engines is None else phone.engines
    missing = sorted(set(variant.needs.engines) - set(have))
    return f"the app has no engine {_list(missing)}" if missing else None


def _soc(release: ReleaseManifest, variant: Variant, mode: Mode, phone: Phone) -> str | None:
    wanted = variant.needs.soc
    if not wanted or (phone.soc is not None and any(is_soc(phone.soc, w) for w in wanted)):
        return None
    have = f"the SoC is '{phone.soc}'" if phone.soc else "the SoC is unknown"
    return f"{have}, it was compiled for {_list(wanted)}"


def _os(release: ReleaseManifest, variant: Variant, mode: Mode, phone: Phone) -> str | None:
    least = variant.needs.min_os.get(phone.platform)
    if least is None or (phone.os is not None and phone.os >= least):
        return None
    have = "an unknown version" if phone.os is None else str(phone.os)
    return f"needs {phone.platform} {least}, the phone has {have}"


def _storage(release: ReleaseManifest, variant: Variant, mode: Mode, phone: Phone) -> str | None:
    need = variant.needs.storage_bytes
    if phone.free_bytes is None or phone.free_bytes >= need:
        return None
    return f"needs {_mb(need)} of storage, {_mb(phone.free_bytes)} are free"


def _memory(release: ReleaseManifest, variant: Variant, mode: Mode, phone: Phone) -> str | None:
    budget = budget_bytes(release, phone)
    if budget is None:
        return f"needs {_mb(mode.memory_bytes)} of memory, and nobody knows what the phone has"
    if mode.memory_bytes <= budget:
        return None
    return f"needs {_mb(mode.memory_bytes)} of memory, an app may use {_mb(budget)}"


RULES: dict[str, Rule] = {
    "platform": _platform,
    "engine": _engine,
    "soc": _soc,
    "os": _os,
    "storage": _storage,
    "memory": _memory,
}
"""Name to a function that says why the rule does not hold, or None. In this order."""


def _judge(release: ReleaseManifest, variant: Variant, mode: Mode, phone: Phone) -> Verdict:
    for name, rule in RULES.items():
        if (reason := rule(release, variant, mode, phone)) is not None:
            return Verdict(variant=variant.id, residency=mode.residency, rule=name, reason=reason)
    budget = budget_bytes(release, phone)
    assert budget is not None
    where = f" on {mode.device}" if mode.device else ""
    return Verdict(
        variant=variant.id,
        residency=mode.residency,
        rule=None,
        reason=f"fits: {variant.unit}, {mode.residency}, {_mb(mode.memory_bytes)} of memory "
        f"{mode.basis}{where}, an app may use {_mb(budget)}",
    )


def _list(names: tuple[str, ...] | list[str]) -> str:
    return " or ".join(names)


def _mb(value: int) -> str:
    return f"{value / 1e6:,.0f} MB"
