"""Executors: who runs `run_shard`. Serial in this process, worker processes under a small supervisor, or tasks of Ray.

What one must be able to do is small: `map(pipelines, orders) -> finished`.
"""

from __future__ import annotations

import ast
import contextlib
import json
import logging
import math
import multiprocessing
import multiprocessing.util
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

from moai.core.errors import ConfigError, WorkerDied
from moai.core.stopping import machine_errors
from moai.engine.pipeline import Finished as Finished
from moai.engine.pipeline import Order as Order
from moai.engine.pipeline import Pipeline
from moai.engine.processes.memory import Kills, Room
from moai.engine.processes.preload import WARM, without_interrupts
from moai.engine.processes.supervisor import Supervisor
from moai.engine.processes.worker import Worker, end_with_driver, wait_for
from moai.engine.ray.cluster import Cluster as Cluster
from moai.engine.ray.cluster import Joining as Joining
from moai.engine.ray.executor import Ray as Ray
from moai.engine.serial import Serial as Serial

T = TypeVar("T")
logger = logging.getLogger(__name__)

_TRIES = 3
_PAUSE_SECONDS = 0.2
_LONGEST_TEMPORARY = 60
"""Bytes: a socket's path has 107 at most on Linux and 103 on macOS, and some 40 of them are multiprocessing's."""


