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

from moai.engine.pipeline import Meter, Raw, Shard


@dataclass(frozen=True)
class Picks:
    """One file. `content` names its bytes; `bits` has one for every element of the list column, in file order
    (numpy.packbits).
    """

    path: str
    content: str
    bits: bytes
    number: int
    """How many are picked."""


@dataclass(frozen=True, kw_only=True)
class PickedSource:
    """`groups` are the shards: each a run of files. Batches carry a further column `picked`, the indices into `column`;
    rows without any are left out.
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
            seen = 0
            with pa.memory_map(picks.path) as file:
                for batch in pa.ipc.open_stream(file):
                    sizes = batch[self.column].value_lengths().to_numpy()
                    ends = seen + np.cumsum(sizes)
                    picked = [np.flatnonzero(bits[end - size : end]).tolist() for end, size in zip(ends, sizes)]
                    if any(picked):
                        whole = batch.append_column("picked", pa.array(picked, pa.list_(pa.int32())))
                        yield whole.filter(pa.array(map(bool, picked), pa.bool_()))
                    seen = int(ends[-1])

    def remember(self, shard: Shard, raw: Raw) -> None:
        pass


def _meet(picks: Picks, meter: Meter) -> None:
    meter.begin_segment()
    meter.update(picks.content.encode() + picks.bits)
