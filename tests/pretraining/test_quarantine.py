"""Bad records: each set aside with its file, line, byte offset and reason, none lost, none silently accepted, too many
of them an error.
"""

from __future__ import annotations

import gzip
import json
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from moai.core.errors import SourceError, TooManyBadRecords
from moai.engine import pipeline
from moai.prepared.manifest import Prepared
from moai.sources.discover import discover
from moai.sources.local import LocalSource
from moai.transforms.shapes import TextShape
from moai.transforms.text import ToText

PrepareIt = Callable[..., Prepared]

MAX_DOC_BYTES = 6000
BOM = b"\xef\xbb\xbf"

BAD: list[tuple[str, bytes, str]] = [
    ("cut object", b'{"text": "cut', "broken JSON"),
    ("cut key", b'{"te', "broken JSON"),
    ("no braces", b'"text": "a"', "broken JSON"),
    ("single quotes", b"{'text': 'a'}", "broken JSON"),
    ("trailing comma", b'{"text": "a",}', "broken JSON"),
    ("two objects in a line", b'{"text": "a"} {"text": "b"}', "broken JSON"),
    ("words behind", b'{"text": "a"} # note', "broken JSON"),
    ("comma behind", b'{"text": "a"},', "broken JSON"),
    ("plain words", b"just words", "broken JSON"),
    ("comment", b"// a comment", "broken JSON"),
    ("control character", b'{"text": "a\x01b"}', "broken JSON"),
    ("tab in string", b'{"text": "a\tb"}', "broken JSON"),
    ("NUL in string", b'{"text": "a\x00b"}', "broken JSON"),
    ("line of NUL", b"\x00" * 50, "broken JSON"),
    ("NUL behind", b'{"text": "a"}\x00', "broken JSON"),
    ("bad escape", b'{"text": "\\x41"}', "broken JSON"),
    ("half an escape", b'{"text": "\\u12"}', "broken JSON"),
    ("leading zero", b'{"text": "a", "n": 01}', "broken JSON"),
    ("number beyond a double", b'{"text": "a", "n": 1e999}', "broken JSON"),
    ("Python's None", b'{"text": None}', "broken JSON"),
    ("two marks", BOM * 2 + b'{"text": "a"}', "broken JSON"),
    ("three thousand marks", BOM * 1500 + b'{"text": "a"}', "broken JSON"),
    ("invalid UTF-8", b'{"text": "\xff\xfe"}', "invalid UTF-8"),
    ("cut character", b'{"text": "\xea\xb0"}', "invalid UTF-8"),
    ("overlong character", b'{"text": "\xc0\xaf"}', "invalid UTF-8"),
    ("surrogate in UTF-8", b'{"text": "\xed\xa0\x80"}', "invalid UTF-8"),
    ("cp949", '{"text": "안녕하세요"}'.encode("cp949"), "invalid UTF-8"),
    ("latin-1", '{"text": "café"}'.encode("latin-1"), "invalid UTF-8"),
    ("UTF-16", '{"text": "a"}'.encode("utf-16-be").replace(b"\n", b""), "broken JSON"),
    ("missing text", b'{"body": "a"}', "no text"),
    ("empty object", b"{}", "no text"),
    ("other case", b'{"Text": "a"}', "no text"),
    ("null text", b'{"text": null}', "null text"),
    ("last of two keys counts", b'{"text": "a", "text": null}', "null text"),
    ("number", b'{"text": 5}', "text is no string"),
    ("fraction", b'{"text": 5.5}', "text is no string"),
    ("list", b'{"text": ["a"]}', "text is no string"),
    ("object", b'{"text": {"a": "b"}}', "text is no string"),
    ("true", b'{"text": true}', "text is no string"),
    ("NaN", b'{"text": NaN}', "NaN"),
    ("NaN elsewhere", b'{"text": "a", "score": NaN}', "NaN"),
    ("Infinity", b'{"text": "a", "score": Infinity}', "NaN"),
    ("minus Infinity", b'{"text": "a", "score": -Infinity}', "NaN"),
    ("lone high surrogate", b'{"text": "\\ud800"}', "lone surrogate"),
    ("lone low surrogate", b'{"text": "a\\udc00b"}', "lone surrogate"),
    ("surrogates the wrong way", b'{"text": "\\udc00\\ud800"}', "lone surrogate"),
    ("surrogate in a key", b'{"text": "a", "\\ud800": 1}', "lone surrogate"),
    ("2,000 levels", b'{"text": "a", "x": ' + b"[" * 2000 + b"]" * 2000 + b"}", "too deep"),
    ("1,030 levels", b'{"":' * 1030 + b"1" + b"}" * 1030, "too deep"),
    ("too large", b'{"text": "' + b"x" * MAX_DOC_BYTES + b'"}', "too large"),
    ("too large and broken", b"[" * (MAX_DOC_BYTES + 1), "too large"),
    ("too large, white space first", b" " * 2 * MAX_DOC_BYTES + b'{"text": "a"}', "too large"),
    ("far too large", b'{"text": "' + b"y" * 9 * MAX_DOC_BYTES + b'"}', "too large"),
    ("top-level list", b'["a"]', "not an object"),
    ("top-level string", b'"a"', "not an object"),
    ("top-level number", b"5", "not an object"),
    ("top-level null", b"null", "not an object"),
    ("top-level true", b"true", "not an object"),
]

