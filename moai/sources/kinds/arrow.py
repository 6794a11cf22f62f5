"""Arrow streams, and the stream in an Arrow file: ranges are runs of record batches, digested as they lie."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from moai.core.errors import SourceError
from moai.core.files import canonical_json, storage_of
from moai.engine.pipeline import Meter
from moai.sources.kinds.kind import File, Kind, Segment, one_line
from moai.sources.kinds.tables import STEP, bounded, plain_schema, type_names
from moai.sources.records import Limits

_MAGIC = b"ARROW1\0\0"


@dataclass(frozen=True)
class Arrow(Kind):
    name = "arrow"
    endings = (".arrow",)

    def schema(self, file: File) -> Mapping[str, str]:
        with _mapped(file.path) as mapped:
            return type_names(_open_stream(mapped, file.path).schema, file.path)

    def cuts(self, file: File, range_bytes: int) -> Iterator[tuple[int, int, int]]:
        """Record batches together until they reach `range_bytes`."""
        first, size, index = 0, 0, -1
        for index, _, start, end in _each_batch(file.path):
            size += end - start
            if size >= range_bytes:
                yield first, index + 1, size
                first, size = index + 1, 0
        if index >= first:
            yield first, index + 1, size

    def digest(self, segment: Segment, columns: tuple[str, ...], limits: Limits, meter: Meter) -> None:
        meter.update(canonical_json(sorted(columns)))
        with _mapped(segment.file.path) as mapped:
            for index, batch, start, end in _each_batch(segment.file.path):
                if index == 0:
                    meter.update(_slice(mapped, 0, start))  # the schema, and dictionaries where there are some
                if segment.start <= index < segment.end:
                    meter.update(_slice(mapped, start, end), lines=batch.num_rows)
                if index + 1 == segment.end:
                    return

    def read(self, segment: Segment, columns: tuple[str, ...], limits: Limits) -> Iterator[pa.RecordBatch]:
        for index, batch, _, _ in _each_batch(segment.file.path):
            if index >= segment.end:
                return
            if index >= segment.start:
                picked = batch.select([name for name in batch.schema.names if name in columns])
                _validate(picked, segment.file.path, index)
                is_plain = plain_schema(picked.schema) == picked.schema
                rows = limits.rows_of(picked.num_rows, picked.nbytes) if is_plain else min(STEP, limits.batch_rows)
                slices = (picked.slice(start, rows) for start in range(0, picked.num_rows, rows))
                yield from slices if is_plain else bounded(slices, limits)


def _mapped(path: str) -> Any:
    return storage_of(path).random_access(path, mapped=True)


def _validate(batch: pa.RecordBatch, path: str, index: int) -> None:
    """Offsets that lead out of their buffers would end the process. Texts that are no UTF-8 pass: they are bad
    records.
    """
    for column in batch.columns:  # offsets are looked at before texts, so the one complaint cannot hide the other
        try:
            column.validate(full=True)
        except pa.ArrowInvalid as error:
            if "UTF8" not in str(error):
                raise _damaged(path, index, error, "damaged") from error


def _each_batch(path: str) -> Iterator[tuple[int, pa.RecordBatch, int, int]]:
    """(index, batch, first byte, last byte + 1) of each record batch, without touching its data."""
    with _mapped(path) as file:
        reader = _open_stream(file, path)
        index, start = 0, file.tell()
        while True:
            try:
                batch = reader.read_next_batch()
            except StopIteration:
                break
            except (pa.ArrowException, OSError) as error:
                raise _damaged(path, index, error, "damaged or cut off") from error
            yield index, batch, start, file.tell()
            index, start = index + 1, file.tell()
        # A stream cut at a batch boundary reads without an error; only its end marker tells that it is whole.
        if file.tell() == start:
            raise SourceError(f"{path}: the Arrow stream has no end marker; the file was cut off, write it again")


def _open_stream(file: Any, path: str) -> Any:
    """A stream, or the stream inside Arrow's file format, which follows its magic bytes."""
    if file.size() >= 8 and file.read(8) != _MAGIC:
        file.seek(0)
    try:
        return pa.ipc.open_stream(file)
    except (pa.ArrowException, OSError) as error:
        raise SourceError(
            f"{path}: not readable as Arrow ({one_line(error)}); the file is damaged or cut off"
        ) from error


def _damaged(path: str, index: int, error: Exception, how: str) -> SourceError:
    return SourceError(f"{path}: record batch {index} is not readable ({one_line(error)}); the file is {how}")


def _slice(file: Any, start: int, end: int) -> memoryview:
    file.seek(start)
    return memoryview(file.read_buffer(end - start))
