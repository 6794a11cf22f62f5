"""Instruction data as a whole: every shape from every kind of file, same bytes however it is run, bad records named,
nothing lost, shards made again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chat_examples as chat
import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from chat_examples import learned, rows_of, turns

from moai.core.errors import ConfigError, SourceError, StorageError, TokenizerError, TooManyBadRecords
from moai.prepared.inspect import View
from moai.prepared.inspect import inspect as inspect_lines
from moai.prepared.manifest import Prepared
from moai.prepared.verify import verify
from moai.pretraining.repair import repair
from moai.tokenizers.backends import Reference
from moai.tokenizers.load import load_tokenizer
from moai.transforms.pack import run_lengths

ROOT = Path(__file__).parents[2]
TEMPLATE = str(ROOT / "configs" / "chat_template_demo.jinja")
DEMO = ROOT / "data" / "demo_chat.jsonl"
PrepareIt = Callable[..., Prepared]


@pytest.fixture
def prepare_chat(prepare: PrepareIt) -> PrepareIt:
    return lambda *dataset, **changes: prepare(
        *dataset, **{"data_format": "chat", "chat_template": TEMPLATE, **changes}
    )


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference(spec=load_tokenizer(str(ROOT / "tokenizers" / "demo")))


def said(prepared: Prepared, reference: Reference) -> list[tuple[str, list[str]]]:
    """(text, what is learned) of every example, in order."""
    return [
        (reference.decode(ids), learned(reference, ids, trained)) for row in rows_of(prepared) for ids, trained in row
    ]


def lines(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


ADD = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "number"}}}},
}
CALL = {"name": "add", "arguments": {"a": 1}}
AS_MESSAGES = [{"role": "system", "content": "s"}, *turns("물음 q", "대답 a")]
ASKED = "<|im_start|>user\n물음 q<|im_end|>\n<|im_start|>assistant\n대답 a<|im_end|>\n"
WITH_SYSTEM = "<|im_start|>system\ns<|im_end|>\n" + ASKED
CALLED = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call><|im_end|>'
SHAPES: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    "messages": ({"messages": AS_MESSAGES}, WITH_SYSTEM, ["대답 a<|im_end|>"]),
    "parts": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "물음 "}, {"type": "text", "text": "q"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "대답 a"}]},
            ]
        },
        ASKED,
        ["대답 a<|im_end|>"],
    ),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "물음 q"}, {"from": "gpt", "value": "대답 a"}], "system": "s"},
        WITH_SYSTEM,
        ["대답 a<|im_end|>"],
    ),
    "sharegpt with a call": (
        {
            "conversations": [
                {"from": "human", "value": "q"},
                {"from": "function_call", "value": json.dumps(CALL)},
                {"from": "observation", "value": "1"},
                {"from": "gpt", "value": "a"},
            ]
        },
        f"<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n{CALLED}\n<|im_start|>tool\n1<|im_end|>\n"
        f"<|im_start|>assistant\na<|im_end|>\n",
        [CALLED, "a<|im_end|>"],
    ),
    "alpaca": (
        {"instruction": "물음", "input": "q", "output": "대답 a"},
        ASKED.replace("물음 q", "물음\n\nq"),
        ["대답 a<|im_end|>"],
    ),
    "alpaca without input": (
        {"instruction": "물음 q", "input": "", "output": "대답 a", "system": "s"},
        WITH_SYSTEM,
        ["대답 a<|im_end|>"],
    ),
    "dolly": (
        {"instruction": "물음", "context": "q", "response": "대답 a"},
        ASKED.replace("물음 q", "물음\n\nq"),
        ["대답 a<|im_end|>"],
    ),
    "prompt and completion": ({"prompt": "물음 q", "completion": "대답 a"}, ASKED, ["대답 a<|im_end|>"]),
    "prompt and completion in messages": (
        {"prompt": [*AS_MESSAGES, *turns("more")], "completion": [{"role": "assistant", "content": "b"}]},
        WITH_SYSTEM + "<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n",
        ["b<|im_end|>"],
    ),
    "tools and reasoning": (
        {
            "messages": [
                {"role": "user", "content": "q"},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [
                        {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
                    ],
                },
                {"role": "tool", "content": "1", "tool_call_id": "1"},
                {"role": "assistant", "content": "a", "reasoning_content": "r"},
            ],
            "tools": [ADD],
        },
        f"<|im_start|>system\nTools: {json.dumps([ADD])}<|im_end|>\n<|im_start|>user\nq<|im_end|>\n"
        f"<|im_start|>assistant\n{CALLED}\n<|im_start|>tool\n1<|im_end|>\n<|im_start|>assistant\n<think>\nr\n"
        f"</think>\na<|im_end|>\n",
        [CALLED, "<think>\nr\n</think>\na<|im_end|>"],
    ),
}


def array(path: Path, records: list[Any]) -> Path:
    path.write_text(json.dumps(records))
    return path


def compressed(path: Path, records: list[Any]) -> Path:
    path.write_bytes(zstandard.compress("".join(json.dumps(record) + "\n" for record in records).encode()))
    return path


def parquet(path: Path, records: list[Any]) -> Path:
    pq.write_table(pa.Table.from_pylist(records), path)
    return path


def saved(path: Path, records: list[Any]) -> Path:
    datasets.Dataset.from_list(records).save_to_disk(str(path))
    return path


def hub_layout(path: Path, records: list[Any]) -> Path:
    (path / "data").mkdir(parents=True)
    parquet(path / "data" / "train-00000-of-00001.parquet", records)
    return path


FILES = {
    "a.jsonl": lines,
    "a.json": array,
    "a.jsonl.zst": compressed,
    "a.parquet": parquet,
    "saved": saved,
    "hub": hub_layout,
}


SAMPLED = [
    (name, shape)
    for name in FILES
    for shape in SHAPES
    if name in ("a.jsonl", "a.parquet") or shape == "tools and reasoning"
]
REST = [
    pytest.param(name, shape, marks=pytest.mark.long)
    for name in FILES
    for shape in SHAPES
    if (name, shape) not in SAMPLED
]


@pytest.mark.parametrize(("name", "shape"), [*SAMPLED, *REST])
def test_every_shape_from_every_file(
    tmp_path: Path, prepare_chat: PrepareIt, reference: Reference, shape: str, name: str
) -> None:
    record, text, answers = SHAPES[shape]
    prepared = prepare_chat(FILES[name](tmp_path / name, [record, record]), max_bad_ratio=0)
    assert said(prepared, reference) == [(text, answers)] * 2
    assert (prepared.content["records"]["kept"], prepared.content["chat"]["counts"]["turns"]) == (2, 2 * len(answers))


def test_a_column_of_turns_may_have_any_name(tmp_path: Path, prepare_chat: PrepareIt, reference: Reference) -> None:
    data = lines(tmp_path / "a.jsonl", [{"dialog": turns("물음 q", "대답 a"), "system": "s"}])
    with pytest.raises(SourceError, match=r"dialog \(list\).*--text_column NAME"):
        prepare_chat(data)
    assert said(prepare_chat(data, text_column="dialog"), reference)[0][0] == WITH_SYSTEM
    (tmp_path / "a.txt").write_text("no conversation")
    with pytest.raises(SourceError, match="plain text"):
        prepare_chat(tmp_path / "a.txt")


BAD: list[tuple[str, Any, str]] = [
    ("broken", None, "broken JSON"),
    ("an array", [], "not an object"),
    ("no messages", {"other": 1}, "no turn"),
    ("null messages", {"messages": None}, "no turn"),
    ("messages are a string", {"messages": "hi"}, "turns are no list"),
    ("empty", {"messages": []}, "no turn"),
    ("turn is a string", {"messages": ["hi"]}, "turn is no object"),
    ("no role", {"messages": [{"content": "hi"}]}, "unknown role"),
    ("odd role", {"messages": [{"role": "narrator", "content": "hi"}]}, "unknown role"),
    ("role is a number", {"messages": [{"role": 1, "content": "hi"}]}, "unknown role"),
    ("no content", {"messages": [{"role": "user"}, *turns("q", "a")]}, "no content"),
    ("null content", {"messages": [{"role": "user", "content": None}]}, "no content"),
    ("content is a number", {"messages": [{"role": "user", "content": 5}]}, "content is no text"),
    (
        "an image",
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
                *turns("q", "a")[1:],
            ]
        },
        "content is no text",
    ),
    ("tools are a word", {"messages": turns("q", "a"), "tools": "hammer"}, "tools are no list"),
    (
        "calls are an object",
        {"messages": [*turns("q"), {"role": "assistant", "tool_calls": {"name": "x"}}]},
        "tool calls are no list",
    ),
    (
        "call is no JSON",
        {"messages": [*turns("q"), {"from": "function_call", "value": "add(1)"}]},
        "tool call is no JSON",
    ),
    ("half a character", {"messages": turns("q", "a"), "tools": '[{"name": "\\ud83d"}]'}, "lone surrogate"),
    ("too large", {"messages": turns("q" * 5000, "a")}, "too large"),
    ("too large in UTF-8", {"messages": turns("q" * 3900 + "\u00e4" * 90, "a")}, "too large"),
    ("template refuses", {"messages": turns("refuse me", "a")}, "template refused"),
]


def test_every_bad_record_is_set_aside_with_its_place_and_reason(
    tmp_path: Path, prepare_chat: PrepareIt, reference: Reference
) -> None:
    template = tmp_path / "t.jinja"
    template.write_text(
        "{% for m in messages %}{% if m.content == 'refuse me' %}{{ raise_exception('as asked') }}{% endif %}{% endfor "
        "%}" + Path(TEMPLATE).read_text()
    )
    good = json.dumps({"messages": turns("q", "a")})
    written = [line for _, bad, _ in BAD for line in (good, "{broken" if bad is None else json.dumps(bad))]
    (tmp_path / "a.jsonl").write_text("\n".join(written) + "\n")
    prepared = prepare_chat(tmp_path / "a.jsonl", chat_template=str(template), max_bad_ratio=1, max_doc_bytes=4000)
    found = [json.loads(line) for line in (prepared.path / "quarantine.jsonl").read_text().splitlines()]
    assert [(entry["line"], entry["reason"]) for entry in found] == [
        (2 * index + 2, reason) for index, (_, _, reason) in enumerate(BAD)
    ]
    assert "as asked" in found[-1]["detail"]
    assert prepared.content["records"] == {
        "read": 2 * len(BAD),
        "kept": len(BAD),
        "filtered": 0,
        "quarantined": len(BAD),
    }
    with pytest.raises(TooManyBadRecords):
        prepare_chat(
            tmp_path / "a.jsonl", chat_template=str(template), max_doc_bytes=4000, cache_dir=str(tmp_path / "other")
        )


def fingerprint(prepared: Prepared) -> str:
    digest = hashlib.sha256(json.dumps(prepared.content, sort_keys=True).encode())
    for path in sorted(prepared.path.glob("data-*.arrow")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations enough for several shards, no two alike."""
    generator = np.random.default_rng(5)
    shipped = [json.loads(line) for line in DEMO.read_text().splitlines()]
    records = []
    for number in range(600):
        record = shipped[generator.integers(len(shipped))]
        records.append(
            {
                **record,
                "messages": [
                    *turns(f"number {number}", str(number * 7)),
                    *(m for m in record["messages"] if m["role"] != "system"),
                ],
            }
        )
    return lines(tmp_path_factory.mktemp("many") / "many.jsonl", records)


