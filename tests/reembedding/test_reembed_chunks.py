"""Chunks cover their document, fit the model, point into the source: for any text, and for each way the old program
lost some.
"""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_law import Pieces, sentence

from moai.reembedding.chunk import HYBRID, STRATEGIES, Chunk, looked_at_in, sizes
from moai.reembedding.documents import SCHEMA as DOCUMENTS

TYPES = ("statute_article", "case_paragraph", "decision_paragraph", "interpretation_paragraph")
words = st.sampled_from(
    [
        "대한민국은",
        "제3조(정의)",
        "① 국민은",
        "1. 법률",
        "가. 목적",
        "제 12 조의2",
        "a",
        "law",
        ".",
        "다. ",
        "\n",
        "\n\n",
        " \n \t\n",
        "  ",
        "\u3000",
        "🏛️",
        "한" * 900,
        " " * 700,
        "e\u0301",
    ]
)
texts = st.lists(st.one_of(words, st.text(max_size=40)), min_size=1, max_size=60).map(" ".join)


def chunks(
    *paragraphs: str,
    source_type: str = "case_paragraph",
    strategy: str = "standard",
    max_tokens: int = 128,
    query_type: str | None = None,
    size: int = 1000,
    context: str = "",
) -> list[dict[str, Any]]:
    batch = pa.record_batch(
        [
            pa.array([value], field.type)
            for value, field in zip(
                (source_type, 7, context, list(paragraphs), "abcdef0123456789", None, 99), DOCUMENTS
            )
        ],
        schema=DOCUMENTS,
    )
    chunk = Chunk(strategy=strategy, tokens=Pieces(max_tokens), embedding_batch_size=size, query_type=query_type)
    return [row for out in chunk(iter([batch])) for row in out.to_pylist()]


def covered(text: str, found: list[dict[str, Any]]) -> bool:
    """Every character but blanks."""
    reached = 0
    for row in sorted(found, key=lambda row: (row["start_char"], row["end_char"])):
        if text[reached : row["start_char"]].strip():
            return False
        reached = max(reached, row["end_char"])
    return not text[reached:].strip()


def check(
    paragraphs: tuple[str, ...], found: list[dict[str, Any]], source_type: str, strategy: str, max_tokens: int
) -> None:
    text = "\n".join(paragraphs)
    assert [row["chunk_index"] for row in found] == list(range(len(found)))
    most = max(size.most for size in sizes(strategy, source_type, None))
    for row in found:
        part = text[row["start_char"] : row["end_char"]]
        assert part
        assert part == part.strip()
        assert len(part) <= most
        assert row["text"] == (f"{row['text'][: row['context_chars']]}\n{part}" if row["context_chars"] else part)
        assert row["ids"] == Pieces(max_tokens).ids([row["text"]])[0]
        assert len(row["ids"]) <= max_tokens
        assert not row["truncated"]
    assert covered(text, found)
    assert strategy == "hybrid" or all_advance(found)


def all_advance(found: list[dict[str, Any]]) -> bool:
    """No chunk lies within the one before it."""
    return all(
        row["start_char"] > before["start_char"] and row["end_char"] > before["end_char"]
        for before, row in itertools.pairwise(found)
    )


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(
    paragraphs=st.lists(texts, min_size=1, max_size=6).map(tuple).filter(lambda found: "".join(found).strip()),
    source_type=st.sampled_from(TYPES),
    max_tokens=st.sampled_from([8, 64, 512]),
)
def test_every_character_is_covered_by_chunks_that_fit(
    strategy: str, paragraphs: tuple[str, ...], source_type: str, max_tokens: int
) -> None:
    found = chunks(*paragraphs, source_type=source_type, strategy=strategy, max_tokens=max_tokens)
    check(paragraphs, found, source_type, strategy, max_tokens)


