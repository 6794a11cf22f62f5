"""The stages that compare candidates: one reads the documents that are needed, one compares pair by pair."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from moai.cache.ledger import Ledger
from moai.cache.shards import ArrowShards
from moai.core.files import digest_json
from moai.engine.documents import read_documents
from moai.engine.part import Map
from moai.engine.pipeline import Pipeline, Raw, shard_key
from moai.engine.run import Done
from moai.engine.stage import Results
from moai.pretraining.measuring import Measured
from moai.quality.clusters import Pair
from moai.quality.corpus import Corpus, Ids
from moai.quality.hashes import CONTENT
from moai.quality.similar import PAIRS_SCHEMA, SHINGLES_SCHEMA, SHOWN, Chunk, PairSource, Shingles
from moai.quality.verdicts import Judged, JudgedSource, write_verdict

_NEAREST = 100
Shards = Sequence[tuple[Measured, Done]]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Pairs of documents, ordered, and the stages that find their similarity. `shards` are those of the corpus."""

    cache: Path
    folder: Path
    """For the lists of pairs and of documents."""
    corpus: Corpus
    shards: Shards
    pairs: Ids

    def chunks(self) -> list[Chunk]:
        """The pairs by the shard of their first document, each list named by the contents of its documents."""
        cuts = np.searchsorted(self.pairs[:, 0], self.corpus.starts)
        found = []
        for first, last in itertools.pairwise(cuts):
            if first == last:
                continue
            pairs = self.pairs[first:last]
            ids = np.unique(pairs)
            contents = self.corpus.take("document_hash", CONTENT, ids)
            content = xxhash.xxh3_128_hexdigest(contents[np.searchsorted(ids, pairs)].tobytes())
            path = self.folder / f"{content}.npy"
            np.save(path, pairs, allow_pickle=False)
            found.append(Chunk(str(path), content, len(pairs)))
        return found

    def source(self, chunks: Sequence[Chunk], shingles: Mapping[int, str]) -> PairSource:
        return PairSource(name="pairs", chunks=tuple(chunks), starts=self.corpus.starts, shingles=shingles)

    def reading(self, chunks: Sequence[Chunk], staging: Path) -> tuple[list[Pipeline], list[list[int]]]:
        """What reads the documents of the chunks that were not compared yet, and the shards that it is about, for each
        pipeline.
        """
        key = _key(self.source((), {}))
        new = [chunk for chunk in chunks if not Ledger(self.cache).receipt(_chunk_key(chunk, key))]
        wanted = np.unique(np.concatenate([np.load(chunk.path).ravel() for chunk in new] or [np.empty(0, np.int64)]))
        cuts = np.searchsorted(wanted, self.corpus.starts)
        by_input: dict[int, list[int]] = {}
        for at in np.flatnonzero(np.diff(cuts)).tolist():
            by_input.setdefault(id(self.shards[at][0]), []).append(at)
        pipelines = []
        for numbers in by_input.values():
            verdicts = {}
            for at in numbers:
                done = self.shards[at][1]
                found = read_documents(Ledger(self.cache).documents(done.receipt.shard_key))
                away = np.ones(self.corpus.shards[at].rows, bool)
                away[wanted[cuts[at] : cuts[at + 1]] - self.corpus.starts[at]] = False
                verdicts[done.shard.id] = write_verdict(
                    self.folder, done.shard.id, done.receipt.raw.digest, found, away
                )
            pipelines.append(self._pipeline(self.shards[numbers[0]][0], verdicts, staging))
        return pipelines, list(by_input.values())

    def comparing(self, chunks: Sequence[Chunk], shingles: Mapping[int, str], staging: Path) -> Pipeline:
        source = self.source(chunks, shingles)
        sink = ArrowShards(cache=self.cache, staging=staging, schema=PAIRS_SCHEMA, rows_per_batch=1 << 16)
        return Pipeline(source=source, transforms=(), sink=sink, transform_key=_key(source))

    def jaccards(self, results: Results) -> npt.NDArray[np.float64]:
        """Of the pairs, in their order."""
        tables = [_table(self.cache, done)["jaccard"].to_numpy() for done in results[0]]
        return np.concatenate(tables) if tables else np.empty(0)

    def shown(self, results: Results, similarity: float) -> list[Pair]:
        """Of those of which the texts are known the nearest to this similarity."""
        tables = (_table(self.cache, done).slice(0, SHOWN) for done in results[0])
        pairs = (tuple(row.values()) for table in tables for row in table.to_pylist())
        return heapq.nsmallest(_NEAREST, pairs, key=lambda pair: (abs(pair[0] - similarity), pair))

    def _pipeline(self, measured: Measured, verdicts: Mapping[str, Any], staging: Path) -> Pipeline:
        maps = tuple(part for part in measured.chain if isinstance(part, Map))
        identity = measured.identity((*maps, Shingles()))
        key = digest_json(identity)[:40]
        Ledger(self.cache).note_transform(key, identity)
        return Pipeline(
            source=JudgedSource(source=measured.read_for(key), verdicts=verdicts),
            transforms=(measured.stream.to_text, Judged(), *maps, Shingles()),
            sink=ArrowShards(cache=self.cache, staging=staging, schema=SHINGLES_SCHEMA, rows_per_batch=1 << 16),
            transform_key=key,
        )


def _key(source: PairSource) -> str:
    return digest_json(source.identity)[:40]


def _chunk_key(chunk: Chunk, key: str) -> str:
    return shard_key(Raw(chunk.content, (), ()), key)


def _table(cache: Path, done: Done) -> pa.Table:
    with pa.memory_map(str(Ledger(cache).shard(done.receipt.shard_key))) as file:
        return pa.ipc.open_stream(file).read_all()
