"""The least that any pipeline must do: read, parse, tokenize, in processes that begin together."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import orjson
import pyarrow as pa

from moai.bench.report import Stretch
from moai.core.errors import WorkerDied
from moai.core.files import storage_of
from moai.engine.executor import Executor
from moai.engine.pipeline import Pipeline, Raw, Receipt, Sealed, Shard, run_shard
from moai.pretraining.assembly import Stream
from moai.sources.kinds import Kind, Segment
from moai.sources.local import LocalSource
from moai.tokenizers.backends import Backend
from moai.transforms.text import ToText

BLOCK_BYTES = 4 << 20


@dataclass(frozen=True)
class Bare:
    """Lines of JSON that begin in ranges (path, from, to) of files. A call returns how many ids they give."""

    backend: Backend
    column: str
    ranges: tuple[tuple[str, int, int], ...]

    def __call__(self) -> int:
        tokens = 0
        for path, start, end in self.ranges:
            with io.BufferedReader(storage_of(path).open(path)) as file:
                if start:
                    file.seek(start - 1)
                    file.readline()
                while (left := end - file.tell()) > 0:
                    block = file.read(min(BLOCK_BYTES, left)) + file.readline()
                    if not block:
                        break
                    tokens += _number_of_ids(self.backend, _texts(block.splitlines(), self.column))
        return tokens


@dataclass(frozen=True)
class Own:
    """Anything else: read and parsed by moai, tokenized, dropped."""

    pipeline: Pipeline
    shard: Shard

    def __call__(self) -> int:
        return run_shard(self.pipeline, self.shard)[0].counts["ids"]


@dataclass(frozen=True)
class Dropped:
    """A sink that tokenizes and keeps only the number."""

    backend: Backend

    def committed(self, shard_key: str) -> Receipt | None:
        return None

    def write(self, shard: Shard, batches: Iterator[pa.RecordBatch], seal: Callable[[], Sealed]) -> Receipt:
        ids = sum(_number_of_ids(self.backend, batch["text"].to_pylist()) for batch in batches)
        return Receipt("", "", Raw("", (), ()), {"ids": ids}, 0, 0, "")


Unit = Bare | Own


def ceiling(
    backend: Backend,
    units: Sequence[tuple[Unit, int]],
    *,
    processes: int,
    threads: int | None = 1,
    warmed: Executor | None = None,
) -> list[Stretch]:
    """Do the units (each with its bytes) in `processes` processes, each with a core of its own where it has one thread.
    Returns what each did. Loading and warming up is outside the clocks. Raises WorkerDied.

    threads  of the tokenizer in each; None leaves them to it, as work in this process itself does
    warmed   processes come from where this executor's workers come from
    """
    if warmed:
        warmed.start()
    context = multiprocessing.get_context("forkserver")
    next_unit = context.Value("q", 0)
    cores = sorted(os.sched_getaffinity(0)) if threads == 1 and hasattr(os, "sched_setaffinity") else []
    running = []
    try:
        for number in range(processes):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_do_units,
                args=(theirs, next_unit, cores[number % len(cores)] if cores else None, threads),
                daemon=True,
            )
            process.start()
            running.append((process, ours))
            theirs.close()
            ours.send((backend, list(units)))
        for _, connection in running:
            connection.recv()
        for _, connection in running:
            connection.send("go")
        return [connection.recv() for _, connection in running]
    except (EOFError, ConnectionResetError, BrokenPipeError):
        raise WorkerDied("a process that measured the limit died; too little memory? fewer --num_proc") from None
    finally:
        for process, connection in running:
            process.kill()
            process.join()
            connection.close()


def _do_units(connection: Connection, next_unit: Any, core: int | None, threads: int | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if core is not None:
        os.sched_setaffinity(0, {core})  # before the tokenizer counts cores, of which it took half a one more otherwise
    if threads is not None:
        os.environ["RAYON_NUM_THREADS"] = str(threads)
        os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
    backend, units = connection.recv()
    backend.encode_batch(["warm up"])
    connection.send("ready")
    connection.recv()
    began, size, ids = time.monotonic(), 0, 0
    while True:
        with next_unit.get_lock():
            index = next_unit.value
            next_unit.value += 1
        if index >= len(units):
            break
        work, nbytes = units[index]
        ids += work()
        size += nbytes
    connection.send(Stretch(os.getpid(), began, time.monotonic(), size, ids))


def _texts(lines: list[bytes], column: str) -> list[str]:
    try:
        return [orjson.loads(line)[column] for line in lines if line]
    except (orjson.JSONDecodeError, KeyError, TypeError, IndexError):
        found = []
        for line in lines:
            with contextlib.suppress(orjson.JSONDecodeError, KeyError, TypeError, IndexError):
                found.append(orjson.loads(line)[column])
        return found


def _number_of_ids(backend: Backend, texts: list[str]) -> int:
    """By halves around a text that is refused, which then counts for nothing."""
    try:
        return len(backend.encode_batch(texts)[0])
    except Exception:
        half = len(texts) // 2
        return _number_of_ids(backend, texts[:half]) + _number_of_ids(backend, texts[half:]) if half else 0


def unit(stream: Stream, shard: Shard, backend: Backend) -> Unit:
    assert isinstance(stream.source, LocalSource)
    ranges = [_lines_in(stream.source.kind, segment) for segment in shard.segments]
    column = "" if not isinstance(stream.to_text, ToText) or stream.to_text.plain else stream.to_text.shape.column
    found = tuple(bounds for bounds in ranges if bounds)
    if column and len(found) == len(ranges):
        return Bare(backend, column, found)
    sink = Dropped(backend)
    whole = Pipeline(source=stream.source, transforms=(stream.to_text,), sink=sink, transform_key="", probe=False)
    return Own(whole, shard)


def _lines_in(kind: Kind, segment: Segment) -> tuple[str, int, int] | None:
    """Where a segment's lines lie as they are; None where they are compressed, or no lines."""
    if not kind.is_lines(segment.file) or (segment.file.compression and not segment.spool):
        return None
    if segment.spool:
        return segment.spool, 0, segment.end - segment.start
    return segment.file.path, segment.start, segment.end