GOOD: list[tuple[str, bytes, str]] = [
    ("plain", b'{"text": "plain"}', "plain"),
    ("mark in front", BOM + b'{"text": "mark"}', "mark"),
    ("carriage return", b'{"text": "crlf"}\r', "crlf"),
    ("white space around", b' \t{"text": "spaces"} \t', "spaces"),
    ("last of two keys", b'{"text": "first", "text": "second"}', "second"),
    ("300 levels", b'{"text": "deep", "x": ' + b"[" * 300 + b"]" * 300 + b"}", "deep"),
    ("escaped NUL", b'{"text": "a\\u0000b"}', "a\0b"),
    ("surrogate pair", b'{"text": "\\ud83d\\ude00"}', "😀"),
    ("huge whole number", b'{"text": "n", "n": 123456789012345678901234567890}', "n"),
    ("line separator", '{"text": "a\u2028b"}'.encode(), "a\u2028b"),
    ("delete character", b'{"text": "a\x7fb"}', "a\x7fb"),
    ("Korean", '{"text": "안녕하세요"}'.encode(), "안녕하세요"),
]

BLANK = [b"", b"\r", b"   ", b" \t\r", b"\x0c"]


def table() -> tuple[bytes, list[dict[str, Any]], list[str]]:
    """The lines of the table between good and blank ones; the entries they must make; the texts that must be left."""
    lines, entries, left, offset = [], [], [], 0

    def add(line: bytes) -> None:
        nonlocal offset
        lines.append(line)
        offset += len(line) + 1

    for index, (_, record, reason) in enumerate(BAD):
        entries.append({"line": len(lines) + 1, "offset": offset, "reason": reason})
        add(record)
        _, good, text = GOOD[index % len(GOOD)]
        add(good)
        left.append(text)
        if index % 3 == 0:
            add(BLANK[index % len(BLANK)])
    entries.append({"line": len(lines) + 1, "offset": offset, "reason": "broken JSON"})
    return b"\n".join([*lines, b'{"text": "the last line is cut o']), entries, left


def entries_of(prepared: Prepared) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (prepared.path / "quarantine.jsonl").read_bytes().splitlines()]


def places(prepared: Prepared) -> list[dict[str, Any]]:
    return [{name: entry[name] for name in ("line", "offset", "reason")} for entry in entries_of(prepared)]


def adds_up(prepared: Prepared) -> bool:
    records = prepared.content["records"]
    return bool(records["read"] == records["kept"] + records["filtered"] + records["quarantined"] > 0)


PACKINGS: dict[str, Callable[[bytes], bytes]] = {
    "jsonl": lambda data: data,
    "jsonl.zst": lambda data: b"".join(
        zstandard.ZstdCompressor().compress(data[start : start + 5000]) for start in range(0, len(data), 5000)
    ),
    "jsonl.gz": lambda data: b"".join(gzip.compress(data[start : start + 5000]) for start in range(0, len(data), 5000)),
}


