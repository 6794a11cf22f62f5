"""Duplicates in the recipe: stages that find what may be a copy, and the decision which copies go."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from moai.cache.ledger import Ledger
from moai.cache.shards import ArrowShards
from moai.core.distributed import Report
from moai.core.files import digest_json
from moai.engine.executor import Executor
from moai.engine.pipeline import Pipeline
from moai.engine.progress import Progress
from moai.engine.run import Done
from moai.engine.stage import Results, Stage, run_stages
from moai.pretraining.against import Against
from moai.pretraining.assembly import Request
from moai.pretraining.similarity import Comparison, Shards
from moai.quality import bands
from moai.quality.bands import FLOOR, Bands, slots_for
from moai.quality.buckets import DOCUMENTS_AT_ONCE, EXACT, SAME_WORDS, SCHEMA, Buckets, Key
from moai.quality.clusters import Clusters, Pair
from moai.quality.corpus import Corpus, Ids, ShardSidecars
from moai.quality.crowds import Crowds
from moai.quality.duplicates import settle
from moai.quality.hashes import CONTENT
from moai.quality.minhash import SIGNATURE, agreement
from moai.quality.verdicts import Copies

_ROWS = 1 << 24
"""Pairs in a record batch, so that the columns of a shard can be mapped whole."""


@dataclass(frozen=True)
class Duplicates:
    """Documents that go, in ascending order, and of each the one that stays in its place."""

    corpus: Corpus
    own: int
    """Shards of the corpus that are no others' yet."""
    documents: Ids
    keepers: Ids
    jaccards: npt.NDArray[np.float64]
    clusters: Clusters

    def of_shard(self, shard: int) -> Copies:
        first, last = np.searchsorted(self.documents, self.corpus.starts[shard : shard + 2])
        keepers = self.keepers[first:last]
        shards = self.corpus.shards_of(keepers)
        rows, keeper_rows = self.documents[first:last] - self.corpus.starts[shard], keepers - self.corpus.starts[shards]
        against = shards >= self.own
        return Copies(rows, shards - self.own * against, keeper_rows, self.jaccards[first:last], against)


@dataclass(frozen=True)
class _Compared:
    pairs: Ids
    jaccards: npt.NDArray[np.float64]
    shown: list[Pair]
    """Some of them with their texts."""

    @classmethod
    def nothing(cls) -> _Compared:
        return cls(np.empty((0, 2), np.int64), np.empty(0), [])

    def and_(self, more: _Compared) -> _Compared:
        pairs, jaccards = np.concatenate((self.pairs, more.pairs)), np.concatenate((self.jaccards, more.jaccards))
        return _Compared(pairs, jaccards, self.shown + more.shown)


