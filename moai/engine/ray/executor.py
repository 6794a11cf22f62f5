"""Shards as tasks of Ray Core, over one machine or many. `Ray` is an Executor like those of moai.engine.executor.

The same supervisor as over processes gives out shards and judges deaths; what it takes for a worker is a place in the
cluster, which one task at a time runs in (moai.engine.ray.remote). A task that Ray loses, with its process or with its
node, is begun again: that is no death of the shard, and costs what was in flight.
"""

from __future__ import annotations

import json
import logging
import pickle
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

from moai.core.config import Setting
from moai.core.errors import ConfigError, MoaiError, WorkerDied
from moai.engine.pipeline import Finished, Order, Pipeline
from moai.engine.processes.retries import Death, Try
from moai.engine.processes.supervisor import Supervisor
from moai.engine.ray.cluster import Cluster
from moai.engine.ray.remote import Setup, attempt, call

T = TypeVar("T")
logger = logging.getLogger(__name__)

_MOST_LOST = 20
"""Tasks lost in a row, with none finished between: Ray's processes cannot live here."""


@dataclass(frozen=True, kw_only=True)
class Ray:
    cluster: Cluster
    num_proc: int | None = None
    """Tasks at a time over the cluster; None for as many as it has CPUs, also those that join later."""
    threads: int = 1
    stall_seconds: float = 600.0
    shards_per_worker: int = 512
    modules: tuple[str, ...] = ()
    _key: str = field(default_factory=lambda: uuid.uuid4().hex)

    def start(self) -> None:
        self.cluster.connect()

    def workers(self) -> Setting:
        """Tasks at a time, and why."""
        if self.num_proc:
            return Setting(self.num_proc, "set, over the Ray cluster")
        return Setting(self.cluster.cpus(), "CPUs of the Ray cluster")

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """On a node; again on another where that is lost. Raises what it raised, WorkerDied where it is always lost."""
        import ray

        self.start()
        seen = self._mark()
        try:
            task = ray.remote(call).options(num_cpus=1, max_retries=3)
            waiting = [task.remote(self._setup(seen), function, arguments)]
            while not ray.wait(waiting, timeout=0.5)[0]:
                self.cluster.check()
            result, error = ray.get(waiting[0])
        except ray.exceptions.RayError as lost:
            raise _cannot_run(lost) from lost
        finally:
            seen.unlink(missing_ok=True)
        if error:
            raise error
        return cast(T, result)

    def map(
        self, pipelines: Sequence[Pipeline], orders: Iterator[Order], on_documents: Callable[[int], None]
    ) -> Iterator[Finished]:
        import ray

        self.start()
        seen = self._mark()
        try:
            given = [ray.put(pickle.dumps(tuple(pipelines)))]
            task = ray.remote(attempt).options(
                num_cpus=1, num_returns="streaming", max_retries=0, scheduling_strategy="SPREAD"
            )
            setup, losses = self._setup(seen), _Losses()
            yield from Supervisor(
                start=lambda: Place(lambda tried: task.remote(setup, given, tried), losses),
                wait=self._wait,
                room=_Places(self),
                orders=orders,
                on_documents=on_documents,
                stall_seconds=self.stall_seconds,
                shards_per_worker=sys.maxsize,
            ).run()
        finally:
            seen.unlink(missing_ok=True)

    def _setup(self, seen: Path) -> Setup:
        return Setup(
            key=uuid.uuid4().hex,
            load=json.dumps({"modules": self.modules, "calls": []}),
            threads=self.threads,
            stall_seconds=self.stall_seconds,
            shards_per_worker=self.shards_per_worker,
            path=tuple(sys.path),
            seen=seen,
        )

    def _mark(self) -> Path:
        """A file by which nodes know that they see the same storage: nobody can have looked for its name before."""
        self.cluster.shared.mkdir(parents=True, exist_ok=True)
        mark = self.cluster.shared / f"ray-{uuid.uuid4().hex}.seen"
        mark.touch()
        return mark

    def _wait(self, places: Sequence[Place], seconds: float) -> None:
        import ray

        ray.wait([place.task for place in places], timeout=seconds, fetch_local=False)
        self.cluster.check()


@dataclass
class _Losses:
    """Tasks that Ray lost, in a row."""

    number: int = 0

    def another(self, error: Exception, tried: Try) -> None:
        self.number += 1
        why = " ".join(str(error).split())[:200] or type(error).__name__
        if self.number > _MOST_LOST:
            raise WorkerDied(
                f"{tried.id}: Ray lost {self.number} tasks in a row ({why}); finished shards are kept, run again to go "
                f"on"
            ) from error
        logger.warning("%s: Ray lost its process or its node, another one begins it anew (%s)", tried.id, why)


@dataclass
class Place:
    """One task at a time: a worker, as the supervisor sees it."""

    begin: Callable[[Try], Any]
    losses: _Losses
    tried: Try | None = None
    task: Any = None
    documents: int = 0
    shards_done: int = 0
    _unheard: int = 0
    _answer: Any = None

    def give(self, tried: Try) -> None:
        self.tried, self.documents, self._unheard, self._answer = tried, 0, 0, None
        self.task = self.begin(tried)

    def is_alive(self) -> bool:
        return True

    def news(self, longest_look: float) -> int:
        """Documents done since the last call; fewer than none where those of a lost task are done again."""
        self._listen()
        more, self._unheard = self._unheard, 0
        self.documents += more
        return more

    def answer(self, stall_seconds: float) -> Finished | Death | None:
        found, self._answer = self._answer, None
        if found is None:
            return None
        if isinstance(found, Exception):
            raise found
        if not isinstance(found, Death):
            self.losses.number, self.tried, self.shards_done = 0, None, self.shards_done + 1
        return cast(Finished | Death, found)

    def stop(self) -> None:
        if self.tried and self._answer is None and self.task is not None:
            import ray

            ray.cancel(self.task, force=True)
        self.task = None

    def _listen(self) -> None:
        import ray

        assert self.tried
        while self._answer is None and ray.wait([self.task], timeout=0, fetch_local=False)[0]:
            try:
                said = ray.get(next(self.task))
            except ray.exceptions.OutOfMemoryError as error:  # Ray's own watch over a node's memory chose this one
                self._answer = Death(
                    tried=self.tried, pid=0, how=f"was ended by Ray ({_short(error)})", detail="SIGKILL", memory=True
                )
            except ray.exceptions.RayTaskError as error:
                raise _cannot_run(error) from error
            except (ray.exceptions.RayError, StopIteration) as error:
                self.losses.another(error, self.tried)
                self._unheard = -self.documents
                self.task = self.begin(self.tried)
                return
            else:
                if isinstance(said, int):
                    self._unheard += said
                else:
                    self._answer = said


@dataclass
class _Places:
    """As many as the cluster has CPUs, or as were wished; fewer where tasks needed a machine for themselves."""

    executor: Ray
    _fewer: int = 0

    @property
    def workers(self) -> int:
        return max(1, int(self.executor.workers().value) - self._fewer)

    def for_one_more(self, busy: int) -> bool:
        return busy < self.workers

    def retire(self, why: str) -> None:
        self._fewer += 1
        logger.warning("At most %d at work from now on: %s", self.workers, why)


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _cannot_run(error: Exception) -> MoaiError:
    """What Ray says where it cannot even begin."""
    if isinstance(cause := getattr(error, "cause", None), MoaiError):
        return cause
    if isinstance(cause, ImportError):
        return ConfigError(f"a node of the Ray cluster cannot load moai: {cause}; install it on every node")
    return WorkerDied(f"Ray could not run a task: {_short(error)}; finished shards are kept, run again to go on")
