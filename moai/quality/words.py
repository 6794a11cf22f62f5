"""The words of many texts as 64-bit hashes, without a Python object a word.

A word is what it is to the rules: a run of letters, digits and `_`, or one other character that is no space; here in
lower case. Bytes are classified at once and words are hashed 8 bytes at a time where they stand, so a megabyte takes
about 10 ms (benchmarks/duplicates.py). Two words of a corpus of a billion different ones share a hash with a
probability of 3 %.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from moai.quality.characters import SPACE, WORD, table

Hashes = npt.NDArray[np.uint64]
_SPACE, _WORD, _SYMBOL, _WITHIN, _LEAD = range(5)
"""What a byte is: `_WITHIN` a symbol behind its first byte, `_LEAD` the first one of a character that is not ASCII."""
_LONG = 32
"""Bytes beyond which a word is hashed by xxh3."""
_PRIME, _MIX = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93)
_HALF, _LOW = np.uint64(32), np.uint64(29)
_FIRST_BYTES = np.array([(1 << 8 * size) - 1 for size in range(9)], np.uint64)


def words(texts: pa.Array) -> tuple[Hashes, npt.NDArray[np.int64]]:
    """The words of all texts, one after the other, and where those of each text begin: (uint64[words],
    int64[texts + 1]). `texts` are large strings without nulls.
    """
    lowered = pc.utf8_lower(texts)
    _, offsets, buffer = lowered.buffers()
    bounds = np.frombuffer(offsets, np.int64)[lowered.offset : lowered.offset + len(lowered) + 1]
    data = bytes(memoryview(buffer)[bounds[0] : bounds[-1]]) if buffer else b""
    bounds = bounds - bounds[0]
    first, behind = _places(data, bounds)
    return _hashed(data, first, behind - first), np.searchsorted(first, bounds)


def mixed(values: Hashes) -> Hashes:
    values = values ^ (values >> _HALF)
    values *= _MIX
    return values ^ (values >> _HALF)


def _places(data: bytes, bounds: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Where words begin and end, in bytes."""
    kinds = np.frombuffer(bytearray(data.translate(_of_bytes())), np.uint8)
    _classify(kinds, np.frombuffer(data, np.uint8))
    edge = np.zeros(len(kinds) + 1, bool)
    edge[bounds] = True
    is_word, is_symbol = kinds == _WORD, kinds == _SYMBOL
    begins, ends = is_symbol.copy(), np.zeros(len(kinds), bool)
    begins[1:] |= is_word[1:] & (~is_word[:-1] | edge[1:-1])
    begins[:1] |= is_word[:1]
    inside = is_symbol | (kinds == _WITHIN)
    ends[:-1] = (is_word[:-1] & (~is_word[1:] | edge[1:-1])) | (inside[:-1] & (kinds[1:] != _WITHIN))
    ends[-1:] = is_word[-1:] | inside[-1:]
    return np.flatnonzero(begins), np.flatnonzero(ends) + 1


def _classify(kinds: npt.NDArray[np.uint8], data: npt.NDArray[np.uint8]) -> None:
    """What characters of more than one byte are, in place."""
    leads = np.flatnonzero(kinds == _LEAD)
    if not len(leads):
        return
    first = data[leads]
    for least, most, more, bits in ((0xC0, 0xE0, 1, 0x1F), (0xE0, 0xF0, 2, 0x0F), (0xF0, 0x100, 3, 0x07)):
        at = leads[(first >= least) & (first < most)]
        code = (data[at] & bits).astype(np.uint32)
        for further in range(1, more + 1):
            code = code << np.uint32(6) | (data[at + further] & np.uint8(0x3F))
        found = _of_characters()[code]
        kinds[at] = found
        found[found == _SYMBOL] = _WITHIN
        for further in range(1, more + 1):
            kinds[at + further] = found


def _hashed(data: bytes, first: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64]) -> Hashes:
    padded = np.frombuffer(data + bytes(8), np.uint8)
    eight: Any = np.lib.stride_tricks.as_strided(padded[:8].view(np.uint64), (len(data) + 1,), (1,), writeable=False)
    out = mixed((eight[first] & _FIRST_BYTES[np.minimum(sizes, 8)]) + sizes.astype(np.uint64) * _PRIME)
    left = np.flatnonzero((sizes > 8) & (sizes <= _LONG))
    for done in range(8, _LONG, 8):
        block = eight[first[left] + done] & _FIRST_BYTES[np.minimum(sizes[left] - done, 8)]
        out[left] = mixed(out[left] * _PRIME ^ block)
        left = left[sizes[left] > done + 8]
    view = memoryview(data)
    for at in np.flatnonzero(sizes > _LONG).tolist():
        out[at] = xxhash.xxh3_64_intdigest(view[first[at] : first[at] + sizes[at]])
    return out


@cache
def _of_characters() -> npt.NDArray[np.uint8]:
    """uint8[0x110000]."""
    known = table()
    return np.where(known & WORD, _WORD, np.where(known & SPACE, _SPACE, _SYMBOL)).astype(np.uint8)


@cache
def _of_bytes() -> bytes:
    kinds = np.full(256, _WITHIN, np.uint8)
    kinds[:0x80], kinds[0xC0:] = _of_characters()[:0x80], _LEAD
    return kinds.tobytes()
