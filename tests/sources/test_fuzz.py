"""Input and manifests made wrong at random: every line is kept exactly or named with its place, every manifest is the
one that was written or none.

What is right of a line is judged here anew, by the standard library's reader and the rules of docs/cache.md. Of several
defects of one line any may be named.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import zstandard

from moai.core.errors import DamagedError
from moai.core.files import digest_json
from moai.prepared.manifest import MANIFEST, Prepared

PrepareIt = Callable[..., Prepared]

MAX_DOC_BYTES = 3000
DEEPEST = 1024
EXPLAINED = 500
"""In what nests deeper than this, a broken record is just that: no reason depends on how deep a reader's own stack
is.
"""
BOM = b"\xef\xbb\xbf"
LINES = 2500

# ---- what is right


@dataclass(frozen=True)
class Line:
    """One that is not blank: its text, or the reasons any of which sets it aside."""

    number: int
    offset: int
    text: str | None = None
    reasons: frozenset[str] = frozenset()


def judged(data: bytes) -> list[Line]:
    """Every line that is not blank."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(20_000)  # 1,200 levels are read here
    try:
        return list(_judged(data))
    finally:
        sys.setrecursionlimit(before)


def _judged(data: bytes) -> Iterator[Line]:
    offset = 0
    for number, line in enumerate(data.split(b"\n"), 1):
        found = judge(line)
        if isinstance(found, str):
            yield Line(number, offset, text=found)
        elif found is not None:
            yield Line(number, offset, reasons=frozenset(found))
        offset += len(line) + 1


def judge(line: bytes) -> str | set[str] | None:
    """The text; or why there is none; None of a blank line."""
    if len(line) > MAX_DOC_BYTES:
        return {"too large"}
    if not line.strip():
        return None
    try:
        text = line.removeprefix(BOM).decode("utf-8")
    except UnicodeDecodeError:
        return {"invalid UTF-8"}
    depth = _depth(text)
    defects = {"too deep"} if depth > DEEPEST else set()
    try:
        value = json.loads(
            text,
            object_pairs_hook=Pairs,
            parse_constant=_constant(defects),
            parse_float=_number(defects),
            parse_int=_number(defects),
        )
    except json.JSONDecodeError:
        return (
            defects
            | {"broken JSON"}
            | ({"lone surrogate"} if depth > EXPLAINED and re.search(r"\\u[dD]", text) else set())
        )
    if any(_is_lone(string) for string in _strings(value)):
        defects.add("lone surrogate")
    if defects:
        return defects | ({"broken JSON"} if depth > EXPLAINED else set())
    if not isinstance(value, Pairs):
        return {"not an object"}
    row = dict(value)
    if "text" not in row:
        return {"no text"}
    found = row["text"]
    return found if isinstance(found, str) else {"null text"} if found is None else {"text is no string"}


class Pairs(list[tuple[str, Any]]):
    """An object with all of its keys, doubled ones too."""


def _constant(defects: set[str]) -> Callable[[str], float]:
    return lambda name: defects.add("NaN") or 0.0  # type: ignore[func-returns-value]


def _number(defects: set[str]) -> Callable[[str], float]:
    def read(digits: str) -> float:
        if math.isinf(float(digits)):
            defects.add("broken JSON")
        return 0.0

    return read


def _depth(text: str) -> int:
    depth = deepest = 0
    for mark in re.findall(r'"(?:[^"\\]|\\.)*"?|[\[\]{}]', text, re.DOTALL):
        depth += (mark in "[{") - (mark in "]}")
        deepest = max(deepest, depth)
    return deepest


def _strings(value: Any) -> Iterator[str]:
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, list | tuple):  # objects are lists of pairs
            waiting += value


