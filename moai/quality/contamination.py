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
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa

from moai.core import columns
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
_LEADING_WORDS, _MOST_BETWEEN, _MOST_BEHIND = 4, 8, 400
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
        texts, found = batch["text"], self.index.found(batch["text"])
        # Of each document the worst first, then by number.
        found = found[np.lexsort((found["item"], -found["share"], found["document"]))]
        firsts = np.flatnonzero(np.diff(found["document"], prepend=-1))
        ranks = np.arange(len(found)) - np.repeat(firsts, np.diff([*firsts, len(found)]))
        shares, excerpts = np.zeros(len(texts), np.float32), [None] * len(texts)
        for document, _, share, end in found[firsts].tolist():
            shares[document] = share
            excerpts[document] = texts[document].as_py()[max(0, end - _EXCERPT_BEFORE) : end + _EXCERPT_BEHIND]
        named = found[ranks < _MOST_NAMED]
        offsets = np.searchsorted(named["document"], np.arange(len(texts) + 1)).astype(np.int32)
        return {
            "contaminated_share": shares,
            "contaminated_items": columns.lists(offsets, named["item"].astype(np.uint32)),
            "contaminated_excerpt": pa.array(excerpts, pa.string()),
        }


@dataclass(frozen=True)
class Index:
    """The n-grams of all items; of a short item that of the first words of its question, which leads to it."""

    lengths: tuple[int, ...]
    """Words in an n-gram."""
    keys: Keys
    """Of each n-gram, sorted."""
    owners: npt.NDArray[np.int64]
    """The items of the first n-gram, then those of the second, ..."""
    ends: npt.NDArray[np.int64]
    """Where in `owners` those of each n-gram end."""
    totals: npt.NDArray[np.int64]
    """How many n-grams each item has; 0 for one that is not looked for."""
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
        flat = np.array([at for own in kept.values() for at in own], np.int64)
        totals = np.bincount(flat, minlength=len(items))
        if passed_over := int((totals == 0).sum()):
            logger.warning(
                "%s of %s evaluation items are not looked for: they have fewer than %d words, are there twice, or "
                "share all n-grams with %d others",
                f"{passed_over:,}",
                f"{len(items):,}",
                _LEAST_WORDS,
                _MOST_ITEMS,
            )
        ends = np.cumsum([len(own) for own in kept.values()], dtype=np.int64)
        return cls(tuple(sorted(lengths)), np.array([*kept], np.uint64), flat, ends, totals, rest)

    def found(self, texts: pa.Array) -> npt.NDArray[Any]:
        """What each text holds of each item: records of document, item, share, and where in the text that ends first,
        by document and item.
        """
        hits = fastest().occurrences(texts, self.lengths, self.keys)
        sizes = np.diff(self.ends, prepend=0)[hits[:, 2]]
        of = np.repeat(np.arange(len(hits)), sizes)
        items = self.owners[np.arange(len(of)) + np.repeat(self.ends[hits[:, 2]] - np.cumsum(sizes), sizes)]
        documents, ends, grams = hits[of].T
        holds = np.ones(len(of), bool)
        for at in np.flatnonzero(np.isin(items, [*self.rest])).tolist():
            text = texts[int(documents[at])].as_py()[ends[at] : ends[at] + _MOST_BEHIND]
            holds[at] = _follow(text, *self.rest[int(items[at])])
        # An n-gram counts once, where it stands first.
        owned = documents[holds] * len(self.totals) + items[holds]
        once = np.sort(np.unique(owned * len(self.keys) + grams[holds], return_index=True)[1])
        pairs, first, number = np.unique(owned[once], return_index=True, return_counts=True)
        found = np.empty(len(pairs), [("document", "i8"), ("item", "i8"), ("share", "f4"), ("end", "i8")])
        found["document"], found["item"] = np.divmod(pairs, max(1, len(self.totals)))
        found["share"], found["end"] = number / np.maximum(self.totals[found["item"]], 1), ends[holds][once][first]
        return found


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
