"""Ask a law database: by words, by meaning, or by both at once.

    with Searcher.open("lawfirm_v2.db") as search:                   # what the serving alias names; or version_id=5
        for hit in search.ask("이혼하면 재산은 어떻게 나누나", top=5):
            print(hit.citation, hit.text)
        search.ask_all(["상속 포기", "임차인의 갱신 요구"], mode="keyword", source_types=["statute_article"])

The model is loaded by the first question that needs it, and kept. `hybrid` joins both lists by reciprocal rank fusion
(Cormack, Clarke and Buettcher 2009): a chunk scores the sum of weight / (10 + rank), where the words weigh 1 and the
model's list what the version's questions have shown, or 0.1. A Searcher belongs to one thread.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from moai.core.errors import ConfigError, DamagedError, MoaiError
from moai.reembedding import keyword, search, vectors, versions
from moai.reembedding.context import Templates
from moai.reembedding.database import Database
from moai.reembedding.embed import TokenBudget, encode_all
from moai.reembedding.encoders import SentenceEncoder, SentenceModel
from moai.reembedding.kinds import KINDS
from moai.reembedding.loading import load_encoder
from moai.reembedding.making import templates_of
from moai.reembedding.search import Found, Vectors
from moai.reembedding.versions import Version

logger = logging.getLogger(__name__)

MODES = ("hybrid", "keyword", "dense")
RANK_CONSTANT, DENSE_WEIGHT = 10, 0.1
"""With these no model, not even one that knows no Korean, took recall from the words (benchmarks/RESULTS.md). With the
authors' 60 a place far down in both lists weighs more than the first place in one.
"""
_MOST_KNOWN = 10_000
DEPTH = 100
"""Chunks of each list that are joined."""


@dataclass(frozen=True)
class Hit:
    chunk_id: int
    score: float
    """A cosine, a BM25, or the sum of weights over ranks: by mode."""
    citation: str
    source_type: str
    source_id: int
    start_char: int
    end_char: int
    text: str
    """As it was embedded, context included."""
    context_chars: int


@dataclass
class Searcher:
    database: Database
    version_id: int | None = None
    """None for the version that the serving alias names at the moment of each question."""
    model: str | None = None
    """Where the version's model is now, if it has moved."""
    device: str = "auto"
    _encoder: tuple[int, SentenceEncoder] | None = field(default=None, repr=False)
    _has_vectors: bool = False
    _known: dict[str, Vectors] = field(default_factory=dict, repr=False)

    @classmethod
    def open(
        cls, db: str | Path, *, version_id: int | None = None, model: str | None = None, device: str = "auto"
    ) -> Searcher:
        """Raises SourceError for what is no law database."""
        database = Database.open(Path(db))
        return cls(database, version_id, model, device, _has_vectors=vectors.load(database))

    def __enter__(self) -> Searcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.database.close()

    def ask(self, question: str, *, mode: str = "hybrid", top: int = 5, source_types: Sequence[str] = ()) -> list[Hit]:
        return self.ask_all([question], mode=mode, top=top, source_types=source_types)[0]

    def ask_all(
        self, questions: Sequence[str], *, mode: str = "hybrid", top: int = 5, source_types: Sequence[str] = ()
    ) -> list[list[Hit]]:
        """The best `top` chunks of each question, best first; all from one moment of the database.

        Raises ConfigError for a mode or a type that is not there, and where the version's model is gone.
        """
        if mode not in MODES:
            raise ConfigError(f"mode = {mode!r}: choose from {', '.join(MODES)}")
        for name in source_types:
            if name not in KINDS:
                raise ConfigError(f"source_type = {name!r}: choose from {', '.join(KINDS)}")
        if not all(question.strip() for question in questions):
            raise ConfigError("nothing to search for: a question is empty")
        encoder = self._opened(self._version()) if mode != "keyword" else None
        with self.database.snapshot():
            version = self._version()
            found = self.rank(version, questions, mode=mode, k=top, source_types=source_types, encoder=encoder)
            return [self._hits(version, ranked) for ranked in found]

    def rank(
        self,
        version: Version,
        questions: Sequence[str],
        *,
        mode: str,
        k: int,
        source_types: Sequence[str] = (),
        encoder: SentenceEncoder | None = None,
    ) -> list[Found]:
        """(score, chunk id) of each question, best first."""
        depth = max(k, DEPTH) if mode == "hybrid" else k
        dense: list[Found] = [[] for _ in questions]
        words: list[Found] = [[] for _ in questions]
        if mode != "keyword":
            asked = self._asked(encoder or self._opened(version), questions)
            dense = self._dense(version, asked, depth, source_types)
        if mode != "dense":
            words = [
                keyword.find(self.database, version.id, question, k=depth, source_types=source_types)
                for question in questions
            ]
        if mode != "hybrid":
            return words if mode == "keyword" else dense
        weight = float(version.made.get("dense_weight", DENSE_WEIGHT))
        return [fuse(by_word, by_meaning, dense_weight=weight)[:k] for by_word, by_meaning in zip(words, dense)]

    def _asked(self, encoder: SentenceEncoder, questions: Sequence[str]) -> Vectors:
        """A question is encoded once while this model is loaded: an evaluation asks it in many ways."""
        new = [question for question in dict.fromkeys(questions) if question not in self._known]
        if new:
            if len(self._known) > _MOST_KNOWN:
                self._known.clear()
                new = list(dict.fromkeys(questions))
            self._known.update(zip(new, query_vectors(encoder, new)))
        return np.stack([self._known[question] for question in questions])

    def searchable(self, version: Version) -> str | None:
        """Why the version cannot be searched by meaning; None where it can."""
        try:
            self._opened(version)
        except MoaiError as error:
            return str(error)
        return None

    def _version(self) -> Version:
        if self.version_id is not None:
            return versions.get(self.database, self.version_id)
        found = versions.serving(self.database)
        if found is None:
            raise ConfigError("no version serves yet: activate one, or name one with --version-id")
        return found

    def _opened(self, version: Version) -> SentenceEncoder:
        if self._encoder is None or self._encoder[0] != version.id:
            made = version.made
            model = SentenceModel.find(self.model or str(made.get("model", version.model_name)), device=self.device)
            if made and model.revision != made["revision"]:
                raise ConfigError(
                    f"version {version.id} was made with revision {made['revision'][:12]} of its model, this is "
                    f"{model.revision[:12]}: scores would mean nothing; name the version's model with --model"
                )
            encoder = load_encoder(model, "float32")
            assert isinstance(encoder, SentenceEncoder)
            self._encoder = (version.id, encoder)
            self._known.clear()
        return self._encoder[1]

    def _dense(self, version: Version, asked: Vectors, k: int, source_types: Sequence[str]) -> list[Found]:
        made = version.made
        if (noted := made.get("faiss")) and not source_types:
            return search.search_index(self.database.path, version.id, noted, asked, k=k)
        if self._has_vectors and made.get("sqlite_vec") == asked.shape[1]:
            return [vectors.find(self.database, version.id, row, k=k, source_types=source_types) for row in asked]
        return search.brute_force(self.database, version.id, asked, k=k, source_types=source_types)

    def _hits(self, version: Version, ranked: Found) -> list[Hit]:
        templates = templates_of(version.made)
        sql = (
            "SELECT source_type, source_id, coalesce(start_char, 0), coalesce(end_char, length(text)), text, "
            "coalesce(json_extract(meta, '$.context_chars'), 0) FROM text_chunks WHERE id = ? AND "
            "embedding_version_id = ?"
        )
        hits = []
        for score, chunk_id in ranked:
            row = self.database.row(sql, (chunk_id, version.id))
            if row is None and not version.made.get("faiss"):
                continue  # another program has deleted the chunk; the next run forgets its terms
            if row is None:
                kind = version.made["faiss"]["kind"]
                raise DamagedError(
                    f"{search.index_path(self.database.path, version.id)}: chunk {chunk_id} is none of version "
                    f"{version.id}: this is another version's index; delete that file and build it again with --faiss "
                    f"{kind}"
                )
            citation = _cited(self.database, templates, str(row[0]), int(row[1]))
            hits.append(Hit(chunk_id, score, citation, *row))
        return hits


