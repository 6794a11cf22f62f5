"""What the finished corpus looks like in numbers, read from its own columns: one pass, nothing held but counts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

Statistics = Mapping[str, Counter[int]]
"""`value -> how many samples` of each measure, so that medians over any number of samples are exact."""
RANGES = {"short": (10, 200), "medium": (200, 800), "long": (800, math.inf)}
"""Distances in characters."""


def measure(shards: Iterable[Path]) -> Statistics:
    lengths, distances, entities, masked = (Counter[int]() for _ in range(4))
    for batch in (batch for path in shards for batch in batches(path)):
        lengths.update(pc.list_value_length(batch["input_ids"]).to_pylist())
        distances.update(batch["distance"].to_pylist())
        entities.update(pc.utf8_length(batch["target"]).to_pylist())
        labels, sizes = batch["labels"].flatten().to_numpy(), batch["labels"].value_lengths().to_numpy()
        masked.update(np.add.reduceat(labels >= 0, np.cumsum(sizes) - sizes).tolist())
    return {"length": lengths, "distance": distances, "entity_length": entities, "masked_tokens": masked}


def as_json(found: Statistics) -> dict[str, Any]:
    near = {
        name: sum(number for distance, number in found["distance"].items() if low <= distance < high)
        for name, (low, high) in RANGES.items()
    }
    return {f"{name}_stats": summary(counts) for name, counts in found.items()} | {"distance_distribution": near}


def some_samples(shards: Sequence[Path], rows: Sequence[int], number: int) -> Iterator[dict[str, Any]]:
    """`number` samples spread evenly over the corpus; `rows` are those of each shard."""
    total = sum(rows)
    return chosen_samples(shards, rows, sorted({index * total // number for index in range(number)}) if total else [])


def chosen_samples(shards: Sequence[Path], rows: Sequence[int], wanted: Sequence[int]) -> Iterator[dict[str, Any]]:
    """The samples of these numbers, which are in order, counted over all shards."""
    begin = 0
    for path, size in zip(shards, rows):
        if any(begin <= index < begin + size for index in wanted):
            first = begin
            for batch in batches(path):
                here = (index - first for index in wanted if first <= index < first + batch.num_rows)
                yield from (batch.slice(index, 1).to_pylist()[0] for index in here)
                first += batch.num_rows
        begin += size


def batches(path: Path) -> Iterator[pa.RecordBatch]:
    with pa.memory_map(str(path)) as file:
        yield from pa.ipc.open_stream(file)


def summary(counts: Counter[int]) -> dict[str, float]:
    """Mean, median, least and most of what was counted."""
    if not counts:
        return {}
    values, total = sorted(counts), counts.total()
    ends = np.cumsum([counts[value] for value in values])
    middle = [values[int(np.searchsorted(ends, place, "right"))] for place in ((total - 1) // 2, total // 2)]
    mean = sum(value * number for value, number in counts.items()) / total
    return {"mean": round(mean, 3), "median": sum(middle) / 2, "min": values[0], "max": values[-1]}
