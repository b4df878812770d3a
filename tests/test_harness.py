"""The native harness: its program and its library, on bundles made here."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from pydantic import TypeAdapter
from safetensors.numpy import load_file, save, save_file

from handheld import harness, noise
from handheld.bundle import Bundle
from handheld.errors import HarnessError, MissingDependencyError
from handheld.execute import execute
from handheld.memory_plan import plan_bundle
from handheld.program import Affine, Concat, Slice, Term
from handheld.protocol import AnyEvent, Job
from samples import ref

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("executorch") is None, reason="executorch is not installed"
)
if importlib.util.find_spec("executorch") is not None:
    import harness_bundles as hb
    import test_executorch_shared
    import tflites

SIZE = "24x16"
EVENT = TypeAdapter(AnyEvent)


@pytest.fixture(scope="session")
def built():
    return harness.build()


@pytest.fixture(scope="session")
def lowered(request):
    """Lowering takes half a minute, so its result is kept between runs."""
    key = hashlib.sha256(Path(hb.__file__).read_bytes()).hexdigest()[:16]
    kept = request.config.cache.mkdir("harness") / f"{key}.pickle"
    if not kept.exists():
        temporary = kept.with_suffix(f".{os.getpid()}")
        temporary.write_bytes(pickle.dumps((hb.artifacts(), hb.normed())))
        temporary.replace(kept)
    return pickle.loads(kept.read_bytes())


@pytest.fixture(scope="session")
def made(lowered):
    return lowered[0]


@pytest.fixture(scope="session")
def bundle(made, tmp_path_factory):
    return hb.write(tmp_path_factory.mktemp("bundles") / "tiny", made, hb.program()).path


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    path = tmp_path_factory.mktemp("inputs") / "inputs.safetensors"
    save_file(hb.inputs(), path)
    return path


@pytest.fixture
def copy(bundle, tmp_path):
    """A copy of the bundle to spoil: returns its folder and a function that edits its manifest."""
    folder = tmp_path / "copy"
    subprocess.run(["cp", "-r", bundle, folder], check=True)

    def edit(change):
        manifest = json.loads((folder / "manifest.json").read_text())
        change(manifest)
        (folder / "manifest.json").write_text(json.dumps(manifest))
        return folder

    return folder, edit


def job(bundle, inputs, **changes):
    given = {k: {"path": str(inputs), "tensor": k} for k in hb.inputs()}
    return {"bundle": str(bundle), "size": SIZE, "seed": 11, "inputs": given, **changes}


def run(built, tmp_path, job, **options):
    path = tmp_path / "job.json"
    path.write_text(json.dumps(job))
    result = subprocess.run(
        [built.program, path], capture_output=True, text=True, timeout=60, check=False, **options
    )
    return result.returncode, [EVENT.validate_json(line) for line in result.stdout.splitlines()]


def refused(built, tmp_path, job):
    """Run a job that must fail; return the error's code and message."""
    status, events = run(built, tmp_path, job)
    errors = [e for e in events if e.event == "error"]
    assert len(errors) == 1
    assert errors[0] == events[-1]
    assert status == (1 if errors[0].code in ("engine", "memory", "io", "cancelled") else 2)
    return errors[0].code, errors[0].message


def picture(events):
    return next(e.sha256 for e in events if e.event == "output" and e.role == "picture")


