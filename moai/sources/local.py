"""Local files as shards.

    .jsonl .ndjson .json .txt .csv .tsv, plain or .zst .gz .xz .bz2 · .parquet · .arrow and directories of
    `save_to_disk` · folders, globs

Where shards are cut depends on a file's bytes, its name and `shard_bytes`, and on nothing else:

    plain lines              at the first line that begins at or after each mark of shard_bytes
    compressed, array, CSV   one reader finds the same kind of marks in the decompressed stream and hands ranges on
    Parquet, Arrow           whole row groups or record batches until shard_bytes is reached
    small files              share a shard: a walk over the sorted names, cut where shard_bytes is reached or a name's
                             hash says so,
                             so that adding a file changes one shard

Digests of ranges already read are remembered under the files' stamps (size, times, inode), unless those are younger
than 2 s. What a range is and how it is read, a file's `Kind` knows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import xxhash

from moai.cache.ledger import Ledger
from moai.core.errors import SourceError
from moai.core.files import digest_json, input_errors, storage_of
from moai.engine.pipeline import Meter, Raw, Shard, shard_key
from moai.sources.kinds import File, Kind, Segment, Stream
from moai.sources.kinds.kind import EXPANSION, asking
from moai.sources.records import Limits
from moai.sources.streams import RangeWriter

_PEEK_BYTES = 1 << 20
_PLACES = {"record", "problem", "segment", "line", "offset"}


@dataclass(frozen=True, kw_only=True)
class LocalSource:
    """Files of one kind, in the order given. Sizes are in bytes."""

    name: str
    kind: Kind
    files: tuple[File, ...]
    shard_bytes: int
    cache: Path
    spool_dir: Path
    columns: tuple[str, ...] = ()
    max_record_bytes: int = 16 << 20
    batch_rows: int = 1000
    batch_bytes: int = 4 << 20
    trust_stamps: bool = True
    transform_keys: tuple[str, ...] = ()
    """What finished shards are looked for under. With them, a compressed file of which a range is not finished is
    decompressed once more, by the driver; without them, every range that is read again is decompressed to from the
    file's beginning.
    """

    def __post_init__(self) -> None:
        if self.kind.columnar and (taken := _PLACES.intersection(self.columns)):
            raise SourceError(
                f"{self.name}: the column {min(taken)!r} has a name that places of records have; rename it"
            )

    @property
    def nominal_bytes(self) -> int:
        return sum(file.stamp.size for file in self.files)

    def shards(self) -> Iterator[Shard]:
        for number, shard in enumerate(self._unnumbered()):
            raw = shard.raw or (Ledger(self.cache).known_raw(shard.stamp_id) if self.trust_stamps else None)
            yield replace(shard, id=f"{self.name}:{number:05d}", raw=raw)

    def digest(self, shard: Shard) -> Raw:
        meter = Meter()
        for segment in shard.segments:
            meter.begin_segment()
            with asking(self.kind, segment.file.path):
                self.kind.digest(segment, self.columns, self._limits, meter)
                self._check_unchanged(segment.file)
        return meter.raw()

    def read(self, shard: Shard, meter: Meter) -> Iterator[pa.RecordBatch]:
        for index, segment in enumerate(shard.segments):
            meter.begin_segment()
            with asking(self.kind, segment.file.path):
                yield from self.kind.batches(segment, index, self.columns, self._limits, meter)
                self._check_unchanged(segment.file)

    def remember(self, shard: Shard, raw: Raw) -> None:
        """Keep the digest of a range that was read, and drop what was spooled for it."""
        for segment in shard.segments:
            if segment.spool:
                Path(segment.spool).unlink(missing_ok=True)
        if shard.stamp_id and not shard.raw:
            Ledger(self.cache).remember_raw(shard.stamp_id, raw)

    def looks(self, files: int) -> Iterator[Iterator[pa.RecordBatch]]:
        """The first files, each from its beginning and in small batches, not to be read to its end: for a look at their
        records.
        """
        limits = replace(self._limits, batch_bytes=min(self.batch_bytes, _PEEK_BYTES // 4))
        for file in self.files[:files]:
            with asking(self.kind, file.path):
                first = next(self.kind.cuts(file, 1), None)
            if first:
                yield self._look(Segment(file, first[0], first[1]), limits)

    @property
    def _limits(self) -> Limits:
        return Limits(self.max_record_bytes, self.batch_rows, self.batch_bytes)

    def _look(self, segment: Segment, limits: Limits) -> Iterator[pa.RecordBatch]:
        with asking(self.kind, segment.file.path):
            yield from self.kind.batches(segment, 0, self.columns, limits)

    def _unnumbered(self) -> Iterator[Shard]:
        group: list[Segment] = []
        for file in self.files:
            kind = self.kind
            if not isinstance(kind, Stream):
                yield from self._ranges(file)
            elif file.nominal_bytes < self.shard_bytes or kind.is_one_record:
                if group and _nominal(group) + file.nominal_bytes > self.shard_bytes:
                    yield self._shard(group)
                    group = []
                group.append(Segment(file, 0, file.stamp.size))
                if _cuts_after(file, self.shard_bytes):
                    yield self._shard(group)
                    group = []
            else:
                if group:
                    yield self._shard(group)
                    group = []
                yield from (
                    self._marks(file) if kind.is_lines(file) and kind.is_seekable(file) else self._stream(kind, file)
                )
        if group:
            yield self._shard(group)

    def _ranges(self, file: File) -> Iterator[Shard]:
        with asking(self.kind, file.path):
            for start, end, size in self.kind.cuts(file, self.shard_bytes):
                yield replace(self._shard([Segment(file, start, end, aligned=True)]), nominal_bytes=size)

    def _marks(self, file: File) -> Iterator[Shard]:
        for start in range(0, file.stamp.size, self.shard_bytes):
            yield self._shard([Segment(file, start, min(start + self.shard_bytes, file.stamp.size))])

    def _stream(self, kind: Stream, file: File) -> Iterator[Shard]:
        """Ranges of a file that must be read from its beginning: those known from before, then those found now."""
        ledger, spooled = Ledger(self.cache), not kind.is_seekable(file)
        stream = "" if file.stamp.is_racy() else "stream"
        identity: list[object] = [stream, file.path, file.stamp.as_list(), self.shard_bytes, self.kind.identity]
        known = ledger.known(digest_json(identity)) if self.trust_stamps and identity[0] else None
        raws = [self._known_range(ledger, identity, index) for index in range(len(known["ends"]))] if known else []
        if known and all(raws) and (not spooled or self._finished(ledger, raws)):
            for raw, start, end in zip(raws, [0, *known["ends"]], known["ends"]):
                yield self._range_shard(file, start, end, len(raws), raw, None)
            return
        ends: list[int] = []
        start = 0
        with contextlib.closing(
            RangeWriter(self._whole(kind, file), self.spool_dir if spooled else None, kind.context(file))
        ) as ranges:
            for cut in _and_rest(kind.record_ends(file, iter(ranges), self.shard_bytes, self._limits)):
                raw, spool = ranges.end_range(cut)
                end = start + raw.bytes[0]
                if end > start:
                    ends.append(end)
                    if identity[0]:
                        ledger.remember_raw(digest_json([*identity, len(ends) - 1]), raw)
                    yield self._range_shard(file, start, end, 0, raw, spool)
                start = end
        self._check_unchanged(file)
        if identity[0]:
            ledger.remember(digest_json(identity), {"ends": ends})

    def _finished(self, ledger: Ledger, raws: list[Raw | None]) -> bool:
        return all(raw and ledger.receipt(shard_key(raw, key)) for key in self.transform_keys for raw in raws)

    def _whole(self, kind: Stream, file: File) -> Iterator[bytes]:
        with input_errors(file.path):
            yield from kind.stream(file, self.batch_bytes)

    def _known_range(self, ledger: Ledger, identity: list[object], index: int) -> Raw | None:
        return ledger.known_raw(digest_json([*identity, index]))

    def _range_shard(self, file: File, start: int, end: int, of: int, raw: Raw | None, spool: Path | None) -> Shard:
        """`of`: how many ranges the file has, 0 while unknown; then progress goes by a usual rate of compression."""
        nominal = file.stamp.size // of if of else (end - start) // (EXPANSION // 2 if file.compression else 1)
        segment = Segment(file, start, end, aligned=True, spool=str(spool) if spool else None)
        return Shard("", (segment,), "", nominal, raw)

    def _shard(self, segments: list[Segment]) -> Shard:
        identity = [self.kind.identity, *([s.file.path, s.file.stamp.as_list(), s.start, s.end] for s in segments)]
        racy = any(segment.file.stamp.is_racy() for segment in segments)
        stamp_id = "" if racy else digest_json([identity, sorted(self.columns)])
        return Shard(
            "",
            tuple(segments),
            stamp_id,
            sum(
                s.file.stamp.size if s.start == 0 and s.end == s.file.stamp.size else s.end - s.start for s in segments
            ),
        )

    def _check_unchanged(self, file: File) -> None:
        with input_errors(file.path):
            now = storage_of(file.path).stamp(file.path)
        if not file.stamp.is_unwritten(now):
            raise SourceError(f"{file.path}: changed while it was read; run again when whoever writes it has finished")


def _nominal(group: list[Segment]) -> int:
    return sum(segment.file.nominal_bytes for segment in group)


def _cuts_after(file: File, shard_bytes: int) -> bool:
    """True for a share of the names that grows with the size, so that groups are about half of shard_bytes on
    average.
    """
    return xxhash.xxh3_64_intdigest(file.name.encode()) < (file.nominal_bytes * 2 << 64) // shard_bytes


def _and_rest(cuts: Iterator[int]) -> Iterator[int | None]:
    yield from cuts
    yield None
