"""The benchmark that profiles operators: what it counts, and what it times."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("torch")

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def ops(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import profile_ops

    return profile_ops


@pytest.mark.parametrize(
    ("tag", "kind"),
    [
        ("Convolution (NHWC, QDU8, F32, QC8W) IGEMM", "Convolution, 8-bit weights"),
        ("Convolution (NHWC, F32) IGEMM", "Convolution, float"),
        ("Fully Connected (NC, QDU8, F32, QC4W) GEMM", "Fully Connected, 4-bit weights"),
        ("Fully Connected (NC, QD8, F32, QB4W) GEMM", "Fully Connected, 4-bit weights"),
        ("Batch Matrix Multiply (NC, F32) GEMM", "Batch Matrix Multiply, float"),
        ("Softmax (NC, F32)", "Softmax"),
        ("TanH", "TanH"),
    ],
)
def test_kinds_of_operators(ops, tag, kind):
    assert ops.kind_of(tag) == kind


def test_xnnpack_is_told_what_the_harness_tells_it(ops):
    source = BENCHMARKS.parent / "android_harness" / "src" / "engine_litert.cpp"
    (flags,) = re.findall(r"kXnnpackFlags = ([^;]+);", source.read_text())
    assert sum(int(flag, 16) for flag in flags.split("|")) == ops.XNNPACK_FLAGS


def test_every_multiplication_of_a_bundle_is_timed(ops, smallest, tmp_path, monkeypatch, capsys):
    from handheld.bundle import Bundle
    from handheld_export.checkpoint import Checkpoint
    from handheld_export.export import Options, export

    path = tmp_path / "bundle"
    export(Checkpoint(smallest), Options(target="litert-cpu", precision="int8"), path)
    output = tmp_path / "profile.json"
    words = ["profile_ops.py", str(path), "--threads", "1", "--runs", "2", "--json", str(output)]
    monkeypatch.setattr("sys.argv", words)
    assert ops.main() == 0
    assert "operators of one picture" in capsys.readouterr().out
    found = json.loads(output.read_text())
    bundle = Bundle.open(path)
    assert found["bundle"] == bundle.sha256
    wanted = ops.calls(bundle)
    assert {r["artifact"]: r["calls"] for r in found["artifacts"]} == dict(wanted)
    for row in found["artifacts"]:
        assert row["ms"] == pytest.approx(sum(row["operators_ms"].values()), abs=0.01)
        # XNNPACK makes linear layers of some multiplications of two tensors.
        assert {k for k, macs in row["macs"].items() if macs} <= set(row["kinds_ms"])
    for known in bundle.manifest.artifacts:
        counted = next(r for r in found["artifacts"] if r["artifact"] == known.id)["macs"]
        assert sum(counted.values()) == pytest.approx(known.macs, rel=0.01)


def test_bundles_for_other_engines_are_refused(ops, smallest, tmp_path, monkeypatch):
    from handheld.errors import UsageError
    from handheld_export.checkpoint import Checkpoint
    from handheld_export.export import Options, export

    path = tmp_path / "bundle"
    export(Checkpoint(smallest), Options(target="onnx", precision="fp32"), path)
    monkeypatch.setattr("sys.argv", ["profile_ops.py", str(path)])
    with pytest.raises(UsageError, match="has no profiler here"):
        ops.main()
