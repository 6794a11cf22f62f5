"""What runs in Ray's own processes: one shard an attempt, in a worker process of moai's below them.

That worker is the one of `moai.engine.processes`, with its pipe and its beacon. So a document that kills or hangs ends
a process of ours, and what comes back is how it died and on which record: an ordinary value. Whatever Ray raises is
therefore the cluster's doing, and never counts as a death of the shard. The worker keeps tokenizer and pipelines from
one shard to the next; it ends with Ray's process.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import moai
from moai.core.errors import ConfigError, MoaiError
from moai.engine.pipeline import Finished
from moai.engine.processes.memory import Kills
from moai.engine.processes.retries import Death, Try
from moai.engine.processes.worker import Worker, wait_for

_POLL_SECONDS = 0.5
Answer = Finished | Death | Exception


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What an attempt needs to know of the run; `key` names its pipelines."""

    key: str
    load: str
    threads: int
    stall_seconds: float
    shards_per_worker: int
    path: tuple[str, ...]
    """sys.path of the driver: what it imports, workers import too where it is there."""
    seen: Path
    """A file of this run on the storage that all nodes share."""
    driver: str = field(default_factory=platform.node)
    version: str = moai.__version__


@dataclass(frozen=True)
class Pickled:
    """Pipelines as they were pickled by the driver: Ray's process hands them on and imports nothing that they need."""

    data: bytes

    def __reduce__(self) -> tuple[Callable[[bytes], Any], tuple[bytes]]:
        return pickle.loads, (self.data,)


@dataclass
class _Held:
    """The worker of this process of Ray's, and the run it works for."""

    key: str = ""
    worker: Worker | None = None
    kills: Kills = field(default_factory=Kills)

    def ready(self, setup: Setup, pipelines: Callable[[], bytes], *, fresh: bool) -> Worker:
        again = self.worker and self.key == setup.key and not fresh and self.worker.is_alive()
        if again and self.worker and self.worker.shards_done < setup.shards_per_worker:
            return self.worker
        self.end()
        _check(setup)
        context = multiprocessing.get_context("spawn")
        self.worker = Worker.start(context, _begin, Pickled(pipelines()), setup.threads, setup.load)
        self.key = setup.key
        return self.worker

    def end(self) -> None:
        if self.worker:
            self.worker.stop()
        self.worker = None


_held = _Held()


def attempt(setup: Setup, pipelines: Sequence[Any], tried: Try) -> Iterator[int | Answer]:
    """Work on a shard: documents done now and then, at the end the finished shard, the death of its worker, or an
    error.

    pipelines  one reference to their bytes, which is only followed where they are not here yet
    """
    import ray

    try:
        # What a worker has been through is no part of the question of what kills it.
        worker = _held.ready(setup, lambda: bytes(ray.get(pipelines[0])), fresh=tried.care.parts > 1)
        worker.give(tried)
        said, documents, answer = time.monotonic(), 0, None
        while answer is None:
            wait_for([worker], _POLL_SECONDS)
            documents += worker.news(setup.stall_seconds / 4)
            answer = worker.answer(setup.stall_seconds)
            if answer is None and documents and time.monotonic() - said > _POLL_SECONDS:
                said = time.monotonic()
                yield documents
                documents = 0
        if documents:
            yield documents
    except Exception as error:
        yield _told(error, setup)
        return
    if isinstance(answer, Death):
        _held.end()
        answer = _held.kills.explained(answer)
    yield answer


def call(setup: Setup, function: Callable[..., Any], arguments: Sequence[Any]) -> Any:
    """(result, None) or (None, what it raised)."""
    try:
        _check(setup)
        return function(*arguments), None
    except Exception as error:
        return None, _told(error, setup)


def _check(setup: Setup) -> None:
    """Raises ConfigError where this node is not one that can work for the run."""
    if moai.__version__ != setup.version:
        raise ConfigError(
            f"the node {platform.node()} has moai {moai.__version__}, the driver {setup.version}: install one version "
            f"on every node"
        )
    sys.path += [place for place in setup.path if place not in sys.path and os.path.exists(place)]
    if not setup.seen.exists():
        raise ConfigError(
            f"{setup.seen.parent}: the node {platform.node()} does not see what the driver wrote there; --executor ray "
            f"needs storage that all nodes share (--cache_dir)"
        )


def _begin(process: Any) -> None:
    """Start a process that does not import Ray's main module."""
    main = sys.modules["__main__"].__dict__
    file = main.pop("__file__", None)
    try:
        process.start()
    finally:
        if file is not None:
            main["__file__"] = file


def _told(error: Exception, setup: Setup) -> Exception:
    """With the node that it rose on, where that is not the driver's."""
    here = platform.node()
    if isinstance(error, MoaiError) and here != setup.driver and error.args:
        error.args = (f"{error.args[0]} (on the node {here})", *error.args[1:])
    with contextlib.suppress(Exception):
        pickle.loads(pickle.dumps(error))
        return error
    return RuntimeError(f"{type(error).__name__}: {error}")
