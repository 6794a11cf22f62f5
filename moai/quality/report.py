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
from moai.quality.clusters import STYLE, Clusters
from moai.quality.findings import Findings
from moai.quality.language import NO_LANGUAGE
from moai.quality.rules import CONTAMINATED, SURE, Numbers, Profile, failures, is_least, measure
from moai.quality.statistics import EXCERPT, TextStatistics

TOTALS = (
    *("read", "quarantined", "filtered", "documents", "dropped", "duplicates", "kept"),
    *("documents_bytes", "dropped_bytes", "duplicates_bytes", "kept_bytes"),
)
"""Of a source: records read, set aside and filtered, the documents that are judged, and what becomes of them."""
_FATES = {"quarantined": "set aside", "filtered": "filtered", "dropped": "fail a rule", "duplicates": "copies"}
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
    findings: Findings = field(default_factory=Findings)
    sources: dict[str, dict[str, int]] = field(default_factory=dict)
    rules: dict[str, RuleTally] = field(default_factory=lambda: defaultdict(RuleTally))
    seen: int = 0
    clusters: Clusters | None = None
    """Where copies were looked for."""

    def judge(self, source: str, found: pa.Table, counts: Mapping[str, int]) -> npt.NDArray[np.uint64]:
        """The rules that each of these documents fails, a bit each. What was filtered has none. `counts` are those of
        the receipt.
        """
        measured, sizes = found["reason"].is_null().to_numpy(), found["bytes"].to_numpy()
        bits = np.zeros(len(measured), np.uint64)
        for language, rows in self._groups(found, measured):
            thresholds = self.profile.of(source, language)
            if not thresholds:
                continue
            some = found.take(pa.array(rows))
            numbers = self._numbers(some)
            bits[rows] = failures(numbers, thresholds, self.profile.names)
            self._count_rules(source, thresholds, numbers, bits[rows], sizes[rows], some[EXCERPT], self.seen + rows)
        self.findings.note(source, found, measured, self.profile.of(source).get(CONTAMINATED))
        self.seen += len(measured)
        dropped: npt.NDArray[np.bool_] = bits > 0
        totals = self.sources.setdefault(source, dict.fromkeys(TOTALS, 0))
        for name in ("read", "quarantined", "filtered"):
            totals[name] += counts.get(name, 0)
        for name, which in (("documents", measured), ("dropped", dropped), ("kept", measured & ~dropped)):
            totals[name] += int(which.sum())
            totals[f"{name}_bytes"] += int(sizes[which].sum())
        return bits

    def lose(self, source: str, sizes: npt.NDArray[Any]) -> None:
        """Duplicates of these bytes, which every rule kept."""
        totals, number, size = self.sources[source], len(sizes), int(sizes.sum())
        totals["duplicates"] += number
        totals["duplicates_bytes"] += size
        totals["kept"] -= number
        totals["kept_bytes"] -= size

    def _groups(
        self, found: pa.Table, measured: npt.NDArray[np.bool_]
    ) -> Iterator[tuple[str | None, npt.NDArray[np.int64]]]:
        """The rows that are judged, by language where that makes a difference."""
        rows = np.flatnonzero(measured)
        if not self.profile.languages:
            yield None, rows
            return
        sure = pc.greater_equal(found["language_score"], SURE)
        named = pc.if_else(sure, found["language"], NO_LANGUAGE).take(pa.array(rows)).to_numpy(zero_copy_only=False)
        own = [named == language for language in self.profile.languages]
        for language, mask in zip(self.profile.languages, own, strict=True):
            yield language, rows[mask]
        yield None, rows[~np.any(own, axis=0)]

    def _numbers(self, found: pa.Table) -> Numbers:
        """The columns that are numbers."""
        numbers = {
            field.name: found[field.name].fill_null(0).to_numpy()
            for field in found.schema
            if pa.types.is_primitive(field.type)
        }
        if self.profile.only:
            wanted = pc.is_in(found["language"], pa.array([*self.profile.only, NO_LANGUAGE]))
            numbers["other_language"] = np.where(wanted.to_numpy(), 0, numbers["language_score"])
        return numbers

    def _count_rules(
        self,
        source: str,
        thresholds: Mapping[str, float],
        numbers: Numbers,
        bits: npt.NDArray[np.uint64],
        sizes: npt.NDArray[Any],
        excerpts: pa.ChunkedArray,
        places: npt.NDArray[np.int64],
    ) -> None:
        """`places` are the numbers of these documents among all that are seen."""
        flags = {name: np.uint64(1 << at) for at, name in enumerate(self.profile.names)}
        for name, threshold in thresholds.items():
            rule, value = self.rules[name], measure(name, numbers)
            failed, alone = (bits & flags[name]) > 0, bits == flags[name]
            rule.documents += int(failed.sum())
            rule.bytes += int(sizes[failed].sum())
            rule.alone_documents += int(alone.sum())
            rule.alone_bytes += int(sizes[alone].sum())
            bins = np.clip(value / _bin_width(threshold), 0, _BINS - 1).astype(np.int64)
            rule.histogram += np.bincount(bins, minlength=_BINS)
            self._keep_nearest(rule, source, threshold, value, failed, excerpts, places)

    def _keep_nearest(
        self, rule: RuleTally, source: str, threshold: float, value: Any, failed: Any, excerpts: Any, places: Any
    ) -> None:
        shown = excerpts.is_valid().to_numpy()
        for fails in (True, False):
            candidates = np.flatnonzero(shown & (failed == fails))
            order = np.argsort(np.abs(value[candidates] - threshold), kind="stable")[:_SHOWN]
            for at in candidates[order].tolist():
                far = -abs(float(value[at]) - threshold)
                entry = (far, -int(places[at]), float(value[at]), source, excerpts[at].as_py())
                heap = rule.nearest[fails]
                (heapq.heappush if len(heap) < _SHOWN else heapq.heappushpop)(heap, entry)

    def summary(self) -> dict[str, Any]:
        """quality.json: by rule and by source, in documents and in bytes of their records."""
        return {
            "profile": self.profile.identity(),
            "words": "unicode",
            "measured_by": class_identity(TextStatistics),
            "sources": self.sources,
            **({"copies": self.clusters.summary()} if self.clusters else {}),
            **self.findings.summary(),
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
        total = {name: sum(one[name] for one in self.sources.values()) for name in TOTALS}
        of = max(1, total["documents"])
        by_source = [row for name, one in self.sources.items() for row in _fates(one, name)]
        parts = [
            f"<h1>{escape(title)}</h1>",
            "<h2>Documents</h2>",
            bars(_fates(total, "read")),
            *(["<h2>By source</h2>", bars(by_source)] if len(self.sources) > 1 else []),
            *(self.clusters.parts() if self.clusters else []),
            *self.findings.parts(),
            *(self._of_rules(of) if self.rules else []),
        ]
        return page(title, parts, style=_STYLE + STYLE)

    def _of_rules(self, of: int) -> Iterator[str]:
        yield (
            "<h2>What each rule drops</h2><p class=soft>Documents that every rule keeps stay. Words: runs of letters, "
            "digits and _, or one other character. <i>alone</i>: no other rule drops them, so they come back when this "
            "one is switched off.</p>"
        )
        yield self._table(of)
        yield (
            "<h2>Near the thresholds</h2><p class=soft>Every rule, with documents that it just drops and just keeps "
            "(beginnings; one document in eight can be shown).</p>"
        )
        yield from self._details()

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
        return [(name, self.rules[name]) for name in self.profile.names if name in self.rules]

    def _threshold(self, name: str) -> float:
        """Of all sources; where only single ones have it, of the first of them."""
        found = self.profile.thresholds.get(name)
        beside = (*self.profile.languages.values(), *self.profile.sources.values())
        own = (rules.get(name) for rules in beside)
        return found if found is not None else next((value for value in own if value is not None), 0.0)


def _fates(total: Mapping[str, int], name: str) -> Iterator[tuple[str, int, float, str]]:
    """Bars: the records that were read, why some go, and how many stay."""
    of = max(1, total["read"])
    yield name, total["read"], total["read"] / of, ""
    for what in ("quarantined", "filtered", "dropped", "duplicates"):
        if total[what]:
            yield f"  {_FATES[what]}", total[what], total[what] / of, "lost"
    yield "  stay", total["kept"], total["kept"] / of, ""


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
    total = {name: sum(one[name] for one in summary["sources"].values()) for name in TOTALS}
    of = max(1, total["documents"])
    copies = f", {total['duplicates']:,} are copies ({total['duplicates'] / of:.1%})" if total["duplicates"] else ""
    yield f"Judged {total['documents']:,} documents: {total['dropped']:,} dropped ({total['dropped'] / of:.1%}){copies}"
    for name, rule in sorted(summary["rules"].items(), key=lambda one: -one[1]["documents"]):
        if rule["documents"]:
            yield f"  {name:34} drops {rule['documents']:>9,}, alone {rule['alone_documents']:>9,}"
