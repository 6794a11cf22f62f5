"""Compressed files as streams of blocks, and where to cut any stream into ranges.

A compressed file or a JSON array has no second door: one reader goes through it once, and what lies between two cuts is
handed on as a range of its own (for a compressed file as a spool file, which a worker reads like any other).
"""

from __future__ import annotations

import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

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
    return _regroup(_decompressed(path, compression), block_bytes)


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
    """Offsets behind the first JSON value that ends at or after each mark of `range_bytes`, in the block drawn last.
    Raises BrokenValues.
    """
    mark = range_bytes
    for span in scan_values(blocks, max_bytes, in_array=in_array):
        if span.end >= mark:
            yield span.end
            mark = (span.end // range_bytes + 1) * range_bytes


def _decompressed(path: str, compression: str) -> Iterator[bytes]:
    """The members (frames, streams) one after another. Raises SourceError."""
    name, new, beginnings = _FORMATS[compression]
    member: _Member | None = None  # None at a member's beginning: here a file may end
    begin = position = 0  # of the member, and behind the block
    problem = f"the {name} stream ends early; the file was cut off, fetch or write it again"
    cause: Exception | None = None
    try:
        for block in read_range(path, 0, None, _READ_BYTES):
            position += len(block)
            while block:
                if member is None:
                    if compression != "zst" and not (block := block.lstrip(b"\0")):
                        break  # zero padding between or behind members, as gzip and xz allow
                    begin, member = position - len(block), new()
                yield from member.feed(block)
                block = member.rest
                if member.is_whole:
                    member = None
    except Exception as error:
        if member is None or not isinstance(error, member.errors) or getattr(error, "errno", None):
            raise  # of the file, not of what it holds
        problem, cause = f"not readable as {name} ({error}); the file is damaged", error
    if member is None:
        return
    head = next(read_range(path, begin, begin + 16, 16))
    if not any(beginning.startswith(head[: len(beginning)]) for beginning in beginnings):
        problem = f"not readable as {name}: " + (
            f"what stands behind its last member, from byte {begin:,}, is none; cut it off, or fetch the file again"
            if begin
            else f"it begins with {head!r}; if it is not compressed, take the ending off its name"
        )
    raise SourceError(f"{path}: {problem}") from cause


class _Member:
    """One member of a compressed file. `rest` is what `feed` was given too much."""

    errors: tuple[type[Exception], ...]
    is_whole = False
    rest = b""

    def feed(self, block: bytes) -> Iterator[bytes]:
        raise NotImplementedError


class _Zstd(_Member):
    def __init__(self) -> None:
        import zstandard

        self._frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
        self.errors = (zstandard.ZstdError,)

    def feed(self, block: bytes) -> Iterator[bytes]:
        for end in range(_ZSTD_BYTES, len(block) + _ZSTD_BYTES, _ZSTD_BYTES):
            yield self._frame.decompress(block[end - _ZSTD_BYTES : end])
            if self._frame.eof:
                self.is_whole, self.rest = True, self._frame.unused_data + block[end:]
                return
        self.rest = b""


class _Gzip(_Member):
    errors = (zlib.error,)

    def __init__(self) -> None:
        self._member = zlib.decompressobj(wbits=31)

    def feed(self, block: bytes) -> Iterator[bytes]:
        while block and not self.is_whole:
            yield self._member.decompress(block, _READ_BYTES)
            block, self.is_whole = self._member.unconsumed_tail, self._member.eof
        self.rest = self._member.unused_data


class _Bz2(_Member):
    """xz too: their decompressors are used alike."""

    def __init__(self) -> None:
        import bz2

        self.errors = (OSError,)
        self._stream: Any = bz2.BZ2Decompressor()

    def feed(self, block: bytes) -> Iterator[bytes]:
        while (block or not self._stream.needs_input) and not self.is_whole:
            yield self._stream.decompress(block, _READ_BYTES)
            block, self.is_whole = b"", self._stream.eof
        self.rest = self._stream.unused_data


class _Xz(_Bz2):
    def __init__(self) -> None:
        import lzma

        self.errors = (lzma.LZMAError,)
        self._stream = lzma.LZMADecompressor(lzma.FORMAT_XZ)


_SKIPPED = tuple(bytes([kind]) + b"\x2a\x4d\x18" for kind in range(0x50, 0x60))
_FORMATS: dict[str, tuple[str, type[_Member], tuple[bytes, ...]]] = {
    "zst": ("zstd", _Zstd, (b"\x28\xb5\x2f\xfd", *_SKIPPED)),
    "gz": ("gzip", _Gzip, (b"\x1f\x8b",)),
    "xz": ("xz", _Xz, (b"\xfd7zXZ\0",)),
    "bz2": ("bz2", _Bz2, (b"BZh",)),
}
"""What it is called, what reads a member, and how one begins."""


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