@pytest.mark.parametrize("shard_bytes", [1000, 7777, 16_000_000])
@pytest.mark.parametrize("ending", PACKINGS)
def test_every_bad_record_has_its_place_and_every_good_one_its_text(
    tmp_path: Path, prepare: PrepareIt, texts: Callable[[Prepared], list[str]], ending: str, shard_bytes: int
) -> None:
    data, entries, left = table()
    assert len(entries) > 50
    (tmp_path / f"table.{ending}").write_bytes(PACKINGS[ending](data))
    prepared = prepare(
        tmp_path / f"table.{ending}", shard_bytes=shard_bytes, max_doc_bytes=MAX_DOC_BYTES, max_bad_ratio=1.0
    )
    assert places(prepared) == entries
    assert {entry["file"] for entry in entries_of(prepared)} == {f"table.{ending}"}
    assert texts(prepared) == left
    assert prepared.content["records"] == {
        "read": len(entries) + len(left),
        "kept": len(left),
        "filtered": 0,
        "quarantined": len(entries),
    }
    assert prepared.content["quarantined"] == dict(sorted(Counter(entry["reason"] for entry in entries).items()))
    shards = len(prepared.content["shards"])
    assert shards == 1 if shard_bytes > len(data) else shards > 5  # not vacuous: the places really go across shards


@pytest.mark.parametrize(("name", "record", "reason"), BAD, ids=[name for name, _, _ in BAD])
def test_one_bad_record_is_named_and_costs_no_other(
    tmp_path: Path, prepare: PrepareIt, name: str, record: bytes, reason: str
) -> None:
    (tmp_path / "one.jsonl").write_bytes(b'{"text": "before"}\n' + record + b'\n{"text": "after"}\n')
    prepared = prepare(tmp_path / "one.jsonl", max_doc_bytes=MAX_DOC_BYTES)
    (entry,) = entries_of(prepared)
    assert (entry["file"], entry["line"], entry["offset"], entry["reason"]) == ("one.jsonl", 2, 19, reason)
    assert (
        entry["detail"] == "more than 1,024 levels" if reason == "too deep" else entry["detail"]
    )  # the same however deep the reader's own stack is
    assert record.decode("utf-8", "backslashreplace").startswith(entry["sample"].rstrip("\n")[:60])
    assert prepared.content["records"] == {"read": 3, "kept": 2, "filtered": 0, "quarantined": 1}


def test_the_same_bytes_for_every_number_of_workers_and_every_batch_size(tmp_path: Path, prepare: PrepareIt) -> None:
    data, _, _ = table()
    (tmp_path / "data").mkdir()
    for ending, pack in PACKINGS.items():
        (tmp_path / "data" / f"table.{ending}").write_bytes(
            pack(ending.encode() + b"\n" + data)
        )  # else the one's shards would serve the others
    made = set()
    for number, changes in enumerate(
        [
            {},
            {"num_proc": 2},
            {"dataset_batch_size": 1, "writer_batch_size": 1},
            {"memory_mode": "disk", "dataset_batch_size": 7},
        ]
    ):
        cache = tmp_path / f"cache{number}"
        prepared = prepare(
            tmp_path / "data",
            shard_bytes=4000,
            max_doc_bytes=MAX_DOC_BYTES,
            max_bad_ratio=1.0,
            cache_dir=str(cache),
            **changes,
        )
        assert prepared.manifest["run"]["shards_made"] > 20
        made.add(((prepared.path / "quarantine.jsonl").read_bytes(), prepared.content_digest))
    assert len(made) == 1


