"""What Arrow and Parquet files have in common: names and types of their columns, and batches that are bounded once they
are decoded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pyarrow as pa

from moai.core.errors import SourceError
from moai.sources.records import Limits

STEP = 16
"""Rows that are decoded before anyone knows how large they are: a dictionary says a long text once for all its rows.
Costs about 1 us a row against 1,000 at once."""


def type_names(schema: pa.Schema, path: str) -> dict[str, str]:
    """Column -> "string", "list", or Arrow's name of its type. Raises SourceError for a name that is not UTF-8."""
    try:
        names = schema.names
    except UnicodeDecodeError as error:
        raise SourceError(
            f"{path}: the name of a column is not UTF-8 ({error.object!r}); write it again with another name"
        ) from error
    found = {name: _type_name(kind) for name, kind in zip(names, schema.types)}
    return found | {name: f"{number} columns of one name" for name, number in Counter(names).items() if number > 1}


def bounded(batches: Iterator[pa.RecordBatch], limits: Limits) -> Iterator[pa.RecordBatch]:
    """Small batches as ones of up to the limits, their columns without dictionaries and views: as large as they
    look.
    """
    held: list[pa.RecordBatch] = []
    rows = size = 0
    schema: pa.Schema | None = None
    for batch in batches:
        schema = schema or plain_schema(batch.schema)
        flat = batch if batch.schema == schema else _cast(batch, schema)
        num_bytes = flat.nbytes if flat else 0
        if held and (flat is None or rows + flat.num_rows > limits.batch_rows or size + num_bytes > limits.batch_bytes):
            yield from _within(held, size, limits)
            held, rows, size = [], 0, 0
        if flat is None:
            yield batch
        else:
            held.append(flat)
            rows, size = rows + flat.num_rows, size + num_bytes
    if held:
        yield from _within(held, size, limits)


def plain_schema(schema: pa.Schema) -> pa.Schema:
    """With types whose values each stand for themselves."""
    return pa.schema([field.with_type(_plain(field.type)) for field in schema])


def _plain(kind: pa.DataType) -> pa.DataType:
    types = pa.types
    if types.is_dictionary(kind) or types.is_run_end_encoded(kind):
        return _plain(kind.value_type)
    if types.is_string_view(kind) or types.is_binary_view(kind):
        return pa.large_string() if types.is_string_view(kind) else pa.large_binary()
    if types.is_struct(kind):
        return pa.struct([field.with_type(_plain(field.type)) for field in kind.fields])
    if types.is_list(kind) or types.is_list_view(kind):
        return pa.list_(kind.value_field.with_type(_plain(kind.value_type)))
    if types.is_large_list(kind) or types.is_large_list_view(kind):
        return pa.large_list(kind.value_field.with_type(_plain(kind.value_type)))
    return kind


def _within(held: list[pa.RecordBatch], num_bytes: int, limits: Limits) -> Iterator[pa.RecordBatch]:
    batch = pa.concat_batches(held) if len(held) > 1 else held[0]
    rows = limits.rows_of(batch.num_rows, num_bytes)
    return (batch.slice(start, rows) for start in range(0, batch.num_rows, rows))


def _cast(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch | None:
    """None where Arrow cannot write the values out, as those of run-end encoded columns."""
    try:
        return batch.cast(schema)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return None


def _type_name(kind: pa.DataType) -> str:
    decoded = _plain(kind)
    if pa.types.is_string(decoded) or pa.types.is_large_string(decoded):
        return "string"
    return "list" if pa.types.is_list(decoded) or pa.types.is_large_list(decoded) else str(kind)
