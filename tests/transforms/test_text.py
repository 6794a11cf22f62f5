"""Which text a record gives: the shapes, chosen once from the columns, and what becomes of rows that do not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moai.core.errors import SourceError
from moai.prepared.manifest import Prepared
from moai.transforms.shapes import BadRecord, TextShape, choose_shape

PrepareIt = Callable[..., Prepared]


def columns(row: dict[str, Any]) -> dict[str, str]:
    return {
        name: "string" if isinstance(value, str) else "list" if isinstance(value, list) else type(value).__name__
        for name, value in row.items()
    }


def shape_of(row: dict[str, Any], **options: Any) -> TextShape:
    return choose_shape(columns(row), source="data", **options)


def turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


SHAPES: list[tuple[str, dict[str, Any], str]] = [
    ("column text", {"text": "t", "id": "7"}, "t"),
    ("column text", {"text": "t", "instruction": "i", "output": "o", "content": "c"}, "t"),
    ("instruction (input) output", {"instruction": "i", "input": "n", "output": "o"}, "i\n\nn\n\no"),
    ("instruction (input) output", {"output": "o", "input": "", "instruction": "i"}, "i\n\no"),
    ("instruction (input) output", {"instruction": "i", "output": "o"}, "i\n\no"),
    (
        "instruction (input) response",
        {"instruction": "i", "context": "c", "response": "r", "category": "x"},
        "i\n\nc\n\nr",
    ),
    ("instruction (input) response", {"instruction": "i", "input": "n", "response": "r"}, "i\n\nn\n\nr"),
    ("messages", {"messages": [turn("user", "q"), turn("assistant", "a")], "id": "1"}, "q\n\na"),
    ("conversations", {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, "q\n\na"),
    ("input content (reasoning_content)", {"input": "n", "content": "c", "reasoning_content": "r"}, "n\n\nr\n\nc"),
    ("input content (reasoning_content)", {"input": "n", "content": "c"}, "n\n\nc"),
    ("input output", {"id": "1", "input": "n", "output": "o", "domain": "d"}, "n\n\no"),
    ("prompt response", {"prompt": "p", "response": "r"}, "p\n\nr"),
    ("question answer", {"question": "q", "answer": "a"}, "q\n\na"),
    ("prompt completion", {"prompt": "p", "completion": "c"}, "p\n\nc"),
    ("column content", {"content": "c", "url": "u"}, "c"),
    ("column document", {"document": "d", "summary": "s"}, "d"),
    ("column context", {"context": "c", "title": "t"}, "c"),
    ("column body", {"body": "b"}, "b"),
    ("column article", {"article": "a"}, "a"),
]


@pytest.mark.parametrize(("name", "row", "text"), SHAPES, ids=[f"{name} {' '.join(row)}" for name, row, _ in SHAPES])
def test_the_shape_follows_from_the_columns(name: str, row: dict[str, Any], text: str) -> None:
    shape = shape_of(row)
    assert shape.name == name
    assert shape.render(row) == text
    assert shape.render({**row, "unknown": 5}) == text  # columns nobody asked for make no difference


def test_an_alpaca_row_keeps_its_instruction_from_file_to_token(
    tmp_path: Path, prepare: PrepareIt, texts: Callable[[Prepared], list[str]]
) -> None:
    rows = [
        {"instruction": "Add the numbers.", "input": "1 2", "output": "3"},
        {"instruction": "Say hi.", "input": "", "output": "hi"},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for file in ("a.jsonl", "a.parquet"):
        prepared = prepare(tmp_path / file)
        assert texts(prepared) == ["Add the numbers.\n\n1 2\n\n3", "Say hi.\n\nhi"]
        assert prepared.content["sources"][0]["text"] == "instruction (input) output"


def test_an_optional_column_may_come_and_go_and_be_null() -> None:
    shape = shape_of({"instruction": "i", "input": "n", "output": "o"})
    assert shape.render({"instruction": "i", "input": None, "output": "o"}) == "i\n\no"
    assert shape.render({"instruction": "i", "output": "o"}) == "i\n\no"
    with pytest.raises(BadRecord, match="'input' is int"):
        shape.render({"instruction": "i", "input": 5, "output": "o"})


TURNS: list[tuple[Any, str]] = [
    ([turn("user", "q"), turn("assistant", None), turn("tool", "r")], "q\n\nr"),
    ([turn("user", "q"), {"role": "assistant", "tool_calls": [{}]}], "q"),
    ([turn("user", "")], ""),
    ([], ""),
    (["plain", "strings"], "plain\n\nstrings"),
    (
        [
            turn(
                "user",
                [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}}, {"type": "text", "text": "b"}],
            )
        ],
        "ab",
    ),
    ([turn("user", ["a", "b"]), turn("assistant", "c")], "ab\n\nc"),
    ([turn("user", [None, {"type": "text", "text": None}, {"type": "text", "text": "a"}])], "a"),
]


@pytest.mark.parametrize(("turns", "text"), TURNS)
def test_turns_give_the_text_of_all_that_have_some(turns: Any, text: str) -> None:
    assert TextShape(name="messages", turns=("messages", "content")).render({"messages": turns}) == text


BAD_TURNS: list[tuple[Any, str]] = [
    ([turn("user", [{"type": "text", "value": "q"}])], "no text"),
    ([turn("user", "q"), turn("assistant", [{"type": "output_text", "text": None, "content": "a"}])], "no text"),
    (None, "no text"),
    ("a string", "text is no string"),
    ({"role": "user"}, "text is no string"),
    ([turn("user", 5)], "text is no string"),
    ([turn("user", {"text": "a"})], "text is no string"),
    ([None], "no text"),
    ([5, turn("user", "a")], "text is no string"),
    ([{"from": "human", "value": "q"}], "no text"),
    ([turn("user", [{"type": "text", "text": {"value": "a"}}])], "text is no string"),
    ([turn("user", [{"type": "text", "text": 5}])], "text is no string"),
    ([turn("user", [5])], "text is no string"),
]


@pytest.mark.parametrize(("turns", "reason"), BAD_TURNS)
def test_turns_of_another_build_are_bad_records_with_a_reason_and_never_a_crash(turns: Any, reason: str) -> None:
    with pytest.raises(BadRecord) as bad:
        TextShape(name="messages", turns=("messages", "content")).render({"messages": turns})
    assert bad.value.reason == reason


BAD_TEXTS: list[tuple[dict[str, Any], str]] = [
    ({"other": "a"}, "no text"),
    ({}, "no text"),
    ({"text": None}, "null text"),
    ({"text": 5}, "text is no string"),
    ({"text": 5.5}, "text is no string"),
    ({"text": True}, "text is no string"),
    ({"text": ["a"]}, "text is no string"),
    ({"text": {"a": "b"}}, "text is no string"),
    ({"text": b"bytes"}, "text is no string"),
]


@pytest.mark.parametrize(("row", "reason"), BAD_TEXTS)
def test_only_a_string_is_text(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRecord) as bad:
        shape_of({"text": "a"}).render(row)
    assert bad.value.reason == reason


# ---- what the user names


def test_a_named_column_wins_over_every_shape() -> None:
    assert shape_of({"text": "t", "title": "x"}, text_column="title").render({"text": "t", "title": "x"}) == "x"


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{title}\n\n{body}", "T\n\nB"),
        ("{body}{body}", "BB"),
        ("# {title} {{not a column}}", "# T {not a column}"),
        ("{my.text}", "dotted"),
    ],
)
def test_a_template_takes_columns_by_name(template: str, text: str) -> None:
    row = {"title": "T", "body": "B", "my.text": "dotted"}
    shape = shape_of(row, template=template)
    assert shape.render(row) == text
    with pytest.raises(BadRecord, match="is int"):
        shape.render(dict.fromkeys(row, 5))


@pytest.mark.parametrize(
    "template",
    [
        "{}",
        "{0}",
        "{title} {}",
        "{title",
        "title}",
        "{title:d}",
        "{title:>10}",
        "{title!r}",
        "{title!z}",
        "{title:{body}}",
        "{title[0]}",
        "{title.upper}",
        "plain",
    ],
)
def test_a_template_that_could_fail_on_a_record_is_refused_at_once(template: str) -> None:
    with pytest.raises(SourceError, match="text_template"):
        shape_of({"title": "T", "body": "B"}, template=template)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"text_column": "absent"},
            "--text_column absent names 'absent', which is not there .found: title .string., n .int..",
        ),
        ({"template": "{absent} {title}"}, "names 'absent', which is not there .found: title .string., n .int.."),
        (
            {"template": "title"},
            "--text_template 'title' names no column; a column stands in braces, as in '{title}' .found: title",
        ),
        ({}, "no known shape among its columns .title .string., n .int..; set --text_column NAME or --text_template"),
    ],
)
def test_an_error_says_which_columns_there_are(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        shape_of({"title": "T", "n": 5}, **options)


@pytest.mark.parametrize(
    "row",
    [
        {"text": 5, "body": "b"},
        {"text": None, "body": "b"},
        {"messages": "no list", "body": "b"},
        {"prompt": "p", "body": "b"},
        {"instruction": "i", "output": ["o"], "body": "b"},
    ],
)
def test_a_column_of_another_type_does_not_choose_the_shape(row: dict[str, Any]) -> None:
    assert shape_of(row).name == "column body"


# ---- from the first records to the shape


def test_a_column_that_is_null_at_first_is_known_from_a_later_record(
    tmp_path: Path, prepare: PrepareIt, texts: Callable[[Prepared], list[str]]
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": null}\n{"id": 1}\n{"text": "here"}\n')
    prepared = prepare(tmp_path / "a.jsonl")
    assert texts(prepared) == ["here"]
    assert prepared.content["quarantined"] == {"no text": 1, "null text": 1}


def test_broken_first_lines_do_not_hide_the_shape(
    tmp_path: Path, prepare: PrepareIt, texts: Callable[[Prepared], list[str]]
) -> None:
    (tmp_path / "a.jsonl").write_text('\n{"text": "cut\n["list"]\n{"prompt": "p", "response": "r"}\n')
    assert texts(prepare(tmp_path / "a.jsonl")) == ["p\n\nr"]


def test_files_without_one_object_are_refused_before_they_are_read_to_their_end(
    tmp_path: Path, prepare: PrepareIt
) -> None:
    (tmp_path / "a.jsonl").write_text('["a"]\n' * 1000 + '{"text": "too late"}\n')
    with pytest.raises(SourceError, match=r"none of its first records is a JSON object \(found list\)"):
        prepare(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").write_bytes('{"text": "안녕하세요"}\n'.encode("cp949") * 20)
    with pytest.raises(SourceError, match="is it UTF-8"):
        prepare(tmp_path / "b.jsonl")


def test_one_shape_for_all_files_of_a_source_and_the_rest_is_quarantined(
    tmp_path: Path, prepare: PrepareIt, texts: Callable[[Prepared], list[str]]
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jsonl").write_text('{"text": "one"}\n')
    (tmp_path / "data" / "b.jsonl").write_text('{"instruction": "i", "output": "o"}\n')
    prepared = prepare(tmp_path / "data", max_bad_files=0.5)
    assert texts(prepared) == ["one"]
    assert prepared.content["quarantined"] == {"no text": 1}


def test_parquet_types_choose_the_shape_large_strings_and_nested_turns_too(
    tmp_path: Path, prepare: PrepareIt, texts: Callable[[Prepared], list[str]]
) -> None:
    pq.write_table(
        pa.table({"text": pa.array(["large", None], pa.large_string()), "n": [1, 2]}), tmp_path / "a.parquet"
    )
    prepared = prepare(tmp_path / "a.parquet")
    assert texts(prepared) == ["large"]
    assert prepared.content["quarantined"] == {"null text": 1}
    turns = [[turn("user", "q"), turn("assistant", "a")], [turn("user", None)], None, []]
    pq.write_table(pa.table({"messages": turns, "text": pa.array([1, 2, 3, 4])}), tmp_path / "b.parquet")
    prepared = prepare(tmp_path / "b.parquet")
    assert texts(prepared) == ["q\n\na"]
    assert prepared.content["records"] == {"read": 4, "kept": 1, "filtered": 2, "quarantined": 1}


def test_text_columns_of_bytes_are_not_guessed_to_be_text(tmp_path: Path, prepare: PrepareIt) -> None:
    pq.write_table(pa.table({"text": pa.array([b"bytes"], pa.binary())}), tmp_path / "a.parquet")
    with pytest.raises(SourceError, match="no known shape"):
        prepare(tmp_path / "a.parquet")
