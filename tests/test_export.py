"""Whole exports of tiny checkpoints, undisturbed and disturbed."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import save_file

import tiny
from handheld.bundle import Bundle
from handheld.counting import count_decoder, count_unet
from handheld.errors import CheckpointError, OutputError, TargetError, UsageError
from handheld.program import Call
from handheld.text import embed
from handheld_export import lowering
from handheld_export.checkpoint import Checkpoint
from handheld_export.export import Options, Progress, export, plan_segments
from handheld_export.export.reference import sampled
from handheld_export.export.workers import in_workers
from handheld_export.memory import Budget
from handheld_export.segments import group

TARGETS = ("executorch-xnnpack", "litert-cpu")


@contextmanager
def cache(folder):
    """Exports inside keep what they made below ``folder``."""
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(folder)
    try:
        yield
    finally:
        del os.environ["XDG_CACHE_HOME"]
        if before is not None:
            os.environ["XDG_CACHE_HOME"] = before


class Exports:
    """Exports with one cache, each made once."""

    def __init__(self, folder):
        self.folder = folder
        self.made = {}

    def run(self, source, output=None, **options):
        count = {"lowered": 0, "cached": 0}

        def done(segment, weights, meta):
            count["cached" if meta is None else "lowered"] += 1

        output = output or self.folder / f"bundle{len(list(self.folder.iterdir()))}"
        with cache(self.folder / "cache"):
            export(
                Checkpoint(source), Options(**options), output, jobs=1,
                progress=Progress(done=done),
            )  # fmt: skip
        return Bundle.open(output), count

    def of(self, source, target):
        """The first export of a checkpoint, with nothing in the cache."""
        if target not in self.made:
            began = time.monotonic()
            bundle, count = self.run(source, target=target, precision="fp32", references=True)
            self.made[target] = bundle, count, time.monotonic() - began
        return self.made[target]


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    return Exports(tmp_path_factory.mktemp("exports"))


@pytest.mark.parametrize("target", TARGETS)
def test_bundle_opens_and_is_exact(exports, smallest, target):
    bundle, count, _ = exports.of(smallest, target)
    manifest = bundle.manifest
    assert count == {"lowered": len(manifest.artifacts), "cached": 0}
    assert all(a.verification.snr_db >= 90 for a in manifest.artifacts)
    assert manifest.verification.snr_db >= 70
    assert manifest.verification.psnr_db >= 40
    assert {a.target for a in manifest.artifacts} == {target} == {manifest.target}
    reference = bundle.reference()
    assert reference["picture"].shape == (1, 8, 8, 3)
    assert all(f"call.{i}." in " ".join(reference) for i in range(6))
    stored = sum(sum(a.weights.values()) for a in manifest.artifacts)
    plan = plan_segments(Checkpoint(smallest), Options(target=target, precision="fp32"))
    assert stored == sum(s["weights"] for s in plan["segments"])
    assert plan["steps"] == manifest.model.steps == 1


def test_macs(exports, smallest):
    manifest = exports.of(smallest, TARGETS[0])[0].manifest
    unet, vae = (json.loads((smallest / p / "config.json").read_text()) for p in ("unet", "vae"))
    counted = [*count_unet(unet, (8, 8)), *count_decoder(vae, (8, 8))]
    total = sum(x.macs for x in counted if not x.name.startswith("time_embedding"))
    assert sum(a.macs for a in manifest.artifacts) == total
    assert all(a.macs > 0 for a in manifest.artifacts)


@pytest.mark.parametrize("target", TARGETS)
def test_second_export_only_packs(exports, smallest, target):
    first = exports.of(smallest, target)[0]
    again, count = exports.run(smallest, target=target, precision="fp32", references=True)
    assert count == {"lowered": 0, "cached": 6}
    assert again.sha256 == first.sha256
    assert (again.path / "manifest.json").read_bytes() == (
        first.path / "manifest.json"
    ).read_bytes()


def test_other_options_share_artifacts(exports, smallest):
    exports.of(smallest, TARGETS[0])
    bundle, count = exports.run(
        smallest, target=TARGETS[0], precision="fp32", steps=2, guidance=2.0, seed=4
    )
    assert count == {"lowered": 0, "cached": 6}
    assert bundle.manifest.model.steps == 2
    assert bundle.manifest.verification.snr_db >= 70
    assert "call.0." not in " ".join(bundle.reference())


def test_sizes_share_weights_and_are_what_they_are_alone(exports, smallest):
    alone = exports.of(smallest, "litert-cpu")[0]
    sizes = ((8, 8), (16, 8))
    both, count = exports.run(smallest, target="litert-cpu", precision="fp32", sizes=sizes)
    segments = [a.id for a in alone.manifest.artifacts]
    # Those of the first size are in the cache, and one has no picture in it.
    assert count == {"lowered": len(segments) - 1, "cached": len(segments) + 1}
    manifest = both.manifest
    assert (manifest.schema_version, list(manifest.sizes)) == (3, ["8x8", "16x8"])
    assert both.size() == ("8x8", manifest.sizes["8x8"])
    assert manifest.segment("embedding.00.add_embedding.16x8") == "embedding.00.add_embedding"
    for size in manifest.sizes:
        called = manifest.called(size)
        assert [manifest.segment(a.id) for a in called] == segments
        assert {a.id for a in called if a.id in segments} == {"embedding.00.add_embedding"}
        assert all(len(a.parts) == 1 for a in called if a.id not in segments)
        assert manifest.verification_of(size).snr_db >= 70
    assert manifest.verification == alone.manifest.verification
    weights = {p for a in manifest.artifacts for p in a.parts}
    assert len(weights) == len(segments) - 1
    graphs = sum(a.file.bytes for a in manifest.artifacts if a.parts)
    assert manifest.nbytes - graphs <= alone.manifest.nbytes
    constants = both.constants()
    ids = {n.rpartition(".")[2]: v for n, v in constants.items() if n.startswith("time_ids")}
    assert set(ids) == set(manifest.sizes)
    assert np.array_equal(ids["8x8"], alone.constants()["time_ids"])
    assert not np.array_equal(ids["8x8"], ids["16x8"])
    first, wide = both.reference(), both.reference("16x8")
    assert np.array_equal(first["picture"], alone.reference()["picture"])
    assert wide["picture"].shape == (1, 8, 16, 3)
    assert np.array_equal(first["input.prompt_embeds"], wide["input.prompt_embeds"])
    again, count = exports.run(smallest, target="litert-cpu", precision="fp32", sizes=sizes)
    assert count["lowered"] == 0
    assert (again.path / "manifest.json").read_bytes() == (both.path / "manifest.json").read_bytes()


def entry(exports, bundle, start):
    """The cache entry of a bundle's artifact."""
    wanted = next(a.file.sha256 for a in bundle.manifest.artifacts if a.id.startswith(start))
    for meta in (exports.folder / "cache" / "handheld" / "artifacts").glob("*/meta.json"):
        if json.loads(meta.read_text())["files"][0]["sha256"] == wanted:
            return meta.parent
    raise AssertionError(start)


