"""Which row is trained on at which position: a pure function of (content, seed, mixture, position), and no list of rows
anywhere.

    order = Order(sources, seed=42)
    order.rows_at(np.arange(1_000_000, 1_000_256))     # the rows of one step, from rank 0 of 1 or of 64

A position counts rows from the beginning of the run, over all ranks, batches and epochs; how a step cuts them is not
known here. So a run is resumed by one integer, with any number of ranks and any batch size, and no row comes twice or
never.

Within a source every epoch has an order of its own: its shards are permuted and taken in windows, and the rows of a
window are permuted among themselves (by default one window holds all shards). Permutations are keyed Feistel networks,
which give any one element without the others. Which source a position belongs to is `Mixture`'s to say; without one,
all sources are one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

ORDER_VERSION = 1
"""Raised whenever the same seed would give another order: a checkpoint of one version is not resumed by another."""

CHUNK = 4096
"""Positions looked up at once."""
_ROUNDS = 4
"""Of two half rounds each. Four half rounds make a Feistel network a pseudorandom permutation (Luby and Rackoff 1988);
eight are for small halves.
"""
_KEPT = 8

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Source:
    """Rows that lie one behind the other in the prepared directory, from row `first` on, in shards of `shard_rows`."""

    name: str
    first: int
    shard_rows: tuple[int, ...]
    tokens: int

    @cached_property
    def rows(self) -> int:
        return sum(self.shard_rows)


class Cuts(Protocol):
    """How positions are shared out among sources."""

    @property
    def total(self) -> int | None:
        """Positions there are, or None without end."""
        ...

    def place(self, positions: Ints) -> tuple[Ints, Ints]:
        """The number of the source of each position, and how many rows of that source came before."""
        ...

    def taken(self, position: int) -> list[int]:
        """Rows of each source at the positions before this one."""
        ...


@dataclass(frozen=True)
class Order:
    """The order of a run. `sources` are those of the prepared directory; `window` is a number of shards, 0 for all of
    them.
    """

    sources: tuple[Source, ...]
    seed: int
    window: int = 0
    mixture: Cuts | None = None

    @property
    def rows(self) -> int:
        """Rows of all sources."""
        return sum(source.rows for source in self.sources)

    @property
    def total(self) -> int | None:
        """Positions there are: none ends the order but a mixture whose sources are all used up."""
        return self.mixture.total if self.mixture else None

    def rows_at(self, positions: Ints) -> Ints:
        """The rows of the prepared directory at these positions."""
        if self.mixture is None:
            return self._streams[0].rows_at(positions)
        which, before = self.mixture.place(positions)
        rows = np.empty_like(positions)
        for number, stream in enumerate(self._streams):
            mine = which == number
            rows[mine] = stream.rows_at(before[mine])
        return rows

    def consumed(self, position: int) -> dict[str, int]:
        """Rows taken from each source at the positions before this one."""
        if self.mixture is not None:
            return {source.name: taken for source, taken in zip(self.sources, self.mixture.taken(position))}
        epochs, rest = divmod(position, self.rows)
        began = self.count(position - rest, position)
        return {source.name: epochs * source.rows + began[source.name] for source in self.sources}

    def count(self, start: int, end: int) -> dict[str, int]:
        """Rows of each source at the positions from `start` to before `end`, looked up one by one."""
        firsts = np.array([source.first for source in self.sources])
        counts = np.zeros(len(firsts), np.int64)
        for at in range(start, end, CHUNK):
            rows = self.rows_at(np.arange(at, min(at + CHUNK, end)))
            counts += np.bincount(np.searchsorted(firsts, rows, "right") - 1, minlength=len(firsts))
        return {source.name: int(count) for source, count in zip(self.sources, counts)}

    def identity(self) -> dict[str, Any]:
        """What, beside the content, decides the order."""
        return {"version": ORDER_VERSION, "seed": self.seed, "window": self.window}

    @cached_property
    def _streams(self) -> list[_Stream]:
        """One a source, or one over all shards."""
        if self.mixture is not None:
            return [
                _Stream(source.first, source.shard_rows, self.window, f"{self.seed}/{source.name}")
                for source in self.sources
            ]
        shards = tuple(rows for source in self.sources for rows in source.shard_rows)
        return [_Stream(self.sources[0].first, shards, self.window, str(self.seed))]


@dataclass(frozen=True)
class Sampler:
    """The endless sampler of the training loader: rows from position `start` on, for all ranks."""

    order: Order
    start: int = 0

    def __iter__(self) -> Iterator[int]:
        at = self.start
        while self.order.total is None or at < self.order.total:
            end = at + CHUNK if self.order.total is None else min(at + CHUNK, self.order.total)
            yield from self.order.rows_at(np.arange(at, end)).tolist()
            at = end


@dataclass(frozen=True)
class Permutation:
    """A keyed bijection of 0..n-1: Feistel rounds over the rectangle of sides a, b >= sqrt(n), walked again where they
    leave the n.

    An alternating network with additions instead of exclusive ors, after Black and Rogaway 2002, "Ciphers with
    Arbitrary Finite Domains": the rectangle is less than sqrt(n) + 1 cells larger than n, so almost nothing is walked
    twice.
    """

    n: int
    key: str

    def __call__(self, numbers: Ints) -> Ints:
        """Where each of `numbers` goes."""
        result = self._rounds(numbers.astype(np.uint64))
        while len(outside := np.flatnonzero(result >= self.n)):
            result[outside] = self._rounds(result[outside])
        return result.astype(np.int64)

    def _rounds(self, numbers: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        a, b, keys = self._constants
        right, left = np.divmod(numbers, a)
        for first, second in keys:
            left = (left + _mix(right ^ first) % a) % a
            right = (right + _mix(left ^ second) % b) % b
        return right * a + left

    @cached_property
    def _constants(self) -> tuple[np.uint64, np.uint64, npt.NDArray[np.uint64]]:
        root = int(np.sqrt(self.n))
        a = next(side for side in (root, root + 1, root + 2) if side and side * side >= self.n)
        words = b"".join(
            hashlib.sha256(f"{ORDER_VERSION}/{self.key}/{self.n}/{number}".encode()).digest()
            for number in range(_ROUNDS * 2 // 4)
        )
        return np.uint64(a), np.uint64(-(-self.n // a)), np.frombuffer(words, "<u8").reshape(_ROUNDS, 2)


@dataclass(frozen=True)
class _Stream:
    """The rows of one source, epoch after epoch."""

    first: int
    shard_rows: tuple[int, ...]
    window: int
    key: str

    def rows_at(self, positions: Ints) -> Ints:
        rows = np.empty_like(positions)
        epochs, places = np.divmod(positions, sum(self.shard_rows))
        for epoch in np.unique(epochs):
            mine = epochs == epoch
            rows[mine] = self._epoch(int(epoch)).rows_at(places[mine])
        return rows + self.first

    @cached_property
    def _epoch(self) -> Any:
        return lru_cache(_KEPT)(lambda epoch: _Epoch.of(self, epoch))


@dataclass(frozen=True)
class _Epoch:
    """The shards of a source in the order of one epoch, in windows."""

    key: str
    window_firsts: Ints
    """The first place of each window, and the number of all places."""
    shard_firsts: Ints
    """The first place of each shard in this order, and the number of all places."""
    shard_rows_before: Ints
    """The first row of each shard, in this order."""

    @classmethod
    def of(cls, stream: _Stream, epoch: int) -> _Epoch:
        key = f"{stream.key}/{epoch}"
        sizes = np.array(stream.shard_rows, np.int64)
        shards = Permutation(len(sizes), f"{key}/shards")(np.arange(len(sizes)))
        ends = np.concatenate(([0], np.cumsum(sizes[shards])))
        windows = ends[np.append(np.arange(0, len(sizes), stream.window or len(sizes)), len(sizes))]
        return cls(key, windows, ends, (np.cumsum(sizes) - sizes)[shards])

    def rows_at(self, places: Ints) -> Ints:
        windows = np.searchsorted(self.window_firsts, places, "right") - 1
        permuted = np.empty_like(places)
        for window in np.unique(windows):
            mine = windows == window
            start, end = self.window_firsts[window : window + 2]
            permuted[mine] = Permutation(int(end - start), f"{self.key}/rows/{window}")(places[mine] - start) + start
        shards = np.searchsorted(self.shard_firsts, permuted, "right") - 1
        rows: Ints = permuted - self.shard_firsts[shards] + self.shard_rows_before[shards]
        return rows


def sources_of(shards: Sequence[dict[str, Any]]) -> tuple[Source, ...]:
    """The sources of a manifest's `shards`, those that have rows, in their order."""
    found: dict[str, list[dict[str, Any]]] = {}
    for shard in shards:
        if shard["rows"]:
            found.setdefault(shard["source"], []).append(shard)
    sources: list[Source] = []
    for name, mine in found.items():
        first = sum(source.rows for source in sources)
        sources.append(
            Source(name, first, tuple(shard["rows"] for shard in mine), sum(shard["tokens"] for shard in mine))
        )
    return tuple(sources)


def _mix(numbers: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finalizer of splitmix64 (Steele, Lea and Flood 2014): every input bit changes every output bit half of the
    time.
    """
    with np.errstate(over="ignore"):
        numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))
