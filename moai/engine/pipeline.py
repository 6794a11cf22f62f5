"""The contract of the engine: sources give RecordBatches, transforms pass them on, a sink keeps them; a shard at a
time.

    pipeline = Pipeline(source=..., transforms=(ToText(...), Tokenize(...), Pack(...)), sink=..., transform_key=...)
    receipt = run_shard(pipeline, shard)          # in a worker; only the receipt goes back

A shard's identity is its content: `shard_key(raw range digest, transform key)`. On cold data the digest is a by-product
of the one read that also feeds the transforms; only where the cache holds results of the same transform is the range
hashed first, because then a hash (GB/s) may save tokenizing (MB/s).
"""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import xxhash

from moai.core.files import digest_json
from moai.engine.documents import DOCUMENT, Documents, Numbers
from moai.engine.schema import Column

RECEIPT_VERSION = 2
MAX_DETAILS = 20_000
"""Bad records of one shard that are kept with their place; more are only counted, so that a shard of nothing else stays
small.
"""
DIED, HUNG = "worker_died", "hung"
"""Reasons that are no property of the record alone: another machine may take it. A shard that leaves out such a record
has a key of its own.
"""
BEHIND = -1
"""In place of a number of records: the source has no more, the transforms and the sink finish the shard."""


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
        self.named: Callable[[Raw], Raw] = lambda raw: raw
        """What a source makes of the digest, where it gives only some of the range's documents."""

    def begin_segment(self) -> None:
        self._bytes.append(0)
        self._lines.append(0)

    def update(self, block: bytes | memoryview, *, lines: int = 0) -> None:
        self._hash.update(block)
        self._bytes[-1] += len(block)
        self._lines[-1] += lines

    def context(self, data: bytes) -> None:
        """What decides how the segment is read but is no part of it, like the header of a table: hashed, not
        counted.
        """
        self._hash.update(xxhash.xxh3_128_digest(data))

    @property
    def num_bytes(self) -> int:
        """Read so far."""
        return sum(self._bytes)

    def raw(self) -> Raw:
        """The segments' lengths are hashed too: the same bytes cut into other files are other records."""
        content = self._hash.hexdigest()
        return self.named(Raw(digest_json([content, self._bytes])[:32], tuple(self._bytes), tuple(self._lines)))


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
    documents_bytes: int = 0
    documents_xxh3_128: str | None = None
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
    def write(
        self, shard: Shard, batches: Iterator[pa.RecordBatch], seal: Callable[[], Sealed]
    ) -> Receipt: ...  # atomic, in the worker


Order = tuple[int, Shard]
"""A shard to run, and which of the pipelines it belongs to."""
Finished = tuple[Order, Receipt, bool]
"""An order, its receipt, and whether the receipt was found rather than made."""


@dataclass(frozen=True)
class Sealed:
    """What is known of a shard once its last batch has passed."""

    shard_key: str
    transform_key: str
    raw: Raw
    counts: dict[str, int]
    quarantine: tuple[dict[str, Any], ...]
    documents: pa.RecordBatch | None = None
    """What became of each document, where the pipeline asks for it."""


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """What a worker is sent once, at its start."""

    source: Source
    transforms: tuple[Transform, ...]
    sink: Sink
    transform_key: str
    measured: tuple[Column, ...] | None = None
    """Columns of Signals in the documents file; None where the pipeline writes no such file."""
    proof: Callable[[], None] | None = None
    """Called before each shard, where it is worked on: raises where that is no place for it."""
    probe: bool = True
    """Hash a range before working on it: worth it once the cache holds anything made by `transform_key`."""


