"""Parquet: ranges are runs of row groups. Only the columns asked for are read or digested, the latter as they lie."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from moai.core.errors import SourceError
from moai.core.files import canonical_json, read_range, storage_of
from moai.engine.pipeline import Meter
from moai.sources.kinds.kind import File, Kind, Segment, one_line, type_names
from moai.sources.records import Limits


@dataclass(frozen=True)
class Parquet(Kind):
    name = "parquet"
    endings = (".parquet",)

    def schema(self, file: File) -> Mapping[str, str]:
        return type_names(_open(file.path).schema_arrow)

    def cuts(self, file: File, range_bytes: int) -> Iterator[tuple[int, int, int]]:
        """Row groups together until their compressed bytes reach `range_bytes`."""
        metadata = _open(file.path).metadata
        first, size = 0, 0
        for index in range(metadata.num_row_groups):
            group = metadata.row_group(index)
            size += sum(group.column(c).total_compressed_size for c in range(group.num_columns))
            if size >= range_bytes or index == metadata.num_row_groups - 1:
                yield first, index + 1, size
                first, size = index + 1, 0

    def digest(self, segment: Segment, columns: tuple[str, ...], limits: Limits, meter: Meter) -> None:
        """The raw column chunks that `read` decodes, with all that decides what they decode to: types, levels, rows."""
        parquet = _open(segment.file.path)
        metadata, schema = parquet.metadata, parquet.schema_arrow
        meter.update(canonical_json([[name, str(schema.field(name))] for name in columns if name in schema.names]))
        for index in range(segment.start, segment.end):
            group = metadata.row_group(index)
            picked = [c for c in range(group.num_columns) if _is_of(group.column(c).path_in_schema, columns)]
            chunks = [group.column(c) for c in picked]
            leaves = [metadata.schema.column(c) for c in picked]
            levels = [[leaf.max_definition_level, leaf.max_repetition_level] for leaf in leaves]
            header = [[c.path_in_schema, c.physical_type, c.compression, [str(e) for e in c.encodings]] for c in chunks]
            meter.update(canonical_json([group.num_rows, header, levels]), lines=group.num_rows)
            for chunk in chunks:
                start = chunk.dictionary_page_offset if chunk.has_dictionary_page else chunk.data_page_offset
                for block in read_range(
                    segment.file.path, start, start + chunk.total_compressed_size, limits.batch_bytes
                ):
                    meter.update(block)

    def read(self, segment: Segment, columns: tuple[str, ...], limits: Limits) -> Iterator[pa.RecordBatch]:
        path = segment.file.path
        file = _open(path)
        for index in range(segment.start, segment.end):
            group = file.metadata.row_group(index)
            rows = limits.rows_of(group.num_rows, group.total_byte_size)
            try:
                yield from file.iter_batches(
                    batch_size=rows, row_groups=[index], columns=list(columns), use_threads=False
                )
            except (pa.ArrowException, OSError) as error:
                raise SourceError(
                    f"{path}: row group {index} is not readable ({one_line(error)}); the file is damaged"
                ) from error


def _is_of(path_in_schema: str, columns: tuple[str, ...]) -> bool:
    """Whether a leaf, like `messages.list.element.content`, belongs to one of the columns, whose own names may hold
    dots.
    """
    return any(path_in_schema == name or path_in_schema.startswith(f"{name}.") for name in columns)


def _open(path: str) -> Any:
    import pyarrow.parquet as pq

    try:
        file = storage_of(path).random_access(path, mapped=False)
        return pq.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        raise SourceError(
            f"{path}: not readable as Parquet ({one_line(error)}); the file is damaged or cut off"
        ) from error
