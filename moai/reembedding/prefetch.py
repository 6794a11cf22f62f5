"""Reading, encoding and writing beside each other in this process, a bounded queue between them.

    for batch in Prefetch(embed(Prefetch(chunk(documents.pages())))):
        writer.add(batch)

One thread reads and chunks, one encodes, and the caller's own is the last stage: it writes, gets Ctrl-C and the errors
of every stage. Order is kept. The threads are daemons: one that is deep in a library is left behind, so that a stop
waits for nobody longer than it says.
"""

from __future__ import annotations

import contextlib
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from moai.core.errors import Interrupted

T = TypeVar("T")
_LOOK_SECONDS = 0.1
"""How often a thread that waits looks whether it was stopped."""


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


class Prefetch(Generic[T]):
    """Yield what `batches` yields while a thread makes up to `depth` more. Raises what the thread raised, after what it
    made before.

    idle  called in the caller's thread about every `idle_seconds` while it waits: heartbeats
    stop  set by anyone: the thread ends after its present batch, and so does a thread that waits for one here
    """

    def __init__(
        self,
        batches: Iterator[T],
        *,
        depth: int = 1,
        idle: Callable[[], object] = lambda: None,
        idle_seconds: float = 1.0,
        stop: threading.Event | None = None,
    ) -> None:
        self._batches, self._idle, self._idle_seconds = batches, idle, idle_seconds
        self._stop = threading.Event() if stop is None else stop
        self._closed = threading.Event()
        self._ready: queue.Queue[tuple[T] | BaseException | None] = queue.Queue(depth)  # None: the stream ended
        self._thread = threading.Thread(target=self._work, name="prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        waited = time.monotonic()
        while True:
            try:
                item = self._ready.get(timeout=min(self._idle_seconds, _LOOK_SECONDS))
            except queue.Empty:
                if self._stop.is_set():
                    raise Interrupted("stopped between two batches", signal.SIGINT) from None
                if time.monotonic() - waited >= self._idle_seconds:
                    self._idle()
                    waited = time.monotonic()
                continue
            if isinstance(item, BaseException):
                raise item
            if item is None:
                self._closed.set()
                raise StopIteration
            return item[0]

    def rest(self, within_seconds: float) -> Iterator[T]:
        """After `stop`: what the thread has made, and what it still makes in this time. An error of it is its end."""
        until = time.monotonic() + within_seconds
        with contextlib.suppress(queue.Empty):
            while isinstance(item := self._ready.get(timeout=max(0.0, until - time.monotonic())), tuple):
                yield item[0]

    def close(self, within_seconds: float | None = None) -> None:
        """Nobody takes anything any more: end the thread, and wait for it; at most so long."""
        self._stop.set()
        self._closed.set()
        self._thread.join(within_seconds)

    def _put(self, item: tuple[T] | BaseException | None) -> None:
        while not self._closed.is_set():
            with contextlib.suppress(queue.Full):
                self._ready.put(item, timeout=_LOOK_SECONDS)
                return

    def _work(self) -> None:
        try:
            for batch in self._batches:
                self._put((batch,))
                if self._stop.is_set() or self._closed.is_set():
                    break
            self._put(None)
        except BaseException as error:
            self._put(error)
        finally:
            close = getattr(self._batches, "close", None)
            if close is not None:
                close()  # in the thread that ran it: a database connection belongs to one thread
