"""Which documents may be similar: those of which eight slots of the signature are the same.

    source = Bands(name="bands", corpus=corpus, slots=8)
    pipeline = Pipeline(source=source, transforms=(), sink=ArrowShards(schema=SCHEMA, ...), transform_key=...)

A shard sorts one band, or a part of it, as Buckets does. Of documents with the same words the first one speaks for all.
Of a bucket each two documents are a pair, unless so few of their slots agree that they cannot be similar enough; of one
with more than HEADS only the first so many are paired with the others, and all of its documents are listed (`crowd`):
what else is to be compared there depends on which of them stay.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from moai.core.files import digest_json
from moai.engine.pipeline import Meter, Raw, Shard
from moai.quality.buckets import parts_of, runs
from moai.quality.corpus import Corpus, Ids
from moai.quality.hashes import CONTENT
from moai.quality.minhash import SIGNATURE, SLOTS_TOGETHER, WORDS, agreement

HEADS = 8
"""Documents of a bucket that are paired with all others, as a bucket sorts them: by the hash of their content."""
FLOOR = {8: 0.65, 4: 0.31}
"""By the slots of a band: where the estimate from 112 slots lies below it, the similarity is not .8 (4.0 standard
deviations away), or not .5.
"""
SCHEMA = pa.schema([("crowd", pa.bool_()), ("first", pa.int64()), ("second", pa.int64())])
"""Pairs by their first document, the lower number; then of each crowded bucket its first document beside every one."""
_COMPARED_AT_ONCE = 1 << 18
_MIX = np.uint64(0x9E3779B97F4A7C15)


def slots_for(similarity: float) -> int:
    """How many slots a band must have to find nearly all documents of this similarity."""
    return 8 if similarity >= 0.8 else 4


@dataclass(frozen=True, kw_only=True)
class Bands:
    name: str
    corpus: Corpus
    slots: int
    version: int = 1

    @property
    def identity(self) -> dict[str, Any]:
        return {"bands": self.version, "slots": self.slots, "heads": HEADS, "floor": FLOOR[self.slots]}

    def shards(self) -> Iterator[Shard]:
        parts, content = parts_of(self.corpus), self.corpus.content("min_hash", "document_hash")
        for band in range(len(SIGNATURE) * SLOTS_TOGETHER // self.slots):
            for part in range(parts):
                raw = Raw(digest_json([content, band, part, parts])[:32], (0,), (0,))
                size = self.corpus.documents // parts
                yield Shard(f"{self.name}:{band:02d}-{part:04d}", (band, part, parts), "", size, raw)

    def digest(self, shard: Shard) -> Raw:
        assert shard.raw
        return shard.raw

    def read(self, shard: Shard, meter: Meter) -> Iterator[pa.RecordBatch]:
        assert shard.raw
        raw = shard.raw
        meter.named = lambda _: raw
        ids, values = self._shared(*shard.segments)
        ids, starts = self._sorted(ids, values)
        sizes = np.diff([*starts, len(ids)])
        signatures = self._signatures(ids)
        pairs = [self._pairs(ids, signatures, starts, sizes, head) for head in range(HEADS) if (sizes > head + 1).any()]
        found = np.sort(np.concatenate(pairs), axis=1) if pairs else np.empty((0, 2), np.int64)
        yield _batch(found[np.lexsort(found.T[::-1])], crowd=False)
        crowded = np.repeat(sizes > HEADS + 1, sizes)
        heads = ids[np.repeat(starts, sizes)]
        yield _batch(np.stack((heads[crowded], ids[crowded]), axis=1), crowd=True)

    def remember(self, shard: Shard, raw: Raw) -> None:
        pass

    def _shared(self, band: int, part: int, parts: int) -> tuple[Ids, npt.NDArray[np.uint64]]:
        """The documents of this part of a band that share its value with another one, in ascending order."""
        each = SLOTS_TOGETHER // self.slots
        found: list[tuple[Ids, npt.NDArray[np.uint64]]] = []
        for start, (column,), known in self.corpus.scan("min_hash", (SIGNATURE[band // each],)):
            value = column if each == 1 else column >> np.uint64(32 * (band % each)) & np.uint64(0xFFFFFFFF)
            mine = known & ((value * _MIX) >> np.uint64(32) & np.uint64(parts - 1) == np.uint64(part))
            found.append((start + np.flatnonzero(mine), value[mine]))
        ids, values = (np.concatenate(column) for column in zip(*found))
        order = np.argsort(values, kind="stable")
        sizes = np.diff([*runs(values[order]), len(order)])
        shared = np.sort(order[np.repeat(sizes > 1, sizes)])
        return ids[shared], values[shared]

    def _sorted(self, ids: Ids, values: npt.NDArray[np.uint64]) -> tuple[Ids, Ids]:
        """One document for each sequence of words, bucket by bucket, and where buckets begin."""
        high, low = self.corpus.take("min_hash", WORDS, ids).T
        order = np.lexsort((ids, low, high, values))
        first = np.sort(order[runs(values[order], high[order], low[order])])
        ids, values = ids[first], values[first]
        contents = self.corpus.take("document_hash", CONTENT[:1], ids)[:, 0]
        order = np.lexsort((ids, contents, values))
        return ids[order], runs(values[order])

    def _signatures(self, ids: Ids) -> npt.NDArray[np.uint64]:
        order = np.argsort(ids)
        found = np.empty((len(ids), len(SIGNATURE)), np.uint64)
        found[order] = self.corpus.take("min_hash", SIGNATURE, ids[order])
        return found

    def _pairs(
        self, ids: Ids, signatures: npt.NDArray[np.uint64], starts: Ids, sizes: npt.NDArray[Any], head: int
    ) -> Ids:
        """Of all buckets the document at place `head` beside those behind it."""
        more = np.maximum(sizes - head - 1, 0)
        heads = np.repeat(starts + head, more)
        behind = heads + 1 + np.arange(len(heads)) - np.repeat(np.cumsum(more) - more, more)
        kept = likely(signatures, heads, behind, FLOOR[self.slots])
        return np.stack((ids[heads[kept]], ids[behind[kept]]), axis=1)


def likely(
    signatures: npt.NDArray[np.uint64], one: npt.NDArray[Any], other: npt.NDArray[Any], floor: float
) -> npt.NDArray[np.bool_]:
    """Whether enough slots agree, of the signatures at these places."""
    kept = np.empty(len(one), bool)
    for at in range(0, len(one), _COMPARED_AT_ONCE):
        some = slice(at, at + _COMPARED_AT_ONCE)
        kept[some] = agreement(signatures[one[some]], signatures[other[some]]) >= floor
    return kept


def _batch(pairs: Ids, *, crowd: bool) -> pa.RecordBatch:
    columns = [pa.array(np.full(len(pairs), crowd)), *(pa.array(np.ascontiguousarray(side)) for side in pairs.T)]
    return pa.record_batch(columns, schema=SCHEMA)
