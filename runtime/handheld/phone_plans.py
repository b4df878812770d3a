"""What a plan means on phones: what an app may use there, and how long a picture takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from handheld import plans
from handheld.release.catalogue import GB, Entry
from handheld.release.rules import Rules


def app_bytes(entry: Entry, ram_gb: int, rules: Rules) -> tuple[int | None, str]:
    """Return what one app may use on a phone, and where that is from.

    Returns
    -------
    int or None
        Bytes; None where nobody knows.
    str
        A source, or that it is assumed.
    """
    if entry.app_mb is not None and entry.app_source is not None:
        return entry.app_mb * 10**6, entry.app_source
    part = rules.budget.get(entry.platform)
    if part is None:
        return None, "unknown"
    return int(
        ram_gb * GB * part
    ), f"assumed: {part:g} of the memory, by handheld/release/rules.toml"


def on_phone(row: Mapping[str, Any], entry: Entry, rules: Rules) -> list[dict[str, Any]]:
    """Say whether a model that was planned fits a phone, for each memory that it is sold with.

    Parameters
    ----------
    row : mapping
        Of :func:`~handheld.plans.row`.

    Returns
    -------
    list of dict
        ``app_bytes`` and ``app_source``; ``verdict`` by residency, None where the peak or the
        limit is unknown; ``seconds`` and ``rate_source``, None where no rate is known.
    """
    rates = plans.rates_of_soc(entry.soc)
    seconds, source = plans.seconds(row, rates)
    found = []
    for ram in entry.ram_gb:
        limit, limit_source = app_bytes(entry, ram, rules)
        found.append(
            {
                "phone": entry.name,
                "soc": entry.soc,
                "ram_gb": ram,
                "ram_source": entry.source,
                "app_bytes": limit,
                "app_source": limit_source,
                "verdict": _verdict(row, limit),
                "seconds": seconds,
                "rate_source": source,
            }
        )
    return found


def _verdict(row: Mapping[str, Any], limit: int | None) -> dict[str, plans.Verdict] | None:
    peaks, least = row["peak_bytes"], row["least_peak_bytes"]
    if peaks is None or limit is None:
        return None
    return {k: plans.verdict(p, least[k], limit) for k, p in peaks.items()}
