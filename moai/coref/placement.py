"""Where a candidate lies among the tokens of its document: the mask, the antecedent, and a window that holds both.

The original text is tokenized once, with offsets. The mask is every token that overlaps the mention, widened until
tokens and characters end together, so that what is masked is always whole tokens and whole characters; particles behind
the name keep the tokens they have in running text.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moai.coref.entities import Candidate

MODES = ("span", "single", "text")
SKIPS = {
    "untokenized": "the tokenizer's normalizer leaves nothing of them",
    "unknown": "the tokenizer has no pieces for them; take one for Korean",
    "overlap": "the tokenizer's pieces are longer than names; take one for Korean",
    "widened": "their tokens hold more than the name; leave out --skip-widened",
    "single": "they are more than one token; take --mode span",
    "window": "antecedent and mask do not fit in a row; raise --seq-len",
}
"""Why a candidate gives no sample, and what would give one; `skipped.<reason>` counts each. All are decided before the
cap, which then counts real samples only.
"""

Range = tuple[int, int]
"""Half open."""


@dataclass(frozen=True)
class Spans:
    """Where each token's text begins and ends, in characters. Lists, since looking up single numbers in arrays takes
    ten times as long.
    """

    begins: list[int]
    ends: list[int]

    @classmethod
    def of(cls, spans: npt.NDArray[np.int64]) -> Spans:
        """From an array of (tokens, 2)."""
        return cls(spans[:, 0].tolist(), spans[:, 1].tolist())

    def covering(self, begin: int, end: int) -> Range | None:
        """The tokens that overlap the characters [begin, end), and all that share a character with these. None if no
        token does.
        """
        while True:
            first, behind = bisect_right(self.ends, begin), bisect_left(self.begins, end)
            if behind <= first:
                return None
            wider = min(begin, self.begins[first]), max(end, self.ends[behind - 1])
            if wider == (begin, end):
                return first, behind
            begin, end = wider


@dataclass(frozen=True)
class Placed:
    """Token ranges in the document without its ends. `exact`: the mask is the mention and nothing but white space
    more.
    """

    candidate: Candidate
    window: Range
    antecedent: Range
    mask: Range
    exact: bool


@dataclass(frozen=True, kw_only=True)
class Placement:
    """room: tokens of text in a row. `single` takes only mentions of one token; `skip_widened` leaves out those that
    are not exact.
    """

    room: int
    mode: str = "span"
    skip_widened: bool = False
    unknown_id: int | None = None

    def place(self, candidate: Candidate, text: str, ids: Sequence[int], spans: Spans) -> Placed | str:
        """The candidate's place, or the reason of SKIPS why it has none."""
        antecedent = spans.covering(candidate.antecedent, candidate.antecedent + len(candidate.entity))
        mask = spans.covering(candidate.mention, candidate.behind)
        if antecedent is None or mask is None:
            return "untokenized"
        if self.unknown_id is not None and any(self.unknown_id in ids[slice(*place)] for place in (antecedent, mask)):
            return "unknown"  # [UNK] is nothing to learn, and nothing to find a name by
        exact = text[spans.begins[mask[0]] : spans.ends[mask[1] - 1]].strip() == candidate.entity
        if self.skip_widened and not exact:
            return "widened"
        if self.mode == "single" and (mask[1] - mask[0] > 1 or not exact):
            return "single"
        return self.around(candidate, spans, antecedent, mask, exact)

    def around(self, candidate: Candidate, spans: Spans, antecedent: Range, mask: Range, exact: bool) -> Placed | str:
        """Choose the window; the room that antecedent and mask leave is shared before and behind them."""
        if antecedent[1] > mask[0]:
            return "overlap"  # tokens so long that the mask would cover the antecedent
        spare = self.room - (mask[1] - antecedent[0])
        if spare < 0:
            return "window"
        first = max(0, min(antecedent[0] - spare // 2, len(spans.begins) - self.room))
        end = min(first + self.room, len(spans.begins))
        while 0 < first < antecedent[0] and spans.begins[first] < spans.ends[first - 1]:
            first += 1  # a byte-level token may hold half a character
        while mask[1] < end < len(spans.begins) and spans.begins[end] < spans.ends[end - 1]:
            end -= 1
        return Placed(candidate, (first, end), antecedent, mask, exact)
