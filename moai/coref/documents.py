"""Records -> documents with a name of their own: `text`, `doc_id`, and the place for whoever must set one aside."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import orjson
import pyarrow as pa
import xxhash

from moai.coref.korean import RULE
from moai.engine.part import UNKEYED, Part
from moai.engine.pipeline import count
from moai.transforms.text import ToText

PLACE = ("segment", "line", "offset")
SCHEMA = pa.schema(
    {"text": pa.large_string(), "doc_id": pa.string(), "segment": pa.int32(), "line": pa.int64(), "offset": pa.int64()}
)


@dataclass(frozen=True, kw_only=True)
class Documents(Part):
    """One record at a time, since only a record that gives a text gives its id; beside Kiwi's 13 ms that costs nothing.

    Where `min_doc_score` is given the records are HPLT's, and what their own columns say against a document drops it:
    `filter` is not "keep", the first of `doc_scores` (0 to 10, of the whole) is below it, or `pii` lists places of
    addresses and numbers of people.

    A document without `id_column` is called by the hash of its text: a worker knows what it reads and not how much was
    read before, and equal documents shall have equal names.
    """

    to_text: ToText
    id_column: str = "id"
    min_doc_score: float | None = None
    keep_pii: bool = False
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
            if self.min_doc_score is not None and self._is_refused(record):
                count("filtered")
                count(f"filtered.{RULE}.source")
                continue
            name = self._named(record) or xxhash.xxh3_128_hexdigest(text.encode())
            yield text, name, *(record[column][0].as_py() for column in PLACE)

    def _is_refused(self, record: pa.RecordBatch) -> bool:
        score = self._value(record, "doc_scores") or [10.0]
        refused = (self._value(record, "filter") or "keep") != "keep" or score[0] < self.min_doc_score
        return refused or (not self.keep_pii and bool(self._value(record, "pii")))

    def _named(self, record: pa.RecordBatch) -> str:
        value = None if self.to_text.plain else self._value(record, self.id_column)
        return str(value) if isinstance(value, str | int) else ""

    def _value(self, record: pa.RecordBatch, column: str) -> Any:
        if "record" in record.schema.names:
            return orjson.loads(record["record"][0].as_py().removeprefix(b"\xef\xbb\xbf")).get(column)
        return record[column][0].as_py() if column in record.schema.names else None
