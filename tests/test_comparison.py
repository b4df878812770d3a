from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest

import releases
from handheld import cli, records
from handheld.comparison import Gate, _critical, compare, read_gates, shift
from handheld.errors import UsageError
from handheld.records import Check

GATES = (Gate(metric="median_ms", max_ratio=1.03), Gate(metric="peak_rss", max_ratio=1.02))


def runs(rng, count, *, time=40.0, peak=50e6, spread=0.02, start=0):
    """Records whose runs differ from each other as well as their iterations."""
    made = []
    for i in range(count):
        level = time * math.exp(rng.normal(0, spread))
        times = tuple(level * math.exp(rng.normal(0, spread)) for _ in range(7))
        size = int(peak * math.exp(rng.normal(0, 0.004)))
        made.append(releases.record(number=start + i, times=times, peak=size))
    return made


def verdicts(base, new):
    return {r.gate.metric: r.verdict for r in compare(base, new, GATES).rows}


def test_a_slower_set_fails():
    rng = np.random.default_rng(0)
    assert verdicts(runs(rng, 10), runs(rng, 10, time=44.0)) == {
        "median_ms": "fail",
        "peak_rss": "pass",
    }


def test_a_larger_set_fails():
    rng = np.random.default_rng(0)
    found = verdicts(runs(rng, 10), runs(rng, 10, peak=52.5e6))
    assert found == {"median_ms": "pass", "peak_rss": "fail"}


def test_unchanged_sets_stay_quiet():
    rng = np.random.default_rng(0)
    for _ in range(20):
        assert compare(runs(rng, 10), runs(rng, 10), GATES).passed


def test_the_fastest_iteration_tells_what_noise_hides_from_the_median():
    rng = np.random.default_rng(1)

    def disturbed(factor, start):
        made = []
        for i in range(10):
            slow = np.where(rng.random(15) < rng.uniform(0.1, 0.9), 1.6, 1.0)
            times = tuple(float(t) for t in 40 * factor * slow * np.exp(rng.normal(0, 0.01, 15)))
            made.append(releases.record(number=start + i, times=times))
        return made

    gates = (*GATES, Gate(metric="min_ms", max_ratio=1.03))
    base = disturbed(1.0, 0)
    slower = compare(base, disturbed(1.1, 10), gates).rows
    assert [r.verdict for r in slower if r.gate.metric == "min_ms"] == ["fail"]
    assert [r.verdict for r in slower if r.gate.metric == "median_ms"] == ["pass"]
    assert compare(base, disturbed(1.0, 20), gates).passed


def test_one_run_gives_no_verdict():
    rng = np.random.default_rng(0)
    found = compare(runs(rng, 10), runs(rng, 1, time=80.0), GATES)
    assert {r.verdict for r in found.rows} == {"undecided"}
    assert found.passed


def test_broken_and_missing_runs_fail():
    rng = np.random.default_rng(0)
    base, new = runs(rng, 5), runs(rng, 5)
    failed = releases.record(number=9, status="failed", error="memory ran out")
    found = compare(base, [*new, failed], GATES)
    assert not found.passed
    assert "memory ran out" in found.broken[0]
    wrong = Check(sha256="0" * 64, reference_sha256="1" * 64, snr_db=1.0, psnr_db=5.0,
                  max_abs_error=200, min_psnr_db=40.0)  # fmt: skip
    assert not compare(base, [*new, releases.record(number=9, check=wrong)], GATES).passed
    streamed = releases.record(number=9, residency="stream")
    found = compare([*base, streamed], new, GATES)
    assert "stream" in found.missing[0]
    assert not found.passed


def test_gates_are_for_what_they_name():
    rng = np.random.default_rng(0)
    gates = (
        Gate(metric="median_ms", max_ratio=1.0, device="android"),
        Gate(metric="median_ms", max_ratio=1.0, target="coreml"),
        Gate(metric="median_ms", max_ratio=1.0, residency="stream"),
    )
    found = compare(runs(rng, 5), runs(rng, 5), gates)
    assert not found.rows
    assert "no gate covers" in found.notes[0]


@pytest.mark.parametrize(("m", "n"), [(2, 2), (3, 4), (5, 5), (4, 7)])
def test_distribution_is_mann_whitneys(m, n):
    counts = np.zeros(m * n + 1)
    for positions in itertools.combinations(range(m + n), m):
        counts[sum(p - i for i, p in enumerate(positions))] += 1
    below = np.cumsum(counts) / counts.sum()
    for tail in (0.2, 0.05, 0.025, 0.005):
        assert _critical(m, n, tail) == int((below <= tail).sum())


def test_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(400):
        base = np.exp(rng.standard_t(2, 8) * 0.03)
        new = 1.1 * np.exp(rng.standard_t(2, 8) * 0.03)
        _, interval = shift(base, new, 0.95)
        assert interval is not None
        hits += interval[0] <= 1.1 <= interval[1]
    assert hits >= 0.92 * 400


def test_large_samples():
    rng = np.random.default_rng(1)
    ratio, interval = shift(np.exp(rng.normal(0, 0.1, 100)), np.exp(rng.normal(0, 0.1, 90)), 0.95)
    assert interval is not None
    assert interval[0] < ratio < interval[1] < 1.1
    assert shift([1.0, 2.0], [1.0, 2.0], 0.95)[1] is None


@pytest.mark.parametrize(
    "text",
    ["", "gate = 1", "[[gate]]\nmetric = 'speed'\nmax_ratio = 1.1", "[[gate]\n",
     "[[gate]]\nmetric = 'median_ms'\nmax_ratio = 0.5", "[[gate]]\nmetric = 'median_ms'"],
)  # fmt: skip
def test_gates_files_that_are_refused(tmp_path, text):
    path = tmp_path / "gates.toml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        read_gates(path)
    assert caught.value.path == str(path)


def test_the_packages_gates():
    assert {g.metric for g in read_gates()} == {"median_ms", "min_ms", "peak_rss"}
    with pytest.raises(UsageError, match="cannot be read"):
        read_gates(Path("/none"))


def test_command(tmp_path, capsys, monkeypatch):
    rng = np.random.default_rng(0)
    base, slow = tmp_path / "base.jsonl", tmp_path / "slow.jsonl"
    for r in runs(rng, 8):
        records.append(base, r)
    for r in runs(rng, 8, time=46.0):
        records.append(slow, r)
    summary = tmp_path / "summary.md"
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    assert cli.run(["compare", str(base), str(base)]) == 0
    assert "passed" in capsys.readouterr().out
    assert cli.run(["compare", str(base), str(slow)]) == 1
    shown = capsys.readouterr()
    assert "worse by more than noise" in shown.out
    assert "median_ms" in shown.err
    assert summary.read_text().count("## Benchmark gate") == 2
    assert cli.run(["compare", str(base), str(slow), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["passed"] is False
    assert found["rows"][0]["ratio"] > 1.1
    assert len(found["rows"][0]["new_runs"]) == 8


def test_command_with_too_little(tmp_path, capsys):
    one, empty = tmp_path / "one.jsonl", tmp_path / "empty.jsonl"
    records.append(one, releases.record())
    empty.write_text("")
    assert cli.run(["compare", str(one), str(one)]) == 0
    assert "undecided" in capsys.readouterr().out
    assert cli.run(["compare", str(one), str(one), "--strict"]) == 1
    assert cli.run(["compare", str(one), str(empty)]) == 2