def test_requirements_name_what_is_missing(monkeypatch, tmp_path):
    found = {r.name: r for r in harness.requirements()}
    assert found["cmake"].ok
    assert found["engine executorch"].found_version
    assert found["engine executorch"].optional
    monkeypatch.delenv("HANDHELD_HARNESS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(harness, "_package", lambda *_: None)
    assert harness.find() is None
    with pytest.raises(MissingDependencyError, match="nlohmann-json"):
        harness.build()


def test_a_compiler_error_shows_the_last_lines(monkeypatch, tmp_path):
    monkeypatch.delenv("HANDHELD_HARNESS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXXFLAGS", "-DHANDHELD_BROKEN=1 --no-such-option")
    with pytest.raises(HarnessError, match="no-such-option"):
        harness.build()
    assert not [p for p in (tmp_path / "handheld" / "harness").iterdir() if p.is_dir()]


def test_override(monkeypatch, built, tmp_path):
    monkeypatch.setenv("HANDHELD_HARNESS", str(built.program.parent))
    found = harness.find()
    assert found is not None
    assert found.engines == built.engines
    monkeypatch.setenv("HANDHELD_HARNESS", str(tmp_path))
    with pytest.raises(HarnessError, match="no handheld-harness"):
        harness.find()


def test_program_options(built):
    def out(*arguments):
        return subprocess.run(
            [built.program, *arguments], capture_output=True, text=True, check=False
        )

    assert out("--version").stdout.strip() == "0.1.0"
    assert json.loads(out("--engines").stdout) == built.engines
    assert out().returncode == 2
    assert out("/nonexistent").returncode == 2


def test_job_from_first_to_last_event(built, bundle, inputs, tmp_path):
    raw = tmp_path / "picture.raw"
    status, events = run(
        built, tmp_path, job(bundle, inputs, warmup=2, iterations=3, output=str(raw))
    )
    assert status == 0
    assert events[0].event == "hello"
    assert events[-1].event == "done"
    assert events[-1].iterations == 3
    iterations = [e for e in events if e.event == "iteration"]
    assert [i.kind for i in iterations] == ["first", "warmup", "warmup", "timed", "timed", "timed"]
    assert [i.index for i in iterations] == list(range(6))
    for i in iterations:
        assert len(i.calls_ms) == 3 * 2 + 4
        assert sum(i.calls_ms) == pytest.approx(i.engine_ms, abs=0.01)
        assert i.total_ms >= i.engine_ms + i.load_ms - 0.01
    assert [e.phase for e in events if e.event == "memory"] == ["start", "loaded", "first", "end"]
    assert {e.artifact for e in events if e.event == "load"} == {"unet.0", "unet.1", "decoder.0"}
    found = next(e for e in events if e.event == "output" and e.role == "picture")
    assert found.shape == (1, 16, 24, 3)
    assert found.file == str(raw)
    assert hashlib.sha256(raw.read_bytes()).hexdigest() == found.sha256
    assert len(raw.read_bytes()) == 16 * 24 * 3


def test_min_seconds(built, bundle, inputs, tmp_path):
    status, events = run(built, tmp_path, job(bundle, inputs, min_seconds=0.3))
    assert status == 0
    timed = [e for e in events if e.event == "iteration" and e.kind == "timed"]
    assert timed[-1].t_ms - timed[0].t_ms + timed[0].total_ms > 290


def test_base_memory(built, bundle, inputs, tmp_path):
    _, events = run(built, tmp_path, job(bundle, inputs))
    assert events[0].base_rss_bytes - events[0].engine_library_bytes <= 8 * 10**6


def joining(parts):
    """A program that draws, and then joins what it cuts from tensors that end there."""
    program = hb.program()
    p, x = hb._Writer(), hb.spec(1, hb.H, hb.W, hb.C)
    p.tensors, p.ops = dict(program.tensors), list(program.ops)
    for k in range(parts):
        wide, part = f"wide.{k}", f"cut.{k}"
        p.add(Affine(terms=(Term(x="noise", scale=1.0 + k),), bias=0.5, out=wide), **{wide: x})
        cut = Slice(x=wide, axis=1, start=1, length=hb.H - 2, out=part)
        p.add(cut, **{part: hb.spec(1, hb.H - 2, hb.W, hb.C)})
    p.add(
        Concat(xs=tuple(f"cut.{k}" for k in range(parts)), axis=1, out="joined"),
        joined=hb.spec(1, parts * (hb.H - 2), hb.W, hb.C),
    )
    outputs = {**program.outputs, "joined": "joined"}
    return program.model_copy(
        update={"tensors": p.tensors, "ops": tuple(p.ops), "outputs": outputs}
    )


def test_what_parts_are_cut_from_does_not_stay_until_they_are_joined(built, made, inputs, tmp_path):
    from handheld.native import Session

    sizes = []
    x = noise.normal(11, (1, hb.H, hb.W, hb.C), 3)[:, 1:-1]
    for parts in (2, 10):
        path = hb.write(tmp_path / str(parts), made, joining(parts)).path
        status, events = run(built, tmp_path, job(path, inputs))
        assert status == 0, events[-1]
        sizes.append([e for e in events if e.event == "memory"][-1].activations)
        with Session(Job(bundle=str(path), size=SIZE, seed=11)) as session:
            for name, value in hb.inputs().items():
                session.set_input(name, value)
            session.run_job()
            shape = (1, parts * (hb.H - 2), hb.W, hb.C)
            found = session.output("joined", shape, np.dtype("float32"))
        want = np.concatenate([x * (1.0 + k) + 0.5 for k in range(parts)], axis=1)
        assert np.allclose(found, want, rtol=1e-6, atol=1e-6)
    added = 8 * (hb.H - 2) * hb.W * hb.C * 4
    assert sizes[1] - sizes[0] <= added


def test_every_operation_gives_the_specified_bits(built, made, bundle, inputs, tmp_path):
    """Every tensor of the program equals what numpy computes from the same call results."""
    from handheld.native import Session

    shown = hb.showing_all(hb.program())
    everything = hb.write(tmp_path / "all", made, shown).path
    calls = tmp_path / "calls.safetensors"
    with Session(Job(bundle=str(everything), size=SIZE, seed=11, dump_calls=str(calls))) as session:
        for name, value in hb.inputs().items():
            session.set_input(name, value)
        session.run_job()
        have = {
            name: session.output(f"t.{name}", spec.shape, np.dtype(spec.dtype))
            for name, spec in shown.tensors.items()
        }
    results = load_file(calls)
    order = iter([op for op in shown.ops if op.op == "call"])
    made_calls: list[dict] = []

    def call(artifact, args):
        op = next(order)
        assert op.artifact == artifact
        made_calls.append(args)
        return {port: results[f"call.{len(made_calls) - 1}.{port}"] for port in op.results}

    want = execute(shown, hb.constants(), hb.inputs(), call, seed=11)
    for name in shown.tensors:
        assert have[name].tobytes() == want[f"t.{name}"].tobytes(), name
    # Sharing memory between tensors changes nothing.
    _, events = run(built, tmp_path, job(bundle, inputs))
    assert picture(events) == hashlib.sha256(want["picture"].tobytes()).hexdigest()


def test_calls_compute_what_torch_computes(made, bundle, tmp_path):
    from executorch.runtime import Runtime

    from handheld.native import Session

    calls = tmp_path / "calls.safetensors"
    with Session(Job(bundle=str(bundle), size=SIZE, seed=11, dump_calls=str(calls))) as session:
        session.set_inputs(hb.inputs())
        session.run_job()
    import torch

    path = tmp_path / "unet.0.pte"
    path.write_bytes(made["unet.0"][0])
    method = Runtime.get().load_program(path).load_method("forward")
    x = noise.normal(11, (1, 16, 24, 16), 3)
    arguments = (x, hb.inputs()["text"], hb.constants()["time.0"])
    want = method.execute([torch.from_numpy(a) for a in arguments])[0].numpy()
    np.testing.assert_allclose(load_file(calls)["call.0.y"], want, atol=1e-5)


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**64 - 1])
@pytest.mark.parametrize("stream", [0, 7, 2**32 - 1])
def test_noise_is_equal_to_the_bit(seed, stream):
    from handheld import native

    shape = (1_000_003,) if stream == 7 else (50_001,)
    have = native.normal(seed, shape, stream)
    assert have.tobytes() == noise.normal(seed, shape, stream).tobytes()


