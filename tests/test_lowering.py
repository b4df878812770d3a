"""Workers that lower segments."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = """
import multiprocessing, os, sys, time
from concurrent.futures import ProcessPoolExecutor
from handheld_export import lowering

if __name__ == "__main__":
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["handheld_export.lowering"])
    pool = ProcessPoolExecutor(
        1, mp_context=context, initializer=lowering.start_worker, initargs=(1,)
    )
    print(pool.submit(os.getpid).result(), flush=True)
    pool.submit(time.sleep, 600)
    time.sleep(600)
"""


BESIDE = {"archive", "bundle", "errors", "files", "models", "numerics_gates", "report", "text"}
"""Modules that exports use and that decide nothing of what an artifact holds."""


def test_the_cache_knows_every_module_that_artifacts_depend_on() -> None:
    lowering = pytest.importorskip("handheld_export.lowering")
    here = Path(lowering.__file__).parent
    used: set[str] = set()
    for file in here.rglob("*.py"):
        folder = file.relative_to(here).parts[0]
        if folder in ("compress", "critter", "serve") or file.name == "cli.py":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "handheld":
                used |= {name.name for name in node.names}
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("handheld."):
                used.add(str(node.module).split(".")[1])
    assert used - BESIDE == set(lowering._RUNTIME)
    assert used >= BESIDE


def test_a_change_of_any_of_them_is_another_source(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lowering = pytest.importorskip("handheld_export.lowering")
    copies = {name: tmp_path / f"{name}.py" for name in lowering._RUNTIME}
    for name, copy in copies.items():
        copy.write_bytes(Path(lowering.handheld.__file__).with_name(f"{name}.py").read_bytes())
    monkeypatch.setattr(lowering.handheld, "__file__", str(tmp_path / "__init__.py"))
    fresh = lowering.source_sha256.__wrapped__
    assert fresh() == lowering.source_sha256()
    for copy in copies.values():
        before = fresh()
        copy.write_text(copy.read_text() + "# changed")
        assert fresh() != before


@pytest.mark.slow
def test_a_busy_worker_ends_with_the_export_that_asked_for_it(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    worker = int(process.stdout.readline())
    process.kill()
    process.wait()
    end = time.monotonic() + 60
    while _runs(worker):
        assert time.monotonic() < end, "the worker goes on"
        time.sleep(0.1)


def _runs(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"
