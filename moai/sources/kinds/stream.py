"""Kinds of file that are records one after another in a stream of bytes, which may lie compressed."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import pyarrow as pa

from moai.core.files import read_range
from moai.engine.pipeline import Meter
from moai.sources.kinds.kind import File, Kind, Segment
from moai.sources.records import Limits, read_lines_in
from moai.sources.streams import line_cuts, open_blocks, skip


@dataclass(frozen=True)
class Stream(Kind):
    """`LocalSource` cuts the stream and lets small files share a shard; a kind says where it may cut and what the
    records are.
    """

    columnar: ClassVar[bool] = False

    @property
    def is_one_record(self) -> bool:
        """A file is one record, and never cut."""
        return False

    @abstractmethod
    def records(
        self,
        segment: Segment,
        blocks: Iterator[bytes],
        index: int,
        columns: tuple[str, ...],
        limits: Limits,
        meter: Meter,
    ) -> Iterator[pa.RecordBatch]:
        """Batches of the range that `blocks` hold, metered on the way. Places count from the beginning of the range."""

    def record_ends(self, file: File, blocks: Iterator[bytes], range_bytes: int, limits: Limits) -> Iterator[int]:
        """Offsets behind the first record that ends at or after each mark of `range_bytes`, in the block drawn last."""
        return line_cuts(blocks, range_bytes)

    def stream(self, file: File, block_bytes: int) -> Iterator[bytes]:
        """The whole stream."""
        return open_blocks(file.path, file.compression, block_bytes)

    def is_seekable(self, file: File) -> bool:
        """Whether the stream is the file as it lies, so that a range can be read without what is before it."""
        return not file.compression

    def context(self, file: File) -> bytes:
        """What decides how every range is read, besides its bytes, like the header of a table."""
        return b""

    def digest(self, segment: Segment, columns: tuple[str, ...], limits: Limits, meter: Meter) -> None:
        self._begin(segment, meter)
        for block in self._blocks(segment, limits.batch_bytes):
            meter.update(block, lines=block.count(b"\n"))

    def read(self, segment: Segment, columns: tuple[str, ...], limits: Limits) -> Iterator[pa.RecordBatch]:
        return self.batches(segment, 0, columns, limits)

    def batches(
        self, segment: Segment, index: int, columns: tuple[str, ...], limits: Limits, meter: Meter | None = None
    ) -> Iterator[pa.RecordBatch]:
        if meter is None:
            meter = Meter()
            meter.begin_segment()
        self._begin(segment, meter)
        return self.records(segment, self._blocks(segment, limits.batch_bytes), index, columns, limits, meter)

    def _begin(self, segment: Segment, meter: Meter) -> None:
        if context := self.context(segment.file):
            meter.context(context)

    def _blocks(self, segment: Segment, block_bytes: int) -> Iterator[bytes]:
        file = segment.file
        if segment.spool:
            return read_range(segment.spool, 0, segment.end - segment.start, block_bytes)
        if not self.is_seekable(file):
            blocks = self.stream(file, block_bytes)
            return skip(blocks, segment.start, segment.end) if segment.aligned else blocks
        read = read_range if segment.aligned else read_lines_in  # of a whole file the two are one
        return read(file.path, segment.start, segment.end, block_bytes)