class Executor(Protocol):
    def start(self) -> None:
        """Begin to load what the work needs: the caller may do so early and go on with something else."""
        ...

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """What one function gives, called where the shards are worked on: what is loaded there, it finds loaded. Raises
        what it raises.
        """
        ...

    def map(
        self, pipelines: Sequence[Pipeline], orders: Iterator[Order], on_documents: Callable[[int], None]
    ) -> Iterator[Finished]:
        """Run every order, in any sequence. `on_documents(n)` hears of n more documents now and then, from one thread
        at a time.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Processes:
    """`num_proc` worker processes, each with `threads` threads for its tokenizer."""

    num_proc: int
    method: str = "forkserver"
    """How they start: forked from a process that has loaded what they need, or by spawn, each loading for itself what
    its shards need.
    """
    threads: int = 1
    stall_seconds: float = 600.0
    """A worker that gets no batch and no document done in this time is stopped, and its shard worked on as if it had
    died.
    """
    shards_per_worker: int = 512
    """A worker is replaced after this many shards, so that what its libraries keep cannot grow without end."""
    modules: tuple[str, ...] = ("moai.engine.executor",)
    """Imported where workers are forked from, or first of all in each (moai.engine.processes.preload)."""
    warm: tuple[tuple[str, dict[str, Any]], ...] = ()
    """"module:function" with its arguments, called once where workers are forked from. A spawned worker loads it with
    the first shard that needs it.
    """
    root: Path = Path("/")
    """Where /proc and /sys are found that say how much memory is left."""

    def start(self) -> None:
        check_main_guard()
        if self.method != "forkserver":
            return  # there is no process yet that could load anything
        multiprocessing.get_context("forkserver").set_forkserver_preload(["moai.engine.processes.preload"])
        _have_short_temporary_directory()
        os.environ[WARM] = json.dumps({"modules": self.modules, "calls": self.warm})
        try:
            with without_interrupts():
                forkserver.ensure_running()
        finally:
            del os.environ[WARM]

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """In a process of its own, and again in another if that ends without an answer. Raises WorkerDied when the
        last does.
        """
        context: Any = multiprocessing.get_context(self.method)
        for _ in range(_TRIES):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_answer, args=(theirs, function, arguments), daemon=True)
            self._begin(process)
            theirs.close()
            try:
                result, error = ours.recv()
            except EOFError:
                process.join()
                died = f"a process died in {function.__module__}.{function.__name__}, with exit code {process.exitcode}"
                logger.warning("%s", died)
                continue
            if error:
                raise error
            return cast(T, result)
        raise WorkerDied(f"{died}, {_TRIES} times; finished shards are kept, run again to go on")

    def _begin(self, process: Any) -> None:
        """Start a process. The one it is forked from is started again where it has died. Raises WorkerDied."""
        for left in reversed(range(_TRIES)):
            try:
                self.start()
                with without_interrupts():
                    process.start()
                return
            except (EOFError, ConnectionError, FileNotFoundError) as error:
                if not left:
                    raise WorkerDied(
                        f"the process that workers are forked from ended {_TRIES} times ({type(error).__name__}), "
                        f"often for too little memory: fewer --num_proc, or --num_proc 0 to work in one process"
                    ) from error
                logger.warning("The process that workers are forked from has ended; it is started again")
                time.sleep(_PAUSE_SECONDS)  # one that is just being killed still counts as alive

    def map(
        self, pipelines: Sequence[Pipeline], orders: Iterator[Order], on_documents: Callable[[int], None]
    ) -> Iterator[Finished]:
        self.start()
        load = "" if self.method == "forkserver" else json.dumps({"modules": self.modules, "calls": []})
        context, given = multiprocessing.get_context(self.method), tuple(pipelines)
        yield from Supervisor(
            start=partial(Worker.start, context, self._begin, given, self.threads, load),
            wait=wait_for,
            room=Room(self.num_proc, self.root),
            orders=orders,
            on_documents=on_documents,
            stall_seconds=self.stall_seconds,
            shards_per_worker=self.shards_per_worker,
            explained=Kills(self.root).explained,
        ).run()


def make_executor(num_proc: int | None, *, cluster: Cluster | None = None, **how: Any) -> Executor:
    """Who does the work of a run, for every system: a Ray cluster, else this process where `num_proc` is 0, else so
    many workers; `how` is fields of Processes.
    """
    if cluster:
        kept = {name: how[name] for name in ("stall_seconds", "shards_per_worker", "modules") if name in how}
        return Ray(cluster=cluster, num_proc=num_proc, **kept)
    return Processes(num_proc=num_proc, **how) if num_proc else Serial(how.get("stall_seconds", math.inf))


def check_main_guard() -> None:
    """Raises ConfigError where the program that calls this would begin anew in every worker: a worker imports it, and
    only what stands under `if __name__ == "__main__":` is left out."""
    frame: Any = sys._getframe()
    while frame and not (frame.f_code.co_name == "<module>" and frame.f_globals.get("__name__") == "__main__"):
        frame = frame.f_back
    file = Path(frame.f_code.co_filename) if frame else Path()
    if not file.is_file():  # typed in, or in a notebook: there is nothing to import
        return
    try:
        statements = ast.parse(file.read_bytes()).body
    except (SyntaxError, ValueError):
        return
    running = [one for one in statements if one.lineno <= frame.f_lineno <= (one.end_lineno or one.lineno)]
    tests = [name for one in running if isinstance(one, ast.If) for name in ast.walk(one.test)]
    if running and not any(isinstance(name, ast.Name) and name.id == "__name__" for name in tests):
        raise ConfigError(
            f"{file}, line {frame.f_lineno}: worker processes import this program, which would begin its work in each "
            f"of them; "
            'put this line under `if __name__ == "__main__":`, or work in this process: num_proc=0'
        )


def _have_short_temporary_directory() -> None:
    """What multiprocessing keeps its sockets in: where TMPDIR is long, a socket's path would be longer than systems
    allow.
    """
    if len(os.fsencode(tempfile.gettempdir())) > _LONGEST_TEMPORARY:
        before, tempfile.tempdir = tempfile.tempdir, "/tmp"
        try:
            multiprocessing.util.get_temp_dir()
        finally:
            tempfile.tempdir = before


def _answer(connection: Connection, function: Callable[..., Any], arguments: Sequence[Any]) -> None:
    end_with_driver()
    answer: tuple[Any, Exception | None]
    try:
        with machine_errors():
            answer = function(*arguments), None
    except Exception as error:
        answer = None, error
    with contextlib.suppress(OSError):  # the driver has gone
        connection.send(answer)