def test_damaged_cache_is_made_again(exports, smallest):
    first = exports.of(smallest, TARGETS[0])[0]
    (artifact,) = entry(exports, first, "embedding").glob("*.pte")
    data = artifact.read_bytes()
    artifact.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    again, count = exports.run(smallest, target=TARGETS[0], precision="fp32", references=True)
    assert count == {"lowered": 1, "cached": 5}
    assert again.sha256 == first.sha256


def only(folder):
    """The artifact of a cache entry."""
    (artifact,) = folder.glob("*.pte")
    return artifact


@pytest.mark.parametrize(
    "damage",
    [
        lambda e: only(e).unlink(),
        lambda e: only(e).write_bytes(only(e).read_bytes()[:-1]),
        lambda e: (e / "meta.json").unlink(),
        lambda e: (e / "meta.json").write_text("{"),
        lambda e: (e / "meta.json").write_text("{}"),
        lambda e: (e / "meta.json").write_text('{"files": []}'),
    ],
)
def test_damaged_entries_are_dropped(exports, smallest, tmp_path, damage):
    source = entry(exports, exports.of(smallest, TARGETS[0])[0], "embedding")
    copy = tiny.copied(source, tmp_path / "key")
    (file,) = lowering.cached(tmp_path, "key")["files"]
    assert file["path"] == only(source).name
    damage(copy)
    assert lowering.cached(tmp_path, "key") is None
    assert not copy.exists()


