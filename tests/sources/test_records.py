"""From bytes to records: whatever the blocks, marks and ranges, the same records at the same places, and never more
held than allowed.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import itertools
import json
import time
import tracemalloc
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import zstandard
from hypothesis import example, given
from hypothesis import strategies as st

from moai.engine.pipeline import Meter
from moai.sources.records import (
    SCHEMA,
    BrokenValues,
    Limits,
    Span,
    read_lines_in,
    scan_values,
    split_lines,
    split_values,
    whole_file,
)
from moai.sources.streams import RangeWriter, line_cuts, open_blocks, skip, value_cuts

MB = 1 << 20
LOOSE = Limits(max_record_bytes=10_000, batch_rows=1000)


def blocks_of(data: bytes, size: int) -> Iterator[bytes]:
    return (data[start : start + size] for start in range(0, len(data), size))


def metered() -> Meter:
    meter = Meter()
    meter.begin_segment()
    return meter


Found = list[tuple[bytes, str | None, int, int]]


def found(batches: Iterable[pa.RecordBatch]) -> Found:
    """(record without its line end, problem, line, offset) of every record."""
    rows: Found = []
    for batch in batches:
        assert batch.schema == SCHEMA
        rows += [
            (row["record"].rstrip(b"\r\n"), row["problem"], row["line"], row["offset"]) for row in batch.to_pylist()
        ]
    return rows


def lines_by_hand(data: bytes) -> Found:
    rows: Found = []
    offset = 0
    for number, line in enumerate(data.split(b"\n")):
        if line.rstrip(b"\r"):
            rows.append((line.rstrip(b"\r"), None, number, offset))
        offset += len(line) + 1
    return rows


# ---- lines

LINES = st.lists(
    st.sampled_from([b"", b"\r", b"a", b"{}", b"ab\rc", b"\xff\x00", b'{"text":"longer than a block"}']), max_size=12
).map(b"\n".join)


@given(LINES, st.integers(1, 40))
@example(b"a", 1)
@example(b"\n\na\n", 2)
def test_lines_have_the_same_places_for_every_block_size(data: bytes, size: int) -> None:
    meter = metered()
    assert found(split_lines(blocks_of(data, size), 0, LOOSE, meter)) == lines_by_hand(data)
    assert meter.raw().bytes == (len(data),)
    assert meter.raw().lines == (data.count(b"\n"),)


@given(data=LINES, mark=st.integers(1, 30), size=st.integers(1, 40))
def test_neighbouring_ranges_share_no_line_and_miss_none(tmp_path: Path, data: bytes, mark: int, size: int) -> None:
    path = tmp_path / "lines"
    path.write_bytes(data)
    joined: Found = []
    line = offset = 0
    for start in range(0, len(data), mark):
        meter = metered()
        batches = split_lines(read_lines_in(str(path), start, min(start + mark, len(data)), size), 0, LOOSE, meter)
        joined += [(record, problem, line + at, offset + byte) for record, problem, at, byte in found(batches)]
        line, offset = line + meter.raw().lines[0], offset + meter.raw().bytes[0]
    assert joined == lines_by_hand(data)
    assert offset == len(data)


@given(LINES, st.integers(1, 30), st.integers(1, 40))
def test_cuts_of_a_stream_are_those_of_its_marks_whatever_the_blocks(data: bytes, mark: int, size: int) -> None:
    by_hand = []
    at = 0
    while (end := data.find(b"\n", max(at, (at // mark + 1) * mark - 1)) + 1) > 0:
        by_hand.append(end)
        at = end
    assert list(line_cuts(blocks_of(data, size), mark)) == by_hand


@pytest.mark.parametrize("size", [7, 100, 1000])
@pytest.mark.parametrize("over", [0, 1])
def test_a_line_at_the_limit_passes_and_one_byte_more_does_not_whatever_the_blocks(size: int, over: int) -> None:
    limits = Limits(max_record_bytes=100, batch_rows=10)
    data = b"first\n" + b"x" * (100 + over) + b"\nlast"
    first, middle, last = found(split_lines(blocks_of(data, size), 0, limits, metered()))
    assert (first, last) == ((b"first", None, 0, 0), (b"last", None, 2, 107 + over))
    assert middle[1:] == ("too large" if over else None, 1, 6)
    assert middle[0] == b"x" * (100 + over)


def test_a_line_far_over_the_limit_is_skipped_through_and_never_held() -> None:
    def stream() -> Iterator[bytes]:
        yield b"first\n"
        for _ in range(256):
            yield b"x" * MB
        yield b"\nlast\n"

    (rows, peak) = peak_of(lambda: found(split_lines(stream(), 0, Limits(2 * MB, 10), metered())))
    assert [(row[0][:5], *row[1:]) for row in rows] == [
        (b"first", None, 0, 0),
        (b"xxxxx", "too large", 1, 6),
        (b"last", None, 2, 6 + 256 * MB + 1),
    ]
    assert len(rows[1][0]) == 200
    assert peak < 16 * MB


def test_batches_have_no_more_rows_than_asked() -> None:
    batches = list(split_lines(iter([b"a\n" * 100]), 3, Limits(100, 7), metered()))
    assert [batch.num_rows for batch in batches] == [7] * 14 + [2]
    assert set(pa.Table.from_batches(batches)["segment"].to_pylist()) == {3}


# ---- JSON values

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**6), 10**6) | st.text(st.sampled_from('a"\\[]{},:\n 가'), max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", '"', "}"]), inner, max_size=3),
    max_leaves=6,
)
OBJECTS = st.dictionaries(st.sampled_from(["text", '"]', "\\"]), JSON, min_size=1, max_size=3)
STYLES = st.sampled_from([{}, {"indent": 1}, {"ensure_ascii": False}, {"separators": (",", ":")}])


def places_hold(data: bytes, spans: list[Span]) -> bool:
    return all(
        data[s.start : s.start + len(s.value)] == s.value and data.count(b"\n", 0, s.start) == s.line for s in spans
    )


@given(st.lists(JSON, max_size=8), STYLES, st.integers(1, 50), st.sampled_from([b"", b"\n", b" \n\n "]))
@example([{"a": "\\"}, '"\\'], {}, 1, b"")
@example([[[1], {}], []], {}, 1, b"")
def test_elements_of_an_array_are_found_with_their_places_for_every_block_size(
    values: list[Any], style: dict[str, Any], size: int, space: bytes
) -> None:
    data = space + json.dumps(values, **style).encode() + space
    spans = list(scan_values(blocks_of(data, size), 10_000, in_array=True))
    assert [json.loads(span.value) for span in spans] == values
    assert places_hold(data, spans)


@given(st.lists(OBJECTS, max_size=8), STYLES, st.integers(1, 50), st.sampled_from(["", " ", "\n", "\n\n \t"]))
def test_values_that_follow_one_another_are_found_with_their_places(
    values: list[Any], style: dict[str, Any], size: int, between: str
) -> None:
    data = between.join(json.dumps(value, **style) for value in values).encode()
    spans = list(scan_values(blocks_of(data, size), 10_000, in_array=False))
    assert [json.loads(span.value) for span in spans] == values
    assert places_hold(data, spans)


@given(st.lists(OBJECTS, min_size=1, max_size=8), STYLES, st.integers(1, 60), st.integers(1, 50), st.booleans())
def test_ranges_between_cuts_hold_every_value_once_and_in_order(
    values: list[Any], style: dict[str, Any], mark: int, size: int, in_array: bool
) -> None:
    data = (
        json.dumps(values, **style).encode()
        if in_array
        else "\n".join(json.dumps(value, **style) for value in values).encode()
    )
    cuts = list(value_cuts(blocks_of(data, size), mark, 10_000, in_array=in_array))
    assert cuts == list(value_cuts(iter([data]), mark, 10_000, in_array=in_array))
    edges = [0, *cuts, len(data)]
    pieces = [data[start:end] for start, end in itertools.pairwise(edges)]
    spans = [
        list(scan_values(blocks_of(piece, size), 10_000, in_array=in_array, opened=index > 0, ends=False))
        for index, piece in enumerate(pieces)
    ]
    assert [json.loads(span.value) for part in spans for span in part] == values
    ends = [span.end for span in scan_values(iter([data]), 10_000, in_array=in_array)]
    firsts = [next((end for end in ends if end >= at), None) for at in range(mark, len(data) + mark, mark)]
    assert cuts == sorted({end for end in firsts if end is not None})


@pytest.mark.parametrize(
    ("data", "values"),
    [
        (b'[{"a":1},,{"b":2},]', [b'{"a":1}', b'{"b":2}']),
        (b'[{"a":1} {"b":2}x{"c":3}]', [b'{"a":1}', b'{"b":2}x', b'{"c":3}']),
        (
            b'[{"a":{"x":1,}},{"b":tru},{"c":"two\nlines"},{"d":{}}]',
            [b'{"a":{"x":1,}}', b'{"b":tru}', b'{"c":"two\nlines"}', b'{"d":{}}'],
        ),
        (b"[]", []),
        (b"[ \n ]\n", []),
    ],
    ids=["empty elements", "no comma", "broken within", "empty", "blank"],
)
def test_what_is_no_json_array_is_cut_all_the_same_and_left_to_the_parser(data: bytes, values: list[bytes]) -> None:
    for size in (1, 3, 100):
        assert [span.value for span in scan_values(blocks_of(data, size), 1000, in_array=True)] == values


def test_a_line_that_is_no_value_among_values_is_one_of_its_own() -> None:
    values = [b'\xef\xbb\xbf{"a":1}', b"words", b'{"b":2}', b'\0{"c":3}', b'{"d":4}']
    for size in (1, 3, 100):
        data = b"%s\n%s\n%s %s%s" % tuple(values)
        assert [span.value for span in scan_values(blocks_of(data, size), 1000, in_array=False)] == values


GOOD = [json.dumps({"text": f"record {number}"}) for number in range(30)]
BROKEN = {
    "a bracket too many": '{"text": "r"}}',
    "of the wrong kind": '{"text": "r", "v": [1}',
    "not closed": '{"text": "r", "v": {"w": 1}',
    "two not closed": '{"text": "r", "v": [1',
    "a quote not closed": '{"text": "r}',
    "a quote too many": '{"text": "r""}',
}


@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize("limit", [10_000, 100])
@pytest.mark.parametrize("between", [",\n", ",", "\n", ""])
@pytest.mark.parametrize("second", [None, *BROKEN])
def test_a_bracket_or_quote_too_many_or_missing_loses_no_other_value(
    broken: str, second: str | None, between: str, limit: int
) -> None:
    """Alone, with the same damage or with one that closes what the first left open; in values that seem too large."""
    records = list(GOOD)
    records[3] = BROKEN[broken]
    if second:
        records[20] = {**BROKEN, "not closed": '{"text": "z"}}'}[second]
    in_array = "," in between
    data = (f"[{between.join(records)}]" if in_array else between.join(records)).encode()
    for size in (1, 50, 10_000):
        found: list[str] = []
        with contextlib.suppress(BrokenValues):
            for span in scan_values(blocks_of(data, size), limit, in_array=in_array):
                found.append(span.value.decode())
            assert set(GOOD) & set(records) <= set(found)
        assert found[:3] == GOOD[:3]


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (b'[{"a":1},\n{"b":', 1),
        (b'[{"a":1},\n{"b":2}', 1),
        (b'[{"a":1},\n', 1),
        (b"[", 0),
        (b'[{"a":1}]\n{"b":2}', 1),
        (b'[{"a":1}],\n[{"b":2}]', 0),
        (b'[{"a":1}]\n\n]', 2),
    ],
    ids=["within", "behind", "comma", "at once", "more behind", "two arrays", "one bracket more"],
)
def test_an_array_that_is_cut_off_or_followed_by_more_is_no_whole_one(data: bytes, line: int) -> None:
    for size in (1, 3, 100):
        with pytest.raises(BrokenValues) as named:
            list(scan_values(blocks_of(data, size), 1000, in_array=True))
        assert named.value.line == line


@pytest.mark.parametrize("size", [3, 64, 10_000])
@pytest.mark.parametrize("over", [0, 1])
def test_a_value_at_the_limit_passes_and_one_byte_more_does_not_whatever_blocks_and_white_space(
    size: int, over: int
) -> None:
    value = json.dumps({"text": "x" * (100 - 12 + over)}).encode()
    assert len(value) == 100 + over
    data = b"[1," + b" " * 300 + value + b"\n" * 300 + b",2]"
    one, middle, two = scan_values(blocks_of(data, size), 100, in_array=True)
    assert (one.value, two.value) == (b"1", b"2")
    assert (middle.too_large, middle.start, middle.line) == (bool(over), 303, 0)
    assert two.line == 300
    assert value.startswith(middle.value)
    assert middle.value


@pytest.mark.parametrize("in_array", [True, False])
def test_a_value_far_over_the_limit_is_skipped_through_and_never_held(in_array: bool) -> None:
    def stream() -> Iterator[bytes]:
        yield b'[{"a":1},' if in_array else b'{"a":1}\n'
        yield b'{"text":"'
        for _ in range(64):
            yield b"[x" * (MB // 2)
        yield b'\\"]"}' + (b"," if in_array else b"") + b'\n{"b":2}' + (b"]" if in_array else b"")

    rows, peak = peak_of(lambda: found(split_values(stream(), 0, Limits(2 * MB, 10), metered(), in_array=in_array)))
    start = 9 if in_array else 8
    assert [(row[0][:7], *row[1:3]) for row in rows] == [
        (b'{"a":1}', None, 0),
        (b'{"text"', "too large", 0 if in_array else 1),
        (b'{"b":2}', None, 1 + (not in_array)),
    ]
    assert rows[1][3] == start
    assert rows[2][3] == start + 9 + 64 * MB + 5 + (2 if in_array else 1)
    assert peak < 16 * MB


def test_batches_of_values_are_bounded_in_bytes_too() -> None:
    values = ["x" * 1000 for _ in range(100)]
    batches = list(
        split_values(
            iter([json.dumps(values).encode()]), 0, Limits(2000, 1000, batch_bytes=10_000), metered(), in_array=True
        )
    )
    assert sum(batch.num_rows for batch in batches) == 100
    assert max(batch.num_rows for batch in batches) <= 10


def test_many_small_values_in_a_large_block_take_the_time_of_small_blocks() -> None:
    """Copying the rest of the block behind every value would make it about fifty times as slow."""
    data = json.dumps([{"text": "short", "n": n} for n in range(60_000)]).encode()
    seconds = dict.fromkeys((1 << 14, len(data)), 1e9)
    for size in list(seconds) * 2:
        started = time.process_time()
        assert sum(1 for _ in scan_values(blocks_of(data, size), MB, in_array=True)) == 60_000
        seconds[size] = min(seconds[size], time.process_time() - started)
    assert seconds[len(data)] < 4 * seconds[1 << 14]


# ---- whole files, ranges, compressed streams


@pytest.mark.parametrize(("text", "problem"), [(b"x" * 100, None), (b"x" * 101, "too large"), (b"", None)])
def test_a_whole_file_is_one_record_or_a_problem(text: bytes, problem: str | None) -> None:
    rows = found(whole_file(blocks_of(text, 30), 0, Limits(100, 10), metered()))
    assert [(row[1], row[2], row[3]) for row in rows] == ([(problem, 0, 0)] if text else [])
    assert all(text.startswith(row[0]) for row in rows)


@given(
    data=st.binary(min_size=1, max_size=200), size=st.integers(1, 40), cuts=st.lists(st.integers(0, 200), max_size=6)
)
def test_ranges_are_spooled_as_they_were_cut(tmp_path: Path, data: bytes, size: int, cuts: list[int]) -> None:
    cuts = sorted({cut for cut in cuts if 0 < cut < len(data)})

    def cutter(blocks: Iterable[bytes]) -> Iterator[int]:
        position, left = 0, list(cuts)
        for block in blocks:
            position += len(block)
            while left and left[0] <= position:
                yield left.pop(0)

    writer = RangeWriter(blocks_of(data, size), tmp_path)
    spooled = [writer.end_range(cut) for cut in cutter(writer)] + [writer.end_range(None)]
    edges = [0, *cuts, len(data)]
    assert [Path(spool).read_bytes() for _, spool in spooled if spool] == [
        data[a:b] for a, b in itertools.pairwise(edges)
    ]
    assert [raw.bytes[0] for raw, _ in spooled] == [b - a for a, b in itertools.pairwise(edges)]


def test_a_range_that_finds_no_end_goes_to_disk_and_not_to_memory(tmp_path: Path) -> None:
    def stream() -> Iterator[bytes]:
        for _ in range(128):
            yield b"x" * MB

    def ranges() -> int:
        writer = RangeWriter(stream(), tmp_path)
        assert list(line_cuts(iter(writer), 1000)) == []
        return writer.end_range(None)[0].bytes[0]

    size, peak = peak_of(ranges)
    assert size == 128 * MB
    assert peak < 16 * MB


@pytest.mark.parametrize("ending", ["zst", "gz"])
def test_a_small_file_that_unpacks_to_a_large_one_is_unpacked_a_little_at_a_time(tmp_path: Path, ending: str) -> None:
    """32 KB of zstd are 1 GiB of zeros, 1 MB of gzip as well."""
    size = 1 << (30 if ending == "zst" else 27)
    path = tmp_path / f"zeros.{ending}"
    with (
        open(path, "wb") as raw,
        zstandard.ZstdCompressor(level=1).stream_writer(raw) if ending == "zst" else gzip.open(raw, "wb", 1) as packed,
    ):
        for _ in range(size // MB):
            packed.write(bytes(MB))
    lengths, peak = peak_of(lambda: [len(block) for block in open_blocks(str(path), ending, 4 * MB)])
    assert sum(lengths) == size
    assert max(lengths) <= 4 * MB
    assert peak < (200 if ending == "zst" else 32) * MB


@given(
    pieces=st.lists(st.binary(max_size=60), min_size=1, max_size=5),
    size=st.integers(1, 50),
    start=st.integers(0, 80),
    length=st.integers(1, 80),
)
def test_frames_and_members_are_read_across_and_any_range_of_them(
    tmp_path: Path, pieces: list[bytes], size: int, start: int, length: int
) -> None:
    data = b"".join(pieces)
    for ending, pack in (("zst", zstandard.ZstdCompressor().compress), ("gz", gzip.compress)):
        path = tmp_path / f"x.{ending}"
        path.write_bytes(b"".join(map(pack, pieces)))
        blocks = list(open_blocks(str(path), ending, size))
        assert b"".join(blocks) == data
        assert all(len(block) == size for block in blocks[:-1])
        assert b"".join(skip(iter(blocks), start, start + length)) == data[start : start + length]


def test_a_stream_written_without_its_size_and_with_skippable_frames_is_read(tmp_path: Path) -> None:
    """pzstd puts a skippable frame before each frame; streaming writers know no content size."""
    buffer = io.BytesIO()
    with zstandard.ZstdCompressor().stream_writer(buffer, closefd=False) as writer:
        writer.write(b"streamed")
    skippable = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"skip"
    path = tmp_path / "x.zst"
    path.write_bytes(
        skippable + buffer.getvalue() + skippable + zstandard.ZstdCompressor().compress(b" and more") + skippable
    )
    assert b"".join(open_blocks(str(path), "zst", 100)) == b"streamed and more"


def peak_of(work: Any) -> tuple[Any, int]:
    """The result, and the most bytes that Python held at a time."""
    tracemalloc.start()
    try:
        return work(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
