"""Finished shards as Arrow streams that `datasets` opens, each committed by its receipt.

The worker writes a private file, fsyncs it, gives it its name (`<shard-key>.arrow`) and then writes the receipt. Rows per
record batch are part of the format, so the bytes never depend on how the batches came; `writer_batch_size` only says how
many rows may wait in memory.
"""

from __future__ import annotations

import json
import logging
import os
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import xxhash

from moai import columns
from moai.engine.ledger import Ledger
from moai.engine.pipeline import Receipt, Sealed, Shard
from moai.failpoints import failpoint
from moai.files import canonical_json, digest_file, publish_file, storage_errors

logger = logging.getLogger(__name__)

ROWS_PER_BATCH = 1024


@dataclass(frozen=True, kw_only=True)
class ArrowShards:
    """A sink of shards under `cache`, staged in `staging` (same file system). `dtype` is Arrow's name of the type of the ids."""

    cache: Path
    staging: Path
    dtype: str
    chat: bool = False
    """Rows have `trained_runs`."""
    writer_batch_size: int = 10_000
    made_by: dict[str, str] = field(default_factory=dict)

    def committed(self, shard_key: str) -> Receipt | None:
        """A finished shard, after a look at every byte: what lay on a disk since another run is not believed unread.

        A damaged one is set aside and counts as not made.
        """
        ledger = Ledger(self.cache)
        receipt = ledger.receipt(shard_key)
        if receipt is None or digest_file(ledger.shard(shard_key)) == receipt.xxh3_128:
            return receipt
        aside = ledger.shard(shard_key).with_suffix(f".corrupt-{uuid.uuid4().hex[:8]}")
        logger.warning("%s: its bytes are not those of its receipt; set aside as %s and made again", ledger.shard(shard_key), aside.name)
        os.replace(ledger.shard(shard_key), aside)
        return None

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
                publish_file(staged, ledger.shard(sealed.shard_key))
                receipt = Receipt(
                    sealed.shard_key, sealed.transform_key, sealed.raw, sealed.counts, rows, size, digest, quarantine_xxh3_128=bad, made_by=self.made_by
                )
                # The receipt is renamed last: a crash between the two leaves a file nobody counts, never a count without a file.
                ledger.commit(receipt)
                return receipt
        finally:
            staged.unlink(missing_ok=True)

    def _write_rows(self, staged: Path, batches: Iterator[pa.RecordBatch]) -> tuple[int, int, str]:
        schema = arrow_schema(self.dtype, chat=self.chat)
        with open(staged, "xb") as file:
            out = Hashed(file)
            with pa.ipc.new_stream(pa.PythonFile(out, mode="w"), schema) as writer:
                rows = _write_in_batches(writer, batches, schema, self.writer_batch_size)
            file.flush()
            os.fsync(file.fileno())
        return rows, out.bytes, out.hash.hexdigest()

    def _write_quarantine(self, sealed: Sealed, ledger: Ledger) -> str | None:
        if not sealed.quarantine:
            return None
        data = b"".join(canonical_json(entry) + b"\n" for entry in sealed.quarantine)
        staged = self.staging / f"{uuid.uuid4().hex}.jsonl"
        with open(staged, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        publish_file(staged, ledger.quarantine(sealed.shard_key))
        return xxhash.xxh3_128_hexdigest(data)


def columns_of(dtype: str, *, chat: bool = False) -> dict[str, str]:
    """Column -> Arrow's name of the numbers in its lists. `trained_runs` is in conversations only."""
    return {"input_ids": dtype, "seq_lengths": "uint32"} | ({"trained_runs": "uint32"} if chat else {})


def features(dtype: str, *, chat: bool = False) -> dict[str, Any]:
    """The columns as `datasets` writes them down."""
    return {name: {"feature": {"dtype": kind, "_type": "Value"}, "_type": "List"} for name, kind in columns_of(dtype, chat=chat).items()}


def arrow_schema(dtype: str, *, chat: bool = False) -> pa.Schema:
    fields = [pa.field(name, pa.list_(pa.type_for_alias(kind))) for name, kind in columns_of(dtype, chat=chat).items()]
    return pa.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": features(dtype, chat=chat)}})})


def _write_in_batches(writer: Any, batches: Iterator[pa.RecordBatch], schema: pa.Schema, writer_batch_size: int) -> int:
    waiting: list[pa.RecordBatch] = []
    rows = total = 0
    for batch in _regroup(batches):
        waiting.append(pa.record_batch(batch.columns, schema=schema))
        rows += batch.num_rows
        total += batch.num_rows
        if rows >= writer_batch_size:
            _write_all(writer, waiting)
            waiting, rows = [], 0
    _write_all(writer, waiting)
    return total


def _write_all(writer: Any, batches: list[pa.RecordBatch]) -> None:
    for batch in batches:
        writer.write_batch(batch)


def _regroup(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Batches of exactly ROWS_PER_BATCH rows, the last one smaller. Those that come so pass as they are."""
    kept: list[pa.RecordBatch] = []
    rows = 0
    for batch in batches:
        if not kept and batch.num_rows == ROWS_PER_BATCH:
            yield batch
            continue
        kept.append(batch)
        rows += batch.num_rows
        if rows >= ROWS_PER_BATCH:
            table = pa.Table.from_batches(kept).combine_chunks()
            whole = rows // ROWS_PER_BATCH * ROWS_PER_BATCH
            yield from map(_alone, table.slice(0, whole).to_batches(max_chunksize=ROWS_PER_BATCH))
            kept, rows = table.slice(whole).to_batches(), rows - whole
    if kept:
        yield from map(_alone, pa.Table.from_batches(kept).combine_chunks().to_batches())


def _alone(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The same rows in buffers of their own. Of a slice the writer re-bases the offsets, but pads its buffers with what lies behind
    it, so that the bytes of a file would tell how many rows had waited."""
    lists = []
    for column in batch.columns:
        offsets = column.offsets.to_numpy()
        lists.append(columns.lists(offsets - offsets[0], column.flatten().to_numpy().copy()))
    return pa.record_batch(lists, names=batch.schema.names)


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

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        pass
