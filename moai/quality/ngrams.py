"""n-grams of lower-case words: the keys of a text's own, and where those of a set stand in other texts.

Here as the definition reads, and what runs without numba; moai.quality.ngrams_scan is the fast equal. A key is a 64-bit
hash of the n-gram, another one in each of the two: keys are never kept.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

Keys = npt.NDArray[np.uint64]
_WORD = re.compile(r"\w+")


@cache
def lower_case() -> dict[int, int]:
    """Letter by letter, so that no word changes its length: `"İ".lower()` is two."""
    lowered = ((code, chr(code).lower()) for code in range(0x110000))
    return {code: ord(lower) for code, lower in lowered if len(lower) == 1 and ord(lower) != code}


def words_of(text: str) -> list[str]:
    return _WORD.findall(text.translate(lower_case()))


def keys_of(text: str, n: int) -> Keys:
    """Of all n-grams of a text, in order."""
    words = words_of(text)
    return np.array([_key(words[at : at + n]) for at in range(len(words) - n + 1)], np.uint64)


def occurrences(texts: pa.Array, lengths: Sequence[int], keys: Keys) -> npt.NDArray[np.int64]:
    """Where n-grams of these lengths are among the sorted `keys`: int64[hits, 3], by document, place and length. Of
    each the document, where the n-gram ends in its text, and the place among the keys.
    """
    known, found = {key: place for place, key in enumerate(keys.tolist())}, []
    for document, text in enumerate(texts.to_pylist()):
        lowered = text.translate(lower_case())
        words, ends = [], []
        for word in _WORD.finditer(lowered):
            words.append(word.group())
            ends.append(word.end())
        for last in range(len(words)):
            for n in lengths:
                if last + 1 >= n and (place := known.get(_key(words[last + 1 - n : last + 1]))) is not None:
                    found.append((document, ends[last], place))
    return np.array(found, np.int64).reshape(-1, 3)


@cache
def fastest() -> ModuleType:
    """This module, or its compiled equal where numba is."""
    try:
        from moai.quality import ngrams_scan
    except ImportError:
        from moai.quality import ngrams

        return ngrams
    return ngrams_scan


def _key(words: Sequence[Any]) -> int:
    return xxhash.xxh3_64_intdigest(" ".join(words).encode())
