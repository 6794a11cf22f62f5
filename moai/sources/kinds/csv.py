"""CSV and TSV: every column is text, unchanged: `NA` and `007` stay, what is empty stays empty.

Records are those of Python's strict `csv` reader. Only its rules say where a record ends: a newline in a quoted field
does not, and a quote in the midst of a field opens nothing. One scan of the file finds the ends, so ranges can be read
apart. What has another number of fields than the header, or breaks the rules, is a bad record.
"""

from __future__ import annotations

import codecs
import csv
import functools
import io
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from moai.core.errors import ConfigError, SourceError
from moai.core.files import canonical_json, input_errors, read_range
from moai.engine.pipeline import Meter
from moai.sources.kinds.kind import File, Segment
from moai.sources.kinds.stream import Stream
from moai.sources.records import TOO_LARGE, Limits
from moai.sources.streams import open_blocks

PROBLEM = pa.struct([("reason", pa.string()), ("detail", pa.string()), ("sample", pa.binary())])
_BOM = codecs.BOM_UTF8
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_HEADER_BYTES = 1 << 20
_REST = re.compile(rb'[^"]*+(?:""[^"]*+)*+("?)')


@dataclass(frozen=True)
class Header:
    """The names of the columns, and the offset in the stream behind the header's record."""

    names: tuple[str, ...]
    end: int


