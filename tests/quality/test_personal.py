"""Personal data: what is found, what is not, and what stands there afterwards."""

from __future__ import annotations

import random

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_shapes import demo_documents

from moai.quality import personal
from moai.quality.personal import KINDS, MaskPersonalData, PersonalData, masked, places

PIECES = (
    *("hong", "홍길동", "@", "example.com", "회사.한국", ".", "-", " ", "\n", "8.8.8.8", "1.1.1.1", "+", "82", "010"),
    *(
        "1234",
        "5678",
        "(02)",
        ")",
        "202",
        "555",
        "0143",
        "900101",
        "1234567",
        "2001:4860::",
        ":",
        "8888",
        "[IP]",
        "[",
        "로",
    ),
)


def found(text: str) -> list[tuple[str, str]]:
    return [(kind, text[first:last]) for kind, first, last in places(text)]


@pytest.mark.parametrize(
    ("text", "kind", "what"),
    [
        ("메일은hong.gil+a@mail.example.co.kr으로", "mail", "hong.gil+a@mail.example.co.kr"),
        ("홍길동@회사.한국은", "mail", "홍길동@회사.한국"),
        ("서버 8.8.8.8에서", "ipv4", "8.8.8.8"),
        ("at 2001:4860:4860::8888, or", "ipv6", "2001:4860:4860::8888"),
        ("전화010-1234-5678로", "phone_kr", "010-1234-5678"),
        ("01012345678", "phone_kr", "01012345678"),
        ("(02) 123-4567", "phone_kr", "(02) 123-4567"),
        ("+82-10-1234-5678", "phone_kr", "+82-10-1234-5678"),
        ("call +44 20 7946 0958.", "phone", "+44 20 7946 0958"),
        ("(202) 555-0143", "phone", "(202) 555-0143"),
        ("주민번호900101-1234567입니다", "resident_number", "900101-1234567"),
        ("000229 - 4000000", "resident_number", "000229 - 4000000"),
        ("9001011234568", "resident_number", "9001011234568"),
    ],
)
def test_each_kind_is_found_where_it_stands(text: str, kind: str, what: str) -> None:
    assert found(text) == [(kind, what)]


@pytest.mark.parametrize(
    "text",
    [
        "8.8.8.8888 and 1.2.3.4.5 and v1.2.3.4, version 6.0.0.0",
        "10.0.0.1, 192.168.0.1, 127.0.0.1, fe80::1, 2001:db8::1, std::vector, add::b",
        "900230-1234567, 901301-1234567, 900101-9234567, 1900101-1234567, 9001011234567",
        "1234-5678-9012-3456, 2024-01-02, 3.14159, ISBN 978-89-01-12345-6",
        "@param name, pkg@1.2.3, a@b, user@localhost",
    ],
)
def test_what_only_looks_like_it_is_not(text: str) -> None:
    assert found(text) == []
    assert masked(text) == text


def test_planted_data_of_every_kind_is_found() -> None:
    """Recall of exact kinds is .98 at least (here all of it), and nothing else is found in the same documents."""
    make = random.Random(0)
    digits = lambda number: "".join(make.choices("0123456789", k=number))  # noqa: E731
    ways = {
        "mail": lambda: (
            f"{make.choice(('kim', 'a.lee', 'jo_1'))}{digits(3)}@{make.choice(('example.com', 'mail.go.kr'))}"
        ),
        "ipv4": lambda: (
            f"{make.choice((8, 52, 121, 211))}.{make.randrange(256)}.{make.randrange(256)}.{make.randrange(1, 256)}"
        ),
        "ipv6": lambda: f"2400:cb00:{make.randrange(1, 9999)}::{make.randrange(1, 9999)}",
        "phone_kr": lambda: make.choice(("010-{}-{}", "02-{}-{}", "+82 10 {} {}", "(031) {}-{}")).format(
            digits(4), digits(4)
        ),
        "phone": lambda: f"{make.choice(('+49 30', '+1 415', '+81 3'))} {make.randrange(1000, 9999)} {digits(4)}",
        "resident_number": lambda: (
            f"{digits(2)}{make.randrange(1, 13):02}{make.randrange(1, 29):02}-{make.choice('12345678')}{digits(6)}"
        ),
    }
    clean = [text for text in demo_documents() if not places(text)][:60]
    assert len(clean) == 60
    missed = dict.fromkeys(KINDS, 0)
    for at, text in enumerate(clean * 10):
        kind = KINDS[at % len(KINDS)]
        what, cut = ways[kind](), make.choice([place for place, one in enumerate(text) if one == " "] or [0])
        planted = f"{text[:cut]} {what} {text[cut:]}"
        hits = found(planted)
        missed[kind] += (kind, what) not in hits
        assert len(hits) <= 1
    assert missed == dict.fromkeys(KINDS, 0)


def test_the_signal_counts_by_kind_and_says_where() -> None:
    texts = pa.array(["", "nothing", "a@b.com, 010-1234-5678 and 가나 c@d.org"], pa.large_string())[1:]
    made = PersonalData().measure(pa.record_batch({"text": texts}))
    assert made["personal_mail"].to_pylist() == [0, 2]
    assert made["personal_phone_kr"].to_pylist() == [0, 1]
    assert made["personal_places"].to_pylist() == [[], [0, 0, 7, 3, 9, 22, 0, 30, 37]]


def test_the_mask_is_fixed_and_leaves_the_rest_of_a_batch_alone() -> None:
    texts = ["plain", "a@b.com 8.8.8.8 한글 010-1234-5678", "", "900101-1234567"]
    made = MaskPersonalData().apply(
        pa.record_batch({"text": pa.array(texts, pa.large_string()), "id": pa.array(range(4))})
    )
    assert made["text"].to_pylist() == ["plain", "[EMAIL] [IP] 한글 [PHONE]", "", "[RESIDENT_NUMBER]"]
    assert made["id"].to_pylist() == [0, 1, 2, 3]


@given(st.lists(st.sampled_from(PIECES), max_size=30).map("".join))
def test_masking_twice_is_masking_once_and_leaves_nothing(text: str) -> None:
    once = masked(text)
    assert masked(once) == once
    assert places(once) == []


@given(st.lists(st.sampled_from(PIECES), max_size=30).map("".join))
def test_gates_and_windows_lose_nothing(text: str) -> None:
    """The fast way over a column is the pattern over each text."""
    whole = [
        (str(one.lastgroup), *one.span())
        for one in personal._NUMBER.finditer(text)
        if personal._is_valid(str(one.lastgroup), one.group())
    ]
    assert list(personal._numbers(text)) == whole
    assert list(personal._mails(text)) == [("mail", *one.span()) for one in personal._MAIL.finditer(text)]
    assert list(personal._places(pa.array(["before", text], pa.large_string())[1:])) == [places(text)]
