"""The six rules: each at its bounds, in their order, one counter each; and the table that makes them cheap says what
Python says.
"""

from __future__ import annotations

import pyarrow as pa
import pytest
from coref_corpus import failing, news
from hypothesis import given
from hypothesis import strategies as st

from moai.coref.korean import RULES, CheapRules, KiwiQuality, analyser
from moai.engine.pipeline import peek

ANY = CheapRules(min_length=0, max_length=10**9, min_sentences=0, min_hangul_ratio=0, max_special_ratio=1)


def tags(text: str) -> list[str]:
    return [morpheme.tag for morpheme in analyser("cong").tokenize(text)]


@pytest.mark.parametrize("rule", RULES[1:])
def test_a_document_is_dropped_by_the_first_rule_it_fails(rule: str) -> None:
    text = failing(rule)
    found = CheapRules().failed_by(text) or KiwiQuality().failed_by(tags(text))
    assert found[0] == rule


def test_every_rule_that_a_document_fails_is_known() -> None:
    assert CheapRules().failed_by("abc") == ["length", "sentences", "hangul"]
    assert KiwiQuality().failed_by(["NP"]) == ["nnp", "pronoun"]


def test_news_passes_every_rule() -> None:
    for seed in range(10):
        assert CheapRules().failed_by(news(seed)) == []
        assert KiwiQuality().failed_by(tags(news(seed))) == []


def test_bounds_are_inclusive() -> None:
    for length, passes in ((799, False), (800, True), (2500, True), (2501, False)):
        text = ("가나다. " * 700)[:length]
        assert ("length" not in CheapRules().failed_by(text)) is passes
    ten = CheapRules(min_length=1, min_sentences=3, min_hangul_ratio=0.4, max_special_ratio=0.3)
    assert ten.failed_by("가나다라abc.?!") == []  # 4 of 10 Hangul, 3 of 10 special
    assert ten.failed_by("가힣다라abc.?!") == []  # the first and the last syllable
    assert ten.failed_by("\ud7a4나다라abc.?!") == ["hangul", "special"]  # the one behind it is none
    assert ten.failed_by("가나다xabc.?!") == ["hangul"]
    assert ten.failed_by("가나다라ab-.?!") == ["special"]
    assert ten.failed_by("가나다라abc.?x") == ["sentences"]
    morphemes = tags("서울과 부산")
    assert morphemes == ["NNP", "JC", "NNP"]
    assert KiwiQuality(min_nnp_ratio=2 / 3, max_nnp_ratio=2 / 3).failed_by(morphemes) == []
    assert KiwiQuality(min_nnp_ratio=0.7, max_nnp_ratio=1).failed_by(morphemes) == ["nnp"]
    assert KiwiQuality().failed_by([]) == ["nnp"]


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60))
def test_the_table_says_of_every_character_what_python_says(text: str) -> None:
    hangul = sum("\uac00" <= letter <= "\ud7a3" for letter in text) / len(text)
    special = sum(not letter.isalnum() and letter not in " \n\t" for letter in text) / len(text)
    below = {"min_hangul_ratio": min(1.0, hangul + 1e-9), "max_special_ratio": special}
    assert CheapRules(**{**vars(ANY), **below}).failed_by(text) == ["hangul"] * (hangul < below["min_hangul_ratio"])
    assert CheapRules(**{**vars(ANY), "min_hangul_ratio": hangul, "max_special_ratio": special}).failed_by(text) == []
    if special:
        assert CheapRules(**{**vars(ANY), "max_special_ratio": special - 1e-9}).failed_by(text) == ["special"]


def test_the_cheap_rules_keep_rows_whole() -> None:
    texts = [news(1), failing("length"), failing("hangul"), news(2)]
    batch = pa.record_batch(
        [pa.array(texts, pa.large_string()), pa.array(["a", "b", "c", "d"])], names=["text", "doc_id"]
    )
    kept = peek(iter([batch]), (CheapRules(),))
    assert kept is not None
    assert kept.to_pylist() == [{"text": texts[0], "doc_id": "a"}, {"text": texts[3], "doc_id": "d"}]
