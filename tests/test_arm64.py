"""The arm64 harness under QEMU gives what that of this machine gives."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.system,
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("executorch") is None, reason="executorch is not installed"
    ),
    pytest.mark.skipif(
        shutil.which("qemu-aarch64-static") is None, reason="apt install qemu-user-static"
    ),
    pytest.mark.skipif(
        shutil.which("aarch64-linux-gnu-g++") is None, reason="apt install g++-aarch64-linux-gnu"
    ),
]


@pytest.fixture(scope="module")
def arm64():
    folder = str(Path(__file__).parents[1] / "benchmarks")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        import arm64

        yield arm64
    sys.modules.pop("arm64", None)


@pytest.mark.parametrize(
    ("target", "precision", "kinds"),
    [
        ("executorch-xnnpack", "fp32", ["linear", "conv", "block"]),
        ("executorch-xnnpack", "int8", ["linear", "conv", "fixed"]),
        ("onnx", "int8", ["linear", "conv"]),
    ],
)
def test_layers_agree_with_x86(arm64, tmp_path, target, precision, kinds):
    if target == "onnx":
        pytest.importorskip("onnxscript")
    bundle = arm64.layers(target, precision, tmp_path / "bundle")
    made = arm64.kit()
    for cpu in arm64.CPUS:
        for residency in ("resident", "stream"):
            rows = list(arm64.compare(bundle, made, cpu, residency, tmp_path / "work"))
            assert [r.what for r in rows] == kinds
            for row in rows:
                assert row.relative_error <= arm64.LIMITS[precision], row
                assert row.equal or (row.what != "fixed" and target != "onnx"), row
