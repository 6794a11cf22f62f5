"""JSON lines: a JSON object a line."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import orjson
import pyarrow as pa

from moai.engine.pipeline import Meter
from moai.engine.schema import Columns
from moai.sources.kinds.kind import File, NoObjects, Segment
from moai.sources.kinds.stream import Stream
from moai.sources.records import Limits, split_lines

_OBJECTS = 100
_RECORDS = 1000
_TYPES: dict[type, str] = {str: "string", list: "list"}
_LOOK = Limits(max_record_bytes=16 << 20, batch_rows=1000, batch_bytes=1 << 18)


@dataclass(frozen=True)
class Lines(Stream):
    name = "lines"
    endings: ClassVar[tuple[str, ...]] = (".jsonl", ".ndjson")

    def schema(self, file: File) -> Mapping[str, str]:
        """Judged by the first 100 objects, and by more while some column was always null."""
        found = Columns()
        for index, row in enumerate(self._objects(file)):
            if index >= _OBJECTS and "NoneType" not in found.values():
                break
            found.add({name: _TYPES.get(type(value), type(value).__name__) for name, value in row.items()})
        return found

    def is_lines(self, file: File) -> bool:
        return True

    def records(
        self,
        segment: Segment,
        blocks: Iterator[bytes],
        index: int,
        columns: tuple[str, ...],
        limits: Limits,
        meter: Meter,
    ) -> Iterator[pa.RecordBatch]:
        return split_lines(blocks, index, limits, meter)

    def _objects(self, file: File) -> Iterator[dict[str, object]]:
        objects, complaint = 0, "there is none"
        batches = self.read(Segment(file, 0, file.stamp.size), (), _LOOK)
        records = (record for batch in batches for record in batch["record"].to_pylist() if record.strip())
        for record in itertools.islice(records, _RECORDS):
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
        if not objects:
            raise NoObjects(complaint)
