"""Comparing run records: whether the new set is worse than the base by more than noise.

One run says little: runs differ by more than iterations within them. So the unit is the run. Each
gives one figure, for example the median of its times; the shift between two sets of runs is
Hodges and Lehmann's, the median of all ratios between a new and a base run, with the interval that
belongs to the Mann-Whitney test. It assumes no distribution, and a run that was disturbed moves it
little. With too few runs there is no interval, so no verdict.

Where bundles took turns (``handheld bench BASE NEW --rounds N``), runs of one round are compared
with each other only: a machine that is slow for minutes at a time is slow for both. The shift is
then the median of all means of two rounds' ratios, with the interval of Wilcoxon's signed-rank
test.

What else a machine does makes runs slower, never faster. So a run's fastest iteration tells changes
of the code where the median drowns in noise (Chen and Revels, *Robust benchmarking in noisy
environments*, 2016, arXiv:1608.04295); the median tells what users see.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, ValidationError

from handheld.bundle import describe_validation
from handheld.errors import UsageError
from handheld.program import Model
from handheld.records import INTERRUPTED, Round, RunRecord

Metric = Literal[
    "median_ms",
    "min_ms",
    "p95_ms",
    "first_ms",
    "load_ms",
    "cold_start_ms",
    "first_ever_ms",
    "peak_rss",
]
Verdict = Literal["pass", "fail", "undecided"]
MAX_GATES_BYTES = 2**20


class Gate(Model):
    """One limit on one figure."""

    metric: Metric
    max_ratio: Annotated[float, Field(ge=1, le=100)]
    """New over base. The gate fails if the whole interval lies above."""
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    min_runs: Annotated[int, Field(ge=2, le=1000)] = 5
    """On each side; with fewer there is no verdict."""
    target: str | None = None
    """Only records of this target."""
    device: str | None = None
    """Only records of this device or kind."""
    residency: Literal["resident", "stream"] | None = None

    def covers(self, key: Key) -> bool:
        """Tell whether the gate is about a group of records."""
        return (
            self.target in (None, key.target)
            and self.device in (None, key.device, key.kind)
            and self.residency in (None, key.residency)
        )


class Gates(Model):
    """The content of a gates file."""

    gate: Annotated[tuple[Gate, ...], Field(min_length=1)]


@dataclass(frozen=True, order=True)
class Key:
    """What makes records comparable."""

    model: str
    target: str
    precision: str
    size: str
    steps: int
    residency: str
    threads: int
    device: str
    kind: str

    @classmethod
    def of(cls, record: RunRecord) -> Key:
        """Return the key of a record."""
        b, s, d = record.bundle, record.settings, record.device
        return cls(b.model, b.target, b.precision, b.size, b.steps, s.mode, s.threads, d.id, d.kind)

    def __str__(self) -> str:
        return (
            f"{self.model} {self.target} {self.precision} {self.size} {self.residency} "
            f"on {self.device}"
        )


@dataclass(frozen=True)
class Row:
    """One gate applied to one group of records."""

    key: Key
    gate: Gate
    base_runs: tuple[str, ...]
    new_runs: tuple[str, ...]
    rounds: int
    """That hold runs of both sides; 0 where all runs were compared with all."""
    base: float | None
    """Median over runs."""
    new: float | None
    ratio: float | None
    low: float | None
    high: float | None
    verdict: Verdict
    reason: str


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` found."""

    rows: tuple[Row, ...]
    broken: tuple[str, ...]
    """New runs that failed, were cut short other than by hand, or drew a wrong picture: they fail
    whatever the gates say."""
    missing: tuple[str, ...]
    """Groups and figures of the base that the new records lack."""
    notes: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether there was something to compare, and nothing failed, is broken or missing."""
        failed = any(r.verdict == "fail" for r in self.rows)
        return bool(self.rows) and not (self.broken or self.missing or failed)

    def as_dict(self) -> dict[str, Any]:
        """Return the comparison as a JSON object."""
        return {
            "passed": self.passed,
            "rows": [
                {
                    **vars(r),
                    "key": vars(r.key),
                    "gate": r.gate.model_dump(mode="json"),
                }
                for r in self.rows
            ],
            "broken": list(self.broken),
            "missing": list(self.missing),
            "notes": list(self.notes),
        }

    def markdown(self) -> str:
        """Return the comparison as a table for a pull request or job summary."""
        mark = {"pass": "✅ pass", "fail": "❌ fail", "undecided": "❔ undecided"}
        lines = [
            f"## Benchmark gate: {'passed' if self.passed else 'failed'}",
            "",
            "| what | figure | base | new | ratio | interval | limit | runs | verdict |",
            "| --- | --- | ---: | ---: | ---: | --- | ---: | ---: | --- |",
        ]
        for r in self.rows:
            interval = "-" if r.low is None else f"{r.low:.3f} to {r.high:.3f}"
            lines.append(
                f"| {r.key} | {r.gate.metric} | {_figure(r.base, r.gate.metric)} "
                f"| {_figure(r.new, r.gate.metric)} | {_ratio(r.ratio)} | {interval} "
                f"| {r.gate.max_ratio:g} | {_runs(r)} "
                f"| {mark[r.verdict]}: {r.reason} |"
            )
        for title, items in (
            ("Broken runs", self.broken),
            ("Missing", self.missing),
            ("Notes", self.notes),
        ):
            if items:
                lines += ["", f"**{title}**", "", *(f"- {item}" for item in items)]
        return "\n".join(lines) + "\n"


def read_gates(path: Path | None = None) -> tuple[Gate, ...]:
    """Read a gates file; without one, the package's.

    Raises
    ------
    UsageError
        If it is not readable or does not have this form.
    """
    source = path or Path(str(files("handheld") / "benchmark_gates.toml"))
    try:
        with source.open("rb") as f:
            text = f.read(MAX_GATES_BYTES + 1)
        if len(text) > MAX_GATES_BYTES:
            raise UsageError("is over the limit", path=source)
        return Gates.model_validate(tomllib.loads(text.decode())).gate
    except OSError as e:
        raise UsageError(f"cannot be read: {e.strerror}", path=source) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise UsageError(f"is not TOML: {e}", path=source) from None
    except ValidationError as error:
        message, field = describe_validation(error)
        raise UsageError(
            message,
            path=source,
            field=field,
            remedy='write [[gate]] tables with metric = "median_ms" and max_ratio = 1.03',
        ) from None


def compare(
    base: Sequence[RunRecord], new: Sequence[RunRecord], gates: Sequence[Gate]
) -> Comparison:
    """Compare two sets of records, group by group and gate by gate."""
    old, ours = _groups(base), _groups(new)
    rows = []
    for key in sorted(set(old) & set(ours)):
        rows += [_row(key, g, old[key], ours[key]) for g in gates if g.covers(key)]
    broken = [
        f"{r.id} ({Key.of(r)}): {r.error or 'a wrong picture'}"
        for r in new
        if (r.status != "ok" and r.error != INTERRUPTED)
        or (r.check is not None and not r.check.matches)
    ]
    missing = [str(key) for key in sorted(set(old) - set(ours))]
    missing += [f"{r.gate.metric} of {r.key}" for r in rows if r.base_runs and not r.new_runs]
    notes = [f"only new: {key}" for key in sorted(set(ours) - set(old))]
    noisy = sum(bool(r.noisy) for r in [*base, *new])
    hot = sum(bool(r.throttled) for r in [*base, *new])
    if noisy:
        notes.append(f"{noisy} of {len(base) + len(new)} runs are marked noisy")
    if hot:
        notes.append(f"{hot} runs were throttled")
    if not rows and not missing:
        notes.append("no gate covers any group")
    return Comparison(tuple(rows), tuple(broken), tuple(missing), tuple(notes))


def _groups(records: Sequence[RunRecord]) -> dict[Key, list[RunRecord]]:
    found: dict[Key, list[RunRecord]] = {}
    for record in records:
        if record.status == "ok":
            found.setdefault(Key.of(record), []).append(record)
    return found


def _row(key: Key, gate: Gate, base: list[RunRecord], new: list[RunRecord]) -> Row:
    before, after = _values(base, gate.metric), _values(new, gate.metric)
    old, ours = list(before.values()), list(after.values())
    pairs = _pairs(base, new, before, after)
    if len(pairs) < gate.min_runs:
        pairs = []
    ratio = low = high = None
    verdict: Verdict = "undecided"
    if min(len(old), len(ours)) < gate.min_runs:
        reason = f"needs {gate.min_runs} runs on each side"
    else:
        interval = None
        if pairs:
            ratio, interval = paired_shift(pairs, gate.confidence)
        if interval is None:
            # Pairs are fewer than the values that all of both sides make.
            pairs = []
            ratio, interval = shift(old, ours, gate.confidence)
        if interval is None:
            reason = f"too few runs for {gate.confidence:.0%}"
        else:
            low, high = interval
            if low > gate.max_ratio:
                verdict, reason = "fail", "worse by more than noise"
            elif high <= gate.max_ratio:
                verdict, reason = "pass", "surely within the limit"
            else:
                verdict, reason = "pass", "not surely beyond the limit; more runs tell more"
    return Row(
        key=key,
        gate=gate,
        base_runs=tuple(before),
        new_runs=tuple(after),
        rounds=len(pairs),
        base=float(np.median(old)) if old else None,
        new=float(np.median(ours)) if ours else None,
        ratio=ratio,
        low=low,
        high=high,
        verdict=verdict,
        reason=reason,
    )


def _values(records: list[RunRecord], metric: str) -> dict[str, float]:
    found = {}
    for record in records:
        value = record.summary()[metric]
        if isinstance(value, int | float) and value > 0:
            found[record.id] = float(value)
    return found


def _pairs(
    base: list[RunRecord],
    new: list[RunRecord],
    before: dict[str, float],
    after: dict[str, float],
) -> list[float]:
    """Return new over base for every round that has both, medians where it has several."""

    def by_round(records: list[RunRecord], values: dict[str, float]) -> dict[Round, float]:
        found: dict[Round, list[float]] = {}
        for record in records:
            if record.round is not None and record.id in values:
                found.setdefault(record.round, []).append(values[record.id])
        return {r: float(np.median(v)) for r, v in found.items()}

    old, ours = by_round(base, before), by_round(new, after)
    return [ours[r] / old[r] for r in old if r in ours]


def paired_shift(
    ratios: Sequence[float], confidence: float
) -> tuple[float, tuple[float, float] | None]:
    """Return by which factor the new value of a pair differs from its base, and the interval.

    Parameters
    ----------
    ratios : sequence of float
        Positive, one per pair.
    confidence : float
        Of the two-sided interval.

    Returns
    -------
    ratio : float
        Hodges and Lehmann's estimate on logarithms.
    interval : (float, float) or None
        None if there are too few pairs for the confidence.

    Notes
    -----
    The interval's ends are the k-th smallest and largest means of two pairs' logarithms, where k
    is the largest number with ``P(T < k) <= (1 - confidence) / 2`` under the distribution of
    Wilcoxon's signed-rank statistic; see Hollander, Wolfe and Chicken, section 3.3.
    """
    logs = np.log(np.asarray(ratios, float))
    one, two = np.triu_indices(len(logs))
    means = np.sort((logs[one] + logs[two]) / 2)
    estimate = math.exp(float(np.median(means)))
    k = _signed_rank_critical(len(logs), (1 - confidence) / 2)
    if k == 0:
        return estimate, None
    return estimate, (math.exp(float(means[k - 1])), math.exp(float(means[-k])))


@cache
def _signed_rank_critical(n: int, tail: float) -> int:
    """Return the largest k with ``P(T <= k - 1) <= tail``; 0 if there is none."""
    most = n * (n + 1) // 2
    # Number of subsets of the ranks with each sum, as a part of all.
    shares = np.zeros(most + 1)
    shares[0] = 1.0
    for rank in range(1, n + 1):
        shares[rank:] = (shares[rank:] + shares[: most + 1 - rank]) / 2
        shares[:rank] /= 2
    return int(np.searchsorted(np.cumsum(shares), tail, side="right"))


def shift(
    base: Sequence[float], new: Sequence[float], confidence: float
) -> tuple[float, tuple[float, float] | None]:
    """Return by which factor new values differ from base values, and its interval.

    Parameters
    ----------
    base, new : sequence of float
        Positive, one per run.
    confidence : float
        Of the two-sided interval.

    Returns
    -------
    ratio : float
        Hodges and Lehmann's estimate on logarithms.
    interval : (float, float) or None
        None if there are too few values for the confidence.

    Notes
    -----
    The interval's ends are the k-th smallest and largest ratios, where k is the largest number
    with ``P(U < k) <= (1 - confidence) / 2`` under the Mann-Whitney distribution; see Hollander,
    Wolfe and Chicken, *Nonparametric Statistical Methods*, section 4.3.
    """
    logs = np.log(np.asarray(new, float))[:, None] - np.log(np.asarray(base, float))[None]
    ratios = np.sort(logs.ravel())
    estimate = math.exp(float(np.median(ratios)))
    k = _critical(len(base), len(new), (1 - confidence) / 2)
    if k == 0:
        return estimate, None
    return estimate, (math.exp(float(ratios[k - 1])), math.exp(float(ratios[-k])))


@cache
def _critical(m: int, n: int, tail: float) -> int:
    """Return the largest k with ``P(U <= k - 1) <= tail``; 0 if there is none."""
    if m * n > 4000:
        # The normal approximation is good to less than a rank here.
        mean, deviation = m * n / 2, math.sqrt(m * n * (m + n + 1) / 12)
        return max(0, math.floor(mean - _quantile(1 - tail) * deviation))
    # Number of ways to reach each U: add the values of one sample one by one.
    counts = np.zeros((m + 1, m * n + 1))
    counts[0, 0] = 1
    for j in range(1, m + n + 1):
        for i in range(min(j, m), 0, -1):
            add = j - i
            if add > n:
                continue
            counts[i, add:] += counts[i - 1, : m * n + 1 - add]
    distribution = np.cumsum(counts[m]) / counts[m].sum()
    return int(np.searchsorted(distribution, tail, side="right"))


def _quantile(p: float) -> float:
    from statistics import NormalDist

    return NormalDist().inv_cdf(p)


def _figure(value: float | None, metric: str) -> str:
    if value is None:
        return "-"
    return f"{value / 1e6:.1f} MB" if metric == "peak_rss" else f"{value:.1f} ms"


def _runs(row: Row) -> str:
    counts = f"{len(row.base_runs)} / {len(row.new_runs)}"
    return f"{counts}, {row.rounds} rounds" if row.rounds else counts


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
