"""Charts as SVG that follows the page's colours, without a script."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

_WIDTH, _HEIGHT = 720, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 12, 34
_TICKS = 5
# Of the page's colours; more series begin again.
_COLORS = 5
# What is beyond is no number of a training.
_ABSURD = 1e100
# Of a heatmap: cells side by side at most, and the share over the mean that is darkest.
_COLUMNS, _DARKEST = 128, 4.0
_LABELS, _ROW = 34, 10

Points = Sequence[tuple[float, float]]


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers from low to high."""
    if high <= low:
        return [low]
    rough = (high - low) / _TICKS
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough)
    first = math.ceil(low / step) * step
    return [first + i * step for i in range(int((high - first) / step + 1e-9) + 1)]


def _number(value: float) -> str:
    if value and (abs(value) >= 1e5 or abs(value) < 1e-3):
        return f"{value:.1e}"
    return f"{value:,.4g}"


def smooth(points: Points, part: float = 0.1) -> list[tuple[float, float]]:
    """An exponential mean over about so much of the points."""
    weight = 1 / max(1.0, part * len(points))
    found: list[tuple[float, float]] = []
    for x, y in points:
        last = found[-1][1] if found else y
        found.append((x, last + weight * (y - last)))
    return found


def lines(title: str, series: Mapping[str, Points], unit: str = "step") -> str:
    """A chart of curves; the names are its legend, and a class of each is `series-N`."""
    drawn = {
        name: [(x, y) for x, y in points if abs(y) < _ABSURD] for name, points in series.items()
    }
    drawn = {name: points for name, points in drawn.items() if points}
    if not drawn:
        return ""
    xs = [x for points in drawn.values() for x, _ in points]
    ys = [y for points in drawn.values() for _, y in points]
    low, high = min(ys), max(ys)
    margin = 0.05 * (high - low) or abs(high) * 0.05 or 1.0
    low, high = low - margin, high + margin
    left, right = min(xs), max(max(xs), min(xs) + 1)

    def place(x: float, y: float) -> tuple[float, float]:
        across = _LEFT + (x - left) / (right - left) * (_WIDTH - _LEFT - _RIGHT)
        down = _TOP + (high - y) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)
        return across, down

    parts = [_open(_WIDTH, _HEIGHT, title)]
    for y in _ticks(low, high):
        _, down = place(left, y)
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{down:.1f}" '
            f'y2="{down:.1f}"/><text x="{_LEFT - 6}" y="{down + 4:.1f}" text-anchor="end">'
            f"{_number(y)}</text>"
        )
    for x in _ticks(left, right):
        across, _ = place(x, low)
        parts.append(
            f'<text x="{across:.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">'
            f"{_number(x)}</text>"
        )
    parts.append(f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 4}" text-anchor="end">{unit}</text>')
    for number, (name, points) in enumerate(drawn.items()):
        spots, color = [place(x, y) for x, y in points], f"series-{number % _COLORS}"
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
        parts.append(f'<polyline class="line {color}" points="{path}"/>')
        if len(points) <= 40:
            parts += [
                f'<circle class="dot {color}" cx="{x:.1f}" cy="{y:.1f}" r="3"><title>'
                f"{escape(name)}, {unit} {_number(px)}: {_number(py)}</title></circle>"
                for (x, y), (px, py) in zip(spots, points, strict=True)
            ]
    parts.append("</svg>")
    return "".join(parts) + _legend(list(drawn))


def _open(width: float, height: float, title: str) -> str:
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>"
    )


def _legend(names: Sequence[str]) -> str:
    marks = "".join(
        f'<span><i class="mark series-{i % _COLORS}"></i>{escape(name)}</span>'
        for i, name in enumerate(names)
    )
    return f'<p class="legend">{marks}</p>'


def bar(title: str, parts: Mapping[str, float], unit: str) -> str:
    """One bar of parts that make a whole, and their numbers."""
    total = sum(parts.values())
    if total <= 0:
        return ""
    pieces, at = [_open(_WIDTH, 34, title)], 0.0
    for number, (name, value) in enumerate(parts.items()):
        width = value / total * _WIDTH
        pieces.append(
            f'<rect class="fill series-{number % _COLORS}" x="{at:.1f}" y="4" width="{width:.1f}" '
            f'height="26"><title>{escape(name)}: {_number(value)} {unit}</title></rect>'
        )
        at += width
    names = [f"{n}: {_number(v)} {unit} ({v / total:.0%})" for n, v in parts.items()]
    return "".join(pieces) + "</svg>" + _legend(names)


def heatmap(title: str, rows: Mapping[str, Sequence[float]]) -> str:
    """Shares of each row's experts over their mean; many experts are drawn some to a cell."""
    rows = {name: row for name, row in rows.items() if row}
    if not rows:
        return ""
    most = max(len(row) for row in rows.values())
    at_once = -(-most // _COLUMNS)
    cells = -(-most // at_once)
    wide = (_WIDTH - _LABELS) / cells
    parts = [_open(_WIDTH, len(rows) * _ROW, title)]
    for number, (name, row) in enumerate(rows.items()):
        top = number * _ROW
        parts.append(
            f'<text class="small" x="{_LABELS - 6}" y="{top + _ROW - 2}" text-anchor="end">'
            f"{escape(name)}</text>"
        )
        for cell in range(0, len(row), at_once):
            group = row[cell : cell + at_once]
            over = max(group) * len(row)
            experts = f"expert {cell}" + (f" to {cell + len(group) - 1}" if len(group) > 1 else "")
            parts.append(
                f'<rect class="heat" x="{_LABELS + cell // at_once * wide:.2f}" y="{top}" '
                f'width="{wide - 0.5:.2f}" height="{_ROW - 0.5}" '
                f'fill-opacity="{min(1.0, over / _DARKEST):.3f}"><title>layer {escape(name)}, '
                f"{experts}: {over:.2f} times the mean</title></rect>"
            )
    return "".join(parts) + "</svg>"
