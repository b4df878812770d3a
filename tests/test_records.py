from __future__ import annotations

import json
import multiprocessing
from datetime import UTC, datetime

import numpy as np
import pytest

from handheld import records
from handheld.errors import OutputError, RecordError
from handheld.protocol import Iteration, Load
from handheld.records import (
    BundleFacts,
    Check,
    DeviceFacts,
    Heat,
    MemoryFigures,
    Pass,
    RunRecord,
    Settings,
    append,
    block_uncertainty,
    drift,
    median_uncertainty,
    new_id,
    noise_reasons,
    read,
    statistics,
)

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
FACTS = DeviceFacts(id="host-1", kind="host", cores=4)


def iteration(index, kind, ms):
    return Iteration(t_ms=index, index=index, kind=kind, total_ms=ms, engine_ms=ms / 2)


def record(**changes):
    times = [("first", 90.0), ("warmup", 50.0), ("timed", 40.0), ("timed", 42.0), ("timed", 41.0)]
    loads = (
        Load(t_ms=1, artifact="a", ms=3.0),
        Load(t_ms=2, artifact="b", ms=4.0),
        Load(t_ms=3, artifact="a", ms=99.0),
    )
    latency = Pass(
        purpose="latency",
        started=NOW,
        finished=NOW,
        spawn_to_first_ms=120.0,
        loads=loads,
        iterations=tuple(iteration(i, *t) for i, t in enumerate(times)),
        done=True,
    )
    values = {
        "id": new_id(NOW),
        "status": "ok",
        "started": NOW,
        "finished": NOW,
        "handheld": "0.1.0",
        "command": ("handheld", "bench"),
        "device": FACTS,
        "bundle": BundleFacts(sha256="0" * 64, model="m", target="litert-cpu", precision="int8",
                              size="16x8", steps=1, bytes=9),
        "settings": Settings(residency="resident", threads=2, seed=0, warmup=1, iterations=3,
                             min_seconds=0.0),
        "passes": (latency,),
        "memory": MemoryFigures(separate_pass=True, peak_rss=10, not_counted=("dma-buf",)),
    }  # fmt: skip
    return RunRecord(**{**values, **changes})


def test_figures():
    figures = record().summary()
    assert figures["median_ms"] == 41.0
    assert figures["p5_ms"] == pytest.approx(40.1)
    assert figures["p95_ms"] == pytest.approx(41.9)
    assert figures["spread"] == pytest.approx(1.8 / 41)
    assert figures["first_ms"] == 90.0
    assert figures["load_ms"] == 7.0
    assert figures["cold_start_ms"] == 120.0
    assert figures["first_ever_ms"] is None
    assert figures["peak_rss"] == 10
    assert figures["matches"] is None


def test_figures_of_nothing():
    figures = record(passes=(), memory=None, status="failed", error="x").summary()
    assert figures.pop("timed") == 0
    assert set(figures.values()) == {None}
    assert statistics([]) is None
    assert drift([1.0, 2.0]) is None


def test_check():
    check = Check(sha256="0" * 64, reference_sha256="1" * 64, snr_db=40.0, psnr_db=29.0,
                  max_abs_error=3, min_psnr_db=30.0)  # fmt: skip
    assert not check.matches
    assert record(check=check).summary()["matches"] is False


def test_noise():
    calm = Heat(busy=0.05)
    assert noise_reasons([10.0, 10.1, 10.0, 10.1], calm) == ()
    assert "spans" in noise_reasons([10.0, 20.0, 10.0], calm)[0]
    slower = noise_reasons([10.0, 10.0, 11.5, 11.5, 12.0, 12.0], calm)
    assert any("+20%" in r for r in slower)
    assert "50% of the cores" in noise_reasons([10.0], Heat(busy=0.5))[0]
    assert noise_reasons([], None) == ()
    assert "meanwhile" in noise_reasons([10.0], calm, calm, 0.3)[0]
    assert noise_reasons([10.0], calm, calm, 0.02) == ()


def regimes(rng, n, dwell, levels, p=None):
    """Times of a machine that is slow or fast for a while."""
    out = []
    while len(out) < n:
        out += [rng.choice(levels, p=p)] * max(1, int(rng.exponential(dwell)))
    return 100 * np.asarray(out[:n]) * np.exp(rng.normal(0, 0.02, n))


