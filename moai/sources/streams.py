"""Compressed files as streams of blocks, and where to cut any stream into ranges.

A compressed file or a JSON array has no second door: one reader goes through it once, and what lies between two cuts is
handed on as a range of its own (for a compressed file as a spool file, which a worker reads like any other).
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from moai.errors import SourceError
from moai.sources.records import read_range, scan_values

COMPRESSIONS = {".zst": "zst", ".gz": "gz"}
EXPANSION = 8
"""A compressed file counts for this many times its size where sizes decide what shares a shard."""
_READ_BYTES = 1 << 18


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


class Tee:
    """Blocks on their way to a cutter, kept until the bytes up to a cut are taken: at most one range and one block."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks = blocks
        self._kept: deque[bytes] = deque()
        self._from = 0

    def __iter__(self) -> Iterator[bytes]:
        for block in self._blocks:
            self._kept.append(block)
            yield block

    def take(self, end: int | None) -> Iterator[bytes]:
        """The kept bytes up to stream offset `end`, or all of them."""
        while self._kept and (end is None or self._from < end):
            block = self._kept.popleft()
            if end is not None and self._from + len(block) > end:
                self._kept.appendleft(block[end - self._from :])
                block = block[: end - self._from]
            self._from += len(block)
            yield block


def line_cuts(blocks: Iterator[bytes], range_bytes: int) -> Iterator[int]:
    """Offsets behind the first newline at or after each mark of `range_bytes`."""
    position, mark = 0, range_bytes
    for block in blocks:
        at = 0
        while (at := block.find(b"\n", max(at, mark - 1 - position)) + 1) > 0:
            yield position + at
            mark = ((position + at) // range_bytes + 1) * range_bytes
        position += len(block)


def value_cuts(blocks: Iterator[bytes], range_bytes: int, max_bytes: int, *, in_array: bool) -> Iterator[int]:
    """Offsets behind the first JSON value that ends at or after each mark of `range_bytes`."""
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
            while block:
                fresh = False
                yield frame.decompress(block)
                block = frame.unused_data if frame.eof else b""
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
                yield member.decompress(block)
                block = member.unused_data
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
    """Pieces of any size as blocks of about `block_bytes`."""
    kept: list[bytes] = []
    size = 0
    for piece in pieces:
        kept.append(piece)
        size += len(piece)
        if size >= block_bytes:
            yield b"".join(kept)
            kept, size = [], 0
    if size:
        yield b"".join(kept)
