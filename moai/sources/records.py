"""Byte streams -> records: lines, elements of a JSON array, concatenated JSON values, whole files.

Nothing is kept parsed here. A record is its bytes with its place, so that a bad one can be named exactly; what does not
even make a record (too large to hold) is named in `problem`. Batches have `SCHEMA`; lines and offsets count from the
beginning of the segment, which makes them a property of the content and not of where it lies.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from io import RawIOBase

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa

from moai.core import columns
from moai.core.files import storage_of
from moai.engine.pipeline import Meter

SCHEMA = pa.schema(
    [
        ("record", pa.binary()),
        ("problem", pa.string()),
        ("segment", pa.int32()),
        ("line", pa.int64()),
        ("offset", pa.int64()),
    ]
)
TOO_LARGE = "too large"
SAMPLE_BYTES = 200
_NEWLINE = 10
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+("?)', re.DOTALL)
_STRUCTURE = re.compile(_STRING.pattern + rb"|[\[\]{},]", re.DOTALL)
_STRING_REST = re.compile(rb'(?:[^"\\]++|\\.)*+("?)', re.DOTALL)
_SPACE = re.compile(rb"\s*")
_SCALAR = re.compile(rb'[^\s"\[\]{},:]++')
_ANOTHER = re.compile(rb"[}\n]\s*,?\s*\{")
_AFTER_ANOTHER = re.compile(rb"[}\]]|\n[ \t]*$")
"""What stands before a value where a comma is missing, or a line before it is no value."""
_BRACKETS = re.compile(rb"[\[\]{}]")
_OPENS = {b"}": b"{", b"]": b"["}
_CLOSES = {b"{": b"}", b"[": b"]"}


@dataclass(frozen=True)
class Limits:
    max_record_bytes: int
    batch_rows: int
    batch_bytes: int = 4 << 20

    @property
    def sample_bytes(self) -> int:
        """Of a record that is too large: never more than makes it so, or the sample would depend on where blocks
        end.
        """
        return min(SAMPLE_BYTES, self.max_record_bytes)

    def rows_of(self, rows: int, num_bytes: int) -> int:
        """Rows of a batch cut from so many, by their mean size: a count alone would let long documents take any amount
        of memory.
        """
        return max(1, min(self.batch_rows, self.batch_bytes * max(1, rows) // max(1, num_bytes)))


def split_lines(blocks: Iterator[bytes], segment: int, limits: Limits, meter: Meter) -> Iterator[pa.RecordBatch]:
    """Every line that is not blank, in batches. A line over the limit is skipped through, never held."""
    carry, offset, line = b"", 0, 0
    skipped: tuple[int, bytes] | None = None  # (offset, first bytes) of a line that is too large
    for block in blocks:
        if skipped:
            end = block.find(b"\n") + 1
            meter.update(block[:end] if end else block, lines=end > 0)
            if not end:
                offset += len(block)
                continue
            yield _problem(skipped[1], segment, line, skipped[0])
            block, offset, line, skipped = block[end:], offset + end, line + 1, None
        ends = np.flatnonzero(np.frombuffer(block, np.uint8) == _NEWLINE)
        meter.update(block, lines=len(ends))
        data, ends = (carry + block, ends + len(carry)) if carry else (block, ends)  # what was carried holds no newline
        cut = int(ends[-1]) + 1 if len(ends) else 0
        if cut:
            yield from _lines(data, ends, segment, line, offset, limits)
            line += len(ends)
        offset, carry = offset + cut, data[cut:]
        if len(carry) > limits.max_record_bytes:
            skipped, offset, carry = (offset, carry[: limits.sample_bytes]), offset + len(carry), b""
    if skipped:
        yield _problem(skipped[1], segment, line, skipped[0])
    elif carry:
        yield from _lines(carry + b"\n", np.array([len(carry)]), segment, line, offset, limits)


def split_values(
    blocks: Iterator[bytes], segment: int, limits: Limits, meter: Meter, *, in_array: bool, **part: bool
) -> Iterator[pa.RecordBatch]:
    """Elements of a JSON array, or values that follow one another, in batches. `part` is of `scan_values`, which also
    says what raises BrokenValues.
    """
    rows: list[tuple[bytes, str | None, int, int]] = []
    size = 0

    def metered() -> Iterator[bytes]:
        for block in blocks:
            meter.update(block, lines=block.count(b"\n"))
            yield block

    for span in scan_values(metered(), limits.max_record_bytes, in_array=in_array, **part):
        rows.append((span.value, TOO_LARGE if span.too_large else None, span.line, span.start))
        size += len(span.value)
        if len(rows) >= limits.batch_rows or size >= limits.batch_bytes:
            yield _batch(rows, segment)
            rows, size = [], 0
    if rows:
        yield _batch(rows, segment)


class BrokenValues(Exception):
    """A stream of JSON that cannot be cut further without losing values; `line` is where the broken one begins."""

    def __init__(self, line: int, why: str) -> None:
        super().__init__(why)
        self.line = line


@dataclass(frozen=True)
class Span:
    """One JSON value: its bytes (the first ones, if too large), its line and offset; `end` is the offset behind it,
    white space included.
    """

    value: bytes
    line: int
    start: int
    end: int
    too_large: bool


def scan_values(
    blocks: Iterator[bytes], max_bytes: int, *, in_array: bool, opened: bool = False, ends: bool = True
) -> Iterator[Span]:
    """Cut a stream of JSON into values at its outermost level. Only quotes and brackets are looked at; a value over the
    limit is skipped through, never held.

    opened  the array's bracket lies before the stream, which begins between two elements
    ends    the stream ends where the file does, so that its array must end, too
    Every `end` lies in the block that was drawn last. A value that is broken within its own brackets is one value.
    Raises BrokenValues where a bracket or quote of it is missing or too many, so that other values may be lost in it.
    """
    sample_bytes = Limits(max_bytes, 0).sample_bytes
    open_brackets: list[bytes] = []
    in_string, closed = False, False
    opened = opened or not in_array
    data, base = b"", 0  # `data` begins at stream offset `base`
    begin = at = line = (
        0  # in `data`: where the value in work begins (in line `line` of the stream), and up to where it is scanned
    )
    head: tuple[bytes, int, int] | None = None  # (first bytes, line, start) of a value that is too large

    def go_to(position: int) -> None:
        nonlocal begin, line
        line += data.count(b"\n", begin, position)
        begin = position

    def take(end: int, behind: int) -> Iterator[Span]:
        """The value from `begin` to `end`, without the white space around it; the next one begins at `behind`."""
        nonlocal head
        if head:
            yield Span(head[0], head[1], head[2], base + end, True)
        else:
            go_to(_behind_space(data, begin, end))
            if value := data[begin:end].rstrip():
                too_large = len(value) > max_bytes
                if _may_hold_others(value, whole=True):
                    raise broken("what begins here is broken, and other records may be in it")
                yield Span(value[:sample_bytes] if too_large else value, line, base + begin, base + end, too_large)
        head = None
        go_to(behind)

    def broken(why: str) -> BrokenValues:
        if not head:
            go_to(_behind_space(data, begin, len(data)))
        return BrokenValues(head[1] if head else line, why)

    for block in blocks:
        data, base, at, begin = data[begin:] + block, base + begin, at - begin, 0
        while at < len(data) and not closed:
            match = (_STRING_REST if in_string else _STRUCTURE).search(data, at)
            if match is None:
                at = len(data)
                break
            at, mark = match.end(), data[match.start() : match.start() + 1]
            if in_string or mark == b'"':
                in_string = not match[1]
                if in_string and at == len(data) - 1:
                    break  # a lone backslash at the end: it belongs to the byte that comes next
            elif not opened:
                opened = True
                go_to(at)
            elif mark in b"[{":
                if not open_brackets and _AFTER_ANOTHER.search(data, begin, match.start()):
                    yield from take(match.start(), match.start())
                open_brackets.append(mark)
            elif mark in b"]}":
                closed = in_array and not open_brackets and mark == b"]"
                if not closed and (not open_brackets or open_brackets.pop() != _OPENS[mark]):
                    raise broken(f"in what begins here a {mark.decode()} closes what it did not open")
                if closed or not (open_brackets or in_array):
                    yield from take(match.start() if closed else at, at)
            elif mark == b"," and not open_brackets:
                yield from take(match.start(), at)
        go_to(_behind_space(data, begin, len(data) if closed else at))
        if closed and begin < len(data):
            raise broken("there is more behind the end of the array")
        if (
            len(data) - begin > max_bytes
            and not head
            and (open_brackets or in_string or len(data[begin:].rstrip()) > max_bytes)
        ):
            if _may_hold_others(data[begin:], whole=False):
                raise broken("what begins here is broken, and other records may be in it")
            head = (data[begin : begin + sample_bytes], line, base + begin)
        if head:
            go_to(at)
    if in_string or open_brackets or (in_array and ends and not closed):
        raise broken(
            "the file ends in the midst of what begins here: it was cut off, or a bracket or quote is not closed"
        )
    yield from take(len(data), len(data))


def _may_hold_others(value: bytes, *, whole: bool) -> bool:
    """Whether what was cut as one value may be several: it is no JSON, something in it looks like the end of an object
    before another, and its quotes, brackets, colons and commas do not stand where JSON has them.
    """
    if value.count(b"{") < 2 or (whole and parses(value)) or not _ANOTHER.search(value):
        return False
    outline = _SCALAR.sub(b"0", _STRING.sub(lambda string: b'""' if string[1] else b"", value))
    if whole:
        return not parses(outline)
    open_brackets: list[bytes] = []
    for bracket in _BRACKETS.findall(outline):
        if bracket in _OPENS:
            open_brackets.pop()
        else:
            open_brackets.append(bracket)
    closing = b"".join(_CLOSES[bracket] for bracket in reversed(open_brackets))
    return not any(parses(outline + rest + closing) for rest in (b"", b"0", b":0", b'"":0'))


def parses(value: bytes) -> bool:
    """Whether it is one JSON value."""
    try:
        orjson.loads(value)
    except orjson.JSONDecodeError:
        return False
    return True


def read_lines_in(path: str, start: int, end: int, block_bytes: int) -> Iterator[bytes]:
    """The lines that begin in [start, end), the last one to its end: neighbouring ranges share no line and miss
    none.
    """
    with storage_of(path).open(path) as file:
        position = _next_line(file, start, end, block_bytes)
        if position >= end:
            return
        file.seek(position)
        block = b""
        while position < end and (block := file.read(min(block_bytes, end - position))):
            position += len(block)
            yield block
        if block.endswith(b"\n"):
            return
        while block := file.read(min(block_bytes, 1 << 18)):
            cut = block.find(b"\n") + 1
            if cut:
                yield block[:cut]
                return
            yield block


def whole_file(blocks: Iterator[bytes], segment: int, limits: Limits, meter: Meter) -> Iterator[pa.RecordBatch]:
    """A file as one record; over the limit only its first bytes are kept, as a problem."""
    pieces: list[bytes] = []
    size = 0
    for block in blocks:
        meter.update(block, lines=block.count(b"\n"))
        size += len(block)
        if size <= limits.max_record_bytes or not pieces:
            pieces.append(block)
    if size > limits.max_record_bytes:
        yield _problem(b"".join(pieces)[: limits.sample_bytes], segment, 0, 0)
    elif size:
        yield _batch([(b"".join(pieces), None, 0, 0)], segment)


def _next_line(file: RawIOBase, start: int, end: int, block_bytes: int) -> int:
    """Where the first line that begins at `start` or later begins; `end` if none does before."""
    if start == 0:
        return 0
    position = start - 1
    file.seek(position)
    while position < end - 1 and (block := file.read(min(block_bytes, end - 1 - position))):
        cut = block.find(b"\n") + 1
        if cut:
            return int(position + cut)
        position += len(block)
    return end


def _lines(
    data: bytes, ends: npt.NDArray[np.int64], segment: int, line: int, offset: int, limits: Limits
) -> Iterator[pa.RecordBatch]:
    """The lines of `data` that end at `ends`. The records are a view of it: offsets over one buffer, no copies."""
    starts = np.concatenate(([0], ends[:-1] + 1))
    lengths = ends - starts
    records = columns.binaries(np.append(starts, ends[-1] + 1).astype(np.int32), data)
    problems = pa.nulls(len(ends), pa.string())
    if (lengths > limits.max_record_bytes).any():
        problems = pa.array(
            [TOO_LARGE if length > limits.max_record_bytes else None for length in lengths.tolist()], pa.string()
        )
    places: list[npt.NDArray[np.integer]] = [
        np.full(len(ends), segment, np.int32),
        line + np.arange(len(ends)),
        offset + starts,
    ]
    batch = pa.record_batch([records, problems, *(columns.numbers(place) for place in places)], schema=SCHEMA)
    filled = (lengths > 1) | ((lengths == 1) & (np.frombuffer(data, np.uint8)[starts] != 13))
    if not filled.all():
        batch = batch.filter(pa.array(filled))
    for first in range(0, batch.num_rows, limits.batch_rows):
        yield batch.slice(first, limits.batch_rows)


def _behind_space(data: bytes, start: int, end: int) -> int:
    match = _SPACE.match(data, start, end)
    assert match is not None  # it matches nothing at all, too
    return match.end()


def _problem(head: bytes, segment: int, line: int, offset: int) -> pa.RecordBatch:
    return _batch([(head, TOO_LARGE, line, offset)], segment)


def _batch(rows: list[tuple[bytes, str | None, int, int]], segment: int) -> pa.RecordBatch:
    records, problems, lines, offsets = zip(*rows)
    return pa.record_batch(
        [
            pa.array(records, pa.binary()),
            pa.array(problems, pa.string()),
            np.full(len(rows), segment, np.int32),
            lines,
            offsets,
        ],
        schema=SCHEMA,
    )
