"""Evaluation items in a corpus: which share of an item's 13-grams a document holds.

An item is a question and its answer, one after the other. One of fewer than 13 words must stand there whole: the
question, and its answer among the words behind it. An n-gram that more than ten items share tells none of them apart
and is not looked for.

    {"question": "What is the capital of France?", "answer": "Paris"}       a line of a file of items
    {"text": "..."}                                                         another

Of the names in QUESTIONS and ANSWERS the first that a line has is taken. Of several answers the first counts; it may be
the number or the letter of one of `choices`.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import orjson
import pyarrow as pa

from moai.core.errors import ConfigError
from moai.engine.part import Signal
from moai.engine.schema import Column
from moai.quality.ngrams import Keys, fastest, words_of

logger = logging.getLogger(__name__)

QUESTIONS = ("question", "query", "prompt", "instruction", "problem", "input", "ctx", "text", "sentence")
ANSWERS = ("answer", "answers", "completion", "output", "target", "response", "solution")
N = 13
_MOST_ITEMS, _LEAST_WORDS = 10, 4
"""That share an n-gram; words of an item that is looked for."""
_LEADING_WORDS, _MOST_BETWEEN, _MOST_BEHIND = 6, 8, 1000
"""Of a short question the words that are looked for first; words between it and its answer; characters in which both
must be over.
"""
_EXCERPT_BEFORE, _EXCERPT_BEHIND, _MOST_NAMED = 400, 200, 100


@dataclass(frozen=True)
class Item:
    place: str
    """`file:line`."""
    question: str
    answer: str

    @property
    def text(self) -> str:
        return f"{self.question}\n{self.answer}" if self.answer else self.question


@dataclass(frozen=True)
class Contamination(Signal):
    """`contaminated_share` is the largest share of an item that a document holds, `contaminated_items` the numbers of
    the items of which it holds something, that one first (from 0, over all files), and `contaminated_excerpt` the text
    around where it holds the first.
    """

    needs: ClassVar[tuple[str, ...]] = ("text",)
    adds: ClassVar[tuple[Column, ...]] = (
        Column("contaminated_share", "float32", per="document"),
        Column("contaminated_items", "list<uint32>", per="document"),
        Column("contaminated_excerpt", "string", per="document"),
    )

    files: tuple[Path, ...]
    """JSON lines of evaluation items."""

    @cached_property
    def items(self) -> list[Item]:
        return read_items(self.files)

    @cached_property
    def index(self) -> Index:
        return Index.of(self.items)

    def __getstate__(self) -> dict[str, Any]:
        return {one.name: getattr(self, one.name) for one in fields(self)}  # a worker makes an index of its own

    def measure(self, batch: pa.RecordBatch) -> dict[str, Any]:
        texts, index = batch["text"], self.index
        shares, items = np.zeros(len(texts), np.float32), [list[int]() for _ in texts]
        excerpts: list[str | None] = [None] * len(texts)
        hits = fastest().occurrences(texts, index.lengths, index.keys)
        for document, own in groupby(hits.tolist(), key=lambda hit: hit[0]):
            text = texts[document].as_py()
            if found := index.found(text, ((end, gram) for _, end, gram in own)):
                best = sorted(found, key=lambda item: (-found[item][0], item))[:_MOST_NAMED]
                (shares[document], end), items[document] = found[best[0]], best
                excerpts[document] = text[max(0, end - _EXCERPT_BEFORE) : end + _EXCERPT_BEHIND]
        return {
            "contaminated_share": shares,
            "contaminated_items": pa.array(items, pa.list_(pa.uint32())),
            "contaminated_excerpt": pa.array(excerpts, pa.string()),
        }


@dataclass(frozen=True)
class Index:
    """The n-grams of all items; of a short item that of the first words of its question, which leads to it."""

    lengths: tuple[int, ...]
    """Words in an n-gram."""
    keys: Keys
    """Of each n-gram, sorted."""
    owners: tuple[tuple[int, ...], ...]
    """The items of each n-gram."""
    totals: Mapping[int, int]
    """How many n-grams an item has."""
    rest: Mapping[int, tuple[list[str], list[str]]]
    """Of a short item the words of its question behind that n-gram, and those of its answer."""

    @classmethod
    def of(cls, items: Sequence[Item]) -> Index:
        owners, rest, lengths = defaultdict[int, list[int]](list), dict[int, tuple[list[str], list[str]]](), {N}
        seen = set[tuple[str, ...]]()
        for at, item in enumerate(items):
            words, n = words_of(item.text), N
            if tuple(words) in seen:
                continue
            seen.add(tuple(words))
            if len(words) < N:
                question, answer = words_of(item.question), words_of(item.answer)
                if len(words) < _LEAST_WORDS or len(question) < _LEAST_WORDS - 1:
                    continue
                n = min(len(question), _LEADING_WORDS)
                words, rest[at] = words[:n], (question[n:], answer)
            lengths.add(n)
            for key in dict.fromkeys(fastest().keys_of(" ".join(words), n).tolist()):
                owners[key].append(at)
        kept = {key: tuple(own) for key, own in sorted(owners.items()) if len(own) <= _MOST_ITEMS}
        totals = Counter(at for own in kept.values() for at in own)
        if passed_over := len(items) - len(totals):
            logger.warning(
                "%s of %s evaluation items are not looked for: they have fewer than %d words, are there twice, or "
                "share all n-grams with %d others",
                f"{passed_over:,}",
                f"{len(items):,}",
                _LEAST_WORDS,
                _MOST_ITEMS,
            )
        return cls(tuple(sorted(lengths)), np.array([*kept], np.uint64), tuple(kept.values()), totals, rest)

    def found(self, text: str, hits: Iterable[tuple[int, int]]) -> dict[int, tuple[float, int]]:
        """Of the items that a text holds something of the share, and where that ends first. `hits` are where an n-gram
        ends in the text and its place among the keys, in order.
        """
        ends, grams = dict[int, int](), defaultdict[int, set[int]](set)
        for end, gram in hits:
            for item in self.owners[gram]:
                if item not in self.rest or _follow(text[end : end + _MOST_BEHIND], *self.rest[item]):
                    grams[item].add(gram)
                    ends.setdefault(item, end)
        return {item: (len(own) / self.totals[item], ends[item]) for item, own in grams.items()}


def _follow(text: str, question: list[str], answer: list[str]) -> bool:
    """Whether a text goes on with the rest of a question, and soon the answer."""
    words, n = words_of(text), len(question)
    places = range(n, min(n + _MOST_BETWEEN, len(words) - len(answer)) + 1)
    return words[:n] == question and any(words[at : at + len(answer)] == answer for at in places)


def read_items(files: Sequence[Path]) -> list[Item]:
    """The items of JSON lines. Raises ConfigError, naming file and line."""
    return [item for path in files for item in _items_of(path)]


def _items_of(path: Path) -> Iterator[Item]:
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"decontaminate: {path}: {error.strerror}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            record = orjson.loads(line)
        except ValueError as error:
            raise ConfigError(f"decontaminate: {place}: is no JSON ({error})") from error
        names = list(record) if isinstance(record, dict) else []
        asked = next((name for name in QUESTIONS if name in names and _text(record[name])), None)
        if asked is None:
            raise ConfigError(
                f"decontaminate: {place}: has no text under any of {', '.join(QUESTIONS)} "
                f"(found: {', '.join(map(str, names)) or type(record).__name__})"
            )
        answered = next((name for name in ANSWERS if name in names), None)
        yield Item(place, _text(record[asked]), _answer(record, record[answered]) if answered else "")


def _answer(record: Mapping[str, Any], answer: Any) -> str:
    choices = record.get("choices")
    choices = choices.get("text") if isinstance(choices, Mapping) else choices
    if isinstance(choices, list):
        at = "ABCDEFGH".find(answer) if isinstance(answer, str) and len(answer) == 1 else answer
        if isinstance(at, int) and 0 <= at < len(choices):
            return _text(choices[at])
    return _text(answer)


def _text(value: Any) -> str:
    """A string, a number, or the first of a list or of `text` in an object."""
    if isinstance(value, Mapping):
        value = value.get("text", "")
    if isinstance(value, list):
        return _text(value[0]) if value else ""
    return "" if value is None or isinstance(value, bool) else str(value)
