"""What a kind of file is: its endings, where a file is cut, and how a range of it is digested and read.

    @dataclass(frozen=True)
    class Records(Kind):
        name, endings = "records", (".rec",)

        def schema(self, file): ...                   # {"text": "string"}
        def read(self, segment, columns, limits): ... # yields RecordBatches with these columns

    moai.sources.kinds.register(Records)

Fields are settings. A kind that is a stream of records, which may lie compressed, is a `Stream`.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Self

import numpy as np
import pyarrow as pa

from moai.core.errors import MoaiError, PartFailed
from moai.core.files import Stamp, input_errors, read_range
from moai.engine.part import failure, is_ours, named, source_digest
from moai.engine.pipeline import Meter
from moai.sources.records import Limits

EXPANSION = 8
"""A compressed file counts for this many times its size where sizes decide what shares a shard."""


@dataclass(frozen=True)
class File:
    """One input file: where it is, what people call it, how it is compressed ("" where it is not), and its stamp."""

    path: str
    name: str
    compression: str
    stamp: Stamp

    @property
    def nominal_bytes(self) -> int:
        return self.stamp.size * (EXPANSION if self.compression else 1)


@dataclass(frozen=True)
class Segment:
    """A range of one file: bytes of its (decompressed) stream, or whatever its kind counts, like row groups.

    aligned  the range begins and ends with records; otherwise it stands between two marks
    spool    where a compressed file's range lies decompressed
    """

    file: File
    start: int
    end: int
    aligned: bool = False
    spool: str | None = None


@dataclass(frozen=True)
class Kind(ABC):
    """A kind of file. Methods raise SourceError for a file that is not what its ending says."""

    name: ClassVar[str]
    endings: ClassVar[tuple[str, ...]]
    """In lower case, with their dot."""
    version: ClassVar[int] = 1
    """Raised when the same bytes would give other records."""
    columnar: ClassVar[bool] = True
    """Batches hold the columns asked for; otherwise `record`, the bytes of one record each."""
    plain: ClassVar[bool] = False
    """A record is the text itself."""

    @property
    def identity(self) -> list[Any]:
        """What decides, besides a file's bytes, which records it gives: part of the key of every shard."""
        return [*origin_of(type(self)), self.version, *([self.settings] if self.settings else [])]

    @property
    def settings(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def having(self, **settings: Any) -> Self:
        """With those of the settings that this kind has."""
        own = {field.name for field in fields(self)}
        return replace(self, **{name: value for name, value in settings.items() if name in own})

    @abstractmethod
    def schema(self, file: File) -> Mapping[str, str]:
        """Column -> "string", "list" or another type's name. Raises NoObjects where this file does not tell but the
        next one may.
        """

    @abstractmethod
    def read(self, segment: Segment, columns: tuple[str, ...], limits: Limits) -> Iterator[pa.RecordBatch]:
        """The range's rows in order, in batches within the limits, with those of the columns that there are."""

    def cuts(self, file: File, range_bytes: int) -> Iterator[tuple[int, int, int]]:
        """(start, end, about how many bytes) of the ranges that shards are made of: the whole file, unless a kind can
        do better.
        """
        yield 0, file.stamp.size, file.stamp.size

    def digest(self, segment: Segment, columns: tuple[str, ...], limits: Limits, meter: Meter) -> None:
        """Whatever the range's rows depend on: all bytes of the file, unless a kind knows better."""
        for block in read_range(segment.file.path, 0, None, limits.batch_bytes):
            meter.update(block)

    def batches(
        self, segment: Segment, index: int, columns: tuple[str, ...], limits: Limits, meter: Meter | None = None
    ) -> Iterator[pa.RecordBatch]:
        """What `read` gives, each row with its place: `index` of the segment and line. With a meter the range is
        digested, too.
        """
        if meter:
            self.digest(segment, columns, limits, meter)
        row = 0
        known: Mapping[str, str] | None = None
        for batch in self.read(segment, columns, limits):
            if not is_ours(type(self)):
                known = self.schema(segment.file) if known is None else known
                self._check(batch, segment.file, [name for name in columns if name in known])
            yield _placed(batch, index, row)
            row += batch.num_rows

    def _check(self, batch: Any, file: File, columns: Sequence[str]) -> None:
        """Raises PartFailed for what is no batch, or lacks one of the columns that this file has."""
        if not isinstance(batch, pa.RecordBatch):
            raise PartFailed(
                f"{file.path}: kind {named(type(self))} gave {type(batch).__name__}, not a pyarrow.RecordBatch"
            )
        if lost := [name for name in columns if name not in batch.schema.names]:
            raise PartFailed(
                f"{file.path}: kind {named(type(self))} gave no column {lost[0]!r}, which its schema names"
            )

    def is_lines(self, file: File) -> bool:
        """Whether every line is a record, so that a range can begin at any mark and its reader finds the first line for
        itself.
        """
        return False


class NoObjects(Exception):
    """The first records of a file do not tell what columns it has; the message says what they are instead."""


@contextlib.contextmanager
def asking(kind: Kind, path: str) -> Iterator[None]:
    """What a kind that is not moai's raises becomes one line that names the file, the kind and the place. Raises
    SourceError, PartFailed.
    """
    with input_errors(path):
        try:
            yield
        except (MoaiError, NoObjects, OSError, MemoryError):
            raise
        except Exception as error:
            if is_ours(type(kind)):
                raise
            raise PartFailed(f"{path}: kind {named(type(kind))} {failure(type(kind), error)}") from error


def origin_of(kind: type[Kind]) -> list[str]:
    """What says which code reads: a name for moai's own kinds, the class and the text of its file for others."""
    return [kind.name] if is_ours(kind) else [kind.__qualname__, source_digest(kind)]


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:160]


def _placed(batch: pa.RecordBatch, segment: int, row: int) -> pa.RecordBatch:
    rows = batch.num_rows
    batch = batch.append_column("segment", np.full(rows, segment, np.int32))
    batch = batch.append_column("line", row + np.arange(rows))
    return batch.append_column("offset", pa.nulls(rows, pa.int64()))
