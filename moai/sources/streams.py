"""Compressed files as streams of blocks, and where to cut any stream into ranges.

A compressed file or a JSON array has no second door: one reader goes through it once, and what lies between two cuts is
handed on as a range of its own (for a compressed file as a spool file, which a worker reads like any other).
"""

from __future__ import annotations

import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from moai.engine.pipeline import Meter, Raw
from moai.errors import SourceError
from moai.sources.records import read_range, scan_values

COMPRESSIONS = {".zst": "zst", ".gz": "gz"}
EXPANSION = 8
"""A compressed file counts for this many times its size where sizes decide what shares a shard."""
_READ_BYTES = 1 << 18
_ZSTD_BYTES = 1 << 11
"""Compressed bytes handed over at once: 4 of them can stand for 128 KiB, and whatever they stand for must be held. Costs nothing measurable."""


def open_blocks(path: str, compression: str, block_bytes: int) -> Iterator[bytes]:
    """The file's content, decompressed. Raises SourceError where a compressed stream is damaged or ends early."""
    if not compression:
        return read_range(path, 0, Path(path).stat().st_size, block_bytes)
    return _regroup(_zstd(path) if compression == "zst" else _gzip(path), block_bytes)


def skip(blocks: Iterator[bytes], start: int, end: int) -> Iterator[bytes]:
    """The bytes [start, end) of a stream."""
    position = 0
    for block in blocks:
        piece = block[max(0, start - position) : max(0, end - position)]
        position += len(block)
        if piece:
            yield piece
        if position >= end:
            return


class RangeWriter:
    """Blocks on their way to a cutter, digested and, into `folder`, spooled as they pass: no more than a block is held, however long a range gets."""

    def __init__(self, blocks: Iterator[bytes], folder: Path | None) -> None:
        self._blocks, self._folder = blocks, folder
        self._block, self._block_start = b"", 0  # the block drawn last, and its offset in the stream
        self._position = 0  # offset in the stream up to which it is written
        self._begin()

    def __iter__(self) -> Iterator[bytes]:
        for block in self._blocks:
            self._write_to(self._block_start + len(self._block))
            self._block, self._block_start = block, self._position
            yield block

    def end_range(self, cut: int | None) -> tuple[Raw, Path | None]:
        """End the open range at stream offset `cut`, which lies in the block drawn last, or (None) where the stream ended."""
        self._write_to(self._block_start + len(self._block) if cut is None else cut)
        raw, spool = self._meter.raw(), self._spool
        self.close()
        self._begin()
        return raw, spool

    def close(self) -> None:
        if self._file:
            self._file.close()

    def _begin(self) -> None:
        self._file: BinaryIO | None = None
        self._spool: Path | None = None
        self._meter = Meter()
        self._meter.begin_segment()

    def _write_to(self, end: int) -> None:
        piece = self._block[self._position - self._block_start : end - self._block_start]
        self._position = end
        if piece and self._folder and not self._file:
            self._spool = self._folder / f"{uuid.uuid4().hex}.spool"
            self._file = open(self._spool, "wb")  # noqa: SIM115 (open until the range ends)
        if self._file:
            self._file.write(piece)
        self._meter.update(piece, lines=piece.count(b"\n"))


def line_cuts(blocks: Iterator[bytes], range_bytes: int) -> Iterator[int]:
    """Offsets behind the first newline at or after each mark of `range_bytes`, in the block drawn last."""
    position, mark = 0, range_bytes
    for block in blocks:
        at = 0
        while (at := block.find(b"\n", max(at, mark - 1 - position)) + 1) > 0:
            yield position + at
            mark = ((position + at) // range_bytes + 1) * range_bytes
        position += len(block)


def value_cuts(blocks: Iterator[bytes], range_bytes: int, max_bytes: int, *, in_array: bool) -> Iterator[int]:
    """Offsets behind the first JSON value that ends at or after each mark of `range_bytes`, in the block drawn last."""
    mark = range_bytes
    for span in scan_values(blocks, max_bytes, in_array=in_array):
        if span.end >= mark:
            yield span.end
            mark = (span.end // range_bytes + 1) * range_bytes


def _zstd(path: str) -> Iterator[bytes]:
    import zstandard

    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    frame = decompressor.decompressobj()
    fresh = True  # at a frame's beginning: here a file may end
    try:
        for block in _read(path):
            for start in range(0, len(block), _ZSTD_BYTES):
                piece = block[start : start + _ZSTD_BYTES]
                while piece:
                    fresh = False
                    yield frame.decompress(piece)
                    piece = frame.unused_data if frame.eof else b""
                    if frame.eof:
                        frame, fresh = decompressor.decompressobj(), True
    except zstandard.ZstdError as error:
        raise SourceError(f"{path}: not readable as zstd ({error}); the file is damaged") from error
    if not fresh:
        raise SourceError(f"{path}: the zstd stream ends early; the file was cut off, fetch or write it again")


def _gzip(path: str) -> Iterator[bytes]:
    member = zlib.decompressobj(wbits=31)
    fresh = True
    try:
        for block in _read(path):
            while block:
                if fresh and not block.strip(b"\0"):
                    break  # zero padding behind the last member, as gzip itself allows
                fresh = False
                yield member.decompress(block, _READ_BYTES)
                block = member.unused_data if member.eof else member.unconsumed_tail
                if member.eof:
                    member, fresh = zlib.decompressobj(wbits=31), True
    except zlib.error as error:
        raise SourceError(f"{path}: not readable as gzip ({error}); the file is damaged") from error
    if not fresh:
        raise SourceError(f"{path}: the gzip stream ends early; the file was cut off, fetch or write it again")


def _read(path: str) -> Iterator[bytes]:
    with open(path, "rb", buffering=0) as file:
        while block := file.read(_READ_BYTES):
            yield block


def _regroup(pieces: Iterator[bytes], block_bytes: int) -> Iterator[bytes]:
    """Pieces of any size as blocks of at most `block_bytes`."""
    kept: list[bytes] = []
    size = 0
    for piece in pieces:
        for start in range(0, len(piece), block_bytes):
            kept.append(piece[start : start + block_bytes])
            size += len(kept[-1])
            if size >= block_bytes:
                joined = b"".join(kept)
                yield joined[:block_bytes]
                kept, size = [joined[block_bytes:]], size - block_bytes
    if size:
        yield b"".join(kept)
