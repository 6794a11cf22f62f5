"""Curves as inline SVG, for a page that loads nothing. Colours are variables of `STYLE`, so that a curve follows light
and dark.

lines("loss", [Curve("training", [(1, 8.1), (10, 7.2)]), Curve("held out", [(10, 7.4)], dots=True)], marks=[5])
stacked("share of tokens", ["web", "wiki"], [(10, [6.0, 4.0]), (20, [5.0, 5.0])])
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

STYLE = """
:root { --c0: #3566a8; --c1: #c4622d; --c2: #3d8a55; --c3: #8d5aa5;
  --c4: #a8882b; --c5: #3d8f96; --c6: #b04a6b; --c7: #7a8089; }
@media (prefers-color-scheme: dark) { :root { --c0: #7aa9e6; --c1: #e8935f; --c2: #74c18c; --c3: #c095d6;
  --c4: #d8bb62; --c5: #73c3ca; --c6: #e2839f; --c7: #a3a9b3; } }
figure { margin: 1.2rem 0 0; } figcaption { display: flex; flex-wrap: wrap; gap: 0 .9rem; }
figcaption b { font-weight: 600; } figcaption span { color: var(--soft); }
figcaption i { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .3em; }
svg { width: 100%; height: auto; display: block; }
svg text { font: 11px system-ui, sans-serif; fill: var(--soft); } svg .grid { stroke: var(--line); stroke-width: 1; }
svg .mark { stroke: var(--soft); stroke-dasharray: 2 3; }
"""
COLOURS = 8
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 560, 210, 50, 10, 8, 20
_BINS = 280
"""Of a longer curve, the lowest and the highest point in so many parts are drawn: no spike is lost."""

Point = tuple[float, float]
Row = tuple[float, list[float]]


@dataclass(frozen=True)
class Curve:
    """Points by x. `dots` marks each of them, where they are few."""

    name: str
    points: Sequence[Point]
    dots: bool = False


def lines(
    title: str,
    curves: Sequence[Curve],
    *,
    marks: Sequence[float] = (),
    write: Callable[[float], str] | None = None,
    least: float | None = None,
) -> str:
    """A figure of curves over one x axis, or nothing without a point. `marks` are upright dashed lines; `least` belongs
    to the y axis in any case.
    """
    write = write or short
    drawn = [Curve(curve.name, _finite(curve.points), curve.dots) for curve in curves]
    points = [point for curve in drawn for point in curve.points]
    if not points:
        return ""
    lowest = [] if least is None else [least]
    frame = _Frame.around([x for x, _ in points], [y for _, y in points] + lowest)
    shapes = [_curve(curve, number, frame) for number, curve in enumerate(drawn) if curve.points]
    legend = [(curve.name, number, write(curve.points[-1][1])) for number, curve in enumerate(drawn) if curve.points]
    return _figure(title, legend, frame.axes(write) + frame.upright(marks) + "".join(shapes))


def stacked(
    title: str, names: Sequence[str], rows: Sequence[tuple[float, Sequence[float]]], *, marks: Sequence[float] = ()
) -> str:
    """A figure of shares that sum to one at every x, the first name lowest; `rows` are (x, an amount of each name)."""
    kept = _thinned([(x, [value / sum(values) for value in values]) for x, values in rows if sum(values) > 0])
    if not kept:
        return ""
    frame = _Frame.around([x for x, _ in kept], [0.0, 1.0])
    tops = [[(x, sum(shares[: number + 1])) for x, shares in kept] for number in range(len(names))]
    floors = [[(x, 0.0) for x, _ in kept], *tops]
    shapes = [
        f"<polygon points='{frame.path([*floor, *reversed(top)])}' style='fill:var(--c{number % COLOURS});opacity:.8'/>"
        for number, (floor, top) in enumerate(zip(floors, tops))
    ]
    legend = [(name, number, f"{kept[-1][1][number]:.0%}") for number, name in enumerate(names)]
    return _figure(title, legend, "".join(shapes) + frame.axes(lambda value: f"{value:.0%}") + frame.upright(marks))


def short(value: float) -> str:
    """`1234567` -> `1.23M`, `0.0003` -> `3e-4`."""
    if value == 0:
        return "0"
    if abs(value) < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    for unit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:.3g}{letter}"
    return f"{value:.4g}"


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers from `low` to `high`, at most `most` and one more: steps of 1, 2 or 5 and a power of ten."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


@dataclass(frozen=True)
class _Frame:
    """From values to places in the picture. The x axis begins at 0, as steps do, so that figures above one another
    compare.
    """

    left: float
    right: float
    low: float
    high: float

    @classmethod
    def around(cls, xs: Sequence[float], ys: Sequence[float]) -> _Frame:
        low, high = min(ys), max(ys)
        if low == high:
            low, high = low - (abs(low) or 1) * 0.1, high + (abs(high) or 1) * 0.1
        return cls(0.0, max(xs) or 1.0, low, high)

    def x(self, value: float) -> float:
        return _LEFT + (value - self.left) / (self.right - self.left) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        return _HEIGHT - _BOTTOM - (value - self.low) / (self.high - self.low) * (_HEIGHT - _TOP - _BOTTOM)

    def path(self, points: Iterable[Point]) -> str:
        return " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points)

    def axes(self, write: Callable[[float], str]) -> str:
        across = (
            f"<line class=grid x1='{_LEFT}' x2='{_WIDTH - _RIGHT}' y1='{self.y(value):.1f}' y2='{self.y(value):.1f}'/>"
            f"<text x='{_LEFT - 5}' y='{self.y(value) + 4:.1f}' text-anchor='end'>{write(value)}</text>"
            for value in ticks(self.low, self.high, 5)
        )
        below = (
            f"<text x='{self.x(value):.1f}' y='{_HEIGHT - 4}' text-anchor='middle'>{short(value)}</text>"
            for value in ticks(self.left, self.right, 6)
            if value == round(value)
        )
        return "".join([*across, *below])

    def upright(self, marks: Sequence[float]) -> str:
        return "".join(
            f"<line class=mark x1='{self.x(mark):.1f}' x2='{self.x(mark):.1f}' y1='{_TOP}' "
            f"y2='{_HEIGHT - _BOTTOM}'><title>resumed after step {short(mark)}</title></line>"
            for mark in marks
            if self.left <= mark <= self.right
        )


def _curve(curve: Curve, number: int, frame: _Frame) -> str:
    colour = f"var(--c{number % COLOURS})"
    line = (
        f"<polyline points='{frame.path(_spikes(curve.points))}' "
        f"style='fill:none;stroke:{colour};stroke-width:1.5;stroke-linejoin:round'/>"
    )
    single = len(curve.points) == 1  # a line of one point is none
    dots = (
        f"<circle cx='{frame.x(x):.1f}' cy='{frame.y(y):.1f}' r='2.5' style='fill:{colour}'/>"
        for x, y in curve.points
        if single or curve.dots
    )
    return line + "".join(dots)


def _figure(title: str, legend: Sequence[tuple[str, int, str]], shapes: str) -> str:
    spot = "<i style='background:var(--c{})'></i>" if len(legend) > 1 else ""
    names = "".join(
        f"<span>{spot.format(number % COLOURS)}{escape(name)} {value}</span>" for name, number, value in legend
    )
    return (
        f"<figure><figcaption><b>{escape(title)}</b>{names}</figcaption>"
        f"<svg viewBox='0 0 {_WIDTH} {_HEIGHT}' role=img aria-label='{escape(title)}'>{shapes}</svg></figure>"
    )


def _finite(points: Sequence[Point]) -> list[Point]:
    return [(x, y) for x, y in points if math.isfinite(y)]


def _thinned(points: Sequence[Row]) -> list[Row]:
    """Of many, every n-th and the last."""
    every = max(1, len(points) // (2 * _BINS))
    return [*points[:-1:every], points[-1]] if points else []


def _spikes(points: Sequence[Point]) -> list[Point]:
    if len(points) <= 2 * _BINS:
        return list(points)
    size = -(-len(points) // _BINS)
    parts = [points[at : at + size] for at in range(0, len(points), size)]
    extremes = ({min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])} for part in parts)
    return [point for part in extremes for point in sorted(part)]
