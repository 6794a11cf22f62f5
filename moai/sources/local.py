"""Local files as shards.

    .jsonl .ndjson .json .txt, plain or .zst or .gz · .parquet · .arrow and directories of `save_to_disk` · folders, globs

Where shards are cut depends on a file's bytes, its name and `shard_bytes`, and on nothing else:

    plain lines        at the first line that begins at or after each mark of shard_bytes
    compressed, array  one reader finds the same kind of marks in the decompressed stream and hands ranges on
    Parquet, Arrow     whole row groups or record batches until shard_bytes is reached
    small files        share a shard: a walk over the sorted names, cut where shard_bytes is reached or a name's hash says so,
                       so that adding a file changes one shard

Digests of ranges already read are remembered under the files' stamps (size, times, inode), unless those are younger than 2 s.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import orjson
import pyarrow as pa
import xxhash

from moai.engine.ledger import Ledger
from moai.engine.pipeline import Meter, Raw, Shard, shard_key
from moai.errors import SourceError
from moai.files import Stamp, digest_json, input_errors, stamp
from moai.sources import columns as columnar
from moai.sources.records import Limits, read_lines_in, read_range, scan_values, split_lines, split_values, whole_file
from moai.sources.streams import EXPANSION, RangeWriter, line_cuts, open_blocks, skip, value_cuts

_PEEK_BYTES = 1 << 20
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class File:
    """One input file: where it is, what people call it, what reads it (`kind`), and its stamp."""

    path: str
    name: str
    kind: str
    compression: str
    stamp: Stamp

    @property
    def nominal_bytes(self) -> int:
        return self.stamp.size * (EXPANSION if self.compression else 1)


@dataclass(frozen=True)
class Segment:
    """A range of one file: bytes of its (decompressed) stream, or row groups or record batches.

    framing  lines | array | values | file | parquet | arrow
    aligned  the range begins and ends with records; otherwise it stands between two marks
    spool    where a compressed file's range lies decompressed
    """

    file: File
    start: int
    end: int
    framing: str
    aligned: bool = False
    spool: str | None = None


@dataclass(frozen=True, kw_only=True)
class LocalSource:
    """Files of one kind, in the order given. Sizes are in bytes."""

    name: str
    kind: str
    files: tuple[File, ...]
    shard_bytes: int
    cache: Path
    spool_dir: Path
    columns: tuple[str, ...] = ()
    txt_document: str = "line"
    max_record_bytes: int = 16 << 20
    batch_rows: int = 1000
    batch_bytes: int = 4 << 20
    trust_stamps: bool = True
    transform_key: str = ""
    """What finished shards are looked for under. With it, a compressed file of which a range is not finished is decompressed once more,
    by the driver; without it, every range that is read again is decompressed to from the file's beginning."""

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
            with input_errors(segment.file.path):
                if segment.framing == "parquet":
                    columnar.digest_parquet(segment.file.path, segment.start, segment.end, self.columns, self.batch_bytes, meter)
                elif segment.framing == "arrow":
                    columnar.digest_arrow(segment.file.path, segment.start, segment.end, self.columns, meter)
                else:
                    for block in self._blocks(segment):
                        meter.update(block, lines=block.count(b"\n"))
                self._check_unchanged(segment.file)
        return meter.raw()

    def read(self, shard: Shard, meter: Meter) -> Iterator[pa.RecordBatch]:
        for index, segment in enumerate(shard.segments):
            meter.begin_segment()
            with input_errors(segment.file.path):
                yield from self._read(segment, index, meter)
                self._check_unchanged(segment.file)

    def remember(self, shard: Shard, raw: Raw) -> None:
        """Keep the digest of a range that was read, and drop what was spooled for it."""
        for segment in shard.segments:
            if segment.spool:
                Path(segment.spool).unlink(missing_ok=True)
        if shard.stamp_id and not shard.raw:
            Ledger(self.cache).remember_raw(shard.stamp_id, raw)

    def looks(self, files: int) -> Iterator[Iterator[pa.RecordBatch]]:
        """The first files, each from its beginning and in small batches, not to be read to its end: for a look at their records."""
        rows, size = self.batch_rows, min(self.batch_bytes, _PEEK_BYTES // 4)
        for file in self.files[:files]:
            if self.kind in ("parquet", "arrow"):
                read = columnar.read_parquet if self.kind == "parquet" else columnar.read_arrow
                yield read(file.path, 0, 1, self.columns, 0, rows, size)
            else:
                yield replace(self, batch_bytes=size).read(self._shard([Segment(file, 0, file.stamp.size, self._framing())]), Meter())

    def _unnumbered(self) -> Iterator[Shard]:
        group: list[Segment] = []
        for file in self.files:
            if self.kind in ("parquet", "arrow"):
                yield from self._columnar(file)
            elif file.nominal_bytes < self.shard_bytes or self._is_one_document():
                if group and _nominal(group) + file.nominal_bytes > self.shard_bytes:
                    yield self._shard(group)
                    group = []
                group.append(Segment(file, 0, file.stamp.size, self._framing(), aligned=False))
                if _cuts_after(file, self.shard_bytes):
                    yield self._shard(group)
                    group = []
            else:
                if group:
                    yield self._shard(group)
                    group = []
                framing = _json_framing(file) if self.kind == "json" else self._framing()
                yield from self._marks(file) if framing == "lines" and not file.compression else self._stream(file, framing)
        if group:
            yield self._shard(group)

    def _framing(self) -> str:
        if self.kind == "txt":
            return "file" if self._is_one_document() else "lines"
        return "json" if self.kind == "json" else "lines"

    def _is_one_document(self) -> bool:
        return self.kind == "txt" and self.txt_document == "file"

    def _read(self, segment: Segment, index: int, meter: Meter) -> Iterator[pa.RecordBatch]:
        path, blocks = segment.file.path, self._blocks(segment)
        limits = Limits(self.max_record_bytes, self.batch_rows, self.batch_bytes)
        framing = _json_framing(segment.file) if segment.framing == "json" else segment.framing
        if framing == "parquet":
            columnar.digest_parquet(path, segment.start, segment.end, self.columns, self.batch_bytes, meter)
            yield from columnar.read_parquet(path, segment.start, segment.end, self.columns, index, self.batch_rows, self.batch_bytes)
        elif framing == "arrow":
            columnar.digest_arrow(path, segment.start, segment.end, self.columns, meter)
            yield from columnar.read_arrow(path, segment.start, segment.end, self.columns, index, self.batch_rows, self.batch_bytes)
        elif framing == "lines":
            yield from split_lines(blocks, index, limits, meter)
        elif framing == "file":
            yield from whole_file(blocks, index, limits, meter)
        else:
            yield from split_values(blocks, index, limits, meter, in_array=framing == "array", opened=segment.start > 0)

    def _columnar(self, file: File) -> Iterator[Shard]:
        ranges = columnar.parquet_ranges if self.kind == "parquet" else columnar.arrow_ranges
        with input_errors(file.path):
            for first, last, size in ranges(file.path, self.shard_bytes):
                yield replace(self._shard([Segment(file, first, last, self.kind, aligned=True)]), nominal_bytes=size)

    def _marks(self, file: File) -> Iterator[Shard]:
        for start in range(0, file.stamp.size, self.shard_bytes):
            yield self._shard([Segment(file, start, min(start + self.shard_bytes, file.stamp.size), "lines")])

    def _stream(self, file: File, framing: str) -> Iterator[Shard]:
        """Ranges of a file that must be read from its beginning: those known from before, then those found now."""
        ledger = Ledger(self.cache)
        identity: list[object] = ["" if file.stamp.is_racy() else "stream", file.path, file.stamp.as_list(), self.shard_bytes, framing]
        known = ledger.known(digest_json(identity)) if self.trust_stamps and identity[0] else None
        raws = [self._known_range(ledger, identity, index) for index in range(len(known["ends"]))] if known else []
        if known and all(raws) and (not file.compression or self._finished(ledger, raws)):
            for raw, start, end in zip(raws, [0, *known["ends"]], known["ends"]):
                yield self._range_shard(file, framing, start, end, len(raws), raw, None)
            return
        ends: list[int] = []
        start = 0
        with contextlib.closing(RangeWriter(self._whole(file), self.spool_dir if file.compression else None)) as ranges:
            for cut in _and_rest(self._cuts(iter(ranges), framing)):
                raw, spool = ranges.end_range(cut)
                end = start + raw.bytes[0]
                if end > start:
                    ends.append(end)
                    if identity[0]:
                        ledger.remember_raw(digest_json([*identity, len(ends) - 1]), raw)
                    yield self._range_shard(file, framing, start, end, 0, raw, spool)
                start = end
        self._check_unchanged(file)
        if identity[0]:
            ledger.remember(digest_json(identity), {"ends": ends})

    def _finished(self, ledger: Ledger, raws: list[Raw | None]) -> bool:
        return not self.transform_key or all(raw and ledger.receipt(shard_key(raw, self.transform_key)) for raw in raws)

    def _whole(self, file: File) -> Iterator[bytes]:
        with input_errors(file.path):
            yield from open_blocks(file.path, file.compression, self.batch_bytes)

    def _cuts(self, blocks: Iterator[bytes], framing: str) -> Iterator[int]:
        if framing == "lines":
            return line_cuts(blocks, self.shard_bytes)
        return value_cuts(blocks, self.shard_bytes, self.max_record_bytes, in_array=framing == "array")

    def _known_range(self, ledger: Ledger, identity: list[object], index: int) -> Raw | None:
        return ledger.known_raw(digest_json([*identity, index]))

    def _range_shard(self, file: File, framing: str, start: int, end: int, of: int, raw: Raw | None, spool: Path | None) -> Shard:
        """`of`: how many ranges the file has, 0 while unknown; then progress goes by a usual rate of compression."""
        nominal = file.stamp.size // of if of else (end - start) // (EXPANSION // 2 if file.compression else 1)
        segment = Segment(file, start, end, framing, aligned=True, spool=str(spool) if spool else None)
        return Shard("", (segment,), "", nominal, raw)

    def _shard(self, segments: list[Segment]) -> Shard:
        identity = [[s.file.path, s.file.stamp.as_list(), s.start, s.end, s.framing] for s in segments]
        racy = any(segment.file.stamp.is_racy() for segment in segments)
        stamp_id = "" if racy else digest_json([identity, sorted(self.columns)])
        return Shard(
            "", tuple(segments), stamp_id, sum(s.file.stamp.size if s.start == 0 and s.end == s.file.stamp.size else s.end - s.start for s in segments)
        )

    def _blocks(self, segment: Segment) -> Iterator[bytes]:
        path = segment.file.path
        if segment.spool:
            return read_range(segment.spool, 0, segment.end - segment.start, self.batch_bytes)
        if segment.file.compression:
            blocks = open_blocks(path, segment.file.compression, self.batch_bytes)
            return skip(blocks, segment.start, segment.end) if segment.aligned else blocks
        if segment.framing == "lines" and not segment.aligned:
            return read_lines_in(path, segment.start, segment.end, self.batch_bytes)
        return read_range(path, segment.start, segment.end, self.batch_bytes)

    def _check_unchanged(self, file: File) -> None:
        with input_errors(file.path):
            now = stamp(Path(file.path))
        if now != file.stamp:
            raise SourceError(f"{file.path}: changed while it was read; run again when whoever writes it has finished")


def _nominal(group: list[Segment]) -> int:
    return sum(segment.file.nominal_bytes for segment in group)


def _cuts_after(file: File, shard_bytes: int) -> bool:
    """True for a share of the names that grows with the size, so that groups are about half of shard_bytes on average."""
    return xxhash.xxh3_64_intdigest(file.name.encode()) < (file.nominal_bytes * 2 << 64) // shard_bytes


def _and_rest(cuts: Iterator[int]) -> Iterator[int | None]:
    yield from cuts
    yield None


@functools.lru_cache(maxsize=1)  # asked once for the shards of a file, then by the worker that reads it
def _json_framing(file: File) -> str:
    """What a .json file is: one array, one JSON value a line, or values spread over lines."""
    with input_errors(file.path):
        head = next(open_blocks(file.path, file.compression, _PEEK_BYTES), b"")[:_PEEK_BYTES].removeprefix(_BOM).lstrip()
    if head.startswith(b"["):
        return "array"
    first_line = head.split(b"\n", 1)[0].strip()
    first = next(scan_values(iter((head,)), _PEEK_BYTES, in_array=False), None)
    try:
        orjson.loads(first.value if first else b"")
    except orjson.JSONDecodeError:
        return "values" if first_line == b"{" and len(head) > len(first_line) else "lines"  # a broken first value, or one too long for a look
    assert first is not None
    return "values" if b"\n" in first.value or head[first.end :].startswith(b"{") else "lines"
