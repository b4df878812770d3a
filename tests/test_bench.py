from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime

import numpy as np
import pytest

import fake_harness
import samples
from handheld import bench, devices
from handheld.bench import Options
from handheld.bundle import Bundle
from handheld.devices import process
from handheld.errors import BundleError, DeviceError, HarnessError, UsageError
from handheld.placement import placement
from handheld.protocol import Iteration, Job, Load, Memory
from handheld.records import Heat, HeatSample, Pass, read, sustained_curve

FAST = Options(iterations=3, timeout_s=60, first_ever=False)
FULL = Options(iterations=3, timeout_s=60)
BURN = "import time as t\nwhile t.process_time() < 0.5: pass"


@pytest.fixture(scope="module")
def fake(tmp_path_factory):
    return fake_harness.install(tmp_path_factory.mktemp("harness") / "fake")


@pytest.fixture(autouse=True)
def environment(tmp_path, monkeypatch, fake):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HANDHELD_HARNESS", str(fake))
    monkeypatch.delenv("HANDHELD_FAKE", raising=False)


@pytest.fixture
def sample(tmp_path):
    return samples.write_bundle(tmp_path / "sample")


@pytest.fixture
def host():
    return devices.find("host")[0]


def test_a_complete_record(sample, host):
    seen = []
    record = bench.run(sample, host, FULL, command=("handheld", "bench"),
                       progress=lambda p, e: seen.append((p, e)))  # fmt: skip
    assert record.status == "ok"
    assert [p.purpose for p in record.passes] == ["first-ever", "latency", "memory"]
    ever, latency, memory = record.passes
    assert ever.loads[0].cache == "built"
    assert latency.loads[0].cache == "hit"
    assert len(latency.milliseconds("timed")) == 3
    assert len(latency.milliseconds("warmup")) == 1
    assert latency.spawn_to_hello_ms < latency.spawn_to_first_ms
    assert memory.outputs[0].sha256 == latency.outputs[0].sha256
    assert record.memory.separate_pass
    assert record.memory.peak_rss == 80_000_000
    assert record.memory.anon == 30_000_000
    assert record.memory.dma_buf is None
    assert record.memory.not_counted
    assert record.check.psnr_db == 999.0
    assert record.check.sha256 == record.check.reference_sha256
    assert record.device.engines == {"litert": "2.3.0"}
    assert record.bundle.sha256 == sample.sha256
    assert record.settings.seed == 5
    assert {p for p, e in seen if e is None} == {"first-ever", "latency", "memory"}
    figures = record.summary()
    assert figures["first_ever_ms"] > 0
    assert figures["matches"] is True


def test_without_cache(sample, host):
    record = bench.run(sample, host, Options(cache=False))
    assert [p.purpose for p in record.passes] == ["latency", "memory"]
    assert record.passes[0].loads[0].cache == "none"


def test_placement(sample):
    now = datetime.now(UTC)
    done = Pass(purpose="latency", started=now, finished=now, done=True)
    counted, note = placement(sample, "16x8", [done])
    assert counted == {"unet.0": {"cpu": 1}}
    assert note.startswith("calls per picture")
    assert placement(sample, "16x8", []) == (None, "no pass was run to its end")
    told = Load(t_ms=1.0, artifact="unet.0", ms=1.0, units={"npu": 40, "cpu": 2})
    other = done.model_copy(update={"loads": (told,)})
    assert placement(sample, "16x8", [other]) == ({"unet.0": {"npu": 40, "cpu": 2}}, None)
    manifest = sample.manifest.model_copy(update={"target": "coreml"})
    elsewhere = dataclasses.replace(sample, manifest=manifest)
    assert placement(elsewhere, "16x8", [done]) == (None, "neither the engine nor its files tell")


def test_another_seed_is_not_compared(sample, host):
    record = bench.run(sample, host, Options(seed=6, first_ever=False))
    assert record.check is None
    assert record.status == "ok"


def test_prefetched_prompts_stand_in_for_a_reference(tmp_path, host):
    manifest, files = samples.content(reference=None)
    del files["reference.safetensors"]
    sample = samples.bundles.write(manifest, files, tmp_path / "b")
    record = bench.run(sample, host, FAST)
    assert record.settings.inputs == "prefetched"
    assert record.check is None
    text = manifest.text.model_copy(update={"prefetched": None})
    manifest, files = samples.content(reference=None, text=text)
    bare = samples.bundles.write(manifest, files, tmp_path / "c")
    with pytest.raises(UsageError, match="neither a reference"):
        bench.run(bare, host, FAST)


@pytest.mark.parametrize(
    ("fault", "status", "message"),
    [
        ("wrong", "failed", "the picture is wrong"),
        ("random", "failed", "different pictures"),
        ("bundle", "failed", "bundle: artifacts[0].file: is not a flatbuffer"),
        ("silent", "failed", "ended with 3 and no error event\n  something broke inside"),
        ("early", "failed", "ended before its job was done"),
        ("die", "partial", "SIGKILL, probably because memory ran out"),
        ("protocol", "failed", "speaks protocol 9"),
    ],
)
def test_what_goes_wrong_is_recorded(sample, host, monkeypatch, fault, status, message):
    monkeypatch.setenv("HANDHELD_FAKE", fault)
    kept = []
    record = bench.run(sample, host, FAST, keep=kept.append)
    assert kept == [record]
    assert record.status == status
    assert message in record.error
    assert record.passes


