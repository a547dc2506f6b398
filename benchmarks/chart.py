"""One line chart as SVG, written by hand: nothing has to be installed for it, and it is legible on white and on dark pages."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from itertools import pairwise

WIDTH, HEIGHT = 760, 440
LEFT, RIGHT, TOP, BOTTOM = 84, 72, 84, 62
FONT = "-apple-system, 'Segoe UI', Helvetica, Arial, 'DejaVu Sans', sans-serif"
INK, SOFT, GRID, PAPER, FRAME = "#1f2328", "#57606a", "#e4e7eb", "#ffffff", "#d0d7de"


@dataclass(frozen=True)
class Line:
    """One series: points ``(x, y)`` in order, and what it is called.

    Attributes:
        marker: ``circle``, ``square`` or ``diamond``, so that lines are told apart without colour.
    """

    name: str
    points: list[tuple[float, float]]
    colour: str
    marker: str = "circle"


def line_chart(title: str, subtitle: str, x_label: str, y_label: str, lines: list[Line]) -> str:
    """The chart; both axes begin at zero, each line is named at its end and in the legend."""
    xs = sorted({x for line in lines for x, _ in line.points})
    x_top, y_step = xs[-1], _step(max(y for line in lines for _, y in line.points))
    y_ticks = [y_step * number for number in range(int(max(y for line in lines for _, y in line.points) / y_step) + 2)]

    def at(x: float, y: float) -> tuple[float, float]:
        across, down = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
        return LEFT + across * x / x_top, TOP + down * (1 - y / y_ticks[-1])

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img" '
        f'font-family="{FONT}" aria-label="{escape(title, quote=True)}">',
        f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="8" fill="{PAPER}" stroke="{FRAME}"/>',
        _text(24, 34, title, size=17, weight=600),
        _text(24, 56, subtitle, size=12, colour=SOFT),
    ]
    for y in y_ticks:
        (left, place), (right, _) = at(0, y), at(x_top, y)
        colour = SOFT if y == 0 else GRID
        parts.append(f'<line x1="{left:.1f}" y1="{place:.1f}" x2="{right:.1f}" y2="{place:.1f}" stroke="{colour}"/>')
        parts.append(_text(left - 10, place + 4, f"{y:,.0f}", size=12, colour=SOFT, anchor="end"))
    for x in xs:
        place, bottom = at(x, 0)
        parts.append(
            f'<line x1="{place:.1f}" y1="{bottom:.1f}" x2="{place:.1f}" y2="{bottom + 5:.1f}" stroke="{SOFT}"/>'
        )
        parts.append(_text(place, bottom + 21, f"{x:g}", size=12, colour=SOFT, anchor="middle"))
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(_text(middle, HEIGHT - 16, x_label, size=13, anchor="middle"))
    half = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(
        f'<g transform="translate(22 {half:.1f}) rotate(-90)">{_text(0, 0, y_label, size=13, anchor="middle")}</g>'
    )
    for line, height in zip(lines, _apart([at(*line.points[-1])[1] for line in lines]), strict=True):
        places = [at(*point) for point in line.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{line.colour}" stroke-width="2.5" stroke-linejoin="round"/>'
        )
        parts += [_marker(line, *place) for place in places]
        parts.append(
            _text(places[-1][0] + 14, height + 4, f"{line.points[-1][1]:,.0f}", size=12, colour=line.colour, weight=600)
        )
    for number, line in enumerate(lines):
        y = TOP + 14 + 20 * number
        parts.append(
            f'<line x1="{LEFT + 18}" y1="{y}" x2="{LEFT + 44}" y2="{y}" stroke="{line.colour}" stroke-width="2.5"/>'
        )
        parts += [_marker(line, LEFT + 31, y), _text(LEFT + 54, y + 4, line.name, size=12)]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _step(top: float) -> float:
    """A round distance between ticks, so that there are four to eight."""
    step = 1.0
    while top / step > 8:
        step *= 2 if str(step)[0] == "1" else 2.5 if str(step)[0] == "2" else 2
    return step


def _apart(heights: list[float], least: float = 16) -> list[float]:
    """The heights of labels, neighbours pushed apart until none stands on another."""
    order = sorted(range(len(heights)), key=lambda place: heights[place])
    placed = list(heights)
    for _ in range(100):
        for above, below in pairwise(order):
            missing = max(0.0, least - placed[below] + placed[above])
            placed[above] -= missing / 2
            placed[below] += missing / 2
    return placed


def _marker(line: Line, x: float, y: float) -> str:
    style = f'fill="{line.colour}" stroke="{PAPER}" stroke-width="1.5"'
    if line.marker == "square":
        return f'<rect x="{x - 4.5:.1f}" y="{y - 4.5:.1f}" width="9" height="9" {style}/>'
    if line.marker == "diamond":
        return f'<path d="M{x:.1f} {y - 6:.1f}l6 6l-6 6l-6 -6z" {style}/>'
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" {style}/>'


def _text(
    x: float, y: float, words: str, size: int, colour: str = INK, anchor: str = "start", weight: int = 400
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{colour}" text-anchor="{anchor}" font-weight="{weight}">'
        f"{escape(words)}</text>"
    )
