"""Evaluation items in documents: whole, in part, in other words, and short ones with their question."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_shapes import demo_documents

from moai.core.errors import ConfigError
from moai.quality import ngrams
from moai.quality.contamination import Contamination, read_items

LONG = "One two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen."
ITEMS = [
    {"question": LONG, "answer": "Seventeen"},
    {"question": "What is the capital of France?", "answer": "Paris"},
    {"question": "대한민국의 수도는 어디인가?", "choices": ["부산", "서울", "대전"], "answer": 1},
    {"text": "ten words that stand alone here without any answer behind"},
]


@pytest.fixture
def items(tmp_path: Path) -> Path:
    path = tmp_path / "items.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    return path


def shares(items: Path, *texts: str) -> list[tuple[float, list[int]]]:
    made = Contamination(files=(items,)).measure(pa.record_batch({"text": pa.array(texts, pa.large_string())}))
    return [
        (round(float(share), 3), found)
        for share, found in zip(made["contaminated_share"], made["contaminated_items"].to_pylist(), strict=True)
    ]


def test_the_share_of_an_item_is_of_its_13_grams(items: Path) -> None:
    words = LONG.lower().split()  # 16, and the answer: 5 n-grams
    assert shares(
        items,
        f"before {LONG} Seventeen! behind",
        "TWO three, four - five six seven eight nine\nten eleven twelve thirteen fourteen",
        " ".join(words[:12]),
        f"{LONG} and something else",
        "",
    ) == [(1.0, [0]), (0.2, [0]), (0.0, []), (0.8, [0]), (0.0, [])]


def test_a_short_item_counts_only_whole_with_its_question(items: Path) -> None:
    assert shares(
        items,
        "Question: What is the capital of France? Answer: Paris.",
        "What is the capital of France? I do not know, but I like Paris and London.",
        "What is the capital of France? I do not know it now, but I have heard of Paris.",
        "Paris is the capital of France.",
        "What is the capital of France? Nobody said it. So: what is the capital of France? Paris!",
        "대한민국의 수도는 어디인가? 정답: 서울",
        "대한민국의 수도는 어디인가? 정답: 부산",
        "Ten words that stand alone here, without any answer behind.",
    ) == [(1.0, [1]), (1.0, [1]), (0.0, []), (0.0, []), (1.0, [1]), (1.0, [2]), (0.0, []), (1.0, [3])]


def test_the_place_is_shown_and_all_items_of_a_document_are_named(items: Path) -> None:
    text = "x " * 1000 + "What is the capital of France? Paris. " + "y " * 1000 + LONG
    made = Contamination(files=(items,)).measure(pa.record_batch({"text": pa.array([text, "none"], pa.string())}))
    assert made["contaminated_items"].to_pylist() == [[1, 0], []]
    shown = made["contaminated_excerpt"].to_pylist()
    assert "France? Paris." in shown[0]
    assert len(shown[0]) == 600
    assert shown[1] is None


def test_what_many_items_share_or_is_too_short_is_not_looked_for_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, common = tmp_path / "items.jsonl", "a b c d e f g h i j k l m n"
    lines = [{"text": f"{common} {number}"} for number in range(11)] + [{"text": "too short"}, {"text": LONG}] * 2
    path.write_text("\n".join(json.dumps(line) for line in lines))
    assert shares(path, common, f"{common} 3", "too short", LONG) == [
        (0.0, []),
        (1.0, [3]),
        (0.0, []),
        (1.0, [12]),
    ]
    assert "3 of 15 evaluation items are not looked for" in caplog.text


def test_the_files_are_in_the_key_by_their_content_and_a_worker_makes_its_own_index(
    items: Path, tmp_path: Path
) -> None:
    signal, copy = Contamination(files=(items,)), tmp_path / "copy.jsonl"
    copy.write_bytes(items.read_bytes())
    assert signal.index.totals.tolist() == [5, 1, 1, 1]
    assert len(pickle.dumps(signal)) < 1000
    assert Contamination(files=(copy,)).identity() == signal.identity()
    copy.write_text(json.dumps(ITEMS[0]))
    assert Contamination(files=(copy,)).identity() != signal.identity()


def test_items_are_read_under_the_names_that_benchmarks_use(tmp_path: Path) -> None:
    records: list[Any] = [
        {"ctx": "c", "endings": ["e"], "label": 0},
        {"question": "q", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answer": "B"},
        {"context": "long", "question": "q", "answers": {"text": ["first", "second"], "answer_start": [3]}},
        {"prompt": "p", "completion": "c"},
        {"problem": "p", "answer": 42},
    ]
    path = tmp_path / "items.jsonl"
    path.write_text("\n".join(map(json.dumps, records)) + "\n\n")
    found = [(item.question, item.answer) for item in read_items([path])]
    assert found == [("c", ""), ("q", "y"), ("q", "first"), ("p", "c"), ("p", "42")]
    assert read_items([path])[4].place == f"{path}:5"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"title": "x"}', r"items.jsonl:1: has no text under any of question, .*found: title"),
        ('{"text": "x"}\n{', r"items.jsonl:2: is no JSON"),
        ("[1]", r"items.jsonl:1: has no text .*found: list"),
        (None, r"items.jsonl: No such file"),
    ],
)
def test_a_file_that_holds_no_items_is_named_with_its_line(tmp_path: Path, content: str | None, said: str) -> None:
    path = tmp_path / "items.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=said):
        read_items([path])


PIECES = ("a", "B", "b", "가", "İ", "_", "1", "é", "É", " ", "\n", ".", "-", "a b a b ")


@given(st.lists(st.lists(st.sampled_from(PIECES), max_size=40).map("".join), min_size=1, max_size=5))
def test_compiled_occurrences_are_the_plain_ones(texts: list[str]) -> None:
    compiled = pytest.importorskip("moai.quality.ngrams_scan", reason="numba is not installed")
    column, found = pa.array(["before", *texts], pa.large_string())[1:], []
    for module in (ngrams, compiled):
        keys = {n: module.keys_of(texts[0], n) for n in (1, 3)}
        sorted_keys = np.unique(np.concatenate(list(keys.values())))
        hits = module.occurrences(column, (1, 3), sorted_keys)
        # Keys are others in each; which of the first text's n-grams stands where is not.
        order = {key: at for at, key in reversed([*enumerate([*keys[1].tolist(), *keys[3].tolist()])])}
        found.append([(*hit[:2], order[int(sorted_keys[hit[2]])]) for hit in hits.tolist()])
    assert found[0] == found[1]


def test_compiled_occurrences_in_real_documents_are_the_plain_ones() -> None:
    compiled = pytest.importorskip("moai.quality.ngrams_scan", reason="numba is not installed")
    texts = demo_documents()[::20]
    column, places = pa.array(texts, pa.string()), []
    for module in (ngrams, compiled):
        keys = np.unique(np.concatenate([module.keys_of(text, 13) for text in texts[:40]]))
        places.append(module.occurrences(column, (13,), keys)[:, :2].tolist())
    assert places[0] == places[1]
    assert len(places[0]) > 1024 + sum(map(len, texts)) // 32  # more than the room that is made at first
