"""What checks of every kind of prepared directory share: a line of the report, and rows that are counted as they are
read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from moai.core.errors import DamagedError


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    name: str
    ok: bool
    detail: str

    def __str__(self) -> str:
        return f"{'ok    ' if self.ok else 'FAILED'} {self.name}: {self.detail}"


def count_rows(
    path: Path, shards: Iterable[Mapping[str, Any]], schema: pa.Schema, look: Callable[[pa.RecordBatch], None] | None
) -> tuple[int, list[str]]:
    """Rows in all, and which shards hold others than their manifest says. Without `look`, only the headers of record
    batches are read.

    Raises DamagedError, naming the file, where one does not read.
    """
    total, wrong = 0, []
    for shard in shards:
        try:
            rows = _rows_in(path / shard["file"], schema, look)
        except (pa.ArrowException, OSError, ValueError, DamagedError) as error:
            raise DamagedError(f"{shard['file']}: {' '.join(str(error).split())[:160]}") from error
        total += rows
        if rows != shard["rows"]:
            wrong.append(f"{shard['file']}: {rows} rows, the manifest says {shard['rows']}")
    return total, wrong


def _rows_in(file: Path, schema: pa.Schema, look: Callable[[pa.RecordBatch], None] | None) -> int:
    rows = 0
    with pa.memory_map(str(file)) as mapped:
        reader = pa.ipc.open_stream(mapped)
        if reader.schema != schema:
            raise DamagedError(
                f"its columns are {', '.join(f'{f.name} {f.type}' for f in reader.schema)[:100]}, not "
                f"{', '.join(schema.names)} of their types"
            )
        for batch in reader:
            batch.validate(full=look is not None)  # no offset is followed before it was compared with its buffer
            rows += batch.num_rows
            if look:
                look(batch)
    return rows
