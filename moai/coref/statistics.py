"""What the finished corpus looks like in numbers, read from its own columns: one pass, nothing held but counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

RANGES = {"short": (10, 200), "medium": (200, 800), "long": (800, 2000)}
"""Distances in characters; the upper end belongs to the last range only."""


@dataclass(frozen=True)
class Statistics:
    """`value -> how many samples` of each measure, so that medians over any number of samples are exact."""

    distances: Counter[int]
    lengths: Counter[int]
    entity_lengths: Counter[int]
    masked: Counter[int]

    def as_json(self) -> dict[str, Any]:
        last = max(RANGES, key=lambda name: RANGES[name][1])
        near = {
            name: sum(
                number
                for distance, number in self.distances.items()
                if low <= distance < high or (name == last and distance >= high)
            )
            for name, (low, high) in RANGES.items()
        }
        return {
            "entity_length_stats": summary(self.entity_lengths),
            "distance_stats": summary(self.distances),
            "distance_distribution": near,
            "length_stats": summary(self.lengths),
            "masked_tokens_stats": summary(self.masked),
        }


def measure(shards: Sequence[Path]) -> Statistics:
    found = Statistics(Counter(), Counter(), Counter(), Counter())
    for batch in (batch for path in shards for batch in batches(path)):
        found.distances.update(batch["distance"].to_pylist())
        found.lengths.update(pc.list_value_length(batch["input_ids"]).to_pylist())
        found.entity_lengths.update(pc.utf8_length(batch["target"]).to_pylist())
        labels, sizes = batch["labels"].flatten().to_numpy(), batch["labels"].value_lengths().to_numpy()
        found.masked.update(np.add.reduceat(labels >= 0, np.concatenate(([0], np.cumsum(sizes)[:-1]))).tolist())
    return found


def some_samples(shards: Sequence[Path], rows: Sequence[int], number: int) -> Iterator[dict[str, Any]]:
    """`number` samples spread evenly over the corpus; `rows` are those of each shard."""
    total = sum(rows)
    wanted = sorted({index * total // number for index in range(number)}) if total else []
    begin = 0
    for path, size in zip(shards, rows):
        here = [index - begin for index in wanted if begin <= index < begin + size]
        begin += size
        if not here:
            continue
        first = 0
        for batch in batches(path):
            yield from (
                batch.slice(row - first, 1).to_pylist()[0] for row in here if first <= row < first + batch.num_rows
            )
            first += batch.num_rows


def batches(path: Path) -> Iterator[pa.RecordBatch]:
    with pa.memory_map(str(path)) as file:
        yield from pa.ipc.open_stream(file)


def summary(counts: Counter[int]) -> dict[str, float]:
    """Mean, median, least and most of what was counted."""
    if not counts:
        return {}
    values, total = sorted(counts), sum(counts.values())
    ends = np.cumsum([counts[value] for value in values])
    middle = [values[int(np.searchsorted(ends, place, "right"))] for place in ((total - 1) // 2, total // 2)]
    mean = sum(value * number for value, number in counts.items()) / total
    return {"mean": round(mean, 3), "median": sum(middle) / 2, "min": values[0], "max": values[-1]}
