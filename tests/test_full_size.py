"""The benchmarks of full size: a small model all the way, and what peers' logs say."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("torch")

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
LOG = """
[INFO ] stable-diffusion.cpp:3168 - get_learned_condition completed, taking 1.50s
[INFO ] stable-diffusion.cpp:3432 - sampling completed, taking 20.25s
[INFO ] stable-diffusion.cpp:3450 - generating 1 latent images completed, taking 20.26s
[INFO ] stable-diffusion.cpp:3208 - latent 1 decoded, taking 30.00s
[INFO ] stable-diffusion.cpp:3212 - decode_first_stage completed, taking 30.01s
[INFO ] stable-diffusion.cpp:3591 - generate_image completed in 52.00s
"""


@pytest.fixture
def peers(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import against_peers

    return against_peers


def test_log_of_the_peer(peers):
    assert peers.parse(LOG + LOG) == {
        "text_ms": [1500.0, 1500.0],
        "unet_step_ms": [20250.0, 20250.0],
        "decoder_ms": [30010.0, 30010.0],
        "total_ms": [52000.0, 52000.0],
    }
    assert all(v == [] for v in peers.parse("[ERROR] model.cpp:1 - broken").values())


def test_ratios_take_the_peers_best_and_the_same_decoder(peers):
    figures = {
        "configuration": "default",
        "decoder_ms": 10.0,
        "load_ms": 10.0,
        "peak_rss_mb": 50.0,
        "size": "512x512",
    }
    mine = figures | {
        "who": "us", "decoder": "tiny", "record": "r", "unet_step_ms": 10.0, "picture_ms": 20.0,
    }  # fmt: skip
    slow = figures | {
        "who": "them", "decoder": "tiny", "unet_step_ms": 300.0, "picture_ms": 310.0,
    }  # fmt: skip
    fast = slow | {"unet_step_ms": 200.0, "picture_ms": 410.0, "peak_rss_mb": 100.0}
    other = slow | {"decoder": "full", "unet_step_ms": 1.0}
    failed = {
        "who": "them",
        "decoder": "tiny",
        "size": "512x512",
        "configuration": "flash",
        "failed": "out of memory",
    }
    (entry,) = peers.ratios([mine, slow, fast, other, failed])
    assert (entry["unet_step_ms"], entry["picture_ms"]) == (20.0, 15.5)
    assert entry["peak_rss_mb"] == 1.0
    peers.show([mine, slow, failed], [entry])


@pytest.mark.skipif(find_spec("stable_diffusion_cpp") is not None, reason="the peer is there")
def test_a_missing_peer_is_named(tmp_path):
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "against_peers.py"), "--folder", str(tmp_path)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "pip install stable-diffusion-cpp-python==0.4.7" in done.stderr
    assert done.returncode == 2 and "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_small_model_all_the_way(smallest, tmp_path):
    words = ["--checkpoint", str(smallest), "--size", "8x8", "--memory", "4000"]
    words += ["--folder", str(tmp_path / "work"), "--json", str(tmp_path / "out.json")]
    words += ["--target", "executorch-xnnpack"]  # converted in a third of LiteRT's time
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "full_size.py"), *words, "--precision", "fp32"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "out.json").read_text())
    (made,) = summary["exports"]
    assert made["cached_s"] < made["first_s"] and made["first_peak_mb"] > 200
    assert {r["residency"] for r in summary["runs"]} == {"resident", "stream"}
    assert all(r["status"] == "ok" and r["psnr_db"] > 30 for r in summary["runs"])
    assert all(r["unet_step_ms"] > 0 and r["decoder_ms"] > 0 for r in summary["runs"])
    assert len((tmp_path / "out.records.jsonl").read_text().splitlines()) == 2
    assert "<svg" in (tmp_path / "out.html").read_text()
