"""The numbers of moai.quality.plain over a whole batch, some hundred times as fast: compiled by numba.

A word is known by a 64-bit hash: of 100,000 words of a document two share one with a probability of 3e-10. n-grams are
never spelled: an (n+1)-gram can only repeat where its n-gram does, so the places to look at shrink from 2 to 10.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from numba import njit

from moai.quality.characters import ALPHA, BREAK, HANGUL, PUNCTUATION, SPACE, TERMINAL, WORD, table
from moai.quality.plain import NAMES, STOP_WORDS

_PRIME = np.uint64(0x9E3779B97F4A7C15)
_MIX = np.uint64(0xD6E8FEB86659FD93)
_HALF, _LOW = np.uint64(32), np.uint64(29)
_NEWLINE, _HASH, _DOT, _DASH, _BULLET, _ELLIPSIS = 10, 35, 46, 45, 0x2022, 0x2026
_SHORT = 30
_FAST: Any = {"nogil": True, "cache": True, "boundscheck": False}


def statistics(texts: pa.Array) -> npt.NDArray[np.uint32]:
    """uint32[documents, len(NAMES)] of an Array of strings without nulls."""
    out = np.zeros((len(texts), len(NAMES)), np.uint32)
    texts = texts.cast(pa.large_string())
    _, offsets, data = texts.buffers()
    ends = np.frombuffer(offsets, np.int64)[texts.offset : texts.offset + len(texts) + 1]
    _scan(np.frombuffer(data or b"", np.uint8), ends, table(), _STOP_HASHES, out)
    return out


@njit(inline="always")
def _mixed(value: Any) -> Any:
    value ^= value >> _HALF
    value *= _MIX
    return value ^ (value >> _HALF)


@njit(inline="always")
def _with(value: Any, code: Any) -> Any:
    value = (value ^ np.uint64(code + np.uint32(1))) * _PRIME
    return value ^ (value >> _LOW)


@njit(**_FAST)
def _hash(codes: Any) -> Any:
    value = np.uint64(0)
    for code in codes:
        value = _with(value, code)
    return _mixed(value)


@njit(**_FAST)
def _copies(hashes: Any, sizes: Any, number: int) -> Any:
    """How many of the first `number` were there before, and their characters."""
    room = 16
    while room < 2 * number:
        room *= 2
    slots = np.zeros(room, np.int64)
    copies = chars = 0
    for at in range(number):
        slot = np.int64(hashes[at] & np.uint64(room - 1))
        while slots[slot] and hashes[slots[slot] - 1] != hashes[at]:
            slot = (slot + 1) & (room - 1)
        if slots[slot]:
            copies += 1
            chars += sizes[at]
        else:
            slots[slot] = at + 1
    return copies, chars


@njit(**_FAST)
def _decode(data: Any, text: Any) -> Any:
    """Code points of valid UTF-8. Returns how many."""
    at, number = np.int64(0), np.int64(0)
    while at < data.size:
        first = np.uint32(data[at])
        more = (first >= 0xC0) + (first >= 0xE0) + (first >= 0xF0)
        code = first if not more else first & np.uint32(0x3F >> more)
        for byte in data[at + 1 : at + 1 + more]:
            code = code << np.uint32(6) | np.uint32(byte & 0x3F)
        text[number] = code
        number += 1
        at += 1 + more
    return number


@njit(**_FAST)
def _scan(data: Any, ends: Any, table: Any, stop_hashes: Any, out: Any) -> None:
    longest = 0
    for document in range(ends.size - 1):
        longest = max(longest, ends[document + 1] - ends[document])
    codes, kinds = np.empty(longest, np.uint32), np.empty(longest, np.uint8)
    hashes, sizes = np.empty(longest + 2, np.uint64), np.empty(longest + 2, np.int64)
    for document in range(ends.size - 1):
        number = _decode(data[ends[document] : ends[document + 1]], codes)
        for at in range(number):
            kinds[at] = table[codes[at]]
        text, kind, row = codes[:number], kinds[:number], out[document]
        row[0] = text.size
        words = _words(text, kind, stop_hashes, hashes, sizes, row)
        _repetition(hashes, sizes, words, row)
        _lines(text, kind, row)
        _full_lines(text, kind, hashes, sizes, row)
        row[16], row[17], row[18] = _parts(text, 0, text.size, 1, hashes, sizes)
        first, last = 0, text.size
        while first < last and kind[first] & SPACE:
            first += 1
        while last > first and kind[last - 1] & SPACE:
            last -= 1
        row[19], row[20], row[21] = _parts(text, first, last, 2, hashes, sizes)


@njit(**_FAST)
def _words(text: Any, kind: Any, stop_hashes: Any, hashes: Any, sizes: Any, row: Any) -> int:
    words = plain = plain_chars = alpha = stops = dots = at = 0
    for place in range(text.size):
        code = text[place]
        row[1] += code == _NEWLINE
        row[6] += code == _HASH
        row[7] += code == _ELLIPSIS
        row[22] += (kind[place] & HANGUL) != 0
        dots = dots + 1 if code == _DOT else 0
        if dots == 3:
            row[7] += 1
            dots = 0
    while at < text.size:
        if kind[at] & SPACE:
            at += 1
            continue
        first = at
        has_letter, is_plain, value = False, False, np.uint64(0)
        while at < text.size and (at == first or (kind[first] & WORD and kind[at] & WORD)):
            has_letter |= (kind[at] & ALPHA) != 0
            is_plain |= not kind[at] & PUNCTUATION
            value = _with(value, text[at])
            at += 1
        value = _mixed(value)
        hashes[words], sizes[words] = value, at - first
        words += 1
        alpha += has_letter
        if is_plain:
            plain += 1
            plain_chars += at - first
        if at - first <= 4:
            for stop in range(stop_hashes.size):
                if stop_hashes[stop] == value:
                    stops |= 1 << stop
    row[2], row[3], row[4], row[5] = words, plain, plain_chars, alpha
    while stops:
        row[8] += stops & 1
        stops >>= 1
    return words


@njit(**_FAST)
def _lines(text: Any, kind: Any, row: Any) -> None:
    """Those of str.splitlines: bullets in front, an ellipsis behind."""
    at = 0
    while at < text.size:
        first = last = before = third = np.uint32(0)
        while at < text.size and not kind[at] & BREAK:
            if not kind[at] & SPACE:
                if not first:
                    first = text[at] + np.uint32(1)
                third, before, last = before, last, text[at] + np.uint32(1)
            elif last:
                # Within a line a space ends a run of dots, unless nothing but spaces follows.
                end = at
                while end < text.size and kind[end] & SPACE and not kind[end] & BREAK:
                    end += 1
                if end < text.size and not kind[end] & BREAK:
                    third = before = last = np.uint32(0)
            at += 1
        if at + 1 < text.size and text[at] == 13 and text[at + 1] == _NEWLINE:
            at += 1
        at += 1
        row[9] += 1
        row[10] += first == _BULLET + 1 or first == _DASH + 1
        row[11] += last == _ELLIPSIS + 1 or (last == _DOT + 1 and before == _DOT + 1 and third == _DOT + 1)


@njit(**_FAST)
def _full_lines(text: Any, kind: Any, hashes: Any, sizes: Any, row: Any) -> None:
    """Those between newlines that are not blank."""
    number = first = 0
    for at in range(text.size + 1):
        if at < text.size and text[at] != _NEWLINE:
            continue
        value, blank = np.uint64(0), True
        for place in range(first, at):
            value = _with(value, text[place])
            blank &= (kind[place] & SPACE) != 0
        if not blank:
            hashes[number], sizes[number] = _mixed(value), at - first
            number += 1
            row[13] += (kind[at - 1] & TERMINAL) != 0
            row[14] += at - first <= _SHORT
        first = at + 1
    row[12] = number
    row[15] = _copies(hashes, sizes, number)[1]


@njit(**_FAST)
def _parts(text: Any, first: int, last: int, newlines: int, hashes: Any, sizes: Any) -> Any:
    """What lies between runs of so many newlines or more: its number, its copies and their characters."""
    number, begin, at = 0, first, first
    while True:
        run = at
        while run < last and text[run] == _NEWLINE:
            run += 1
        if at == last or run - at >= newlines:
            value = np.uint64(0)
            for place in range(begin, at):
                value = _with(value, text[place])
            hashes[number], sizes[number] = _mixed(value), at - begin
            number += 1
            if at == last:
                break
            begin = run
        at = max(run, at + 1)
    copies, chars = _copies(hashes, sizes, number)
    return number, copies, chars


@njit(**_FAST)
def _repetition(hashes: Any, sizes: Any, words: int, row: Any) -> None:
    """The most frequent 2- to 4-grams and the repeated 5- to 10-grams."""
    if words < 2:
        return
    room = 64
    while room < 2 * words:
        room *= 2
    keys, counts = np.empty(room, np.uint64), np.zeros(room, np.int32)
    grams, places, slots = hashes[:words].copy(), np.arange(words), np.empty(words, np.int64)
    chars = np.zeros(words + 1, np.int64)
    for at in range(words):
        chars[at + 1] = chars[at] + sizes[at]
    left = words
    for n in range(2, 11):
        while room > 64 and room >= 4 * left:
            room //= 2
        counts[:room] = 0
        most = looked_at = 0
        for index in range(left):
            place = places[index]
            if place + n > words:
                break
            grams[place] = grams[place] * _PRIME + hashes[place + n - 1]
            value = _mixed(grams[place])
            slot = np.int64(value & np.uint64(room - 1))
            while counts[slot] and keys[slot] != value:
                slot = (slot + 1) & (room - 1)
            keys[slot] = value
            counts[slot] += 1
            most = max(most, counts[slot])
            slots[index] = slot
            looked_at = index + 1
        if n <= 4 and most > 1:
            for index in range(looked_at):
                if counts[slots[index]] == most:
                    place = places[index]
                    row[21 + n] = most * (chars[place + n] - chars[place] + n - 1)
                    break
        if most < 2:
            # Every n-gram stands once, so the first is the most frequent; longer ones do not repeat either.
            for longer in range(n, 5):
                if words >= longer:
                    row[21 + longer] = chars[longer] + longer - 1
            return
        kept = behind = repeated = 0
        for index in range(looked_at):
            slot, place = slots[index], places[index]
            if counts[slot] == 1:
                continue
            if n >= 5 and place >= behind:
                if counts[slot] < 0:  # it is among those that were read before
                    repeated += chars[place + n] - chars[place]
                    behind = place + n
                else:
                    counts[slot] = -counts[slot]
            places[kept] = place
            kept += 1
        if n >= 5:
            row[21 + n] = repeated
        left = kept


_STOP_HASHES = np.array([_hash(np.frombuffer(word.encode("utf-32-le"), np.uint32)) for word in STOP_WORDS], np.uint64)