@pytest.mark.slow
def test_prompts_travel(exports, sdxl):
    bundle, _ = exports.run(sdxl, target=TARGETS[0], precision="int8")
    text = bundle.manifest.text
    assert text.prefetched.prompts == ("a small red robot", "")
    assert (text.tokens, text.width, text.pooled_width) == (8, 40, 20)
    found = embed(bundle, "a small red robot", None)
    reference = bundle.reference()
    assert np.array_equal(reference["input.prompt_embeds"][0], found.prompt_embeds)
    assert bundle.manifest.verification.snr_db >= 15
    assert bundle.manifest.verification.student_snr_db >= 15
    assert any("int8" in a.weights for a in bundle.manifest.artifacts)


def test_bad_options(exports, smallest, tmp_path):
    good = {"target": TARGETS[0], "precision": "fp32"}
    for options, what in (
        ({"target": "nokia"}, "target 'nokia' is unknown"),
        ({"precision": "int3"}, "precision 'int3' is unknown"),
        ({"sampler": "euler"}, "sampler 'euler' is unknown"),
        ({"steps": 0, "timesteps": (5, 9)}, "do not fall"),
        ({"sizes": ((4, 8),)}, "leaves 8..8192"),
        ({"sizes": ((16, 8), (8, 8), (16, 8))}, "16x8 is given twice"),
        ({"sizes": tuple((8 * i + 8, 8) for i in range(65))}, "a bundle holds 64"),
    ):
        with pytest.raises(UsageError, match=what):
            exports.run(smallest, tmp_path / "out", **good | options)
    with pytest.raises(CheckpointError, match="no text encoder"):
        exports.run(smallest, tmp_path / "out", **good, prompts=("a robot",))
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("x")
    with pytest.raises(OutputError, match="not a bundle"):
        exports.run(smallest, tmp_path / "out", **good)


def test_keys_depend_on_weights_and_precision(smallest, tmp_path):
    other = tmp_path / "other"
    tiny.write_checkpoint(other, tiny.SMALLEST, tiny.SMALLEST_KL, text=False)
    tiny.unet(seed=7, **tiny.SMALLEST).save_pretrained(other / "unet")
    keys = []
    for folder, target, precision in (
        (smallest, "a", "fp32"), (smallest, "a", "int8"), (smallest, "b", "fp32"),
        (other, "a", "fp32"), (smallest, "a", "fp32"),
    ):  # fmt: skip
        checkpoint = Checkpoint(folder)
        segment = group(lowering.lines(checkpoint, (8, 8), 77).unet, 10**9)[0]
        keys.append(
            lowering.segment_key(segment, checkpoint.unet, target, {"precision": precision}, {})
        )
    assert len(set(keys)) == 4
    assert keys[0] == keys[-1]


def test_what_cannot_be_lowered_is_named_with_its_segment(smallest, tmp_path, monkeypatch):
    from handheld_export.targets.onnx import ONNX

    checkpoint = Checkpoint(smallest)
    segment = lowering.lines(checkpoint, (8, 8), 77).cut("unet", ONNX(), "fp32")[1]
    ports = {f"in.{n}": p for n, p in segment.ports.inputs.items()}
    save_file(
        {n: np.zeros(p.shape, np.float32) for n, p in ports.items()},
        tmp_path / "example.safetensors",
    )

    def refuse(*_):
        raise TargetError("layer 'a': no kernel", remedy="another grid")

    monkeypatch.setattr(ONNX, "lower", refuse)
    monkeypatch.setattr(ONNX, "missing", lambda _: None)
    task = lowering.Task(
        str(smallest), (8, 8), 77, "unet", segment.id, "onnx", "fp32", {},
        str(tmp_path / "example.safetensors"), "key", str(tmp_path), 1,
    )  # fmt: skip
    with pytest.raises(TargetError) as e:
        lowering.lower(task)
    assert e.value.message == f"segment '{segment.id}': layer 'a': no kernel"
    assert e.value.remedy == "another grid"