def test_streaming_changes_nothing_but_time(built, bundle, inputs, tmp_path):
    cache = tmp_path / "cache"
    hashes = set()
    for changes in (
        {"residency": "resident"},
        {"residency": "stream"},
        {"residency": "stream", "prefetch": False},
        {"residency": "stream", "cache": str(cache)},
        {"residency": "stream", "cache": str(cache)},
        {"residency": "resident", "cache": str(cache)},
        {"residency_by_artifact": {"unet.1": "stream"}},
        {"residency": "resident", "threads": 1},
    ):
        status, events = run(built, tmp_path, job(bundle, inputs, iterations=3, **changes))
        assert status == 0
        hashes.add(picture(events))
        assert len([e for e in events if e.event == "load"]) == 3
    assert len(hashes) == 1


def test_memory_budget(built, bundle, inputs, tmp_path):
    manifest = Bundle.open(bundle).manifest
    cache = {"cache": str(tmp_path / "cache")}
    code, message = refused(built, tmp_path, job(bundle, inputs, memory_budget=10**6, **cache))
    assert code == "job"
    least = int(re.search(r"would do is (\d+) MB", message)[1]) * 10**6
    modes, hashes = set(), set()
    for budget in (least, least + 10**6, least + 10**7):
        expected = plan_bundle(manifest, SIZE, budget)
        wanted = job(bundle, inputs, iterations=2, memory_budget=budget, **cache)
        status, events = run(built, tmp_path, wanted)
        assert status == 0
        planned = next(e for e in events if e.event == "plan").model_dump()
        assert {k: planned[k] for k in expected.to_json()} == {
            **expected.to_json(), "resident": expected.resident, "streamed": expected.streamed
        }  # fmt: skip
        assert max(e.peak_rss for e in events if e.event == "memory") <= budget
        modes.add((len(expected.resident), expected.prefetch))
        hashes.add(picture(events))
    assert len(modes) >= 2
    assert len(hashes) == 1


def test_memory_budget_wants_workspaces(built, copy, inputs, tmp_path):
    folder, edit = copy
    edit(lambda m: m["artifacts"][1].pop("workspace"))
    code, message = refused(built, tmp_path, job(folder, inputs, memory_budget=10**9))
    assert code == "bundle"
    assert "artifacts[1].workspace" in message


@pytest.fixture(scope="session")
def chained(tmp_path_factory):
    return tflites.chain(tmp_path_factory.mktemp("chained")).path


@pytest.fixture(params=["executorch", "litert"])
def faulty(request):
    """For each engine, a function that makes jobs on a bundle of three artifacts."""
    if request.param == "executorch":
        parts = [request.getfixturevalue(name) for name in ("bundle", "inputs")]
        return functools.partial(job, *parts)
    given = {"bundle": str(request.getfixturevalue("chained")), "size": "16x8", "seed": 3}
    return lambda **changes: {**given, **changes}


def test_cache_is_built_once_and_again_if_damaged(built, faulty, tmp_path):
    cache = tmp_path / "cache" / "deep"

    def states():
        status, events = run(built, tmp_path, faulty(cache=str(cache)))
        assert status == 0
        hashes.add(picture(events))
        return [e.cache for e in events if e.event == "load"]

    hashes: set[str] = set()
    assert states() == ["built"] * 3
    assert states() == ["hit"] * 3
    packed = sorted(cache.glob("*.packed"))
    assert len(packed) == 3
    os.truncate(packed[0], packed[0].stat().st_size // 2)
    packed[1].write_bytes(os.urandom(packed[1].stat().st_size))
    packed[2].with_name(packed[2].name + ".stamp").unlink()
    assert states() == ["built"] * 3
    assert states() == ["hit"] * 3
    # What a killed process left is removed.
    (cache / ".tmp-999999999-0-left").write_bytes(b"x")
    states()
    assert not list(cache.glob(".tmp*"))
    assert len(hashes) == 1


def packed(built, faulty, tmp_path):
    """Return a cache, and a function that runs with it: the picture, and how weights came."""
    cache = tmp_path / "cache"

    def again(**changes):
        status, events = run(built, tmp_path, faulty(cache=str(cache), **changes))
        assert status == 0, events[-1]
        return picture(events), [e.cache for e in events if e.event == "load"]

    return cache, again


def test_one_wrong_bit_in_packed_weights_is_noticed(built, faulty, tmp_path):
    cache, again = packed(built, faulty, tmp_path)
    good, _ = again()
    file = max(cache.glob("*.packed"), key=lambda p: p.stat().st_size)
    then = file.stat()
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(then.st_atime_ns, then.st_mtime_ns))
    assert again() == (good, ["built", "hit", "hit"])
    assert again() == (good, ["hit"] * 3)


