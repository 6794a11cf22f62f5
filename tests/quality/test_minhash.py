"""Words, 5-grams and signatures beside what their definitions say."""

from __future__ import annotations

import random
import re
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moai.quality import minhash
from moai.quality.hashes import DocumentHash
from moai.quality.minhash import SIGNATURE, WORDS, MinHash, agreement, shingles
from moai.quality.similar import jaccard
from moai.quality.words import words

pytest.importorskip("rensa")
PIECES = (
    "a",
    "The",
    "é",
    "ß",
    "한국어",
    "가나다라마바사",
    "_",
    "x1",
    "#",
    "…",
    "🙂",
    " ",
    "  ",
    "\n",
    "\u3000",
    "word" * 9,
    "12",
)
TEXTS = st.lists(st.lists(st.sampled_from(PIECES), max_size=30).map("".join), max_size=6)


def column(texts: list[str]) -> pa.Array:
    """A slice of a longer one, as batches come."""
    return pa.array(["before", *texts, "behind"], pa.large_string())[1:-1]


def plain(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text.lower())


@given(TEXTS)
def test_words_are_those_of_the_rules_in_lower_case(texts: list[str]) -> None:
    found, bounds = words(column(texts))
    assert np.diff(bounds).tolist() == [len(plain(text)) for text in texts]
    spelled = [word for text in texts for word in plain(text)]
    assert len({*zip(spelled, found.tolist())}) == len({*spelled}) == len({*found.tolist()})


@given(TEXTS)
def test_shingles_are_word_5_grams_and_few_words_are_one(texts: list[str]) -> None:
    found, ends = shingles(column(texts))
    grams = [
        tuple(gram)
        for text in texts
        for gram in (
            [plain(text)[at : at + 5] for at in range(len(plain(text)) - 4)] if len(plain(text)) >= 5 else [plain(text)]
        )
    ]
    assert len(grams) == len(found) == ends[-1]
    assert len({*zip(grams, found.tolist())}) == len({*grams}) == len({*found.tolist()})


def measured(texts: list[str]) -> dict[str, Any]:
    batch = pa.record_batch([column(texts)], names=["text"])
    return {
        name: values.to_numpy()
        for name, values in {**DocumentHash().measure(batch), **MinHash().measure(batch)}.items()
    }


def test_a_signature_takes_112_bytes_and_depends_on_the_text_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sum(column.value_type.bit_width // 8 for column in MinHash.adds if column.name in SIGNATURE) == 112
    texts = [f"{number} of many words in one text, said {number} times" * (1 + number % 4) for number in range(40)] + [
        "",
        "one",
    ]
    together = measured(texts)
    monkeypatch.setattr(minhash, "_BYTES_AT_ONCE", 100)
    for name, values in measured(texts[::-1]).items():
        assert (values[::-1] == together[name]).all(), name


def test_the_same_words_have_the_same_hash_and_others_another() -> None:
    found = measured(
        ["One  Word\nafter another, here.", "one word after another , here .", "one word after another here"]
    )
    high, low = (found[name].tolist() for name in WORDS)
    assert (high[0], low[0]) == (high[1], low[1]) != (high[2], low[2])
    assert len({*found["content_high"].tolist()}) == 3


def test_agreement_estimates_the_jaccard_similarity() -> None:
    rng, errors = random.Random(1), []
    for share in (0.02, 0.05, 0.1, 0.3):
        for _ in range(40):
            one = [str(rng.randrange(10**6)) for _ in range(400)]
            other = [str(rng.randrange(10**6)) if rng.random() < share / 5 else word for word in one]
            texts = [" ".join(one), " ".join(other)]
            grams, ends = shingles(column(texts))
            true = jaccard(*(np.unique(grams[first:last]) for first, last in ((0, ends[1]), (ends[1], ends[2]))))
            slots = np.column_stack([measured(texts)[name] for name in SIGNATURE])
            errors.append((float(agreement(slots[:1], slots[1:])[0]) - true) / np.sqrt(true * (1 - true) / 112 + 1e-9))
    # Standard deviations from the truth: none, and one of them on average.
    assert abs(np.mean(errors)) < 0.3
    assert 0.7 < np.std(errors) < 1.3
