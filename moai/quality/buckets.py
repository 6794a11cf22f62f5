"""Which documents may be copies: those that share the value of a key. Read from sidecars alone, no text is.

    source = Buckets(name="exact", corpus=corpus, key=EXACT)
    pipeline = Pipeline(source=source, transforms=(), sink=ArrowShards(schema=SCHEMA, ...), transform_key=...)

Each key is sorted in parts of some million documents, a shard of a stage each: a part takes about 150 bytes a document
that has a copy, 30 of the others, however many documents there are.
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
from moai.quality.corpus import Corpus, Ids
from moai.quality.hashes import CONTENT
from moai.quality.minhash import WORDS

DOCUMENTS_AT_ONCE = 1 << 22
"""Of one key, sorted together."""
SCHEMA = pa.schema([("first", pa.int64()), ("second", pa.int64())])
"""Two documents of one bucket, ordered by the first."""
_MIX = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Key:
    """A key of documents: the values of columns of one signal. Documents that share it are equal."""

    signal: str
    columns: tuple[str, str]


EXACT = Key("document_hash", CONTENT)
"""The texts are the same, byte for byte."""
SAME_WORDS = Key("min_hash", WORDS)


@dataclass(frozen=True, kw_only=True)
class Buckets:
    """Of each bucket its first document beside each other one."""

    name: str
    corpus: Corpus
    key: Key
    version: int = 1

    @property
    def identity(self) -> dict[str, Any]:
        return {"buckets": self.version, "signal": self.key.signal, "columns": self.key.columns}

    def shards(self) -> Iterator[Shard]:
        parts, content = parts_of(self.corpus), self.corpus.content(self.key.signal)
        for part in range(parts):
            digest = digest_json([content, part, parts])[:32]
            size = self.corpus.documents // parts
            yield Shard(f"{self.name}:{part:05d}", (part, parts), "", size, Raw(digest, (0,), (0,)))

    def digest(self, shard: Shard) -> Raw:
        assert shard.raw
        return shard.raw

    def read(self, shard: Shard, meter: Meter) -> Iterator[pa.RecordBatch]:
        assert shard.raw
        raw = shard.raw
        meter.named = lambda _: raw
        ids, values = gathered(self.corpus, self.key, *shard.segments)
        order = np.lexsort((ids, values[1], values[0]))
        ids, values = ids[order], [value[order] for value in values]
        starts = runs(*values)
        first = ids[np.repeat(starts, np.diff([*starts, len(ids)]))]
        copies = first != ids
        pairs = np.stack((first[copies], ids[copies]), axis=1)
        yield batch(pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))])

    def remember(self, shard: Shard, raw: Raw) -> None:
        pass


def parts_of(corpus: Corpus) -> int:
    """Into how many parts a key is split, so that each can be sorted at once."""
    parts = 1
    while corpus.documents > parts * DOCUMENTS_AT_ONCE:
        parts *= 2
    return parts


def gathered(corpus: Corpus, key: Key, part: int, parts: int) -> tuple[Ids, list[npt.NDArray[np.uint64]]]:
    """The documents whose key belongs to this part, and their keys."""
    found: list[tuple[Ids, ...]] = []
    for start, columns, known in corpus.scan(key.signal, key.columns):
        mine = known & ((columns[0] * _MIX) >> np.uint64(32) & np.uint64(parts - 1) == np.uint64(part))
        found.append((start + np.flatnonzero(mine), *(column[mine] for column in columns)))
    ids, *values = (np.concatenate(column) for column in zip(*found))
    return ids, values


def runs(*values: npt.NDArray[np.uint64]) -> Ids:
    """Where equal values begin, in columns that are sorted."""
    new = np.ones(len(values[0]), bool)
    new[1:] = np.logical_or.reduce([value[1:] != value[:-1] for value in values])
    return np.flatnonzero(new)


def batch(pairs: Ids) -> pa.RecordBatch:
    return pa.record_batch([pa.array(np.ascontiguousarray(side)) for side in pairs.T], schema=SCHEMA)
