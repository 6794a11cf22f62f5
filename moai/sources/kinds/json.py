"""JSON: an array, one value a line, or values spread over lines. What a file is, its beginning says."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import pyarrow as pa

from moai.core.errors import SourceError
from moai.core.files import input_errors
from moai.engine.pipeline import Meter
from moai.sources.kinds.kind import File, Segment
from moai.sources.kinds.lines import Lines
from moai.sources.records import BrokenValues, Limits, parses, scan_values, split_lines, split_values
from moai.sources.streams import line_cuts, open_blocks, value_cuts

_PEEK_BYTES = 1 << 20
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Json(Lines):
    name = "json"
    endings = (".json",)
    version: ClassVar[int] = 2
    """1 took all that stands behind a bracket or quote too many, or not closed, for one bad record."""

    def is_lines(self, file: File) -> bool:
        return _framing(file) == "lines"

    def record_ends(self, file: File, blocks: Iterator[bytes], range_bytes: int, limits: Limits) -> Iterator[int]:
        if self.is_lines(file):
            yield from line_cuts(blocks, range_bytes)
            return
        with _told(file):
            yield from value_cuts(blocks, range_bytes, limits.max_record_bytes, in_array=_framing(file) == "array")

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
            yield from split_lines(blocks, index, limits, meter)
            return
        in_array, part = _framing(segment.file) == "array", segment.aligned
        with _told(segment.file):  # of a part the cuts have shown already that the file is whole
            yield from split_values(
                blocks, index, limits, meter, in_array=in_array, opened=segment.start > 0, ends=not part
            )


@contextlib.contextmanager
def _told(file: File) -> Iterator[None]:
    """Raises SourceError in place of BrokenValues."""
    try:
        yield
    except BrokenValues as broken:
        raise SourceError(
            f"{file.path}: line {broken.line + 1}: {broken}; mend it (in a .jsonl file, with a record a line, a "
            f"broken one is set aside)"
        ) from broken


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
    first = None
    with contextlib.suppress(BrokenValues):  # or too long for a look
        for span in scan_values(iter((head,)), _PEEK_BYTES, in_array=False):
            first = first or span
            if b"\n" in span.value and parses(span.value):
                return "values"
    if first is None or b"\n" in first.value:
        return "values" if first_line == b"{" and len(head) > len(first_line) else "lines"
    return "values" if head[first.end :].lstrip(b" \t").startswith(b"{") else "lines"
