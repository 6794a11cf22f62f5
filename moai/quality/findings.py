"""What was found beside rules: languages, personal data by kind, and evaluation items with both texts.

findings = Findings(items=contamination.items)
findings.note("web", table, stays=mask, thresholds=profile.of("web"))
findings.summary(); findings.parts()
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from moai.core.pages import bars
from moai.quality.contamination import Item
from moai.quality.language import NO_LANGUAGE
from moai.quality.personal import KINDS, masked
from moai.quality.rules import SURE

UNSURE = "unsure"
_SHOWN_ITEMS, _SHOWN_LANGUAGES = 50, 12
_KIND_NAMES = {
    "mail": "mail addresses",
    "ipv4": "IPv4 addresses",
    "ipv6": "IPv6 addresses",
    "phone_kr": "Korean phone numbers",
    "phone": "other phone numbers",
    "resident_number": "Korean resident numbers",
}


@dataclass
class FoundItem:
    """One evaluation item: documents that fail for it, the largest share that one holds, and that document's text."""

    documents: int = 0
    share: float = 0.0
    source: str = ""
    excerpt: str = ""


@dataclass
class Findings:
    items: Sequence[Item] = ()
    languages: defaultdict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    """Documents by language, of each source."""
    personal: dict[str, list[int]] = field(default_factory=dict)
    """By kind the documents that hold some, and how many they hold."""
    found: defaultdict[int, FoundItem] = field(default_factory=lambda: defaultdict(FoundItem))

    def note(self, source: str, table: pa.Table, measured: npt.NDArray[np.bool_], most_share: float | None) -> None:
        """Count what stands in the measured documents of a table. `most_share` is how much of an item a document may
        hold.
        """
        names = table.column_names
        if "language" in names:
            unsure = pc.less(table["language_score"], SURE)
            named = pc.if_else(unsure, pa.scalar(UNSURE), table["language"]).filter(pa.array(measured))
            counted = pc.value_counts(named).to_pylist()
            self.languages[source].update({one["values"]: one["counts"] for one in counted})
        for kind in KINDS:
            if (name := f"personal_{kind}") in names:
                numbers = table[name].fill_null(0).to_numpy()[measured]
                documents, number = self.personal.get(kind, (0, 0))
                self.personal[kind] = [documents + int((numbers > 0).sum()), number + int(numbers.sum())]
        if "contaminated_share" in names and most_share is not None:
            shares = np.where(measured, table["contaminated_share"].fill_null(0).to_numpy(), 0)
            for row in np.flatnonzero(shares > most_share).tolist():
                item = self.found[table["contaminated_items"][row].as_py()[0]]
                item.documents += 1
                if shares[row] > item.share:
                    item.share, item.source = float(shares[row]), source
                    item.excerpt = table["contaminated_excerpt"][row].as_py()

    def summary(self) -> dict[str, Any]:
        """For quality.json; texts of personal data and of documents are not in it."""
        return {
            **(
                {"languages": {name: dict(found.most_common()) for name, found in self.languages.items()}}
                if self.languages
                else {}
            ),
            **(
                {
                    "personal_data": {
                        kind: {"documents": one, "found": all_} for kind, (one, all_) in self.personal.items()
                    }
                }
                if self.personal
                else {}
            ),
            **({"contaminated_items": [self._said(*one) for one in self._worst()]} if self.items else {}),
        }

    def parts(self) -> Iterator[str]:
        """Sections of the page."""
        if self.languages:
            yield "<h2>Languages</h2><p class=soft>zxx: code, tables and what else is of no language.</p>"
            yield bars(self._language_bars())
        if self.personal:
            of = max(1, *(number for _, number in self.personal.values()))
            yield "<h2>Personal data</h2>"
            yield bars((_KIND_NAMES[kind], number, number / of, "") for kind, (_, number) in self.personal.items())
        if self.items:
            yield (
                f"<h2>Evaluation items</h2><p class=soft>{len(self.found):,} of {len(self.items):,} items stand in "
                f"documents that go for it. Left the item, right the document.</p>"
            )
            for at, item in list(self._worst())[:_SHOWN_ITEMS]:
                yield (
                    f"<details><summary><b>{escape(self.items[at].place)}</b> <span>{item.share:.0%} of it, in "
                    f"{item.documents:,} documents, first {escape(item.source)}</span></summary><div class=columns>"
                    f"<article><p>{escape(self.items[at].text)}</p></article>"
                    f"<article><p>{escape(masked(item.excerpt))}</p></article></div></details>"
                )

    def _language_bars(self) -> Iterator[tuple[str, int, float, str]]:
        for source, found in self.languages.items():
            of = max(1, found.total())
            yield source, found.total(), 1.0, ""
            shown = found.most_common(_SHOWN_LANGUAGES)
            for name, number in shown:
                yield f"  {name}", number, number / of, "lost" if name in (NO_LANGUAGE, UNSURE) else ""
            if rest := found.total() - sum(number for _, number in shown):
                yield "  others", rest, rest / of, ""

    def _worst(self) -> list[tuple[int, FoundItem]]:
        return sorted(self.found.items(), key=lambda one: (-one[1].share, -one[1].documents, one[0]))

    def _said(self, at: int, item: FoundItem) -> Mapping[str, Any]:
        return {
            "item": self.items[at].place.rsplit("/", 1)[-1],
            "documents": item.documents,
            "share": round(item.share, 4),
            "source": item.source,
        }
