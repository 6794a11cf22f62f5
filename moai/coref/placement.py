"""Where a candidate lies among the tokens of its document: the mask, the antecedent, and a window that holds both.

The original text is tokenized once, with offsets. The mask covers the name: a token that holds a particle besides is
split where the name ends, and the particle's half stays (moai.coref.pieces). Where a token cannot be split the mention
is not used, or, by the rules of v2, the mask is widened to whole tokens. Other copies of the name are hidden in the
same way, and not asked for.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moai.coref.entities import Candidate
from moai.coref.pieces import Pieces

MODES = ("span", "single", "text")
MASKS = ("all-later", "one")
SKIPS = {
    "untokenized": "the tokenizer's normalizer leaves nothing of them",
    "unknown": "the tokenizer has no pieces for them; take one for Korean",
    "overlap": "their tokens hold another copy of the name, too; take a tokenizer for Korean",
    "widened": "their tokens hold more than the name and cannot be split; --rules v2 masks what they hold",
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
class Edit:
    """Tokens [begin, end) of the document become `before`, as many masks as `name` has ids, and `behind`."""

    begin: int
    end: int
    name: tuple[int, ...]
    before: tuple[int, ...] = ()
    behind: tuple[int, ...] = ()

    @property
    def growth(self) -> int:
        """Tokens more than there were."""
        return len(self.before) + len(self.name) + len(self.behind) - (self.end - self.begin)


@dataclass(frozen=True)
class Placed:
    """Token ranges in the document without its ends. `exact`: the mask is the mention and nothing but white space
    more. `hidden` are the other copies, in order, none of them over the antecedent or the mask.
    """

    candidate: Candidate
    window: Range
    antecedent: Range
    mask: Edit
    exact: bool
    hidden: tuple[Edit, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Placement:
    """room: tokens of text in a row. `single` takes only mentions of one token; `pieces` splits tokens that hold more
    than the name, and without it masks are widened, or with `skip_widened` such mentions left out.
    """

    room: int
    mode: str = "span"
    skip_widened: bool = False
    hide_copies: bool = False
    unknown_id: int | None = None
    pieces: Pieces | None = None

    def place(self, candidate: Candidate, text: str, ids: Sequence[int], spans: Spans) -> Placed | str:
        """The candidate's place, or the reason of SKIPS why it has none."""
        antecedent = spans.covering(candidate.antecedent, candidate.antecedent + len(candidate.entity))
        covered = spans.covering(candidate.mention, candidate.behind)
        if antecedent is None or covered is None:
            return "untokenized"
        if self.unknown_id is not None and any(
            self.unknown_id in ids[slice(*place)] for place in (antecedent, covered)
        ):
            return "unknown"  # [UNK] is nothing to learn, and nothing to find a name by
        whole = Edit(*covered, tuple(ids[slice(*covered)]))
        mask = self.exact(candidate.mention, candidate.behind, whole, text, spans)
        if mask is None and (self.skip_widened or self.pieces):
            return "widened"
        if self.mode == "single" and (mask is None or len(mask.name) > 1):
            return "single"
        if antecedent[1] > covered[0]:
            return "overlap"  # tokens so long that the mask would cover the antecedent
        hidden = self._hidden(candidate, text, ids, spans) if self.hide_copies else []
        kept = []
        for edit in hidden:
            if edit.begin < covered[1] and covered[0] < edit.end:
                return "overlap"
            if not (edit.begin < antecedent[1] and antecedent[0] < edit.end):
                kept.append(edit)
        return self.around(candidate, spans, antecedent, mask or whole, mask is not None, tuple(kept))

    def exact(self, begin: int, end: int, whole: Edit, text: str, spans: Spans) -> Edit | None:
        """`whole`, the tokens that hold the characters [begin, end), with its ends split off where they hold more; None
        where they cannot be.
        """
        first, last = whole.begin, whole.end - 1
        before, behind = text[spans.begins[first] : begin], text[end : spans.ends[last]]
        name, left, right = list(whole.name), list[int](), list[int]()
        if behind.strip():
            halves = self.pieces and self.pieces.split(name[-1], text[spans.begins[last] : end], behind)
            if not halves:
                return None
            name[-1:], right = halves
        if before.strip():
            if first == last and right:
                return None  # one token holds something on both sides: rare, and its first half is new
            halves = self.pieces and self.pieces.split(name[0], before, text[begin : spans.ends[first]])
            if not halves:
                return None
            left, name[:1] = halves
        return Edit(whole.begin, whole.end, tuple(name), tuple(left), tuple(right))

    def _hidden(self, candidate: Candidate, text: str, ids: Sequence[int], spans: Spans) -> list[Edit]:
        """Every copy as an edit, in order; those that meet in a token are one."""
        found: list[Edit] = []
        for begin, end, _ in sorted(candidate.copies):
            if (covered := spans.covering(begin, end)) is None:
                continue
            whole = Edit(*covered, tuple(ids[slice(*covered)]))
            edit = self.exact(begin, end, whole, text, spans) or whole
            if found and edit.begin < found[-1].end:
                first = found.pop().begin
                edit = Edit(first, edit.end, tuple(ids[first : edit.end]))
            found.append(edit)
        return found

    def around(
        self,
        candidate: Candidate,
        spans: Spans,
        antecedent: Range,
        mask: Edit,
        exact: bool,
        hidden: tuple[Edit, ...] = (),
    ) -> Placed | str:
        """Choose the window; the room that antecedent and mask leave is shared before and behind them."""
        room = self.room - mask.growth - sum(max(0, edit.growth) for edit in hidden)
        spare = room - (mask.end - antecedent[0])
        if spare < 0:
            return "window"
        first = max(0, min(antecedent[0] - spare // 2, len(spans.begins) - room))
        end = min(first + room, len(spans.begins))
        first = next((edit.end for edit in hidden if edit.begin < first < edit.end), first)
        end = next((edit.begin for edit in hidden if edit.begin < end < edit.end), end)
        while 0 < first < antecedent[0] and spans.begins[first] < spans.ends[first - 1]:
            first += 1  # a byte-level token may hold half a character
        while mask.end < end < len(spans.begins) and spans.begins[end] < spans.ends[end - 1]:
            end -= 1
        inside = tuple(edit for edit in hidden if first <= edit.begin and edit.end <= end)
        return Placed(candidate, (first, end), antecedent, mask, exact, inside)
