"""Shards of any columns, committed as `ArrowShards` commits its own: staged, hashed, named by content, receipt last."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from moai.sinks.arrow import ArrowShards, Hashed


@dataclass(frozen=True, kw_only=True)
class TableShards(ArrowShards):
    """`rows_per_batch` belongs to the format: the bytes never depend on how the batches came."""

    schema: pa.Schema
    rows_per_batch: int
    dtype: str = ""

    def _write_rows(self, staged: Path, batches: Iterator[pa.RecordBatch]) -> tuple[int, int, str]:
        rows = 0
        with open(staged, "xb") as file:
            out = Hashed(file)
            with pa.ipc.new_stream(pa.PythonFile(out, mode="w"), self.schema) as writer:
                for batch in regroup(batches, self.rows_per_batch):
                    writer.write_batch(pa.record_batch(batch.columns, schema=self.schema))
                    rows += batch.num_rows
            file.flush()
            os.fsync(file.fileno())
        return rows, out.bytes, out.hash.hexdigest()


def with_features(schema: pa.Schema) -> pa.Schema:
    """The schema with what `datasets` reads off an Arrow file."""
    return schema.with_metadata({"huggingface": json.dumps({"info": {"features": features(schema)}})})


def features(schema: pa.Schema) -> Mapping[str, Any]:
    """The columns as `datasets` writes them down: numbers, strings, and lists of them."""
    return {field.name: _feature(field.type) for field in schema}


def regroup(batches: Iterator[pa.RecordBatch], rows_per_batch: int) -> Iterator[pa.RecordBatch]:
    """Batches of exactly `rows_per_batch` rows, the last one smaller, each in buffers of its own.

    A slice would be written with what lies behind it as padding; `take` copies.
    """
    kept: list[pa.RecordBatch] = []
    rows = 0
    for batch in batches:
        kept.append(batch)
        rows += batch.num_rows
        while rows >= rows_per_batch:
            table = pa.Table.from_batches(kept)
            yield _alone(table.slice(0, rows_per_batch))
            rows -= rows_per_batch
            kept = table.slice(rows_per_batch).to_batches()
    if rows:
        yield _alone(pa.Table.from_batches(kept))


def _alone(table: pa.Table) -> pa.RecordBatch:
    taken = table.combine_chunks().take(np.arange(table.num_rows)).combine_chunks()
    (batch,) = taken.to_batches()
    return batch


def _feature(kind: pa.DataType) -> dict[str, Any]:
    if pa.types.is_list(kind):
        return {"feature": _feature(kind.value_type), "_type": "List"}
    return {"dtype": str(kind), "_type": "Value"}
