"""What became of every document of a shard: the rows of its `documents-NNNNN.arrow`, in the order they were read.

    segment, offset   where its record begins: which segment of the shard, and the byte in it (the row, in columnar
                      files)
    bytes             of its record (of its text, in columnar files)
    tokens            ids that were made of it, with BOS and EOS
    first_row, position, pieces    the row of the shard with its first token, the place in that row, and into how many
                                   pieces it was cut
    reason            why it was filtered; null if it was kept
    ...               one column for each that a Signal measured

Nothing here depends on other files, on places or on times: a shard is shared by content.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from moai.core import columns
from moai.engine.schema import Column

DOCUMENT = "document"
"""The column of batches that says which document of the shard a row comes from."""
SCHEMA = pa.schema(
    [
        ("segment", pa.uint32()),
        ("offset", pa.uint64()),
        ("bytes", pa.uint32()),
        ("tokens", pa.uint32()),
        ("first_row", pa.uint32()),
        ("position", pa.uint32()),
        ("pieces", pa.uint32()),
        ("reason", pa.string()),
    ]
)

Numbers = npt.NDArray[np.int64]


def schema(measured: Sequence[Column] = ()) -> pa.Schema:
    """Of a documents file with these columns of Signals."""
    return pa.schema([*SCHEMA, *(pa.field(column.name, column.value_type) for column in measured)])


def read_documents(path: Path) -> pa.Table:
    """A documents file, mapped."""
    with pa.memory_map(str(path)) as file:
        return pa.ipc.open_file(file).read_all()


def places(segments: npt.NDArray[Any], offsets: npt.NDArray[Any]) -> npt.NDArray[np.uint64]:
    """One number for the place of a record in its shard."""
    return segments.astype(np.uint64) << np.uint64(48) | offsets.astype(np.uint64)


class Documents:
    """The documents of the shard in work. They are numbered from 0 as they are read."""

    def __init__(self) -> None:
        self.number = 0
        self.judged_away: npt.NDArray[np.uint64] | None = None
        """Places of documents that an earlier stage decided against."""
        self.elsewhere: set[str] = set()
        """Columns that are measured and stored already."""
        self.filtered = 0
        self._places: list[tuple[npt.NDArray[Any], ...]] = []
        self._reasons: dict[str, int] = {}
        self._dropped: list[tuple[Numbers, npt.NDArray[Any]]] = []
        self._tokens: list[tuple[Numbers, Numbers]] = []
        self._placed: list[tuple[Numbers, Numbers, Numbers, Numbers]] = []
        self._measured: dict[str, list[tuple[Numbers, pa.Array]]] = {}

    def add(self, segments: npt.NDArray[Any], offsets: npt.NDArray[Any], sizes: npt.NDArray[Any]) -> Numbers:
        """Further documents; their numbers."""
        first, self.number = self.number, self.number + len(segments)
        self._places.append((segments.astype(np.uint32), offsets.astype(np.uint64), sizes.astype(np.uint32)))
        return np.arange(first, self.number)

    def places_of(self, numbers: Numbers) -> npt.NDArray[np.uint64]:
        """Of documents that were added last."""
        segments, offsets, _ = self._places[-1]
        at = numbers - (self.number - len(segments))
        return places(segments[at], offsets[at])

    def drop(self, numbers: Numbers, reasons: Sequence[str]) -> None:
        assert len(numbers) == len(reasons)
        self.filtered += len(numbers)
        codes = [
            self._reasons.setdefault(reason, len(self._reasons)) for reason in reasons
        ]  # a shard may drop a million
        self._dropped.append((numbers.astype(np.uint32), np.array(codes, np.int32)))

    def note_tokens(self, numbers: Numbers, tokens: Numbers) -> None:
        self._tokens.append((numbers.astype(np.uint32), tokens.astype(np.uint32)))

    def note_places(self, numbers: Numbers, rows: Numbers, positions: Numbers, pieces: Numbers) -> None:
        self._placed.append(
            (numbers.astype(np.uint32), rows.astype(np.uint32), positions.astype(np.uint32), pieces.astype(np.uint32))
        )

    def note_measured(self, numbers: Numbers, name: str, values: pa.Array) -> None:
        self._measured.setdefault(name, []).append((numbers, values))

    def batch(self, measured: Sequence[Column]) -> pa.RecordBatch:
        """All of them, one row each, without the columns that stand elsewhere."""
        measured = [column for column in measured if column.name not in self.elsewhere]
        segments, offsets, sizes = (
            (np.concatenate(parts) for parts in zip(*self._places))
            if self._places
            else (np.empty(0, np.uint32), np.empty(0, np.uint64), np.empty(0, np.uint32))
        )
        self._places = []
        tokens, rows, positions, pieces = np.zeros((4, self.number), np.uint32)
        for numbers, more in self._tokens:
            np.add.at(tokens, numbers, more)
        for numbers, *places in self._placed:
            rows[numbers], positions[numbers], pieces[numbers] = places
        made = [columns.numbers(values) for values in (segments, offsets, sizes, tokens, rows, positions, pieces)]
        return pa.record_batch(
            [*made, self._reasons_of_all(), *(self._values(column) for column in measured)], schema=schema(measured)
        )

    def _reasons_of_all(self) -> pa.Array:
        """Why each was dropped, null for one that was not."""
        codes = np.full(self.number, -1, np.int32)
        for numbers, found in self._dropped:
            codes[numbers] = found
        return pa.array(list(self._reasons), pa.string()).take(pa.array(codes, mask=codes < 0))

    def _values(self, column: Column) -> pa.Array:
        """A value a document, null for one that was dropped before it was measured."""
        parts = self._measured.get(column.name, [])
        where = np.full(self.number, -1)
        values = pa.concat_arrays([values for _, values in parts]) if parts else pa.array([], column.value_type)
        if parts:
            numbers = np.concatenate([numbers for numbers, _ in parts])
            where[numbers] = np.arange(len(numbers))
        return values.take(pa.array(where, pa.int64(), mask=where < 0))
