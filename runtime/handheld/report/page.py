"""The page: every section from the same records, every number linked to its own."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from handheld import __version__
from handheld.bundle import Bundle
from handheld.estimates import peak_bytes
from handheld.records import RunRecord, statistics, sustained_curve
from handheld.report import plots

MB = 1e6


def render(
    records: Sequence[RunRecord],
    bundles: Sequence[Bundle] = (),
    pictures: Mapping[str, bytes] | None = None,
    title: str = "Run records",
) -> str:
    """Return a page of HTML that loads nothing.

    Parameters
    ----------
    records : sequence of RunRecord
    bundles : sequence of Bundle
        Those that were run: their reference pictures and estimates are shown.
    pictures : mapping of record id to PNG, optional
        What the runs drew.
    title : str
    """
    ordered = sorted(records, key=lambda r: (r.device.id, _name(r), r.started))
    by_hash = {b.sha256: b for b in bundles}
    sections = [
        _head(ordered, title),
        _latency(ordered),
        _residency(ordered),
        _memory(ordered),
        _over_time(ordered),
        _heat(ordered),
        _placement(ordered),
        _pictures(ordered, by_hash, pictures or {}),
        _estimates(ordered, by_hash),
        _records(ordered),
    ]
    return document(title, sections)


def document(title: str, sections: Sequence[str]) -> str:
    """Return a whole page of HTML that loads nothing; empty sections are left out."""
    css = (files("handheld.report") / "page.css").read_text(encoding="utf-8")
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n"
        # An icon of no bytes, so that browsers do not ask for one.
        f'<link rel="icon" href="data:,">\n<style>\n{css}</style>\n</head>\n<body>\n<main>\n'
        + "\n".join(s for s in sections if s)
        + "\n</main>\n</body>\n</html>\n"
    )


def _name(r: RunRecord) -> str:
    return f"{r.bundle.model} {r.bundle.target} {r.bundle.precision} {r.settings.mode}"


def _link(r: RunRecord, text: str) -> str:
    return f'<a href="#r-{escape(r.id)}">{escape(text)}</a>'


def _head(records: Sequence[RunRecord], title: str) -> str:
    kinds = {r.device.kind for r in records}
    bad = [r for r in records if r.status != "ok"]
    noisy = sum(bool(r.noisy) for r in records)
    devices = sorted({f"{r.device.id} ({_device(r)})" for r in records})
    lines = [f"<h1>{escape(title)}</h1>"]
    if kinds <= {"host"}:
        lines.append('<p class="bad">Not run on a phone: every record here is from a computer.</p>')
    lines.append(
        f"<p>{len(records)} records of {len({r.bundle.sha256 for r in records})} bundles on "
        f"{escape('; '.join(devices))}. {noisy} are marked noisy.</p>"
    )
    for r in bad:
        text = f"{r.status}: {r.error or 'no reason given'}"
        lines.append(f'<p class="bad">{_link(r, _name(r))}: {escape(text)}</p>')
    lines.append(
        f'<p class="note">Made by handheld {escape(__version__)}. Figures link to the '
        "record that they are from, and those beside a link are from it too. MB is "
        "10<sup>6</sup> bytes.</p>"
    )
    return "\n".join(lines)


def _device(r: RunRecord) -> str:
    d = r.device
    return ", ".join(x for x in (d.model, d.soc or d.cpu, d.os) if x) or d.kind


def _latency(records: Sequence[RunRecord]) -> str:
    timed = [
        (r, values, stats)
        for r in records
        if (latency := r.latency())
        and (values := latency.milliseconds("timed"))
        and (stats := statistics(values))
    ]
    if not timed:
        return ""
    largest = max(max(values) for _, values, _ in timed)
    out = [
        "<h2>Time per picture</h2>",
        f'<p class="note">Dots are iterations, the band spans p5 to p95, the line is the median. '
        f"The scale runs from 0 to {largest:.1f} ms.</p>",
    ]
    for r, values, s in timed:
        figures = r.summary()
        extra = "".join(
            f", {label} {figures[key]:.1f} ms"
            for key, label in (
                ("first_ms", "first"),
                ("cold_start_ms", "cold start"),
                ("first_ever_ms", "first ever"),
                ("load_ms", "loading"),
            )
            if isinstance(figures[key], float)
        )
        marks = [*r.noisy, *(["throttled"] if r.throttled else [])]
        out.append(
            f'<div class="entry"><h3>{escape(_name(r))}, {escape(r.bundle.size)}, '
            f"{escape(r.device.id)}</h3>"
            f"{plots.strip(values, s.p5, s.median, s.p95, largest)}"
            f'<p class="small">{_link(r, f"median {s.median:.1f} ms")}, p5 {s.p5:.1f}, '
            f"p95 {s.p95:.1f}, spread {s.spread:.0%}, {len(values)} iterations{extra}"
            + "".join(f'<br><span class="bad">{escape(m)}</span>' for m in marks)
            + "</p></div>"
        )
    return "\n".join(out)


def _residency(records: Sequence[RunRecord]) -> str:
    latest: dict[tuple[str, ...], dict[str, RunRecord]] = {}
    for r in records:
        key = (r.device.id, r.bundle.sha256, r.bundle.size, str(r.settings.threads))
        if r.status == "ok" and r.memory and r.memory.peak_rss:
            latest.setdefault(key, {})[r.settings.mode] = r
    pairs = [p for p in latest.values() if {"resident", "stream"} <= set(p)]
    if not pairs:
        return ""
    rows = []
    for pair in pairs:
        one, two = pair["resident"], pair["stream"]
        a, b = one.summary(), two.summary()
        cells = [f"{escape(one.bundle.model)} {escape(one.bundle.target)}, {escape(one.device.id)}"]
        for r, s in ((one, a), (two, b)):
            cells.append(_link(r, _ms(s["median_ms"])))
            cells.append(_link(r, _mb(s["peak_rss"])))
        cells.append(_times(b["median_ms"], a["median_ms"]))
        cells.append(_times(b["peak_rss"], a["peak_rss"]))
        rows.append("".join(f"<td>{c}</td>" for c in cells))
    names = ("", "resident ms", "MB", "streamed ms", "MB", "time", "memory")
    return table(
        "Streaming against resident",
        "The newest good record of each. Streaming holds one artifact after the other.",
        names,
        rows,
    )


def _memory(records: Sequence[RunRecord]) -> str:
    known = [(r, r.memory, peak) for r in records if r.memory and (peak := r.memory.peak_rss)]
    if not known:
        return ""
    largest = max(peak for _, _, peak in known) / MB
    out = [
        "<h2>Peak memory</h2>",
        '<p class="key small"><span class="one"></span>anonymous<span class="two"></span>clean '
        'file pages<span class="three"></span>other</p>',
        f'<p class="note">High-water mark of resident memory. The scale runs from 0 to '
        f"{largest:.1f} MB.</p>",
    ]
    for r, memory, peak in known:
        anon = min(memory.anon or 0, peak)
        file = min(memory.file or 0, peak - anon)
        parts = (
            ("anonymous", anon / MB, "one"),
            ("file", file / MB, "two"),
            ("other", (peak - anon - file) / MB, "three"),
        )
        left_out = "; not counted: " + ", ".join(memory.not_counted) if memory.not_counted else ""
        out.append(
            f'<div class="entry"><h3>{escape(_name(r))}, {escape(r.device.id)}</h3>'
            f"{plots.bars(parts, largest, 'MB')}"
            f'<p class="small">{_link(r, f"peak {peak / MB:.1f} MB")}, anonymous '
            f"{anon / MB:.1f} MB{escape(left_out)}</p></div>"
        )
    return "\n".join(out)


def _over_time(records: Sequence[RunRecord]) -> str:
    out = []
    for r in records:
        chosen = [p for p in r.passes if p.purpose == "memory"] or list(r.passes[:1])
        points = [(m.t_ms, m.rss / MB) for p in chosen for m in p.memory if m.rss is not None]
        if len(points) < 2:
            continue
        points.sort()
        phases = ", ".join(
            f"{m.phase} {m.rss / MB:.1f} MB" for p in chosen for m in p.memory if m.rss is not None
        )
        label = f"resident memory of {_name(r)}: {phases}"
        plot = plots.line(points, max(v for _, v in points), label)
        out.append(
            f'<div class="entry"><h3>{escape(_name(r))}, {escape(r.device.id)}</h3>{plot}'
            f'<p class="small">{_link(r, phases)}, over {points[-1][0] - points[0][0]:.0f} ms'
            "</p></div>"
        )
    if not out:
        return ""
    note = '<p class="note">Resident memory at the phases that the harness reports.</p>'
    return "\n".join(["<h2>Memory over time</h2>", note, *out])


def _heat(records: Sequence[RunRecord]) -> str:
    out, silent = ["<h2>Heat</h2>"], []
    for r in records:
        points: list[tuple[float, float]] = []
        warmth: list[tuple[float, float]] = []
        slowing: list[tuple[float, float]] = []
        for p in r.passes:
            offset = (p.started - r.started).total_seconds() * 1000
            points += [(offset + t.t_ms, t.status) for t in p.thermal if t.status is not None]
            looks = [(offset + h.t_s * 1000, h.heat) for h in p.heat]
            points += [(t, heat.status) for t, heat in looks if heat.status is not None]
            warmth += [(t, heat.celsius) for t, heat in looks if heat.celsius is not None]
            if p.purpose == "sustained":
                slowing += sustained_curve(p)
        sensors = [
            f"{when} {heat.celsius:.0f} °C"
            for when, heat in (("start", r.heat_start), ("end", r.heat_end))
            if heat and heat.celsius is not None
        ]
        if max(len(points), len(warmth), len(slowing)) < 2 and not sensors:
            silent.append(r)
            continue
        plot = ""
        if len(points) > 1:
            label = f"thermal status of {_name(r)} over time, 0 none to 6 shutdown"
            plot = plots.line(sorted(points), 6, label, steps=True)
        told = list(sensors)
        if points and not sensors:
            told.append(f"status {max(s for _, s in points):.0f} at most")
        for values, what, unit in (
            (warmth, "hottest sensor", "°C"),
            (slowing, "median of every half minute", "ms"),
        ):
            if len(values) > 1:
                highest = max(v for _, v in values)
                plot += plots.line(sorted(values), highest, f"{what} of {_name(r)} over time")
                told.append(f"{what} {values[0][1]:.1f} to {highest:.1f} {unit} at most")
        text = ", ".join(told)
        out.append(
            f'<div class="entry"><h3>{escape(_name(r))}, {escape(r.device.id)}</h3>{plot}'
            f'<p class="small">{_link(r, text)}</p></div>'
        )
    if silent:
        out.append(f'<p class="note">{len(silent)} records come from devices that do not tell.</p>')
    return "\n".join(out)


def _placement(records: Sequence[RunRecord]) -> str:
    known = [(r, r.placement) for r in records if r.placement]
    silent = len(records) - len(known)
    out = ["<h2>Placement</h2>"]
    for r, placement in known:
        units = sorted({u for counts in placement.values() for u in counts})
        rows = [
            f"<td>{escape(artifact)}</td>"
            + "".join(f"<td>{_link(r, str(counts.get(u, 0)))}</td>" for u in units)
            for artifact, counts in placement.items()
        ]
        note = (
            "Operations by compute unit; what a delegate took counts once a call, under its name."
        )
        if r.placement_note:
            note = f"{r.placement_note[0].upper()}{r.placement_note[1:]}."
        out.append(table(_name(r), note, ("", *units), rows, "h3"))
    if silent:
        reasons = sorted(
            {r.placement_note for r in records if not r.placement and r.placement_note}
        )
        why = f": {'; '.join(reasons)}" if reasons else ""
        out.append(
            f'<p class="note">Of {silent} records it is unknown where operations ran'
            f"{escape(why)}.</p>"
        )
    return "\n".join(out)


def _pictures(
    records: Sequence[RunRecord], bundles: Mapping[str, Bundle], drawn: Mapping[str, bytes]
) -> str:
    figures = []
    for sha256, bundle in bundles.items():
        m = bundle.manifest
        for size in m.sizes:
            if m.reference_of(size) is None:
                continue
            of = f" at {size}" if len(m.sizes) > 1 else ""
            name = f"reference of {m.model.id} {m.target}{of}, {sha256[:8]}"
            picture = bundle.reference(size).get("picture")
            if picture is None:
                continue
            figures.append(figure(png(np.asarray(picture)[0]), escape(name), name))
    for r in records:
        check = f", {r.check.psnr_db:.1f} dB" if r.check else ""
        if r.id in drawn:
            figures.append(figure(drawn[r.id], _link(r, _name(r)) + check, _name(r)))
    checks = [
        f"<td>{escape(_name(r))}, {escape(r.device.id)}</td>"
        f"<td>{_link(r, f'{r.check.psnr_db:.1f}')}</td><td>{r.check.max_abs_error}</td>"
        f"<td>{'yes' if r.check.matches else '<span class=bad>no</span>'}</td>"
        for r in records
        if r.check
    ]
    if not figures and not checks:
        return ""
    shown = f'<div class="pictures">{"".join(figures)}</div>' if figures else ""
    judged = ""
    if checks:
        names = ("", "PSNR dB", "largest error of 255", "right")
        judged = table("Against the reference", "", names, checks, "h3")
    return f"<h2>Pictures</h2>\n{shown}\n{judged}"


def png(picture: NDArray[np.uint8]) -> bytes:
    """Return a picture [H, W, 3] as a PNG file."""
    sink = io.BytesIO()
    Image.fromarray(picture).save(sink, "PNG")
    return sink.getvalue()


def figure(image: bytes, caption: str, alt: str) -> str:
    """Return a PNG file as a figure; the caption is HTML, the alternative text is not."""
    data = base64.b64encode(image).decode()
    return (
        f'<figure><img alt="{escape(alt)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _estimates(records: Sequence[RunRecord], bundles: Mapping[str, Bundle]) -> str:
    rows = []
    for r in records:
        bundle = bundles.get(r.bundle.sha256)
        if bundle is None or r.memory is None or not r.memory.peak_rss:
            continue
        if r.settings.memory_budget is not None:
            continue
        estimate = peak_bytes(bundle.manifest, r.settings.residency)
        # What the process takes before any engine is touched belongs to no bundle.
        measured = r.memory.peak_rss - (r.memory.base_rss or 0)
        rows.append(
            f"<td>{escape(_name(r))}, {escape(r.device.id)}</td><td>{_mb(estimate)}</td>"
            f"<td>{_link(r, _mb(measured))}</td><td>{_times(measured, estimate)}</td>"
        )
    if not rows:
        return ""
    return table(
        "Estimate against measurement",
        "Memory: weights held and the program's tensors, against the peak less what the process "
        "had before. The estimate leaves out what engines allocate.",
        ("", "estimate MB", "measured MB", "ratio"),
        rows,
    )


def _records(records: Sequence[RunRecord]) -> str:
    out = ["<h2>Records</h2>"]
    for r in records:
        text = json.dumps(r.to_json(), indent=1, ensure_ascii=False)
        out.append(
            f'<details id="r-{escape(r.id)}"><summary>{escape(r.id)}: {escape(_name(r))}, '
            f"{escape(r.status)}</summary><pre>{escape(text)}</pre></details>"
        )
    return "\n".join(out)


def table(title: str, note: str, names: Sequence[str], rows: Sequence[str], tag: str = "h2") -> str:
    """Return a table under a heading; rows are HTML of cells."""
    head = "".join(f'<th scope="col">{escape(n)}</th>' for n in names)
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    explained = f'<p class="note">{escape(note)}</p>' if note else ""
    return (
        f"<{tag}>{escape(title)}</{tag}>{explained}<div class=scroll><table><thead><tr>{head}"
        f"</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _ms(value: object) -> str:
    return f"{value:.1f}" if isinstance(value, float) else "-"


def _mb(value: object) -> str:
    return f"{value / MB:.1f}" if isinstance(value, int) else "-"


def _times(value: object, base: object) -> str:
    if isinstance(value, int | float) and isinstance(base, int | float) and base:
        return f"{value / base:.2f} times"
    return "-"
