"""All work in this process: small inputs, debugging. A document that makes a library give up, or that hangs, is set
aside here too, by the rules of moai.engine.processes.retries; one that kills ends the run.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, TypeVar

from moai.core.errors import WorkerDied
from moai.core.stopping import is_panic
from moai.engine.pipeline import Finished, Order, Pipeline, run_shard
from moai.engine.processes.retries import Death, Deaths, Try

T = TypeVar("T")
logger = logging.getLogger(__name__)

_LOOKS = 8
"""So often in the time that a document may take is looked whether anything moves."""


class Hung(BaseException):
    """Raised in the middle of whatever gets nothing done. No Exception: nobody shall take it for an answer."""


@dataclass(frozen=True)
class Serial:
    stall_seconds: float = math.inf
    """What gets no batch and no document done in this time hangs."""

    def start(self) -> None:
        """What it needs is loaded here, when it is needed."""

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        return function(*arguments)

    def map(
        self, pipelines: Sequence[Pipeline], orders: Iterator[Order], on_documents: Callable[[int], None]
    ) -> Iterator[Finished]:
        deaths = Deaths()
        for order in orders:
            finished, tried = None, Try(order=order)
            while finished is None:
                finished, tried = self._attempt(pipelines[order[0]], tried, deaths, on_documents)
            yield finished

    def _attempt(
        self, pipeline: Pipeline, tried: Try, deaths: Deaths, on_documents: Callable[[int], None]
    ) -> tuple[Finished | None, Try]:
        watch = _Watch(self.stall_seconds, tried.id, on_documents)
        try:
            with watch.looking():
                done = run_shard(pipeline, tried.order[1], watch.advance, watch.work_on, tried.care)
            return (tried.order, *done), tried
        except BaseException as error:
            if not is_panic(error):
                raise
            on_documents(-watch.documents)
            hung, name = isinstance(error, Hung), type(error).__name__
            death = Death(
                tried=tried,
                pid=os.getpid(),
                how=str(error) if hung else f"raised {name} ({' '.join(str(error).split())[:200]})",
                detail="hung" if hung else name,
                hung=hung,
                record=watch.record,
                records=watch.records,
            )
            return None, deaths.next_try(death)


@dataclass
class _Watch:
    """What the shard in work is at, and since when."""

    stall_seconds: float
    shard: str
    on_documents: Callable[[int], None]
    documents: int = 0
    record: int = 0
    records: int = 0
    _moved: bool = False
    _over: threading.Event = field(default_factory=threading.Event)

    def advance(self, documents: int) -> None:
        self.documents += documents
        self._moved = True
        self.on_documents(documents)

    def work_on(self, record: int, records: int) -> None:
        self.record, self.records, self._moved = record, records, True

    @contextlib.contextmanager
    def looking(self) -> Iterator[None]:
        """Raises Hung within. What can be interrupted is, by an alarm, also where it keeps the interpreter's lock; what
        cannot ends the process.

        Looks are counted, not seconds: a process that was stopped had no chance. Where the alarm is somebody else's, or
        this is not the main thread, nobody looks.
        """
        free = (
            math.isfinite(self.stall_seconds)
            and threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGALRM) is signal.SIG_DFL
        )
        if not free:
            yield
            return
        every, still, heard = self.stall_seconds / _LOOKS, 0, 0

        def look(signum: int, frame: FrameType | None) -> None:
            nonlocal still, heard
            heard += 1
            still = 0 if self._moved else still + 1
            self._moved = False
            if still >= _LOOKS:
                raise Hung(f"got nothing done in {self.stall_seconds:.0f} s and was stopped")

        def end() -> None:
            before, same = -1, 0
            while not self._over.wait(every):
                before, same = heard, same + 1 if heard == before else 0
                if same > _LOOKS:  # in one call all the time, which does not hear the alarm
                    logger.error(
                        "%s: got nothing done in %.0f s and cannot be stopped in this process; --num_proc 1 finds the "
                        "document and sets it aside",
                        self.shard,
                        self.stall_seconds,
                    )
                    os._exit(WorkerDied.exit_code)

        signal.signal(signal.SIGALRM, look)
        signal.setitimer(signal.ITIMER_REAL, every, every)
        threading.Thread(target=end, name="ends-what-hangs", daemon=True).start()
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            self._over.set()
