"""Names of people, places and organisations in a text, by rules over Kiwi's morphemes: the longest that stands there.

A name is a run of nouns, Latin letters, Chinese characters and numbers without a space that holds a proper noun
(`뉴질랜드항공`, `SK하이닉스`, `2NE1`), without the titles and suffixes behind it (`미국|산`). It is joined over one
space with the name before it (`조니 뎁`, `서울 송파구`), unless one of the two is a Korean person, and with the
common nouns behind it that end an organisation's name (`아시아 축구 연맹`). Beside these: Latin capitals (`MBC`),
and one-syllable surnames before a title (`박|씨`). benchmarks/coref_names.py measures it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol


class Morpheme(Protocol):
    """A Kiwi token: `start` and `len` are code points of the text."""

    form: str
    tag: str
    start: int
    len: int


@dataclass(frozen=True)
class Name:
    """Characters [begin, end) of the text. `kind`: name, joined, latin, surname; or what --entities says."""

    begin: int
    end: int
    kind: str


_SURNAMES = frozenset(
    "가감강경고공곽구국권금기길김나남노도두류마맹명모목문민박반방배백변복봉부사서석선설성소손송신심안양어엄여연염"
    "예오옥왕용우원위유육윤은이인임장전정제조주지진차채천최추탁태편표피하한함허현형홍황"
)
_TITLES = (
    "씨", "모", "군", "양", "전", "선수", "대표", "의원", "장관", "차관", "회장", "부회장", "총괄회장", "사장",
    "이사", "감독", "코치", "교수", "박사", "기자", "위원", "대통령", "총리", "후보", "시장", "지사", "총장", "부장",
    "실장", "국장", "과장", "팀장", "원장", "청장", "소장", "검사", "판사", "변호사", "배우", "간호사", "대변인",
    "사무총장", "원내대표", "최고위원", "작가", "병장", "상병", "일병", "하사", "대령", "중령", "소령", "대위",
    "경장", "경사", "할머니", "할아버지", "사령관", "님", "학생", "목사", "스님", "신부", "아나운서", "앵커", "피디",
    "PD",
)  # fmt: skip
"""What stands behind a surname of one syllable: 박 씨."""
_NOT_OF_A_NAME = frozenset((
    *_TITLES,
    "측", "내", "때", "등", "당시", "이후", "국민", "정부", "사람", "시민", "언론", "경찰", "팬", "영화", "위원장",
    "부위원장", "이사장", "장군", "여사", "선생", "대왕", "산", "인", "어", "식", "계", "군", "형", "제", "발", "행",
    "사람들", "남성", "여성", "대사", "정부군", "소식통", "시각", "시간", "지역", "주민", "방면", "현지",
))  # fmt: skip
"""What is no part of the name it is glued to: 미국|산."""
_NO_NAMES = frozenset((
    "AI", "AR", "CCTV", "CD", "CEO", "CFO", "CG", "DNA", "DVD", "FTA", "GPS", "ID", "IP", "IT", "LCD", "LED", "LTE",
    "MC", "OST", "PC", "PR", "SNS", "TV", "USB", "VR",
))  # fmt: skip
_ORGANISATIONS = (
    "연맹", "협회", "위원회", "은행", "대학", "대학교", "리그", "선수권", "선수권대회", "올림픽", "월드컵", "어워드",
    "영화제", "연구소", "연구원", "병원", "경찰서", "경찰청", "검찰청", "법원", "지법", "지검", "공항", "신문",
    "일보", "통신", "방송", "항공", "전자", "그룹", "대사관", "공사", "공단", "재단", "교회", "성당", "학교",
    "고등학교", "의회", "하원", "상원", "연합", "동맹", "조합", "총회", "학회", "박물관", "미술관", "도서관", "극장",
    "센터", "호텔", "광장", "공원", "경기장", "체육관", "자치구", "공화국", "왕국", "제국", "왕조", "혁명", "전쟁",
    "조약", "헌법",
)  # fmt: skip
"""What a longer name ends with that begins with this one: 아시아 축구 연맹."""
_RUN = frozenset(("NNP", "NNG", "SL", "SH", "SN", "XSN"))
_BEFORE = frozenset(("SN", "MM", "XPN", "NNB"))
_MOST_LETTERS = 5
"""Of an abbreviation in Latin capitals, and of the Hangul glued behind one (`B사`, `IOK컴퍼니`)."""


@dataclass(frozen=True, kw_only=True)
class SingleNames:
    """The prior program's finder: a morpheme with one of `tags`, of two characters or more, as the text spells it.

    merge_latin  read Latin letters and a noun that follows without a space as one name: SK + 하이닉스
    """

    tags: tuple[str, ...] = ("NNP",)
    merge_latin: bool = False

    def names(self, text: str, morphemes: Sequence[Morpheme], document_id: str = "") -> list[Name]:
        found = []
        for index, one in enumerate(morphemes):
            name, start = one.form, one.start
            before = morphemes[index - 1] if self.merge_latin and index and one.tag in ("NNP", "NNG") else None
            if before and before.tag == "SL" and before.start + before.len == start:
                name, start = before.form + name, before.start
            elif one.tag not in self.tags:
                continue
            if len(name) >= 2 and text.startswith(name, start):  # not a contraction, or a normalized form
                found.append(Name(start, start + len(name), "name"))
        return found


@dataclass(frozen=True, kw_only=True)
class LongestNames:
    """The finder. `tags` are Kiwi's tags that make a run a name."""

    tags: tuple[str, ...] = ("NNP",)
    max_chars: int = 30

    def names(self, text: str, morphemes: Sequence[Morpheme], document_id: str = "") -> list[Name]:
        """In the order of the text; none overlaps another."""
        found: list[Name] = []
        runs = list(_runs(morphemes))
        for at, run in enumerate(runs):
            if (name := self._name(text, run)) is None or (found and name.begin < found[-1].end):
                continue
            name = self._longer(text, name, runs[at + 1 : at + 3])
            if found and text[found[-1].end : name.begin] == " " and self._one(text, found[-1], name):
                name = Name(found.pop().begin, name.end, "joined")
            found.append(name)
        return found

    def _name(self, text: str, run: list[Morpheme]) -> Name | None:
        if not any(one.tag in self.tags for one in run):
            return _latin(text, run) or _unknown_person(text, run)
        while run and (run[-1].tag in ("XSN", "SN") or (len(run) > 1 and run[-1].form in _NOT_OF_A_NAME)):
            run = run[:-1]
        while len(run) > 1 and run[0].tag in _BEFORE:
            run = run[1:]
        if not any(one.tag in self.tags for one in run):
            return None
        begin, end = run[0].start, run[-1].start + run[-1].len
        if any("ㄱ" <= letter <= "ㅣ" or "\u1100" <= letter <= "\u11ff" for letter in text[begin:end]):
            return None  # ㅋㅋ is laughter
        if end - begin == 2 and text[end - 1] == "모" and text[begin] in _SURNAMES:
            end -= 1  # 박모 씨: somebody called Park
        if end - begin == 1:
            known = text[begin] in _SURNAMES and _has_title(text, end)
            return Name(begin, end, "surname") if known else None
        return Name(begin, end, "joined" if len(run) > 1 else "name") if end - begin <= self.max_chars else None

    def _longer(self, text: str, name: Name, behind: Sequence[list[Morpheme]]) -> Name:
        """With the common nouns behind it, one space apart, up to the one that ends an organisation's name."""
        at = name.end
        for run in behind if name.kind in ("name", "joined", "latin") else ():
            begin, end = run[0].start, run[-1].start + run[-1].len
            if text[at:begin] != " " or end - name.begin > self.max_chars or run[0].tag in _BEFORE:
                break
            if text[begin:end].endswith(_ORGANISATIONS):
                return Name(name.begin, end, "joined")
            at = end
        return name

    def _one(self, text: str, first: Name, second: Name) -> bool:
        if "surname" in (first.kind, second.kind) or second.end - first.begin > self.max_chars:
            return False
        return not _is_person(text, first) and not _is_person(text, second)


