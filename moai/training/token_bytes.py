"""How many UTF-8 bytes of text the predicted tokens of a batch stand for: what a loss is divided by to compare
tokenizers.

Byte-level BPE (the decoder "ByteLevel") spells a byte with one letter, so that a token has as many bytes as letters:
exact. With other tokenizers the predicted run is decoded behind the token before it, and that token's own text taken
off; where a cut goes through a character that is spelt in single bytes, the count is off by less than four. Special
tokens have no bytes in either way.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class TokenBytes:
    """`tokenizer` is one of the library `tokenizers`."""

    tokenizer: Any

    def __call__(self, input_ids: Ids, predicted: Mask) -> int:
        """Bytes of the tokens marked in `predicted`; both of shape (rows, width). The first token of a row is never
        marked.
        """
        if self._lengths is not None:
            return int(self._lengths[input_ids[predicted]].sum())
        return sum(self._decoded(ids, marks) for ids, marks in zip(input_ids, predicted))

    @cached_property
    def _lengths(self) -> Ids | None:
        """Bytes of each id, for byte-level BPE."""
        decoder = json.loads(self.tokenizer.to_str())["decoder"] or {}
        if "ByteLevel" not in {part["type"] for part in [decoder, *decoder.get("decoders", ())] if part}:
            return None
        vocabulary = self.tokenizer.get_vocab(with_added_tokens=True)
        lengths = np.zeros(max(vocabulary.values()) + 1, np.int64)
        for token, index in vocabulary.items():
            lengths[index] = len(token)
        for index, token in self.tokenizer.get_added_tokens_decoder().items():
            lengths[index] = 0 if token.special else len(token.content.encode())
        return lengths

    def _decoded(self, ids: Ids, marks: Mask) -> int:
        edges = np.flatnonzero(np.diff(marks.astype(np.int8), append=np.int8(0)))
        # The edge before a run is the token that it follows; the edge at its end is its last token.
        return sum(
            self._bytes(ids[before : last + 1]) - self._bytes(ids[before : before + 1])
            for before, last in zip(edges[::2], edges[1::2])
        )

    def _bytes(self, ids: Ids) -> int:
        return len(self.tokenizer.decode(ids.tolist(), skip_special_tokens=True).encode())
