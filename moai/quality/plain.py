"""The statistics of one text, as their definitions read: the oracle of moai.quality.scan, and what measures without
numba.

A word is `\\w+` or one other character that is no space (words = "unicode"). With the words of another tool the numbers
are those of the rule in that tool: Gopher quality and repetition and FineWeb as datatrove 0.10 computes them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from moai.quality.characters import PUNCTUATION_MARKS, TERMINAL_MARKS

STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")
NAMES = (
    "chars",  # of the text, as all lengths here: code points
    "newlines",
    "words",
    "plain_words",  # that are not all punctuation
    "plain_word_chars",
    "alpha_words",  # with a letter
    "hashes",
    "ellipses",
    "stop_words",  # how many of the eight occur
    "lines",  # of str.splitlines, blank ones too
    "bullet_lines",
    "ellipsis_lines",
    "full_lines",  # between newlines, without blank ones
    "punctuated_lines",
    "short_lines",  # of 30 characters at most
    "dup_full_line_chars",  # of copies; the first of them is none
    "spans",  # between runs of newlines
    "dup_spans",
    "dup_span_chars",
    "paragraphs",  # of the stripped text, between two newlines or more
    "dup_paragraphs",
    "dup_paragraph_chars",
    "hangul",  # syllables
    *(f"top_{n}_gram_chars" for n in (2, 3, 4)),  # the most frequent n-gram, its characters times its number
    *(f"dup_{n}_gram_chars" for n in range(5, 11)),  # of n-grams that were there before, left to right
)
_WORD = re.compile(r"\w+|[^\w\s]")


def words_of(text: str) -> list[str]:
    return _WORD.findall(text)


def statistics(text: str, words: Sequence[str] | None = None) -> list[int]:
    """A number for each of NAMES."""
    found = words_of(text) if words is None else list(words)
    plain = [word for word in found if not PUNCTUATION_MARKS.issuperset(word)]
    lines = text.splitlines()
    full = [line for line in text.split("\n") if line.strip()]
    spans, paragraphs = re.split(r"\n+", text), re.split(r"\n{2,}", text.strip())
    return [
        len(text),
        text.count("\n"),
        len(found),
        len(plain),
        sum(map(len, plain)),
        sum(any(map(str.isalpha, word)) for word in found),
        text.count("#"),
        text.count("...") + text.count("…"),
        len({*STOP_WORDS} & {*found}),
        len(lines),
        sum(line.lstrip().startswith(("•", "-")) for line in lines),
        sum(line.rstrip().endswith(("...", "…")) for line in lines),
        len(full),
        sum(line[-1] in TERMINAL_MARKS for line in full),
        sum(len(line) <= 30 for line in full),
        _copies(full)[1],
        len(spans),
        *_copies(spans),
        len(paragraphs),
        *_copies(paragraphs),
        sum("가" <= character <= "힣" for character in text),
        *(_most_frequent(found, n) for n in (2, 3, 4)),
        *(_said_before(found, n) for n in range(5, 11)),
    ]


def _copies(parts: Sequence[str]) -> tuple[int, int]:
    """How many were there before, and their characters."""
    copies = [part for part, number in Counter(parts).items() for _ in range(number - 1)]
    return len(copies), sum(map(len, copies))


def _most_frequent(words: Sequence[str], n: int) -> int:
    grams = Counter(" ".join(words[at : at + n]) for at in range(len(words) - n + 1))
    (gram, number), *_ = grams.most_common(1) or [("", 0)]
    return len(gram) * number


def _said_before(words: Sequence[str], n: int) -> int:
    seen: set[str] = set()
    at = chars = 0
    while at + n <= len(words):
        gram = "".join(words[at : at + n])
        if gram in seen:
            chars, at = chars + len(gram), at + n
        else:
            seen.add(gram)
            at += 1
    return chars
