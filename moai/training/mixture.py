"""How positions are shared out among sources: weights, their temperature, stages of a curriculum, and limits to the
epochs of each.

    asked = MixtureFlags.parse(mixture=("ko=0.6", "en=0.4"), stages=(), epochs=("ko=4",), by="tokens", temperature=1.0)
    mixture = Mixture.of(asked.resolve(sources, planned_rows=1_000_000), seed=42)

Positions come in blocks. Each block of a segment has the same number of rows of each source, in an order of its own, so
the source of a position and the rows before it take one block to know. A segment ends where the weights change or a
source is used up; a last, smaller block fills it exactly, so that no row of a source is passed over.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from moai.core.errors import ConfigError
from moai.training.order import Ints, Permutation, Source

_LEAST_BLOCK, _MOST_BLOCK = 1024, 1 << 20
_LEAST_ROWS = 50
"""Rows of the rarest source in a block, where that is possible: a weight is then met within one part in a hundred."""
_KEPT_BLOCKS = 4


@dataclass(frozen=True, kw_only=True)
class MixtureFlags:
    """What the flags ask for. `stages` are (share of the run from which they hold, weights); weights are by `by`, not
    normalised.
    """

    stages: tuple[tuple[float, Mapping[str, float]], ...]
    epochs: Mapping[str, float]
    by: str
    temperature: float

    @classmethod
    def parse(
        cls, *, mixture: Sequence[str], stages: Sequence[str], epochs: Sequence[str], by: str, temperature: float
    ) -> MixtureFlags | None:
        """From the flags; None where none asks for anything. Raises ConfigError."""
        if not (mixture or stages or epochs or temperature != 1.0):
            return None
        parsed = [(0.0, _weights("mixture", mixture))]
        for text in stages:
            share, colon, rest = text.partition(":")
            at = _number(share, f"mixture_stages = {text!r}")
            if not colon or not 0 < at < 1:
                raise ConfigError(
                    f"mixture_stages = {text!r}: expected SHARE:NAME=WEIGHT,NAME=WEIGHT with a share of the run "
                    f"between 0 and 1, as in 0.8:ko=1,en=3"
                )
            if at <= parsed[-1][0]:
                raise ConfigError(
                    f"mixture_stages = {text!r}: begins at or before the stage in front of it; name them in their order"
                )
            parsed.append((at, _weights("mixture_stages", rest.split(","))))
        return cls(stages=tuple(parsed), epochs=_weights("mixture_epochs", epochs), by=by, temperature=temperature)

    def resolve(self, sources: Sequence[Source], planned_rows: int) -> Shares:
        """For these sources. Raises ConfigError where a name is none of theirs, or nothing has a weight."""
        names = [source.name for source in sources]
        self.check_names(names)
        stages = tuple(
            (math.floor(at * planned_rows), self._row_weights(weights, sources)) for at, weights in self.stages
        )
        limits = tuple(
            math.floor(self.epochs[source.name] * source.rows) if source.name in self.epochs else None
            for source in sources
        )
        if not any(weights[number] > 0 and limit != 0 for _, weights in stages for number, limit in enumerate(limits)):
            raise ConfigError(
                f"mixture_epochs = {' '.join(f'{name}={number:g}' for name, number in self.epochs.items())}: not one "
                f"row may be taken of a source with a weight; raise a number"
            )
        return Shares(names=tuple(names), stages=stages, limits=limits)

    def check_names(self, names: Sequence[str]) -> None:
        """Raises ConfigError where a flag names what is none of these sources."""
        weights = (("mixture_stages" if at else "mixture", weights) for at, weights in self.stages)
        for flag, given in [("mixture_epochs", self.epochs), *weights]:
            for name in given:
                if name not in names:
                    raise ConfigError(
                        f"{flag} names {name!r}, which is none of the sources: {', '.join(names)} (one for each entry "
                        f"of --dataset)"
                    )

    def _row_weights(self, weights: Mapping[str, float], sources: Sequence[Source]) -> tuple[float, ...]:
        """Shares of rows, which sum to 1. Without weights, the natural ones; a source that is not named gets none."""
        size = {source.name: source.tokens if self.by == "tokens" else source.rows for source in sources}
        wanted = np.array(
            [weights.get(source.name, 0.0) if weights else size[source.name] for source in sources], np.float64
        )
        wanted = (wanted / wanted.max()) ** (1 / self.temperature)  # the largest is 1, so that no power is out of range
        if self.by == "tokens":
            wanted /= np.array([source.tokens / source.rows for source in sources])
        return tuple(float(share) for share in wanted / wanted.sum())


@dataclass(frozen=True, kw_only=True)
class Shares:
    """The flags in numbers of this data: what a checkpoint keeps. `stages` are (first position, share of rows of each
    source).
    """

    names: tuple[str, ...]
    stages: tuple[tuple[int, tuple[float, ...]], ...]
    limits: tuple[int | None, ...]
    """Rows of each source that may be taken at all."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> Iterator[str]:
        """For people, a line a stage."""
        for at, weights in self.stages:
            shares = ", ".join(f"{name} {weight:.2%}" for name, weight in zip(self.names, weights))
            yield f"from row {at:,} on {shares} of the rows"
        limited = [f"{name} after {limit:,} rows" for name, limit in zip(self.names, self.limits) if limit is not None]
        if limited:
            yield "used up are " + ", ".join(limited)

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Shares:
        """Raises KeyError, TypeError or ValueError for what `to_json` did not make."""
        return cls(
            names=tuple(map(str, found["names"])),
            stages=tuple((int(at), tuple(map(float, shares))) for at, shares in found["stages"]),
            limits=tuple(None if limit is None else int(limit) for limit in found["limits"]),
        )


