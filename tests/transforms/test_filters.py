"""Length, and that texts dropped before there is a column are those it would drop."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pyarrow as pa
import pytest

from moai.engine import pipeline
from moai.transforms.filters import Length

EVERY_LETTER_OR_SPACE = [chr(point) for point in range(sys.maxunicode + 1) if not 0xD800 <= point < 0xE000]


@pytest.fixture
def counts() -> Iterator[dict[str, int]]:
    tally = pipeline.Tally()
    token = pipeline._tally.set(tally)
    yield tally.counts
    pipeline._tally.reset(token)


def kept(length: Length, texts: list[str]) -> list[str]:
    batch = pa.record_batch([pa.array(texts, pa.large_string())], names=["text"])
    return [text for done in length(iter([batch])) for text in done["text"].to_pylist()]


def test_both_ways_agree_on_which_texts_are_blank_for_every_code_point(counts: dict[str, int]) -> None:
    length = Length(min_chars=1, max_chars=None)
    assert length.drops_only_blank
    left = kept(length, EVERY_LETTER_OR_SPACE)
    by_column = dict(counts)
    counts.clear()
    beside = pa.record_batch([pa.nulls(len(EVERY_LETTER_OR_SPACE))], names=["beside"])
    texts, of_them = length.without_blank(EVERY_LETTER_OR_SPACE, beside)
    assert texts == left
    assert of_them.num_rows == len(left)
    assert dict(counts) == by_column
    assert " " not in left
    assert "\u3000" not in left
    assert "가" in left


def test_bounds_are_in_characters_without_surrounding_space_and_are_counted(counts: dict[str, int]) -> None:
    assert kept(Length(min_chars=2, max_chars=3), ["한", " 한 ", "한글", "🙂🙂🙂", "four", "  "]) == ["한글", "🙂🙂🙂"]
    assert sum(number for name, number in counts.items() if name.startswith("filtered.")) == 4
    assert counts["filtered"] == 4
