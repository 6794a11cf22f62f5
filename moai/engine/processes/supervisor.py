"""One run over worker processes: who gets which shard when, and what becomes of a shard whose worker ended.

A pool cannot say which worker died on which document, nor stop one that hangs; `multiprocessing.Pool` even waits for
ever for a killed one. Here the driver waits on pipes and sentinels together, and one shard at a time is in flight per
worker.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from multiprocessing.connection import wait
from pathlib import Path

from moai.core.failpoints import failpoint
from moai.engine.pipeline import Finished, Order
from moai.engine.processes.memory import Room, oom_kills
from moai.engine.processes.retries import Death, Deaths, Try
from moai.engine.processes.worker import Worker

_POLL_SECONDS = 0.5
_OTHERS_SEND = ("SIGKILL", "SIGTERM", "SIGHUP", "SIGQUIT")
_START_SECONDS = 60.0
"""To load what a worker needs may take so long on a busy machine, however short the time for a batch is."""


@dataclass(kw_only=True)
class Supervisor:
    """`num_proc` is how many workers there may be at most; where memory runs short, there are fewer."""

    start: Callable[[], Worker]
    orders: Iterator[Order]
    on_documents: Callable[[int], None]
    num_proc: int
    stall_seconds: float
    shards_per_worker: int
    root: Path
    idle: list[Worker] = field(default_factory=list)
    busy: list[Worker] = field(default_factory=list)
    ahead: deque[Try] = field(default_factory=deque)
    """Drawn while the workers work: where a compressed file is cut, the next range takes a while."""
    again: deque[Try] = field(default_factory=deque)
    """Shards whose worker died."""
    exhausted: bool = False

    def __post_init__(self) -> None:
        self.room = Room(self.num_proc, self.root)
        self.deaths = Deaths()
        self.oom_kills = oom_kills(self.root)

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
                drawing = not self.exhausted and len(self.ahead) < self.num_proc
                if drawing:
                    self._draw()
                handles = [handle for worker in self.busy for handle in (worker.connection, worker.process.sentinel)]
                wait(handles, timeout=0 if drawing else _POLL_SECONDS)
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
            answer = worker.poll()
            if answer is None and worker.still_seconds > (
                self.stall_seconds if worker.has_begun else max(self.stall_seconds, _START_SECONDS)
            ):
                answer = worker.end_hung()
            if answer is None:
                continue
            if isinstance(answer, Death) and answer.is_lost:
                self._begin_anew(answer)
                return
            self.busy.remove(worker)
            if isinstance(answer, Death):
                worker.stop()
                self.on_documents(-worker.documents)
                self.again.append(self.deaths.next_try(self._explained(answer)))
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

    def _explained(self, death: Death) -> Death:
        """The kernel counts whom it kills for memory."""
        before, self.oom_kills = self.oom_kills, oom_kills(self.root)
        if death.detail not in _OTHERS_SEND:
            return death
        if death.detail == "SIGKILL" and self.oom_kills > before:
            return replace(death, how=f"{death.how} (by the kernel, for memory)")
        return replace(death, how=f"{death.how} (from outside)", outside=True)
