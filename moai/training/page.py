"""training.html: a run on one self-contained page, made from history.jsonl and settings.json beside it, whenever and by
whoever. Its curves are inline SVG in colours of the style, so that they follow light and dark.

python -m moai training outputs/demo
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from moai.core.errors import ConfigError
from moai.core.files import write_atomic
from moai.core.fsops import read_regular
from moai.core.pages import bars, page
from moai.training.history import NAME, Entry, read
from moai.training.record import MOST_BYTES
from moai.training.report import run_of, title_of

PAGE = "training.html"
_STYLE = """
:root { --c0: #3566a8; --c1: #c4622d; --c2: #3d8a55; --c3: #8d5aa5;
  --c4: #a8882b; --c5: #3d8f96; --c6: #b04a6b; --c7: #7a8089; }
@media (prefers-color-scheme: dark) { :root { --c0: #7aa9e6; --c1: #e8935f; --c2: #74c18c; --c3: #c095d6;
  --c4: #d8bb62; --c5: #73c3ca; --c6: #e2839f; --c7: #a3a9b3; } }
figure { margin: 1.2rem 0 0; min-width: 0; } figcaption { display: flex; flex-wrap: wrap; gap: 0 .9rem; }
figcaption b { font-weight: 600; } figcaption span { color: var(--soft); }
figcaption i { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .3em; }
svg { width: 100%; height: auto; display: block; }
svg text { font: 11px system-ui, sans-serif; fill: var(--soft); } svg .grid { stroke: var(--line); stroke-width: 1; }
svg .mark { stroke: var(--soft); stroke-dasharray: 2 3; }
details { margin: .6rem 0; } td { vertical-align: top; overflow-wrap: anywhere; }
"""
_COLOURS = 8
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 560, 210, 50, 10, 8, 20
_PARTS = 280
"""Of a longer curve, the lowest and the highest point in so many parts are drawn: no spike is lost."""
_FEW = 40
"""Points up to this many are marked one by one."""
_SOURCES = 7
"""Drawn by name; the others are one more."""

Point = tuple[float, float]
Sources = Mapping[str, Mapping[str, int]]


def write_page(output_dir: Path) -> Path:
    """Raises OSError where the run has no history, or nothing can be written."""
    target, entries = output_dir / PAGE, read(output_dir / NAME)
    write_atomic(target, render(title_of(output_dir), entries, _settings(output_dir)).encode(), durable=False)
    return target


def show(output_dir: Path) -> Iterator[str]:
    """Write the page of any run and say in lines what is on it. Raises ConfigError where there is no run."""
    try:
        entries, target = read(output_dir / NAME), write_page(output_dir)
    except OSError as error:
        stages = ", ".join(sorted(str(path.parent) for path in output_dir.glob(f"stage_*/{NAME}")))
        advice = f"every stage has a page of its own: name one of {stages}" if stages else ""
        raise ConfigError(
            f"{output_dir}: {error.strerror} ({NAME} or {PAGE}); {advice or 'name the --output_dir of a training run'}"
        ) from error
    yield from (f"{name:<10} {text}" for name, text in _facts(entries))
    for entry in [entry for entry in entries if entry["kind"] == "train"][-10:]:
        figures = f"loss {_number(entry, 'loss')}  lr {_number(entry, 'learning_rate')}  wait {_wait(entry):.1%}"
        yield f"  step {entry['step']:>7,}  {figures}"
    yield str(target)


def render(name: str, entries: Sequence[Entry], settings: Mapping[str, Mapping[str, Any]]) -> str:
    """The page of a run called `name`."""
    starts, training, held_out = ([e for e in entries if e["kind"] == kind] for kind in ("start", "train", "eval"))
    sources: Sources = next((start["sources"] for start in reversed(starts) if "sources" in start), {})
    marks = [start["step"] for start in starts[1:]]
    bits = dict.fromkeys(key for entry in held_out for key in entry if key.endswith("_bits_per_byte"))
    losses = [_curve("training", training, "loss"), _curve("held out", held_out, "eval_loss")]
    figures = [
        lines("loss", losses, marks=marks),
        lines("bits per byte, held out", [_curve(_source_of(key), held_out, key) for key in bits], marks=marks),
        *(
            lines(title, [_curve("", training, key)], marks=marks, least=0, write=write)
            for title, key, write in (
                ("learning rate", "learning_rate", short),
                ("gradient norm", "grad_norm", short),
                ("tokens per second", "tokens_per_second", short),
                ("share of time waiting for data", "data_wait", lambda value: f"{100 * value:.3g}%"),
                ("memory, GB", "memory_gb", short),
            )
        ),
        _mix(training, sources, marks),
    ]
    parts = [
        f"<h1>{escape(name)}</h1>{_table(_facts(entries))}<h2>Course</h2><div class=columns>{''.join(figures)}</div>",
        *_consumed(training, sources),
    ]
    if held_out:
        last = held_out[-1]
        scores = [
            (
                _source_of(key),
                *(_number(last, key.replace("loss", of)) for of in ("loss", "perplexity", "bits_per_byte")),
            )
            for key in last
            if key.startswith("eval") and key.endswith("_loss")
        ]
        heads = ("source", "loss", "perplexity", "bits/byte")
        parts += [f"<h2>Held out, at step {last['step']:,}</h2>", _table(scores, heads)]
    if starts:
        words = ("began", "after step", "last step", "ranks", "rows a step", "lasted")
        parts += ["<h2>Sessions</h2>", _table(_sessions(entries), words)]
    if settings:
        made, default = (
            _table(
                (name, _words(entry.get("value")), entry.get("origin"))
                for name, entry in settings.items()
                if (entry.get("origin") == "default") == untouched
            )
            for untouched in (False, True)
        )
        parts.append(f"<h2>Settings</h2>{made}<details><summary>defaults</summary>{default}</details>")
    return page(f"{name}: training", parts, style=_STYLE)


def _facts(entries: Sequence[Entry]) -> list[tuple[str, str]]:
    starts, training = ([entry for entry in entries if entry["kind"] == kind] for kind in ("start", "train"))
    if not training:
        return [("run", "no step is logged yet")]
    first, last = training[0], training[-1]
    steps = starts[-1].get("steps") if starts else None
    return [
        ("step", f"{last['step']:,}" + (f" of {steps:,}" if steps else "")),
        ("loss", f"{_number(first, 'loss')} at step {first['step']:,}, {_number(last, 'loss')} now"),
        ("tokens", f"{last.get('tokens') or 0:,} trained, {float(last.get('tokens_per_second') or 0):,.0f} a second"),
        ("waiting", f"{_wait(last):.2%} of the time for data, {max(map(_wait, training)):.2%} at most"),
        ("sessions", f"{len(starts)}, the last logged {last.get('time', 'at an unknown time')}"),
    ]


def _sessions(entries: Sequence[Entry]) -> list[list[Any]]:
    rows: list[list[Any]] = []
    for entry in entries:
        step, time = entry["step"], entry.get("time", "")
        if entry["kind"] == "start":
            rows.append([time, step, step, entry.get("world_size", ""), entry.get("rows_per_step", ""), ""])
        elif rows:
            rows[-1][2], rows[-1][5] = step, _span(rows[-1][0], time)
    return rows


def _mix(training: Sequence[Entry], sources: Sources, marks: Sequence[int]) -> str:
    """What each source gave between two log lines."""
    counts = [(entry["step"], _tokens(entry["consumed"], sources)) for entry in training if "consumed" in entry]
    if len(sources) < 2 or not counts:
        return ""
    largest = sorted(sources, key=lambda name: -counts[-1][1][name])[:_SOURCES]
    # In the order of the other plots, so that a source has one colour.
    groups = {name: [name] for name in sources if name in largest}
    if others := [name for name in sources if name not in largest]:
        groups["others"] = others
    before, rows = dict.fromkeys(sources, 0.0), []
    for step, tokens in counts:
        gained = {name: max(0.0, tokens[name] - before[name]) for name in sources}
        rows.append((step, [sum(gained[name] for name in names) for names in groups.values()]))
        before = tokens
    return stacked("tokens by source, since the line before", list(groups), rows, marks=marks)


def _consumed(training: Sequence[Entry], sources: Sources) -> list[str]:
    rows = next((entry["consumed"] for entry in reversed(training) if "consumed" in entry), None)
    if rows is None or not sources:
        return []
    tokens = _tokens(rows, sources)
    whole = sum(tokens.values()) or 1.0
    table = (
        (f"{name}, {rows.get(name, 0) / max(1, of['rows']):.2f} epochs", rows.get(name, 0), tokens[name] / whole, "")
        for name, of in sources.items()
    )
    soft = "<p class=soft>The bar is the source's share of all tokens so far.</p>"
    return [f"<h2>Rows taken from each source</h2>{soft}", bars(table)]


def _tokens(consumed: Mapping[str, int], sources: Sources) -> dict[str, float]:
    """Of each source, from its rows and what a row of it holds in the mean."""
    return {name: consumed.get(name, 0) * source["tokens"] / max(1, source["rows"]) for name, source in sources.items()}


def _settings(output_dir: Path) -> dict[str, dict[str, Any]]:
    """What train.py left, of the last session; nothing where it did not run. A stage has those of the run around it."""
    try:
        found = json.loads(read_regular(run_of(output_dir) / "settings.json", MOST_BYTES))
        return {name: entry for name, entry in found.items() if isinstance(entry, dict)}
    except (OSError, ValueError, AttributeError):
        return {}


def _table(rows: Iterable[Sequence[Any]], head: Sequence[str] = ()) -> str:
    def cell(value: Any) -> str:
        return escape(f"{value:,}" if isinstance(value, int) else str(value))

    lines = [
        f"<tr><td class=name>{cell(first)}</td>{''.join(f'<td>{cell(value)}</td>' for value in others)}</tr>"
        for first, *others in rows
    ]
    first = f"<tr>{''.join(f'<th>{word}</th>' for word in head)}</tr>" if head else ""
    return f"<table>{first}{''.join(lines)}</table>"


def _words(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _source_of(key: str) -> str:
    """`eval_web_loss` -> `web`; of all sources together `all`."""
    return key.removeprefix("eval").removesuffix("_loss").removesuffix("_bits_per_byte").lstrip("_") or "all"


def _number(entry: Entry, key: str) -> str:
    value = entry.get(key)
    return short(float(value)) if isinstance(value, int | float) else "–"


def _wait(entry: Entry) -> float:
    return float(entry.get("data_wait") or 0)


def _span(start: str, end: str) -> str:
    try:
        return str(datetime.fromisoformat(end) - datetime.fromisoformat(start))
    except ValueError:
        return ""


# -- curves


class Curve(NamedTuple):
    """Points by x."""

    name: str
    points: Sequence[Point]


def lines(
    title: str,
    curves: Iterable[Curve],
    *,
    marks: Sequence[float] = (),
    write: Callable[[float], str] | None = None,
    least: float | None = None,
) -> str:
    """A figure of curves over one x axis, or nothing without a point. `marks` are upright dashed lines; `least` belongs
    to the y axis in any case.
    """
    write = write or short
    drawn = [(name, [(x, y) for x, y in points if math.isfinite(y)]) for name, points in curves]
    every = [point for _, points in drawn for point in points]
    if not every:
        return ""
    frame = _Frame.around(every, [] if least is None else [least])
    shapes, legend = [frame.axes(write), frame.upright(marks)], []
    for number, (name, points) in enumerate(drawn):
        if points:
            colour = f"var(--c{number % _COLOURS})"
            style = f"fill:none;stroke:{colour};stroke-width:1.5;stroke-linejoin:round"
            shapes.append(f"<polyline points='{frame.path(_spikes(points))}' style='{style}'/>")
            if len(points) <= _FEW:
                centres = (f"cx='{frame.x(x):.1f}' cy='{frame.y(y):.1f}'" for x, y in points)
                shapes += (f"<circle {centre} r='2' style='fill:{colour}'/>" for centre in centres)
            legend.append((name, number, write(points[-1][1])))
    return _figure(title, legend, "".join(shapes))


def stacked(
    title: str, names: Sequence[str], rows: Sequence[tuple[float, Sequence[float]]], *, marks: Sequence[float] = ()
) -> str:
    """A figure of shares that sum to one at every x, the first name lowest; `rows` are (x, an amount of each name)."""
    shares = [(x, [value / sum(values) for value in values]) for x, values in rows if sum(values) > 0]
    if not shares:
        return ""
    shares = [*shares[: -1 : max(1, len(shares) // (2 * _PARTS))], shares[-1]]
    frame = _Frame.around([(x, 0.0) for x, _ in shares], [1.0])
    edges = [[(x, sum(of[:number])) for x, of in shares] for number in range(len(names) + 1)]
    areas = [frame.path([*floor, *reversed(top)]) for floor, top in pairwise(edges)]
    shapes = [
        f"<polygon points='{area}' style='fill:var(--c{number % _COLOURS});opacity:.8'/>"
        for number, area in enumerate(areas)
    ]
    legend = [(name, number, f"{shares[-1][1][number]:.0%}") for number, name in enumerate(names)]
    return _figure(title, legend, "".join(shapes) + frame.axes(lambda value: f"{value:.0%}") + frame.upright(marks))


def short(value: float) -> str:
    """`1234567` -> `1.23M`, `0.0003` -> `3e-4`."""
    if 0 < abs(value) < 1e-3:
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

    right: float
    low: float
    high: float

    @classmethod
    def around(cls, points: Sequence[Point], ys: Sequence[float]) -> _Frame:
        heights = [*(y for _, y in points), *ys]
        low, high = min(heights), max(heights)
        if low == high:
            low, high = low - (abs(low) or 1) * 0.1, high + (abs(high) or 1) * 0.1
        return cls(max(x for x, _ in points) or 1.0, low, high)

    def x(self, value: float) -> float:
        return _LEFT + value / self.right * (_WIDTH - _LEFT - _RIGHT)

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
            for value in ticks(0, self.right, 6)
            if value == round(value)
        )
        return "".join([*across, *below])

    def upright(self, marks: Sequence[float]) -> str:
        return "".join(
            f"<line class=mark x1='{self.x(mark):.1f}' x2='{self.x(mark):.1f}' y1='{_TOP}' "
            f"y2='{_HEIGHT - _BOTTOM}'><title>resumed after step {short(mark)}</title></line>"
            for mark in marks
            if mark <= self.right
        )


def _figure(title: str, legend: Sequence[tuple[str, int, str]], shapes: str) -> str:
    spot = "<i style='background:var(--c{})'></i>" if len(legend) > 1 else ""
    names = "".join(
        f"<span>{spot.format(number % _COLOURS)}{escape(name)} {value}</span>" for name, number, value in legend
    )
    return (
        f"<figure><figcaption><b>{escape(title)}</b>{names}</figcaption>"
        f"<svg viewBox='0 0 {_WIDTH} {_HEIGHT}' role=img aria-label='{escape(title)}'>{shapes}</svg></figure>"
    )


def _curve(name: str, entries: Sequence[Entry], key: str) -> Curve:
    return Curve(
        name, [(entry["step"], float(entry[key])) for entry in entries if isinstance(entry.get(key), int | float)]
    )


def _spikes(points: Sequence[Point]) -> Sequence[Point]:
    if len(points) <= 2 * _PARTS:
        return points
    size = -(-len(points) // _PARTS)
    parts = [points[at : at + size] for at in range(0, len(points), size)]
    extremes = ({min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])} for part in parts)
    return [point for part in extremes for point in sorted(part)]
