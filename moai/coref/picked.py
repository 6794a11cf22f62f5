"""Finished shards of an earlier pipeline as the source of a later one: of each row's list, only the elements that were
picked.

The pick is part of the content: a shard is made again only where what it holds, or what was picked of it, changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from moai.core import columns
from moai.engine.pipeline import Meter, Raw, Shard


@dataclass(frozen=True)
class Picks:
    """One file. `content` names its bytes; `bits` has one for every element of the list column, in file order
    (numpy.packbits); `values` has a byte for every one that is picked.
    """

    path: str
    content: str
    bits: bytes
    values: bytes

    @property
    def number(self) -> int:
        """How many are picked."""
        return len(self.values)


@dataclass(frozen=True, kw_only=True)
class PickedSource:
    """`groups` are the shards: each a run of files. Batches carry two further columns: `picked`, the indices into
    `column`, and `values`, those of the picked ones; rows without any are left out.
    """

    name: str
    column: str
    groups: tuple[tuple[Picks, ...], ...]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "groups": ()}  # a worker reads what its orders name

    def shards(self) -> Iterator[Shard]:
        for number, group in enumerate(self.groups):
            meter = Meter()
            for picks in group:
                _meet(picks, meter)
            yield Shard(f"{self.name}:{number:05d}", group, "", sum(picks.number for picks in group), meter.raw())

    def digest(self, shard: Shard) -> Raw:
        assert shard.raw is not None
        return shard.raw

    def read(self, shard: Shard, meter: Meter) -> Iterator[pa.RecordBatch]:
        for picks in shard.segments:
            _meet(picks, meter)
            bits = np.unpackbits(np.frombuffer(picks.bits, np.uint8)).astype(bool)
            values = np.frombuffer(picks.values, np.uint8)
            seen = given = 0
            with pa.memory_map(picks.path) as file:
                for batch in pa.ipc.open_stream(file):
                    size = len(batch[self.column].flatten())
                    here = bits[seen : seen + size]
                    ends = np.concatenate(([0], np.cumsum(batch[self.column].value_lengths().to_numpy())))
                    before = np.concatenate(([0], np.cumsum(here)))[ends].astype(np.int32)
                    seen, number = seen + size, int(before[-1])
                    if number:
                        places = np.flatnonzero(here) - np.repeat(ends[:-1], np.diff(before))
                        whole = batch.append_column("picked", columns.lists(before, places.astype(np.int32)))
                        mine = values[given : given + number]
                        whole = whole.append_column("values", columns.lists(before, mine))
                        yield whole.filter(pa.array(np.diff(before) > 0))
                    given += number

    def remember(self, shard: Shard, raw: Raw) -> None:
        pass


def _meet(picks: Picks, meter: Meter) -> None:
    meter.begin_segment()
    meter.update(picks.content.encode() + picks.bits + picks.values)