@dataclass(frozen=True)
class Segment:
    """Blocks alike: `counts` rows of each source in one. `taken` were taken before the first; `blocks` is None for no
    end.
    """

    start: int
    blocks: int | None
    counts: tuple[int, ...]
    taken: tuple[int, ...]

    @property
    def block(self) -> int:
        return sum(self.counts)

    def after(self) -> tuple[int, tuple[int, ...]]:
        """Position and rows taken at its end."""
        blocks = self.blocks or 0
        taken = tuple(taken + blocks * count for taken, count in zip(self.taken, self.counts))
        return self.start + blocks * self.block, taken


@dataclass(frozen=True)
class Mixture:
    """The `Cuts` of an order: see moai.training.order."""

    segments: tuple[Segment, ...]
    seed: int

    @classmethod
    def of(cls, shares: Shares, seed: int) -> Mixture:
        return cls(tuple(_segments(shares)), seed)

    @property
    def total(self) -> int | None:
        last = self.segments[-1]
        return None if last.blocks is None else last.after()[0]

    def place(self, positions: Ints) -> tuple[Ints, Ints]:
        which, before = np.empty_like(positions), np.empty_like(positions)
        numbers = np.searchsorted(self._starts, positions, "right") - 1
        for number in np.unique(numbers):
            mine = numbers == number
            which[mine], before[mine] = self._in_segment(self.segments[number], positions[mine])
        return which, before

    def taken(self, position: int) -> list[int]:
        segment = self.segments[bisect_right(self._starts, position) - 1]
        block = (position - segment.start) // segment.block
        which, _ = self.place(np.arange(segment.start + block * segment.block, position))
        in_block = np.bincount(which, minlength=len(segment.counts))
        taken: list[int] = (np.array(segment.taken) + block * np.array(segment.counts) + in_block).tolist()
        return taken

    def _in_segment(self, segment: Segment, positions: Ints) -> tuple[Ints, Ints]:
        which, before = np.empty_like(positions), np.empty_like(positions)
        blocks, slots = np.divmod(positions - segment.start, segment.block)
        for block in np.unique(blocks):
            mine = blocks == block
            sources, ranks = self._block(segment, int(block))
            which[mine], before[mine] = sources[slots[mine]], ranks[slots[mine]]
        return which, before + np.array(segment.taken)[which] + blocks * np.array(segment.counts)[which]

    @cached_property
    def _block(self) -> Callable[[Segment, int], tuple[Ints, Ints]]:
        """The source of each slot of a block, and how many slots of the same source are before it."""

        def lay_out(segment: Segment, block: int) -> tuple[Ints, Ints]:
            slots = Permutation(segment.block, f"{self.seed}/mixture/{segment.start}/{block}")(np.arange(segment.block))
            counts = np.array(segment.counts)
            sources = np.searchsorted(np.cumsum(counts), slots, "right")
            firsts = np.repeat(np.cumsum(counts) - counts, counts)
            ranks = np.empty_like(sources)
            ranks[np.argsort(sources, kind="stable")] = np.arange(segment.block) - firsts
            return sources, ranks

        return lru_cache(_KEPT_BLOCKS)(lay_out)

    @cached_property
    def _starts(self) -> list[int]:
        return [segment.start for segment in self.segments]


