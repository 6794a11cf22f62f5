"""What was measured of all documents, in one numbering: shard after shard, row after row.

    corpus = Corpus((ShardSidecars(2500, {"min_hash": "/.../ab12.arrow"}, {"min_hash": "ab12"}), ...))
    for first, (band,), known in corpus.scan("min_hash", ("band_00",)): ...
    corpus.take("document_hash", CONTENT, documents)            # uint64[documents, 2]

Columns are mapped, one shard at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from moai.engine.pipeline import advance

_ALIVE_EVERY = 256
Ids = npt.NDArray[np.int64]
"""Numbers of documents."""


@dataclass(frozen=True)
class ShardSidecars:
    """Of one shard how many documents it has, and by the names of signals its sidecars and what names their
    contents.
    """

    rows: int
    files: Mapping[str, str]
    contents: Mapping[str, str]


@dataclass(frozen=True)
class Corpus:
    shards: tuple[ShardSidecars, ...]

    @cached_property
    def starts(self) -> Ids:
        """int64[shards + 1]: the number of the first document of each shard, and behind the last one."""
        return np.cumsum([0, *(shard.rows for shard in self.shards)])

    @property
    def documents(self) -> int:
        return int(self.starts[-1])

    def content(self, *signals: str) -> list[list[str]]:
        """What names what these signals measured, shard by shard."""
        return [[shard.contents[signal] for signal in signals] for shard in self.shards]

    def shards_of(self, documents: Ids) -> Ids:
        return np.searchsorted(self.starts, documents, side="right") - 1

    def scan(
        self, signal: str, names: Sequence[str]
    ) -> Iterator[tuple[int, list[npt.NDArray[np.uint64]], npt.NDArray[np.bool_]]]:
        """(number of the first document, columns, which documents were measured) of each shard. In a worker."""
        for number, (start, shard) in enumerate(zip(self.starts.tolist(), self.shards)):
            if number % _ALIVE_EVERY == 0:
                advance(0)  # it does not hang, though it finishes no document
            table = _read(shard.files[signal])
            known = table[names[0]].is_valid().to_numpy()
            yield start, [_numbers(table[name]) for name in names], known

    def take(self, signal: str, names: Sequence[str], documents: Ids) -> npt.NDArray[np.uint64]:
        """uint64[documents, names] of documents in ascending order."""
        out = np.empty((len(documents), len(names)), np.uint64)
        bounds = np.searchsorted(documents, self.starts)
        for at in np.flatnonzero(np.diff(bounds)).tolist():
            first, last = int(bounds[at]), int(bounds[at + 1])
            rows = documents[first:last] - self.starts[at]
            table = _read(self.shards[at].files[signal])
            for column, name in enumerate(names):
                out[first:last, column] = _numbers(table[name])[rows]
        return out


def _read(path: str) -> pa.Table:
    with pa.memory_map(path) as file:
        return pa.ipc.open_stream(file).read_all()


def _numbers(column: pa.ChunkedArray) -> npt.NDArray[np.uint64]:
    return np.asarray((column.fill_null(0) if column.null_count else column).to_numpy(), np.uint64)
