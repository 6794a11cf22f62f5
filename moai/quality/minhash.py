"""MinHash: 112 bytes of a document tell how much of its word 5-grams it has in common with another one.

Each of 112 slots keeps 8 bits of the least of the document's 5-gram hashes under a function of its own (b-bit MinHash,
Li and König 2010): two documents of Jaccard similarity J agree in a slot with the probability J + (1 - J) / 256. Eight
slots are one number, so that 14 of them are bands as they stand: two documents share one of the 14 with the
probability 1 - (1 - J ** 8) ** 14, which is .92 at J = .8, .99 at .85 and 1.0 at .9. Read as 28 bands of 4 slots they
find .98 at J = .6.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from moai.core import columns
from moai.core.errors import ConfigError
from moai.engine.part import Signal
from moai.engine.schema import Column
from moai.quality.hashes import halves
from moai.quality.words import Hashes, mixed, words

SLOTS, SLOTS_TOGETHER = 112, 8
SIGNATURE = tuple(f"slots_{number:02}" for number in range(SLOTS // SLOTS_TOGETHER))
WORDS = ("words_high", "words_low")
N = 5
_SEED = 1
_BYTES_AT_ONCE = 400_000
"""Of texts worked on together: what is made of them stays in the processor's cache."""
_PRIME, _MIX = np.uint64(0x9E3779B97F4A7C15), np.uint32(0x9E3779B1)


@dataclass(frozen=True)
class MinHash(Signal):
    """The signature of a document, and a hash of all of its words in their order: where that is the same, the 5-grams
    are.
    """

    needs: ClassVar[tuple[str, ...]] = ("text",)
    adds: ClassVar[tuple[Column, ...]] = tuple(Column(name, "uint64", per="document") for name in (*WORDS, *SIGNATURE))

    algorithm: int = 0
    """Of rensa: its hashes outlive an installation."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "algorithm", _rensa().ALGORITHM_VERSION)

    def measure(self, batch: pa.RecordBatch) -> dict[str, Any]:
        texts = batch["text"].cast(pa.large_string())
        found = [_measured(texts[first:last]) for first, last in _groups(texts)]
        together = np.concatenate(found) if found else np.empty((0, len(self.adds)), np.uint64)
        return {column.name: columns.numbers(values) for column, values in zip(self.adds, together.T)}


def shingles(texts: pa.Array) -> tuple[Hashes, npt.NDArray[np.int64]]:
    """The hashes of the word 5-grams of all texts, and where those of each begin. A text of fewer words is one n-gram
    of all of them.
    """
    found, bounds = words(texts)
    return _grams(found, bounds)


def agreement(one: npt.NDArray[np.uint64], other: npt.NDArray[np.uint64]) -> npt.NDArray[np.float64]:
    """An estimate of the Jaccard similarity from two signatures, uint64[pairs, 14] each."""
    same = (one.view(np.uint8) == other.view(np.uint8)).mean(axis=1)
    return np.asarray((same - 1 / 256) / (1 - 1 / 256), np.float64)


def _measured(texts: pa.Array) -> npt.NDArray[np.uint64]:
    found, bounds = words(texts)
    grams, ends = _grams(found, bounds)
    matrix = _rensa().digest_matrix_from_flat_token_hashes(grams, ends.astype(np.uint64), num_perm=SLOTS, seed=_SEED)
    slots = np.array(matrix.to_rows(), np.uint32).reshape(-1, SLOTS)
    # The least of many numbers is small: its bits are spread before 8 of them are taken.
    signature = ((slots * _MIX) >> np.uint32(24)).astype(np.uint8).view("<u8").astype(np.uint64)
    data = memoryview(found.tobytes())
    sides = (8 * bounds).tolist()
    digests = b"".join(xxhash.xxh3_128_digest(data[first:last]) for first, last in itertools.pairwise(sides))
    return np.column_stack((*halves(digests), signature))


def _grams(found: Hashes, bounds: npt.NDArray[np.int64]) -> tuple[Hashes, npt.NDArray[np.int64]]:
    sizes = np.diff(bounds)
    numbers = np.maximum(sizes - N + 1, 1)
    ends = np.concatenate(([0], np.cumsum(numbers)))
    rolled = np.concatenate((found, np.zeros(N, np.uint64)))
    value = rolled[: len(found) + 1].copy()
    for further in range(1, N):
        value = value * _PRIME + rolled[further : further + len(value)]
    short = np.flatnonzero(sizes < N)
    # Behind each of the others are 4 places whose n-gram would reach into the next text.
    keep = np.ones(len(value), bool)
    keep[len(found) :] = False
    for further in range(1, N):
        reaching = bounds[1:] - further
        keep[reaching[reaching >= bounds[:-1]]] = False
    long = mixed(value[keep])
    out = np.empty(ends[-1], np.uint64)
    where = np.ones(len(out), bool)
    where[ends[short]] = False
    out[where] = long
    whole = (sizes[short] + 1).astype(np.uint64)
    for word in range(N - 1):
        more = sizes[short] > word
        whole[more] = whole[more] * _PRIME + found[bounds[short[more]] + word]
    out[ends[short]] = mixed(whole)
    return out, ends


def _groups(texts: pa.Array) -> list[tuple[int, int]]:
    """Runs of texts of so many bytes together."""
    offsets = np.frombuffer(texts.buffers()[1], np.int64)[texts.offset : texts.offset + len(texts) + 1]
    groups = (offsets[:-1] - offsets[0]) // _BYTES_AT_ONCE
    cuts = [0, *(np.flatnonzero(np.diff(groups)) + 1).tolist(), len(texts)]
    return [(first, last) for first, last in itertools.pairwise(cuts) if first < last]


def _rensa() -> Any:
    try:
        from rensa import RMinHash
    except ImportError as error:
        raise ConfigError("--dedup minhash needs rensa: pip install 'moai[quality]'") from error
    return RMinHash
