"""Where ids stand in their text, from the bytes they spell: as the reference says, or it is seen that they do not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from moai.tokenizers.backends import Reference
from moai.tokenizers.load import load_tokenizer
from moai.tokenizers.spelling import Spelling

DEMO = Path(__file__).parents[2] / "tokenizers" / "demo"


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference(spec=load_tokenizer(str(DEMO)))


def spelling_of(reference: Reference) -> Spelling:
    found = Spelling.of(reference.spec.path, reference.spec.digest)
    assert isinstance(found, Spelling)
    return found


@given(st.text())
@example("한글 자모 ㅋㅋ 각\u11a8 e\u0301\u0000\r\n\u2028 \u00a0 👩‍👩‍👧")
@example("<|im_start|>user\n <s> </s><|endoftext|>")
@example("")
def test_places_are_the_references(reference: Reference, text: str) -> None:
    spelling = spelling_of(reference)
    ids, _, places = reference.encode_with_offsets([text])
    ends = spelling.ends(ids)
    assert spelling.spells(ids, ends, text.encode())
    before = [len(text[:at].encode()) for at in range(len(text) + 1)]
    # The reference counts characters: one that a token is a part of counts as a whole.
    for (start, end), last, length in zip(places.tolist(), ends.tolist(), spelling.lengths[ids].tolist()):
        assert before[start] <= last - length < last <= before[end]


def test_ids_that_spell_another_text_are_seen(reference: Reference) -> None:
    spelling = spelling_of(reference)
    ids, _ = reference.encode_batch(["one two three"])
    assert spelling.spells(ids, spelling.ends(ids), b"one two three")
    for wrong in (b"one two thref", b"one two thre", b"one two three ", b""):
        assert not spelling.spells(ids, spelling.ends(ids), wrong)
    assert not spelling.spells(ids[::-1], spelling.ends(ids[::-1]), b"one two three")


def test_an_id_without_bytes_spells_nothing(reference: Reference) -> None:
    """Its place would be anyone's guess."""
    spelling = spelling_of(reference)
    lengths = spelling.lengths.copy()
    lengths[300] = 0
    ids = np.array([300, 301])
    without = Spelling(spelling.content, spelling.begins, lengths)
    text = spelling.content[spelling.begins[301] : spelling.begins[301] + lengths[301]].tobytes()
    assert not without.spells(ids, without.ends(ids), text)


def _level(**options: Any) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True, **options}


def _swallows(model: dict[str, Any]) -> None:
    model["added_tokens"][0]["rstrip"] = True


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"post_processor": _level(trim_offsets=True)}, "trim_offsets"),
        ({"pre_tokenizer": _level(add_prefix_space=True)}, "add_prefix_space"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "not byte-level"),
        (
            {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}, _level()]}},
            "Whitespace may drop",
        ),
        ({"normalizer": {"type": "NFKC"}}, "NFKC may change"),
        ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}}, "Lowercase"),
        (_swallows, "lstrip, rstrip"),
    ],
)
def test_a_tokenizer_whose_places_are_not_its_bytes_is_refused(tmp_path: Path, change: Any, said: str) -> None:
    model = json.loads((DEMO / "tokenizer.json").read_text())
    if callable(change):
        change(model)
    else:
        model |= change
    (tmp_path / "tokenizer.json").write_text(json.dumps(model))
    (tmp_path / "tokenizer_config.json").write_bytes((DEMO / "tokenizer_config.json").read_bytes())
    spec = load_tokenizer(str(tmp_path))
    found = Spelling.of(spec.path, spec.digest)
    assert isinstance(found, str)
    assert said in found


def test_another_normal_form_is_seen_text_by_text(tmp_path: Path) -> None:
    model = json.loads((DEMO / "tokenizer.json").read_text()) | {"normalizer": {"type": "NFC"}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(model))
    (tmp_path / "tokenizer_config.json").write_bytes((DEMO / "tokenizer_config.json").read_bytes())
    reference = Reference(spec=load_tokenizer(str(tmp_path)))
    spelling = spelling_of(reference)
    for text, is_spelled in (("caf\u00e9", True), ("cafe\u0301", False)):
        ids, _ = reference.encode_batch([text])
        assert spelling.spells(ids, spelling.ends(ids), text.encode()) is is_spelled
