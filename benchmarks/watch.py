"""Running a program and watching the memory of it and all its children."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

INTERVAL_S = 0.05


@dataclass
class Watched:
    """What was seen of a program.

    Parameters
    ----------
    code : int
        Exit code.
    seconds : float
    peak : int
        Largest sum of resident memory over its processes, in bytes, looked at every 50 ms; pages
        that processes share count in each.
    peak_once : int
        The same with pages that processes share counted once, looked at less often.
    marks : dict of int to int
        High-water mark of every process, in bytes, as far as it was seen.
    output, errors : str
        What it printed.
    """

    code: int = 0
    seconds: float = 0.0
    peak: int = 0
    peak_once: int = 0
    marks: dict[int, int] = field(default_factory=dict)
    output: str = ""
    errors: str = ""


def run(words: Sequence[str], env: Mapping[str, str] | None = None) -> Watched:
    """Run a program to its end."""
    seen = Watched()
    began = time.monotonic()
    process = subprocess.Popen(
        list(words),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **(env or {})},
    )
    over = threading.Event()
    watcher = threading.Thread(target=_watch, args=(process.pid, seen, over), daemon=True)
    watcher.start()
    try:
        seen.output, seen.errors = process.communicate()
    except BaseException:
        process.terminate()
        process.wait()
        raise
    finally:
        over.set()
        watcher.join()
    seen.seconds = time.monotonic() - began
    seen.code = process.returncode
    return seen


def _watch(pid: int, seen: Watched, over: threading.Event) -> None:
    rounds = 0
    while not over.wait(INTERVAL_S):
        total = 0
        processes = tree(pid)
        rounds += 1
        if rounds % 5 == 0:  # the kernel walks all pages for it
            seen.peak_once = max(seen.peak_once, sum(map(_proportional, processes)))
        for one in processes:
            resident, mark = _memory(one)
            total += resident
            if mark:
                seen.marks[one] = max(mark, seen.marks.get(one, 0))
        seen.peak = max(seen.peak, total)


def tree(pid: int) -> list[int]:
    """Return a process and all below it."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, IndexError):
                continue
            children.setdefault(parent, []).append(int(path.name))
    found = [pid]
    for one in found:
        found += children.get(one, [])
    return found


def _memory(pid: int) -> tuple[int, int]:
    resident = mark = 0
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                resident = int(line.split()[1]) * 1024
            elif line.startswith("VmHWM:"):
                mark = int(line.split()[1]) * 1024
    except OSError:
        pass
    return resident, mark


def _proportional(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    return sum(int(x.split()[1]) * 1024 for x in text.splitlines() if x.startswith("Pss:"))