def _is_lone(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


# ---- what is wrong

WORDS = [
    "plain words",
    "그리고 문서",
    "日本",
    "\U0001f600",
    '"quoted"',
    "back\\slash",
    "tab\t",
    "line\n",
    "\u2028",
    "\x7f",
    "a\0b",
    "  ",
    "é",
    "{[",
    "<|",
    "\r",
    "0",
]
VALUES = [
    "NaN",
    "-Infinity",
    "Infinity",
    "null",
    "true",
    "5",
    "-0.5e-7",
    "1e999",
    "9" * 400,
    "12345678901234567890123",
    "01",
    "-",
    "1.",
    ".5",
    "[]",
    "{}",
    '["a"]',
    '"\\ud800"',
    '"\\udc00\\ud800"',
    '"\\ud83d\\ude00"',
    '"\\u12"',
    '"\\x41"',
    "None",
    "'a'",
    '"\x01"',
    "\x0b1",
    "{",
    "1 2",
    "",
]
BYTES = [
    b"\0",
    b"\xff",
    b"\xc0\xaf",
    b"\xed\xa0\x80",
    b"\xea\xb0",
    b"\n",
    b"\r",
    BOM,
    b'"',
    b"\\",
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"\x0c",
    b" ",
    b"\x80",
]

Change = Callable[[random.Random, bytes], bytes]


def _flip(choose: random.Random, line: bytes) -> bytes:
    at = choose.randrange(len(line))
    return line[:at] + bytes([line[at] ^ 1 << choose.randrange(8)]) + line[at + 1 :]


def _cut(choose: random.Random, line: bytes) -> bytes:
    start, end = sorted((choose.randrange(len(line) + 1), choose.randrange(len(line) + 1)))
    return choose.choice([line[:start], line[end:], line[:start] + line[end:]])


def _insert(choose: random.Random, line: bytes) -> bytes:
    at = choose.randrange(len(line) + 1)
    return line[:at] + choose.choice(BYTES) * choose.choice([1, 1, 1, 2, 50]) + line[at:]


def _value(choose: random.Random, line: bytes) -> bytes:
    key = choose.choice(["text", "text", "n", "Text", "\\ud800", "te\\u0078t"])
    added = f'"{key}": {choose.choice(VALUES)}'.encode()
    return choose.choice([b"{" + added + b"}", line[:-1] + b", " + added + b"}", b"{" + added + b", " + line[1:]])


def _deep(choose: random.Random, line: bytes) -> bytes:
    levels = choose.choice([5, 300, *range(DEEPEST - 3, DEEPEST + 3), 1200])
    left, right = choose.choice([(b"[", b"]"), (b"[", b""), (b"[", b"}")])
    inner = left * levels, right * levels
    return line.join(inner) if choose.random() < 0.5 else line[:-1] + b', "n": ' + b"".join(inner) + b"}"


def _long(choose: random.Random, line: bytes) -> bytes:
    size = MAX_DOC_BYTES + choose.choice([-1, 0, 1, 2, 5000])
    pad = max(0, size - len(line))
    return choose.choice(
        [
            line[:-2] + b"x" * pad + line[-2:],
            b" " * pad + line,
            line + b" " * pad,
            b" " * size,
            line[:-1] + b"\r" * pad + line[-1:],
        ]
    )


def _other(choose: random.Random, line: bytes) -> bytes:
    return choose.choice(
        [
            b"",
            b"\r",
            b" \t",
            b"\x0c",
            BOM,
            BOM * 2,
            b"null",
            b'"a"',
            b"5",
            b"[]",
            b"{}",
            line + line,
            line[::-1],
            line + b"\r",
            BOM + line,
            BOM * 2 + line,
            line.decode("utf-8", "replace").encode("utf-16-le"),
            line.decode("utf-8", "replace").encode("cp949", "replace"),
            choose.randbytes(60),
        ]
    )


CHANGES: list[Change] = [_flip, _cut, _insert, _value, _deep, _long, _other]


def fuzzed(choose: random.Random, lines: int) -> bytes:
    """About half of them are as they should be."""
    made = []
    for number in range(lines):
        text = " ".join(choose.choices(WORDS, k=choose.choice([0, 1, 3, 8, 40]))) + (f" {number}" if number % 9 else "")
        line = json.dumps(
            {"text": text, **({"n": number} if number % 3 else {})}, ensure_ascii=number % 2 == 0
        ).encode()
        for _ in range(choose.choice([0, 0, 0, 1, 1, 1, 3])):
            line = choose.choice(CHANGES)(choose, line or b"{}")
        made.append(line)
    return b"\n".join(made) + choose.choice([b"\n", b""])


def frames(choose: random.Random, data: bytes) -> bytes:
    cuts = sorted(choose.randrange(len(data)) for _ in range(5))
    return b"".join(zstandard.compress(data[start:end]) for start, end in zip([0, *cuts], [*cuts, len(data)]))


def check_lines(folder: Path, seed: int, prepare: PrepareIt, texts: Callable[[Prepared], list[str]]) -> Counter[str]:
    """Prepare one file in four ways. Returns how often each reason was given."""
    choose = random.Random(seed)
    data = fuzzed(choose, LINES)
    lines = judged(data)
    kept = [line.text for line in lines if line.text is not None and line.text.strip()]
    blank = sum(line.text is not None and not line.text.strip() for line in lines)
    bad = [line for line in lines if line.reasons]
    reasons: Counter[str] = Counter()
    for name, content in (("a.jsonl", data), ("a.jsonl.zst", frames(choose, data))):
        (folder / name).write_bytes(content)
        for shard_bytes in (20_011, 10**9):
            cache = folder / f"cache-{name}-{shard_bytes}"
            given = {
                "max_doc_bytes": MAX_DOC_BYTES,
                "max_bad_ratio": 1.0,
                "text_column": "text",
                "tokenizer_backend": "tokenizers",
                "cache_dir": str(cache),
            }
            prepared = prepare(folder / name, shard_bytes=shard_bytes, **given)
            assert (len(prepared.content["shards"]) > 5) == (shard_bytes < len(data))
            entries = [json.loads(entry) for entry in (prepared.path / "quarantine.jsonl").read_bytes().splitlines()]
            assert [(entry["file"], entry["line"], entry["offset"]) for entry in entries] == [
                (name, line.number, line.offset) for line in bad
            ]
            assert [(entry, line) for entry, line in zip(entries, bad) if entry["reason"] not in line.reasons] == []
            assert texts(prepared) == kept
            assert prepared.content["records"] == {
                "read": len(lines),
                "kept": len(kept),
                "filtered": blank,
                "quarantined": len(bad),
            }
            found = Counter(entry["reason"] for entry in entries)
            assert reasons in (Counter(), found)
            reasons = found
    assert len(kept) > LINES // 4
    return reasons


REASONS = {
    "broken JSON",
    "invalid UTF-8",
    "NaN",
    "too deep",
    "lone surrogate",
    "not an object",
    "no text",
    "null text",
    "text is no string",
    "too large",
}


def test_of_fuzzed_lines_none_is_lost_and_every_bad_one_is_named(
    tmp_path: Path, prepare: PrepareIt, texts: Callable[[Prepared], list[str]]
) -> None:
    reasons = check_lines(tmp_path, 0, prepare, texts)
    assert reasons.keys() == REASONS


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_of_a_hundred_thousand_fuzzed_lines_none_is_lost(
    tmp_path: Path, prepare: PrepareIt, texts: Callable[[Prepared], list[str]], record: Callable[..., None]
) -> None:
    reasons: Counter[str] = Counter()
    for seed in range(1000, 1000 + 100_000 // LINES):
        (tmp_path / str(seed)).mkdir()
        reasons += check_lines(tmp_path / str(seed), seed, prepare, texts)
    record(
        "JSON lines fuzzed",
        100_000,
        f"every good text kept exactly, {sum(reasons.values()):,} set aside with line, offset and reason, plain and "
        f"compressed, in 1 shard and in many",
    )


# ---- manifests

ODD: list[Any] = [
    None,
    True,
    -1,
    0,
    1.5,
    10**30,
    10**1000,
    "",
    "../x",
    "/etc/passwd",
    "a\0b",
    "x" * 300,
    "\ud800",
    [],
    {},
    [[]],
    {"": {}},
    "data-00000-of-00001.arrow",
    MANIFEST,
]


def check_manifests(made: Path, cases: int, seed: int) -> Counter[str]:
    """Change the manifest `cases` times, each time anew. Returns how often it opened and was refused."""
    file, choose, outcomes = made / MANIFEST, random.Random(seed), Counter[str]()
    whole = file.read_bytes()
    original = Prepared.open(made).content
    for _ in range(cases):
        change = choose.choice([_as_bytes, _as_text, _as_json, _resealed])
        data = change(choose, whole)
        file.write_bytes(data)
        try:
            content = Prepared.open(made).content
        except DamagedError as error:
            refused = str(error)
        else:
            refused = ""
        if refused:
            assert str(made) in refused
            assert data != whole
            outcomes["refused"] += 1
            continue
        if (
            change is _resealed
        ):  # by whoever knows how digests are made: then it is what he wrote, and names what is there
            assert content == json.loads(data)["content"]
            assert all(
                (made / entry["file"]).stat().st_size == entry["bytes"]
                for entry in [*content["shards"], *content["files"]]
                if entry["file"]
            )
            outcomes["resealed and of the right shape"] += 1
        else:
            assert data == whole
            assert content == original
            outcomes["unchanged"] += 1
    file.write_bytes(whole)
    assert Prepared.open(made).content == original
    return outcomes


def _as_bytes(choose: random.Random, whole: bytes) -> bytes:
    for _ in range(choose.choice([1, 1, 1, 2, 5])):
        whole = choose.choice([_flip, _cut, _insert])(choose, whole or b"{")
    return whole


def _as_text(choose: random.Random, whole: bytes) -> bytes:
    """Another spelling, a doubled key, a value that no reader takes."""
    lines = whole.decode().split("\n")
    at = choose.randrange(1, len(lines) - 1)
    key, colon, _ = lines[at].partition(": ")
    line = choose.choice(
        [
            "",
            lines[at] + "\n" + lines[at],
            " " + lines[at],
            lines[at] + " ",
            lines[at].upper(),
            key + colon + choose.choice(VALUES) + ",",
            key + colon + "9" * 5000 + ",",
            key + colon + "[" * 5000 + ",",
            f"{key}{colon}1,\n{lines[at]}",
            lines[at].replace(":", " :"),
            "\r",
        ]
    )
    return "\n".join([*lines[:at], line, *lines[at + 1 :]]).encode("utf-8", "surrogatepass")


def _as_json(choose: random.Random, whole: bytes) -> bytes:
    manifest = json.loads(whole)
    _edit(choose, manifest)
    return _written(manifest)


def _resealed(choose: random.Random, whole: bytes) -> bytes:
    manifest = json.loads(whole)
    del manifest["self_digest"]
    _edit(choose, manifest["content"])
    manifest["content_digest"] = digest_json(manifest["content"])
    return _written({**manifest, "self_digest": digest_json(manifest)})


def _written(manifest: Any) -> bytes:
    return json.dumps(manifest, indent=1, ensure_ascii=False, sort_keys=True).encode("utf-8", "surrogatepass")


def _edit(choose: random.Random, inside: Any) -> None:
    """One value becomes another, goes, or comes twice."""
    while True:
        keys = list(inside) if isinstance(inside, dict) else list(range(len(inside)))
        key = choose.choice(keys)
        if not isinstance(inside[key], dict | list) or not inside[key] or choose.random() < 0.2:
            break
        inside = inside[key]
    value = inside[key]
    if choose.random() < 0.15:
        del inside[key]
    elif choose.random() < 0.15:
        inside.append(copy.deepcopy(value)) if isinstance(inside, list) else inside.update({f"{key}'": value})
    else:
        changed = (
            [value + choose.choice([-1, 1, 10**6]), -value, float(value), str(value)] if isinstance(value, int) else []
        )
        with contextlib.suppress(OverflowError):
            inside[key] = choose.choice([*changed, *ODD, [value], {"a": value}])


@pytest.fixture
def made(tmp_path: Path, prepare: PrepareIt) -> Path:
    lines = [json.dumps({"text": f"document {number} " + "word " * 30}) for number in range(12)]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, '{"text": broken', ""]))
    return prepare(tmp_path / "a.jsonl", shard_bytes=1200).path


def test_a_changed_manifest_is_refused_and_nothing_worse(made: Path) -> None:
    outcomes = check_manifests(made, 2000, seed=1)
    assert outcomes["refused"] > 1500
    assert outcomes["resealed and of the right shape"] > 20


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_a_hundred_thousand_changed_manifests_are_refused(made: Path, record: Callable[..., None]) -> None:
    outcomes = check_manifests(made, 100_000, seed=2)
    assert sum(outcomes.values()) == 100_000
    record("manifest fuzzed", 100_000, ", ".join(f"{number:,} {outcome}" for outcome, number in outcomes.most_common()))
