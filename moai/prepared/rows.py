"""The rows of a prepared directory as they lie on disk: views into mapped shards, no copy before the collator's.

    rows = PackedRows.of(prepared)           # touches no shard: the manifest tells how many rows each holds
    rows.__getitems__([5, 900_000])          # what torch's loader calls for a batch

A shard is mapped when one of its rows is first asked for, and then only the headers of its record batches are read
(three, in a shard of 16 MB of text); 0.15 ms. The mapping outlives the file's descriptor, so that open shards use none.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from itertools import accumulate
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from moai.core.errors import DamagedError
from moai.engine.schema import TRAINED, Column, arrow_schema
from moai.prepared.manifest import Prepared

MAX_OPEN = 8192
"""Shards that stay mapped, the latest used. Linux allows a process 65,530 mappings; an open shard takes 8 kB of
memory.
"""

Ids = npt.NDArray[np.unsignedinteger[Any]]


class Row(NamedTuple):
    """One row: its tokens, and the lengths of the pieces of documents they are. Views, which must not be written to."""

    input_ids: Ids
    seq_lengths: npt.NDArray[np.uint32]
    trained_runs: npt.NDArray[np.uint32] | None = None
    """Of conversations: how many tokens are not learned, then how many are, then not, ..."""
    beside: Mapping[str, Any] = MappingProxyType({})
    """What else travels with the row, by the column's name: an array, or a list of strings, with an entry a piece or a
    token.
    """

    @classmethod
    def of(cls, pieces: Sequence[Sequence[int]]) -> Row:
        """A row made by hand from its pieces."""
        return cls(
            np.array([token for piece in pieces for token in piece], np.uint32),
            np.array([len(piece) for piece in pieces], np.uint32),
        )


@dataclass(frozen=True)
class PackedRows:
    """A torch map-style dataset. Pickled, it is names and numbers: a spawned reader maps the shards itself."""

    path: Path
    shards: tuple[tuple[str, int], ...]
    """File and number of rows of each shard that has any, in order."""
    columns: tuple[Column, ...]

    @classmethod
    def of(cls, prepared: Prepared) -> PackedRows:
        content = prepared.manifest["content"]
        return cls(
            prepared.path,
            tuple((shard["file"], shard["rows"]) for shard in content["shards"] if shard["rows"]),
            prepared.columns,
        )

    def __len__(self) -> int:
        return self._firsts[-1]

    def __getitem__(self, index: int) -> Row:
        """Raises DamagedError when the shard is not what the manifest says."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        number = bisect_right(self._firsts, index) - 1
        return self._shard(number).row(index - self._firsts[number])

    def __getitems__(self, indices: Sequence[int]) -> list[Row]:
        return [self[index] for index in indices]

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @cached_property
    def _firsts(self) -> list[int]:
        """The number of the first row of each shard, and of all rows."""
        return list(accumulate((rows for _, rows in self.shards), initial=0))

    @cached_property
    def _shard(self) -> Callable[[int], _Shard]:
        return lru_cache(MAX_OPEN)(self._open)

    def _open(self, number: int) -> _Shard:
        name, rows = self.shards[number]
        return _Shard.open(self.path / name, rows, arrow_schema(self.columns))


def read_ahead(rows: PackedRows) -> int:
    """Ask the kernel to bring the shards into the page cache while the model is built. Returns the bytes asked for; 0
    where it cannot.
    """
    if not hasattr(os, "posix_fadvise"):
        return 0
    total = 0
    for name, _ in rows.shards:
        with open(rows.path / name, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
            total += os.fstat(file.fileno()).st_size
    return total


class _Batch(NamedTuple):
    """The buffers of a record batch: row i has the ids and the pieces from offset i up to offset i + 1."""

    ids: _Lists
    pieces: _Lists
    runs: _Lists | None
    beside: dict[str, pa.Array]

    @classmethod
    def of(cls, batch: pa.RecordBatch) -> _Batch:
        batch.validate()  # that the buffers hold what the header says; no value is looked at
        found = {name: batch[name] for name in batch.schema.names}
        ids, pieces, runs = (found.pop(name, None) for name in ("input_ids", "seq_lengths", TRAINED.name))
        return cls(_Lists.of(ids), _Lists.of(pieces), None if runs is None else _Lists.of(runs), found)

    def row(self, at: int) -> Row:
        runs = self.runs.at(at) if self.runs else None
        if not self.beside:
            return Row(self.ids.at(at), self.pieces.at(at), runs)
        return Row(
            self.ids.at(at),
            self.pieces.at(at),
            runs,
            {name: _value(column, at) for name, column in self.beside.items()},
        )


class _Lists(NamedTuple):
    """A column of lists of numbers."""

    offsets: npt.NDArray[np.int32]
    values: npt.NDArray[Any]

    @classmethod
    def of(cls, column: pa.ListArray) -> _Lists:
        return cls(column.offsets.to_numpy(), column.values.to_numpy())

    def at(self, at: int) -> npt.NDArray[Any]:
        return self.values[self.offsets[at] : self.offsets[at + 1]]


def _value(column: pa.Array, at: int) -> Any:
    """Strings as a list, numbers as an array; a number or bool that is null is NaN, and those beside it are floats
    then.
    """
    scalar = column[at]
    if not isinstance(scalar, pa.ListScalar):
        return scalar.as_py()
    values = scalar.values
    if pa.types.is_boolean(values.type) and values.null_count:
        values = values.cast(pa.uint8())
    return values.to_pylist() if pa.types.is_string(values.type) else values.to_numpy(zero_copy_only=False)


@dataclass(frozen=True)
class _Shard:
    """A mapped file. The mapping ends with the last view into it."""

    firsts: list[int]
    batches: list[_Batch]

    @classmethod
    def open(cls, path: Path, rows: int, schema: pa.Schema) -> _Shard:
        again = f"remove {path.parent} and prepare again"
        try:
            reader = pa.ipc.open_stream(_map(path))
            if (found := _columns(reader.schema)) != (wanted := _columns(schema)):
                raise DamagedError(f"{path}: its columns are {found}, the manifest says {wanted}; {again}")
            parts = list(reader)
            if (held := sum(part.num_rows for part in parts)) != rows:
                raise DamagedError(f"{path}: {held} rows, the manifest says {rows}; {again}")
            return cls(
                list(accumulate((part.num_rows for part in parts[:-1]), initial=0)), [_Batch.of(part) for part in parts]
            )
        except (pa.ArrowInvalid, OSError) as error:
            raise DamagedError(
                f"{path}: not readable as Arrow ({' '.join(str(error).split())[:400]}); {again}"
            ) from error

    def row(self, index: int) -> Row:
        number = bisect_right(self.firsts, index) - 1
        return self.batches[number].row(index - self.firsts[number])


def _map(path: Path) -> pa.Buffer:
    """The whole file, of which nothing is read yet.

    Through its first byte: every read of Arrow's mapped files, also one that copies nothing, asks the kernel to fetch
    all that was read.
    """
    with pa.memory_map(str(path)) as file:
        first = file.read_buffer(1)
        return pa.foreign_buffer(first.address, file.size(), base=first)


def _columns(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} {field.type}" for field in schema)
