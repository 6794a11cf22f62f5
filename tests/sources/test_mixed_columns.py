"""Columns that come late, in another file or in another type: read, or refused by name before any work, and the same
whatever stands first.
"""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from datasets import load_from_disk
from hypothesis import given, settings
from hypothesis import strategies as st
from reading import Read, read, read_apart
from tokenizers import Tokenizer

from moai.core.errors import MoaiError
from moai.prepared.manifest import Prepared

ROOT = Path(__file__).parents[2]
Row = dict[str, Any]


def save_lines(path: Path, rows: list[Row]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def save_csv(path: Path, rows: list[Row]) -> None:
    names = dict.fromkeys(name for row in rows for name in row)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, names, restval="")
        writer.writeheader()
        writer.writerows(rows)


def save_arrow(path: Path, table: pa.Table) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)


def table_of(rows: list[Row]) -> pa.Table:
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.table({name: pa.array([row.get(name) for row in rows]) for name in names})


SAVE: dict[str, Callable[[Path, list[Row]], None]] = {
    ".jsonl": save_lines,
    ".json": lambda path, rows: path.write_text(json.dumps(rows)),
    ".csv": save_csv,
    ".parquet": lambda path, rows: pq.write_table(table_of(rows), path),
    ".arrow": lambda path, rows: save_arrow(path, table_of(rows)),
}
OWN_SCHEMA = (".csv", ".parquet", ".arrow")


def folder(path: Path, ending: str, *files: list[Row]) -> Path:
    path.mkdir(parents=True)
    for number, rows in enumerate(files):
        SAVE[ending](path / f"{number:03}{ending}", rows)
    return path


# ---- late and in later files

SHORT = [{"instruction": f"Say {n}.", "output": str(n)} for n in range(101)]
LONG = [{"instruction": f"Sum {n} up.", "input": f"Passage {n}", "output": "short"} for n in range(3)]


def joined(rows: Iterable[Row]) -> list[str]:
    return ["\n\n".join(row[name] for name in ("instruction", "input", "output") if name in row) for row in rows]


@pytest.mark.parametrize("ending", SAVE)
def test_an_optional_column_that_comes_late_or_in_a_later_file_is_read(tmp_path: Path, ending: str) -> None:
    assert read(folder(tmp_path / "one", ending, SHORT + LONG)).texts == joined(SHORT + LONG)
    for number, files in enumerate(itertools.permutations([SHORT[:2], LONG, SHORT[2:4]])):
        found = read(folder(tmp_path / str(number), ending, *files))
        assert found == Read(joined(itertools.chain(*files)), [], "", 7)
    one, two = (read(folder(tmp_path / f"{size}", ending, SHORT + LONG), shard_bytes=size) for size in (100, 1000))
    assert one == two


@pytest.mark.parametrize("ending", SAVE)
def test_columns_of_a_later_file_choose_the_shape_as_if_they_stood_in_the_first(tmp_path: Path, ending: str) -> None:
    """`input` and `output` alone make another shape, in which every instruction would be left out."""
    pairs = [{"input": "in", "output": "out"}] * 2
    for number, files in enumerate(((pairs, LONG), (LONG, pairs))):
        found = read(folder(tmp_path / str(number), ending, *files))
        if ending in OWN_SCHEMA:
            assert "no column 'instruction' (found: input (string), output (string))" in found.error
            assert "instruction (string), input (string), output (string)" in found.error
        else:
            assert found.texts == joined(LONG)
            assert [reason for _, reason in found.bad] == ["no text"] * 2


@pytest.mark.parametrize(
    ("early", "late"),
    [
        ({"input": "i", "output": "o"}, {"instruction": "t", "input": "i", "output": "o"}),
        ({"content": "c"}, {"content": "c", "text": "t"}),
        ({"context": "c"}, {"context": "c", "question": "q", "answer": "a"}),
        ({"prompt": "p", "response": "r"}, {"prompt": "p", "response": "r", "messages": []}),
    ],
)
def test_a_record_with_the_columns_of_an_earlier_shape_is_named_not_read_in_part(
    tmp_path: Path, early: Row, late: Row
) -> None:
    save_lines(tmp_path / "a.jsonl", [early] * 120 + [late, early])
    found = read(tmp_path / "a.jsonl")
    assert (len(found.texts), found.bad) == (121, [(120, "another shape")])


