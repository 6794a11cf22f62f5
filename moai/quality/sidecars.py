"""Where measurements live: of a shard a file for each Signal, named by what was read and by what was measured.

    chain = (*maps, TextStatistics(), *filters)
    keyed = sidecars(chain, identity)                    # each Signal with the key of its files
    parts = (to_text, *once(chain, keyed, cache), Drained())
    sink  = Sidecars(shards=ArrowShards(...), signals=keyed)

A range is read once for all Signals that have not measured it, and a Signal that is new measures only itself. The
documents of all files of a shard stand in one order, that of its documents file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from moai.cache.ledger import Ledger
from moai.cache.shards import ArrowShards
from moai.core.files import digest_json
from moai.engine.part import Part, Signal
from moai.engine.pipeline import Receipt, Sealed, Shard, documents, known_range, shard_key

ROWS_PER_BATCH = 1 << 16
"""Documents in a record batch of a sidecar."""


@dataclass(frozen=True)
class Sidecar:
    """One Signal, and the transform key of what it measures."""

    signal: Signal
    identity: Mapping[str, Any]

    @property
    def key(self) -> str:
        return digest_json(self.identity)[:40]

    def shard_key(self, of: Receipt | Sealed) -> str:
        """What it measured of a shard is called so."""
        if of.shard_key == shard_key(of.raw, of.transform_key):
            return shard_key(of.raw, self.key)
        return digest_json([of.shard_key, self.key])[:40]  # without the records that a machine could not take

    def file(self, cache: Path, receipt: Receipt) -> Path:
        return Ledger(cache).shard(self.shard_key(receipt))

    def read(self, cache: Path, receipt: Receipt) -> pa.Table:
        """What it measured of a shard, a row a document."""
        with pa.memory_map(str(self.file(cache, receipt))) as file:
            return pa.ipc.open_stream(file).read_all()


def sidecars(chain: Sequence[Part], identity: Callable[[Sequence[Part]], Mapping[str, Any]]) -> tuple[Sidecar, ...]:
    """The Signals of a chain. `identity` names what some of its parts make of a range. Filters and other Signals are in
    no key of a Signal, but those that make a column it needs.
    """
    return tuple(
        Sidecar(part, identity((*_stands_on(part, chain[:at]), part)))
        for at, part in enumerate(chain)
        if isinstance(part, Signal)
    )


def once(chain: Sequence[Part], signals: Sequence[Sidecar], cache: Path) -> Iterator[Part]:
    """The parts of a chain, each Signal only where it has not measured the range in work."""
    keys = {id(one.signal): one.key for one in signals}
    for at, part in enumerate(chain):
        made = {column.name for column in part.adds}
        looked_at = any(made.intersection(later.needs) for later in chain[at + 1 :])
        yield _Once(part, keys[id(part)], cache) if isinstance(part, Signal) and not looked_at else part


@dataclass(frozen=True)
class _Once(Part):
    signal: Signal
    key: str
    cache: Path

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        raw = known_range()
        if raw is None or Ledger(self.cache).receipt(shard_key(raw, self.key)) is None:
            return self.signal(batches)
        documents().elsewhere.update(column.name for column in self.signal.adds)
        return batches


@dataclass(frozen=True, kw_only=True)
class Sidecars:
    """A sink of documents files without rows, and beside each the sidecars of its Signals. The receipt of the documents
    file comes last, so that with it all are there.
    """

    shards: ArrowShards
    signals: tuple[Sidecar, ...]

    def committed(self, key: str) -> Receipt | None:
        receipt = self.shards.committed(key)
        whole = receipt and all(self.shards.committed(one.shard_key(receipt)) for one in self.signals)
        return receipt if whole else None

    def write(self, shard: Shard, batches: Iterator[pa.RecordBatch], seal: Callable[[], Sealed]) -> Receipt:
        return self.shards.write(shard, batches, lambda: self._without_sidecars(shard, seal()))

    def _without_sidecars(self, shard: Shard, sealed: Sealed) -> Sealed:
        """Writes the sidecars, and leaves of what is known the documents file."""
        found = sealed.documents
        assert found is not None
        for one in self.signals:
            names = [column.name for column in one.signal.adds]
            if set(names) <= {*found.schema.names}:
                self._write(shard, sealed, one, found.select(names))
        measured = {column.name for one in self.signals for column in one.signal.adds}
        return replace(sealed, documents=found.select([name for name in found.schema.names if name not in measured]))

    def _write(self, shard: Shard, sealed: Sealed, one: Sidecar, measured: pa.RecordBatch) -> None:
        sink = replace(self.shards, schema=measured.schema, rows_per_batch=ROWS_PER_BATCH)
        own = Sealed(one.shard_key(sealed), one.key, sealed.raw, {}, ())
        sink.write(shard, iter((measured,)), lambda: own)


def _stands_on(part: Part, before: Sequence[Part]) -> tuple[Part, ...]:
    """What runs before it and changes what it sees: all Maps, what takes a sample, and the Signals it looks at."""
    needs, found = {*part.needs}, list[Part]()
    for one in reversed(before):
        if isinstance(one, Signal):
            if needs.isdisjoint(column.name for column in one.adds):
                continue
            needs |= {*one.needs}
        found.insert(0, one)
    return tuple(found)
