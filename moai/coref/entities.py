"""Names that come again: which of their later mentions can be asked for, and what stands between them and the first.

The first mention of a name is the antecedent and stays. Of the later ones, those pass that lie 10 to 2,000 characters
behind it and have no pronoun beside them that could mean the same; at most three of a name in a document, spread over
it. Positions are code points of the text, as Kiwi counts them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from moai.coref.given_names import GivenNames
from moai.coref.names import LongestNames, Morpheme, Name, SingleNames

REASONS = {
    "pronoun": "a pronoun beside them may mean the same; --no-pronoun-filter keeps them",
    "near": "they stand too near to the antecedent; lower --min-distance",
    "far": "they stand too far from the antecedent; raise --max-distance",
    "more": "--max-mentions takes no more of one name in a document",
}
"""Why a later mention is no candidate, and what would make it one."""
_AMBIGUOUS = frozenset(("그", "그녀", "그들", "이", "이들", "그것", "이것", "자신", "저", "저희", "걔", "얘", "본인"))
"""Pronouns that may mean somebody named before; 우리, 누구, 무엇 do not."""
_BESIDE = 15
"""Characters between a mention and a pronoun of the same sentence that counts as beside it."""

Span = tuple[int, int]


@dataclass(frozen=True)
class Candidate:
    """A later mention of `entity` at `mention`, and where its first mention is.

    copies       other places of the same letters, later mentions first, and whether each is a mention (or, where the
                 letters are part of a longer name, that name): what would give the answer away
    competitors  different names between antecedent and mention
    nearest      the repeated name that stands last before the mention, as far as it is not hidden
    frequent     the name that the document repeats most, as far as its mentions are not hidden
    """

    entity: str
    antecedent: int
    mention: int
    kind: str = "name"
    copies: tuple[tuple[int, int, bool], ...] = ()
    competitors: int = 0
    nearest: str = ""
    frequent: str = ""

    @property
    def distance(self) -> int:
        return self.mention - self.antecedent

    @property
    def behind(self) -> int:
        """Where the mention ends."""
        return self.mention + len(self.entity)


@dataclass(frozen=True, kw_only=True)
class Repetition:
    """Candidates of the names that a finder found.

    spread          of more mentions than `max_mentions` take some of the whole document, not the first
    pronoun_filter  pass over mentions with an ambiguous pronoun beside them
    hide_copies     other mentions of the name will be hidden: the baselines do not see them
    """

    finder: LongestNames | SingleNames | GivenNames
    max_mentions: int = 3
    min_distance: int = 10
    max_distance: int = 2000
    spread: bool = True
    pronoun_filter: bool = True
    hide_copies: bool = True

    def candidates(
        self, text: str, morphemes: Sequence[Morpheme], names: Sequence[Name]
    ) -> tuple[list[Candidate], Counter[str]]:
        """In the order of names' first mentions, then of mentions; and how many of the later mentions are none, by
        reason.
        """
        mentions: dict[str, list[Name]] = {}
        for name in names:
            mentions.setdefault(text[name.begin : name.end], []).append(name)
        repeated = {entity: found for entity, found in mentions.items() if len(found) > 1}
        pronouns = _pronouns(morphemes) if self.pronoun_filter and repeated else []
        found, lost = [], Counter[str]()
        document = _Document(text, names, repeated, self.hide_copies)
        for entity, (first, *later) in repeated.items():
            passed = []
            for one in later:
                if reason := self._reason(first, one, pronouns, text):
                    lost[reason] += 1
                else:
                    passed.append(one)
            lost["more"] += max(0, len(passed) - self.max_mentions)
            found += [document.candidate(entity, first, one) for one in self._some(passed)]
        return found, lost

    def _reason(self, first: Name, one: Name, pronouns: Sequence[Span], text: str) -> str | None:
        distance = one.begin - first.begin
        if distance < self.min_distance:
            return "near"
        if distance > self.max_distance:
            return "far"
        return "pronoun" if any(_beside(one, pronoun, text) for pronoun in pronouns) else None

    def _some(self, passed: list[Name]) -> list[Name]:
        number = self.max_mentions
        if len(passed) <= number or not self.spread:
            return passed[:number]
        return [passed[(index + 1) * len(passed) // number - 1] for index in range(number)]


class _Document:
    """Where its names stand, looked up for one candidate after another."""

    def __init__(self, text: str, names: Sequence[Name], repeated: dict[str, list[Name]], hide_copies: bool) -> None:
        self.text, self.names, self.repeated, self.hide_copies = text, names, repeated, hide_copies
        self.places: dict[str, list[tuple[int, int, bool]]] = {}
        self.order = {entity: place for place, entity in enumerate(repeated)}

    def candidate(self, entity: str, first: Name, one: Name) -> Candidate:
        between = [name for name in self.names if first.end <= name.begin and name.end <= one.begin]
        others = [self.text[name.begin : name.end] for name in between]
        visible = [other for other in others if other in self.repeated and not (self.hide_copies and other == entity)]
        copies = tuple(copy for copy in self._copies(entity) if copy[0] not in (first.begin, one.begin))
        return Candidate(
            entity=entity,
            antecedent=first.begin,
            mention=one.begin,
            kind=one.kind,
            copies=copies,
            competitors=len({*others} - {entity}),
            nearest=visible[-1] if visible else entity,  # the antecedent is a name before the mention, too
            frequent=self._frequent(entity),
        )

    def _frequent(self, entity: str) -> str:
        seen = {other: len(found) for other, found in self.repeated.items()}
        seen[entity] = 1 if self.hide_copies else seen[entity] - 1
        return min(seen, key=lambda other: (-seen[other], self.order[other]))

    def _copies(self, entity: str) -> list[tuple[int, int, bool]]:
        if entity not in self.places:
            own = {name.begin for name in self.repeated[entity]}
            found: dict[int, tuple[int, int, bool]] = {}
            at = self.text.find(entity)
            while at >= 0:
                begin, end = at, at + len(entity)
                if at not in own:
                    longer = (name for name in self.names if name.begin <= begin and end <= name.end)
                    begin, end = next(((name.begin, name.end) for name in longer), (begin, end))
                found[begin] = (begin, end, at in own)
                at = self.text.find(entity, at + 1)
            self.places[entity] = list(found.values())
        return self.places[entity]


def _pronouns(morphemes: Sequence[Morpheme]) -> list[Span]:
    return [(one.start, one.start + one.len) for one in morphemes if one.tag == "NP" and one.form in _AMBIGUOUS]


def _beside(name: Name, pronoun: Span, text: str) -> bool:
    """In the same sentence, at most _BESIDE characters apart."""
    begin, end = (pronoun[1], name.begin) if pronoun[1] <= name.begin else (name.end, pronoun[0])
    return end - begin <= _BESIDE and not any(mark in text[begin:end] for mark in ".?!\n")