IDLE = {
    "even": lambda rng, n: 100 * np.exp(rng.normal(0, 0.05, n)),
    "spikes": lambda rng, n: (
        100 * np.exp(rng.normal(0, 0.02, n)) * np.where(rng.random(n) < 0.08, 1.6, 1)
    ),
    "small regimes": lambda rng, n: regimes(rng, n, 20, [1, 1.03]),
    "slow now and then": lambda rng, n: regimes(rng, n, 20, [1, 1.06], [0.8, 0.2]),
}


@pytest.mark.parametrize("kind", IDLE)
def test_long_runs_of_an_idle_machine_are_not_noisy(kind):
    """Five tries of a minute or so, four times; their medians lie within 5 % of each other."""
    for series in range(4):
        tries = [IDLE[kind](np.random.default_rng(10 * series + i), 450) for i in range(5)]
        medians = [np.median(t) for t in tries]
        assert max(medians) / min(medians) < 1.05
        assert [noise_reasons(list(t), None) for t in tries] == [()] * 5


@pytest.mark.parametrize("dwell", [5, 20])
@pytest.mark.parametrize("n", [100, 450])
def test_long_runs_of_a_loaded_machine_are_noisy(dwell, n):
    """By their times alone, as a phone's are judged: now alone, now with half of the cores."""
    marked = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        times = list(regimes(rng, n, dwell, np.linspace(1, 2, 11)))
        marked += bool(noise_reasons(times, None))
    assert marked >= 38
    # Told by other processes' time, as a computer's are, none is missed.
    assert noise_reasons([100.0] * n, None, None, 0.5)


def test_an_interval_holds_what_it_says():
    """Of even noise, whose median is 100, at least as often as it claims."""
    for n, claimed in ((20, 0.95), (60, 0.95), (200, 0.92)):
        inside = 0
        for seed in range(300):
            values = IDLE["even"](np.random.default_rng(seed), n)
            inside += abs(np.median(values) - 100) <= block_uncertainty(list(values)) * 100
        assert inside >= claimed * 300


def test_noise_is_what_hides_the_median():
    rng = np.random.default_rng(0)
    steady = 10 * np.exp(rng.normal(0, 0.01, 100))
    disturbed = np.where(rng.random(100) < 0.1, 1.6 * steady, steady)
    assert block_uncertainty(list(disturbed)) < 0.025
    assert noise_reasons(list(disturbed), None) == (), "a few slow ones leave the median alone"
    regimes = steady * np.repeat([1.0, 1.0, 1.5, 1.0, 1.0], 20)
    assert median_uncertainty(list(regimes)) < block_uncertainty(list(regimes))
    assert "is known to" in noise_reasons(list(regimes), None)[0]
    assert block_uncertainty([1.0] * 19) is None


def test_a_file_of_records(tmp_path):
    path = tmp_path / "deep/runs.jsonl"
    written = [record(), record(status="partial", error="interrupted")]
    for one in written:
        append(path, one)
    assert read(path) == written
    lines = path.read_text().splitlines()
    assert len(lines) == 2
    assert json.loads(lines[0])["summary"]["median_ms"] == 41.0


@pytest.mark.parametrize("cut", [1, 10, 500])
def test_a_torn_last_line(tmp_path, cut):
    path = tmp_path / "runs.jsonl"
    first, second, third = record(), record(), record()
    append(path, first)
    append(path, second)
    path.write_bytes(path.read_bytes()[:-cut])
    assert read(path) == ([first, second] if cut == 1 else [first])
    append(path, third)
    assert read(path) == ([first, second, third] if cut == 1 else [first, third])


def test_what_is_no_record(tmp_path):
    path = tmp_path / "runs.jsonl"
    with pytest.raises(RecordError, match="no such file"):
        read(path)
    for text, message in (
        ("[]\n", "not a run record"),
        ('{"a": 1}\n', "not a run record"),
        ('{"record_version": 2}\n', "newer handheld"),
        ('{"record_version": 1}\n', "faults"),
    ):
        path.write_text(text)
        with pytest.raises(RecordError, match=message) as e:
            read(path)
        assert e.value.path == f"{path}:1"


def test_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError):
        append(tmp_path / "file/runs.jsonl", record())
    with pytest.raises(OutputError, match="is a folder"):
        append(tmp_path, record())


def _append_many(path):
    for _ in range(20):
        append(path, record())


def test_several_writers(tmp_path):
    path = tmp_path / "runs.jsonl"
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_append_many, args=(path,)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(read(path)) == 60
    assert len({r.id for r in read(path)}) == 60


def test_ids_sort_by_time():
    assert new_id(NOW) < records.new_id()
    assert new_id(NOW).startswith("20260102T030405Z-")