@pytest.mark.parametrize("ending", [".jsonl", ".parquet", ".arrow"])
def test_a_column_of_nulls_leaves_it_to_the_next_records_or_file(tmp_path: Path, ending: str) -> None:
    nulls = [{"text": None, "n": 1}] * 150
    texts = [{"text": f"t{n}", "n": 1} for n in range(3)]
    expected = Read([row["text"] for row in texts], [(line, "null text") for line in range(150)], "", 153)
    assert read(folder(tmp_path / "files", ending, nulls, texts)) == expected
    if ending == ".jsonl":
        assert read(folder(tmp_path / "one", ending, nulls + texts)) == expected
    assert read(folder(tmp_path / "all", ending, nulls)).bad == expected.bad


@pytest.mark.parametrize("ending", OWN_SCHEMA)
def test_files_of_other_columns_are_refused_with_both_sets_before_the_work(tmp_path: Path, ending: str) -> None:
    for number, (one, other) in enumerate(itertools.permutations([[{"text": "x"}], [{"content": "y", "id": "7"}]])):
        found = read(folder(tmp_path / str(number), ending, one, other))
        assert f"{number}/{'001' if number == 0 else '000'}{ending}: has no column 'text'" in found.error
        assert "(found: content (string), id (string))" in found.error
        assert "(found: text (string))" in found.error


def test_the_command_refuses_mixed_files_in_one_line(
    tmp_path: Path, tokenizer_dir: Path, run_moai: Callable[..., Any]
) -> None:
    data = folder(tmp_path / "data", ".parquet", [{"text": "x"}], [{"content": "y"}])
    ended = run_moai(
        "prepare", "--dataset", data, "--tokenizer_path", tokenizer_dir, "--cache_dir", tmp_path / "c", "--num_proc", 0
    )
    assert ended.returncode == 66
    assert "001.parquet: has no column 'text' (found: content (string))" in ended.stderr.splitlines()[-1]


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_conversations_read_columns_that_come_late_too(
    tmp_path: Path, ending: str, prepare: Callable[..., Prepared], tokenizer_dir: Path
) -> None:
    late = [{"instruction": "Sum up.", "input": "THE PASSAGE", "output": "short", "system": "Be brief."}]
    data = folder(tmp_path / "data", ending, SHORT[:1], late)
    prepared = prepare(data, data_format="chat", chat_template=str(ROOT / "configs/chat_template_demo.jinja"))
    tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    (_, row) = load_from_disk(str(prepared.path))["input_ids"]
    for said in ("Be brief.", "Sum up.\n\nTHE PASSAGE", "short"):
        assert said in tokenizer.decode(row)


# ---- types

WORDS = ["a", "b", None, "a", "b c"]
TIMES = pa.array([2**62, 1, 2, 3, 4], pa.int64())
NO_TEXT = {
    "int64": pa.array(range(5)),
    "bool": pa.array([True] * 5),
    "binary": pa.array([b"a"] * 5),
    "duration": TIMES.cast(pa.duration("s")),
    "timestamp": TIMES.cast(pa.timestamp("s")),
    "month_day_nano_interval": pa.array([pa.MonthDayNano([1, 2, 3])] * 5),
    "sparse_union": pa.UnionArray.from_sparse(pa.array([0, 1, 0, 1, 0], pa.int8()), [TIMES, pa.array(list("abcde"))]),
    "dictionary<values=int64": pa.array([1, 1, 2, 2, 1]).dictionary_encode(),
    "struct": pa.array([{"text": "a"}] * 5),
    "list": pa.array([["a"]] * 5),
    "decimal128": pa.array([1] * 5).cast(pa.decimal128(25)),
}


@pytest.mark.parametrize(
    "column",
    [
        pa.array(WORDS).dictionary_encode(),
        pa.array(WORDS, pa.large_string()).dictionary_encode(null_encoding="encode"),
        pa.array(WORDS, pa.string_view()),
        pc.run_end_encode(pa.array(WORDS)),
        pa.array(WORDS).cast(pa.dictionary(pa.int8(), pa.large_string())),
    ],
    ids=lambda column: str(column.type),
)
def test_strings_are_text_however_they_are_encoded(tmp_path: Path, column: pa.Array) -> None:
    save_arrow(tmp_path / "a.arrow", pa.table({"text": column}))
    expected = Read([word for word in WORDS if word is not None], [(2, "null text")], "", 5)
    assert read(tmp_path / "a.arrow") == expected
    if column.null_count:  # no writer takes the others
        pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
        assert read(tmp_path / "a.parquet") == expected


