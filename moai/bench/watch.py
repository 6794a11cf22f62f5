"""Two clocks between the transforms of a pipeline, and a sink that tells who worked on a shard, and when."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from moai.bench.report import Lap, Stretch
from moai.engine.pipeline import Pipeline, Receipt, Sealed, Shard, Sink, count
from moai.transforms.tokenize import Texts, Tokenize


def watched(made: Pipeline) -> Pipeline:
    transforms: list[Any] = []
    for transform in made.transforms:
        if isinstance(transform, Tokenize):
            if transform.to_text:
                transform = replace(transform, to_text=TimedTexts(transform.to_text))
            transforms += [Clock("bench.parsed"), transform, Clock("bench.tokenized")]
        else:
            transforms.append(transform)
    return replace(made, transforms=tuple(transforms), sink=Watched(made.sink))


def lap_of(shard: Shard, receipt: Receipt) -> Lap:
    counts = Counter(receipt.counts)
    took = {name: counts.pop(f"bench.{name}", 0) / 1e9 for name in ("began", "ended", "cpu", "parsed", "tokenized")}
    tokens = counts["tokens.text"] + counts["tokens.eos"] + counts["tokens.bos"]
    stretch = Stretch(counts.pop("bench.worker"), took["began"], took["ended"], sum(receipt.raw.bytes), tokens)
    return Lap(stretch, took["cpu"], took["parsed"], took["tokenized"], receipt.bytes, shard.nominal_bytes, counts)


@dataclass(frozen=True)
class Clock:
    """A transform that counts the nanoseconds for which it waited: all that happens before it."""

    name: str

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        while True:
            began = time.monotonic_ns()
            batch = next(batches, None)
            count(self.name, time.monotonic_ns() - began)
            if batch is None:
                return
            yield batch


@dataclass(frozen=True)
class TimedTexts:
    """Parsing that happens inside of Tokenize counts as what happens before it."""

    to_text: Texts

    def read(self, batch: pa.RecordBatch) -> tuple[list[str], pa.RecordBatch]:
        began = time.monotonic_ns()
        found = self.to_text.read(batch)
        count("bench.parsed", time.monotonic_ns() - began)
        return found


@dataclass(frozen=True)
class Watched:
    """A sink whose receipts also tell, to the driver alone, who made them and when."""

    sink: Sink

    def committed(self, shard_key: str) -> Receipt | None:
        return self.sink.committed(shard_key)

    def write(self, shard: Shard, batches: Iterator[pa.RecordBatch], seal: Callable[[], Sealed]) -> Receipt:
        began, cpu = time.monotonic_ns(), time.process_time_ns()
        receipt = self.sink.write(shard, batches, seal)
        times = {
            "bench.cpu": time.process_time_ns() - cpu,
            "bench.began": began,
            "bench.ended": time.monotonic_ns(),
            "bench.worker": os.getpid(),
        }
        return replace(receipt, counts={**receipt.counts, **times})
