"""Which columns an input has, from its first records or its own schema: what the text's shape is chosen from."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import orjson
import pyarrow as pa

from moai.errors import SourceError
from moai.sources import columns as columnar
from moai.sources.discover import Input
from moai.sources.local import LocalSource

_OBJECTS = 100
_RECORDS = 1000
_FILES = 10


def columns_of(source: LocalSource, given: Input) -> dict[str, str]:
    """Column name -> "string", "list" or another type's name. JSON is judged by the first 100 objects of its first files.

    Raises SourceError when none of the first 1,000 records of these files is a JSON object.
    """
    if given.kind == "parquet":
        return types_of(columnar.parquet_schema(given.files[0].path))
    if given.kind == "arrow":
        return types_of(columnar.arrow_schema(given.files[0].path))
    found: dict[str, str] = {}
    for row in _objects(source, given):
        for name, value in row.items():
            kind = "string" if isinstance(value, str) else "list" if isinstance(value, list) else type(value).__name__
            if found.get(name) not in ("string", "list"):
                found[name] = kind
    if not found:
        raise SourceError(f"{given.spec}: its first records are JSON objects without any key; nothing to make text of")
    return found


def _objects(source: LocalSource, given: Input) -> Iterator[dict[str, object]]:
    """The first objects of the first file that has any."""
    complaint = "there is none"
    for batches in source.looks(_FILES):
        objects = 0
        for record in itertools.islice(_records(batches), _RECORDS):
            try:
                row = orjson.loads(record.removeprefix(b"\xef\xbb\xbf"))
            except orjson.JSONDecodeError as error:
                complaint = str(error)
                continue
            if not isinstance(row, dict):
                complaint = f"found {type(row).__name__}"
                continue
            yield row
            objects += 1
            if objects == _OBJECTS:
                return
        if objects:
            return
    raise SourceError(
        f"{given.spec}: none of its first records is a JSON object ({complaint}); is it UTF-8, and JSON lines or a JSON array? (plain text belongs in a .txt file)"
    )


def _records(batches: Iterator[pa.RecordBatch]) -> Iterator[bytes]:
    for batch in batches:
        yield from (record for record in batch["record"].to_pylist() if record.strip())


def types_of(schema: pa.Schema) -> dict[str, str]:
    """Column name -> "string", "list" or Arrow's name of another type."""
    names = {}
    for field in schema:
        text = pa.types.is_string(field.type) or pa.types.is_large_string(field.type) or pa.types.is_string_view(field.type)
        nested = pa.types.is_list(field.type) or pa.types.is_large_list(field.type)
        names[field.name] = "string" if text else "list" if nested else str(field.type)
    return names
