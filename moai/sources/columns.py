"""Columnar files: row groups of Parquet, record batches of Arrow streams. A range is digested from its raw bytes, then read.

Only the columns that make the text are read or digested. Batches carry these columns, `segment` and `line` (the row in the
segment); offsets mean nothing here and are null.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from moai.engine.pipeline import Meter
from moai.errors import SourceError
from moai.files import canonical_json

_MAGIC = b"ARROW1\0\0"


def parquet_ranges(path: str, range_bytes: int) -> Iterator[tuple[int, int, int]]:
    """(first row group, last + 1, compressed bytes): row groups together until they reach `range_bytes`."""
    metadata = _parquet(path).metadata
    first, size = 0, 0
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        size += sum(group.column(c).total_compressed_size for c in range(group.num_columns))
        if size >= range_bytes or index == metadata.num_row_groups - 1:
            yield first, index + 1, size
            first, size = index + 1, 0


def parquet_schema(path: str) -> pa.Schema:
    return _parquet(path).schema_arrow


def digest_parquet(path: str, first: int, last: int, columns: tuple[str, ...], block_bytes: int, meter: Meter) -> None:
    """The raw column chunks that `read_parquet` decodes, with all that decides what they decode to: types, levels, rows."""
    parquet = _parquet(path)
    metadata = parquet.metadata
    meter.update(canonical_json([[name, str(parquet.schema_arrow.field(name))] for name in columns if name in parquet.schema_arrow.names]))
    with open(path, "rb", buffering=0) as file:
        for index in range(first, last):
            group = metadata.row_group(index)
            picked = [c for c in range(group.num_columns) if _is_of(group.column(c).path_in_schema, columns)]
            chunks = [group.column(c) for c in picked]
            levels = [[metadata.schema.column(c).max_definition_level, metadata.schema.column(c).max_repetition_level] for c in picked]
            header = [[c.path_in_schema, c.physical_type, c.compression, [str(e) for e in c.encodings]] for c in chunks]
            meter.update(canonical_json([group.num_rows, header, levels]), lines=group.num_rows)
            for chunk in chunks:
                start = chunk.dictionary_page_offset if chunk.has_dictionary_page else chunk.data_page_offset
                file.seek(start)
                left = chunk.total_compressed_size
                while left and (block := file.read(min(block_bytes, left))):
                    left -= len(block)
                    meter.update(block)


def read_parquet(path: str, first: int, last: int, columns: tuple[str, ...], segment: int, batch_rows: int, batch_bytes: int) -> Iterator[pa.RecordBatch]:
    file = _parquet(path)
    row = 0
    for index in range(first, last):
        group = file.metadata.row_group(index)
        # A row's mean size bounds the rows of a batch: counts alone would let long documents take any amount of memory.
        rows = max(1, min(batch_rows, batch_bytes * max(1, group.num_rows) // max(1, group.total_byte_size)))
        try:
            for batch in file.iter_batches(batch_size=rows, row_groups=[index], columns=list(columns), use_threads=False):
                yield _placed(batch, segment, row)
                row += batch.num_rows
        except (pa.ArrowException, OSError) as error:
            raise SourceError(f"{path}: row group {index} is not readable ({_one_line(error)}); the file is damaged") from error


def arrow_ranges(path: str, range_bytes: int) -> Iterator[tuple[int, int, int]]:
    """(first record batch, last + 1, bytes): record batches together until they reach `range_bytes`."""
    first, size, index = 0, 0, -1
    for index, _, start, end in _arrow_batches(path):
        size += end - start
        if size >= range_bytes:
            yield first, index + 1, size
            first, size = index + 1, 0
    if index >= first:
        yield first, index + 1, size


def arrow_schema(path: str) -> pa.Schema:
    with pa.memory_map(path) as file:
        return _open_stream(file, path).schema


def digest_arrow(path: str, first: int, last: int, columns: tuple[str, ...], meter: Meter) -> None:
    meter.update(canonical_json(sorted(columns)))
    begin = None
    with pa.memory_map(path) as file:
        for index, batch, start, end in _arrow_batches(path):
            if index == 0:
                meter.update(_slice(file, 0, start))  # the schema, and dictionaries where there are some
            if first <= index < last:
                begin = start if begin is None else begin
                meter.update(_slice(file, start, end), lines=batch.num_rows)
            if index + 1 == last:
                return


def read_arrow(path: str, first: int, last: int, columns: tuple[str, ...], segment: int, batch_rows: int, batch_bytes: int) -> Iterator[pa.RecordBatch]:
    row = 0
    for index, batch, _, _ in _arrow_batches(path):
        if index >= last:
            return
        if index >= first:
            picked = batch.select([name for name in batch.schema.names if name in columns])
            _validate(picked, path, index)
            rows = max(1, min(batch_rows, batch_bytes * max(1, picked.num_rows) // max(1, picked.nbytes)))
            for start in range(0, picked.num_rows, rows):
                piece = picked.slice(start, rows)
                yield _placed(piece, segment, row)
                row += piece.num_rows


def _placed(batch: pa.RecordBatch, segment: int, row: int) -> pa.RecordBatch:
    rows = batch.num_rows
    batch = batch.append_column("segment", np.full(rows, segment, np.int32))
    batch = batch.append_column("line", row + np.arange(rows))
    return batch.append_column("offset", pa.nulls(rows, pa.int64()))


def _is_of(path_in_schema: str, columns: tuple[str, ...]) -> bool:
    """Whether a leaf, like `messages.list.element.content`, belongs to one of the columns, whose own names may hold dots."""
    return any(path_in_schema == name or path_in_schema.startswith(f"{name}.") for name in columns)


def _validate(batch: pa.RecordBatch, path: str, index: int) -> None:
    """Offsets that lead out of their buffers would end the process. Texts that are no UTF-8 pass: they are bad records, not a bad file."""
    for column in batch.columns:  # offsets are looked at before texts, so the one complaint cannot hide the other
        try:
            column.validate(full=True)
        except pa.ArrowInvalid as error:
            if "UTF8" not in str(error):
                raise SourceError(f"{path}: record batch {index} is not readable ({_one_line(error)}); the file is damaged") from error


def _parquet(path: str) -> Any:
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path, memory_map=False, buffer_size=1 << 20, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        raise SourceError(f"{path}: not readable as Parquet ({_one_line(error)}); the file is damaged or cut off") from error


def _arrow_batches(path: str) -> Iterator[tuple[int, pa.RecordBatch, int, int]]:
    """(index, batch, first byte, last byte + 1) of each record batch, without touching its data."""
    with pa.memory_map(path) as file:
        reader = _open_stream(file, path)
        index, start = 0, file.tell()
        while True:
            try:
                batch = reader.read_next_batch()
            except StopIteration:
                break
            except (pa.ArrowException, OSError) as error:
                raise SourceError(f"{path}: record batch {index} is not readable ({_one_line(error)}); the file is damaged or cut off") from error
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
        raise SourceError(f"{path}: not readable as Arrow ({_one_line(error)}); the file is damaged or cut off") from error


def _slice(file: Any, start: int, end: int) -> memoryview:
    file.seek(start)
    return memoryview(file.read_buffer(end - start))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:160]