def test_packed_weights_of_another_artifact_or_version(built, faulty, tmp_path):
    cache, again = packed(built, faulty, tmp_path)
    good, _ = again()
    one, two, three = sorted(cache.glob("*.packed"))
    for target, source in ((one, two), (three, two)):
        for suffix in ("", ".stamp"):
            wrong = source.with_name(source.name + suffix).read_bytes()
            place = target.with_name(target.name + suffix)
            place.write_bytes(wrong)
            then = source.with_name(source.name + suffix).stat()
            os.utime(place, ns=(then.st_atime_ns, then.st_mtime_ns))
    assert sorted(again()[1]) == ["built", "built", "hit"]
    # As an engine of another version would have named and stamped it.
    for suffix in ("", ".stamp"):
        old = one.with_name(one.name.replace("-", "-0000") + suffix)
        one.with_name(one.name + suffix).rename(old)
    assert sorted(again()[1]) == ["built", "hit", "hit"]
    assert again()[0] == good


def test_packed_weights_of_an_older_build_go_once_they_are_packed_again(built, faulty, tmp_path):
    cache, again = packed(built, faulty, tmp_path)
    again()
    one, two, three = sorted(cache.glob("*.packed"))

    def move(path, build=None, processor=None):
        artifact, own, here = path.stem.split("-")
        moved = path.with_name(f"{artifact}-{build or own}-{processor or here}.packed")
        path.with_name(path.name + ".stamp").rename(moved.with_name(moved.name + ".stamp"))
        return path.rename(moved)

    old, other = move(one, build="0" * 16), move(two, processor="0" * 16)
    assert sorted(again()[1]) == ["built", "built", "hit"]
    # Whoever shares the folder from another kind of machine still needs its own.
    assert sorted(cache.glob("*.packed")) == sorted([one, two, three, other])
    assert not old.with_name(old.name + ".stamp").exists()
    assert other.with_name(other.name + ".stamp").exists()


@pytest.mark.parametrize("residency", ["resident", "stream"])
@pytest.mark.parametrize("how", ["cut", "removed", "written"])
def test_packed_weights_that_change_during_runs(built, faulty, tmp_path, residency, how):
    cache, again = packed(built, faulty, tmp_path)
    good, _ = again()
    options = {"residency": residency, "prefetch": False, "cache": str(cache)}
    process, lines = start(built, tmp_path, faulty(min_seconds=2, **options))
    for file in cache.glob("*.packed"):
        if how == "removed":
            file.unlink()
        elif how == "cut":
            os.truncate(file, file.stat().st_size - 64)
        else:
            with file.open("r+b") as f:
                f.seek(-64, os.SEEK_END)
                f.write(os.urandom(64))
    out, _ = process.communicate(timeout=30)
    events = [EVENT.validate_json(line) for line in (*lines, *out.splitlines())]
    if process.returncode:
        # What is mapped has changed under the engine: refused, as soon as a run is over.
        assert how != "removed"
        assert events[-1].code == "io"
        assert not [e for e in events if e.event == "output"]
    else:
        # It was packed anew, or is still whole.
        assert picture(events) == good
    assert again()[0] == good


def test_session_goes_on_after_its_cache_was_spoiled(faulty, tmp_path):
    from handheld.native import NativeError, Session

    cache = tmp_path / "cache"
    with Session(Job.model_validate(faulty(cache=str(cache)))) as session:
        session.run()
        good = session.output()
        os.utime(sorted(cache.glob("*.packed"))[0])
        with pytest.raises(NativeError, match="changed or cut off while they were in use"):
            session.run()
        session.run()
        assert (session.output() == good).all()


def test_disk_that_is_full_before_packing(built, faulty, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mounted, check=False, capture_output=True).returncode:
        pytest.skip("a small disk can only be mounted by root")
    try:
        code, message = refused(built, tmp_path, faulty(cache=str(disk / "cache")))
        assert code == "io"
        assert "no room to pack its weights" in message
        assert "run without a cache" in message
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_disk_that_fills_up_while_packing(built, faulty, tmp_path):
    cache, again = packed(built, faulty, tmp_path)
    good, _ = again()
    kept = sorted(cache.glob("*.packed"))
    kept[0].with_name(kept[0].name + ".stamp").unlink()  # this one is packed again
    before = {p: p.read_bytes() for p in kept}

    def full():
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))

    path = tmp_path / "job.json"
    path.write_text(json.dumps(faulty(cache=str(cache))))
    result = subprocess.run(
        [built.program, path],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        preexec_fn=full,
    )
    assert result.returncode == 1
    last = EVENT.validate_json(result.stdout.splitlines()[-1])
    assert last.event == "error"
    assert last.code in ("io", "engine")
    assert {p: p.read_bytes() for p in kept} == before
    assert again()[0] == good
    assert not list(cache.glob(".tmp*"))


def test_cached_weights_beside_constants_that_are_not_packed(built, lowered, tmp_path):
    folder = hb.write(tmp_path / "normed", {"normed": lowered[1]}, hb.normed_program()).path
    hashes = set()
    for cache in (None, str(tmp_path / "cache"), str(tmp_path / "cache")):
        wanted = {"bundle": str(folder), "size": SIZE, "cache": cache}
        status, events = run(built, tmp_path, wanted)
        assert status == 0
        hashes.add(next(e.sha256 for e in events if e.event == "output"))
    assert next(e.cache for e in events if e.event == "load") == "hit"
    assert len(hashes) == 1


def test_cache_is_shared_by_processes(built, bundle, inputs, tmp_path):
    cache = tmp_path / "cache"
    path = tmp_path / "job.json"
    path.write_text(json.dumps(job(bundle, inputs, cache=str(cache), residency="stream")))
    running = [
        subprocess.Popen([built.program, path], stdout=subprocess.PIPE, text=True) for _ in range(4)
    ]
    hashes = set()
    for process in running:
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        hashes.add(picture([EVENT.validate_json(line) for line in out.splitlines()]))
    assert len(hashes) == 1
    assert not list(cache.glob(".tmp*"))


