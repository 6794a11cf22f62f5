"""moai.quality.ngrams over Arrow's bytes, compiled by numba: hashes roll along the words, and no n-gram is spelled."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from numba import njit

from moai.quality.characters import WORD, table
from moai.quality.ngrams import Keys, lower_case
from moai.quality.scan import _FAST, _mixed, _with

_PRIME = np.uint64(0x9E3779B97F4A7C15)
_BYTES_A_HIT = 32
"""Room for so many hits is made at first; where there are more, the texts are read again."""
_NO_KEYS, _NO_GATE = np.zeros(0, np.uint64), np.zeros(0, np.uint8)


def keys_of(text: str, n: int) -> Keys:
    lengths = np.array([n])
    data = np.frombuffer(text.encode(), np.uint8)
    found = np.empty((len(text) + 1, 3), np.int64)
    number = _find(data, np.array([0, data.size]), _letters(), lengths, _powers(lengths), _NO_KEYS, _NO_GATE, found)
    return found[:number, 2].astype(np.uint64)


def occurrences(texts: pa.Array, lengths: Sequence[int], keys: Keys) -> npt.NDArray[np.int64]:
    texts = texts.cast(pa.large_string())
    _, offsets, data = texts.buffers()
    ends = np.frombuffer(offsets, np.int64)[texts.offset : texts.offset + len(texts) + 1]
    looked_for, room = np.array(lengths), 1024 + int(ends[-1] - ends[0]) // _BYTES_A_HIT
    slots = np.zeros(1 << max(10, int(2 * keys.size).bit_length()), np.uint64)
    gate = np.zeros(1 << max(10, int(2 * keys.size).bit_length()), np.uint8)  # 16 bits a key: stays in the cache
    _fill(slots, gate, keys)
    while True:
        found = np.empty((room, 3), np.int64)
        number = _find(
            np.frombuffer(data or b"", np.uint8), ends, _letters(), looked_for, _powers(looked_for), slots, gate, found
        )
        if number <= room:
            found = found[:number]
            found[:, 2] = np.searchsorted(keys, found[:, 2].astype(np.uint64))
            return found
        room = number


@cache
def _letters() -> npt.NDArray[np.uint32]:
    """uint32[0x110000]: the lower case of what words are made of, 0 for all else."""
    codes = np.arange(0x110000, dtype=np.uint32)
    for code, lower in lower_case().items():
        codes[code] = lower
    return np.where(table() & WORD, codes, np.uint32(0))


def _powers(lengths: npt.NDArray[np.int64]) -> Keys:
    return np.array([pow(int(_PRIME), int(n), 1 << 64) for n in lengths], np.uint64)


@njit(**_FAST)
def _fill(slots: Any, gate: Any, keys: Any) -> None:
    for key in keys:
        bit = key >> np.uint64(32) & np.uint64(8 * gate.size - 1)
        gate[bit >> np.uint64(3)] |= np.uint8(1 << (bit & np.uint64(7)))
        slot = np.int64(key & np.uint64(slots.size - 1))
        while slots[slot]:
            slot = (slot + 1) & (slots.size - 1)
        slots[slot] = key


@njit(**_FAST)
def _find(data: Any, ends: Any, letters: Any, lengths: Any, powers: Any, slots: Any, gate: Any, found: Any) -> int:
    """Fills `found` as far as it reaches; how many there are. Without slots all n-grams are found, with their keys."""
    longest = 0
    for document in range(ends.size - 1):
        longest = max(longest, ends[document + 1] - ends[document])
    hashes, rolling = np.empty(longest + 1, np.uint64), np.zeros(lengths.size, np.uint64)
    number = 0
    for document in range(ends.size - 1):
        at, last = ends[document], ends[document + 1]
        rolling[:] = np.uint64(0)
        words = place = 0
        value, inside = np.uint64(0), False
        while at <= last:
            # Behind the last byte the last word ends.
            letter = np.uint32(0)
            if at < last:
                first = np.uint32(data[at])
                if first < 0x80:
                    letter = letters[first]
                else:
                    more = 1 + (first >= 0xE0) + (first >= 0xF0)
                    code = first & np.uint32(0x3F >> more)
                    for byte in data[at + 1 : at + 1 + more]:
                        code = code << np.uint32(6) | np.uint32(byte & 0x3F)
                    letter = letters[code]
                    at += more
            at += 1
            place += 1
            if letter:
                value, inside = _with(value, letter), True
                continue
            if not inside:
                continue
            value = _mixed(value)
            hashes[words] = value
            words += 1
            word, value, inside = value, np.uint64(0), False
            for index in range(lengths.size):
                n = lengths[index]
                rolling[index] = rolling[index] * _PRIME + word
                if words > n:
                    rolling[index] -= hashes[words - n - 1] * powers[index]
                if words < n:
                    continue
                key = _mixed(rolling[index] + np.uint64(n)) | np.uint64(1)
                if slots.size:
                    bit = key >> np.uint64(32) & np.uint64(8 * gate.size - 1)
                    if not gate[bit >> np.uint64(3)] >> (bit & np.uint64(7)) & 1:
                        continue
                    slot = np.int64(key & np.uint64(slots.size - 1))
                    while slots[slot] and slots[slot] != key:
                        slot = (slot + 1) & (slots.size - 1)
                    if not slots[slot]:
                        continue
                if number < found.shape[0]:
                    found[number, 0], found[number, 1], found[number, 2] = document, place - 1, np.int64(key)
                number += 1
    return number