@pytest.mark.parametrize("block", [100, 1000, 7000])
def test_where_blocks_end_makes_no_difference_to_what_is_set_aside(tmp_path: Path, block: int) -> None:
    """Blocks follow from the memory mode. What is too large to hold begins with white space here, and still is no blank
    line.
    """
    data, entries, left = table()
    path = tmp_path / "table.jsonl"
    path.write_bytes(data)
    source = LocalSource(
        name="table",
        kind=discover(str(path))[0].kind,
        files=discover(str(path))[0].files,
        shard_bytes=len(data),
        cache=tmp_path,
        spool_dir=tmp_path,
        max_record_bytes=MAX_DOC_BYTES,
        batch_bytes=block,
        trust_stamps=False,
    )
    tally = pipeline.Tally()
    token = pipeline._tally.set(tally)
    try:
        (shard,) = source.shards()
        text = ToText(shape=TextShape(name="column text", required=("text",)), max_doc_bytes=MAX_DOC_BYTES)
        found = [text for batch in text(source.read(shard, pipeline.Meter())) for text in batch["text"].to_pylist()]
    finally:
        pipeline._tally.reset(token)
    assert found == left
    assert [{"line": e["line"] + 1, "offset": e["offset"], "reason": e["reason"]} for e in tally.quarantine] == entries
    assert tally.counts["read"] == len(entries) + len(left)


@pytest.mark.parametrize("shard_bytes", [1000, 16_000_000])
@pytest.mark.parametrize("head", ["[", "\n\n  [\n", "\ufeff[\n"])
def test_places_in_a_json_array_count_from_the_beginning_of_the_file(
    tmp_path: Path, prepare: PrepareIt, head: str, shard_bytes: int
) -> None:
    data, entries = head.encode(), []
    elements = [record for _, record, _ in BAD if _is_one_value(record)] * 3
    for index, element in enumerate(elements):
        entries.append((data.count(b"\n") + 1, len(data)))
        data += element + b',\n{"text": "good"}' + (b"," if index + 1 < len(elements) else b"") + b" \n" * (index % 3)
    (tmp_path / "a.json").write_bytes(data + b"]\n")
    prepared = prepare(tmp_path / "a.json", shard_bytes=shard_bytes, max_doc_bytes=MAX_DOC_BYTES, max_bad_ratio=1.0)
    assert [(entry["line"], entry["offset"]) for entry in entries_of(prepared)] == entries
    assert prepared.content["records"]["kept"] == len(elements) > 50
    assert adds_up(prepared)


def _is_one_value(record: bytes) -> bool:
    """Whether its brackets, quotes and commas leave it one element among others."""
    try:
        json.loads(record, parse_constant=lambda name: None)
    except RecursionError:
        return record.count(b"[") == record.count(b"]")
    except ValueError:
        return False
    return not record.startswith(b" ")


def test_pretty_printed_values_have_places_too(
    tmp_path: Path, prepare: PrepareIt, texts: Callable[[Prepared], list[str]]
) -> None:
    values = [{"text": f"n {n}"} if n % 5 else {"text": n} for n in range(100)]
    data = "\n".join(json.dumps(value, indent=2) for value in values)
    (tmp_path / "a.json").write_text(data)
    prepared = prepare(tmp_path / "a.json", shard_bytes=1000, max_bad_ratio=1.0)
    assert texts(prepared) == [value["text"] for value in values if isinstance(value["text"], str)]
    starts = [data.index(json.dumps(value, indent=2)) for value in values if not isinstance(value["text"], str)]
    assert [(e["offset"], e["line"]) for e in entries_of(prepared)] == [
        (start, data.count("\n", 0, start) + 1) for start in starts
    ]


def test_rows_of_parquet_are_counted_through_files_and_row_groups(
    tmp_path: Path, prepare: PrepareIt, texts: Callable[[Prepared], list[str]]
) -> None:
    raw = [b"a", None, b"\xff\xfe", "가".encode(), b"x" * 2000, b"\xed\xa0\x80"] * 5
    binary = pa.array(raw, pa.binary())
    column = pa.Array.from_buffers(pa.string(), len(raw), binary.buffers(), binary.null_count)
    (tmp_path / "data").mkdir()
    for name in ("a", "b"):
        pq.write_table(
            pa.table({"text": column, "n": range(len(raw))}), tmp_path / "data" / f"{name}.parquet", row_group_size=4
        )
    prepared = prepare(tmp_path / "data", shard_bytes=1000, max_doc_bytes=1000, max_bad_ratio=1.0)
    assert texts(prepared) == ["a", "가"] * 10
    reasons = {1: "null text", 2: "invalid UTF-8", 4: "too large", 5: "invalid UTF-8"}
    expected = [
        (f"{name}.parquet", row + 1, None, reasons[row % 6])
        for name in "ab"
        for row in range(len(raw))
        if row % 6 in reasons
    ]
    assert [(e["file"], e["line"], e["offset"], e["reason"]) for e in entries_of(prepared)] == expected
    assert len(prepared.content["shards"]) > 4
    assert adds_up(prepared)