def test_long_or_unwritable_cache_folder(built, bundle, inputs, tmp_path):
    long = tmp_path / ("a" * 120) / ("b" * 120)
    for _ in range(2):
        status, events = run(built, tmp_path, job(bundle, inputs, cache=str(long)))
        assert status == 0
    assert [e.cache for e in events if e.event == "load"] == ["hit"] * 3
    status, events = run(built, tmp_path, job(bundle, inputs, cache="/proc/none"))
    assert status == 0
    assert [e.cache for e in events if e.event == "load"] == ["none"] * 3


def start(built, tmp_path, job):
    path = tmp_path / "job.json"
    path.write_text(json.dumps(job))
    process = subprocess.Popen([built.program, path], stdout=subprocess.PIPE, text=True)
    lines = []
    while not lines or '"timed"' not in lines[-1]:
        lines.append(process.stdout.readline())
        assert lines[-1]
    return process, lines


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_cancel(built, bundle, inputs, tmp_path, number):
    process, _ = start(built, tmp_path, job(bundle, inputs, min_seconds=60, residency="stream"))
    process.send_signal(number)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 1
    last = EVENT.validate_json(out.splitlines()[-1])
    assert last.event == "error"
    assert last.code == "cancelled"


def test_killed_harness_leaves_whole_lines(built, bundle, inputs, tmp_path):
    process, lines = start(built, tmp_path, job(bundle, inputs, min_seconds=60))
    process.kill()
    out, _ = process.communicate(timeout=20)
    for line in [*lines, *out.splitlines()]:
        EVENT.validate_json(line)


def test_closed_pipe_ends_the_run(built, bundle, inputs, tmp_path):
    process, _ = start(built, tmp_path, job(bundle, inputs, min_seconds=60))
    process.stdout.close()
    assert process.wait(timeout=20) == 1


def test_session(bundle):
    from handheld.native import NativeError, Session

    seen = []
    with Session(Job(bundle=str(bundle), size=SIZE, seed=11), seen.append) as session:
        with pytest.raises(NativeError, match="input 'text' is missing") as caught:
            session.run()
        assert caught.value.failure == "input"
        with pytest.raises(NativeError, match="no output before"):
            session.output()
        with pytest.raises(NativeError, match="no input 'nothing'"):
            session.set_input("nothing", np.zeros(1))
        with pytest.raises(NativeError, match="has 4 bytes"):
            session.set_input("text", np.zeros(1, np.float32))
        session.set_inputs(hb.inputs())
        session.run()
        first = session.output()
        session.run()
        assert (session.output() == first).all()
        session.set_seed(12)
        session.run()
        other = session.output()
        assert (other != first).any()
        session.set_input("noise", noise.normal(11, (1, 16, 24, 16), 3))
        session.set_input("more", noise.normal(11, (1, 16, 24, 16), 4))
        session.run()
        assert (session.output() == first).all()
    with pytest.raises(HarnessError, match="closed"):
        session.run()
    kinds = [e.kind for e in seen if e.event == "iteration"]
    assert kinds == ["first", "timed", "timed", "timed"]
    assert [e.code for e in seen if e.event == "error"] == ["input"]


def test_a_memory_warning_streams_and_changes_nothing(bundle):
    from handheld.native import Session

    seen, told = [], []
    with Session(Job(bundle=str(bundle), size=SIZE, seed=11), seen.append) as session:
        session.set_inputs(hb.inputs())
        session.on_progress(lambda done, total: told.append((done, total)))
        session.run()
        first = session.output()
        assert told == [(i + 1, len(told)) for i in range(len(told))]
        session.memory_warning()
        phases = [e.phase for e in seen if e.event == "memory"]
        assert phases == ["start", "loaded", "first", "warning"]
        session.run()
        assert (session.output() == first).all()
        # In the midst of a run, after its first call.
        session.on_progress(lambda done, total: done == 1 and session.memory_warning())
        session.run()
        assert (session.output() == first).all()
        assert [e.phase for e in seen if e.event == "memory"][4:] == ["warning"]

        def stop(done, total):
            raise ZeroDivisionError

        session.on_progress(stop)
        with pytest.raises(ZeroDivisionError):
            session.run()


def test_the_picture_is_compared_where_it_is_drawn(built, bundle, inputs, tmp_path):
    picture = tmp_path / "picture.raw"
    good = job(bundle, inputs, output=str(picture))
    _, events = run(built, tmp_path, good)
    assert next(e for e in events if e.event == "output").psnr_db is None
    pixels = np.fromfile(picture, np.uint8)
    for change, wanted in ((0, 999.0), (1, 20 * np.log10(255))):
        other = tmp_path / f"expect{change}.safetensors"
        save_file({"picture": (pixels ^ change).reshape(1, 16, 24, 3)}, other)
        _, events = run(
            built, tmp_path, {**good, "expect": {"path": str(other), "tensor": "picture"}}
        )
        said = next(e for e in events if e.event == "output" and e.role == "picture")
        assert said.psnr_db == pytest.approx(wanted, abs=1e-3)


def test_runs_end_when_the_median_is_known(built, bundle, inputs, tmp_path):
    def timed(**changes):
        status, events = run(built, tmp_path, job(bundle, inputs, **changes))
        assert status == 0
        return [e.total_ms for e in events if e.event == "iteration" and e.kind == "timed"]

    assert len(timed(iterations=1, precision=1.0)) >= 6
    limited = timed(iterations=2, precision=1e-9, max_seconds=0.3)
    assert len(limited) >= 2
    assert sum(limited) < 10_000


