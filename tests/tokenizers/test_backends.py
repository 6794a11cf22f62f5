"""fastokens: the ids of the reference or a refusal, for every shape of tokenizer, on real documents and on what has
broken others.
"""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections import Counter
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from tokenizer_shapes import REFUSED, ROOT, SHAPES, VARIANTS, WRONG, Shape

from moai.core.config import resolve
from moai.core.errors import ConfigError
from moai.engine.pipeline import Tally, _tally
from moai.pretraining import options
from moai.pretraining.options import DataConfig
from moai.pretraining.tokenizer_backend import choose
from moai.tokenizers.backends import BACKENDS, Fastokens, Ids, Offsets, Reference, make
from moai.tokenizers.load import load_tokenizer
from moai.transforms.tokenize import Tokenize

sys.path.append(str(ROOT / "benchmarks"))
from nasty import nasty

SHORT = 5000
"""Characters of a nasty text that the variants of tokenizers are asked, but for these; the shapes are asked all of
it.
"""
NEVER_SHORT = ("the first plane", "each new letter")

TOO_LONG = "added white space"
"""With this one the reference itself takes all memory on the texts at full length."""
TOO_DEEP = {("1M spaces", "add_prefix_space"), ("1M spaces", "Digits")}
"""Texts that fastokens refuses with such a tokenizer: its regular expressions go too deep."""


# ---- ids


@pytest.fixture(scope="session")
def expected(shape: Shape) -> Callable[..., tuple[list[str], list[str], Ids, Offsets]]:
    """The nasty texts for a tokenizer, and what the reference makes of them."""

    @cache
    def of(name: str, *, short: bool) -> tuple[list[str], list[str], Ids, Offsets]:
        reference = Reference(spec=load_tokenizer(str(shape(name))))
        table = nasty(reference.special_tokens())
        texts = [
            text if not short or key in NEVER_SHORT or (key, name) in TOO_DEEP else text[:SHORT]
            for key, text in table.items()
        ]
        return texts, [*table], *reference.encode_batch(texts)

    return of


def run_as_chosen(folder: Path, texts: list[str]) -> tuple[list[list[int]], Counter[str]]:
    """What a preparation does with `texts`: the ids without EOS, and the counters."""
    chosen = choose(DataConfig(), load_tokenizer(str(folder)), [], [])
    assert chosen.backend.made_by()["tokenizer"] == "fastokens", chosen.reason
    tally = Tally()
    token = _tally.set(tally)
    try:
        batch = pa.record_batch([pa.array(texts, pa.large_string())], names=["text"])
        [tokens] = [
            done["tokens"] for done in Tokenize(backend=chosen.backend, reference=chosen.reference)(iter([batch]))
        ]
    finally:
        _tally.reset(token)
    flat, offsets = tokens.values.to_numpy(), tokens.offsets.to_numpy()
    return [flat[start : end - 1] for start, end in itertools.pairwise(offsets)], tally.counts


def check_equal(folder: Path, wanted: tuple[list[str], list[str], Ids, Offsets]) -> int:
    """How many texts fastokens refused; the ids of all are the reference's."""
    texts, names, ids, offsets = wanted
    found, counts = run_as_chosen(folder, texts)
    assert [
        name
        for name, ours, start, end in zip(names, found, offsets, offsets[1:])
        if not np.array_equal(ours, ids[start:end])
    ] == []
    return counts["backend.refused"]


@pytest.mark.parametrize("name", SHAPES)
def test_nasty_texts_get_the_ids_of_the_reference(shape: Shape, expected: Callable[..., Any], name: str) -> None:
    wanted = expected(name, short=False)
    assert check_equal(shape(name), wanted) < len(wanted[0]) // 4  # fastokens was asked, not the reference alone
    assert sum(len(text) for text in wanted[0]) > 5_000_000


@pytest.mark.parametrize(
    ("name", "short"),
    [
        *((name, True) for name in VARIANTS),
        *(pytest.param(name, False, marks=pytest.mark.long) for name in VARIANTS if name != TOO_LONG),
    ],
)
def test_variants_of_tokenizers_get_the_ids_of_the_reference(
    shape: Shape, expected: Callable[..., Any], name: str, short: bool
) -> None:
    refused = check_equal(shape(name), expected(name, short=short))
    assert refused >= sum(name == deep for _, deep in TOO_DEEP)