# --- disturbed exports, in a process group of their own ----------------------------------


def start(source, output, folder, *more):
    return subprocess.Popen(
        [
            sys.executable, "-m", "handheld", "export", str(source), "-t", TARGETS[0], "-p", "fp32",
            "-o", str(output), "-j", "1", "--references", "--json", *more,
        ],
        env=os.environ | {"XDG_CACHE_HOME": str(folder), "TMPDIR": str(folder.parent)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )  # fmt: skip


def kill(process):
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def members(session):
    """Processes of a session that are alive."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def nobody_left(session, seconds=30):
    until = time.monotonic() + seconds
    while members(session):
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
    return True


def wait_for_lowering(process, folder):
    """Wait until a worker has begun to write."""
    until = time.monotonic() + 300
    while not any((folder / "handheld" / "artifacts").glob("tmp-*")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.05)


def left_over(folder):
    cache = folder / "handheld"
    return [
        *cache.glob("work/*"), *cache.glob("artifacts/tmp-*"), *cache.glob("exports/.*"),
    ]  # fmt: skip


def kill_at_random(exports, smallest, tmp_path, moments):
    expected, _, seconds = exports.of(smallest, TARGETS[0])
    folder, output = tmp_path / "cache", tmp_path / "out" / "bundle"
    chance = random.Random(moments)
    killed = 0
    for i in range(moments):
        process = start(smallest, output, folder)
        try:
            process.wait(seconds * (i + chance.random()) / moments)
        except subprocess.TimeoutExpired:
            killed += 1
        finally:
            kill(process)
        assert nobody_left(process.pid)
        if output.exists():
            # It was faster; the next one starts from nothing.
            assert Bundle.open(output).sha256 == expected.sha256
            shutil.rmtree(output)
            shutil.rmtree(folder)
    assert killed
    process = start(smallest, output, folder)
    try:
        stdout, stderr = process.communicate(timeout=500)
    finally:
        kill(process)
    assert process.returncode == 0, stderr
    assert Bundle.open(output).sha256 == expected.sha256
    assert json.loads(stdout)[0]["sha256"] == expected.sha256
    assert not left_over(folder)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_exports_leave_nothing_wrong_five_times(exports, smallest, tmp_path):
    kill_at_random(exports, smallest, tmp_path, 5)


@pytest.mark.slow
def test_workers_die_with_their_parent(smallest, tmp_path):
    process = start(smallest, tmp_path / "bundle", tmp_path / "cache")
    wait_for_lowering(process, tmp_path / "cache")
    process.kill()
    process.communicate()
    assert nobody_left(process.pid)


@pytest.mark.slow
def test_ctrl_c(smallest, tmp_path):
    output, folder = tmp_path / "out" / "bundle", tmp_path / "cache"
    process = start(smallest, output, folder)
    wait_for_lowering(process, folder)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode not in (0, None)
    assert "Traceback" not in stderr
    assert nobody_left(process.pid)
    assert not output.parent.exists() or not any(output.parent.iterdir())
    assert not any((folder / "handheld" / "work").iterdir())
    assert not [p for p in tmp_path.iterdir() if p.name not in ("out", "cache")]
    # A killed worker cannot clean up; the next export does.
    store = folder / "handheld" / "artifacts"
    lowering.sweep(store)
    assert not any(store.glob("tmp-*"))


def test_too_little_memory_is_refused_before_anything_is_made(smallest, tmp_path):
    options = Options(target="litert-cpu", precision="fp32")
    with cache(tmp_path / "cache"), pytest.raises(UsageError, match="100 MB is too little"):
        export(Checkpoint(smallest), options, tmp_path / "bundle", memory=100)
    assert not list((tmp_path / "cache" / "handheld" / "work").iterdir())


def test_segments_wait_for_room(monkeypatch):
    """Two that fit beside each other are submitted together, a large one alone."""
    needs = {"large": 9, "a": 2, "b": 2}
    log = []

    class Pool:
        _processes = None

        def __init__(self, *_, **__):
            pass

        def submit(self, _, task):
            log.append(task.segment)
            return task

        def shutdown(self, **_):
            pass

    class Task:
        def __init__(self, segment):
            self.segment = self.key = segment

        def result(self):
            return {"id": self.segment}

    def wait(pending, **_):
        log.append("wait")
        return set(pending), set()

    budget = Budget(10, 0)
    monkeypatch.setattr("handheld_export.memory.IDLE", 0)
    monkeypatch.setattr("handheld_export.export.workers.ProcessPoolExecutor", Pool)
    monkeypatch.setattr("handheld_export.export.workers.wait", wait)
    weights = dict.fromkeys(needs, 1)
    metas = in_workers([Task(n) for n in needs], 2, 1, budget, needs, Progress(), weights)
    assert log == ["large", "wait", "a", "b", "wait"]
    assert set(metas) == set(needs)


# --- places that cannot be written -------------------------------------------------------


@pytest.fixture
def mounted(tmp_path):
    """Mount a file system of some kibibytes."""
    done = []

    def mount(size, *, read_only=False):
        folder = tmp_path / f"disk{len(done)}"
        folder.mkdir()
        options = f"size={size}k{',ro' if read_only else ''}"
        command = ["mount", "-t", "tmpfs", "-o", options, "handheld-test", str(folder)]
        try:
            result = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as e:
            pytest.skip(f"cannot mount: {e}")
        if result.returncode:
            pytest.skip(f"cannot mount: {result.stderr.strip()}")
        done.append(folder)
        return folder

    yield mount
    for folder in done:
        subprocess.run(["umount", str(folder)], check=True)


def test_full_disk(exports, smallest, mounted):
    exports.of(smallest, TARGETS[0])
    disk = mounted(256)
    with pytest.raises(OutputError, match="disk is full") as e:
        exports.run(smallest, disk / "b", target=TARGETS[0], precision="fp32", references=True)
    assert e.value.remedy == "free some space"
    assert not any(disk.iterdir())


def test_full_cache(smallest, mounted, tmp_path):
    disk = mounted(64)
    with cache(disk), pytest.raises(OutputError, match="disk is full") as e:
        export(
            Checkpoint(smallest),
            Options(target=TARGETS[0], precision="fp32"),
            tmp_path / "bundle",
            jobs=1,
        )
    assert "XDG_CACHE_HOME" in e.value.remedy
    assert not (tmp_path / "bundle").exists()


def test_read_only_output(exports, smallest, mounted):
    exports.of(smallest, TARGETS[0])
    disk = mounted(64, read_only=True)
    with pytest.raises(OutputError, match="read-only"):
        exports.run(smallest, disk / "b", target=TARGETS[0], precision="fp32", references=True)


def test_output_below_a_file(exports, smallest, tmp_path):
    exports.of(smallest, TARGETS[0])
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError):
        exports.run(
            smallest, tmp_path / "file" / "b", target=TARGETS[0], precision="fp32", references=True
        )


@pytest.mark.parametrize(
    ("calls", "precision", "codes", "runs"),
    [
        ({"unet.0": 1, "decoder.0": 1}, "16a8w", False, 16),
        ({"unet.0": 8, "decoder.0": 1}, "16a8w", False, 4),
        ({"unet.0": 1, "decoder.0": 1}, "fp16", False, 0),
        ({"unet.0": 1, "decoder.0": 1}, "fp16", True, 16),
    ],
)
def test_calibration_sees_enough_calls(calls, precision, codes, runs):
    plan = SimpleNamespace(
        target=SimpleNamespace(samples=16, codes_on_grids=codes),
        options=SimpleNamespace(precision=precision),
        checkpoint=SimpleNamespace(unet=SimpleNamespace(quantized={"a": 1})),
        program=SimpleNamespace(
            ops=[Call.model_construct(artifact=a) for a, n in calls.items() for _ in range(n)]
        ),
    )
    found = sampled(plan)
    assert len(found) == runs
    if runs:
        assert sum(len(run["unet.0"]) for run in found) == 16
        assert all(max(run["unet.0"]) < calls["unet.0"] for run in found)
        assert sum(len(run["decoder.0"]) for run in found) == runs
