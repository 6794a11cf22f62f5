"""Which names are found, and which of their mentions can be asked for."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moai.core.errors import ConfigError
from moai.coref.entities import Candidate, Repetition
from moai.coref.given_names import GivenNames
from moai.coref.korean import analyser
from moai.coref.names import LongestNames, SingleNames


def found(text: str) -> list[tuple[str, str]]:
    names = LongestNames().names(text, analyser("cong").tokenize(text))
    return [(text[name.begin : name.end], name.kind) for name in names]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("미국산 쇠고기와 영국산 위스키를 팔았다.", [("미국", "name"), ("영국", "name")]),
        ("어제 뉴질랜드항공은 운항을 멈췄다.", [("뉴질랜드항공", "joined")]),
        ("SK하이닉스의 매출이 늘었고 MBC가 보도했다.", [("SK하이닉스", "joined"), ("MBC", "latin")]),
        ("경찰은 박씨와 최모(33)씨를 불렀다.", [("박", "surname"), ("최", "surname")]),
        ("멜리사 멘체스터의 노래가 서울 송파구에 울렸다.", [("멜리사 멘체스터", "joined"), ("서울 송파구", "joined")]),
        ("아시아 축구 연맹이 발표했다.", [("아시아 축구 연맹", "joined")]),
        ("ㅋㅋㅋ TV에 나온 CEO는 웃었다.", []),
    ],
)
def test_names_are_the_longest_without_titles_and_suffixes(text: str, names: list[tuple[str, str]]) -> None:
    assert found(text) == names


def test_a_korean_person_is_not_joined_with_what_stands_before() -> None:
    assert ("이순신", "name") in found("조선 이순신은 바다를 지켰다.")


def test_names_never_overlap_and_stand_in_order() -> None:
    text = "한국 교통대 철도대학과 미국 연방 하원, 서울 송파구 롯데월드타워, 아시아 축구 연맹 그리고 SK 텔레콤 박 대표."
    names = LongestNames().names(text, analyser("cong").tokenize(text))
    assert len(names) > 4
    assert all(one.end <= other.begin for one, other in pairwise(names))


# --- mentions ---------------------------------------------------------------------------------------------------------


def candidates(text: str, **options: Any) -> list[Candidate]:
    return lost_and(text, **options)[0]


def lost_and(text: str, merge_latin: bool = False, tags: tuple[str, ...] = ("NNP",), **options: Any) -> Any:
    finder = SingleNames(tags=tags, merge_latin=merge_latin)
    morphemes = analyser("cong").tokenize(text)
    usual = {"spread": False, "pronoun_filter": False, "hide_copies": False}
    return Repetition(finder=finder, **{**usual, **options}).candidates(text, morphemes, finder.names(text, morphemes))


def places(found: list[Candidate]) -> list[tuple[str, int, int]]:
    return [(one.entity, one.antecedent, one.mention) for one in found]


SEASONS = (
    "서울의 봄은 짧다. 서울의 여름은 길다. 서울의 가을은 맑다. 서울의 겨울은 춥다. 서울의 밤은 밝다. 부산은 따뜻하다."
)


def test_the_second_to_fourth_mention_are_candidates_and_the_first_is_their_antecedent() -> None:
    starts = [place for place in range(len(SEASONS)) if SEASONS.startswith("서울", place)]
    found, lost = lost_and(SEASONS)
    assert places(found) == [("서울", starts[0], start) for start in starts[1:4]]
    assert lost == {"more": 1}
    assert places(candidates(SEASONS, max_mentions=2, spread=True)) == [
        ("서울", starts[0], starts[2]),
        ("서울", starts[0], starts[4]),
    ]


def test_distances_are_bounded_and_positions_are_code_points() -> None:
    text = "😀 서울과 서울 사이는 가깝고 다른 쪽은 조금 더 멀리 있는 서울이다."
    first, second, third = (place for place in range(len(text)) if text.startswith("서울", place))
    found, lost = lost_and(text)
    assert places(found) == [("서울", first, third)]  # the second is 4 characters behind the first
    assert lost["near"] == 1
    assert places(candidates(text, min_distance=1)) == [("서울", first, second), ("서울", first, third)]
    found, lost = lost_and(text, min_distance=1, max_distance=10)
    assert (places(found), lost["far"]) == ([("서울", first, second)], 1)


def test_a_pronoun_drops_the_mention_beside_it_and_no_other() -> None:
    text = (
        "이순신이 배를 만들었다. 그는 이순신의 부하였다. 오랜 세월이 흘러 사람들은 이순신을 기억했다. "
        "우리는 이순신을 안다."
    )
    starts = [place for place in range(len(text)) if text.startswith("이순신", place)]
    found, lost = lost_and(text, pronoun_filter=True)
    assert [one.mention for one in found] == starts[2:]  # 우리 means nobody who was named
    assert lost["pronoun"] == 1
    assert len(candidates(text)) == 3


def test_copies_competitors_and_baselines_are_those_of_the_text() -> None:
    text = (
        "서울은 크다. 부산은 멀고 부산은 따뜻하다. 서울역은 낡았다. 인천은 가깝다. 사람들은 서울로 간다. 서울은 붐빈다."
    )
    starts = [place for place in range(len(text)) if text.startswith("서울", place)]
    finder = LongestNames()
    morphemes = analyser("cong").tokenize(text)
    names = finder.names(text, morphemes)
    found = {hide: Repetition(finder=finder, hide_copies=hide).candidates(text, morphemes, names)[0] for hide in (0, 1)}
    last = {hide: next(one for one in found[hide] if one.mention == starts[3]) for hide in (0, 1)}
    assert sorted(last[1].copies) == [(starts[1], starts[1] + 3, False), (starts[2], starts[2] + 2, True)]
    assert last[1].competitors == 3  # 부산, 서울역, 인천
    assert (last[1].nearest, last[1].frequent) == ("부산", "부산")  # the other mentions of 서울 are not in sight
    assert (last[0].nearest, last[0].frequent) == ("서울", "서울")


def test_latin_letters_join_the_noun_behind_them_when_asked() -> None:
    text = "SK하이닉스는 반도체를 만드는 회사이고 이천에 있는 공장이 크다. 올해 SK하이닉스의 매출이 늘었다."
    assert {one.entity for one in candidates(text)} == {"하이닉스"}
    assert ("SK하이닉스", 0, text.rindex("SK")) in places(candidates(text, merge_latin=True))


def test_common_nouns_are_names_only_when_asked_and_single_letters_never() -> None:
    text = "공장이 크고 깨끗하며 일하는 사람이 많은 공장이다. 강이 흐르고 물이 맑고 바람이 부는 강이다."
    assert candidates(text) == []
    assert {one.entity for one in candidates(text, tags=("NNP", "NNG"))} == {"공장"}


def test_a_form_that_is_not_in_the_text_is_no_name() -> None:
    tokens: Any = [SimpleNamespace(form="서울", tag="NNP", start=start, len=2) for start in (0, 15)]
    assert [name.begin for name in SingleNames().names("부산은 멀리 있는 항구이고 서울", tokens)] == [15]


# --- names from a file ------------------------------------------------------------------------------------------------


def test_names_come_from_a_file_by_the_documents_id(tmp_path: Path) -> None:
    rows = [
        {"id": "b", "spans": [[0, 2, "LC"], [1, 4, "OG"], [9, 99, "PS"], [5, 6, "PS"]]},
        {"id": 7, "spans": []},
        {"id": "a", "spans": [[3, 4, "PS"]]},
    ]
    file = tmp_path / "spans.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = GivenNames.open(str(file))
    assert [(one.begin, one.end, one.kind) for one in names.names("가나다라마바사", [], "b")] == [
        (0, 2, "LC"),
        (5, 6, "PS"),
    ]
    assert [one.begin for one in names.names("가나다라마바사", [], "a")] == [3]
    assert names.names("가나다라마바사", [], "absent") == names.names("가나다라마바사", [], "7") == []


@pytest.mark.parametrize(
    "line", ["{", '{"id": 1}', '{"id": 1, "spans": [[0, 1]]}', '{"id": 1, "spans": [[0, "1", "PS"]]}']
)
def test_a_line_of_another_form_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "spans.jsonl"
    file.write_text('{"id": 0, "spans": []}\n' + line + "\n")
    with pytest.raises(ConfigError, match=r"spans\.jsonl line 2: expected"):
        GivenNames.open(str(file))
