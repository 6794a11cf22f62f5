"""JSON: an array, one value a line, or values spread over lines. What a file is, its beginning says."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import orjson
import pyarrow as pa

from moai.core.files import input_errors
from moai.engine.pipeline import Meter
from moai.sources.kinds.kind import File, Segment
from moai.sources.kinds.lines import Lines
from moai.sources.records import Limits, scan_values, split_lines, split_values
from moai.sources.streams import line_cuts, open_blocks, value_cuts

_PEEK_BYTES = 1 << 20
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Json(Lines):
    name = "json"
    endings = (".json",)

    def is_lines(self, file: File) -> bool:
        return _framing(file) == "lines"

    def record_ends(self, file: File, blocks: Iterator[bytes], range_bytes: int, limits: Limits) -> Iterator[int]:
        if self.is_lines(file):
            return line_cuts(blocks, range_bytes)
        return value_cuts(blocks, range_bytes, limits.max_record_bytes, in_array=_framing(file) == "array")

    def records(
        self,
        segment: Segment,
        blocks: Iterator[bytes],
        index: int,
        columns: tuple[str, ...],
        limits: Limits,
        meter: Meter,
    ) -> Iterator[pa.RecordBatch]:
        if self.is_lines(segment.file):
            return split_lines(blocks, index, limits, meter)
        in_array = _framing(segment.file) == "array"
        return split_values(blocks, index, limits, meter, in_array=in_array, opened=segment.start > 0)


@functools.lru_cache(maxsize=1)  # asked again for each range of a file
def _framing(file: File) -> str:
    """array | lines | values"""
    with input_errors(file.path):
        head = (
            next(open_blocks(file.path, file.compression, _PEEK_BYTES), b"")[:_PEEK_BYTES].removeprefix(_BOM).lstrip()
        )
    if head.startswith(b"["):
        return "array"
    first_line = head.split(b"\n", 1)[0].strip()
    first = next(scan_values(iter((head,)), _PEEK_BYTES, in_array=False), None)
    try:
        orjson.loads(first.value if first else b"")
    except orjson.JSONDecodeError:  # a broken first value, or one too long for a look
        return "values" if first_line == b"{" and len(head) > len(first_line) else "lines"
    assert first is not None
    return "values" if b"\n" in first.value or head[first.end :].startswith(b"{") else "lines"
