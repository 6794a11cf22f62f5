"""A user's source that is not files: batches of columns, with the places that the engine asks for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from moai.core.errors import MoaiError, PartFailed, SourceError
from moai.engine.part import failure, identity_of, named
from moai.engine.pipeline import Meter, Raw, Shard
from moai.sources.kinds.kind import File, Kind, Segment
from moai.sources.kinds.tables import type_names
from moai.sources.records import Limits

_PLACE = ("segment", "line", "offset")


@dataclass(frozen=True)
class OfSource(Kind):
    """The kind of what a user's source gives: known by the class that reads it, never by a file's ending."""

    name: ClassVar[str] = "source"
    endings: ClassVar[tuple[str, ...]] = ()

    source: Any

    @property
    def identity(self) -> list[Any]:
        return [self.name, identity_of(self.source)]

    def schema(self, file: File) -> Mapping[str, str]:
        raise AssertionError("no file is of this kind")

    def read(self, segment: Segment, columns: tuple[str, ...], limits: Limits) -> Iterator[pa.RecordBatch]:
        raise AssertionError("no file is of this kind")


@dataclass(frozen=True, kw_only=True)
class Placed:
    """`source` under a name, each of its rows numbered: within a shard a row is its own place."""

    source: Any
    name: str

    def shards(self) -> Iterator[Shard]:
        """Under names that no other source's shards have."""
        seen = set[str]()
        with self._asked():
            for shard in self.source.shards():
                if shard.id in seen:
                    raise SourceError(f"{self.name}: gives two shards called {shard.id!r}; give each an id of its own")
                seen.add(shard.id)
                yield replace(shard, id=f"{self.name}:{shard.id}")

    def digest(self, shard: Shard) -> Raw:
        with self._asked():
            found: Raw = self.source.digest(self._own(shard))
        return found

    def read(self, shard: Shard, meter: Meter) -> Iterator[pa.RecordBatch]:
        row = 0
        with self._asked():
            for batch in self.source.read(self._own(shard), meter):
                if taken := [name for name in (*_PLACE, "record") if name in batch.schema.names]:
                    raise SourceError(
                        f"{self.name}: its column {taken[0]!r} has a name that moai uses; call it something else"
                    )
                rows = np.arange(row, row + batch.num_rows)
                row += batch.num_rows
                batch = batch.append_column("segment", np.zeros(batch.num_rows, np.int32)).append_column("line", rows)
                yield batch.append_column("offset", pa.nulls(batch.num_rows, pa.int64()))

    def remember(self, shard: Shard, raw: Raw) -> None:
        with self._asked():
            self.source.remember(self._own(shard), raw)

    @contextlib.contextmanager
    def _asked(self) -> Iterator[None]:
        """What the source raises becomes one line that names it and the place. Raises PartFailed."""
        try:
            yield
        except (MoaiError, MemoryError):
            raise
        except Exception as error:
            raise PartFailed(
                f"{self.name}: source {named(type(self.source))} {failure(type(self.source), error)}"
            ) from error

    def _own(self, shard: Shard) -> Shard:
        return replace(shard, id=shard.id.removeprefix(f"{self.name}:"))

    def looks(self, number: int) -> Iterator[Iterator[pa.RecordBatch]]:
        """The first shards, each from its beginning."""
        for _, shard in zip(range(number), self.shards()):
            yield self.read(shard, Meter())

    def columns_of(self) -> dict[str, str]:
        """Names and types of its columns, from its first batch. Raises SourceError where there is none."""
        for batches in self.looks(1):
            for batch in batches:
                return type_names(pa.schema([field for field in batch.schema if field.name not in _PLACE]), self.name)
        raise SourceError(f"{self.name}: gives no batch; nothing to prepare")
