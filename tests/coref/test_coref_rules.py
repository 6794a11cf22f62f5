"""The six rules: each at its bounds, in their order, one counter each; and the table that makes them cheap says what
Python says.
"""

from __future__ import annotations

import pyarrow as pa
import pytest
from coref_corpus import failing, news
from hypothesis import given
from hypothesis import strategies as st

from moai.coref.entities import Candidate, Repetition
from moai.coref.korean import RULES, CheapRules, KiwiQuality, analyser
from moai.engine.pipeline import peek

ANY = CheapRules(min_length=0, max_length=10**9, min_sentences=0, min_hangul_ratio=0, max_special_ratio=1)


def tags(text: str) -> list[str]:
    return [morpheme.tag for morpheme in analyser("cong").tokenize(text)]


@pytest.mark.parametrize("rule", RULES)
def test_a_document_is_dropped_by_the_first_rule_it_fails(rule: str) -> None:
    text = failing(rule)
    found = CheapRules().failed_by(text) or KiwiQuality().failed_by(tags(text))
    assert found == rule


def test_news_passes_every_rule() -> None:
    for seed in range(10):
        assert CheapRules().failed_by(news(seed)) is None
        assert KiwiQuality().failed_by(tags(news(seed))) is None


def test_bounds_are_inclusive() -> None:
    for length, passes in ((799, False), (800, True), (2500, True), (2501, False)):
        text = ("가나다. " * 700)[:length]
        assert (CheapRules().failed_by(text) != "length") is passes
    ten = CheapRules(min_length=1, min_sentences=3, min_hangul_ratio=0.4, max_special_ratio=0.3)
    assert ten.failed_by("가나다라abc.?!") is None  # 4 of 10 Hangul, 3 of 10 special
    assert ten.failed_by("가힣다라abc.?!") is None  # the first and the last syllable
    assert ten.failed_by("\ud7a4나다라abc.?!") == "hangul"  # the one behind it is none
    assert ten.failed_by("가나다xabc.?!") == "hangul"
    assert ten.failed_by("가나다라ab-.?!") == "special"
    assert ten.failed_by("가나다라abc.?x") == "sentences"
    morphemes = tags("서울과 부산")
    assert morphemes == ["NNP", "JC", "NNP"]
    assert KiwiQuality(min_nnp_ratio=2 / 3, max_nnp_ratio=2 / 3).failed_by(morphemes) is None
    assert KiwiQuality(min_nnp_ratio=0.7, max_nnp_ratio=1).failed_by(morphemes) == "nnp"
    assert KiwiQuality().failed_by([]) == "nnp"


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60))
def test_the_table_says_of_every_character_what_python_says(text: str) -> None:
    hangul = sum("\uac00" <= letter <= "\ud7a3" for letter in text) / len(text)
    special = sum(not letter.isalnum() and letter not in " \n\t" for letter in text) / len(text)
    below = {"min_hangul_ratio": min(1.0, hangul + 1e-9), "max_special_ratio": special}
    assert CheapRules(**{**vars(ANY), **below}).failed_by(text) == (
        "hangul" if hangul < below["min_hangul_ratio"] else None
    )
    assert CheapRules(**{**vars(ANY), "min_hangul_ratio": hangul, "max_special_ratio": special}).failed_by(text) is None
    if special:
        assert CheapRules(**{**vars(ANY), "max_special_ratio": special - 1e-9}).failed_by(text) == "special"


def test_the_cheap_rules_keep_rows_whole() -> None:
    texts = [news(1), failing("length"), failing("hangul"), news(2)]
    batch = pa.record_batch(
        [pa.array(texts, pa.large_string()), pa.array(["a", "b", "c", "d"])], names=["text", "doc_id"]
    )
    kept = peek(iter([batch]), (CheapRules(),))
    assert kept is not None
    assert kept.to_pylist() == [{"text": texts[0], "doc_id": "a"}, {"text": texts[3], "doc_id": "d"}]


# --- names ------------------------------------------------------------------------------------------------------------


def names(text: str, **options: object) -> list[Candidate]:
    return Repetition(**options).candidates(text, analyser("cong").tokenize(text), tags(text))  # type: ignore[arg-type]


def test_the_second_to_fourth_mention_are_candidates_and_the_first_is_their_antecedent() -> None:
    text = "서울의 봄은 짧다. 서울의 여름은 길다. 서울의 가을은 맑다. 서울의 겨울은 춥다. "
    text += "서울의 밤은 밝다. 부산은 따뜻하다."
    starts = [place for place in range(len(text)) if text.startswith("서울", place)]
    assert names(text) == [Candidate("서울", starts[0], start) for start in starts[1:4]]


def test_distances_are_bounded_and_positions_are_code_points() -> None:
    text = "😀 서울과 서울 사이는 가깝고 다른 쪽은 조금 더 멀리 있는 서울이다."
    first, second, third = (place for place in range(len(text)) if text.startswith("서울", place))
    assert names(text) == [Candidate("서울", first, third)]  # the second is 4 characters behind the first
    assert names(text, min_distance=1) == [Candidate("서울", first, second), Candidate("서울", first, third)]
    assert names(text, min_distance=1, max_distance=10) == [Candidate("서울", first, second)]


def test_latin_letters_join_the_noun_behind_them_when_asked() -> None:
    text = "SK하이닉스는 반도체를 만드는 회사이고 이천에 있는 공장이 크다. 올해 SK하이닉스의 매출이 늘었다."
    assert {candidate.entity for candidate in names(text)} == {"하이닉스"}
    merged = [candidate for candidate in names(text, merge_latin=True) if "하이닉스" in candidate.entity]
    assert merged == [Candidate("SK하이닉스", 0, text.rindex("SK"))]


def test_common_nouns_are_names_only_when_asked_and_single_letters_never() -> None:
    text = "공장이 크고 깨끗하며 일하는 사람이 많은 공장이다. 강이 흐르고 물이 맑고 바람이 부는 강이다."
    assert names(text) == []
    assert {candidate.entity for candidate in names(text, tags=("NNP", "NNG"))} == {"공장"}


def test_a_form_that_is_not_in_the_text_is_no_name() -> None:
    class Token:
        form, tag, len = "서울", "NNP", 2

        def __init__(self, start: int) -> None:
            self.start = start

    assert Repetition().candidates("부산은 멀리 있는 항구이고 서울", [Token(0), Token(15)], ["NNP", "NNP"]) == []
