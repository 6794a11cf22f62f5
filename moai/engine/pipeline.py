"""The contract of the engine: sources give RecordBatches, transforms pass them on, a sink keeps them; a shard at a time.

    pipeline = Pipeline(source=..., transforms=(ToText(...), Tokenize(...), Pack(...)), sink=..., transform_key=...)
    receipt = run_shard(pipeline, shard)          # in a worker; only the receipt goes back

A shard's identity is its content: `shard_key(raw range digest, transform key)`. On cold data the digest is a by-product of
the one read that also feeds the transforms; only where the cache holds results of the same transform is the range hashed
first, because then a hash (GB/s) may save tokenizing (MB/s).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import pyarrow as pa
import xxhash

from moai.files import digest_json

RECEIPT_VERSION = 1
MAX_DETAILS = 20_000
"""Bad records of one shard that are kept with their place; more are only counted, so that a shard of nothing else stays small."""


@dataclass(frozen=True)
class Raw:
    """Content of a shard's source range: digest, and bytes and records (lines, rows) of each of its segments."""

    digest: str
    bytes: tuple[int, ...]
    lines: tuple[int, ...]

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Raw:
        return cls(value["digest"], tuple(value["bytes"]), tuple(value["lines"]))


@dataclass(frozen=True)
class Shard:
    """A range of one source's records. `segments` are the source's own; the engine only hands them on.

    id        for people: source name and number
    stamp_id  identity by file stamps; under it the digest of an unread range may already be known
    nominal_bytes  about how much there is to read, for progress
    """

    id: str
    segments: tuple[Any, ...]
    stamp_id: str
    nominal_bytes: int
    raw: Raw | None = None


class Meter:
    """Digest, bytes and lines of a raw range, gathered while it is read."""

    def __init__(self) -> None:
        self._hash = xxhash.xxh3_128()
        self._bytes: list[int] = []
        self._lines: list[int] = []

    def begin_segment(self) -> None:
        self._bytes.append(0)
        self._lines.append(0)

    def update(self, block: bytes | memoryview, *, lines: int = 0) -> None:
        self._hash.update(block)
        self._bytes[-1] += len(block)
        self._lines[-1] += lines

    def raw(self) -> Raw:
        """The segments' lengths are hashed too: the same bytes cut into other files are other records."""
        content = self._hash.hexdigest()
        return Raw(digest_json([content, self._bytes])[:32], tuple(self._bytes), tuple(self._lines))


@dataclass(frozen=True)
class Receipt:
    """All that comes back from a worker: what one finished shard holds. It says nothing of time, place or worker."""

    shard_key: str
    transform_key: str
    raw: Raw
    counts: dict[str, int]
    rows: int
    bytes: int
    xxh3_128: str
    quarantine_xxh3_128: str | None = None
    made_by: dict[str, str] = field(default_factory=dict)
    version: int = RECEIPT_VERSION

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Receipt:
        return cls(**{**value, "raw": Raw.from_json(value["raw"])})


class Source(Protocol):
    @property
    def name(self) -> str: ...
    def shards(self) -> Iterator[Shard]: ...  # in order, stable; independent of num_proc
    def digest(self, shard: Shard) -> Raw: ...  # of the range, without making records
    def read(self, shard: Shard, meter: Meter) -> Iterator[pa.RecordBatch]: ...
    def remember(self, shard: Shard, raw: Raw) -> None: ...  # in the driver, once the shard is finished


class Transform(Protocol):
    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]: ...


class Sink(Protocol):
    def committed(self, shard_key: str) -> Receipt | None: ...
    def write(self, shard: Shard, batches: Iterator[pa.RecordBatch], seal: Callable[[], Sealed]) -> Receipt: ...  # atomic, in the worker


@dataclass(frozen=True)
class Sealed:
    """What is known of a shard once its last batch has passed."""

    shard_key: str
    transform_key: str
    raw: Raw
    counts: dict[str, int]
    quarantine: tuple[dict[str, Any], ...]


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """What a worker is sent once, at its start."""

    source: Source
    transforms: tuple[Transform, ...]
    sink: Sink
    transform_key: str
    probe: bool = True
    """Hash a range before working on it: worth it once the cache holds anything made by `transform_key`."""


@dataclass
class Tally:
    """Counters and bad records of the shard in work. Its place is a context variable, so that a transform needs no handle on it."""

    counts: Counter[str] = field(default_factory=Counter)
    quarantine: list[dict[str, Any]] = field(default_factory=list)
    on_progress: Callable[[int], None] | None = None


_tally: ContextVar[Tally] = ContextVar("tally")


def count(name: str, number: int = 1) -> None:
    """Add to a counter of the shard in work; it ends up in the receipt and, summed, in the manifest."""
    if number:
        _tally.get().counts[name] += number


def quarantine(reason: str, *, detail: str, segment: int, line: int, offset: int | None, sample: bytes) -> None:
    """Set one bad record aside: counted by `reason`, kept with its place and its first 200 bytes."""
    tally = _tally.get()
    tally.counts["quarantined"] += 1
    tally.counts[f"quarantined.{reason}"] += 1
    if len(tally.quarantine) >= MAX_DETAILS:
        tally.counts["quarantined_without_place"] += 1
        return
    place = {"segment": segment, "line": line, "offset": offset}
    tally.quarantine.append({"reason": reason, "detail": detail, **place, "sample": sample[:200].decode("utf-8", "backslashreplace")})


def advance(documents: int) -> None:
    """Tell the driver that this worker has got `documents` further: progress, and proof that it does not hang."""
    tally = _tally.get()
    if tally.on_progress:
        tally.on_progress(documents)


def shard_key(raw: Raw, transform_key: str) -> str:
    """Name of a finished shard: what was read and what was done to it."""
    return digest_json({"raw": raw.digest, "transform": transform_key})[:40]


def run_shard(pipeline: Pipeline, shard: Shard, on_progress: Callable[[int], None] | None = None) -> tuple[Receipt, bool]:
    """One shard from source to sink: its receipt, and whether a finished shard was reused."""
    raw = shard.raw or (pipeline.source.digest(shard) if pipeline.probe else None)
    if raw and (receipt := pipeline.sink.committed(shard_key(raw, pipeline.transform_key))):
        return receipt, True
    tally, meter = Tally(on_progress=on_progress), Meter()
    token = _tally.set(tally)
    try:
        batches = pipeline.source.read(shard, meter)
        for transform in pipeline.transforms:
            batches = transform(batches)
        return pipeline.sink.write(shard, batches, lambda: _seal(pipeline, meter, tally)), False
    finally:
        _tally.reset(token)


def peek(batches: Iterator[pa.RecordBatch], transforms: tuple[Transform, ...]) -> pa.RecordBatch | None:
    """The first batch behind the transforms; what they count and set aside is dropped."""
    token = _tally.set(Tally())
    try:
        for transform in transforms:
            batches = transform(batches)
        return next(batches, None)
    finally:
        _tally.reset(token)


def _seal(pipeline: Pipeline, meter: Meter, tally: Tally) -> Sealed:
    raw = meter.raw()
    counts = dict(sorted(tally.counts.items()))
    return Sealed(shard_key(raw, pipeline.transform_key), pipeline.transform_key, raw, counts, tuple(tally.quarantine))
