"""Which columns an input has, from its first records or its own schema: what the text's shape is chosen from."""

from __future__ import annotations

from collections.abc import Iterator

import orjson
import pyarrow as pa

from moai.engine.pipeline import Meter
from moai.errors import SourceError
from moai.sources import columns as columnar
from moai.sources.discover import Input
from moai.sources.local import LocalSource

_RECORDS = 100
_FILES = 10


def columns_of(source: LocalSource, given: Input) -> dict[str, str]:
    """Column name -> "string", "list" or another type's name. JSON is judged by the first 100 objects of its first files.

    Raises SourceError when no record of them is a JSON object.
    """
    if given.kind == "parquet":
        return _types(columnar.parquet_schema(given.files[0].path))
    if given.kind == "arrow":
        return _types(columnar.arrow_schema(given.files[0].path))
    found: dict[str, str] = {}
    for row in _objects(source):
        for name, value in row.items():
            kind = "string" if isinstance(value, str) else "list" if isinstance(value, list) else type(value).__name__
            if found.get(name) not in ("string", "list"):
                found[name] = kind
    if not found:
        raise SourceError(f"{given.spec}: none of its first records is a JSON object; is it JSON lines or a JSON array? (plain text belongs in a .txt file)")
    return found


def _objects(source: LocalSource) -> Iterator[dict[str, object]]:
    seen = 0
    for shard in source.first_shards(_FILES):
        for batch in source.read(shard, Meter()):
            for record in batch["record"].to_pylist():
                try:
                    row = orjson.loads(record.removeprefix(b"\xef\xbb\xbf"))
                except orjson.JSONDecodeError:
                    continue
                if isinstance(row, dict):
                    yield row
                    seen += 1
                if seen >= _RECORDS:
                    return
        if seen:
            return


def _types(schema: pa.Schema) -> dict[str, str]:
    names = {}
    for field in schema:
        text = pa.types.is_string(field.type) or pa.types.is_large_string(field.type) or pa.types.is_string_view(field.type)
        nested = pa.types.is_list(field.type) or pa.types.is_large_list(field.type)
        names[field.name] = "string" if text else "list" if nested else str(field.type)
    return names
