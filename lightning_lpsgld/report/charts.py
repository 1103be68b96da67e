"""Figures as inline SVG: they need no script and no network, and take the colours of the page.

A mark shows its value when it is pointed at, tapped or reached by the keyboard, and a name in the legend hides its
series: both by the page's style alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["Curve", "bars", "lines"]

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 520, 260, 64, 34, 12
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Curve:
    """Lines to be drawn, or points.

    Attributes:
        name: Title.
        series: Points by name; points that are not finite are left out.
        x_name: Under the axis.
        y_name: At its top.
        diagonal: Ends of a line y = x, as where a promise is kept.
        joined: Join the points of a series.
        marked: Mark every point of these series (all: ``None``); a mark's value shows when it is pointed at or tapped.
    """

    name: str
    series: Mapping[str, Points]
    x_name: str
    y_name: str = ""
    diagonal: tuple[float, float] | None = None
    joined: bool = True
    marked: Sequence[str] | None = None


def _ticks(low: float, high: float) -> list[float]:
    step = 10.0 ** math.floor(math.log10((high - low) / 4))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (m * step) <= 6)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _range(values: list[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    pad = 0.06 * (high - low) or 0.5 * abs(high) or 0.5
    return low - pad, high + pad


class _Frame:
    """Axes and the way from data to pixels."""

    def __init__(self, xs: list[float], ys: list[float]) -> None:
        self.x, self.y = _range(xs), _range(ys)

    def at(self, x: float, y: float) -> tuple[float, float]:
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (y - self.y[0]) / (self.y[1] - self.y[0])
        return _LEFT + across * (_WIDTH - _LEFT - 12), _HEIGHT - _BOTTOM - up * (_HEIGHT - _BOTTOM - _TOP)

    def axes(self, x_name: str, y_name: str) -> list[str]:
        parts = []
        for value in _ticks(*self.x):
            px, _ = self.at(value, self.y[0])
            parts.append(f'<text x="{px:.1f}" y="{_HEIGHT - 18}" text-anchor="middle">{value:.4g}</text>')
        for value in _ticks(*self.y):
            _, py = self.at(self.x[0], value)
            parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - 12}" y1="{py:.1f}" y2="{py:.1f}"/>')
            parts.append(f'<text x="{_LEFT - 6}" y="{py + 4:.1f}" text-anchor="end">{value:.4g}</text>')
        middle = (_LEFT + _WIDTH) / 2
        parts.append(f'<text x="{middle}" y="{_HEIGHT - 3}" text-anchor="middle">{escape(x_name)}</text>')
        parts.append(f'<text x="4" y="{_TOP}" class="name">{escape(y_name)}</text>')
        return parts


def _figure(name: str, body: list[str], legend: Sequence[str] = ()) -> str:
    keys = "".join(
        f'<label class="key k{i % 6}"><input type="checkbox" checked>{escape(text)}</label>'
        for i, text in enumerate(legend)
    )
    svg = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(name)}">{"".join(body)}</svg>'
    return f"<figure><figcaption>{escape(name)} {keys}</figcaption>{svg}</figure>"


def _series(frame: _Frame, number: int, label: str, points: Points, joined: bool, marked: bool) -> list[str]:
    places = [frame.at(*point) for point in points]
    body = []
    if joined:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        body.append(f'<polyline class="line k{number % 6}" points="{path}"/>')
    for (x, y), (px, py) in zip(points, places if marked else ()):
        side, shift = ("end", -8) if px > _WIDTH / 2 else ("start", 8)
        tip = f'<text class="tip" x="{px + shift:.1f}" y="{py + 4:.1f}" text-anchor="{side}">{x:.5g}, {y:.5g}</text>'
        dot = f'<circle class="dot k{number % 6}" cx="{px:.1f}" cy="{py:.1f}" r="3"/>'
        said = f'role="img" aria-label="{escape(label)}: {x:.5g}, {y:.5g}"'
        body.append(f'<g class="mark" tabindex="0" {said}>{dot}{tip}</g>')
    return [f'<g class="series s{number % 6}">{"".join(body)}</g>']


def lines(curve: Curve) -> str:
    """Lines with marks.

    Args:
        curve: What is drawn.
    """
    kept = {n: [p for p in points if all(map(math.isfinite, p))] for n, points in curve.series.items()}
    every = [point for points in kept.values() for point in points]
    if not every:
        return _figure(curve.name, [f'<text x="{_LEFT}" y="{_HEIGHT / 2}">nothing to show</text>'])
    ends = () if curve.diagonal is None else curve.diagonal
    frame = _Frame([*(x for x, _ in every), *ends], [*(y for _, y in every), *ends])
    body = frame.axes(curve.x_name, curve.y_name)
    if ends:
        (x1, y1), (x2, y2) = (frame.at(end, end) for end in ends)
        body.append(f'<line class="diagonal" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>')
    for number, (label, points) in enumerate(kept.items()):
        marked = curve.marked is None or label in curve.marked
        body += _series(frame, number, label, points, curve.joined, marked)
    return _figure(curve.name, body, list(kept) if len(kept) > 1 else ())


def bars(name: str, values: Mapping[str, float], y_name: str = "") -> str:
    """One bar a value.

    Args:
        name: Title.
        values: Height by label.
        y_name: At the top of the axis.
    """
    finite = {label: value for label, value in values.items() if math.isfinite(value)}
    if not finite:
        return _figure(name, [f'<text x="{_LEFT}" y="{_HEIGHT / 2}">nothing to show</text>'])
    frame = _Frame([-0.5, len(finite) - 0.5], [0.0, *finite.values()])
    body = [part for part in frame.axes("", y_name) if f'y="{_HEIGHT - 18}"' not in part]
    width = 0.7 * (_WIDTH - _LEFT) / len(finite)
    for number, (label, value) in enumerate(finite.items()):
        (x, top), (_, ground) = frame.at(number, max(value, 0)), frame.at(number, min(value, 0))
        title = f"<title>{escape(label)}: {value:.5g}</title>"
        body.append(
            f'<rect class="bar" x="{x - width / 2:.1f}" y="{top:.1f}" width="{width:.1f}" '
            f'height="{max(ground - top, 0.5):.1f}">{title}</rect>'
        )
        if len(finite) <= 12:
            body.append(f'<text x="{x:.1f}" y="{_HEIGHT - 18}" text-anchor="middle">{escape(label)}</text>')
    return _figure(name, body)