def _segments(shares: Shares) -> Iterator[Segment]:
    """Stage after stage, each until the next begins; inside one, until a source has reached its limit."""
    position, taken = 0, (0,) * len(shares.names)
    ends = [start for start, _ in shares.stages[1:]] + [None]
    for (_, weights), end in zip(shares.stages, ends):
        while end is None or position < end:
            rest = [None if limit is None else limit - done for limit, done in zip(shares.limits, taken)]
            open_ = np.array([weight if left is None or left > 0 else 0.0 for weight, left in zip(weights, rest)])
            if not open_.any():
                if end is None and position:
                    return
                break  # the sources of this stage are used up: the next begins early
            segment = _segment(position, taken, open_ / open_.sum(), rest, None if end is None else end - position)
            yield segment
            if segment.blocks is None:
                return
            position, taken = segment.after()


def _segment(
    position: int, taken: tuple[int, ...], weights: np.ndarray, rest: Sequence[int | None], room: int | None
) -> Segment:
    """As many blocks as every source's rest and the room allow; or, where they do not allow one, a block as large as
    they do.
    """
    rarest = max(weights[weights > 0].min(), _LEAST_ROWS / _MOST_BLOCK)
    size = max(_LEAST_BLOCK, 1 << math.ceil(math.log2(_LEAST_ROWS / rarest)))
    counts = _apportion(weights, size)
    fit = [left // count for left, count in zip(rest, counts) if left is not None and count]
    if room is not None:
        fit.append(room // size)
    if not fit or min(fit):
        return Segment(position, min(fit) if fit else None, counts, taken)
    if room is not None and room < size:
        counts = _apportion(weights, room)
    fitting = (count if left is None else min(count, left) for count, left in zip(counts, rest))
    return Segment(position, 1, tuple(fitting), taken)


def _apportion(weights: np.ndarray, rows: int) -> tuple[int, ...]:
    """`rows` by largest remainders: whole numbers that sum to it, each within one of its share."""
    exact = weights * rows
    counts = np.floor(exact).astype(np.int64)
    order = np.argsort(-(exact - counts), kind="stable")
    counts[order[: rows - counts.sum()]] += 1
    return tuple(map(int, counts))


def _weights(flag: str, words: Sequence[str]) -> dict[str, float]:
    found: dict[str, float] = {}
    for word in words:
        name, equals, value = word.strip().rpartition("=")
        if not equals or not name:
            raise ConfigError(f"{flag} = {word!r}: expected NAME=NUMBER")
        if name in found:
            raise ConfigError(f"{flag} names {name!r} twice")
        found[name] = _number(value, f"{flag} = {word!r}")
        if not 0 <= found[name] < math.inf:
            raise ConfigError(f"{flag} = {word!r}: must be 0 or more")
    if found and not any(found.values()):
        raise ConfigError(f"{flag}: every number is 0; at least one source must be left")
    return found


def _number(text: str, place: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{place}: {text!r} is no number") from None
