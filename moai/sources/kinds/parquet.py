"""Parquet: ranges are runs of row groups. Only the columns asked for are read or digested, the latter as they lie."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from moai.core.errors import SourceError
from moai.core.files import canonical_json, read_range, storage_of
from moai.engine.pipeline import Meter
from moai.sources.kinds.kind import File, Kind, Segment, one_line
from moai.sources.kinds.tables import STEP, bounded, type_names
from moai.sources.records import Limits

_KEY_OF_COLUMN = re.compile(rb"\x2c\x19[\x18\x28\x38\x48\x58\x68\x78\x88\x98\xa8\xb8\xc8\xd8\xe8]")
"""How ENCRYPTION_WITH_COLUMN_KEY begins in a footer, up to the number of parts of the column's path."""


@dataclass(frozen=True)
class Parquet(Kind):
    name = "parquet"
    endings = (".parquet",)

    def schema(self, file: File) -> Mapping[str, str]:
        found, hidden = type_names(_open(file.path).schema_arrow, file.path), _encrypted(file)
        return {
            name: "encrypted" if any(_is_of(path, (name,)) for path in hidden) else kind for name, kind in found.items()
        }

    def cuts(self, file: File, range_bytes: int) -> Iterator[tuple[int, int, int]]:
        """Row groups together until their compressed bytes reach `range_bytes`."""
        metadata = _open(file.path).metadata
        leaves = list(range(metadata.num_columns))
        if hidden := _encrypted(file):
            leaves = [c for c in leaves if metadata.schema.column(c).path not in hidden]
        first, size = 0, 0
        for index in range(metadata.num_row_groups):
            group = metadata.row_group(index)
            size += sum(group.column(c).total_compressed_size for c in leaves)
            if size >= range_bytes or index == metadata.num_row_groups - 1:
                yield first, index + 1, size
                first, size = index + 1, 0

    def digest(self, segment: Segment, columns: tuple[str, ...], limits: Limits, meter: Meter) -> None:
        """The raw column chunks that `read` decodes, with all that decides what they decode to: types, levels, rows."""
        parquet = _open(segment.file.path)
        metadata, schema = parquet.metadata, parquet.schema_arrow
        meter.update(canonical_json([[name, str(schema.field(name))] for name in columns if name in schema.names]))
        picked = [c for c in range(metadata.num_columns) if _is_of(metadata.schema.column(c).path, columns)]
        leaves = [metadata.schema.column(c) for c in picked]
        if hidden := _encrypted(segment.file).intersection(leaf.path for leaf in leaves):
            raise SourceError(f"{segment.file.path}: the column {min(hidden)!r} is encrypted; write it without")
        for index in range(segment.start, segment.end):
            group = metadata.row_group(index)
            chunks = [group.column(c) for c in picked]
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
            rows = min(STEP, limits.batch_rows)
            try:
                small = file.iter_batches(batch_size=rows, row_groups=[index], columns=list(columns), use_threads=False)
                yield from bounded(small, limits)
            except (pa.ArrowException, OSError) as error:
                raise SourceError(
                    f"{path}: row group {index} is not readable ({one_line(error)}); the file is damaged"
                ) from error


def _is_of(path_in_schema: str, columns: tuple[str, ...]) -> bool:
    """Whether a leaf, like `messages.list.element.content`, belongs to one of the columns, whose own names may hold
    dots.
    """
    return any(path_in_schema == name or path_in_schema.startswith(f"{name}.") for name in columns)


@functools.lru_cache(maxsize=1)  # asked for each range of a file
def _encrypted(file: File) -> frozenset[str]:
    """The leaves whose metadata is encrypted, as the footer names them: pyarrow ends the process when it is asked for
    that of one (26.0).
    """
    with storage_of(file.path).random_access(file.path, mapped=False) as opened:
        opened.seek(file.stamp.size - 8)
        length = int.from_bytes(opened.read(4), "little")
        opened.seek(max(0, file.stamp.size - 8 - length))
        footer = opened.read(length)
    return frozenset(filter(None, (_path_at(footer, found.end()) for found in _KEY_OF_COLUMN.finditer(footer))))


def _path_at(footer: bytes, at: int) -> str:
    """The path whose number of parts, in Thrift's compact protocol, the byte before `at` holds; "" if none is there."""
    parts = []
    for _ in range(footer[at - 1] >> 4):
        length, shift = 0, 0
        while at < len(footer):
            byte = footer[at]
            length, shift, at = length | (byte & 127) << shift, shift + 7, at + 1
            if byte < 128:
                break
        parts.append(footer[at : at + length])
        at += length
    return b".".join(parts).decode("utf-8", "replace")


def _open(path: str) -> Any:
    import pyarrow.parquet as pq

    try:
        file = storage_of(path).random_access(path, mapped=False)
        # Checksums cost nothing where there are none, and about 0.2 ms a megabyte where there are.
        return pq.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False, page_checksum_verification=True)
    except UnicodeDecodeError as error:
        raise SourceError(f"{path}: the name of a column is not UTF-8; write it again with another name") from error
    except (pa.ArrowException, OSError) as error:
        is_encrypted = "encrypted metadata" in str(error)
        raise SourceError(
            f"{path}: not readable as Parquet ({one_line(error)}); the file is "
            f"{'encrypted, write it without' if is_encrypted else 'damaged or cut off'}"
        ) from error
