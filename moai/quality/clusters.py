"""What the report says of copies: how large their clusters are, how similar candidates were, and pairs side by side.

A cluster is a document that stays and those that went because of it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import numpy.typing as npt

from moai.core.pages import bars

_SIZES = ((2, 2), (3, 4), (5, 9), (10, 99), (100, 10**12))
_BINS = 20
_SHOWN = 10
_CONTEXT = 8
"""Words of what both texts have that are shown on either side of a difference."""
_DIFFERENCES = 12

Pair = tuple[float, str, str]
"""Jaccard similarity, and the beginnings of both texts."""
STYLE = """
ins { background: #2f7d4a33; text-decoration: none; } del { background: #c4622d33; text-decoration: none; }
"""


@dataclass(frozen=True)
class Clusters:
    similarity: float
    sizes: dict[str, int]
    """How many clusters there are of these sizes."""
    largest: int
    same: int
    """Documents that went because of one with the same text or the same words."""
    near: int
    compared: int
    histogram: list[int]
    """Of the similarities of all compared pairs, from 0 to 1."""
    above: list[Pair]
    below: list[Pair]

    @classmethod
    def of(
        cls,
        similarity: float,
        keepers: npt.NDArray[np.int64],
        found: npt.NDArray[np.float64],
        compared: npt.NDArray[np.float64],
        shown: Iterable[Pair],
    ) -> Clusters:
        """keepers, found   of each document that goes: what stays in its place, and their similarity
        compared, shown   the similarity of every pair of candidates, and those of which the texts are known
        """
        sizes = np.unique(keepers, return_counts=True)[1] + 1
        pairs = sorted(shown, key=lambda pair: (abs(pair[0] - similarity), pair))
        return cls(
            similarity,
            {_spelled(least, most): int(((sizes >= least) & (sizes <= most)).sum()) for least, most in _SIZES},
            int(sizes.max(initial=0)),
            int((found == 1).sum()),
            int((found < 1).sum()),
            len(compared),
            np.histogram(compared, bins=_BINS, range=(0, 1))[0].tolist(),
            [pair for pair in pairs if pair[0] >= similarity][:_SHOWN],
            [pair for pair in pairs if pair[0] < similarity][:_SHOWN],
        )

    def summary(self) -> dict[str, Any]:
        return {
            "clusters": self.sizes,
            "largest": self.largest,
            "same": self.same,
            "near": self.near,
            "compared_pairs": self.compared,
            "similarities": {"bin": 1 / _BINS, "pairs": self.histogram},
        }

    def parts(self) -> Iterator[str]:
        """Of the page, as HTML."""
        total, most = max(1, sum(self.sizes.values())), max(1, *self.histogram)
        yield (
            f"<h2>Copies</h2><p class=soft>{self.same:,} documents have the words of one that stays, {self.near:,} are "
            f"near copies. The largest cluster has {self.largest:,} documents.</p>"
        )
        yield bars([(f"clusters of {size}", number, number / total, "") for size, number in self.sizes.items()])
        if not self.compared:
            return
        yield f"<p class=soft>{self.compared:,} pairs of candidates were compared, by their Jaccard similarity:</p>"
        yield bars(
            (f"{at / _BINS:.2f}", number, number / most, "" if (at + 1) / _BINS > self.similarity else "lost")
            for at, number in enumerate(self.histogram)
            if number
        )
        for name, pairs in (("just similar enough", self.above), ("just not similar enough", self.below)):
            if pairs:
                yield f"<details><summary><b>{name}</b> <span>{len(pairs)} pairs</span></summary>"
                yield from (_article(pair) for pair in pairs)
                yield "</details>"


def _spelled(least: int, most: int) -> str:
    return str(least) if least == most else f"{least} to {most}" if most < 10**12 else f"{least} and more"


def _article(pair: Pair) -> str:
    value, one, other = pair
    text = "".join(_differences(one, other)) or f"The beginnings are the same: {escape(one[:200])} …"
    return f"<article><small>{value:.3f}</small><p>{text}</p></article>"


def _differences(one: str, other: str) -> Iterator[str]:
    """The first text as it became the second: what went, what came, and some words around."""
    first, second = (re.findall(r"\s*\S+", text) for text in (one, other))
    matcher = difflib.SequenceMatcher(None, first, second, autojunk=False)
    for number, group in enumerate(matcher.get_grouped_opcodes(_CONTEXT)):
        if number == _DIFFERENCES:
            yield " …"
            return
        yield " … " if number else ""
        for what, start, end, begin, stop in group:
            if what == "equal":
                yield escape("".join(first[start:end]))
            else:
                yield from _marked("del", first[start:end])
                yield from _marked("ins", second[begin:stop])


def _marked(tag: str, words: Sequence[str]) -> Iterator[str]:
    if words:
        yield f"<{tag}>{escape(''.join(words))}</{tag}>"
