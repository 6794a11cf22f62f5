"""What was measured, and what is reckoned from it. MB and GB are 10^6 and 10^9 bytes of decompressed input."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

from moai.core.config import Setting
from moai.pretraining.options import DataConfig
from moai.pretraining.tokenizer_backend import Chosen, name_of

_SHORT_SECONDS = 1.0
_HELD_UP = 0.8


@dataclass(frozen=True)
class Stretch:
    """Work that one process did from `began` to `ended`, seconds of the machine's clock."""

    worker: int
    began: float
    ended: float
    bytes: int
    tokens: int


def bytes_per_second(stretches: Iterable[Stretch]) -> float:
    """Of all workers together while they work: each from its own first moment to its own last, the waiting in between
    included.
    """
    of: dict[int, list[Stretch]] = defaultdict(list)
    for stretch in stretches:
        if stretch.bytes:
            of[stretch.worker].append(stretch)
    return sum(
        sum(s.bytes for s in own) / (max(s.ended for s in own) - min(s.began for s in own)) for own in of.values()
    )


@dataclass(frozen=True)
class Lap:
    """One shard's way through the pipeline. Seconds are this worker's, from the first byte read; `parsed` and
    `tokenized` hold all that came before.
    """

    stretch: Stretch
    cpu_seconds: float
    parsed: float
    tokenized: float
    written_bytes: int
    nominal_bytes: int
    counts: Counter[str]


@dataclass(frozen=True)
class Report:
    """The measurement, and all that is reckoned from it. MB and GB are 10^6 and 10^9 bytes of decompressed input."""

    backend: Chosen
    workers: Setting
    warnings: tuple[str, ...]
    config: DataConfig
    laps: tuple[Lap, ...]
    limit: tuple[Stretch, ...]
    bare: bool
    """The limit read lines and parsed them by itself; otherwise it had to use moai's reader."""
    startup_seconds: float
    total_bytes: float
    whole: bool
    """The slice is all there is."""
    gigabytes: float

    @cached_property
    def counts(self) -> Counter[str]:
        total: Counter[str] = Counter()
        for lap in self.laps:
            total.update(lap.counts)
        return total

    @cached_property
    def bytes(self) -> int:
        return sum(lap.stretch.bytes for lap in self.laps)

    @cached_property
    def tokens(self) -> int:
        return sum(lap.stretch.tokens for lap in self.laps)

    @cached_property
    def speed(self) -> float:
        """Bytes a second, steady."""
        return bytes_per_second(lap.stretch for lap in self.laps)

    @cached_property
    def spent(self) -> float:
        """Seconds of all workers within shards."""
        return sum(lap.stretch.ended - lap.stretch.began for lap in self.laps)

    def lines(self) -> Iterator[str]:
        """For people."""
        counts, stretches = self.counts, [lap.stretch for lap in self.laps]
        at_work = len({stretch.worker for stretch in stretches})
        measured = max(s.ended for s in stretches) - min(s.began for s in stretches)
        yield f"backend      {name_of(self.backend.backend.made_by())}: {self.backend.reason}"
        yield f"workers      {self.workers.value}: {self.workers.reason}"
        yield from (f"             {warning}" for warning in self.warnings)
        of = "all of it" if self.whole else f"of about {self.total_bytes:,.0f}"
        yield (
            f"slice        {self.bytes:,} bytes ({of}) in {len(self.laps):,} shards, {self.config.packing}, "
            f"{measured:.2f} s"
        )
        if measured < _SHORT_SECONDS:
            yield (
                f"             less than {_SHORT_SECONDS:.0f} s: the rates below swing; "
                f"{'there is no more data' if self.whole else 'give more --seconds'}"
            )
        yield (
            f"documents    {counts['read']:,} read = {counts['kept']:,} kept + {counts['filtered']:,} filtered + "
            f"{counts['quarantined']:,} quarantined"
            + (
                "; more of these than --max_bad_ratio allows"
                if counts["quarantined"] > max(10, self.config.max_bad_ratio * counts["read"])
                else ""
            )
        )
        ends = counts["tokens.eos"] + counts["tokens.bos"]
        yield (
            f"tokens       {counts['tokens.text']:,} of text + {ends:,} ends = {counts['tokens.rows']:,} in rows + "
            f"{counts['tokens.dropped']:,} dropped"
        )
        yield f"start-up     {self.startup_seconds:.2f} s from the command to the first shard"
        yield (
            f"speed        {self.speed / 1e6:.2f} MB/s, {self.speed * self.tokens / self.bytes / 1e6:.3f} million "
            f"tokens/s"
        )
        cpu = sum(lap.cpu_seconds for lap in self.laps)
        yield (
            f"             {self.speed / at_work / 1e6:.2f} MB/s a worker ({at_work} at work), "
            f"{self.bytes / cpu / 1e6:.2f} MB a CPU second"
        )
        if cpu < _HELD_UP * self.spent:
            yield (
                f"             a worker had {cpu / self.spent:.2f} of a core: the disk or other programs held it up, "
                f"a quiet machine is faster"
            )
        parse, tokenize, write = self.shares()
        yield (
            f"worker       {parse:.1%} reading and parsing, {tokenize:.1%} tokenizing, {write:.1%} packing and writing"
        )
        yield f"disk         {sum(lap.written_bytes for lap in self.laps) / counts['tokens.rows']:.3f} bytes a token"
        limit, how = bytes_per_second(self.limit), "" if self.bare else " (with moai's reader: not plain JSON lines)"
        number = len(self.limit)
        yield (
            f"limit        {limit / 1e6:.2f} MB/s: {number} process{'es' * (number > 1)} that only read, parse and "
            f"tokenize the same{how}"
        )
        yield f"             moai is at {self.speed / limit:.1%} of it"
        yield (
            f"time         {_for_people(self.startup_seconds + self.total_bytes / self.speed)} for this data "
            f"({self.total_bytes / 1e9:,.3f} GB)"
        )
        yield f"             {self.gigabytes * 1e9 / self.speed / 3600:.2f} hours for {self.gigabytes:,g} GB"

    def shares(self) -> tuple[float, float, float]:
        """Of the workers' time in shards: reading and parsing, tokenizing, packing and writing."""
        parsed, tokenized = sum(lap.parsed for lap in self.laps), sum(lap.tokenized for lap in self.laps)
        return parsed / self.spent, (tokenized - parsed) / self.spent, (self.spent - tokenized) / self.spent


def _for_people(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} seconds"
    return f"{seconds / 60:.1f} minutes" if seconds < 3600 else f"{seconds / 3600:.2f} hours"