def test_a_hybrid_pass_covers_the_document_by_itself() -> None:
    text = sentence(1, 9000)
    found = chunks(text, strategy="hybrid", max_tokens=2000)
    passes = [[]]  # type: list[list[dict[str, Any]]]
    for row in found:
        if passes[-1] and row["start_char"] == 0:
            passes.append([])
        passes[-1].append(row)
    assert len(passes) == len(HYBRID)
    assert all(covered(text, rows) for rows in passes)
    assert [max(len(row["text"]) for row in rows) <= size.most + 1 for rows, size in zip(passes, HYBRID)] == [True] * 3
    assert {row["group_id"] for row in found} == {"case_paragraph_7_abcdef01"}
    assert [row["chunk_index"] for row in found] == list(range(len(found)))


def test_trap_a_long_paragraph_between_short_ones_is_neither_lost_nor_empty() -> None:
    """The old chunker made 300, 0 and 300 characters of these."""
    paragraphs = (sentence(1, 300), sentence(2, 2500), sentence(3, 300))
    found = chunks(*paragraphs, strategy="dynamic", max_tokens=2000)
    check(paragraphs, found, "case_paragraph", "dynamic", 2000)
    assert sum(len(row["text"]) for row in found) >= 3100


def test_trap_b_a_document_without_blank_lines_is_cut_at_its_paragraphs() -> None:
    paragraphs = tuple(sentence(n, 700) for n in range(5))
    found = chunks(*paragraphs, strategy="dynamic", max_tokens=2000)
    starts = {sum(len(text) + 1 for text in paragraphs[:n]) for n in range(5)}
    assert len(found) > 2
    assert {row["start_char"] for row in found} <= starts


@pytest.mark.parametrize("blanks", [900, 5000])
def test_a_stretch_of_blanks_longer_than_a_window_neither_stops_the_cutting_nor_makes_a_blank_chunk(
    blanks: int,
) -> None:
    paragraphs = (sentence(1, 1500) + " " * blanks + sentence(2, 1500),)
    found = chunks(*paragraphs, source_type="statute_article", strategy="dynamic", max_tokens=2000)
    check(paragraphs, found, "statute_article", "dynamic", 2000) if blanks < 1000 else None
    assert covered(paragraphs[0], found)
    assert all_advance(found)
    assert all(row["text"].strip() for row in found)


def test_trap_c_indexes_go_on_over_articles_windows_and_passes() -> None:
    text = "\n".join(f"제{n}조(목적) {sentence(n, 900 if n % 2 else 1500)}" for n in range(1, 6))
    for strategy in STRATEGIES:
        found = chunks(text, source_type="statute_article", strategy=strategy)
        assert [row["chunk_index"] for row in found] == list(range(len(found)))
        assert len(found) >= 6


def test_trap_e_text_before_the_first_article_is_kept() -> None:
    text = sentence(9, 350) + "\n" + "\n".join(f"제{n}조(목적) {sentence(n, 400)}" for n in range(1, 4))
    found = chunks(text, source_type="statute_article", strategy="dynamic", max_tokens=2000)
    assert found[0]["text"].startswith(sentence(9, 350))
    assert [row["text"].split("조")[0] for row in found[1:]] == ["제1", "제2", "제3"]


def test_trap_f_offsets_tokens_and_overlap_are_filled() -> None:
    found = chunks(sentence(5, 5000), strategy="standard", max_tokens=2000)
    assert [row["overlap_chars"] for row in found] == [
        max(0, before["end_char"] - row["start_char"]) for before, row in zip([{"end_char": 0}, *found], found)
    ]
    assert all(200 < row["overlap_chars"] <= 450 for row in found[1:])  # a quarter of 1,800 characters at most
    assert all(len(row["ids"]) > 100 for row in found)