def test_same_bytes_for_any_number_of_workers_and_any_batch(
    many: Path, prepare_chat: PrepareIt, tmp_path: Path
) -> None:
    made = [
        prepare_chat(
            many,
            num_proc=workers,
            dataset_batch_size=batch,
            writer_batch_size=writer,
            seq_len=256,
            packing="bfd",
            shard_bytes=30_000,
            cache_dir=str(tmp_path / f"{backend}{workers}"),
            tokenizer_backend=backend,
        )
        for backend, workers, batch, writer in (
            ("tokenizers", 0, 1000, 10_000),
            ("auto", 0, 50, 10_000),
            ("auto", 1, 7, 1),
            ("auto", 2, 64, 100),
            ("auto", 5, 300, 10_000),
        )
    ]
    used = [[name.split()[0] for name in prepared.manifest["run"]["tokenizer_backends"]] for prepared in made]
    assert used == [["tokenizers"], *[["fastokens"]] * 4]
    assert len(made[0].content["shards"]) > 4
    assert len({fingerprint(prepared) for prepared in made}) == 1


def test_examples_share_rows_whole_and_none_is_lost(many: Path, prepare_chat: PrepareIt, reference: Reference) -> None:
    single, packed = prepare_chat(many, seq_len=256), prepare_chat(many, seq_len=256, packing="bfd")
    alone = [example for row in rows_of(single) for example in row]
    together = [example for row in rows_of(packed) for example in row]
    assert sorted(alone) == sorted(together)
    assert len(alone) == single.content["rows"] == 600
    assert packed.content["rows"] < 300
    assert all(len(ids) == len(trained) and not trained[0] for ids, trained in alone)
    counts = packed.content["token_counts"]
    assert counts["trained"] == sum(sum(trained) for _, trained in alone)
    assert counts["text"] == counts["rows"] == sum(len(ids) for ids, _ in alone)
    for prepared in (single, packed):
        assert all(check.ok for check in verify(prepared.path))


