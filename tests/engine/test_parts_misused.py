"""What a user's part may do wrong, and columns whose names are moai's own: one clear line, before anything is
published.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moai.core.errors import ConfigError, MoaiError, PartFailed
from moai.engine.part import Filter, Map, Signal, source_digest
from moai.engine.schema import Column
from moai.prepared.manifest import Prepared

TEXTS = [f"document number {number}" for number in range(20)]
CHAT_TEMPLATE = Path(__file__).parents[2] / "configs" / "chat_template_demo.jinja"
PrepareIt = Callable[..., Prepared]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text, "id": number}) + "\n" for number, text in enumerate(TEXTS)))
    return path


@dataclass(frozen=True)
class Keeps(Filter):
    """Gives what `how` makes of a mask that drops documents 3 and 5."""

    how: str

    def keep(self, batch: pa.RecordBatch) -> Any:
        mask = [not text.endswith((" 3", " 5")) for text in batch["text"].to_pylist()]
        gone = mask.count(False)
        return {
            "list": mask,
            "tuple": tuple(mask),
            "numpy": np.array(mask),
            "chunked": pa.chunked_array([mask[:1], mask[1:]]),
            "arrow reasons": (pa.array(mask), pa.array(["odd"] * gone)),
            "null": pa.array([None, *mask[1:]]),
            "one": True,
            "none": None,
            "one reason": (mask, "odd"),
            "generator": (kept for kept in mask),
        }[self.how]


@pytest.mark.parametrize("how", ["list", "tuple", "numpy", "chunked", "arrow reasons"])
def test_a_mask_may_be_any_sequence_of_bools(prepare: PrepareIt, texts: Any, corpus: Path, how: str) -> None:
    prepared = prepare(corpus, transforms=(Keeps(how),), dataset_batch_size=2)
    assert texts(prepared) == [text for text in TEXTS if not text.endswith((" 3", " 5"))]
    assert prepared.content["filtered"] == {"keeps.odd" if how == "arrow reasons" else "keeps": 2}


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("null", "values of type object, not a bool for each of 20"),
        ("one", "values of type bool"),
        ("none", "values of type object"),
        ("one reason", "gave str for reasons, not one for each of the 2 of 20"),
        ("generator", "values of type object"),
    ],
)
def test_another_mask_is_one_line_that_names_the_filter(prepare: PrepareIt, corpus: Path, how: str, said: str) -> None:
    with pytest.raises(
        PartFailed, match=r"filter Keeps \(test_parts_misused.py\) gave .*" + said.removeprefix("gave ")
    ):
        prepare(corpus, transforms=(Keeps(how),))


@dataclass(frozen=True)
class Measures(Signal):
    how: str
    adds = (Column("score", "float32", per="piece"),)

    def measure(self, batch: pa.RecordBatch) -> Any:
        rows = batch.num_rows
        return {
            "chunked": {"score": pa.chunked_array([[0.5], [1.0] * (rows - 1)])},
            "short": {"score": [0.5]},
            "one string": {"score": "x" * rows},
            "a number": {"score": 0.5},
            "huge": {"score": [10**400] * rows},
            "objects": {"score": [object()] * rows},
            "nothing": None,
            "another": {"scores": [0.5] * rows},
        }[self.how]


def test_a_signal_may_give_chunks(prepare: PrepareIt, corpus: Path) -> None:
    prepared = prepare(corpus, transforms=(Measures("chunked"),))
    assert [column["name"] for column in prepared.content["columns"]][2:] == ["score"]


@pytest.mark.parametrize("how", ["short", "one string", "a number", "huge", "objects", "nothing", "another"])
def test_a_signal_that_gives_something_else_is_one_line(
    prepare: PrepareIt, corpus: Path, tmp_path: Path, how: str
) -> None:
    with pytest.raises(PartFailed, match=r"signal Measures \(test_parts_misused.py\).* '?(score|1 values)"):
        prepare(corpus, transforms=(Measures(how),))
    assert not list((tmp_path / "cache" / "shards").iterdir())


@dataclass(frozen=True)
class Changes(Map):
    how: str
    needs = ("text",)

    def apply(self, batch: pa.RecordBatch) -> Any:
        texts = batch["text"].to_pylist()
        return {
            "numbers": lambda: pa.record_batch({"text": pa.array([object() and [1]] * len(texts))}),
            "null": lambda: pa.record_batch({"text": pa.array([None] * len(texts), pa.string())}),
            "fewer": lambda: batch.slice(1),
            "list": lambda: texts,
            "upper": lambda: pa.record_batch({"text": [text.upper() for text in texts]}),
            "same": lambda: batch,
        }[self.how]()


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("numbers", "'text' is no large_string"),
        ("null", "gave null for the text of 20 documents"),
        ("fewer", "gave 19 rows"),
        ("list", "gave list"),
    ],
)
def test_a_map_that_gives_something_else_is_one_line(prepare: PrepareIt, corpus: Path, how: str, said: str) -> None:
    with pytest.raises(PartFailed, match=r"map Changes \(test_parts_misused.py\):? " + said):
        prepare(corpus, transforms=(Changes(how),))


def test_a_map_cannot_seem_to_change_conversations(prepare: PrepareIt, tmp_path: Path) -> None:
    chats = tmp_path / "chat.jsonl"
    turns = [[{"role": "user", "content": text}, {"role": "assistant", "content": "ok"}] for text in TEXTS]
    chats.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns))
    how: dict[str, Any] = {"data_format": "chat", "chat_template": str(CHAT_TEMPLATE)}
    assert prepare(chats, **how, transforms=(Changes("same"),)).content["documents"] == 20
    with pytest.raises(PartFailed, match="changes 'text' of conversations, which would change nothing that is learned"):
        prepare(chats, **how, transforms=(Changes("upper"),))


@dataclass(frozen=True)
class Needs(Filter):
    needs: Any = ()

    def keep(self, batch: pa.RecordBatch) -> Any:
        return [value != 3 for value in batch[self.needs[0]].to_pylist()]


@dataclass(frozen=True)
class Adds(Signal):
    adds: Any = ()

    def measure(self, batch: pa.RecordBatch) -> Any:
        return {column.name: [1] * batch.num_rows for column in self.adds}


@dataclass(frozen=True)
class FilterThatAdds(Needs):
    adds = (Column("x", "int64"),)


def column(name: str) -> Column:
    return Column(name, "int64", per="piece")


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ((Needs("text"),), r"filter Needs .*: needs is a string; write a tuple, needs = \('text',\)"),
        (
            (Needs(("score",)), Adds((column("score"),))),
            r"filter Needs .* needs the column 'score', which signal Adds .* adds only later",
        ),
        ((Needs(("tokens",)),), "needs the column 'tokens', a name that moai uses itself; parts see text and"),
        ((Needs(("messages",)),), "needs the column 'messages', a name that moai uses itself"),
        ((Needs(("document",)),), "needs the column 'document', a name that moai uses itself"),
        ((FilterThatAdds(("id",)),), "adds the column 'x', but a filter only keeps or drops"),
        ((Adds(column("x")),), "adds is no tuple of columns"),
        ((Adds(("x",)),), "adds is no tuple of columns"),
        ((Adds((column("offset"),)),), "adds the column 'offset', which every documents file has already"),
        ((Adds((column("labels"),)),), "adds the column 'labels', which is there already"),
        ((Adds((column("x"),)), Adds((column("x"),))), "adds the column 'x', which is there already"),
    ],
)
def test_columns_that_do_not_fit_are_refused_before_anything_is_read(
    prepare: PrepareIt, corpus: Path, parts: Any, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        prepare(corpus, transforms=parts)


OWN = ("text", "document", "tokens", "segment", "line", "offset", "record", "problem", "input_ids", "labels", "bytes")


@pytest.mark.parametrize(
    ("name", "kind"), [*((name, "jsonl") for name in OWN), ("segment", "parquet"), ("bytes", "parquet")]
)
def test_a_column_that_is_called_as_moais_own_has_its_values_or_is_refused(
    prepare: PrepareIt, tmp_path: Path, name: str, kind: str
) -> None:
    import datasets

    rows = [{"body": f"body {number}", name: number} for number in range(5)]
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    assert prepare(path, text_column="body").content["documents"] == 5
    if name not in (("bytes",) if kind == "parquet" else ("bytes", "problem", "segment", "line", "offset", "record")):
        with pytest.raises(MoaiError, match=f"{name!r}.* (moai uses|has a name that places of records have)"):
            prepare(path, text_column="body", carry_columns=(name,))
        with pytest.raises(MoaiError, match=f"{name!r}"):
            prepare(
                path,
                text_column="body",
                transforms=(Adds((column(name),)) if name in ("text", "labels") else Needs((name,)),),
            )
        return
    prepared = prepare(path, text_column="body", carry_columns=(name,))
    assert datasets.load_from_disk(str(prepared.path))[name] == [[number] for number in range(5)]
    assert prepare(path, text_column="body", transforms=(Needs((name,)),)).content["filtered"] == {"needs": 1}


@dataclass(frozen=True)
class Holds(Filter):
    value: Any = None
    needs = ("text",)

    def keep(self, batch: pa.RecordBatch) -> Any:
        return [True] * batch.num_rows


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "\ud800", len, {1}, object()])
def test_a_field_without_a_lasting_spelling_is_refused(prepare: PrepareIt, corpus: Path, value: Any) -> None:
    with pytest.raises(ConfigError, match=r"filter Holds .*, field value: .* has no lasting spelling"):
        prepare(corpus, transforms=(Holds(value),))


def test_a_class_in_place_of_an_object_is_refused(prepare: PrepareIt, corpus: Path) -> None:
    with pytest.raises(ConfigError, match=r"filter Holds .* is a class: give an object of it"):
        prepare(corpus, transforms=(Holds,))


@pytest.mark.parametrize("of_source", [False, True])
def test_what_workers_cannot_import_is_refused(prepare: PrepareIt, corpus: Path, of_source: bool) -> None:
    @dataclass(frozen=True)
    class Local(Holds):
        pass

    given: tuple[Any, ...] = ({"path": str(corpus), "transforms": [Local()]},) if of_source else (corpus,)
    transforms = () if of_source else (Local(),)
    assert prepare(*given, transforms=transforms).content["documents"] == len(TEXTS)
    with pytest.raises(ConfigError, match=r"filter .*Local .* cannot be sent to worker processes .* num_proc=0"):
        prepare(*given, transforms=transforms, num_proc=2)


def test_bases_of_one_name_in_two_files_are_both_in_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "lower_parts.py").write_text("from moai.engine.part import Filter\nclass Same(Filter):\n    pass\n")
    (tmp_path / "upper_parts.py").write_text("import lower_parts\nclass Same(lower_parts.Same):\n    pass\n")

    def digest() -> str:
        source_digest.cache_clear()
        for name in ("lower_parts", "upper_parts"):
            sys.modules.pop(name, None)
        return source_digest(importlib.import_module("upper_parts").Same)

    first = digest()
    for name in ("lower_parts", "upper_parts"):
        with open(tmp_path / f"{name}.py", "a") as file:
            file.write("# changed\n")
        importlib.invalidate_caches()
        assert digest() != first
        first = digest()