def test_what_is_no_text_is_refused_by_its_type_and_never_ends_the_process(tmp_path: Path) -> None:
    cases = []
    for number, (name, column) in enumerate(NO_TEXT.items()):
        table = pa.table({"text": pa.array(["t"] * 5), "asked": column})
        save_arrow(tmp_path / f"{number}.arrow", table)
        cases.append((tmp_path / f"{number}.arrow", name))
        if name not in ("duration", "timestamp", "month_day_nano_interval", "sparse_union"):
            pq.write_table(table, tmp_path / f"{number}.parquet")
            cases.append((tmp_path / f"{number}.parquet", name))
    found = [found for found, _ in read_apart((path, column) for path, _ in cases for column in ("asked", None))]
    for (path, name), named, other in zip(cases, found[::2], found[1::2]):
        kind = "int64" if name.startswith("dictionary") and path.suffix == ".parquet" else name
        assert f"{path}: its column 'asked' is {kind}" in named.error
        assert "not text (found: text (string), asked (" in named.error
        assert other.texts == ["t"] * 5


@pytest.mark.parametrize("name", [name for name in NO_TEXT if name != "binary"])
def test_any_column_beside_the_text_is_carried_or_refused_in_one_line(
    tmp_path: Path, name: str, prepare: Callable[..., Prepared]
) -> None:
    """A value that Python cannot hold makes one bad record."""
    save_arrow(tmp_path / "a.arrow", pa.table({"text": pa.array(list("abcde")), "x": NO_TEXT[name]}))
    if name == "sparse_union":
        with pytest.raises(MoaiError, match=r"a\.arrow: its column 'x' is sparse_union<.*cannot be carried"):
            prepare(tmp_path / "a.arrow", carry_columns=("x",))
    else:
        records = prepare(tmp_path / "a.arrow", carry_columns=("x",), max_bad_ratio=1).content["records"]
        assert records["kept"] + records["quarantined"] == 5
        assert records["kept"] >= 4


@pytest.mark.parametrize("ending", [".parquet", ".arrow"])
def test_columns_of_one_name_are_refused_where_the_name_is_asked_for(tmp_path: Path, ending: str) -> None:
    table = pa.Table.from_arrays([pa.array([word]) for word in "abc"], names=["text", "text", "other"])
    path = tmp_path / f"a{ending}"
    pq.write_table(table, path) if ending == ".parquet" else save_arrow(path, table)
    assert "(text (2 columns of one name), other (string))" in read(path).error
    assert f"{path}: its column 'text' is 2 columns of one name" in read(path, text_column="text").error
    assert read(path, text_column="other").texts == ["c"]


