"""Personal data in a text: where it stands, and the mask that takes its place.

    kind             found
    mail             hong@example.com, 홍길동@회사.한국
    ipv4, ipv6       public addresses of hosts (ipaddress.is_global; of IPv6 the global unicast block 2000::/3)
    phone_kr         mobile and land lines of Korea with area code, in their own form or with +82
    phone            international (+ and 8 to 15 digits, E.164), and (202) 555-0143 of North America
    resident_number  of Korea: a valid date, a first digit of 1 to 8. The check digit is not asked for, because numbers
                     given since October 2020 have none; only where the dash is left out it must be right

A name, an address or the number of an account is not looked for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.compute as pc

from moai.engine.part import Map, Signal
from moai.engine.schema import Column

KINDS = ("mail", "ipv4", "ipv6", "phone_kr", "phone", "resident_number")
MASKS = {
    "mail": "[EMAIL]",
    "ipv4": "[IP]",
    "ipv6": "[IP]",
    "phone_kr": "[PHONE]",
    "phone": "[PHONE]",
    "resident_number": "[RESIDENT_NUMBER]",
}
"""One for each kind, whatever stood there: nothing in it is personal data again."""
Place = tuple[str, int, int]
"""Kind, first character, and the one behind the last."""

_DAYS = "(?:(?:0[13578]|1[02])(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)(?:0[1-9]|[12][0-9]|30)|02(?:0[1-9]|[12][0-9]))"
_SEP, _BYTE = r"[-. \u2013]", "(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
# The order decides where two begin at one place.
_NUMBERS = {
    "resident_number": rf"[0-9]{{2}}{_DAYS}(?: ?[-\u2013] ?)?[1-8][0-9]{{6}}",
    "ipv4": rf"{_BYTE}(?:\.{_BYTE}){{3}}",
    "ipv6": r"[23][0-9A-Fa-f]{3}:(?:[0-9A-Fa-f]{0,4}:){1,6}[0-9A-Fa-f]{0,4}",
    "phone_kr": (
        rf"(?:\+82{_SEP}?(?:\(0\))?0?|0)(?:1[016789]{_SEP}?[0-9]{{3,4}}{_SEP}?[0-9]{{4}}"
        rf"|(?:2|[3-6][1-5]|70|50[0-9]?|80){_SEP}[0-9]{{3,4}}{_SEP}[0-9]{{4}})"
        rf"|\(?0(?:2|[3-6][1-5]|70|50[0-9]?|80|1[016789])\) ?[0-9]{{3,4}}{_SEP}[0-9]{{4}}"
    ),
    "phone": (
        rf"\+[1-9][0-9]{{0,2}}(?:[0-9]{{7,12}}|{_SEP}?(?:\(0\))?\(?[0-9]{{1,4}}\)?(?:{_SEP}[0-9]{{2,8}}){{1,4}})"
        r"|(?:\([2-9][0-9]{2}\) ?|[2-9][0-9]{2}[-.])[2-9][0-9]{2}[-.][0-9]{4}"
    ),
}
# A letter of Hangul may stand right before or behind; a Latin letter, or a digit beyond a dot or dash, may not.
_BEFORE, _BEHIND = r"(?<![0-9A-Za-z_])(?<![0-9][-.])", r"(?![0-9A-Za-z_])(?![-.][0-9])"
_NUMBER = re.compile(f"{_BEFORE}(?:{'|'.join(f'(?P<{kind}>{one})' for kind, one in _NUMBERS.items())}){_BEHIND}")
_NUMBER_GATE = "|".join(_NUMBERS.values()).replace(r"\u2013", "\u2013")
"""Without borders: which texts may hold any, asked by RE2 at some hundred MB/s."""
_RUN = re.compile(r"[0-9+(][0-9 .()+:a-fA-F\u2013-]{6,}")
"""Every number lies within one of these."""
_MAIL = re.compile(
    r"(?:[A-Za-z0-9_](?:[A-Za-z0-9_.+%-]{0,62}[A-Za-z0-9_+-])?|[가-힣]{1,64})@"
    r"(?:(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}(?![A-Za-z0-9_])|(?:[\w-]{1,63}\.){1,8}(?:한국|닷컴|닷넷|中国|中國|рф))"
)
_MOST_BEFORE, _MOST_BEHIND = 64, 320
_CHECK_WEIGHTS = (2, 3, 4, 5, 6, 7, 8, 9, 2, 3, 4, 5)


@dataclass(frozen=True)
class PersonalData(Signal):
    """How often each kind stands in a text, and where: kind, begin and end of each, one after the other, in code
    points of the text as it is before it is masked.
    """

    needs: ClassVar[tuple[str, ...]] = ("text",)
    adds: ClassVar[tuple[Column, ...]] = (
        *(Column(f"personal_{kind}", "uint32", per="document") for kind in KINDS),
        Column("personal_places", "list<uint32>", per="document"),
    )

    def measure(self, batch: pa.RecordBatch) -> dict[str, Any]:
        found = list(_places(batch["text"]))
        counts = {kind: [sum(one == kind for one, _, _ in places) for places in found] for kind in KINDS}
        flat = [[number for kind, *ends in places for number in (KINDS.index(kind), *ends)] for places in found]
        return {
            **{f"personal_{kind}": pa.array(number, pa.uint32()) for kind, number in counts.items()},
            "personal_places": pa.array(flat, pa.list_(pa.uint32())),
        }


@dataclass(frozen=True)
class MaskPersonalData(Map):
    """Puts the mask of its kind in place of all personal data. What is masked already stays as it is."""

    needs: ClassVar[tuple[str, ...]] = ("text",)
    seen_by: ClassVar[type[Signal]] = PersonalData
    """What measures the text before it is changed."""

    def apply(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        texts = batch["text"]
        found = list(_places(texts))
        made = [masked(text.as_py(), places) for text, places in zip(texts, found, strict=True) if places]
        changed = pc.replace_with_mask(texts, pa.array([bool(places) for places in found]), pa.array(made, texts.type))
        return batch.set_column(batch.schema.get_field_index("text"), "text", changed)


def masked(text: str, found: list[Place] | None = None) -> str:
    """The text with a mask for all that is found, and for what is found in that again: masking twice is masking
    once.
    """
    found = places(text) if found is None else found
    while found:
        edges = [0, *(edge for _, first, last in found for edge in (first, last)), len(text)]
        kept = [text[first:last] for first, last in zip(edges[::2], edges[1::2], strict=True)]
        text = "".join(part for pair in zip(kept, (*(MASKS[kind] for kind, _, _ in found), "")) for part in pair)
        found = places(text)
    return text


def places(text: str) -> list[Place]:
    """All personal data of a text, in order; of two that overlap the one that begins first."""
    return _apart([*_mails(text), *_numbers(text)])


def _places(texts: pa.Array) -> Iterator[list[Place]]:
    """The same for a column; a text that cannot hold any is not made a string of Python."""
    gates = (pc.match_substring_regex(texts, _NUMBER_GATE), pc.match_substring(texts, "@"))
    for text, number, mail in zip(texts, *(gate.to_pylist() for gate in gates), strict=True):
        if number or mail:
            text = text.as_py()
            yield _apart([*(_mails(text) if mail else ()), *(_numbers(text) if number else ())])
        else:
            yield []


def _apart(found: list[Place]) -> list[Place]:
    apart: list[Place] = []
    for kind, first, last in sorted(found, key=lambda place: (place[1], -place[2])):
        if not apart or first >= apart[-1][2]:
            apart.append((kind, first, last))
    return apart


def _mails(text: str) -> Iterator[Place]:
    """What _MAIL finds, looked for around each @ alone."""
    at = text.find("@")
    last = 0
    while at >= 0:
        if at and (text[at - 1].isalnum() or text[at - 1] in "_+-") and text.find(".", at, at + _MOST_BEHIND) > 0:
            found = _MAIL.search(text, max(last, at - _MOST_BEFORE), at + _MOST_BEHIND)
            if found and found.start() < at:
                yield "mail", found.start(), (last := found.end())
        at = text.find("@", max(at + 1, last))


def _numbers(text: str) -> Iterator[Place]:
    for run in _RUN.finditer(text):
        for found in _NUMBER.finditer(text, run.start(), run.end() + 2):
            kind = str(found.lastgroup)
            if _is_valid(kind, found.group()):
                yield kind, *found.span()


def _is_valid(kind: str, found: str) -> bool:
    if kind in ("ipv4", "ipv6"):
        return _is_public(found)
    digits = [int(one) for one in found if one.isdigit()]
    if kind == "resident_number":
        check = (11 - sum(map(int.__mul__, digits, _CHECK_WEIGHTS)) % 11) % 10
        return len(found) > len(digits) or check == digits[-1]
    return kind == "phone_kr" or len(digits) >= 8


def _is_public(address: str) -> bool:
    try:
        return ip_address(address).is_global and not address.endswith(".0.0")  # 6.0.0.0 is a version
    except ValueError:
        return False