def test_rows_of_arrow_files_that_are_no_utf8_are_bad_records_and_no_crash(
    tmp_path: Path, prepare: PrepareIt, texts: Callable[[Prepared], list[str]]
) -> None:
    binary = pa.array([b"a", b"\xff", b"b"], pa.binary())
    table_ = pa.table({"text": pa.Array.from_buffers(pa.string(), 3, binary.buffers())})
    with pa.ipc.new_stream(str(tmp_path / "a.arrow"), table_.schema) as writer:
        writer.write_table(table_)
    prepared = prepare(tmp_path / "a.arrow")
    assert texts(prepared) == ["a", "b"]
    assert [(e["line"], e["reason"]) for e in entries_of(prepared)] == [(2, "invalid UTF-8")]


def test_lines_of_text_files_must_be_utf8_and_not_too_large(
    tmp_path: Path, prepare: PrepareIt, texts: Callable[[Prepared], list[str]]
) -> None:
    (tmp_path / "a.txt").write_bytes(
        BOM + b"first\r\n\n  \n\xff\nlast\n" + b"x" * 101 + b"\nNUL\0 inside\n" + "끝".encode()
    )
    prepared = prepare(tmp_path / "a.txt", max_doc_bytes=100)
    assert texts(prepared) == ["first", "last", "NUL\0 inside", "끝"]
    assert places(prepared) == [
        {"line": 4, "offset": 14, "reason": "invalid UTF-8"},
        {"line": 6, "offset": 21, "reason": "too large"},
    ]
    assert prepared.content["filtered"] == {"length.empty": 1}


def test_whole_text_files_that_are_bad_are_named_by_their_first_line(
    tmp_path: Path, prepare: PrepareIt, texts: Callable[[Prepared], list[str]]
) -> None:
    (tmp_path / "data").mkdir()
    for name, content in (("a", b"fine\nfile\n"), ("b", b"not \xff UTF-8"), ("c", b"line\n" * 50), ("d", b" \n")):
        (tmp_path / "data" / f"{name}.txt").write_bytes(content)
    prepared = prepare(tmp_path / "data", txt_document="file", max_doc_bytes=100)
    assert texts(prepared) == ["fine\nfile"]
    expected = [("b.txt", 1, 0, "invalid UTF-8"), ("c.txt", 1, 0, "too large")]
    assert [(e["file"], e["line"], e["offset"], e["reason"]) for e in entries_of(prepared)] == expected
    assert prepared.content["records"] == {"read": 4, "kept": 1, "filtered": 1, "quarantined": 2}


def test_files_of_a_folder_each_have_their_own_lines(tmp_path: Path, prepare: PrepareIt) -> None:
    (tmp_path / "data" / "deep").mkdir(parents=True)
    for name in ("a.jsonl", "b.jsonl", "deep/c.jsonl"):
        (tmp_path / "data" / name).write_text(
            '{"text": "good"}\n' + f'{{"{name}": 1}}\n' + '{"text": "no newline at the end"}'
        )
    prepared = prepare(tmp_path / "data")
    expected = [("a.jsonl", 2, 17), ("b.jsonl", 2, 17), ("deep/c.jsonl", 2, 17)]
    assert [(e["file"], e["line"], e["offset"]) for e in entries_of(prepared)] == expected
    assert all(e["file"] in e["sample"] for e in entries_of(prepared))


# ---- how many are too many


def some_bad(path: Path, *, good: int, bad: list[str]) -> Path:
    path.write_text('{"text": "good"}\n' * good + "".join(line + "\n" for line in bad))
    return path


def test_ten_bad_records_never_fail_a_run(tmp_path: Path, prepare: PrepareIt) -> None:
    prepared = prepare(some_bad(tmp_path / "a.jsonl", good=1, bad=["{"] * 10), max_bad_ratio=0.0)
    assert prepared.content["records"]["quarantined"] == 10