@pytest.mark.parametrize("name", SHAPES)
def test_every_shipped_document_gets_the_ids_of_the_reference(shape: Shape, documents: list[str], name: str) -> None:
    spec = load_tokenizer(str(shape(name)))
    ids, offsets = Reference(spec=spec).encode_batch(documents)
    assert len(offsets) == len(documents) + 1 > 700
    found, found_offsets = Fastokens(spec=spec).encode_batch(documents)
    assert found.dtype == ids.dtype == np.uint16
    assert np.array_equal(found_offsets, offsets)
    assert np.array_equal(found, ids)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ids_are_flat_in_the_type_of_the_vocabulary_and_empty_batches_are_none(shape: Shape, backend: str) -> None:
    tokenizer = make(backend, load_tokenizer(str(shape("llama3"))), split_special_tokens=False)
    for texts, lengths in (([], []), ([""], [0]), (["", "a", "", "bc d"], [0, 1, 0, None])):
        ids, offsets = tokenizer.encode_batch(texts)
        assert (ids.dtype, offsets.dtype, offsets[0], offsets[-1]) == (np.uint16, np.int64, 0, len(ids))
        said = zip(np.diff(offsets).tolist(), lengths, strict=True)
        assert all(number in (found, None) for found, number in said)


def test_a_lone_surrogate_is_refused(shape: Shape) -> None:
    """No text of the pipeline holds one; a backend that took it for something else would be wrong in silence."""
    with pytest.raises(Exception, match=r"surrogate|str"):
        Fastokens(spec=load_tokenizer(str(shape("llama3")))).encode_batch(["fine", "lone \ud800"])


@pytest.mark.parametrize("name", [*WRONG, *REFUSED])
def test_a_tokenizer_it_does_not_know_is_refused_or_found_by_the_probe(shape: Shape, name: str) -> None:
    """Flags of added tokens are not for everyone, and one that is in the vocabulary too has two ids."""
    chosen = choose(DataConfig(), load_tokenizer(str(shape(name))), [], [])
    assert isinstance(chosen.backend, Reference)
    found = f"fastokens {version('fastokens')} gave other ids ("
    assert (found if name in WRONG else "fastokens does not take this tokenizer: ") in chosen.reason


# ---- offsets


@pytest.mark.parametrize("name", ["wordpiece", "gpt2", "llama3"])
def test_offsets_give_the_text_of_every_id(shape: Shape, documents: list[str], name: str) -> None:
    reference = Reference(spec=load_tokenizer(str(shape(name))))
    texts = [
        *documents[::40],
        "대한민국의 주권은 국민에게 있고, 모든 권력은 국민으로부터 나온다.",
        "Moai 모아이가 3.14배 빠르다! (e = mc²)",
        "",
        " \n",
        "👍🏽 emoji 이모지",
    ]
    assert sum("가" <= letter <= "힣" for text in texts for letter in text) > 1000
    ids, offsets, spans = reference.encode_with_offsets(texts)
    plain, plain_offsets = reference.encode_batch(texts)
    assert np.array_equal(ids, plain)
    assert np.array_equal(offsets, plain_offsets)
    assert spans.shape == (len(ids), 2)
    pieces = {
        index: piece
        for piece, index in json.loads((shape(name) / "tokenizer.json").read_bytes())["model"]["vocab"].items()
    }
    compared = 0
    for text, start, end in zip(texts, offsets, offsets[1:]):
        at = 0
        for index, (first, last) in zip(ids[start:end].tolist(), spans[start:end].tolist()):
            assert 0 <= first <= last <= len(text)
            said = text[first:last]
            if name == "wordpiece":
                assert pieces[index] in (said, f"##{said}", "[UNK]")
                assert text[at:first].strip(" \n\t\r\u00a0\u3000\u200b\ufeff") == "" or not text[at:first].isprintable()
                compared += pieces[index] != "[UNK]"
            elif "\ufffd" not in (decoded := reference.decode([index])):  # an id may hold a part of a letter's bytes
                assert decoded == said
                compared += 1
            at = last
        assert name == "wordpiece" or at == len(text)
    assert compared > 0.8 * len(ids)


def test_a_backend_that_is_gone_is_refused_with_those_there_are(tmp_path: Path) -> None:
    assert ("auto", *BACKENDS) == options.BACKENDS
    file = tmp_path / "run.yaml"
    file.write_text("tokenizer_backend: tiktoken\n")
    said = f"tokenizer_backend = 'tiktoken' (file {file}): choose from auto, tokenizers, fastokens"
    with pytest.raises(ConfigError, match=re.escape(said)):
        resolve([DataConfig], ["--config", str(file)], {}, prog="x", description="")
