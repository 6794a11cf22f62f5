"""Duplicates in the recipe: stages that find what may be a copy, and the decision which copies go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from moai.cache.ledger import Ledger
from moai.cache.shards import ArrowShards
from moai.core.distributed import Report
from moai.core.files import digest_json
from moai.engine.executor import Executor
from moai.engine.pipeline import Pipeline
from moai.engine.progress import Progress
from moai.engine.run import Done
from moai.engine.stage import Results, Stage, run_stages
from moai.pretraining.assembly import Request
from moai.quality.buckets import EXACT, SCHEMA, Buckets
from moai.quality.corpus import Corpus, Ids
from moai.quality.duplicates import settle
from moai.quality.hashes import CONTENT
from moai.quality.verdicts import Copies


@dataclass(frozen=True)
class Duplicates:
    """Documents that go, in ascending order, and of each the one that stays in its place."""

    corpus: Corpus
    documents: Ids
    keepers: Ids
    jaccards: npt.NDArray[np.float64]

    def of_shard(self, shard: int) -> Copies:
        first, last = np.searchsorted(self.documents, self.corpus.starts[shard : shard + 2])
        keepers = self.keepers[first:last]
        shards = self.corpus.shards_of(keepers)
        rows = self.documents[first:last] - self.corpus.starts[shard]
        return Copies(rows, shards, keepers - self.corpus.starts[shards], self.jaccards[first:last])


@dataclass(frozen=True, kw_only=True)
class Search:
    """All that finding duplicates needs. `priorities` and `names` are those of the sources, `source_of` says of a shard
    which it belongs to.
    """

    wanted: Request
    executor: Executor
    staging: Path
    label: str
    report: Report
    corpus: Corpus
    source_of: Ids
    priorities: Sequence[int]
    names: Sequence[str]

    def duplicates(self, kept: npt.NDArray[np.bool_]) -> Duplicates:
        """Of the documents that are kept so far: a bool each."""
        equal = self._run(Buckets(name="exact", corpus=self.corpus, key=EXACT))
        ids = np.unique(equal)
        return self._settled(ids, kept, equal, np.empty((0, 2), np.int64), np.empty(0))

    def _settled(
        self,
        ids: Ids,
        kept: npt.NDArray[np.bool_],
        equal: Ids,
        pairs: Ids,
        jaccards: npt.NDArray[np.float64],
    ) -> Duplicates:
        """`ids` are all documents that `equal` (first of a class, another one) and `pairs` speak of."""
        order = self._order(ids)
        place = np.empty(len(ids), np.int64)
        place[order] = np.arange(len(ids))
        classes = np.arange(len(ids))
        first, other = (place[np.searchsorted(ids, side)] for side in equal.T)
        classes[other] = first
        found = settle(kept[ids[order]], classes, place[np.searchsorted(ids, pairs)], jaccards)
        goes = np.flatnonzero(found.keeper >= 0)
        documents, keepers = ids[order[goes]], ids[order[found.keeper[goes]]]
        ascending = np.argsort(documents)
        return Duplicates(self.corpus, documents[ascending], keepers[ascending], found.jaccard[goes][ascending])

    def _order(self, ids: Ids) -> Ids:
        """How documents are taken: the highest priority first, then by the hash of their content; of equal ones in two
        sources by the name of the source.
        """
        high, low = self.corpus.take("document_hash", CONTENT, ids).T
        sources = self.source_of[self.corpus.shards_of(ids)]
        by_name = np.argsort(np.argsort(np.array(self.names)))
        return np.lexsort((ids, by_name[sources], low, high, -np.array(self.priorities)[sources]))

    def _run(self, source: Buckets) -> Ids:
        """The pairs that a stage finds."""
        key = digest_json(source.identity)[:40]
        cache = self.wanted.cache
        progress = Progress(self.corpus.documents, label=self.label, doing="Comparing")

        def read(_: None, results: Results) -> Ids:
            Ledger(cache).note_transform(key, source.identity)
            return np.concatenate([pairs_in(cache, done) for done in results[0]])

        sink = ArrowShards(cache=cache, staging=self.staging, schema=SCHEMA)
        stage = Stage(
            pipelines=lambda _: [Pipeline(source=source, transforms=(), sink=sink, transform_key=key)],
            reduce=read,
            watch=lambda *_: _Watch(progress, self.report),
        )
        found: Ids = run_stages([stage], self.executor)
        return found


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
        self.progress.end()


def pairs_in(cache: Path, done: Done) -> Ids:
    with pa.memory_map(str(Ledger(cache).shard(done.receipt.shard_key))) as file:
        table = pa.ipc.open_stream(file).read_all()
    return np.stack([table[name].to_numpy() for name in SCHEMA.names], axis=1)
