"""Finished shards as Arrow streams that `datasets` opens, each committed by its receipt.

The worker writes a private file, fsyncs it, gives it its name (`<shard-key>.arrow`) and then writes the receipt. Rows
per record batch are part of the format, so the bytes never depend on how the batches came; `writer_batch_size` only
says how many rows may wait in memory.
"""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import xxhash

from moai.cache.ledger import Ledger
from moai.core.failpoints import failpoint
from moai.core.files import canonical_json, digest_file, publish_file, storage_errors
from moai.engine.pipeline import Receipt, Sealed, Shard

logger = logging.getLogger(__name__)

ROWS_PER_BATCH = 1024


@dataclass(frozen=True, kw_only=True)
class ArrowShards:
    """A sink of shards of any columns under `cache`, staged in `staging` (same file system)."""

    cache: Path
    staging: Path
    schema: pa.Schema
    rows_per_batch: int = ROWS_PER_BATCH
    writer_batch_size: int = 10_000
    made_by: dict[str, str] = field(default_factory=dict)

    def committed(self, shard_key: str) -> Receipt | None:
        """A finished shard, after a look at every byte: what lay on a disk since another run is not believed unread.

        A damaged one is set aside and counts as not made.
        """
        ledger = Ledger(self.cache)
        receipt = ledger.receipt(shard_key)
        if receipt is None:
            return None
        for path, digest in ledger.files(receipt).items():
            if digest_file(path) != digest:
                aside = path.with_suffix(f".corrupt-{uuid.uuid4().hex[:8]}")
                logger.warning(
                    "%s: its bytes are not those of its receipt; set aside as %s and made again", path, aside.name
                )
                os.replace(path, aside)
                return None
        return receipt

    def write(self, shard: Shard, batches: Iterator[pa.RecordBatch], seal: Callable[[], Sealed]) -> Receipt:
        staged = self.staging / f"{uuid.uuid4().hex}.arrow"
        ledger = Ledger(self.cache)
        try:
            with storage_errors(staged):
                failpoint("shard.begin")
                rows, size, digest = self._write_rows(staged, batches)
                failpoint("shard.written", staged)
                sealed = seal()
                bad = self._write_quarantine(sealed, ledger)
                documents_bytes, documents_digest = self._write_documents(sealed, ledger)
                publish_file(staged, ledger.shard(sealed.shard_key))
                receipt = Receipt(
                    sealed.shard_key,
                    sealed.transform_key,
                    sealed.raw,
                    sealed.counts,
                    rows,
                    size,
                    digest,
                    quarantine_xxh3_128=bad,
                    documents_bytes=documents_bytes,
                    documents_xxh3_128=documents_digest,
                    made_by=self.made_by,
                )
                # The receipt is renamed last: a crash between the two leaves a file nobody counts, never a count
                # without a file.
                ledger.commit(receipt)
                return receipt
        finally:
            staged.unlink(missing_ok=True)

    def _write_rows(self, staged: Path, batches: Iterator[pa.RecordBatch]) -> tuple[int, int, str]:
        with open(staged, "xb") as file:
            out = Hashed(file)
            with pa.ipc.new_stream(pa.PythonFile(out, mode="w"), self.schema) as writer:
                rows = self._write_in_batches(writer, batches)
            file.flush()
            os.fsync(file.fileno())
        return rows, out.bytes, out.hash.hexdigest()

    def _write_in_batches(self, writer: Any, batches: Iterator[pa.RecordBatch]) -> int:
        waiting: list[pa.RecordBatch] = []
        rows = total = 0
        for batch in regroup(batches, self.rows_per_batch):
            waiting.append(pa.record_batch([batch[name] for name in self.schema.names], schema=self.schema))
            rows, total = rows + batch.num_rows, total + batch.num_rows
            if rows >= self.writer_batch_size:
                _write_all(writer, waiting)
                waiting, rows = [], 0
        _write_all(writer, waiting)
        return total

    def _write_quarantine(self, sealed: Sealed, ledger: Ledger) -> str | None:
        if not sealed.quarantine:
            return None
        data = b"".join(canonical_json(entry) + b"\n" for entry in sealed.quarantine)
        self._publish(data, ledger.quarantine(sealed.shard_key))
        return xxhash.xxh3_128_hexdigest(data)

    def _write_documents(self, sealed: Sealed, ledger: Ledger) -> tuple[int, str | None]:
        """What became of each document, in Arrow's file format. Returns its bytes and their digest."""
        if sealed.documents is None:
            return 0, None
        staged = self.staging / uuid.uuid4().hex
        with open(staged, "xb") as file:
            out = Hashed(file)
            with pa.ipc.new_file(pa.PythonFile(out, mode="w"), sealed.documents.schema) as writer:
                writer.write_batch(sealed.documents)
            file.flush()
            os.fsync(file.fileno())
        publish_file(staged, ledger.documents(sealed.shard_key))
        return out.bytes, out.hash.hexdigest()

    def _publish(self, data: Any, final: Path) -> None:
        staged = self.staging / uuid.uuid4().hex
        with open(staged, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        publish_file(staged, final)


def _write_all(writer: Any, batches: list[pa.RecordBatch]) -> None:
    for batch in batches:
        writer.write_batch(batch)


def regroup(batches: Iterator[pa.RecordBatch], rows_per_batch: int) -> Iterator[pa.RecordBatch]:
    """Batches of exactly `rows_per_batch` rows, the last one smaller. Those that come so, in buffers of their own, pass
    as they are.
    """
    kept: list[pa.RecordBatch] = []
    rows = 0
    for batch in batches:
        if not kept and batch.num_rows == rows_per_batch and _is_alone(batch):
            yield batch
            continue
        kept.append(batch)
        rows += batch.num_rows
        while rows >= rows_per_batch:
            table = pa.Table.from_batches(kept)
            yield _alone(table.slice(0, rows_per_batch))
            rows -= rows_per_batch
            kept = table.slice(rows_per_batch).to_batches()
    if rows:
        yield kept[0] if len(kept) == 1 and _is_alone(kept[0]) else _alone(pa.Table.from_batches(kept))


def _is_alone(batch: pa.RecordBatch) -> bool:
    """Whether its buffers hold its rows and nothing else. Of a slice the writer re-bases the offsets, but pads its
    buffers with what lies behind it, so that the bytes of a file would tell how many rows had waited."""
    return all(_is_whole(column) for column in batch.columns)


def _is_whole(column: pa.Array) -> bool:
    """Of lists of numbers, which are nearly all there is; anything else is copied."""
    if not pa.types.is_list(column.type) or not pa.types.is_primitive(column.type.value_type) or column.offset:
        return False
    values, (_, offsets, *_) = column.values, column.buffers()
    own = values.buffers()[1]
    return (
        not values.offset
        and offsets.size == 4 * (len(column) + 1)
        and own.size * 8 == len(values) * values.type.bit_width
    )


def _alone(table: pa.Table) -> pa.RecordBatch:
    """The same rows in buffers of their own: `take` copies."""
    taken = table.combine_chunks().take(np.arange(table.num_rows)).combine_chunks()
    (batch,) = taken.to_batches()
    return batch


class Hashed:
    """A file that counts and hashes what is written to it."""

    closed = False

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.hash = xxhash.xxh3_128()
        self.bytes = 0

    def write(self, data: Any) -> int:
        view = memoryview(data)
        self.hash.update(view)
        self.bytes += view.nbytes
        self._file.write(view)
        return view.nbytes

    def tell(self) -> int:
        return self.bytes

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        pass
