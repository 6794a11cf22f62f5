"""Executors: who runs `run_shard`. Serial in this process, or a small supervisor over forkserver processes.

A pool cannot say which worker died on which document, nor stop one that hangs; `multiprocessing.Pool` even waits for ever
for a killed one. Here each worker has its own pipe and its own beacon, the driver waits on pipes and sentinels together,
and one shard at a time is in flight per worker. What it must be able to do is small: `map(pipelines, orders) -> finished`.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

from moai.engine.pipeline import Pipeline, Receipt, Shard, run_shard
from moai.engine.warm import WARM
from moai.errors import MoaiError, WorkerDied

Order = tuple[int, Shard]
"""A shard to run, and which of the pipelines it belongs to."""
Finished = tuple[Order, Receipt, bool]
"""An order, its receipt, and whether the receipt was found rather than made."""

_HEAP_BYTES = 32 << 20
_POLL_SECONDS = 0.5


class Executor(Protocol):
    def map(self, pipelines: Sequence[Pipeline], orders: Iterator[Order], on_documents: Callable[[int], None]) -> Iterator[Finished]:
        """Run every order, in any sequence. `on_documents(n)` hears of n more documents now and then."""
        ...


@dataclass(frozen=True)
class Serial:
    """All work in this process: small inputs, debugging."""

    def map(self, pipelines: Sequence[Pipeline], orders: Iterator[Order], on_documents: Callable[[int], None]) -> Iterator[Finished]:
        for order in orders:
            yield (order, *run_shard(pipelines[order[0]], order[1], on_documents))


@dataclass(frozen=True, kw_only=True)
class Processes:
    """`num_proc` worker processes, each with `threads` threads for its tokenizer."""

    num_proc: int
    threads: int = 1
    stall_seconds: float = 600.0
    """A worker whose beacon stands still this long is killed, and the run fails with its shard named."""
    shards_per_worker: int = 512
    """A worker is replaced after this many shards, so that what its libraries keep cannot grow without end."""
    modules: tuple[str, ...] = ("moai.engine.executor",)
    warm: tuple[tuple[str, dict[str, Any]], ...] = ()
    """Modules, and "module:function" with its arguments, loaded once where workers are forked from (moai.engine.warm)."""

    def start(self) -> None:
        """Begin to load what workers need, in another process: the caller may do so early and go on with something else."""
        multiprocessing.get_context("forkserver").set_forkserver_preload(["moai.engine.warm"])
        os.environ[WARM] = json.dumps({"modules": self.modules, "calls": self.warm})
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # inherited: Ctrl-C is for the driver, from the first moment
        try:
            forkserver.ensure_running()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
            del os.environ[WARM]

    def map(self, pipelines: Sequence[Pipeline], orders: Iterator[Order], on_documents: Callable[[int], None]) -> Iterator[Finished]:
        self.start()
        context = multiprocessing.get_context("forkserver")
        idle: list[_Worker] = []
        busy: list[_Worker] = []
        finished: list[Finished] = []
        ahead: deque[Order] = deque()  # drawn while the workers work: where a compressed file is cut, the next range takes a while
        exhausted = False

        def draw() -> None:
            nonlocal exhausted
            order = next(orders, None)
            if order is None:
                exhausted = True
            else:
                ahead.append(order)

        try:
            while True:
                while len(busy) < self.num_proc and (ahead or not exhausted):
                    if not ahead:
                        draw()
                        continue
                    worker = idle.pop() if idle else _Worker.start(context, pipelines, self.threads)
                    worker.give(ahead.popleft())
                    busy.append(worker)
                yield from finished  # what the caller does with them takes a while: the workers have their next orders by now
                finished.clear()
                if not busy:
                    return
                drawing = not exhausted and len(ahead) < self.num_proc
                if drawing:
                    draw()
                wait([handle for worker in busy for handle in (worker.connection, worker.process.sentinel)], timeout=0 if drawing else _POLL_SECONDS)
                for worker in list(busy):
                    on_documents(worker.news())
                    answer = worker.poll()
                    if answer is None:
                        worker.check_stall(self.stall_seconds)
                        continue
                    finished.append(answer)
                    busy.remove(worker)
                    if worker.shards_done < self.shards_per_worker:
                        idle.append(worker)
                    else:
                        worker.stop()
        finally:
            # On success all are idle and end at once; on an error what is in flight is worth less than ending now.
            for worker in idle + busy:
                worker.stop()


@dataclass
class _Worker:
    process: Any
    connection: Connection
    beacon: Any
    order: Order | None = None
    shards_done: int = 0
    documents_seen: int = 0
    moved_at: float = field(default_factory=time.monotonic)

    @classmethod
    def start(cls, context: Any, pipelines: Sequence[Pipeline], threads: int) -> _Worker:
        ours, theirs = context.Pipe()
        beacon = context.RawArray("q", 1)
        process = context.Process(target=_work, args=(theirs, beacon, threads), daemon=True)
        process.start()
        theirs.close()
        worker = cls(process, ours, beacon)
        worker._send(tuple(pipelines))
        return worker

    def give(self, order: Order) -> None:
        self.order, self.moved_at = order, time.monotonic()
        self._send(order)

    @property
    def shard(self) -> Shard:
        assert self.order is not None
        return self.order[1]

    def _send(self, message: Any) -> None:
        # A worker that died before it could take the message is found by `poll`, which knows how to say so.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.connection.send(message)

    def news(self) -> int:
        """Documents done since the last call."""
        seen = int(self.beacon[0])
        more, self.documents_seen = seen - self.documents_seen, seen
        if more:
            self.moved_at = time.monotonic()
        return more

    def poll(self) -> Finished | None:
        """The finished shard, None while it is in work. Raises what the worker raised, or WorkerDied."""
        assert self.order is not None
        try:
            if not self.connection.poll():
                if self.process.is_alive():
                    return None
                if not self.connection.poll():  # it may have answered just before it ended
                    raise self._death()
            kind, *content = self.connection.recv()
        except (EOFError, ConnectionResetError):
            raise self._death() from None
        if kind == "error":
            raise content[0]
        if kind == "crash":
            raise RuntimeError(f"{self.shard.id}: {content[0]}\n\nIn the worker:\n{content[1]}")
        order, self.order, self.shards_done = self.order, None, self.shards_done + 1
        return (order, content[0], content[1])

    def check_stall(self, seconds: float) -> None:
        if time.monotonic() - self.moved_at > seconds:
            self.process.kill()
            raise WorkerDied(
                f"{self.shard.id}: worker {self.process.pid} got no document done in {seconds:.0f} s and was stopped, after {self.documents_seen} documents of it; "
                "raise --stall_timeout if documents are this slow"
            )

    def _death(self) -> WorkerDied:
        self.process.join(5)
        code = self.process.exitcode
        how = f"was killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"ended with exit code {code}"
        hint = "; often the kernel's answer to too little memory: fewer --num_proc, or a smaller --shard_bytes" if code == -signal.SIGKILL else ""
        return WorkerDied(
            f"{self.shard.id}: worker {self.process.pid} {how} after {self.beacon[0]} documents of its life{hint}; finished shards are kept, run again to go on"
        )

    def stop(self) -> None:
        if self.order is None:
            self._send(None)
            self.process.join(2)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.connection.close()


def _work(connection: Connection, beacon: Any, threads: int) -> None:
    """The worker's life: the pipelines first, then orders until None."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the driver decides what becomes of it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _end_with_driver()
    _die_first_when_memory_is_short()
    _keep_heap()
    # Read by Rayon when its pool starts, which is at the first batch.
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"

    def on_progress(documents: int) -> None:
        beacon[0] += documents

    try:
        pipelines = connection.recv()
        for which, shard in iter(connection.recv, None):
            connection.send(_attempt(pipelines[which], shard, on_progress))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def _attempt(pipeline: Pipeline, shard: Shard, on_progress: Callable[[int], None]) -> tuple[Any, ...]:
    try:
        return ("done", *run_shard(pipeline, shard, on_progress))
    except MoaiError as error:
        return ("error", error)
    except Exception as error:
        return ("crash", f"{type(error).__name__}: {error}", traceback.format_exc())


def _end_with_driver() -> None:
    """A worker must not outlive its driver, however that ends: the parent of a forkserver's child is not the driver, so a
    parent-death signal would not do; the sentinel is a pipe that only the driver holds open."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, name="end-with-driver", daemon=True).start()


def _die_first_when_memory_is_short() -> None:
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("500")


def _keep_heap() -> None:
    """Have glibc keep freed blocks of up to 32 MB for the next batch; by default it gives each back to the kernel and fetches it anew,
    which cost an eighth of a worker's time. Other C libraries have other ways."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        for parameter, value in ((-3, _HEAP_BYTES), (-1, 4 * _HEAP_BYTES)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            libc.mallopt(parameter, value)
