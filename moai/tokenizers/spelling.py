"""Where the ids of a text stand in it, from the bytes that each id spells.

    spelling = Spelling.of(path, digest)              # or the reason why ids of this tokenizer do not spell their text
    ends = spelling.ends(ids)                         # behind each id, in bytes
    spelling.spells(ids, ends, text.encode())         # then that is where they stand

Only the reference tells where a token stands, and it takes thirty times as long as a fast backend. In a byte-level BPE
an id stands for fixed bytes, so places follow from lengths once the ids are shown to spell the text: all their bytes,
one behind another, are compared with it. What a tokenizer's normalizer changed (NFC) is seen there. What that cannot
show, places that differ though bytes are equal, is ruled out by what tokenizer.json says (`_reason_against`).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from moai.tokenizers.backends import Ids
from moai.tokenizers.load import read_file

Ends = npt.NDArray[np.int64]

_PRE_TOKENIZERS = ("ByteLevel", "Split", "Digits", "Punctuation")


@dataclass(frozen=True)
class Spelling:
    """The bytes of every id, one behind another, where each begins, and how many there are: 0 for ids without bytes."""

    content: npt.NDArray[np.uint8]
    begins: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]

    @staticmethod
    def of(path: str, digest: str) -> Spelling | str:
        """For a tokenizer.json, or why there is none."""
        return _of(path, digest)

    def ends(self, ids: Ids) -> Ends:
        return np.cumsum(self.lengths[ids])

    def spells(self, ids: Ids, ends: Ends, text: bytes) -> bool:
        """Whether the ids' bytes are the text's, and every id has some."""
        if (int(ends[-1]) if len(ends) else 0) != len(text):
            return False
        lengths = self.lengths[ids]
        if not lengths.all():
            return False
        kind = np.int32 if max(len(text), len(self.content)) < 2**31 else np.int64  # half the memory is half the time
        at = np.repeat((self.begins[ids] - (ends - lengths)).astype(kind), lengths)
        at += np.arange(len(text), dtype=kind)
        return bool(np.array_equal(self.content[at], np.frombuffer(text, np.uint8)))


@functools.lru_cache(maxsize=2)
def _of(path: str, digest: str) -> Spelling | str:
    model = orjson.loads(read_file(Path(path), digest))
    if reason := _reason_against(model):
        return reason
    bytes_of = _byte_level_alphabet()
    found: dict[int, bytes] = {}
    for piece, index in model["model"]["vocab"].items():
        if all(letter in bytes_of for letter in piece):
            found[index] = bytes(bytes_of[letter] for letter in piece)
    found |= {token["id"]: token["content"].encode() for token in model.get("added_tokens") or ()}
    pieces = [found.get(index, b"") for index in range(max(found) + 1)]
    lengths = np.array([len(piece) for piece in pieces], np.int64)
    return Spelling(np.frombuffer(b"".join(pieces), np.uint8), np.cumsum(lengths) - lengths, lengths)


def _reason_against(model: dict[str, Any]) -> str | None:
    """Why ids may stand elsewhere than their bytes do, or None."""
    bpe, steps = model["model"], _flat(model.get("pre_tokenizer"), "pretokenizers")
    levels = [step for step in steps if step["type"] == "ByteLevel"]
    if bpe.get("type") != "BPE":
        return f"its model is {bpe.get('type')}, not BPE"
    if bpe.get("continuing_subword_prefix") or bpe.get("end_of_word_suffix"):
        return "its pieces have a prefix or a suffix that is no text"
    if not levels:
        return "it is not byte-level"
    if any(level.get("add_prefix_space") for level in levels):
        return "it puts a space before a text (add_prefix_space)"
    for step in steps:
        if step["type"] not in _PRE_TOKENIZERS or str(step.get("behavior")).lower() == "removed":
            return f"its pre-tokenizer {step['type']} may drop or change characters"
    for step in _flat(model.get("normalizer"), "normalizers"):
        if step["type"] != "NFC":
            return f"its normalizer {step['type']} may change any text"
    for step in _flat(model.get("post_processor"), "processors"):
        if step["type"] in ("ByteLevel", "RobertaProcessing") and step.get("trim_offsets"):
            return "its places leave out white space (trim_offsets)"
    for token in model.get("added_tokens") or ():
        if token.get("lstrip") or token.get("rstrip"):
            return f"its token {token['content']!r} takes white space in (lstrip, rstrip)"
    return None


def _flat(step: Any, inside: str) -> list[dict[str, Any]]:
    if not step:
        return []
    return [one for part in step[inside] for one in _flat(part, inside)] if step["type"] == "Sequence" else [step]


def _byte_level_alphabet() -> dict[str, int]:
    """The letter that GPT-2 writes for each byte (bytes_to_unicode): itself where that can be printed, else one from
    256 on.
    """
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(256 + at): byte for at, byte in enumerate(others)}