@dataclass(frozen=True)
class Csv(Stream):
    name = "csv"
    endings = (".csv",)
    columnar: ClassVar[bool] = True
    delimiter: ClassVar[str] = ","

    encoding: str | None = None
    """Of files that are neither UTF-8 nor, by their byte order mark, UTF-16."""

    def __post_init__(self) -> None:
        if self.encoding is not None:
            try:
                "".encode(self.encoding)
            except LookupError as error:
                raise ConfigError(
                    f"encoding = {self.encoding}: Python knows no such encoding of texts ({error})"
                ) from error

    def schema(self, file: File) -> Mapping[str, str]:
        return dict.fromkeys(_header(self, file).names, "string")

    def context(self, file: File) -> bytes:
        return canonical_json(_header(self, file).names)

    def is_seekable(self, file: File) -> bool:
        return not file.compression and not _encoding(self, file)

    def stream(self, file: File, block_bytes: int) -> Iterator[bytes]:
        """In UTF-8."""
        blocks = open_blocks(file.path, file.compression, block_bytes)
        encoding = _encoding(self, file)
        return _in_utf8(blocks, encoding, file.path) if encoding else blocks

    def record_ends(self, file: File, blocks: Iterator[bytes], range_bytes: int, limits: Limits) -> Iterator[int]:
        position, mark = 0, range_bytes
        for data, ends in _scan(blocks, self.delimiter, at_start=True):
            at = 0
            while (at := int(np.searchsorted(ends, mark - position))) < len(ends):
                yield position + int(ends[at])
                mark = ((position + int(ends[at])) // range_bytes + 1) * range_bytes
            position += len(data)

    def records(
        self,
        segment: Segment,
        blocks: Iterator[bytes],
        index: int,
        columns: tuple[str, ...],
        limits: Limits,
        meter: Meter,
    ) -> Iterator[pa.RecordBatch]:
        header = _header(self, segment.file)
        rows = _Rows(header.names, columns, self.delimiter, index, limits)
        begin = header.end - segment.start  # in the stream of this range
        carry, offset, line = b"", 0, 0
        skipped: tuple[int, int, bytes] | None = None  # (line, offset, first bytes) of a record that is too large
        for data, ends in _scan(_metered(blocks, meter), self.delimiter, at_start=segment.start == 0):
            if skipped:
                end = int(ends[0]) if len(ends) else 0
                line += data.count(b"\n", 0, end or len(data))
                offset += end or len(data)
                if not end:
                    continue
                yield rows.too_large(*skipped)
                data, ends, skipped = data[end:], ends[1:] - end, None
            data, ends = carry + data, ends + len(carry)
            if len(ends):
                yield from rows.batches(data, ends, line, offset, begin)
            cut = int(ends[-1]) if len(ends) else 0
            line, offset, carry = line + data.count(b"\n", 0, cut), offset + cut, data[cut:]
            if len(carry) > limits.max_record_bytes + 2:  # the line's end, which may follow, is no part of the record
                skipped = (line, offset, carry[: limits.sample_bytes])
                line, offset, carry = line + carry.count(b"\n"), offset + len(carry), b""
        if skipped:
            yield rows.too_large(*skipped)
        elif carry:
            yield from rows.batches(carry, np.array([len(carry)]), line, offset, begin)


@dataclass(frozen=True)
class Tsv(Csv):
    name = "tsv"
    endings = (".tsv",)
    delimiter: ClassVar[str] = "\t"


@dataclass(frozen=True)
class _Rows:
    """Records as batches of the columns that are wanted; one that is absent is null."""

    names: tuple[str, ...]
    columns: tuple[str, ...]
    delimiter: str
    segment: int
    limits: Limits

    def batches(
        self, data: bytes, ends: npt.NDArray[np.int64], line: int, offset: int, begin: int
    ) -> Iterator[pa.RecordBatch]:
        """The records of `data` that end at `ends` and begin at stream offset `begin` or later."""
        starts = np.concatenate(([0], ends[:-1]))
        lines = line + np.searchsorted(np.flatnonzero(np.frombuffer(data, np.uint8) == 10), starts)
        first = int(np.searchsorted(starts, begin - offset))
        for at in range(first, len(ends), self.limits.batch_rows):
            some = slice(at, at + self.limits.batch_rows)
            rows = self._parse(data, starts[some], ends[some])
            places = (lines[some], offset + starts[some])
            if not all(rows):  # a blank line is no record
                filled = np.array([bool(row) for row in rows])
                rows, places = [row for row in rows if row], (places[0][filled], places[1][filled])
            if rows:
                yield self._batch(rows, *places)

    def too_large(self, line: int, offset: int, sample: bytes) -> pa.RecordBatch:
        return self._batch(
            [self._bad(TOO_LARGE, f"over {self.limits.max_record_bytes} bytes", sample)],
            np.array([line]),
            np.array([offset]),
        )

    def _parse(
        self, data: bytes, starts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64]
    ) -> list[list[str] | dict[str, Any]]:
        """For each record its fields, what is wrong with it, or nothing for a blank line. At once where all are as good
        as most are.
        """
        if csv.field_size_limit() < self.limits.max_record_bytes:
            csv.field_size_limit(
                self.limits.max_record_bytes
            )  # one for all the process; 128 KiB is less than many a text
        if (ends - starts).max() <= self.limits.max_record_bytes:
            try:
                rows = self._read(data[starts[0] : ends[-1]])
                if len(rows) == len(ends) and set(map(len, rows)) <= {0, len(self.names)}:
                    return list(rows)
            except (UnicodeDecodeError, csv.Error):
                pass
        return [self._parse_one(data[start:end]) for start, end in zip(starts.tolist(), ends.tolist())]

    def _parse_one(self, record: bytes) -> list[str] | dict[str, Any]:
        record = record[:-2] if record.endswith(b"\r\n") else record[:-1] if record.endswith((b"\n", b"\r")) else record
        if len(record) > self.limits.max_record_bytes:
            return self._bad(
                TOO_LARGE, f"over {self.limits.max_record_bytes} bytes", record[: self.limits.sample_bytes]
            )
        try:
            rows = self._read(record)
        except UnicodeDecodeError as bad:
            return self._bad("invalid UTF-8", f"byte {bad.start}: {bad.reason}", record)
        except csv.Error as error:
            return self._bad("broken CSV", str(error), record)
        assert len(rows) <= 1, record  # the scan and the reader agree on where records end
        if rows and len(rows[0]) != len(self.names):
            return self._bad("ragged row", f"{len(rows[0])} fields, the header has {len(self.names)}", record)
        return rows[0] if rows else []

    def _read(self, records: bytes) -> list[list[str]]:
        return list(csv.reader(io.StringIO(records.decode("utf-8"), newline=""), delimiter=self.delimiter, strict=True))

    def _bad(self, reason: str, detail: str, sample: bytes) -> dict[str, Any]:
        return {"reason": reason, "detail": detail, "sample": sample}

    def _batch(self, rows: list[Any], lines: npt.NDArray[np.int64], offsets: npt.NDArray[np.int64]) -> pa.RecordBatch:
        problems = [row if isinstance(row, dict) else None for row in rows]
        found: dict[str, pa.Array] = {}
        for name in self.columns:
            at = self.names.index(name) if name in self.names else None
            values = [None if at is None or isinstance(row, dict) else row[at] for row in rows]
            found[name] = pa.array(values, pa.string())
        place = {"segment": np.full(len(rows), self.segment, np.int32), "line": lines, "offset": offsets}
        return pa.RecordBatch.from_pydict({**found, "problem": pa.array(problems, PROBLEM), **place})