@pytest.mark.parametrize("ending", [".parquet", ".arrow"])
def test_a_column_name_that_is_not_utf8_is_one_line(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a{ending}"
    table = pa.table({"text": ["t"], "nameXX": ["n"]})
    pq.write_table(table, path, store_schema=False) if ending == ".parquet" else save_arrow(path, table)
    path.write_bytes(path.read_bytes().replace(b"nameXX", b"name\xff\xfe"))
    assert f"{path}: the name of a column is not UTF-8" in read(path).error


def test_a_changed_byte_in_a_page_with_a_checksum_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(
        pa.table({"text": ["words " * 50]}),
        path,
        write_page_checksum=True,
        compression="none",
        use_dictionary=False,
        write_statistics=False,
    )
    path.write_bytes(path.read_bytes().replace(b"words words", b"words wordz", 1))
    found = read(path)
    assert f"{path}: row group 0 is not readable" in found.error
    assert not found.texts


# ---- memory


def test_what_is_small_only_while_it_is_encoded_is_decoded_a_few_rows_at_a_time(tmp_path: Path) -> None:
    """A long text once in the file for all its rows: 300 of them are 265 MB."""
    long = "x" * 884_000
    same = pa.array([long] * 300)
    turns = pa.array([[{"role": "user", "content": long}]] * 300)
    growing = pa.array([long + str(number) for number in range(300)])
    save_arrow(tmp_path / "dictionary.arrow", pa.table({"text": same.dictionary_encode()}))
    pq.write_table(pa.table({"text": same}), tmp_path / "dictionary.parquet")
    pq.write_table(pa.table({"messages": turns}), tmp_path / "turns.parquet")
    pq.write_table(
        pa.table({"text": growing}),
        tmp_path / "growing.parquet",
        use_dictionary=False,
        column_encoding="DELTA_BYTE_ARRAY",
        compression="zstd",
    )
    save_lines(tmp_path / "small.jsonl", [{"text": "t"}])
    paths = [tmp_path / "small.jsonl", *sorted(set(tmp_path.iterdir()) - {tmp_path / "small.jsonl"})]
    assert all(path.stat().st_size < 2_000_000 for path in paths)
    (_, least), *others = read_apart(((path, None) for path in paths), keep=False)
    for path, (found, peak) in zip(paths[1:], others):
        assert found == Read([], [], "", 300)
        assert 0 <= peak - least < 150, f"{path.name}: {peak - least} MB more than at rest"


# ---- anything mixed with anything

ALPACA = ("instruction", "input", "output")
FAMILIES: dict[str, list[bytes | Row]] = {
    "text": [
        {"text": "one"},
        {"text": "둘\n{", "n": 1},
        {"n": 1, "text": "three", "late": "x"},
        {"text": ""},
        {"text": None},
        {"text": 5},
        {"instruction": "i", "output": "o"},
        {"other": {"text": "t"}},
        b'{"text": tru}',
        b'{"text": "\xff"}',
        b'{"text": "\\ud800"}',
        b'{"text": "a", }',
        b"[1]",
    ],
    "alpaca": [
        {"instruction": "i", "output": "o"},
        {"instruction": "i", "output": "o", "input": "late"},
        {"output": "o", "input": None, "instruction": "null"},
        {"output": "o", "input": ""},
        {"instruction": "i", "output": None},
        {"instruction": "i", "output": "o", "input": 7},
        b'{"instruction": "i", "output": "o" "input": "x"}',
    ],
}


def text_of(family: str, record: bytes | Row) -> str | None:
    if isinstance(record, bytes):
        return None
    if family == "text":
        return record["text"] if isinstance(record.get("text"), str) else None
    parts = [record.get(name) for name in ALPACA]
    good = isinstance(parts[0], str) and isinstance(parts[1], str | None) and isinstance(parts[2], str)
    return "\n\n".join(filter(None, parts)) if good else None


@settings(max_examples=60)
@given(st.data(), st.sampled_from(list(FAMILIES)), st.sampled_from([".jsonl", "array", "values", *OWN_SCHEMA]))
def test_every_good_record_comes_back_and_every_other_is_named(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, family: str, way: str
) -> None:
    place = tmp_path_factory.mktemp("mixed")
    some = st.lists(st.sampled_from(FAMILIES[family]), max_size=6)
    files = [*data.draw(st.lists(some, max_size=2)), [FAMILIES[family][0], *data.draw(some)]]
    texts: list[str] = []
    read_in_all = 0
    for number, records in enumerate(filter(None, files)):
        if way in OWN_SCHEMA:  # each column has one type, and every file all columns
            rows = [
                row for row in records if isinstance(row, dict) and not any(isinstance(v, int) for v in row.values())
            ]
            names = ALPACA if family == "alpaca" else ("text",)
            rows = [{name: row.get(name, "" if way == ".csv" else None) for name in names} for row in rows]
            rows = [{name: value or "" for name, value in row.items()} if way == ".csv" else row for row in rows]
            records = list[bytes | Row](rows)
            if rows:
                SAVE[way](place / f"{number}{way}", rows)
        else:
            lines = [row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode() for row in records]
            whole = b"[%s]" % b",\n".join(lines) if way == "array" else b"\n".join(lines)
            (place / f"{number}{way if way == '.jsonl' else '.json'}").write_bytes(whole)
        texts += [text for record in records if (text := text_of(family, record)) is not None]
        read_in_all += len(records)
    found = read(place, shard_bytes=data.draw(st.integers(10, 400)))
    assert not found.error
    blank = [text for text in texts if not text]  # a line of CSV with nothing in it is no record
    assert [text for text in found.texts if text] == [text for text in texts if text]
    assert len(found.texts) + len(found.bad) >= read_in_all - len(blank)
