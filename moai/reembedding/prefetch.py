"""Reading, encoding and writing beside each other in this process, a bounded queue between them.

    for batch in prefetch(embed(prefetch(chunk(documents.pages())))):
        writer.add(batch)

One thread reads and chunks, one encodes, and the caller's own is the last stage: it writes, gets Ctrl-C and the errors
of every stage. Order is kept.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")
_LOOK_SECONDS = 0.1
"""How often a thread that waits for room looks whether it was stopped."""


@dataclass
class Seconds:
    """Seconds by stage, summed over the run. A stage inside another one of the same thread is not counted twice."""

    by_stage: dict[str, float] = field(default_factory=dict)
    _of_thread: threading.local = field(default_factory=threading.local)

    @contextlib.contextmanager
    def of(self, stage: str) -> Iterator[None]:
        inside: list[float] = self._of_thread.__dict__.setdefault("inside", [])
        inside.append(0.0)  # seconds of the stages that run inside this one
        began = time.perf_counter()
        try:
            yield
        finally:
            took = time.perf_counter() - began
            self.by_stage[stage] = self.by_stage.get(stage, 0.0) + took - inside.pop()
            if inside:
                inside[-1] += took

    def waiting(self, stage: str, batches: Iterator[T]) -> Iterator[T]:
        """`batches`, with the time it takes to get each counted for `stage`."""
        while True:
            with self.of(stage):
                try:
                    batch = next(batches)
                except StopIteration:
                    return
            yield batch


def prefetch(
    batches: Iterator[T], *, depth: int = 1, idle: Callable[[], object] = lambda: None, idle_seconds: float = 1.0
) -> Generator[T, None, None]:
    """Yield what `batches` yields while a thread makes up to `depth` more. Raises what the thread raised, after what it
    made before. Leaving the loop over it stops the thread after its present batch and waits for that.

    idle  called in the caller's thread about every `idle_seconds` while it waits: heartbeats
    """
    ready: queue.Queue[tuple[T] | BaseException | None] = queue.Queue(depth)  # None: the stream ended
    stopped = threading.Event()

    def put(item: tuple[T] | BaseException | None) -> None:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(item, timeout=_LOOK_SECONDS)
                return

    def work() -> None:
        try:
            for batch in batches:
                put((batch,))
                if stopped.is_set():
                    break
            put(None)
        except BaseException as error:
            put(error)
        finally:
            close = getattr(batches, "close", None)
            if close is not None:
                close()  # in the thread that ran it: a database connection belongs to one thread

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            try:
                item = ready.get(timeout=idle_seconds)
            except queue.Empty:
                idle()
                continue
            if isinstance(item, BaseException):
                raise item
            if item is None:
                return
            yield item[0]
    finally:
        stopped.set()
        thread.join()