def _runs(morphemes: Sequence[Morpheme]) -> Iterator[list[Morpheme]]:
    """Morphemes one behind the other without a space. What has no length (a copula that is not written) is passed
    over.
    """
    run: list[Morpheme] = []
    for one in morphemes:
        if not one.len:
            continue
        inside = one.tag in _RUN or (not run and one.tag in _BEFORE)
        if run and inside and run[-1].start + run[-1].len == one.start and one.tag in _RUN:
            run.append(one)
            continue
        if run:
            yield run
        run = [one] if inside else []
    if run:
        yield run


def _latin(text: str, run: list[Morpheme]) -> Name | None:
    if run[0].tag != "SL":
        return None
    size = next((at for at, one in enumerate(run) if one.tag not in ("SL", "SN")), len(run))
    begin, end, last = run[0].start, run[size - 1].start + run[size - 1].len, run[-1].start + run[-1].len
    letters, rest = text[begin:end], text[end:last]
    if letters in _NO_NAMES:
        return None
    if not letters.isupper() or len(letters) > _MOST_LETTERS or (len(letters) == 1 and not _has_title(text, end)):
        return None
    if rest and rest not in _NOT_OF_A_NAME:
        return Name(begin, last, "latin") if len(rest) <= _MOST_LETTERS else None
    return Name(begin, end, "latin")


def _unknown_person(text: str, run: list[Morpheme]) -> Name | None:
    """Three syllables that Kiwi does not know as a name, the first a surname on its own, before a title."""
    begin, end = run[0].start, run[-1].start + run[-1].len
    apart = end - begin == 3 and len(run) > 1 and run[0].len == 1 and text[begin] in _SURNAMES
    starts = begin == 0 or not text[begin - 1].isalnum()
    return Name(begin, end, "name") if apart and starts and _has_title(text, end) else None


def _is_person(text: str, name: Name) -> bool:
    district = text[name.end - 1] in "시구군읍면"  # 송파구
    return name.end - name.begin == 3 and text[name.begin] in _SURNAMES and not district


def _has_title(text: str, end: int) -> bool:
    return text.startswith(_TITLES, end + (text[end : end + 1] == " "))
