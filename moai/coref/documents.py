"""Records -> documents with a name of their own: `text`, `doc_id`, and the place for whoever must set one aside."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import orjson
import pyarrow as pa
import xxhash

from moai.engine.part import UNKEYED, Part
from moai.transforms.text import ToText

PLACE = ("segment", "line", "offset")
SCHEMA = pa.schema(
    {"text": pa.large_string(), "doc_id": pa.string(), "segment": pa.int32(), "line": pa.int64(), "offset": pa.int64()}
)


@dataclass(frozen=True, kw_only=True)
class Documents(Part):
    """One record at a time, since only a record that gives a text gives its id; beside Kiwi's 13 ms that costs nothing.

    A document without `id_column` is called by the hash of its text: a worker knows what it reads and not how much was
    read before, and equal documents shall have equal names.
    """

    to_text: ToText
    id_column: str = "id"
    batch_rows: int = field(default=64, metadata=UNKEYED)

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            for first in range(0, batch.num_rows, self.batch_rows):
                few = batch.slice(first, self.batch_rows)
                if rows := [row for index in range(few.num_rows) for row in self._rows(few.slice(index, 1))]:
                    yield pa.record_batch(
                        [pa.array(values, kind) for values, kind in zip(zip(*rows), SCHEMA.types)], schema=SCHEMA
                    )

    def _rows(self, record: pa.RecordBatch) -> Iterator[tuple[Any, ...]]:
        for text in self.to_text.strings(record):
            name = self._named(record) or xxhash.xxh3_128_hexdigest(text.encode())
            yield text, name, *(record[column][0].as_py() for column in PLACE)

    def _named(self, record: pa.RecordBatch) -> str:
        value = None
        if not self.to_text.plain and "record" in record.schema.names:
            value = orjson.loads(record["record"][0].as_py().removeprefix(b"\xef\xbb\xbf")).get(self.id_column)
        elif not self.to_text.plain and self.id_column in record.schema.names:
            value = record[self.id_column][0].as_py()
        return str(value) if isinstance(value, str | int) else ""