@dataclass(frozen=True, kw_only=True)
class Search:
    """All that finding duplicates needs. `shards` are the same as `own`; `source_of` says which source each belongs to,
    `priorities` and `names` are those of the sources. Documents of `against` are numbered behind all others.
    """

    wanted: Request
    executor: Executor
    staging: Path
    label: str
    report: Report
    own: tuple[ShardSidecars, ...]
    against: Against | None
    shards: Shards
    source_of: Ids
    priorities: Sequence[int]
    names: Sequence[str]

    @cached_property
    def corpus(self) -> Corpus:
        return Corpus((*self.own, *(self.against.shards if self.against else ())))

    @cached_property
    def own_documents(self) -> int:
        return int(self.corpus.starts[len(self.own)])

    def duplicates(self, kept: npt.NDArray[np.bool_]) -> Duplicates:
        """Of the documents that are kept so far: a bool each."""
        config = self.wanted.config
        kept = np.concatenate((kept, self.against.stays)) if self.against else kept
        if config.dedup == "exact":
            return self._settled(kept, self._equal(EXACT), _Compared.nothing(), 1.0)
        equal, slots = self._equal(SAME_WORDS), slots_for(config.dedup_similarity)
        tables = self._tables(Bands(name="bands", corpus=self.corpus, slots=slots), bands.SCHEMA)
        crowds = Crowds.of(pa.concat_tables([one.filter(one["crowd"]) for one in tables]), self.corpus, FLOOR[slots])
        compared = self._compared(self._ours(_merged(tables, self.corpus.documents)))
        while True:
            settled = self._settled(kept, equal, compared, config.dedup_similarity)
            stays = kept.copy()
            stays[settled.documents] = False
            more = crowds.uncompared(_of_classes(stays, equal), compared.pairs, self._order, self._ours)
            if not len(more):
                return settled
            compared = compared.and_(self._compared(more))

    def _equal(self, key: Key) -> Ids:
        """The first document of each class beside each other one."""
        return _columns(pa.concat_tables(self._tables(Buckets(name=key.signal, corpus=self.corpus, key=key), SCHEMA)))

    def _ours(self, pairs: Ids) -> Ids:
        """Without those of two documents of `against`, which both stay."""
        return pairs[pairs[:, 0] < self.own_documents]

    def _compared(self, pairs: Ids) -> _Compared:
        """The similarity of each; with a document of `against`, whose text is not read, as the signatures have it."""
        old = pairs[:, 1] >= self.own_documents
        with_old = pairs[old]
        ids = np.unique(with_old)
        signatures = self.corpus.take("min_hash", SIGNATURE, ids) if len(ids) else np.empty((0, len(SIGNATURE)))
        one, other = np.searchsorted(ids, with_old).T
        estimated = agreement(signatures[one], signatures[other]) if len(ids) else np.empty(0)
        return self._exactly(pairs[~old]).and_(_Compared(with_old, estimated, []))

    def _exactly(self, pairs: Ids) -> _Compared:
        if not len(pairs):
            return _Compared.nothing()
        folder = self.staging / f"pairs-{uuid.uuid4().hex}"
        folder.mkdir()
        compared = Comparison(
            cache=self.wanted.cache, folder=folder, corpus=self.corpus, shards=self.shards, pairs=pairs
        )
        chunks = compared.chunks()
        read, numbers = compared.reading(chunks, self.staging)
        size = sum(self.shards[at][1].shard.nominal_bytes for some in numbers for at in some)

        def files(_: None, results: Results) -> dict[int, str]:
            shards = zip((at for some in numbers for at in some), (done for finished in results for done in finished))
            return {at: str(Ledger(self.wanted.cache).shard(done.receipt.shard_key)) for at, done in shards}

        reading = Stage(pipelines=lambda _: read, reduce=files, watch=self._watch("Reading candidates", size))
        comparing = Stage(
            pipelines=lambda shingles: [compared.comparing(chunks, shingles, self.staging)],
            reduce=lambda _, results: _Compared(
                pairs, compared.jaccards(results), compared.shown(results, self.wanted.config.dedup_similarity)
            ),
            watch=self._watch("Comparing candidates", len(pairs)),
        )
        found: _Compared = run_stages([reading, comparing], self.executor)
        return found

    def _settled(self, kept: npt.NDArray[np.bool_], equal: Ids, compared: _Compared, similarity: float) -> Duplicates:
        """What goes, by the classes of `equal` (its first document, another one) and the pairs that are similar
        enough.
        """
        alike = compared.jaccards >= similarity
        pairs, jaccards = compared.pairs[alike], compared.jaccards[alike]
        ids = np.unique(np.concatenate((equal.ravel(), pairs.ravel())))
        order = self._order(ids)
        place = np.empty(len(ids), np.int64)
        place[order] = np.arange(len(ids))
        classes = np.arange(len(ids))
        first, other = (place[np.searchsorted(ids, side)] for side in equal.T)
        classes[other] = first
        found = settle(kept[ids[order]], classes, place[np.searchsorted(ids, pairs)], jaccards)
        goes = np.flatnonzero(found.keeper >= 0)
        goes = goes[ids[order[goes]] < self.own_documents]
        documents, keepers = ids[order[goes]], ids[order[found.keeper[goes]]]
        jaccards = found.jaccard[goes]
        clusters = Clusters.of(similarity, keepers, jaccards, compared.jaccards, compared.shown)
        at = np.argsort(documents)
        return Duplicates(self.corpus, len(self.own), documents[at], keepers[at], jaccards[at], clusters)

    def _order(self, ids: Ids) -> Ids:
        """How documents are taken: those of `against`, then the highest priority first, then by the hash of their
        content; of equal ones in two sources by the name of the source.
        """
        high, low = self.corpus.take("document_hash", CONTENT, ids).T
        of_against = len(self.corpus.shards) - len(self.own)
        sources = np.concatenate((self.source_of, np.full(of_against, len(self.names))))[self.corpus.shards_of(ids)]
        by_name = np.argsort(np.argsort(np.array((*self.names, ""))))
        priorities = np.array((*self.priorities, max(self.priorities) + 1))
        return np.lexsort((ids, by_name[sources], low, high, -priorities[sources]))

    def _tables(self, source: Buckets | Bands, schema: pa.Schema) -> list[pa.Table]:
        """What a stage over sidecars finds, a table a shard, mapped."""
        key, cache = digest_json(source.identity)[:40], self.wanted.cache

        def read(_: None, results: Results) -> list[pa.Table]:
            Ledger(cache).note_transform(key, source.identity)
            return [_table(cache, done) for done in results[0]]

        sink = ArrowShards(cache=cache, staging=self.staging, schema=schema, rows_per_batch=_ROWS)
        stage = Stage(
            pipelines=lambda _: [Pipeline(source=source, transforms=(), sink=sink, transform_key=key)],
            reduce=read,
            watch=self._watch("Looking for copies", sum(shard.nominal_bytes for shard in source.shards())),
        )
        found: list[pa.Table] = run_stages([stage], self.executor)
        return found

    def _watch(self, doing: str, size: int) -> Callable[[Any, Sequence[Pipeline]], _Watch]:
        return lambda *_: _Watch(Progress(size, label=self.label, doing=doing), self.report)


