"""How well a version finds what is known to answer a question.

    measured = measure(searcher, version, read(Path("questions.jsonl")))
    measured.modes["hybrid"].values["recall@5"]             # 0.95: share of the questions whose document is among five

Documents are ranked by their best chunk. Each question has one right document, so nDCG@10 is 1 / log2(1 + its rank).
Intervals are of 95 %: Wilson's (1927) for recall, and for the means 1,000 resamples of the questions (Efron 1979).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from moai.core.errors import SourceError
from moai.reembedding.kinds import KINDS
from moai.reembedding.retrieval import MODES, Searcher
from moai.reembedding.search import Found
from moai.reembedding.versions import Version

RECALL_AT = (1, 5, 10)
NAMES = (*(f"recall@{k}" for k in RECALL_AT), "mrr", "ndcg@10")
DEEPEST = 10
"""Documents that are looked at; behind them a question counts as not answered."""
_CHUNKS = 100
"""That hold so many documents, unless one of them has very many chunks."""
_AT_ONCE = 64
_RESAMPLES = 1000
_Z = 1.959964


@dataclass(frozen=True)
class Question:
    text: str
    source_type: str
    source_id: int


@dataclass(frozen=True)
class Figures:
    """Of one version and mode."""

    ranks: tuple[int | None, ...]
    """Of the right document, by question; None where it is not among the first DEEPEST."""

    @cached_property
    def values(self) -> dict[str, float]:
        return {name: float(np.mean(self._scores(name))) for name in NAMES}

    @cached_property
    def intervals(self) -> dict[str, tuple[float, float]]:
        number = len(self.ranks)
        found = {f"recall@{k}": wilson(sum(self._scores(f"recall@{k}")), number) for k in RECALL_AT}
        chosen = np.random.default_rng(0).integers(number, size=(_RESAMPLES, number))
        for name in ("mrr", "ndcg@10"):
            low, high = np.percentile(np.array(self._scores(name))[chosen].mean(axis=1), (2.5, 97.5))
            found[name] = (float(low), float(high))
        return found

    def _scores(self, name: str) -> list[float]:
        if name == "mrr":
            return [1 / rank if rank else 0.0 for rank in self.ranks]
        if name == "ndcg@10":
            return [1 / math.log2(1 + rank) if rank else 0.0 for rank in self.ranks]
        k = int(name.partition("@")[2])
        return [float(rank is not None and rank <= k) for rank in self.ranks]

    def as_json(self) -> dict[str, Any]:
        intervals = {name: [round(low, 4), round(high, 4)] for name, (low, high) in self.intervals.items()}
        return {name: round(value, 4) for name, value in self.values.items()} | {"intervals": intervals}


@dataclass(frozen=True)
class Measured:
    version_id: int
    questions: Sequence[Question]
    modes: Mapping[str, Figures]
    unsearchable: str | None
    """Why there are no figures for dense and hybrid."""

    def as_json(self) -> dict[str, Any]:
        said = {"unsearchable": self.unsearchable} if self.unsearchable else {}
        return {mode: figures.as_json() for mode, figures in self.modes.items()} | said


def read(path: Path) -> list[Question]:
    """Raises SourceError naming the line that is no question with an answer."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{path}: no file of questions that can be read: {error}") from error
    questions = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            question = Question(row["question"], row["source_type"], row["source_id"])
        except (ValueError, KeyError, TypeError) as error:
            raise SourceError(
                f"{path}, line {number}: not a question with its answer ({type(error).__name__}: {error}); a line is "
                f'{{"question": "...", "source_type": "case_paragraph", "source_id": 7}}'
            ) from error
        wrong = next(
            (
                f"{name} {value!r}"
                for name, value, is_right in (
                    ("question", question.text, isinstance(question.text, str) and bool(question.text.strip())),
                    ("source_type", question.source_type, question.source_type in KINDS),
                    ("source_id", question.source_id, type(question.source_id) is int),
                )
                if not is_right
            ),
            None,
        )
        if wrong:
            raise SourceError(f"{path}, line {number}: {wrong}: none that a law database has")
        questions.append(question)
    if not questions:
        raise SourceError(f"{path}: no questions in it")
    return questions


def measure(
    searcher: Searcher, version: Version, questions: Sequence[Question], *, modes: Sequence[str] | None = None
) -> Measured:
    """For each mode that the version can be searched by, or for these."""
    unsearchable = searcher.searchable(version)
    figures = {}
    with searcher.database.snapshot():
        for mode in (modes or MODES) if unsearchable is None else ("keyword",):
            ranks: list[int | None] = []
            for start in range(0, len(questions), _AT_ONCE):
                some = questions[start : start + _AT_ONCE]
                texts = [question.text for question in some]
                for question, found in zip(some, searcher.rank(version, texts, mode=mode, k=_CHUNKS)):
                    ranks.append(_rank(searcher, found, question))
            figures[mode] = Figures(tuple(ranks))
    return Measured(version.id, questions, figures, unsearchable)


def got_worse(before: Figures, after: Figures) -> list[int]:
    """Places of the questions whose answer is further down, those that fell furthest first."""
    beyond = DEEPEST + 1
    fell = [(now or beyond) - (was or beyond) for was, now in zip(before.ranks, after.ranks)]
    return sorted((place for place, by in enumerate(fell) if by > 0), key=lambda place: -fell[place])


def wilson(hits: float, number: int) -> tuple[float, float]:
    """Wilson's score interval of 95 % for `hits` of `number`."""
    share, z2 = hits / number, _Z * _Z
    middle = (share + z2 / (2 * number)) / (1 + z2 / number)
    half = _Z * math.sqrt(share * (1 - share) / number + z2 / (4 * number * number)) / (1 + z2 / number)
    return max(0.0, middle - half), min(1.0, middle + half)


def _rank(searcher: Searcher, found: Found, question: Question) -> int | None:
    ids = [chunk_id for _, chunk_id in found]
    marks = ",".join("?" * len(ids))
    rows = searcher.database.rows(f"SELECT id, source_type, source_id FROM text_chunks WHERE id IN ({marks})", ids)
    document = {row[0]: row[1:] for row in rows}
    ranked = dict.fromkeys(document[chunk_id] for chunk_id in ids if chunk_id in document)
    for rank, place in enumerate(list(ranked)[:DEEPEST], 1):
        if place == (question.source_type, question.source_id):
            return rank
    return None
