from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest

import releases
from handheld import cli, records
from handheld.comparison import (
    Gate,
    _critical,
    _signed_rank_critical,
    compare,
    paired_shift,
    read_gates,
    shift,
)
from handheld.errors import UsageError
from handheld.records import INTERRUPTED, Check, Round

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


def turns(rng, count, factor, *, series="a"):
    """A base and a new run a round, on a machine that is slow or fast for some rounds at a time."""
    base, new = [], []
    slow = False
    for i in range(count):
        slow ^= rng.random() < 0.3
        for side, speed in ((base, 1.0), (new, factor)):
            level = 8.0 * (1.6 if slow else 1.0) * speed * math.exp(rng.normal(0, 0.02))
            if rng.random() < 0.05:
                level *= 1.6  # It changed between the two runs.
            times = tuple(level * math.exp(rng.normal(0, 0.02)) for _ in range(7))
            number = 2 * i + (side is new)
            side.append(
                releases.record(number=number, times=times, round=Round(series=series, index=i))
            )
    return base, new


def test_rounds_too_few_for_an_interval_of_their_own_are_compared_with_all():
    times = [10.0, 10.1, 9.9, 10.05, 9.95]

    def side(factor, first):
        return [
            releases.record(
                number=first + i, times=(t * factor,) * 7, round=Round(series="a", index=i)
            )
            for i, t in enumerate(times)
        ]

    (found, _) = compare(side(1.0, 0), side(1.2, 10), GATES).rows
    assert (found.verdict, found.rounds) == ("fail", 0)


def test_rounds_see_through_a_machine_that_changes_its_speed():
    rng = np.random.default_rng(3)
    for _ in range(20):
        found = compare(*turns(rng, 30, 1.1), GATES).rows[0]
        assert (found.verdict, found.rounds) == ("fail", 30)
        assert compare(*turns(rng, 30, 1.0), GATES).passed
    base, new = turns(rng, 20, 1.1)
    _, other = turns(rng, 20, 1.1, series="b")
    alone = compare(base, other, GATES).rows[0]
    assert alone.rounds == 0, "rounds of other commands are not pairs"
    markdown = compare(base, new, GATES).markdown()
    assert "20 / 20, 20 rounds" in markdown


@pytest.mark.parametrize("n", [1, 4, 7, 10])
def test_paired_distribution_is_wilcoxons(n):
    sums = [sum(s) for k in range(n + 1) for s in itertools.combinations(range(1, n + 1), k)]
    counts = np.bincount(sums, minlength=n * (n + 1) // 2 + 1)
    below = np.cumsum(counts) / counts.sum()
    for tail in (0.2, 0.05, 0.025, 0.005):
        assert _signed_rank_critical(n, tail) == int((below <= tail).sum())


def test_paired_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(400):
        _, interval = paired_shift(1.1 * np.exp(rng.standard_t(2, 9) * 0.03), 0.95)
        assert interval is not None
        hits += interval[0] <= 1.1 <= interval[1]
    assert hits >= 0.92 * 400
    assert paired_shift([1.0, 1.1], 0.95)[1] is None


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
    assert not found.passed, "what nothing looks at has not passed"


def test_a_figure_that_is_gone_fails():
    rng = np.random.default_rng(0)
    base, new = runs(rng, 6), [r.model_copy(update={"memory": None}) for r in runs(rng, 6)]
    found = compare(base, new, GATES)
    assert "peak_rss" in found.missing[0]
    assert not found.passed


def test_runs_cut_short_fail_unless_by_hand():
    rng = np.random.default_rng(0)
    base, new = runs(rng, 5), runs(rng, 5)
    killed = releases.record(number=9, status="partial", error="the harness was killed")
    assert "killed" in compare(base, [*new, killed], GATES).broken[0]
    stopped = releases.record(number=9, status="partial", error=INTERRUPTED)
    assert compare(base, [*new, stopped], GATES).passed


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
    base, same, slow = (tmp_path / f"{name}.jsonl" for name in ("base", "same", "slow"))
    for i, (file, ms) in enumerate(((base, 40.0), (same, 40.0), (slow, 46.0))):
        for r in runs(rng, 8, time=ms, start=100 * i):
            records.append(file, r)
    summary = tmp_path / "summary.md"
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    assert cli.run(["compare", str(base), str(same)]) == 0
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


def test_command_with_two_bundles_in_one_file(tmp_path, capsys):
    file = tmp_path / "turns.jsonl"
    base, new = turns(np.random.default_rng(0), 12, 1.2)
    for sha256, found in (("00" * 32, base), ("01" * 32, new)):
        for r in found:
            facts = r.bundle.model_copy(update={"sha256": sha256})
            records.append(file, r.model_copy(update={"bundle": facts}))
    one = ["compare", str(file), str(file), "--base-bundle", "0000", "--new-bundle"]
    assert cli.run([*one, "0101"]) == 1
    assert "12 rounds" in capsys.readouterr().out
    assert cli.run([*one, "00"]) == 2
    assert "--new-bundle" in capsys.readouterr().err
    assert cli.run(["compare", str(file), str(file)]) == 2
    other = tmp_path / "other.jsonl"
    for r in turns(np.random.default_rng(1), 12, 1.0)[0]:
        facts = r.bundle.model_copy(update={"sha256": "00" * 32})
        records.append(other, r.model_copy(update={"id": records.new_id(), "bundle": facts}))
    assert cli.run(["compare", str(file), str(other), "--base-bundle", "0000"]) == 0
    assert cli.run([*one, "2"]) == 2
    assert "holds no run records of '2'" in capsys.readouterr().err
    assert cli.run([*one, "0"]) == 2
    assert "fits several" in capsys.readouterr().err
    gates = tmp_path / "gates.toml"
    gates.write_text("[[gate]]\nmetric = 'median_ms'\nmax_ratio = 1.1\ntarget = 'coreml'\n")
    assert cli.run([*one, "01", "--gate", str(gates)]) == 1
    assert "no gate covers" in capsys.readouterr().err


def test_command_with_too_little(tmp_path, capsys):
    one, two, empty = (tmp_path / f"{name}.jsonl" for name in ("one", "two", "empty"))
    records.append(one, releases.record())
    records.append(two, releases.record(number=1))
    empty.write_text("")
    assert cli.run(["compare", str(one), str(two)]) == 0
    assert "undecided" in capsys.readouterr().out
    assert cli.run(["compare", str(one), str(two), "--strict"]) == 1
    assert cli.run(["compare", str(one), str(empty)]) == 2