@dataclass
class _Watch:
    progress: Progress
    report: Report

    def on_documents(self, number: int) -> None:
        self.progress.on_documents(number)
        self.report(self.progress.snapshot())

    def on_shard(self, done: Done) -> None:
        self.progress.on_shard(done)
        self.report(self.progress.snapshot())

    def close(self, results: Results) -> None:
        if self.progress.shards:
            self.progress.end()


def _table(cache: Path, done: Done) -> pa.Table:
    with pa.memory_map(str(Ledger(cache).shard(done.receipt.shard_key))) as file:
        return pa.ipc.open_stream(file).read_all()


def _columns(table: pa.Table) -> Ids:
    return np.stack([table[name].to_numpy() for name in ("first", "second")], axis=1)


def _merged(tables: Sequence[pa.Table], documents: int) -> Ids:
    """The pairs of all bands, ordered, each once. A range of documents at a time: what is looked at is mapped."""
    sides = [[one[name].to_numpy() for name in ("first", "second")] for one in map(_pairs_of, tables)]
    found = [np.empty(0, np.int64)]
    for start in range(0, documents, DOCUMENTS_AT_ONCE):
        codes = []
        for first, second in sides:
            some = slice(*np.searchsorted(first, (start, start + DOCUMENTS_AT_ONCE)))
            codes.append(first[some] * documents + second[some])
        found.append(np.unique(np.concatenate(codes)))
    return np.stack(np.divmod(np.concatenate(found), max(1, documents)), axis=1)


def _pairs_of(table: pa.Table) -> pa.Table:
    """The rows before those of crowded buckets."""
    return table.slice(0, len(table) - pc.sum(table["crowd"], min_count=0).as_py())


def _of_classes(stays: npt.NDArray[np.bool_], equal: Ids) -> npt.NDArray[np.bool_]:
    """Of the first document of each class whether any of the class stays; the first one speaks for all."""
    found = stays.copy()
    np.logical_or.at(found, equal[:, 0], stays[equal[:, 1]])
    return found
