"""What was measured, and what is reckoned from it. MB and GB are 10^6 and 10^9 bytes of decompressed input."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
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
    """Of all workers together, each from its own first moment to its own last."""
    of: dict[int, list[Stretch]] = defaultdict(list)
    for stretch in stretches:
        if stretch.bytes:
            of[stretch.worker].append(stretch)
    return sum(sum(s.bytes for s in own) / _lasted(own) for own in of.values())


def _lasted(stretches: Sequence[Stretch]) -> float:
    return max(stretch.ended for stretch in stretches) - min(stretch.began for stretch in stretches)


@dataclass(frozen=True)
class Lap:
    """One shard's way through the pipeline, in seconds of its worker; `tokenized` holds `parsed` too."""

    stretch: Stretch
    cpu_seconds: float
    parsed: float
    tokenized: float
    written_bytes: int
    nominal_bytes: int
    counts: Counter[str]


@dataclass(frozen=True)
class Report:
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

    @property
    def bytes(self) -> int:
        return sum(lap.stretch.bytes for lap in self.laps)

    @property
    def tokens(self) -> int:
        return sum(lap.stretch.tokens for lap in self.laps)

    def lines(self) -> Iterator[str]:
        """For people."""
        counts, stretches, size = self.counts, [lap.stretch for lap in self.laps], self.bytes
        at_work, measured = len({stretch.worker for stretch in stretches}), _lasted(stretches)
        speed, limit = bytes_per_second(stretches), bytes_per_second(self.limit)
        cpu = sum(lap.cpu_seconds for lap in self.laps)
        spent = sum(stretch.ended - stretch.began for stretch in stretches)
        yield f"backend      {name_of(self.backend.backend.made_by())}: {self.backend.reason}"
        yield f"workers      {self.workers.value}: {self.workers.reason}"
        yield from (f"             {warning}" for warning in self.warnings)
        of = "all of it" if self.whole else f"of about {self.total_bytes:,.0f}"
        shards = f"{len(self.laps):,} shards"
        yield f"slice        {size:,} bytes ({of}) in {shards}, {self.config.packing}, {measured:.2f} s"
        if measured < _SHORT_SECONDS:
            more = "there is no more data" if self.whole else "give more --seconds"
            yield f"             less than {_SHORT_SECONDS:.0f} s: the rates below swing; {more}"
        too_many = counts["quarantined"] > max(10, self.config.max_bad_ratio * counts["read"])
        yield (
            f"documents    {counts['read']:,} read = {counts['kept']:,} kept + {counts['filtered']:,} filtered + "
            f"{counts['quarantined']:,} quarantined{'; more of these than --max_bad_ratio allows' if too_many else ''}"
        )
        yield (
            f"tokens       {counts['tokens.text']:,} of text + {counts['tokens.eos'] + counts['tokens.bos']:,} ends = "
            f"{counts['tokens.rows']:,} in rows + {counts['tokens.dropped']:,} dropped"
        )
        yield f"start-up     {self.startup_seconds:.2f} s from the command to the first shard"
        yield f"speed        {speed / 1e6:.2f} MB/s, {speed * self.tokens / size / 1e6:.3f} million tokens/s"
        each = f"{speed / at_work / 1e6:.2f} MB/s a worker ({at_work} at work)"
        yield f"             {each}, {size / cpu / 1e6:.2f} MB a CPU second"
        if cpu < _HELD_UP * spent:
            yield (
                f"             a worker had {cpu / spent:.2f} of a core: the disk or other programs held it up, "
                f"a quiet machine is faster"
            )
        parsed, tokenized = (sum(getattr(lap, name) for lap in self.laps) / spent for name in ("parsed", "tokenized"))
        yield (
            f"worker       {parsed:.1%} reading and parsing, {tokenized - parsed:.1%} tokenizing, "
            f"{1 - tokenized:.1%} packing and writing"
        )
        yield f"disk         {sum(lap.written_bytes for lap in self.laps) / counts['tokens.rows']:.3f} bytes a token"
        processes = f"{len(self.limit)} process{'es' * (len(self.limit) > 1)}"
        how = "" if self.bare else " (with moai's reader: not plain JSON lines)"
        yield f"limit        {limit / 1e6:.2f} MB/s: {processes} that only read, parse and tokenize the same{how}"
        yield f"             moai is at {speed / limit:.1%} of it"
        seconds = _for_people(self.startup_seconds + self.total_bytes / speed)
        yield f"time         {seconds} for this data ({self.total_bytes / 1e9:,.3f} GB)"
        yield f"             {self.gigabytes * 1e9 / speed / 3600:.2f} hours for {self.gigabytes:,g} GB"


def _for_people(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} seconds"
    return f"{seconds / 60:.1f} minutes" if seconds < 3600 else f"{seconds / 3600:.2f} hours"
