"""training.html: a run on one self-contained page, made from history.jsonl and settings.json beside it, whenever and by
whoever.

python -m moai training outputs/demo
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

from moai.core.errors import ConfigError
from moai.core.files import write_atomic
from moai.core.fsops import read_regular
from moai.core.pages import bars, page
from moai.training import plots
from moai.training.history import NAME, Entry, read
from moai.training.plots import Curve
from moai.training.record import MOST_BYTES
from moai.training.report import run_of, title_of

PAGE = "training.html"
_STYLE = (
    plots.STYLE
    + ".columns figure { min-width: 0; } details { margin: .6rem 0; } td { vertical-align: top; overflow-wrap: "
    "anywhere; }"
)
_SOURCES = 7
"""Drawn by name; the others are one more."""


def write_page(output_dir: Path) -> Path:
    """Raises OSError where the run has no history, or nothing can be written."""
    target = output_dir / PAGE
    write_atomic(
        target, render(title_of(output_dir), read(output_dir / NAME), _settings(output_dir)).encode(), durable=False
    )
    return target


def show(output_dir: Path) -> Iterator[str]:
    """Write the page of any run and say in lines what is on it. Raises ConfigError where there is no run."""
    try:
        entries = read(output_dir / NAME)
        target = write_page(output_dir)
    except OSError as error:
        stages = ", ".join(sorted(str(path.parent) for path in output_dir.glob(f"stage_*/{NAME}")))
        advice = (
            f"every stage has a page of its own: name one of {stages}"
            if stages
            else "name the --output_dir of a training run"
        )
        raise ConfigError(f"{output_dir}: {error.strerror} ({NAME} or {PAGE}); {advice}") from error
    yield from (f"{name:<10} {text}" for name, text in _facts(entries))
    for entry in [entry for entry in entries if entry["kind"] == "train"][-10:]:
        yield (
            f"  step {entry['step']:>7,}  loss {_number(entry, 'loss')}  lr {_number(entry, 'learning_rate')}  wait "
            f"{float(entry.get('data_wait') or 0):.1%}"
        )
    yield str(target)


def render(name: str, entries: Sequence[Entry], settings: Mapping[str, Mapping[str, Any]]) -> str:
    """The page of a run called `name`."""
    training = [entry for entry in entries if entry["kind"] == "train"]
    held_out = [entry for entry in entries if entry["kind"] == "eval"]
    marks = [entry["step"] for entry in entries if entry["kind"] == "start"][1:]
    facts = "".join(
        f"<tr><td class=name>{escape(what)}</td><td>{escape(text)}</td></tr>" for what, text in _facts(entries)
    )
    figures = [
        plots.lines(
            "loss",
            [_curve("training", training, "loss"), _curve("held out", held_out, "eval_loss", dots=True)],
            marks=marks,
        ),
        plots.lines("bits per byte, held out", _by_source(held_out), marks=marks),
        plots.lines("learning rate", [_curve("", training, "learning_rate")], marks=marks, least=0),
        plots.lines("gradient norm", [_curve("", training, "grad_norm")], marks=marks, least=0),
        plots.lines("tokens per second", [_curve("", training, "tokens_per_second")], marks=marks, least=0),
        plots.lines(
            "share of time waiting for data",
            [_curve("", training, "data_wait")],
            marks=marks,
            least=0,
            write=lambda value: f"{100 * value:.3g}%",
        ),
        plots.lines("memory, GB", [_curve("", training, "memory_gb")], marks=marks, least=0),
        _mix(training, _sources(entries), marks),
    ]
    parts = [
        f"<h1>{escape(name)}</h1><table>{facts}</table>",
        "<h2>Course</h2>",
        f"<div class=columns>{''.join(figures)}</div>",
        *_consumed(training, _sources(entries)),
        *_scores(held_out),
        *_sessions(entries),
        *_settings_tables(settings),
    ]
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
        (
            "waiting",
            f"{float(last.get('data_wait') or 0):.2%} of the time for data, "
            f"{max(float(entry.get('data_wait') or 0) for entry in training):.2%} at most",
        ),
        ("sessions", f"{len(starts)}, the last logged {last.get('time', 'at an unknown time')}"),
    ]


def _curve(name: str, entries: Sequence[Entry], key: str, *, dots: bool = False) -> Curve:
    return Curve(
        name, [(entry["step"], float(entry[key])) for entry in entries if isinstance(entry.get(key), int | float)], dots
    )


def _by_source(held_out: Sequence[Entry]) -> list[Curve]:
    suffix = "_bits_per_byte"
    keys = dict.fromkeys(key for entry in held_out for key in entry if key.endswith(suffix))
    return [
        _curve(
            key.removeprefix("eval_").removesuffix(suffix) if key != f"eval{suffix}" else "all",
            held_out,
            key,
            dots=True,
        )
        for key in keys
    ]


def _sources(entries: Sequence[Entry]) -> dict[str, dict[str, int]]:
    """{name: {"rows", "tokens"}} as the last session had them."""
    return next(
        (entry["sources"] for entry in reversed(entries) if entry["kind"] == "start" and "sources" in entry), {}
    )


def _tokens(consumed: Mapping[str, int], sources: Mapping[str, Mapping[str, int]]) -> dict[str, float]:
    """Of each source, from its rows and what a row of it holds in the mean."""
    return {name: consumed.get(name, 0) * source["tokens"] / max(1, source["rows"]) for name, source in sources.items()}


def _mix(training: Sequence[Entry], sources: Mapping[str, Mapping[str, int]], marks: Sequence[int]) -> str:
    """What each source gave between two log lines."""
    counts = [(entry["step"], _tokens(entry["consumed"], sources)) for entry in training if "consumed" in entry]
    if len(sources) < 2 or not counts:
        return ""
    largest = set(sorted(sources, key=lambda name: -counts[-1][1][name])[:_SOURCES])
    named = [
        name for name in sources if name in largest
    ]  # in the order of the other plots, so that a source has one colour
    others = [name for name in sources if name not in largest]
    rows = []
    for (_, before), (step, tokens) in zip([(0, dict.fromkeys(sources, 0.0)), *counts], counts):
        gained = {name: max(0.0, tokens[name] - before[name]) for name in sources}
        rows.append(
            (step, [gained[name] for name in named] + ([sum(gained[name] for name in others)] if others else []))
        )
    return plots.stacked(
        "tokens by source, since the line before", [*named, *(["others"] if others else [])], rows, marks=marks
    )


def _consumed(training: Sequence[Entry], sources: Mapping[str, Mapping[str, int]]) -> list[str]:
    rows = next((entry["consumed"] for entry in reversed(training) if "consumed" in entry), None)
    if rows is None or not sources:
        return []
    tokens = _tokens(rows, sources)
    whole = sum(tokens.values()) or 1.0
    table = (
        (
            f"{name}, {rows.get(name, 0) / max(1, sources[name]['rows']):.2f} epochs",
            rows.get(name, 0),
            tokens[name] / whole,
            "",
        )
        for name in sources
    )
    return [
        "<h2>Rows taken from each source</h2><p class=soft>The bar is the source's share of all tokens so far.</p>",
        bars(table),
    ]


def _scores(held_out: Sequence[Entry]) -> list[str]:
    if not held_out:
        return []
    last = held_out[-1]
    names = [
        name.removeprefix("eval").removesuffix("_loss")
        for name in last
        if name.startswith("eval") and name.endswith("_loss")
    ]
    lines = "".join(
        f"<tr><td class=name>{escape(name.lstrip('_') or 'all')}</td>"
        + "".join(
            f"<td class=number>{_number(last, f'eval{name}_{figure}')}</td>"
            for figure in ("loss", "perplexity", "bits_per_byte")
        )
        + "<td></td></tr>"
        for name in names
    )
    head = "<tr><th>source</th><th>loss</th><th>perplexity</th><th>bits/byte</th><th></th></tr>"
    return [f"<h2>Held out, at step {last['step']:,}</h2><table>{head}{lines}</table>"]


def _sessions(entries: Sequence[Entry]) -> list[str]:
    lines: list[list[Any]] = []
    for entry in entries:
        if entry["kind"] == "start":
            lines.append(
                [
                    entry.get("time", ""),
                    entry["step"],
                    entry["step"],
                    entry.get("world_size", ""),
                    entry.get("rows_per_step", ""),
                    "",
                ]
            )
        elif lines:
            lines[-1][2] = entry["step"]
            lines[-1][5] = _span(lines[-1][0], entry.get("time", ""))
    rows = "".join(
        "<tr>"
        + "".join(f"<td>{escape(f'{cell:,}' if isinstance(cell, int) else cell)}</td>" for cell in line)
        + "</tr>"
        for line in lines
    )
    head = (
        "<tr><th>began</th><th>after step</th><th>last step</th><th>ranks</th><th>rows a step</th><th>lasted</th></tr>"
    )
    return [f"<h2>Sessions</h2><table>{head}{rows}</table>"] if lines else []


def _settings_tables(settings: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    def table(chosen: bool) -> str:
        rows = (
            f"<tr><td class=name>{escape(name)}</td><td>{escape(_value(entry.get('value')))}</td><td "
            f"class=soft>{escape(str(entry.get('origin')))}</td></tr>"
            for name, entry in settings.items()
            if (entry.get("origin") != "default") == chosen
        )
        return f"<table>{''.join(rows)}</table>"

    if settings:
        yield f"<h2>Settings</h2>{table(True)}<details><summary>defaults</summary>{table(False)}</details>"


def _value(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _settings(output_dir: Path) -> dict[str, dict[str, Any]]:
    """What train.py left, of the last session; nothing where it did not run. A stage has those of the run around it."""
    try:
        found = json.loads(read_regular(run_of(output_dir) / "settings.json", MOST_BYTES))
    except (OSError, ValueError):
        return {}
    return {name: entry for name, entry in found.items() if isinstance(entry, dict)} if isinstance(found, dict) else {}


def _number(entry: Entry, key: str) -> str:
    value = entry.get(key)
    return plots.short(float(value)) if isinstance(value, int | float) else "–"


def _span(start: str, end: str) -> str:
    try:
        return str(datetime.fromisoformat(end) - datetime.fromisoformat(start))
    except ValueError:
        return ""
