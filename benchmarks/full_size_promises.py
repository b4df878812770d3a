"""What is promised of SDXL at full size, held against what ``full_size.py`` saw.

Times, peaks and plans are promised of the stacks for ``litert-cpu``. That a budget is kept, that
many pictures in a row leave memory as it was, and that no file is left behind, is promised of every
bundle. Other figures are shown with no promise beside them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Final

from promises import Line, at_least, at_most

TARGET: Final = "litert-cpu"
SIZE: Final = "512x512"
EXPORT_S, EXPORT_MB, CACHED_S = 600.0, 4000.0, 20.0
PICTURE_MS: Final = {"stack1": 2000.0}
RESIDENT_MB: Final = {"stack2": 1000.0, "stack3": 1000.0}
BUDGET_MB: Final = {"stack1": 1500}
BUDGET_TIMES = 1.1
STREAM_MB, STREAM_TIMES = 250.0, 1.6
FIRST_MS = 1000.0
MACS_OFF, FILES_OFF, PEAK_OFF = 0.2, 0.02, 0.1
PICTURES, DRIFT_MB = 100, 5.0
PEER_TIMES = 15.0


def stack(model: str) -> str | None:
    """Return the stack that a checkpoint of ``make_sdxl.py`` is of."""
    found = re.fullmatch(r"sdxl-(stack\d)-random", model)
    return found[1] if found else None


def lines(summary: dict[str, Any]) -> list[Line]:
    """Return every figure that something is promised of, or that goes with one."""
    return [
        *(x for made in summary["exports"] for x in _export(made)),
        *(x for seen in summary["runs"] for x in _run(seen, summary["runs"])),
        *_left(summary),
    ]


def _export(made: dict[str, Any]) -> Iterator[Line]:
    where = f"{made['checkpoint']} {made['target']} {' '.join(made['sizes'])}"
    asked = (stack(made["model"]), made["target"], made["sizes"]) == ("stack1", TARGET, [SIZE])
    first, peak = made["first_s"], made["first_peak_once_mb"]
    yield at_most("export", where, first, EXPORT_S if asked else None, " s")
    yield at_most("its peak, all processes", where, peak, EXPORT_MB if asked else None, " MB")
    yield at_most("again", where, made["cached_s"], CACHED_S if asked else None, " s")


def _run(seen: dict[str, Any], runs: list[dict[str, Any]]) -> Iterator[Line]:
    where = f"{seen['bundle']} {seen['size']} {seen['way']}"
    asked = stack(seen["model"]) if seen["target"] == TARGET else None
    here = asked if (seen["size"], seen["decoder"]) == (SIZE, "tiny") else None
    resident = _of(runs, seen, way="resident", size=seen["size"])
    yield from _peak(seen, here, where)
    yield from _time(seen, here, where, resident)
    if seen["first_segment_ms"] is not None:
        most = FIRST_MS if asked else None
        yield at_most("first segment runs after", where, seen["first_segment_ms"], most, " ms")
    first = _of(runs, seen, way="resident", size=seen["default_size"])
    if seen["way"] == "resident" and first not in (None, seen):
        yield from _macs(seen, first, asked, where)
    yield from _plan(seen, asked, where)
    if seen["drift_mb"] is not None:
        enough = seen["pictures"] >= PICTURES
        what = f"growth over {seen['pictures']} pictures"
        yield at_most(what, where, seen["drift_mb"], DRIFT_MB if enough else None, " MB")


def _peak(seen: dict[str, Any], here: str | None, where: str) -> Iterator[Line]:
    peak, budget = seen["peak_rss_mb"], seen["memory_budget_mb"]
    if budget is not None:
        if seen["highest_mb"] is not None:
            yield at_most("highest of all processes", where, seen["highest_mb"], budget, " MB")
    elif peak is not None:
        most = None if here is None else STREAM_MB
        if seen["way"] == "resident":
            most = RESIDENT_MB.get(here or "")
        yield at_most("peak", where, peak, most, " MB")


def _time(
    seen: dict[str, Any], here: str | None, where: str, resident: dict[str, Any] | None
) -> Iterator[Line]:
    if seen["median_ms"] is None:
        return
    if seen["way"] == "resident":
        yield at_most("picture", where, seen["median_ms"], PICTURE_MS.get(here or ""), " ms")
    elif resident is not None and resident["median_ms"]:
        most = STREAM_TIMES if here is not None and seen["way"] == "stream" else None
        budget = seen["memory_budget_mb"]
        if budget is not None and budget == BUDGET_MB.get(here or ""):
            most = BUDGET_TIMES
        times = seen["median_ms"] / resident["median_ms"]
        yield _ratio("time over resident", where, times, most)
    if seen["cold_ms"] is not None:
        yield at_most("picture, cold page cache", where, seen["cold_ms"], None, " ms")


def _macs(
    seen: dict[str, Any], first: dict[str, Any] | None, asked: str | None, where: str
) -> Iterator[Line]:
    if first is None or not (first["macs"] and first["median_ms"] and seen["median_ms"]):
        return
    grown = seen["median_ms"] / first["median_ms"] / (seen["macs"] / first["macs"])
    kept = None if asked is None else abs(grown - 1) <= MACS_OFF
    wanted = "" if asked is None else f"{1 - MACS_OFF:g} to {1 + MACS_OFF:g}"
    what = f"time over that of {first['size']}, by MACs"
    yield Line(what, where, f"{grown:.2f}", wanted, kept)


def _plan(seen: dict[str, Any], asked: str | None, where: str) -> Iterator[Line]:
    for what, planned, found, most in (
        ("planned files", seen["planned_files_mb"], seen["artifact_mb"], FILES_OFF),
        ("planned peak", seen["planned_mb"], seen["peak_rss_mb"], PEAK_OFF),
    ):
        if planned is None or not found:
            continue
        off = planned / found - 1
        # Within a budget the plan is a bound, and the budget is what is promised.
        held = asked is not None and seen["memory_budget_mb"] is None
        kept = abs(off) <= most if held else None
        wanted = f"within {most:.0%}" if held else ""
        yield Line(what, where, f"{planned:.1f} MB, {off:+.1%}", wanted, kept)


def _left(summary: dict[str, Any]) -> Iterator[Line]:
    left = summary["left"]
    if left is not None:
        yield Line("files left behind", "all runs", str(len(left)), "0", not left)


def _of(runs: list[dict[str, Any]], seen: dict[str, Any], **wanted: Any) -> dict[str, Any] | None:
    """Return another run of a bundle."""
    same = (r for r in runs if r["bundle"] == seen["bundle"])
    return next((r for r in same if all(r[k] == v for k, v in wanted.items())), None)


def _ratio(what: str, where: str, times: float, most: float | None) -> Line:
    line = at_most(what, where, times, most, "x")
    return line._replace(value=f"{times:.2f}x")


def against(summary: dict[str, Any]) -> list[Line]:
    """Return by how much our bundles must be faster than the peer, and are."""
    found = []
    for ratio in summary["ratios"]:
        stack1 = stack(ratio["model"]) == "stack1" and ratio["size"] == SIZE
        asked = stack1 and ratio["target"] == TARGET and ratio["theirs"].endswith(" q4_0")
        where = f"{ratio['ours']}, {ratio['theirs']}"
        full = asked and ratio["decoder"] == "full"
        for what, key, promised in (
            ("U-Net step", "unet_step_ms", asked),
            ("picture", "picture_ms", full),
        ):
            if ratio[key] is not None:
                least = PEER_TIMES if promised else None
                found.append(at_least(f"{what} faster", where, ratio[key], least, "x"))
    return found
