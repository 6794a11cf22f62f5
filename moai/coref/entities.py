"""Proper nouns that come again: which names a document repeats, and which of their later mentions can be asked for.

The first mention of a name is the antecedent and stays; the next three are candidates, each a sample of its own, if
they lie 10 to 2,000 characters behind it. Positions are code points of the text, as Kiwi counts them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from moai.coref.korean import Morpheme

_NOUNS = ("NNP", "NNG")


@dataclass(frozen=True)
class Candidate:
    """A later mention of `entity` at `mention`, and where its first mention is."""

    entity: str
    antecedent: int
    mention: int

    @property
    def distance(self) -> int:
        return self.mention - self.antecedent

    @property
    def behind(self) -> int:
        """Where the mention ends."""
        return self.mention + len(self.entity)


@dataclass(frozen=True, kw_only=True)
class Repetition:
    """Find names and their candidates.

    tags         Kiwi's tags that make a name
    merge_latin  read Latin letters and a noun that follows without a space as one name: SK + 하이닉스
    """

    tags: tuple[str, ...] = ("NNP",)
    merge_latin: bool = False
    min_chars: int = 2
    max_mentions: int = 3
    min_distance: int = 10
    max_distance: int = 2000

    def candidates(self, text: str, morphemes: Sequence[Morpheme], tags: Sequence[str]) -> list[Candidate]:
        """In the order of names' first mentions, then of mentions. `tags` are those of the morphemes, read once."""
        mentions: dict[str, list[int]] = {}
        for name, start in self._names(text, morphemes, tags):
            mentions.setdefault(name, []).append(start)
        found = []
        for name, (antecedent, *later) in mentions.items():
            pairs = [Candidate(name, antecedent, start) for start in later[: self.max_mentions]]
            found += [pair for pair in pairs if self.min_distance <= pair.distance <= self.max_distance]
        return found

    def _names(self, text: str, morphemes: Sequence[Morpheme], tags: Sequence[str]) -> Iterator[tuple[str, int]]:
        """Names and where they stand. One that is not in the text as Kiwi spells it (a contraction, a normalized form)
        is passed over.
        """
        wanted = {*self.tags, *(_NOUNS if self.merge_latin else ())}
        for index, tag in enumerate(tags):
            if tag not in wanted:
                continue
            morpheme = morphemes[index]
            name, start = morpheme.form, morpheme.start
            before = morphemes[index - 1] if self.merge_latin and index and tags[index - 1] == "SL" else None
            if before and before.start + before.len == start:
                name, start = before.form + name, before.start
            elif tag not in self.tags:
                continue
            if len(name) >= self.min_chars and text.startswith(name, start):
                yield name, start
