from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import save_file

import samples
from handheld import diagnose
from handheld.protocol import Job


@pytest.fixture
def bundle(tmp_path):
    return samples.write_bundle(tmp_path / "b")


def results(bundle):
    size = bundle.size()[0]
    rng = np.random.default_rng(0)
    return size, {
        f"call.{i}.{port}": rng.standard_normal((4, 4)).astype(np.float32)
        for i, call in enumerate(diagnose.calls(bundle, size))
        for port in call.results
    }


def test_equal_results_accuse_nobody(bundle):
    size, wanted = results(bundle)
    assert diagnose.first_wrong(bundle, size, wanted, dict(wanted), "x") is None


def test_the_first_wrong_call_is_named(bundle):
    size, wanted = results(bundle)
    wrong = {k: -v for k, v in wanted.items()}
    found = diagnose.first_wrong(bundle, size, wanted, wrong, "the reference")
    assert (found.call, found.artifact) == (0, "unet.0")
    assert "'unet.0' (call 0, -6.0 dB against the reference)" in str(found)


def test_a_coarse_segment_is_not_blamed(bundle):
    size, wanted = results(bundle)
    rng = np.random.default_rng(1)
    coarse = {
        k: v + 0.16 * rng.standard_normal(v.shape).astype(np.float32) for k, v in wanted.items()
    }
    found = diagnose.first_wrong(bundle, size, wanted, coarse, "x", {"unet.0": 27.0})
    assert 12 < found.snr_db < 20
    wrong = {k: -v for k, v in wanted.items()}
    assert diagnose.first_wrong(bundle, size, wanted, wrong, "x", {"unet.0": 27.0}).snr_db < -5


def test_nan_is_as_wrong_as_can_be():
    one = np.ones(3, np.float32)
    assert diagnose.snr_db(one, one) == 999.0
    assert diagnose.snr_db(one, np.full(3, np.nan, np.float32)) == -999.0
    assert diagnose.snr_db(one, np.ones(4, np.float32)) == -999.0
    assert diagnose.snr_db(np.zeros(3), one) == -999.0


def test_without_anything_to_compare_with(bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(diagnose.harness, "find", lambda: None)
    size, wanted = results(bundle)
    ran = []

    def run(job):
        ran.append(job)
        save_file(wanted, job.dump_calls)

    job = Job(bundle=str(bundle.path), size=size, iterations=9, precision=0.1, max_seconds=1)
    assert diagnose.find(bundle, job, run) is None
    assert (ran[0].iterations, ran[0].precision) == (1, None)