@dataclass(frozen=True, kw_only=True)
class Care:
    """How a shard is worked on again after its worker died or hung. The bytes that come out are the same, but for the
    records left out.
    """

    parts: int = 1
    """The source's batches are handed on in so many pieces."""
    singly: range = range(0)
    """These records, numbered as the source gives them, each alone: the next death names one."""
    left_out: tuple[tuple[int, str, str], ...] = ()
    """(record, reason, detail) of those that killed a worker when they were handed on alone."""

    def pieces(self, first: int, records: int) -> Iterator[tuple[int, int]]:
        """(start, end) of each piece of a batch whose first record has the number `first`."""
        alone = [record - first for record in (*self.singly, *(record for record, _, _ in self.left_out))]
        cuts = {
            *range(0, records, -(-records // self.parts) or 1),
            records,
            *(cut for record in alone for cut in (record, record + 1) if 0 < cut < records),
        }
        yield from itertools.pairwise(sorted(cuts))


_NO_CARE = Care()


@dataclass
class Tally:
    """Counters and bad records of the shard in work. Its place is a context variable, so that a transform needs no
    handle on it.
    """

    counts: Counter[str] = field(default_factory=Counter)
    quarantine: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[tuple[str, int, int]] = field(default_factory=list)
    documents: Documents = field(default_factory=Documents)
    raw: Raw | None = None
    """The range, where it is known before it is read and all of its records are worked on."""
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
    tally.quarantine.append(
        {"reason": reason, "detail": detail, **place, "sample": sample[:200].decode("utf-8", "backslashreplace")}
    )


def add_documents(records: pa.RecordBatch, sizes: np.ndarray) -> Numbers:
    """Number the documents that these records of a source give; `sizes` are their bytes. In columnar files a row is its
    own offset.
    """
    offsets = records["line"] if records["offset"].null_count else records["offset"]
    return _tally.get().documents.add(records["segment"].to_numpy(), offsets.to_numpy(), sizes)


def drop(name: str, batch: pa.RecordBatch, reasons: Sequence[str] | None = None) -> None:
    """Count the documents of a batch as filtered by `name`, and keep why."""
    tally = _tally.get()
    count("filtered", batch.num_rows)
    labels = [f"{name}.{reason}" for reason in reasons] if reasons is not None else [name] * batch.num_rows
    for label, number in Counter(labels).items():
        count(f"filtered.{label}", number)
    if DOCUMENT in batch.schema.names:
        tally.documents.drop(batch[DOCUMENT].to_numpy(), labels)


def measured(batch: pa.RecordBatch, name: str, values: pa.Array) -> None:
    """Keep what a Signal found for the documents of a batch."""
    if DOCUMENT in batch.schema.names:
        _tally.get().documents.note_measured(batch[DOCUMENT].to_numpy(), name, values)


def documents() -> Documents:
    """Those of the shard in work."""
    return _tally.get().documents


def known_range() -> Raw | None:
    """That of the shard in work, where it is known before it is read."""
    return _tally.get().raw


def advance(documents: int) -> None:
    """Tell the driver that this worker has got `documents` further: progress, and proof that it does not hang."""
    tally = _tally.get()
    if tally.on_progress:
        tally.on_progress(documents)


def shard_key(raw: Raw, transform_key: str, left_out: Sequence[tuple[str, int, int]] = ()) -> str:
    """Name of a finished shard: what was read, what was done to it and, where a machine could not take all of it, the
    (reason, segment, line) of what it left out."""
    named: dict[str, Any] = {"raw": raw.digest, "transform": transform_key}
    return digest_json({**named, "left_out": left_out} if left_out else named)[:40]


def run_shard(
    pipeline: Pipeline,
    shard: Shard,
    on_progress: Callable[[int], None] | None = None,
    on_batch: Callable[[int, int], None] = lambda record, records: None,
    care: Care = _NO_CARE,
) -> tuple[Receipt, bool]:
    """One shard from source to sink: its receipt, and whether a finished shard was reused.

    on_batch  hears (first record, records) of what the transforms work on; 0 records while the source reads, BEHIND
              once it has no more
    """
    if pipeline.proof:
        pipeline.proof()
    raw = shard.raw or (pipeline.source.digest(shard) if pipeline.probe else None)
    if raw and not care.left_out and (receipt := pipeline.sink.committed(shard_key(raw, pipeline.transform_key))):
        return receipt, True
    tally, meter = Tally(on_progress=on_progress, raw=None if care.left_out else raw), Meter()
    token = _tally.set(tally)
    try:
        batches = _hand_on(pipeline.source.read(shard, meter), on_batch, care)
        for transform in pipeline.transforms:
            batches = transform(batches)
        return pipeline.sink.write(shard, batches, lambda: _seal(pipeline, meter, tally)), False
    finally:
        _tally.reset(token)


@contextlib.contextmanager
def tallied() -> Iterator[Tally]:
    """A tally of its own for what transforms count and set aside outside of a shard."""
    tally = Tally()
    token = _tally.set(tally)
    try:
        yield tally
    finally:
        _tally.reset(token)


def peek(batches: Iterator[pa.RecordBatch], transforms: tuple[Transform, ...]) -> pa.RecordBatch | None:
    """The first batch behind the transforms; what they count and set aside is dropped."""
    with tallied():
        for transform in transforms:
            batches = transform(batches)
        return next(batches, None)


def _hand_on(
    batches: Iterator[pa.RecordBatch], on_batch: Callable[[int, int], None], care: Care
) -> Iterator[pa.RecordBatch]:
    """The source's batches, each announced before the transforms get it, without the records to be left out."""
    left_out = {record: why for record, *why in care.left_out}
    first = 0
    for batch in batches:
        for start, end in care.pieces(first, batch.num_rows):
            if first + start in left_out:
                _leave_out(batch, start, first + start, *left_out[first + start])
                continue
            on_batch(first + start, end - start)
            yield batch if end - start == batch.num_rows else batch.slice(start, end - start)
            on_batch(first + end, 0)
        first += batch.num_rows
    on_batch(first, BEHIND)


def _leave_out(batch: pa.RecordBatch, index: int, record: int, reason: str, detail: str) -> None:
    """Set aside a record that no transform has seen. Where the source names no place, a record's number is its line."""
    place = {name: batch[name][index].as_py() for name in ("segment", "line", "offset") if name in batch.schema.names}
    place = {"segment": 0, "line": record, "offset": None, **place}
    tally = _tally.get()
    tally.left_out.append((reason, place["segment"], place["line"]))
    count("read")
    advance(1)
    quarantine(reason, detail=detail, sample=_sample(batch.slice(index, 1)), **place)


def _sample(row: pa.RecordBatch) -> bytes:
    try:
        content = row.drop_columns(
            [name for name in ("problem", "segment", "line", "offset") if name in row.schema.names]
        ).to_pylist()[0]
    except UnicodeDecodeError:
        return b""
    return content["record"] if "record" in content else str(content).encode("utf-8", "replace")


def _seal(pipeline: Pipeline, meter: Meter, tally: Tally) -> Sealed:
    raw, found = meter.raw(), None
    if pipeline.measured is not None:
        tally.counts["kept"] = tally.documents.number - tally.documents.filtered
        found = tally.documents.batch(pipeline.measured)
    counts = dict(sorted(tally.counts.items()))
    return Sealed(
        shard_key(raw, pipeline.transform_key, tally.left_out),
        pipeline.transform_key,
        raw,
        counts,
        tuple(tally.quarantine),
        found,
    )
