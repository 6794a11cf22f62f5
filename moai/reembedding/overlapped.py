"""Reading, encoding and writing beside each other in this process, a bounded queue between them.

    for batch in ahead(embed(ahead(chunk(documents.pages())))):     # reading and chunking, encoding, and here: writing
        into.add(batch)

For work whose one writer must hold the pen, as with SQLite, and whose heavy part lets go of the interpreter while it
computes. `ahead` runs everything behind it in a thread of its own and keeps `depth` batches ready, so the encoder finds
its next batch waiting and the writer's disk time costs the encoder nothing. The caller's own thread is the last stage:
it gets Ctrl-C, and errors of every stage come out there. Order is kept, so the result is that of the same generators
without any thread.
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
"""How often a thread that waits for room looks whether anybody still wants what it makes."""


@dataclass
class Seconds:
    """Seconds by stage, summed over the run. A stage inside another one of the same thread is not counted twice;
    threads run beside each other, so the sum may exceed the wall clock."""

    by_stage: dict[str, float] = field(default_factory=dict)
    _running: threading.local = field(default_factory=threading.local)

    @contextlib.contextmanager
    def of(self, stage: str) -> Iterator[None]:
        stack: list[tuple[str, float]] = self._running.__dict__.setdefault("stack", [])
        self._turn(stack, (stage,))
        try:
            yield
        finally:
            self._turn(stack, ())

    def waiting(self, stage: str, batches: Iterator[T]) -> Iterator[T]:
        """`batches`, with the time it takes to get each counted for `stage`."""
        while True:
            with self.of(stage):
                try:
                    batch = next(batches)
                except StopIteration:
                    return
            yield batch

    def _turn(self, stack: list[tuple[str, float]], entered: tuple[str, ...]) -> None:
        """Count for the stage on top, and begin to count for the next: one that is entered, or the one below."""
        now = time.perf_counter()
        if stack:
            stage, since = stack.pop()
            self.by_stage[stage] = self.by_stage.get(stage, 0.0) + now - since
            if entered:
                stack.append((stage, now))
        if entered:
            stack.append((entered[0], now))
        elif stack:
            stack.append((stack.pop()[0], now))


class _End:
    """The stream ended, with or without an error."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


def ahead(
    batches: Iterator[T], *, depth: int = 1, idle: Callable[[], None] | None = None, idle_seconds: float = 1.0
) -> Generator[T, None, None]:
    """Yield what `batches` yields while a thread makes up to `depth` more. Raises what the thread raised, after what it
    made before.

    idle  called in the caller's thread about every `idle_seconds` while it waits: heartbeats

    Closing the iterator, or leaving the loop over it, stops the thread after its present batch and waits for that.
    """
    ready: queue.Queue[T | _End] = queue.Queue(depth)
    stopped = threading.Event()

    def put(item: T | _End) -> None:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(item, timeout=_LOOK_SECONDS)
                return

    def work() -> None:
        try:
            for batch in batches:
                put(batch)
                if stopped.is_set():
                    break
        except BaseException as error:
            put(_End(error))
        else:
            put(_End(None))
        finally:
            close = getattr(batches, "close", None)
            if close is not None:
                close()  # in the thread that ran it: a database connection belongs to one thread

    thread = threading.Thread(target=work, name="ahead", daemon=True)
    thread.start()
    try:
        while True:
            item = _next(ready, idle, idle_seconds)
            if isinstance(item, _End):
                if item.error is not None:
                    raise item.error
                return
            yield item
    finally:
        stopped.set()
        thread.join()


def _next(ready: queue.Queue[T | _End], idle: Callable[[], None] | None, idle_seconds: float) -> T | _End:
    while True:
        try:
            return ready.get(timeout=idle_seconds)
        except queue.Empty:
            if idle is not None:
                idle()