def test_session_is_interrupted(bundle):
    from handheld.native import NativeError, Session

    work = Job(bundle=str(bundle), size=SIZE, min_seconds=60)
    with Session(work) as session:
        session.set_inputs(hb.inputs())
        threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        start = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            session.run_job()
        assert time.monotonic() - start < 10
        threading.Timer(0.2, session.cancel).start()
        with pytest.raises(NativeError, match="cancelled"):
            session.run_job()
        session.run()  # and goes on

    def raises(event):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Session(work, raises)


def test_bad_jobs(built, bundle, inputs, tmp_path):
    good = job(bundle, inputs)
    for changes, code, words in (
        ({"protocol": 2}, "job", "unknown version 2"),
        ({"size": "8x8"}, "job", "no size '8x8' (it has 24x16)"),
        ({"threads": 0}, "job", "threads"),
        ({"surprise": 1}, "job", "unknown field 'surprise'"),
        ({"seed": -1}, "job", "seed"),
        ({"residency": "sometimes"}, "job", "residency"),
        ({"residency_by_artifact": {"no": "stream"}}, "job", "no artifact 'no'"),
        ({"bundle": str(tmp_path / "none")}, "bundle", "no such bundle"),
        ({"inputs": {}}, "input", "input 'text' is missing"),
        ({"inputs": {"text": {"path": "/none", "tensor": "x"}}}, "input", "/none"),
        ({"inputs": {"text": {"path": str(inputs), "tensor": "x"}}}, "input", "'x' is missing"),
        ({"inputs": {"text": {"path": str(inputs), "tensor": "half"}}}, "input", "float16"),
        ({"output": "/nonexistent/picture"}, "io", "/nonexistent/picture"),
    ):
        assert (found := refused(built, tmp_path, {**good, **changes}))[0] == code, found
        assert words in found[1]
    path = tmp_path / "broken.json"
    path.write_text("{")
    result = subprocess.run([built.program, path], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert EVENT.validate_json(result.stdout.splitlines()[-1]).code == "job"


def test_bad_manifests(built, copy, inputs, tmp_path):
    folder, edit = copy
    good = (folder / "manifest.json").read_text()

    def ops(m):
        return m["sizes"][SIZE]["program"]["ops"]

    def tensors(m):
        return m["sizes"][SIZE]["program"]["tensors"]

    for change, words in (
        (lambda m: m.update(schema_version=4), "schema_version: unknown version 4"),
        (lambda m: m.pop("schema_version"), "schema_version"),
        (lambda m: m.update(extra=1), "unknown field 'extra'"),
        (lambda m: m.update(artifacts=[]), "artifacts: is empty"),
        (lambda m: m["artifacts"].append(m["artifacts"][0]), "artifacts[3].id: a second artifact"),
        (lambda m: m["artifacts"][0].update(engine="abacus"), "unknown engine 'abacus'"),
        (lambda m: m["artifacts"][0]["file"].update(path="../x"), "leaves the bundle"),
        (lambda m: m["artifacts"][0]["file"].update(path="/etc/passwd"), "not a relative path"),
        (lambda m: m["artifacts"][0]["file"].update(path="a//b"), "leaves the bundle"),
        (lambda m: m["artifacts"][0]["file"].update(path="artifacts/no"), "is missing"),
        (lambda m: m["artifacts"][0]["file"].update(path="artifacts"), "not a plain file"),
        (lambda m: m["artifacts"][0]["file"].update(bytes=1), "the manifest says 1"),
        (lambda m: m["artifacts"][0]["file"].update(sha256="0" * 63), "is not a sha256"),
        (lambda m: m["artifacts"][0]["ports"]["inputs"].pop("time"), "unknown argument 'time'"),
        (lambda m: ops(m)[0].update(op="loop"), "ops[0].op: unknown operation 'loop'"),
        (lambda m: ops(m)[0].update(artifact="unet.9"), "ops[0]: calls artifact 'unet.9'"),
        (lambda m: ops(m)[0]["args"].update(x="h.1"), "ops[0]: reads tensor 'h.1'"),
        (lambda m: ops(m)[0]["args"].pop("x"), "lacks argument 'x'"),
        (lambda m: ops(m)[2].update(out="h.0"), "writes tensor 'h.0' a second time"),
        (lambda m: ops(m)[2]["terms"][0].update(scale=1e39), "scale: is out of range"),
        (lambda m: tensors(m).pop("skip.1"), "tensor 'skip.1' is not declared"),
        (lambda m: tensors(m).update(nobody={"shape": [1]}), "declared but never written"),
        (lambda m: tensors(m)["noise"].update(shape=[1, 16, 24, 17]), "wants float32[1, 16, 24,"),
        (lambda m: tensors(m)["part.0"].update(shape=[1, 5, 24, 16]), "but computed as"),
        (lambda m: tensors(m)["noise"].update(shape=[2**31] * 6), "over the limit"),
        (lambda m: tensors(m)["noise"].update(shape=[0, 1]), "not in 1 .."),
        (lambda m: tensors(m)["noise"].update(dtype="float64"), "unknown dtype"),
        (lambda m: m["constant_specs"].pop("time.0"), "reads tensor 'time.0'"),
        (lambda m: m.update(constants=None), "there is no file of them"),
        (lambda m: m["sizes"][SIZE].update(width=32), "the size is 32x16"),
    ):
        (folder / "manifest.json").write_text(good)
        code, message = refused(built, tmp_path, job(edit(change), inputs))
        assert code == "bundle", message
        assert words in message
        assert "manifest.json: " in message
    for text in (
        "",
        "{",
        "[" * 100_000,
        "[]",
        "null",
        '{"a":1,"a":2}',
        "\0",
        '{"schema_version":1}',
    ):
        (folder / "manifest.json").write_text(text)
        assert refused(built, tmp_path, job(folder, inputs))[0] == "bundle"
    (folder / "manifest.json").unlink()
    os.mkfifo(folder / "manifest.json")
    assert refused(built, tmp_path, job(folder, inputs))[0] == "bundle"


def test_bad_files(built, copy, inputs, tmp_path):
    folder, edit = copy
    artifact = folder / "artifacts" / "unet.0.pte"
    good = artifact.read_bytes()
    artifact.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    code, message = refused(built, tmp_path, job(folder, inputs))
    assert code == "hash"
    assert "artifacts[0].file.sha256" in message
    artifact.rename(tmp_path / "outside")
    artifact.symlink_to(tmp_path / "outside")
    assert "symbolic links" in refused(built, tmp_path, job(folder, inputs))[1]
    artifact.unlink()
    (folder / "artifacts").rename(tmp_path / "artifacts")
    (folder / "artifacts").symlink_to(tmp_path / "artifacts")
    assert "symbolic links" in refused(built, tmp_path, job(folder, inputs))[1]
    (folder / "artifacts").unlink()
    (tmp_path / "artifacts").rename(folder / "artifacts")

    for data in (b"", b"not a program" * 10, good[: len(good) // 2], os.urandom(20_000)):
        artifact.write_bytes(data)
        fresh = ref("artifacts/unet.0.pte", data).model_dump()
        edit(lambda m, fresh=fresh: m["artifacts"][0].update(file=fresh))
        code, message = refused(built, tmp_path, job(folder, inputs))
        assert code in ("engine", "bundle")
        assert "unet.0" in message
    # A program that is fine but not the one the manifest describes.
    other = (folder / "artifacts" / "unet.1.pte").read_bytes()
    artifact.write_bytes(other)
    fresh = ref("artifacts/unet.0.pte", other).model_dump()
    edit(lambda m: m["artifacts"][0].update(file=fresh))
    code, message = refused(built, tmp_path, job(folder, inputs))
    assert code == "bundle"
    assert "the manifest says otherwise" in message


def test_missing_engine(built, copy, inputs, tmp_path):
    _, edit = copy
    folder = edit(lambda m: m["artifacts"][0].update(engine="coreml"))
    code, message = refused(built, tmp_path, job(folder, inputs))
    assert code == "engine-missing"
    assert "'coreml'" in message
    assert "Apple" in message


def test_missing_accelerator(built, copy, inputs, tmp_path):
    _, edit = copy
    folder = edit(lambda m: m["artifacts"][0].update(options={"accelerator": "gpu"}))
    code, message = refused(built, tmp_path, job(folder, inputs))
    assert code == "engine-missing"
    assert "unet.0" in message
    assert "accelerator 'gpu'" in message


def test_bad_constants(built, copy, inputs, tmp_path):
    folder, edit = copy
    path = folder / "constants.safetensors"
    good = path.read_bytes()
    header = int.from_bytes(good[:8], "little")
    cases = {
        "too short": b"abc",
        "cut off": good[:20],
        "leave the file": good[:-4],
        "cut off or too large": (2**62).to_bytes(8, "little") + good[8:],
        "broken JSON": good[:8] + b"}" * header + good[8 + header :],
        "is missing": save({"other": np.zeros(3, np.float32)}),
        "the manifest says": save({k: v[..., :3] for k, v in hb.constants().items()}),
        "not one that the manifest names": save(
            {**hb.constants(), "extra": np.zeros(1, np.float32)}
        ),
    }
    for words, data in cases.items():
        path.write_bytes(data)
        fresh = ref("constants.safetensors", data).model_dump()
        edit(lambda m, fresh=fresh: m.update(constants=fresh))
        code, message = refused(built, tmp_path, job(folder, inputs))
        assert code == "bundle"
        assert words in message
        assert "constants.safetensors" in message


FUZZ = """
import ctypes, json, random, sys
from pathlib import Path
lib = ctypes.CDLL(sys.argv[1])
lib.hh_open.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
lib.hh_close.argtypes = [ctypes.c_void_p]
lib.hh_last_error.restype = ctypes.c_char_p
folder, size, count = Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
job = json.dumps({"bundle": str(folder), "size": size}).encode()
good = (folder / "manifest.json").read_bytes()
random.seed(1)
seen = {0: 0, 1: 0, 2: 0}
for _ in range(count):
    text = bytearray(good)
    for _ in range(random.choice((1, 1, 1, 2, 5))):
        i = random.randrange(len(text))
        kind = random.randrange(5)
        if kind == 0:
            text[i] = random.randrange(256)
        elif kind == 1:
            del text[i : i + random.choice((1, 3, 30))]
        elif kind == 2:
            text[i:i] = random.choice((b"9", b"-", b'"', b"{", b"[", b"null", b"1e999", b"\\xff"))
        elif kind == 3:
            digits = [k for k, c in enumerate(text) if 48 <= c < 58]
            text[random.choice(digits)] = random.randrange(48, 58)
        else:
            j = random.randrange(len(text))
            text[i:i] = text[j : j + random.randrange(40)]
    (folder / "manifest.json").write_bytes(text)
    session = ctypes.c_void_p()
    status = lib.hh_open(job, None, None, ctypes.byref(session))
    seen[status] += 1
    if status:
        error = json.loads(lib.hh_last_error())
        assert error["code"] and error["message"]
    if status == 1:
        print(error)
    lib.hh_close(session)
print(json.dumps(seen))
"""


@pytest.fixture(scope="module")
def sized(tmp_path_factory):
    """Bundles of three sizes: whose files share weights, and whose are whole."""
    folder = tmp_path_factory.mktemp("sized")
    shared = tflites.write(folder / "shared", tflites.together(folder / "files"))
    alone = {w: (path,) for w, path in tflites.alone(folder / "files").items()}
    return shared.path, tflites.write(folder / "alone", alone).path


@pytest.fixture(scope="module")
def sized_programs(tmp_path_factory):
    """The same for ExecuTorch."""
    folder = tmp_path_factory.mktemp("sized")
    shared, alone = test_executorch_shared.made(folder)
    bundles = {"shared": shared, "alone": {w: (path,) for w, path in alone.items()}}
    return [tflites.write(folder / n, b, "executorch").path for n, b in bundles.items()]


def drawn(built, tmp_path, bundle, width, **changes):
    """Draw a picture; return its hash and what became of packed weights."""
    given = {"bundle": str(bundle), "size": f"{width}x{tflites.HEIGHT}", "seed": 3, **changes}
    status, events = run(built, tmp_path, given)
    assert status == 0, events[-1]
    return picture(events), next(e.cache for e in events if e.event == "load")


@pytest.mark.parametrize("residency", ["resident", "stream"])
@pytest.mark.parametrize("bundles", ["sized", "sized_programs"])
def test_sizes_that_share_weights_draw_the_same_bits(built, bundles, tmp_path, residency, request):
    shared, alone = request.getfixturevalue(bundles)
    cache = str(tmp_path / "cache")
    seen = []
    for width in tflites.SIZES:
        given = {"residency": residency, "cache": cache}
        first, state = drawn(built, tmp_path, shared, width, **given)
        again, _ = drawn(built, tmp_path, shared, width, **given)
        without, _ = drawn(built, tmp_path, shared, width)
        whole, _ = drawn(built, tmp_path, alone, width, residency=residency)
        assert first == again == without == whole
        seen.append((first, state))
    assert len({one for one, _ in seen}) == len(tflites.SIZES)
    # What the first size packed serves the others, and is there once.
    assert [state for _, state in seen] == ["built", "hit", "hit"]
    assert len(list(Path(cache).rglob("*.packed"))) == 1


def test_a_size_that_is_not_there(built, sized, tmp_path):
    code, message = refused(built, tmp_path, {"bundle": str(sized[0]), "size": "64x64"})
    assert code == "job"
    assert "no size '64x64' (it has 16x8, 24x8, 8x8)" in message


def spoiled(sized, tmp_path, change):
    """A copy of the bundle whose manifest says what its files are, after a change."""
    folder = tmp_path / "spoiled"
    shutil.copytree(sized[0], folder)
    change(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    for artifact in manifest["artifacts"]:
        for file in (artifact["file"], *artifact["parts"]):
            data = (folder / file["path"]).read_bytes()
            file |= {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def cut(name, bytes):
    def change(folder):
        path = folder / "artifacts" / name
        path.write_bytes(path.read_bytes()[:bytes])

    return change


@pytest.mark.parametrize(
    ("name", "bytes", "code", "expected"),
    [
        ("unet.weights", 0, "bundle", "is empty"),
        ("unet.weights", 1000, "engine", "LiteRT cannot"),
        ("unet.24x8.tflite", 5000, "bundle", "no multiple of a page"),
        ("unet.24x8.tflite", 0, "bundle", "no multiple of a page"),
    ],
)
def test_parts_that_do_not_continue_a_file(built, sized, tmp_path, name, bytes, code, expected):
    folder = spoiled(sized, tmp_path, cut(name, bytes))
    told, message = refused(built, tmp_path, {"bundle": str(folder), "size": "24x8"})
    assert (told, expected in message) == (code, True), message


def test_packed_weights_are_not_those_of_other_scales(built, sized, tmp_path):
    """The same weights under graphs that scale them otherwise are packed apart."""
    shared, _ = sized
    cache = str(tmp_path / "cache")
    assert drawn(built, tmp_path, shared, 24, cache=cache)[1] == "built"
    files = tflites.together(tmp_path / "files", scale=2e-3)
    other = tflites.write(tmp_path / "other", files).path
    weights = [b / "artifacts" / "unet.weights" for b in (shared, other)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    found, state = drawn(built, tmp_path, other, 24, cache=cache)
    assert state == "built"
    assert found == drawn(built, tmp_path, other, 24)[0]


def fuzzed(built, folder, size, count):
    result = subprocess.run(
        [sys.executable, "-c", FUZZ, built.library, folder, size, str(count)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    seen = json.loads(result.stdout.splitlines()[-1])
    assert seen["1"] == 0, result.stdout
    return seen


def test_mutated_manifests_of_several_sizes_never_crash(built, sized, tmp_path):
    folder = Path(shutil.copytree(sized[0], tmp_path / "copy"))
    seen = fuzzed(built, folder, "24x8", 1000)
    assert seen["0"] > 25
    assert seen["2"] > 250


def test_mutated_manifests_never_crash(built, copy):
    folder, _ = copy
    seen = fuzzed(built, folder, SIZE, 2000)
    assert seen["0"] > 50
    assert seen["2"] > 500
