"""Plots as inline SVG. Colours are CSS variables of the page, so they follow light and dark."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

WIDTH = 600
MOST_DOTS = 300
"""More values than this are drawn evenly sampled; the numbers beside a plot use all."""


def strip(values: Sequence[float], p5: float, median: float, p95: float, largest: float) -> str:
    """Draw every value as a dot, p5 to p95 as a band and the median as a line.

    Parameters
    ----------
    values : sequence of float
    largest : float
        Right end of the scale, which starts at 0.
    """
    height = 28

    def x(value: float) -> float:
        return 4 + (WIDTH - 8) * value / (largest or 1)

    step = max(1, len(values) // MOST_DOTS)
    dots = "".join(
        f'<circle cx="{x(v):.1f}" cy="{6 + (i * 7) % 17}" r="2.2"/>'
        for i, v in enumerate(values[::step])
    )
    band = f'<rect class="band" x="{x(p5):.1f}" y="2" width="{x(p95) - x(p5):.1f}" height="24"/>'
    line = f'<line class="mark" x1="{x(median):.1f}" x2="{x(median):.1f}" y1="1" y2="27"/>'
    label = f"{len(values)} times, median {median:.1f} ms, p5 {p5:.1f} ms, p95 {p95:.1f} ms"
    return _svg(height, label, f'{band}<g class="dots">{dots}</g>{line}')


def bars(parts: Sequence[tuple[str, float, str]], largest: float, unit: str) -> str:
    """Draw one bar of parts that add up.

    Parameters
    ----------
    parts : sequence of (name, value, css class)
    largest : float
        Right end of the scale.
    """
    drawn, x = [], 0.0
    for name, value, css in parts:
        width = WIDTH * value / (largest or 1)
        title = f"<title>{escape(name)}: {value:.1f} {unit}</title>"
        rect = f'<rect class="{css}" x="{x:.1f}" y="4" width="{width:.1f}" height="18">'
        drawn.append(f"{rect}{title}</rect>")
        x += width
    label = ", ".join(f"{name} {value:.1f} {unit}" for name, value, _ in parts)
    return _svg(26, label, "".join(drawn))


def line(
    points: Sequence[tuple[float, float]], largest: float, label: str, *, steps: bool = False
) -> str:
    """Draw values over time, from 0 to ``largest``; with ``steps`` a value holds until the next."""
    height = 120
    first, last = points[0][0], points[-1][0]
    span = (last - first) or 1

    def at(point: tuple[float, float]) -> tuple[float, float]:
        t, value = point
        return 6 + (WIDTH - 12) * (t - first) / span, height - 8 - (height - 20) * value / (
            largest or 1
        )

    path: list[str] = []
    for i, point in enumerate(points):
        x, y = at(point)
        if i and steps:
            path.append(f"H{x:.1f}")
        path.append(f"{'L' if i else 'M'}{x:.1f} {y:.1f}")
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in map(at, points))
    grid = f'<line class="grid" x1="0" x2="{WIDTH}" y1="{height - 8}" y2="{height - 8}"/>'
    inside = f'{grid}<path class="line" d="{"".join(path)}"/><g class="dots">{dots}</g>'
    return _svg(height, label, inside)


def _svg(height: int, label: str, inside: str) -> str:
    return (
        f'<svg class="plot" role="img" aria-label="{escape(label)}" viewBox="0 0 {WIDTH} {height}" '
        f'preserveAspectRatio="none" height="{height}">{inside}</svg>'
    )
