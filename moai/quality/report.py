"""What every rule costs: counted while verdicts are made, written as quality.json and quality.html.

tally = Tally(profile)
dropped = tally.judge("web", documents)         # the rows of a documents file; bits of rules
tally.summary(); tally.page("my corpus")
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from html import escape
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from moai.core.pages import bars, page
from moai.engine.part import class_identity
from moai.quality import plain
from moai.quality.rules import RULES, Profile, failures, is_least
from moai.quality.statistics import EXCERPT, TextStatistics

_BINS, _SHOWN = 40, 20
_STYLE = """
details { border-top: 1px solid var(--line); padding: .4rem 0; } summary { cursor: pointer; }
summary b { font-weight: 600; } summary span { color: var(--soft); }
svg { width: 100%; height: 7rem; display: block; margin: .8rem 0 .2rem; }
svg .kept { fill: var(--bar); } svg .gone { fill: var(--lost); } svg line { stroke: #c4622d; stroke-width: 2; }
article { border-left: 3px solid var(--line); padding-left: .7rem; margin: .8rem 0; font-size: .87rem; }
article p { margin: .2rem 0; white-space: pre-wrap; overflow-wrap: anywhere; max-height: 9rem; overflow: auto; }
table.rules td, table.rules th { border-bottom: 1px solid var(--line); } .wide { width: 30%; min-width: 8rem; }
"""


@dataclass
class RuleTally:
    """One rule over all sources. A histogram spans twice the threshold; its last bin holds all beyond."""

    documents: int = 0
    bytes: int = 0
    alone_documents: int = 0
    alone_bytes: int = 0
    histogram: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(_BINS, np.int64))
    nearest: dict[bool, list[Any]] = field(default_factory=lambda: {True: [], False: []})
    """By whether a document fails: (-distance from the threshold, number, value, source, excerpt), a heap."""


@dataclass
class Tally:
    profile: Profile
    sources: dict[str, dict[str, int]] = field(default_factory=dict)
    rules: dict[str, RuleTally] = field(default_factory=lambda: defaultdict(RuleTally))
    seen: int = 0

    def judge(self, source: str, found: pa.Table) -> npt.NDArray[np.uint64]:
        """The rules that each of these documents fails, a bit each. What was filtered has none."""
        measured = found["reason"].is_null().to_numpy()
        numbers = {name: found[name].fill_null(0).to_numpy() for name in plain.NAMES}
        sizes = found["bytes"].to_numpy()
        excerpts = pc.if_else(pa.array(measured), found[EXCERPT], pa.scalar(None, pa.string()))
        thresholds = self.profile.of(source)
        bits = np.where(measured, failures(numbers, thresholds), np.uint64(0))
        places = {name: np.uint64(1) << np.uint64(place) for place, name in enumerate(RULES)}
        for name, threshold in thresholds.items():
            rule, value = self.rules[name], RULES[name](numbers)
            failed, alone = (bits & places[name]) > 0, bits == places[name]
            rule.documents += int(failed.sum())
            rule.bytes += int(sizes[failed].sum())
            rule.alone_documents += int(alone.sum())
            rule.alone_bytes += int(sizes[alone].sum())
            bins = np.minimum(value[measured] / _bin_width(threshold), _BINS - 1).astype(np.int64)
            rule.histogram += np.bincount(bins, minlength=_BINS)
            self._keep_nearest(rule, source, threshold, value, failed, excerpts)
        self.seen += len(measured)
        dropped: npt.NDArray[np.bool_] = bits > 0
        totals = self.sources.setdefault(source, dict.fromkeys(("documents", "bytes", "dropped", "dropped_bytes"), 0))
        for name, which, amount in (
            ("documents", measured, None),
            ("bytes", measured, sizes),
            ("dropped", dropped, None),
            ("dropped_bytes", dropped, sizes),
        ):
            totals[name] += int(which.sum() if amount is None else amount[which].sum())
        return bits

    def _keep_nearest(
        self, rule: RuleTally, source: str, threshold: float, value: Any, failed: Any, excerpts: Any
    ) -> None:
        shown = excerpts.is_valid().to_numpy()
        for fails in (True, False):
            candidates = np.flatnonzero(shown & (failed == fails))
            order = np.argsort(np.abs(value[candidates] - threshold), kind="stable")[:_SHOWN]
            for at in candidates[order].tolist():
                entry = (-abs(value[at] - threshold), -(self.seen + at), float(value[at]), source, excerpts[at].as_py())
                heap = rule.nearest[fails]
                (heapq.heappush if len(heap) < _SHOWN else heapq.heappushpop)(heap, entry)

    def summary(self) -> dict[str, Any]:
        """quality.json: by rule and by source, in documents and in bytes of their records."""
        return {
            "profile": self.profile.identity(),
            "words": "unicode",
            "measured_by": class_identity(TextStatistics),
            "sources": self.sources,
            "rules": {
                name: {
                    "documents": rule.documents,
                    "bytes": rule.bytes,
                    "alone_documents": rule.alone_documents,
                    "alone_bytes": rule.alone_bytes,
                    "histogram": {"bin": _bin_width(self._threshold(name)), "documents": rule.histogram.tolist()},
                }
                for name, rule in self._ordered()
            },
        }

    def page(self, title: str) -> str:
        """quality.html, one file that needs no other."""
        total = {name: sum(one[name] for one in self.sources.values()) for name in ("documents", "dropped")}
        of = max(1, total["documents"])
        stays = total["documents"] - total["dropped"]
        rows = [("judged", total["documents"], 1.0, ""), ("dropped", total["dropped"], total["dropped"] / of, "lost")]
        by_source = [
            row
            for name, one in self.sources.items()
            for row in (
                (name, one["documents"], one["documents"] / of, ""),
                ("  dropped", one["dropped"], one["dropped"] / of, "lost"),
            )
        ]
        parts = [
            f"<h1>{escape(title)}</h1><p class=soft>Documents that every rule keeps stay. Words: runs of "
            f"letters, digits and _, or one other character.</p>",
            "<h2>Documents</h2>",
            bars([*rows, ("stay", stays, stays / of, "")]),
            *(["<h2>By source</h2>", bars(by_source)] if len(self.sources) > 1 else []),
            "<h2>What each rule drops</h2><p class=soft><i>alone</i>: no other rule drops them, so they come back when "
            "this one is switched off.</p>",
            self._table(of),
            "<h2>Near the thresholds</h2><p class=soft>Every rule, with documents that it just drops and just keeps "
            "(beginnings; one document in eight can be shown).</p>",
            *self._details(),
        ]
        return page(title, parts, style=_STYLE)

    def _table(self, of: int) -> str:
        lines = (
            f"<tr><td class=name>{escape(name)}</td><td class=number>{self._threshold(name):g}</td>"
            f"<td class=number>{rule.documents:,}</td><td class=number>{rule.documents / of:.1%}</td>"
            f"<td class=number>{rule.alone_documents:,}</td><td class=number>{rule.bytes / 1e6:,.1f} MB</td>"
            f"<td class=wide>{_bar(rule.documents / of)}</td></tr>"
            for name, rule in sorted(self._ordered(), key=lambda one: -one[1].documents)
        )
        head = "".join(f"<th>{name}</th>" for name in ("rule", "threshold", "drops", "", "alone", "bytes", ""))
        return f"<table class=rules><tr>{head}</tr>{''.join(lines)}</table>"

    def _details(self) -> Iterator[str]:
        for name, rule in self._ordered():
            threshold = self._threshold(name)
            sides = "".join(
                f"<div><b>just {'dropped' if fails else 'kept'}</b>{''.join(_excerpts(rule.nearest[fails]))}</div>"
                for fails in (True, False)
            )
            word = "at least" if is_least(name) else "at most"
            yield (
                f"<details><summary><b>{escape(name)}</b> <span>{word} {threshold:g}, drops {rule.documents:,}</span>"
                f"</summary>{_histogram(rule.histogram, is_least(name))}<p class=soft>documents from 0 to "
                f"{2 * threshold or 1:g} and beyond; the line is the threshold</p>"
                f"<div class=columns>{sides}</div></details>"
            )

    def _ordered(self) -> list[tuple[str, RuleTally]]:
        return [(name, self.rules[name]) for name in RULES if name in self.rules]

    def _threshold(self, name: str) -> float:
        """Of all sources; where only single ones have it, of the first of them."""
        found = self.profile.thresholds.get(name)
        own = (rules.get(name) for rules in self.profile.sources.values())
        return found if found is not None else next((value for value in own if value is not None), 0.0)


def _bin_width(threshold: float) -> float:
    return (2 * threshold or 1.0) / _BINS


def _bar(share: float) -> str:
    return f"<div class='bar lost' style='width:{share:.2%}'></div>" if share else ""


def _histogram(counts: npt.NDArray[np.int64], least: bool) -> str:
    """Heights by the square root, so that the few beside the many are seen."""
    top = max(1.0, float(np.sqrt(counts.max())))
    middle = _BINS // 2
    columns = "".join(
        f"<rect class={'gone' if (at < middle) == least else 'kept'} x={at * 10} width=9 "
        f"y={100 - height:.1f} height={height:.1f}><title>{count:,}</title></rect>"
        for at, count in enumerate(counts.tolist())
        if (height := 100 * float(np.sqrt(count)) / top)
    )
    return (
        f"<svg viewBox='0 0 {_BINS * 10} 100' preserveAspectRatio=none>{columns}"
        f"<line x1={middle * 10} x2={middle * 10} y1=0 y2=100 /></svg>"
    )


def _excerpts(nearest: list[Any]) -> Iterator[str]:
    if not nearest:
        yield "<p class=soft>none</p>"
    for _, _, value, source, text in sorted(nearest, key=lambda one: one[:2], reverse=True):
        yield f"<article><small>{value:.4g} · {escape(source)}</small><p>{escape(text)}</p></article>"


def read_summary(summary: Mapping[str, Any]) -> Iterator[str]:
    """The lines that a log shows of it: every rule that drops something, those that drop most first."""
    dropped = sum(one["dropped"] for one in summary["sources"].values())
    documents = sum(one["documents"] for one in summary["sources"].values())
    yield f"Judged {documents:,} documents: {dropped:,} dropped ({dropped / max(1, documents):.1%})"
    for name, rule in sorted(summary["rules"].items(), key=lambda one: -one[1]["documents"]):
        if rule["documents"]:
            yield f"  {name:34} drops {rule['documents']:>9,}, alone {rule['alone_documents']:>9,}"
