"""A class a kind of file: what CSV gives is what Python's `csv` gives, everything that reads uses the same classes,
others can be added.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import importlib
import io
import json
import lzma
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from coref_corpus import contents, news, wordpiece
from hypothesis import example, given
from hypothesis import strategies as st

from moai import coref as entity_coref
from moai.bench import BenchConfig, measure
from moai.core.errors import ConfigError, PartFailed, SourceError
from moai.core.files import LocalFiles, Stamp, read_range
from moai.coref.options import CorefConfig
from moai.engine.part import source_digest
from moai.engine.pipeline import Meter
from moai.prepared.manifest import Prepared
from moai.pretraining.options import DataConfig
from moai.sources import kinds
from moai.sources.discover import discover
from moai.sources.kinds import File, Kind, Segment, kind_of, register
from moai.sources.local import LocalSource
from moai.sources.records import Limits
from moai.tokenizers.train import Documents, TokenizerConfig

PrepareIt = Callable[..., Prepared]
Texts = Callable[[Prepared], list[str]]
Row = dict[str, Any]

DOCUMENTS = [f'Document {n}, of "words"\nand a second line: ' + "가나다 " * (n % 13) + "." for n in range(200)]
PACK: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": zstandard.ZstdCompressor().compress,
}


def as_csv(rows: list[list[str]], delimiter: str = ",", end: str = "\r\n") -> str:
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=delimiter, lineterminator=end).writerows(rows)
    return text.getvalue()


TABLE = as_csv([["id", "text", "note"], *([f"{n:03}", text, "NA"] for n, text in enumerate(DOCUMENTS))])


def source_of(path: Path, columns: tuple[str, ...], *, encoding: str | None = None, **changes: Any) -> LocalSource:
    (found,) = discover(str(path))
    kind = found.kind.having(encoding=encoding)
    source = LocalSource(
        name="x",
        kind=kind,
        files=found.files,
        shard_bytes=1 << 24,
        cache=path.parent,
        spool_dir=path.parent,
        columns=columns,
    )
    return replace(source, **changes)


def read(source: LocalSource) -> list[list[Row]]:
    """The rows of each shard, which are also those of its digest."""
    shards = []
    for shard in source.shards():
        meter = Meter()
        shards.append([row for batch in source.read(shard, meter) for row in batch.to_pylist()])
        assert meter.raw() == source.digest(shard)
    return shards


def values(source: LocalSource) -> list[tuple[str | None, ...]]:
    return [tuple(row[name] for name in source.columns) for rows in read(source) for row in rows]


# ---- CSV


@given(
    body=st.lists(
        st.sampled_from(["a", '"', ",", "\n", "\r", "\r\n", '""', '",', '"\n', ',"', "\t", "한", "\0", " ", "\ufeff"]),
        max_size=30,
    ).map("".join),
    shard_bytes=st.integers(1, 40),
    block=st.integers(1, 9),
    bom=st.booleans(),
)
@example(body='1,"a\r\n""b"', shard_bytes=3, block=1, bom=True)
@example(body='x"y,"z\n1,2\n', shard_bytes=1, block=2, bom=False)
def test_records_are_those_of_a_whole_read_with_pythons_csv_for_any_cut(
    tmp_path: Path, body: str, shard_bytes: int, block: int, bom: bool
) -> None:
    text = "h,i\r\n" + body
    path = tmp_path / "a.csv"
    path.write_bytes((b"\xef\xbb\xbf" if bom else b"") + text.encode())
    source = source_of(path, ("h", "i"), shard_bytes=shard_bytes, batch_bytes=block, batch_rows=3)
    found = [row for rows in read(source) for row in rows]
    try:
        expected = [row for row in csv.reader(io.StringIO(text, newline=""), strict=True) if row][1:]
    except csv.Error:
        assert any(row["problem"] for row in found)
        return
    assert [len(row) == 2 for row in expected] == [row["problem"] is None for row in found]
    assert [row for row in expected if len(row) == 2] == [
        [row["h"], row["i"]] for row in found if row["problem"] is None
    ]


@pytest.mark.parametrize("shard_bytes", [1000, 1 << 24])
@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("plain.csv", TABLE.encode()),
        ("mark.csv", TABLE.encode("utf-8-sig")),
        ("wide.csv", TABLE.encode("utf-16")),
        ("big-endian.csv", b"\xfe\xff" + TABLE.encode("utf-16-be")),
        ("tabs.TSV", as_csv(list(csv.reader(io.StringIO(TABLE, newline=""))), "\t", "\n").encode()),
        ("packed.csv.gz", gzip.compress(TABLE.encode())),
        ("packed-wide.csv.xz", lzma.compress(TABLE.encode("utf-16"))),
    ],
)
def test_every_column_is_text_unchanged_in_every_spelling(
    tmp_path: Path, name: str, data: bytes, shard_bytes: int
) -> None:
    (tmp_path / name).write_bytes(data)
    source = source_of(tmp_path / name, ("id", "text", "note"), shard_bytes=shard_bytes, batch_bytes=700)
    assert values(source) == [(f"{n:03}", text, "NA") for n, text in enumerate(DOCUMENTS)]
    assert (len(read(source)) > 5) == (shard_bytes == 1000)


def test_empty_stays_empty_and_a_blank_line_is_no_record(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('\ntext,n\n\n,""\r\nNULL,1e5\n\n')
    assert values(source_of(tmp_path / "a.csv", ("text", "n"))) == [("", ""), ("NULL", "1e5")]
    assert values(source_of(tmp_path / "a.csv", ("n", "absent"))) == [("", None), ("1e5", None)]


def test_another_encoding_is_taken_only_where_it_is_named(tmp_path: Path, prepare: PrepareIt) -> None:
    (tmp_path / "a.csv").write_bytes("text\n가나다\n서울\n".encode("cp949"))
    assert values(source_of(tmp_path / "a.csv", ("text",), encoding="cp949")) == [("가나다",), ("서울",)]
    assert [row["problem"]["reason"] for (row, *_) in read(source_of(tmp_path / "a.csv", ("text",)))] == [
        "invalid UTF-8"
    ]
    with pytest.raises(SourceError, match=r"a\.csv: not utf-16 about byte 0"):
        values(source_of(tmp_path / "a.csv", ("text",), encoding="utf-16"))
    with pytest.raises(ConfigError, match="encoding = cp94999"):
        source_of(tmp_path / "a.csv", ("text",), encoding="cp94999")
    assert (
        discover(str(tmp_path / "a.csv"))[0].kind.identity
        != source_of(tmp_path / "a.csv", (), encoding="cp949").kind.identity
    )


def test_a_bad_record_is_named_by_file_and_line_and_the_others_are_kept(
    tmp_path: Path, prepare: PrepareIt, texts: Texts
) -> None:
    data = (
        b'id,text\n1,"two\nlines"\none field\n2,b\n3,c\n\n4,d\n5,"a"b\n6,\xff\n7,'
        + b"x" * 3000
        + b'\n1,2,3\n8,e\n9,"not closed\n'
    )
    (tmp_path / "a.csv").write_bytes(data)
    for shard_bytes in (1000, 1 << 24):
        prepared = prepare(
            tmp_path / "a.csv",
            shard_bytes=shard_bytes,
            max_doc_bytes=2000,
            cache_dir=str(tmp_path / f"cache{shard_bytes}"),
        )
        assert texts(prepared) == ["two\nlines", "b", "c", "d", "e"]
        entries = [json.loads(line) for line in (prepared.path / "quarantine.jsonl").read_bytes().splitlines()]
        assert [(entry["file"], entry["line"], entry["reason"]) for entry in entries] == [
            ("a.csv", 4, "ragged row"),
            ("a.csv", 9, "broken CSV"),
            ("a.csv", 10, "invalid UTF-8"),
            ("a.csv", 11, "too large"),
            ("a.csv", 12, "ragged row"),
            ("a.csv", 14, "broken CSV"),
        ]
        assert entries[0]["detail"] == "1 fields, the header has 2"
        assert all(data[entry["offset"] :].startswith(entry["sample"].encode()[:2]) for entry in entries)


@pytest.mark.parametrize(
    ("header", "complaint"),
    [
        ("text,id,text", r"a\.csv: column 3 of its header is called 'text' like column 1"),
        ("text,,id", r"a\.csv: column 2 of its header has no name"),
        ('"text', r"a\.csv: its header is not readable"),
        ("\r\n", r"a\.csv: holds no header"),
    ],
)
def test_a_header_that_does_not_tell_columns_apart_is_refused(
    tmp_path: Path, prepare: PrepareIt, header: str, complaint: str
) -> None:
    (tmp_path / "a.csv").write_text(header + "\n" if header != "\r\n" else header)
    with pytest.raises(SourceError, match=complaint):
        prepare(tmp_path / "a.csv")


def test_a_column_with_the_name_of_a_place_is_refused(tmp_path: Path, prepare: PrepareIt) -> None:
    (tmp_path / "a.csv").write_text("line\na\n")
    with pytest.raises(SourceError, match="the column 'line' has a name that places of records have"):
        prepare(tmp_path / "a.csv", text_column="line")


def test_the_header_is_part_of_what_every_range_holds(tmp_path: Path) -> None:
    """The same bytes under other names of columns are other records, also where the range lies far behind the
    header.
    """
    keys = []
    for names in ("text,note", "note,text"):
        (tmp_path / names).mkdir()
        (tmp_path / names / "a.csv").write_text(f"{names}\n" + "some,thing\n" * 100)
        source = source_of(tmp_path / names / "a.csv", ("text",), shard_bytes=100)
        keys.append([source.digest(shard).digest for shard in source.shards()])
    assert len(keys[0]) > 5
    assert not set(keys[0]) & set(keys[1])


# ---- compression, endings


@pytest.mark.parametrize("ending", ["jsonl", "csv", "txt"])
def test_compressed_twins_give_the_same_content(tmp_path: Path, prepare: PrepareIt, ending: str) -> None:
    lines = [text.replace("\n", " ") for text in DOCUMENTS]
    data = {
        "csv": TABLE,
        "txt": "\n".join(lines),
        "jsonl": "".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS),
    }[ending].encode()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / f"a.{ending}").write_bytes(data)
    plain = prepare(tmp_path / "data", shard_bytes=1 << 24)
    for name, pack in PACK.items():
        half = len(data) // 2
        path = tmp_path / name / "data" / f"a.{ending}.{name}"
        path.parent.mkdir(parents=True)
        path.write_bytes(
            pack(data[:half]) + pack(b"") + pack(data[half:])
        )  # streams one after another are read to the end
        twin = prepare(path.parent, shard_bytes=1 << 24, cache_dir=str(tmp_path / name / "cache"))
        assert [shard["xxh3_128"] for shard in twin.content["shards"]] == [
            shard["xxh3_128"] for shard in plain.content["shards"]
        ]
        path.write_bytes(path.read_bytes()[:-9])
        with pytest.raises(SourceError, match=rf"a\.{ending}\.{name}: the \w+ stream ends early"):
            prepare(path, cache_dir=str(tmp_path / "cut"))


def test_endings_are_read_in_any_case(tmp_path: Path, prepare: PrepareIt, texts: Texts) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.JSONL").write_text('{"text": "lines"}\n')
    pq.write_table(pa.table({"text": ["parquet"]}), tmp_path / "data" / "b.Parquet")
    (tmp_path / "data" / "c.Csv.GZ").write_bytes(gzip.compress(b"text\ncsv\n"))
    assert texts(prepare(tmp_path / "data")) == ["csv", "lines", "parquet"]


class Elsewhere(LocalFiles):
    """Files of a folder, whose bytes lie in another one."""

    def __init__(self, here: Path, there: Path) -> None:
        self.of = lambda path: path.replace(str(here), str(there))

    def stamp(self, path: str) -> Stamp:
        return super().stamp(self.of(path))

    def open(self, path: str) -> io.RawIOBase:
        return super().open(self.of(path))

    def random_access(self, path: str, *, mapped: bool) -> pa.NativeFile:
        return super().random_access(self.of(path), mapped=mapped)


def test_every_byte_of_every_kind_is_read_through_its_storage(
    tmp_path: Path, prepare: PrepareIt, texts: Texts, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    there.mkdir()
    table = pa.table({"text": ["table"] * 2})
    pq.write_table(table, there / "a.parquet")
    with pa.ipc.new_stream(str(there / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    written = {
        "a.csv": "text\ncsv\n",
        "a.json": '[{"text": "json"}]',
        "a.jsonl": '{"text": "lines"}\n',
        "a.tsv": "text\ntsv\n",
        "a.txt": "txt\n",
    }
    for name, text in written.items():
        (there / name).write_text(text)
        for ending, pack in PACK.items():
            (there / f"{name}.{ending}").write_bytes(pack(text.encode()))
    (there / "large.txt").write_text("large\n" * 500)
    here.mkdir()
    for path in there.iterdir():
        (here / path.name).touch()
    monkeypatch.setattr("moai.core.files._LOCAL", Elsewhere(here, there))
    expected = [
        *["table"] * 2,
        *["csv"] * 5,
        *["json"] * 5,
        *["lines"] * 5,
        *["table"] * 2,
        *["tsv"] * 5,
        *["txt"] * 5,
        *["large"] * 500,
    ]
    assert texts(prepare(here, shard_bytes=1000)) == expected


# ---- everything that reads, and kinds of one's own


def test_all_that_reads_takes_a_csv(tmp_path: Path, prepare: PrepareIt, texts: Texts, tokenizer_dir: Path) -> None:
    (tmp_path / "a.csv").write_text(TABLE, newline="")
    assert texts(prepare(tmp_path / "a.csv", shard_bytes=2000)) == DOCUMENTS
    trained = Documents(TokenizerConfig(dataset=(str(tmp_path / "a.csv"),), output_dir="unused"))
    assert list(trained) == DOCUMENTS
    assert (trained.read, trained.bad) == (200, 0)
    config = DataConfig(
        dataset=(str(tmp_path / "a.csv"),),
        tokenizer_path=str(tokenizer_dir),
        seq_len=64,
        num_proc=0,
        cache_dir=str(tmp_path / "bench"),
    )
    report = measure(config, BenchConfig(seconds=60), {"num_proc": "flag"})
    assert sum(lap.counts["kept"] for lap in report.laps) == 200


def test_entity_coref_takes_a_csv_and_its_ids(tmp_path: Path) -> None:
    model = wordpiece(tmp_path / "model")
    documents = [[f"doc-{n}", news(n)] for n in range(6)]
    lines = "".join(json.dumps({"id": id_, "text": text}) + "\n" for id_, text in documents)
    found = []
    for ending, data in (("csv", as_csv([["id", "text"], *documents])), ("jsonl", lines)):
        (tmp_path / ending / "data").mkdir(parents=True)
        (tmp_path / ending / "data" / f"a.{ending}").write_text(data, newline="")
        config = CorefConfig(
            input=(str(tmp_path / ending / "data"),), model=str(model), num_workers=0, output_dir=str(tmp_path / ending)
        )
        path = entity_coref.prepare(config, origins={"num_workers": "flag"})
        found.append({name: data for name, data in contents(path).items() if name.endswith(".arrow")})
    assert found[0] == found[1]
    assert found[0]


@dataclass(frozen=True)
class Pages(Kind):
    """Documents between form feeds."""

    name = "pages"
    endings = (".pages",)

    def schema(self, file: File) -> Mapping[str, str]:
        return {"text": "string", "number": "int64"}

    def read(self, segment: Segment, columns: tuple[str, ...], limits: Limits) -> Iterator[pa.RecordBatch]:
        data = b"".join(read_range(segment.file.path, segment.start, segment.end, limits.batch_bytes))
        pages = data.decode().split("\f")
        yield pa.record_batch({"text": pages, "number": range(len(pages))}).select(list(columns))


@pytest.fixture
def known_kinds(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(kinds, "_KINDS", dict(kinds._KINDS))
    kinds._entry_points.cache_clear()
    yield
    kinds._entry_points.cache_clear()


@pytest.mark.usefixtures("known_kinds")
def test_a_kind_of_ones_own_is_a_class_and_a_line(
    tmp_path: Path, prepare: PrepareIt, texts: Texts, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.pages"
    path.write_text("one\ftwo\fthree")
    with pytest.raises(SourceError, match="unknown kind of file"):
        prepare(path)
    register(Pages)
    first = prepare(path)
    assert (
        texts(first)
        == list(Documents(TokenizerConfig(dataset=(str(path),), output_dir="unused")))
        == ["one", "two", "three"]
    )
    assert first.content["sources"][0]["kind"] == "pages"
    path.write_text("one\ftwo\ffour")
    assert texts(prepare(path)) == ["one", "two", "four"]
    monkeypatch.setattr(Pages, "version", 2)
    path.write_text("one\ftwo\fthree")
    again = prepare(path)
    assert again.path != first.path  # another version may read the same bytes as other records
    assert Pages().identity == ["Pages", source_digest(Pages), 2]


@pytest.mark.usefixtures("known_kinds")
def test_what_is_no_kind_or_has_no_ending_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ConfigError, match="is no kind of file"):
        register(dict)  # type: ignore[type-var]
    for ending in ("pages", ".Pages", ".gz"):
        with pytest.raises(ConfigError, match="must be a dot and lower case"):
            register(type("Other", (Pages,), {"endings": (ending,)}))
    register(type("Mine", (Pages,), {"endings": (".csv",)}))
    assert ".csv: read by Mine from now on, not by Csv" in caplog.text


@pytest.mark.usefixtures("known_kinds")
def test_a_package_is_asked_only_for_an_ending_that_is_not_known(
    tmp_path: Path, prepare: PrepareIt, texts: Texts, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "site" / "paged-1.0.dist-info").mkdir(parents=True)
    (tmp_path / "site" / "paged-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: paged\nVersion: 1.0\n"
    )
    points = "[moai.kinds]\npages = paged_kind:Paged\njsonl = paged_kind:Absent\nbroken = paged_kind:Absent\n"
    (tmp_path / "site" / "paged-1.0.dist-info" / "entry_points.txt").write_text(points)
    (tmp_path / "site" / "paged_kind.py").write_text("from test_kinds import Pages\nclass Paged(Pages): pass\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert kind_of("a.jsonl") is not None
    assert "paged_kind" not in sys.modules
    (tmp_path / "a.pages").write_text("one\ftwo")
    with caplog.at_level("INFO"):
        assert texts(prepare(tmp_path / "a.pages")) == ["one", "two"]
    assert ".pages: read by Paged of the package paged" in caplog.text
    with pytest.raises(ConfigError, match=r"\.broken: the package paged says it reads such files, but fails"):
        kind_of("a.broken")


@pytest.mark.usefixtures("known_kinds")
@pytest.mark.parametrize(
    ("schema", "read", "said"),
    [
        (
            "raise ValueError('oops')",
            "yield",
            r"a.pages: kind Broken \(broken_\d+.py\) failed in line 15 \(raise ValueError\('oops'\)\): ValueError: "
            r"oops",
        ),
        ("return ['text']", "yield", "gave list as its schema, not column names with their types"),
        (
            "return {'text': 'string'}",
            "yield b''.no",
            "failed in line 18 .*: AttributeError: 'bytes' object has no attribute 'no'",
        ),
        ("return {'text': 'string'}", "yield {'text': ['a']}", "gave dict, not a pyarrow.RecordBatch"),
        (
            "return {'text': 'string'}",
            "yield pa.record_batch({'body': ['a']})",
            "gave no column 'text', which its schema names",
        ),
    ],
)
def test_a_kind_of_ones_own_that_fails_is_named_with_file_and_line(
    tmp_path: Path, prepare: PrepareIt, monkeypatch: pytest.MonkeyPatch, schema: str, read: str, said: str
) -> None:
    (tmp_path / "a.pages").write_text("one\ftwo")
    name = f"broken_{abs(hash((schema, read)))}"
    lines = [
        "from dataclasses import dataclass",
        "import pyarrow as pa",
        "from moai.sources.kinds import Kind, register",
        *[""] * 5,
    ]
    lines += [
        "@register",
        "@dataclass(frozen=True)",
        "class Broken(Kind):",
        "    name = 'pages'",
        "    endings = ('.pages',)",
    ]
    lines += [
        "    def schema(self, file):",
        f"        {schema}",
        "",
        "    def read(self, segment, columns, limits):",
        f"        {read}",
    ]
    (tmp_path / f"{name}.py").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module(name)
    with pytest.raises(PartFailed, match=said):
        prepare(tmp_path / "a.pages")


@pytest.mark.usefixtures("known_kinds")
def test_a_kind_that_lacks_something_is_refused_when_it_is_registered() -> None:
    with pytest.raises(ConfigError, match="Lacking: has no name and no endings and no read and no schema"):
        register(type("Lacking", (Kind,), {}))
    with pytest.raises(ConfigError, match=r"endings is a string; write a tuple, endings = \('.pages',\)"):
        register(type("Other", (Pages,), {"endings": ".pages"}))
