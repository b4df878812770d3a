"""Watching programs: exit code, output and the memory of a whole tree of processes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
CHILD = "import time; x = bytearray(80_000_000); time.sleep(1)"
PARENT = f"""
import subprocess, sys
children = [subprocess.Popen([sys.executable, "-c", {CHILD!r}]) for _ in range(2)]
print("here", [c.wait() for c in children])
sys.exit(3)
"""


@pytest.fixture
def watch(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import watch

    return watch


def test_children_count(watch):
    seen = watch.run([sys.executable, "-c", PARENT])
    assert (seen.code, seen.output, seen.errors) == (3, "here [0, 0]\n", "")
    assert 160e6 < seen.peak < 400e6
    assert 160e6 < seen.peak_once < seen.peak
    assert sorted(seen.marks.values())[-2] > 80e6
    assert seen.seconds >= 1
