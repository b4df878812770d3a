"""What ``handheld verify`` found, as lines of a table and as a page of HTML."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from handheld.numerics_gates import Gate
from handheld.report.page import document, figure, png, table
from handheld_export.verify import Report

COLUMNS = ("", "checkpoint", "student", "worst", "max error", "text", "PSNR", "")
"""Titles of what :func:`lines` yields, and of whether it passes."""
LEGEND = (
    "SNR in dB (its gate) against checkpoint and student, end to end the mean over noises and the "
    "worst; text: 1 is as strong as in torch"
)


def lines(report: Report, *, artifacts: bool) -> Iterator[tuple[tuple[str, ...], bool]]:
    """Yield the cells of a report's lines, and whether each passes.

    Parameters
    ----------
    report : Report
    artifacts : bool
        One line for each artifact before that of the whole; otherwise the whole's is named by the
        bundle.
    """
    for row in report.rows if artifacts else ():
        yield (
            (
                row.artifact,
                *_gated(row.snr_db, row.student_snr_db, row.gate, row.gate.artifact_db),
                "",
                _small(row.max_abs_error),
                _share(row.text),
                "",
            ),
            row.passed,
        )
    whole = report.end_to_end
    name = "end to end" if artifacts else _name(report)
    passed = report.whole_passed if artifacts else report.passed
    yield (
        (
            name,
            *_gated(whole.snr_db, whole.student_snr_db, report.gate, report.gate.end_to_end_db),
            _db(report.worst_db),
            _small(whole.max_abs_error),
            _share(report.text),
            _db(whole.psnr_db),
        ),
        passed,
    )


def render(reports: Sequence[Report]) -> str:
    """Return a page of HTML that loads nothing.

    Parameters
    ----------
    reports : sequence of Report
    """
    bad = sum(not r.passed for r in reports)
    head = [
        "<h1>Numerics</h1>",
        f"<p>{len(reports)} bundles and sizes, {len(reports) - bad} pass every gate.</p>",
        f'<p class="note">{LEGEND}. The checkpoint runs in torch and fp32, the student is torch '
        "with the artifact's codes.</p>",
    ]
    head += [
        f'<p class="note">{escape(n)}</p>'
        for n in dict.fromkeys(n for r in reports for n in r.notes)
    ]
    rows = [line for r in reports for line in _rows(r, artifacts=False)]
    sections = [*head, table("End to end", "", COLUMNS, rows)]
    for report in reports:
        name = _name(report)
        problems = "".join(f'<p class="bad">{escape(p)}</p>' for p in report.problems)
        figures = "".join(
            figure(png(picture), escape(caption), f"{caption}, {name}")
            for caption, picture in report.pictures.items()
        )
        sections += [
            table(name, f"{report.bundle}", COLUMNS, list(_rows(report, artifacts=True))),
            problems,
            f'<div class="pictures">{figures}</div>',
        ]
    return document("Numerics", sections)


def _name(report: Report) -> str:
    return f"{report.model} {report.target} {report.precision} {report.size}"


def _rows(report: Report, *, artifacts: bool) -> Iterator[str]:
    for cells, passed in lines(report, artifacts=artifacts):
        mark = "ok" if passed else '<span class="bad">failed</span>'
        yield "".join(f"<td>{escape(c)}</td>" for c in cells) + f"<td>{mark}</td>"


def _gated(
    checkpoint: float | None, student: float | None, gate: Gate, least: float
) -> tuple[str, str]:
    """Return two figures with the gate beside the one that it is for."""
    cells = [_db(checkpoint), _db(student)]
    cells[gate.against == "student" and student is not None] += f" ({least:.0f})"
    return cells[0], cells[1]


def _db(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _small(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