def test_the_first_wrong_segment_is_named(tmp_path, host, monkeypatch):
    sample = samples.write_bundle_with_calls(tmp_path / "b")
    monkeypatch.setenv("HANDHELD_FAKE", "wrong")
    record = bench.run(sample, host, FAST)
    assert record.status == "failed"
    assert "the first segment that went wrong is 'unet.0' (call 0, 0.0 dB" in record.error
    assert record.passes[-1].purpose == "diagnosis"


def test_rounding_differences_pass(sample, host, monkeypatch):
    monkeypatch.setenv("HANDHELD_FAKE", "off-by-one")
    record = bench.run(sample, host, FAST)
    assert record.status == "ok"
    assert record.check.sha256 != record.check.reference_sha256
    assert record.check.max_abs_error == 1
    assert 60 < record.check.psnr_db < 99


def test_noise_is_flagged(sample, host, monkeypatch):
    monkeypatch.setenv("HANDHELD_FAKE", "noisy")
    assert any("spans" in r for r in bench.run(sample, host, FAST).noisy)


@pytest.mark.parametrize("fault", ["hang", "hang,deaf"])
def test_time_out(sample, host, monkeypatch, fault):
    monkeypatch.setattr(process, "GRACE_S", 0.5)
    monkeypatch.setenv("HANDHELD_FAKE", fault)
    record = bench.run(sample, host, Options(timeout_s=3, first_ever=False))
    assert record.status == "partial"
    assert "longer than 3 s" in record.error
    pid = record.passes[0].hello.pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_interrupt_keeps_a_partial_record(sample, tmp_path):
    environment = {**os.environ, "HANDHELD_FAKE": "hang"}
    command = [sys.executable, "-m", "handheld", "bench", str(sample.path), "--no-first-ever"]
    running = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    # The driver has no pid to wait for, so wait for what the harness leaves behind.
    deadline = time.monotonic() + 30
    while not list(tmp_path.rglob("hanging")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.2)
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=30)
    assert running.returncode == 130
    assert b"Traceback" not in errors
    (record,) = read(tmp_path / "records.jsonl")
    assert (record.status, record.error) == ("partial", "interrupted")
    assert record.passes[0].error == "interrupted"
    assert len(record.passes[0].iterations) == 1
    with pytest.raises(ProcessLookupError):
        os.kill(record.passes[0].hello.pid, 0)


def test_an_engine_that_the_harness_lacks(sample, host, tmp_path):
    manifest = json.loads((sample.path / "manifest.json").read_text())
    for artifact in manifest["artifacts"]:
        artifact["engine"] = "coreml"
    shutil.copytree(sample.path, tmp_path / "other")
    (tmp_path / "other/manifest.json").write_text(json.dumps(manifest))
    kept = []
    with pytest.raises(HarnessError, match="wants engine 'coreml'") as e:
        bench.run(Bundle.open(tmp_path / "other"), host, Options(), keep=kept.append)
    assert e.value.exit_code == 2
    assert not kept


def test_compare():
    a = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    same = bench.compare(a, a)
    assert (same.psnr_db, same.snr_db, same.max_abs_error) == (999.0, 999.0, 0)
    other = bench.compare(a + np.uint8(2), a)
    assert other.psnr_db == pytest.approx(20 * np.log10(255 / 2))
    black = bench.compare(a, np.zeros_like(a))
    assert black.snr_db == -999.0
    with pytest.raises(BundleError):
        bench.compare(a, a[:1])


def test_a_sustained_pass_with_its_curve(sample, host, monkeypatch):
    monkeypatch.setattr(bench, "SAMPLE_S", 0.4)
    monkeypatch.setenv("HANDHELD_FAKE", "warms")
    record = bench.run(sample, host, Options(first_ever=False, timeout_s=60, sustained_s=2.0))
    assert (record.status, record.settings.sustained_s) == ("ok", 2.0)
    assert [p.purpose for p in record.passes] == ["latency", "memory", "sustained"]
    sustained = record.passes[-1]
    timed = [i for i in sustained.iterations if i.kind == "timed"]
    assert timed[-1].t_ms - timed[0].t_ms > 1900
    curve = sustained_curve(sustained, bin_s=0.5)
    assert [t for t, _ in curve][:4] == [0.0, 0.5, 1.0, 1.5]
    # A phone that gets hot gets slower: here by a tenth of the time that it has run.
    middle = [ms for _, ms in curve][:4]
    assert middle == sorted(middle)
    assert middle[-1] > 2 * middle[0]
    assert record.summary()["sustained_start_ms"] is not None
    seconds = (sustained.finished - sustained.started).total_seconds()
    assert 3 <= len(sustained.heat) <= seconds / 0.4 + 1
    assert [s.t_s for s in sustained.heat] == sorted(s.t_s for s in sustained.heat)
    assert all(not p.heat for p in record.passes[:-1])
    # The curve is another figure than the latency, and no part of it.
    assert len(record.latency().milliseconds("timed")) == 5
    assert record.energy_j_per_picture is None


