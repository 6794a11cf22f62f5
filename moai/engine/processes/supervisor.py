"""One run over workers, which are processes of this machine or places in a Ray cluster: who gets which shard when, and
what becomes of a shard whose worker ended.

A pool cannot say which worker died on which document, nor stop one that hangs; `multiprocessing.Pool` even waits for
ever for a killed one. Here the driver waits on pipes and sentinels together, and one shard at a time is in flight per
worker.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from moai.core.failpoints import failpoint
from moai.engine.pipeline import Finished, Order
from moai.engine.processes.retries import Death, Deaths, Try

_POLL_SECONDS = 0.5


class Working(Protocol):
    """A worker as its supervisor sees it (moai.engine.processes.worker.Worker)."""

    tried: Try | None
    documents: int
    shards_done: int

    def give(self, tried: Try) -> None: ...
    def is_alive(self) -> bool: ...
    def news(self, longest_look: float) -> int: ...
    def answer(self, stall_seconds: float) -> Finished | Death | None: ...
    def stop(self) -> None: ...


class Places(Protocol):
    """How many workers there may be at most, and whether one more may be busy now."""

    @property
    def workers(self) -> int: ...
    def for_one_more(self, busy: int) -> bool: ...
    def retire(self, why: str) -> None: ...


@dataclass(kw_only=True)
class Supervisor:
    """`wait` returns once one of the busy workers may have news, or after so many seconds."""

    start: Callable[[], Working]
    wait: Callable[[Sequence[Any], float], None]
    room: Places
    orders: Iterator[Order]
    on_documents: Callable[[int], None]
    stall_seconds: float
    shards_per_worker: int
    explained: Callable[[Death], Death] = lambda death: death
    """With whose doing it was, where a worker cannot tell."""
    deaths: Deaths = field(default_factory=Deaths)
    idle: list[Working] = field(default_factory=list)
    busy: list[Working] = field(default_factory=list)
    ahead: deque[Try] = field(default_factory=deque)
    """Drawn while the workers work: where a compressed file is cut, the next range takes a while."""
    again: deque[Try] = field(default_factory=deque)
    """Shards whose worker died."""
    exhausted: bool = False

    def run(self) -> Iterator[Finished]:
        finished: list[Finished] = []
        try:
            while True:
                while tried := self._next():
                    self._give(tried)
                # What the caller does with them takes a while: the workers have their next orders by now.
                yield from finished
                finished.clear()
                if not self.busy:
                    return
                drawing = not self.exhausted and len(self.ahead) < self.room.workers
                if drawing:
                    self._draw()
                self.wait(self.busy, 0 if drawing else _POLL_SECONDS)
                finished += self._look()
        finally:
            # On success all are idle and end at once; on an error what is in flight is worth less than ending now.
            for worker in self.idle + self.busy:
                worker.stop()

    def _draw(self) -> None:
        order = next(self.orders, None)
        if order is None:
            self.exhausted = True
        else:
            self.ahead.append(Try(order=order))

    def _next(self) -> Try | None:
        """What a worker shall get now; None while there is nothing, or while it must wait."""
        if self.busy and self.busy[0].tried and self.busy[0].tried.alone:
            return None
        if self.again and self.again[0].alone:
            return None if self.busy else self.again.popleft()
        if not self.room.for_one_more(len(self.busy)):
            return None
        if self.again:
            return self.again.popleft()
        while not self.ahead and not self.exhausted:
            self._draw()
        return self.ahead.popleft() if self.ahead else None

    def _give(self, tried: Try) -> None:
        worker = None
        again = tried.care.parts > 1  # by a fresh worker: what an old one has been through is no part of the question
        while self.idle and (again or worker is None):
            left = self.idle.pop()
            if again or not left.is_alive():  # what idle workers hold is memory, too
                left.stop()
            else:
                worker = left
        worker = worker or self.start()
        failpoint("driver.order")
        worker.give(tried)
        self.busy.append(worker)

    def _look(self) -> Iterator[Finished]:
        for worker in list(self.busy):
            tried = worker.tried
            self.on_documents(worker.news(self.stall_seconds / 4))
            answer = worker.answer(self.stall_seconds)
            if answer is None:
                continue
            if isinstance(answer, Death) and answer.is_lost:
                self._begin_anew(answer)
                return
            self.busy.remove(worker)
            if isinstance(answer, Death):
                worker.stop()
                self.on_documents(-worker.documents)
                self.again.append(self.deaths.next_try(self.explained(answer)))
                continue
            failpoint("driver.finished")
            self.deaths.at_start = 0
            yield answer
            if tried and tried.alone and not tried.care.left_out:
                self.room.retire(f"{tried.id} killed its worker beside others, and none when it was alone")
            if worker.shards_done < self.shards_per_worker and len(self.busy) + len(self.idle) < self.room.workers:
                self.idle.append(worker)
            else:
                worker.stop()
        while self.idle and len(self.busy) + len(self.idle) > self.room.workers:
            self.idle.pop().stop()

    def _begin_anew(self, death: Death) -> None:
        """The process that workers are forked from is gone, and with it the news of them all: other workers take their
        shards.
        """
        self.deaths.lose_all(death)
        for worker in self.idle + self.busy:
            if worker.tried:
                self.on_documents(-worker.documents)
                self.again.append(worker.tried)
            worker.stop()
        self.idle.clear()
        self.busy.clear()