def test_more_than_the_ratio_fails_with_the_top_reasons_and_where_they_are(tmp_path: Path, prepare: PrepareIt) -> None:
    bad = ["{"] * 7 + ['{"text": null}'] * 5
    path = some_bad(tmp_path / "a.jsonl", good=100, bad=bad)
    with pytest.raises(TooManyBadRecords) as failed:
        prepare(path, max_bad_ratio=0.1)
    message = str(failed.value)
    assert message.startswith(
        "12 of 112 records (10.71%) are bad, more than --max_bad_ratio 0.1 allows: 7 broken JSON, 5 null text; the "
        "first: a.jsonl line 101 "
    )
    listing = Path(message.rsplit("all of them: ", 1)[1])
    assert [json.loads(line)["line"] for line in listing.read_bytes().splitlines()] == list(range(101, 113))
    assert not list((tmp_path / "cache" / "datasets").iterdir())  # nothing was published
    assert prepare(path, max_bad_ratio=0.11).content["records"]["quarantined"] == 12  # and the shards are reused
    with pytest.raises(TooManyBadRecords, match="12 of 112"):
        prepare(path, max_bad_ratio=0.1)  # what is published under another ratio is judged again


def test_exactly_the_ratio_passes(tmp_path: Path, prepare: PrepareIt) -> None:
    assert (
        prepare(some_bad(tmp_path / "a.jsonl", good=80, bad=["{"] * 20), max_bad_ratio=0.2).content["records"][
            "quarantined"
        ]
        == 20
    )


def test_the_command_line_says_it_in_one_line(
    tmp_path: Path, tokenizer_dir: Path, run_moai: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    path = some_bad(tmp_path / "a.jsonl", good=10, bad=["{"] * 11)
    ended = run_moai(
        "prepare",
        "--dataset",
        path,
        "--tokenizer_path",
        tokenizer_dir,
        "--cache_dir",
        tmp_path / "cache",
        "--num_proc",
        0,
    )
    assert ended.returncode == 65
    assert "Traceback" not in ended.stderr
    assert ended.stderr.splitlines()[-1].startswith("python -m moai prepare: error: 11 of 21 records (52.38%) are bad")
    assert ended.stdout == ""


def test_nothing_but_bad_records_is_an_error_and_not_an_empty_dataset(tmp_path: Path, prepare: PrepareIt) -> None:
    with pytest.raises(SourceError, match="no document is left"):
        prepare(some_bad(tmp_path / "a.jsonl", good=0, bad=['{"text": null}'] * 3), text_column="text")


def test_a_run_that_nothing_can_mend_stops_before_its_end(tmp_path: Path, prepare: PrepareIt) -> None:
    path = some_bad(tmp_path / "a.jsonl", good=1, bad=['{"text": null}'] * 20_000)
    with pytest.raises(TooManyBadRecords, match=r"stopped after \d+% of the input"):
        prepare(path, shard_bytes=2000)


def test_a_run_that_its_rest_mends_is_not_stopped(tmp_path: Path, prepare: PrepareIt) -> None:
    """11 bad records of 60,020 are 0.02 %, also where the first shard holds them beside few and long documents."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jsonl").write_text("{\n" * 11 + (json.dumps({"text": "long " * 4000}) + "\n") * 9)
    (tmp_path / "data" / "b.jsonl").write_text('{"text": "short"}\n' * 60_000)
    assert prepare(tmp_path / "data", shard_bytes=200_000).content["records"]["quarantined"] == 11


def test_an_error_over_nothing_left_says_why_the_records_were_bad(tmp_path: Path, prepare: PrepareIt) -> None:
    with pytest.raises(SourceError, match=r"3 null text"):
        prepare(some_bad(tmp_path / "a.jsonl", good=0, bad=['{"text": null}'] * 3), text_column="text")


def test_beyond_a_number_bad_records_are_only_counted(
    tmp_path: Path, prepare: PrepareIt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "MAX_DETAILS", 20)
    prepared = prepare(some_bad(tmp_path / "a.jsonl", good=1, bad=["{"] * 25), max_bad_ratio=1.0)
    assert len(entries_of(prepared)) == 20
    assert prepared.content["records"]["quarantined"] == 25