def test_a_long_statute_is_cut_at_clauses_and_items_before_windows() -> None:
    clauses = [f"{mark} {sentence(n, 600)}" for n, mark in enumerate("①②③")]
    found = chunks(
        "제1조(정의) 이 법에서 쓰는 말은 다음과 같다.\n" + "\n".join(clauses),
        source_type="statute_article",
        strategy="dynamic",
        max_tokens=2000,
    )
    assert [row["text"][0] for row in found] == ["제", "②", "③"]
    items = [f"{n}. {sentence(n, 450)}" for n in range(1, 5)]
    found = chunks(
        "① 다음 각 호와 같다.\n" + "\n".join(items), source_type="statute_article", strategy="dynamic", max_tokens=2000
    )
    assert [row["text"][:2] for row in found] == ["① ", "2.", "3.", "4."]


@pytest.mark.parametrize(
    ("flags", "most"),
    [({"source_type": "statute_article"}, 1000), ({}, 2000), ({"query_type": "term_explanation"}, 1200)],
)
def test_dynamic_sizes_follow_the_type_or_the_question(flags: dict[str, Any], most: int) -> None:
    found = chunks(sentence(3, 12_000), strategy="dynamic", max_tokens=5000, **flags)
    assert most * 0.6 <= max(len(row["text"].strip()) for row in found) <= most


def test_a_model_with_a_short_limit_gets_short_chunks() -> None:
    """A limit of 128 tokens, where the strategy alone would make chunks of 1,800 characters: the rest of each would
    never be embedded.
    """
    found = chunks(sentence(4, 3000), strategy="standard", max_tokens=128)
    assert max(len(row["ids"]) for row in found) <= 128
    assert min(len(row["ids"]) for row in found[:-1]) > 60


def test_a_text_whose_pieces_have_more_tokens_alone_is_cut_again() -> None:
    class Grudging(Pieces):
        def ids(self, texts: Any) -> list[list[int]]:
            return [[row[0], *row[1:-1], *row[1:-1], row[-1]] for row in super().ids(texts)]

    text = sentence(6, 2000)
    batch = pa.record_batch(
        [
            pa.array([value], field.type)
            for value, field in zip(("case_paragraph", 1, "", [text], "ab", None, 2000), DOCUMENTS)
        ],
        schema=DOCUMENTS,
    )
    found = [
        row
        for out in Chunk(strategy="standard", tokens=Grudging(100), embedding_batch_size=10)(iter([batch]))
        for row in out.to_pylist()
    ]
    assert covered(text, found)
    assert max(len(row["ids"]) for row in found) <= 100


def test_what_no_cut_can_save_is_marked_as_truncated() -> None:
    found = chunks("한국" * 40, max_tokens=2)
    assert all(row["truncated"] and len(row["ids"]) == 2 for row in found)


def test_batches_end_between_documents() -> None:
    rows = [("case_paragraph", n, "", [sentence(n, 3000)], f"{n:08x}", None, 3000) for n in range(6)]
    batch = pa.record_batch(
        [pa.array(column, field.type) for column, field in zip(zip(*rows), DOCUMENTS)], schema=DOCUMENTS
    )
    out = list(Chunk(strategy="standard", tokens=Pieces(), embedding_batch_size=20)(iter([batch])))
    ids = [set(part["source_id"].to_pylist()) for part in out]
    assert len(out) > 2
    assert sum(map(len, ids)) == len(set.union(*ids)) == 6
    assert all(part.num_rows <= 20 or len(set(part["source_id"].to_pylist())) == 1 for part in out)
    by_tokens = Chunk(strategy="standard", tokens=Pieces(), embedding_batch_size=100, batch_tokens=lambda: 1500)
    parts = list(by_tokens(iter([batch.replace_schema_metadata({"documents": "9", "characters": "20000"})])))
    tokens = [sum(map(len, part["ids"].to_pylist())) for part in parts]
    assert len(parts) > 2
    assert all(number <= 1500 or len(set(part["source_id"].to_pylist())) == 1 for number, part in zip(tokens, parts))
    looked_at = [looked_at_in(part) for part in parts]
    assert sum(looked_at, Counter()) == {"documents": 9, "characters": 20_000}  # three are unchanged
    assert all(seen["characters"] >= 3000 for seen in looked_at)