def test_a_sustained_pass_may_be_longer_than_the_time_limit(sample, host):
    options = Options(first_ever=False, timeout_s=1.5, sustained_s=2.5)
    record = bench.run(sample, host, options)
    assert (record.status, record.error) == ("ok", None)


def test_what_memory_leaves_out():
    def figures(used="cpu", **fields):
        now = datetime.now(UTC)
        seen = Memory(t_ms=1.0, phase="end", rss=7, peak_rss=9, **fields)
        item = Pass(purpose="memory", started=now, finished=now, memory=(seen,), done=True)
        found = bench._memory([item], used)
        return found.dma_buf, found.not_counted

    others = "memory of other processes on this one's behalf"
    buffers, driver = "dma-buf memory of accelerators", "what the accelerator's driver holds"
    assert figures() == (None, (buffers, others))
    assert figures(dma_buf=0) == (0, (others,))
    assert figures("npu", dma_buf=0) == (None, (driver, buffers, others))
    assert figures("npu", dma_buf=5) == (5, (driver, others))
    assert figures("npu", phys_footprint=5) == (None, (others,))


def test_a_sustained_pass_that_is_cut_off_keeps_what_it_saw(sample, host, monkeypatch):
    def seen(purpose, event):
        if purpose == "sustained" and isinstance(event, Iteration) and event.index == 10:
            raise KeyboardInterrupt

    kept = []
    with pytest.raises(KeyboardInterrupt):
        bench.run(sample, host, Options(first_ever=False, sustained_s=60),
                  progress=seen, keep=kept.append)  # fmt: skip
    (record,) = kept
    assert record.status == "partial"
    assert len(record.passes[-1].iterations) == 11
    assert record.passes[-1].error == "interrupted"


def test_what_was_seen_before_a_mistake_of_ours_is_kept(sample, host):
    def seen(purpose, event):
        if isinstance(event, Iteration) and event.index == 1:
            raise ZeroDivisionError("ours")

    kept = []
    with pytest.raises(ZeroDivisionError):
        bench.run(sample, host, FAST, progress=seen, keep=kept.append)
    (record,) = kept
    assert record.status == "partial"
    assert record.error.startswith("unexpected ZeroDivisionError in test_bench.py")
    assert len(record.passes[-1].iterations) == 2


def test_what_else_this_process_does_is_load(host, sample, monkeypatch):
    """A fleet that drives phones disturbs the host that it measures meanwhile."""
    monkeypatch.setenv("HANDHELD_FAKE", "busy")
    before, clock = host.others_s(), time.process_time()
    with host.prepare(sample) as place, bench._inputs(
        sample, "16x8", sample.size()[1], FAST
    ) as given:  # fmt: skip
        job = Job(bundle=str(sample.path), size="16x8", seed=5, inputs=given.inputs, iterations=3)
        assert list(place.run(job, 60))
    # First, warm-up and three timed runs burn 0.2 s each.
    assert 0.95 < host._used_s < 2.5
    subprocess.run([sys.executable, "-S", "-c", BURN], check=True)
    counted = host.others_s() - before
    assert counted > 0.45 + time.process_time() - clock - 0.1


def test_a_harness_that_is_ended_is_counted(tmp_path):
    script = tmp_path / "burn.py"
    hello = '{"event": "done", "t_ms": 1, "iterations": 1}'
    script.write_text(f"{BURN}\nprint('{hello}', flush=True)\nt.sleep(60)")
    told = []
    events = process.run([sys.executable, "-S", str(script)], used=told.append)
    next(events)
    assert told == []
    events.close()
    (seconds,) = told
    assert 0.5 <= seconds < 1.5


@pytest.mark.parametrize("status", [None, 0, 3])
def test_heat_seen_by_looks_alone_is_known(status):
    now = datetime.now(UTC)
    sample = HeatSample(t_s=2.0, heat=Heat(status=status))
    item = Pass(purpose="latency", started=now, finished=now, heat=(sample,))
    wanted = None if status is None else status >= 2
    assert bench._throttled([item], Heat(), Heat()) is wanted


def test_devices(host):
    facts = host.facts()
    assert facts.id == host.id == devices.find(host.id)[0].id
    assert facts.cores >= 1
    assert facts.ram_bytes > 2**30
    assert facts.engines == {"litert": "2.3.0"}
    assert os.uname().nodename not in facts.model_dump_json()
    assert 0 <= host.heat().busy <= 1
    assert [d.id for d in devices.find("all")] == [host.id]
    with pytest.raises(DeviceError, match="no device 'phone'"):
        devices.find("phone")


def test_a_harness_that_does_not_start(tmp_path):
    with pytest.raises(HarnessError, match="cannot be started"):
        next(process.run([str(tmp_path / "missing")]))


def test_bundle_of_the_record_opens(sample):
    assert Bundle.open(sample.path) == sample