def test_examples_that_are_too_long_or_teach_nothing_are_counted(
    tmp_path: Path, prepare_chat: PrepareIt, reference: Reference
) -> None:
    records = [
        turns("q", "a"),
        turns("q", "word " * 60),
        turns("word " * 60, "a"),
        turns("nobody answers"),
        turns("q", "short", "q2", "word " * 60),
    ]
    data = lines(tmp_path / "a.jsonl", [{"messages": messages} for messages in records])
    dropped = prepare_chat(data, seq_len=40, packing="bfd")
    assert dropped.content["records"] == {"read": 5, "kept": 1, "filtered": 4, "quarantined": 0}
    assert dropped.content["filtered"] == {"chat.too_long": 3, "chat.untrained": 1}
    assert dropped.content["chat"]["counts"] == {"examples": 1, "too_long": 3, "turns": 5}
    cut = prepare_chat(data, seq_len=40, packing="bfd", long_examples="truncate")
    assert cut.content["filtered"] == {"chat.too_long": 1, "chat.untrained": 1}, (
        "of the third record only the question would be left"
    )
    kept = [example for row in rows_of(cut) for example in row]
    assert sorted(len(ids) for ids, _ in kept)[1:] == [40, 40]
    for prepared in (dropped, cut):
        counts = prepared.content["token_counts"]
        assert counts["text"] == counts["rows"] + counts["dropped"]
        assert all(check.ok for check in verify(prepared.path))
    assert cut.content["token_counts"]["rows"] > dropped.content["token_counts"]["rows"]