def _scan(blocks: Iterator[bytes], delimiter: str, *, at_start: bool) -> Iterator[tuple[bytes, npt.NDArray[np.int64]]]:
    """(data, ends): the stream in pieces, and where in each of them records end (the offsets behind their line ends).

    An end never lies before the block that was drawn last. Costs one step of Python a quoted field, none a line.
    """
    quoted_field = re.compile(rb'"(?<=[%b\r\n]")[^"]*+(?:""[^"]*+)*+("?)' % delimiter.encode())
    before, is_open = b"\n", False  # the byte before the piece; whether a quoted field goes on in it
    for data in _whole_marks(blocks):
        window = before + data
        if at_start and data.startswith(_BOM):
            window = b"\n" + delimiter.encode() * len(_BOM) + data[len(_BOM) :]  # what follows the mark begins a field
        at_start = False
        bounds: list[int] = []  # where quoted fields begin and end, by turns
        at = 1
        if is_open:
            rest = _REST.match(window, 1)
            assert rest is not None  # it matches nothing at all, too
            bounds += rest.span()
            at, is_open = rest.end(), not rest[1]
        if not is_open:
            for field in quoted_field.finditer(window, at):
                bounds += field.span()
                is_open = not field[1]
        codes = np.frombuffer(window, np.uint8)
        ends = np.flatnonzero(codes == 10)
        if b"\r" in data:  # ends a record too, unless a newline follows
            returns = np.flatnonzero(codes == 13)
            lone = returns[codes[np.minimum(returns + 1, len(codes) - 1)] != 10]
            ends = np.sort(np.concatenate((ends, lone))) if len(lone) else ends
        ends = ends[ends > 0]
        if bounds:
            ends = ends[np.searchsorted(np.array(bounds), ends, side="right") % 2 == 0]
        yield data, ends  # behind a line end of the window is at it in the piece, which begins a byte later
        before = data[-1:]


def _whole_marks(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Blocks that end neither within a pair of quotes or a line end, nor within a byte order mark."""
    held, is_first = b"", True
    for block in blocks:
        block = held + block
        kept = block.rstrip(b'"')
        if len(kept) == len(block) and block.endswith(b"\r"):
            kept = block[:-1]
        if is_first and len(kept) < len(_BOM):
            kept = b""
        held = block[len(kept) :]
        if kept:
            yield kept
            is_first = False
    if held:
        yield held


def _metered(blocks: Iterator[bytes], meter: Meter) -> Iterator[bytes]:
    for block in blocks:
        meter.update(block, lines=block.count(b"\n"))
        yield block


@functools.lru_cache(maxsize=1)  # asked again for each range of a file
def _header(kind: Csv, file: File) -> Header:
    """The first record that is not blank. Raises SourceError where its names do not tell columns apart."""
    head = b""
    with input_errors(file.path):
        for block in kind.stream(file, 1 << 16):
            head += block
            if end := _header_end(kind, head):
                break
            if len(head) > _HEADER_BYTES:
                raise SourceError(
                    f"{file.path}: no header in its first {_HEADER_BYTES:,} bytes; is a quote not closed, or is it no "
                    f"{kind.name.upper()}?"
                )
        else:
            end = len(head)
    try:
        rows = [
            row
            for row in csv.reader(
                io.StringIO(head[:end].decode("utf-8-sig"), newline=""), delimiter=kind.delimiter, strict=True
            )
            if row
        ]
    except (UnicodeDecodeError, csv.Error) as error:
        raise SourceError(
            f"{file.path}: its header is not readable ({error}); is it UTF-8? (another encoding has to be named)"
        ) from error
    names = rows[0] if rows else []
    for at, name in enumerate(names):
        if not name or name in names[:at]:
            what = f"is called {name!r} like column {names.index(name) + 1}" if name else "has no name"
            raise SourceError(f"{file.path}: column {at + 1} of its header {what}; give every column a name of its own")
    if not names:
        raise SourceError(f"{file.path}: holds no header, which names the columns")
    return Header(tuple(names), end)


def _header_end(kind: Csv, head: bytes) -> int:
    """Behind the first record that is not blank, 0 where it is not whole. A last byte that a mark may go on from tells
    nothing yet.
    """
    start = len(_BOM) if head.startswith(_BOM) else 0
    _, ends = next(_scan(iter((head,)), kind.delimiter, at_start=True))
    for end in ends.tolist():
        if head[start:end].strip(b"\r\n") and end < len(head):
            return int(end)
        start = end
    return 0


@functools.lru_cache(maxsize=1)
def _encoding(kind: Csv, file: File) -> str:
    """What the stream has to be decoded from; empty where it is UTF-8."""
    if kind.encoding:
        return "" if codecs.lookup(kind.encoding).name in ("utf-8", "utf-8-sig") else kind.encoding
    with input_errors(file.path):
        head = (
            next(open_blocks(file.path, file.compression, 1 << 16), b"")
            if file.compression
            else next(read_range(file.path, 0, 4, 4), b"")
        )
    return "utf-16" if head.startswith(_UTF16) else ""


def _in_utf8(blocks: Iterator[bytes], encoding: str, path: str) -> Iterator[bytes]:
    decoder = codecs.getincrementaldecoder(encoding)()
    position = 0
    try:
        for block in blocks:
            if text := decoder.decode(block):
                yield text.encode()
            position += len(block)
        decoder.decode(b"", final=True)
    except UnicodeError as error:
        raise SourceError(
            f"{path}: not {encoding} about byte {position:,} ({error}); name the encoding that it has"
        ) from error
