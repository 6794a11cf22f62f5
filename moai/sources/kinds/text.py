"""Plain text: a document a line, or a document a file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import pyarrow as pa

from moai.engine.pipeline import Meter
from moai.sources.kinds.kind import File, Segment
from moai.sources.kinds.stream import Stream
from moai.sources.records import Limits, split_lines, whole_file


@dataclass(frozen=True)
class Text(Stream):
    name = "txt"
    endings = (".txt",)
    plain: ClassVar[bool] = True

    txt_document: str = "line"
    """What a document is: a `line` or the `file`."""

    @property
    def is_one_record(self) -> bool:
        return self.txt_document == "file"

    def schema(self, file: File) -> Mapping[str, str]:
        return {}

    def is_lines(self, file: File) -> bool:
        return not self.is_one_record

    def records(
        self,
        segment: Segment,
        blocks: Iterator[bytes],
        index: int,
        columns: tuple[str, ...],
        limits: Limits,
        meter: Meter,
    ) -> Iterator[pa.RecordBatch]:
        return (whole_file if self.is_one_record else split_lines)(blocks, index, limits, meter)