def test_conversations_are_held_out_by_their_text(many: Path, prepare_chat: PrepareIt, reference: Reference) -> None:
    def texts(**changes: Any) -> set[str]:
        return {text for text, _ in said(prepare_chat(many, seq_len=512, **changes), reference)}

    everything, rest, held_out = texts(), texts(eval_ratio=0.2), texts(eval_ratio=0.2, held_out=True)
    assert rest | held_out == everything
    assert not rest & held_out
    assert 60 < len(held_out) < 180


def test_nothing_to_learn_at_all_is_an_error_with_the_reasons(tmp_path: Path, prepare_chat: PrepareIt) -> None:
    with pytest.raises(
        SourceError,
        match=r"2 chat\.untrained; nothing to train on; only what the assistant says is learned: give the "
        r"conversations answers",
    ):
        prepare_chat(lines(tmp_path / "a.jsonl", [{"messages": turns("q")}] * 2))
    with pytest.raises(
        SourceError,
        match=r"2 chat\.too_long; nothing to train on; raise --seq_len, or cut them by --long_examples truncate",
    ):
        prepare_chat(lines(tmp_path / "b.jsonl", [{"messages": turns("q", "word " * 60)}] * 2), seq_len=40)


def test_damaged_shards_are_made_again_without_the_template_file(
    many: Path, prepare_chat: PrepareIt, tmp_path: Path
) -> None:
    template = tmp_path / "t.jinja"
    template.write_text(Path(TEMPLATE).read_text())
    prepared = prepare_chat(many, seq_len=256, packing="bfd", shard_bytes=30_000, chat_template=str(template))
    template.unlink()
    before = {path.name: path.read_bytes() for path in prepared.path.iterdir()}
    for name in ("data-00001", "state.json", "dataset_info.json"):
        (victim,) = prepared.path.glob(f"{name}*")
        data = bytearray(victim.read_bytes())
        data[len(data) // 2] ^= 1
        with open(victim, "r+b") as file:
            file.write(data)
    assert not all(check.ok for check in verify(prepared.path))
    list(repair(prepared.path))
    assert {path.name: path.read_bytes() for path in prepared.path.iterdir()} == before
    assert all(check.ok for check in verify(prepared.path))


def test_runs_that_do_not_fit_their_rows_are_found(tmp_path: Path, prepare_chat: PrepareIt) -> None:
    from moai.engine.schema import TRAINED
    from moai.prepared.verify import _Totals, _trained_of

    def bad_rows(*runs: list[int]) -> int:
        totals = _Totals()
        column = pa.array(list(runs), TRAINED.stored_type)
        _trained_of(column, np.array([5] * len(runs)), totals)
        return totals.bad_rows

    assert bad_rows([2, 3], [5], [1, 1, 3]) == 0
    assert bad_rows([2, 2], [5]) == 1
    assert bad_rows([2, 3], []) == 1
    assert bad_rows([0, 5]) == 1


def test_run_lengths_by_hand() -> None:
    trained = np.array([0, 1, 1, 0, 0, 0, 1, 0, 0, 0], np.uint8)
    offsets, runs = run_lengths(trained, np.array([0, 4, 7, 10]))
    assert (offsets.tolist(), runs.tolist()) == ([0, 3, 5, 6], [1, 2, 1, 2, 1, 3])


def test_the_template_is_part_of_the_key_and_its_place_is_not(prepare_chat: PrepareIt, tmp_path: Path) -> None:
    data = lines(tmp_path / "a.jsonl", [{"messages": turns("q", "a")}])
    copy, other = tmp_path / "copy.jinja", tmp_path / "other.jinja"
    copy.write_text(Path(TEMPLATE).read_text())
    other.write_text(Path(TEMPLATE).read_text().replace("Tools: ", "Functions: "))
    first = prepare_chat(data)
    assert prepare_chat(data, chat_template=str(copy)).path == first.path
    assert prepare_chat(data, chat_template=str(other)).path != first.path
    assert prepare_chat(data, train_on="last").path != first.path


@pytest.mark.parametrize(
    ("changes", "said_"),
    [
        ({"packing": "wrapped"}, "choose bfd"),
        ({"packing": "bfd_split"}, "choose bfd"),
        ({"add_bos": True}, "add_bos"),
        ({"text_template": "{a}"}, "text_template"),
        ({"template_date": "tomorrow"}, "2025-01-31"),
        ({"data_format": "text"}, "--data_format chat"),
    ],
)
def test_what_conversations_do_not_take_is_refused(
    prepare_chat: PrepareIt, changes: dict[str, Any], said_: str
) -> None:
    with pytest.raises(ConfigError, match=said_):
        prepare_chat(DEMO, **changes)


def test_a_template_without_a_way_is_refused_before_any_work(prepare_chat: PrepareIt, tmp_path: Path) -> None:
    plain = shutil.copytree(ROOT / "tokenizers" / "demo", tmp_path / "plain")
    (plain / "chat_template.jinja").unlink()
    with pytest.raises(TokenizerError, match="--chat_template FILE"):
        prepare_chat(DEMO, chat_template=None, tokenizer_path=str(plain))
    forced = tmp_path / "forced.jinja"
    forced.write_text(chat.FORCED_THINKING)
    with pytest.raises(TokenizerError, match="generation"):
        prepare_chat(DEMO, chat_template=str(forced))


def test_the_page_shows_every_token_once_and_what_is_learned(
    prepare_chat: PrepareIt, prepare: PrepareIt, reference: Reference, tmp_path: Path
) -> None:
    prepared = prepare_chat(DEMO, seq_len=512, packing="bfd")
    rows = [row.documents for row in View.open(prepared.path).rows(1000)]
    for row, examples in zip(rows, rows_of(prepared), strict=True):
        for document, (ids, trained) in zip(row, examples, strict=True):
            assert [token for piece in document.pieces for token in piece.ids] == ids
            assert [int(learn) for piece in document.pieces for learn in piece.learned] == trained
            assert "".join(piece.text for piece in document.pieces) == reference.decode(ids)
            assert not any("\ufffd" in piece.text for piece in document.pieces)
    (path,) = inspect_lines(prepared.path, rows=3, html=tmp_path / "page.html")
    page = Path(path).read_text()
    assert page.count("class=document") == sum(map(len, rows[:3]))
    assert "src=" not in page
    assert "«대한민국의 수도는 서울입니다.<|im_end|>»" in "\n".join(inspect_lines(prepared.path, rows=1, html=None))
    text = lines(tmp_path / "t.jsonl", [{"text": "두 <문서> & 글"}])
    (document,) = next(View.open(prepare(text).path).rows(1)).documents
    assert [learn for piece in document.pieces for learn in piece.learned] == [
        False,
        *[True] * (sum(len(piece.ids) for piece in document.pieces) - 1),
    ]
    (path,) = inspect_lines(prepare(text).path, rows=3, html=tmp_path / "text.html")
    with pytest.raises(StorageError, match=r"there is no directory .*; make it"):
        list(inspect_lines(prepared.path, rows=1, html=tmp_path / "absent" / "page.html"))
    assert "&lt;" in Path(path).read_text()
