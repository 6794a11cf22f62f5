"""Split a token where a name ends inside it, so that a mask covers the name and never its particle.

    일본의 -> 일 ##본의        the name 일본 ends inside ##본의, which becomes ##본 ##의

Every kind of vocabulary spells the two halves in its own way: WordPiece marks what goes on (##), SentencePiece what
begins (▁), byte-level BPE writes bytes as letters. A half that is no token itself becomes the fewest pieces that a
greedy reading finds; one that cannot be spelled has no split.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from typing import Any

from moai.tokenizers.load import load_file

_MARK = "▁"


@dataclass(frozen=True)
class Pieces:
    """The vocabulary at `path` (a tokenizer.json with this digest)."""

    path: str
    digest: str

    def split(self, token: int, left: str, right: str) -> tuple[list[int], list[int]] | None:
        """Ids of the halves of `token`, whose text is `left + right`; None where the vocabulary cannot spell them."""
        vocabulary = _vocabulary(self.path, self.digest)
        spelled = vocabulary.tokens[token]
        mark = next((mark for mark in vocabulary.marks if spelled.startswith(mark)), "")
        body, behind = spelled[len(mark) :], vocabulary.spell(right)
        cut = len(body) - len(behind)
        if cut <= 0 or body[cut:] != behind or body[:cut] != vocabulary.spell(left.lstrip() if mark else left):
            return None  # normalized (lower-cased, composed): the halves' letters are not the text's
        begin, end = vocabulary.cover(mark, body[:cut]), vocabulary.cover(vocabulary.goes_on, body[cut:])
        return (begin, end) if begin and end else None


@dataclass(frozen=True)
class _Vocabulary:
    ids: dict[str, int]
    tokens: dict[int, str]
    marks: tuple[str, ...]
    """What may stand before a token's letters."""
    goes_on: str
    """What must stand before letters inside a word."""
    bytes_as_letters: dict[int, str] | None

    def spell(self, text: str) -> str:
        return text if self.bytes_as_letters is None else "".join(self.bytes_as_letters[byte] for byte in text.encode())

    def cover(self, mark: str, letters: str) -> list[int]:
        """The longest pieces from the left; none where one letter is no piece."""
        found: list[int] = []
        while letters:
            size = next((size for size in range(len(letters), 0, -1) if mark + letters[:size] in self.ids), 0)
            if not size:
                return []
            found.append(self.ids[mark + letters[:size]])
            mark, letters = self.goes_on, letters[size:]
        return found


@functools.lru_cache(maxsize=2)
def _vocabulary(path: str, digest: str) -> _Vocabulary:
    from pathlib import Path

    tokenizer = load_file(Path(path), digest)
    ids: dict[str, int] = tokenizer.get_vocab(with_added_tokens=False)
    kind: dict[str, Any] = json.loads(tokenizer.to_str())
    prefix = kind["model"].get("continuing_subword_prefix") or ""
    byte_level = "ByteLevel" in json.dumps([kind.get("pre_tokenizer"), kind.get("decoder")])
    letters = _byte_letters() if byte_level else None
    marks = (prefix,) if prefix else ("Ġ",) if byte_level else (_MARK,)
    return _Vocabulary(ids, {number: token for token, number in ids.items()}, marks, prefix, letters)


def _byte_letters() -> dict[int, str]:
    """GPT-2's table: printable bytes stand for themselves, the others for letters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + at) for at, byte in enumerate(others)}