def fuse(words: Found, dense: Found, *, dense_weight: float = DENSE_WEIGHT) -> Found:
    """One list of both; equal scores by chunk id."""
    scores: dict[int, float] = defaultdict(float)
    for weight, found in ((1.0, words), (dense_weight, dense if dense_weight else [])):
        for rank, (_, chunk_id) in enumerate(found, 1):
            scores[chunk_id] += weight / (RANK_CONSTANT + rank)
    return sorted(((score, chunk_id) for chunk_id, score in scores.items()), key=lambda hit: (-hit[0], hit[1]))


def query_vectors(encoder: SentenceEncoder, questions: Sequence[str]) -> Vectors:
    limit, rows = encoder.tokens.max_tokens, []
    for question in questions:
        ids = encoder.tokens.question_ids(question)
        if len(ids) > limit:
            said = "The question has %s tokens, the model reads %s: what is behind them is not searched for"
            logger.warning(said, f"{len(ids):,}", f"{limit:,}")
        rows.append(ids[:limit])
    return encode_all(encoder, rows, TokenBudget())


def _cited(database: Database, templates: Templates, source_type: str, source_id: int) -> str:
    if source_type in KINDS and not all(database.columns(table) for table in KINDS[source_type].tables()):
        return f"{source_type} {source_id}"
    return templates.citations(database, source_type, [source_id])[source_id]
