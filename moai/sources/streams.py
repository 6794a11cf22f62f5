"""Compressed files as streams of blocks, and where to cut any stream into ranges.

A compressed file or a JSON array has no second door: one reader goes through it once, and what lies between two cuts is
handed on as a range of its own (for a compressed file as a spool file, which a worker reads like any other).
"""

from __future__ import annotations

import functools
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from moai.core.errors import SourceError
from moai.core.files import read_range
from moai.engine.pipeline import Meter, Raw
from moai.sources.records import scan_values

COMPRESSIONS = {".zst": "zst", ".gz": "gz", ".xz": "xz", ".bz2": "bz2"}
"""Ending -> what it is called. Each may hold several streams (frames, members) one after another."""
_READ_BYTES = 1 << 18
_ZSTD_BYTES = 1 << 11
"""Compressed bytes handed over at once: 4 of them can stand for 128 KiB, and whatever they stand for must be held.
Costs nothing measurable.
"""


def open_blocks(path: str, compression: str, block_bytes: int) -> Iterator[bytes]:
    """The file's content, decompressed. Raises SourceError where a compressed stream is damaged or ends early."""
    if not compression:
        return read_range(path, 0, None, block_bytes)
    return _regroup({"zst": _zstd, "gz": _gzip}.get(compression, _stdlib)(path, compression), block_bytes)


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
    """Blocks on their way to a cutter, digested and, into `folder`, spooled as they pass: no more than a block is held,
    however long a range gets.
    """

    def __init__(self, blocks: Iterator[bytes], folder: Path | None, context: bytes = b"") -> None:
        self._blocks, self._folder, self._context = blocks, folder, context
        self._block, self._block_start = b"", 0  # the block drawn last, and its offset in the stream
        self._position = 0  # offset in the stream up to which it is written
        self._begin()

    def __iter__(self) -> Iterator[bytes]:
        for block in self._blocks:
            self._write_to(self._block_start + len(self._block))
            self._block, self._block_start = block, self._position
            yield block

    def end_range(self, cut: int | None) -> tuple[Raw, Path | None]:
        """End the open range at stream offset `cut`, which lies in the block drawn last, or (None) where the stream
        ended.
        """
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
        if self._context:
            self._meter.context(self._context)

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


def _zstd(path: str, _: str) -> Iterator[bytes]:
    import zstandard

    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    frame = decompressor.decompressobj()
    fresh = True  # at a frame's beginning: here a file may end
    try:
        for block in read_range(path, 0, None, _READ_BYTES):
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


def _gzip(path: str, _: str) -> Iterator[bytes]:
    member = zlib.decompressobj(wbits=31)
    fresh = True
    try:
        for block in read_range(path, 0, None, _READ_BYTES):
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


def _stdlib(path: str, compression: str) -> Iterator[bytes]:
    """xz and bzip2, whose decompressors are used alike."""
    import bz2
    import lzma

    new = bz2.BZ2Decompressor if compression == "bz2" else functools.partial(lzma.LZMADecompressor, lzma.FORMAT_XZ)
    stream = new()
    fresh = True
    try:
        for block in read_range(path, 0, None, _READ_BYTES):
            while block or not (fresh or stream.needs_input):
                if fresh and not (block := block.lstrip(b"\0")):
                    break  # zero padding between or behind streams, as xz allows
                fresh = False
                yield stream.decompress(block, _READ_BYTES)
                block = stream.unused_data
                if stream.eof:
                    stream, fresh = new(), True
    except (lzma.LZMAError, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise  # of the file, not of what it holds
        raise SourceError(f"{path}: not readable as {compression} ({error}); the file is damaged") from error
    if not fresh:
        raise SourceError(f"{path}: the {compression} stream ends early; the file was cut off, fetch or write it again")


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
