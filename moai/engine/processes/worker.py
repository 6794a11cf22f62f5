"""One worker process, from both sides: `Worker` is what the driver holds of it, `work` is its life.

It has a pipe for orders and receipts, and a beacon in shared memory, which still says what it was at when it is dead.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import multiprocessing
import os
import re
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from moai.core.distributed import start_token
from moai.core.errors import ConfigError, MoaiError
from moai.core.failpoints import failpoint
from moai.core.files import storage_errors
from moai.core.stopping import is_panic
from moai.engine.pipeline import Care, Finished, Pipeline, Shard, run_shard
from moai.engine.processes.preload import begin
from moai.engine.processes.retries import Death, Try

_HEAP_BYTES = 32 << 20
_NO_MEMORY = 71
"""Exit code of a worker that was refused memory: its successor begins with a heap of its own."""
_NO_NEWS = 255
"""The exit code of a process whose forkserver ended before it."""
_WORDS = 5
_PEAK_SECONDS = 0.5
_START_SECONDS = 60.0
"""To load what a worker needs may take so long on a busy machine, however short the time for a batch is."""
_INSTALL = "its module must be installed where workers run, on every node"
_MAXRSS_BYTES = 1 if sys.platform == "darwin" else 1024


@dataclass(frozen=True)
class Beacon:
    """Words in shared memory: documents done, first record of the batch in work, records in it (see `run_shard`),
    whether the worker has begun, and the most bytes of memory it had held when that batch came."""

    words: Any
    """_WORDS of 64 bits."""

    def advance(self, documents: int) -> None:
        self.words[0] += documents

    def work_on(self, record: int, records: int) -> None:
        self.words[1] = record
        self.words[2] = records
        self.words[4] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _MAXRSS_BYTES

    def begin(self) -> None:
        self.words[3] = 1

    def forget(self) -> None:
        """By the driver, between two shards: what a worker is at that dies before it gets the next."""
        self.words[1] = self.words[2] = 0


@dataclass
class Worker:
    """One shard at a time is in its hands: `tried`."""

    process: Any
    connection: Connection
    beacon: Beacon
    tried: Try | None = None
    shards_done: int = 0
    documents: int = 0
    """Of the shard in work."""
    peak_bytes: int = 0
    still_seconds: float = 0.0
    """For so long its beacon has not moved, by the driver's own looks."""
    _seen: tuple[int, ...] = (0,) * _WORDS
    _looked_at: float = 0.0
    _measured_at: float = 0.0

    @classmethod
    def start(cls, context: Any, begun: Callable[[Any], Any], pipelines: Any, threads: int, load: str) -> Worker:
        """`context` is multiprocessing's, `begun` starts a process of it; `load` is what `warm` shall load there first,
        empty where it is forked from a process that has it. `pipelines` arrive as the sequence they pickle to.
        """
        ours, theirs = context.Pipe()
        beacon = Beacon(context.RawArray("q", _WORDS))
        process = context.Process(
            target=begin, args=(load, "moai.engine.processes.worker:work", theirs, beacon, threads), daemon=True
        )
        begun(process)
        theirs.close()
        failpoint("driver.worker")
        worker = cls(process, ours, beacon)
        worker._send(pipelines)
        return worker

    def give(self, tried: Try) -> None:
        self.tried, self.documents, self.still_seconds, self._looked_at = tried, 0, 0.0, time.monotonic()
        self.beacon.forget()
        self._send((*tried.order, tried.care))

    def is_alive(self) -> bool:
        return bool(self.process.is_alive())

    @property
    def has_begun(self) -> bool:
        return bool(self.beacon.words[3])

    def news(self, longest_look: float) -> int:
        """Documents done since the last call; takes notice of how it stands with the worker.

        longest_look  seconds since the last call that count: where the driver itself was stopped, its workers were, too
        """
        seen, now = tuple(self.beacon.words), time.monotonic()
        more = int(seen[0]) - self._seen[0]
        self.documents += more
        self.still_seconds = (
            0.0 if seen != self._seen else self.still_seconds + min(longest_look, now - self._looked_at)
        )
        self._seen, self._looked_at = seen, now
        if now - self._measured_at > _PEAK_SECONDS:
            self._measured_at, self.peak_bytes = now, max(self.peak_bytes, _peak_bytes(self.process.pid))
        return more

    def poll(self) -> Finished | Death | None:
        """The finished shard, or how the worker ended, or None while it works. Raises what it raised."""
        assert self.tried is not None
        try:
            if not self.connection.poll():
                if self.process.is_alive():
                    return None
                if not self.connection.poll():  # it may have answered just before it ended
                    return self._dead()
            kind, *content = self.connection.recv()
        except (EOFError, ConnectionResetError):
            return self._dead()
        if kind == "error":
            raise content[0]
        if kind == "panic":  # what the library keeps may be as good as broken: this worker is not used again
            return self._death(*content)
        if kind == "crash":
            raise RuntimeError(f"{self.tried.id}: {content[0]}\n\nIn the worker:\n{content[1]}")
        order, self.tried, self.shards_done = self.tried.order, None, self.shards_done + 1
        return order, content[0], content[1]

    def answer(self, stall_seconds: float) -> Finished | Death | None:
        """As `poll`; a worker that has stood still for so long is stopped, and what it was at is its death."""
        answer = self.poll()
        if answer is None and self.still_seconds > (
            stall_seconds if self.has_begun else max(stall_seconds, _START_SECONDS)
        ):
            return self.end_hung()
        return answer

    def end_hung(self) -> Death:
        """Stop a worker that stands still."""
        self.process.kill()
        self.process.join(
            5
        )  # one that waits for a disk that does not answer ends later, and writes nowhere but in its own staging file
        return self._death(f"got nothing done in {self.still_seconds:.0f} s and was stopped", "hung", hung=True)

    def stop(self) -> None:
        if self.tried is None:
            self._send(None)
            self.process.join(2)
        if self.process.is_alive():
            self.process.kill()
            self.process.join(5)
        self.connection.close()
        with contextlib.suppress(ValueError):  # it waits for a disk that does not answer
            self.process.close()  # ends the one that is lost, too: it watches for this

    def _send(self, message: Any) -> None:
        # A worker that died before it could take the message is found by `poll`, which knows how to say so.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.connection.send(message)

    def _dead(self) -> Death:
        self.process.join(5)
        code = self.process.exitcode
        if code == _NO_NEWS and start_token(self.process.pid):
            return self._death("the process that workers are forked from ended", "lost", is_lost=True)
        if code == _NO_MEMORY:
            return self._death("was refused memory (MemoryError)", "MemoryError", memory=True)
        if code is None or code >= 0:
            return self._death(f"ended with exit code {code}", f"exit code {code}")
        name = signal.Signals(-code).name
        # SIGKILL is how the kernel takes memory back, SIGABRT how C and Rust end when they get none.
        return self._death(f"was killed by {name}", name, memory=-code in (signal.SIGKILL, signal.SIGABRT))

    def _death(self, how: str, detail: str, **more: bool) -> Death:
        assert self.tried is not None
        _, record, records, started, peak = self.beacon.words
        return Death(
            tried=self.tried,
            pid=self.process.pid,
            how=how,
            detail=detail,
            **more,
            peak_bytes=max(peak, self.peak_bytes),
            started=bool(started),
            record=record,
            records=records,
        )


def wait_for(workers: Sequence[Worker], seconds: float) -> None:
    """Until one of them has answered or ended, for so long at most."""
    wait([handle for worker in workers for handle in (worker.connection, worker.process.sentinel)], timeout=seconds)


def work(connection: Connection, beacon: Beacon, threads: int) -> None:
    """The worker's life: the pipelines first, then orders until None."""
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches the whole group; the driver decides what becomes of it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    end_with_driver()
    _die_first_when_memory_is_short()
    _keep_heap()
    # Read by Rayon when its pool starts, which is at the first batch.
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
    failpoint("worker.start")
    try:
        try:
            pipelines = connection.recv()
        except (ImportError, AttributeError) as error:
            connection.send(("error", ConfigError(f"a worker cannot load a part: {error}; {_INSTALL}")))
            return
        beacon.begin()
        for which, shard, care in iter(connection.recv, None):
            answer = _attempt(pipelines[which], shard, beacon, care)
            failpoint("worker.receipt")
            connection.send(answer)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def _attempt(pipeline: Pipeline, shard: Shard, beacon: Beacon, care: Care) -> tuple[Any, ...]:
    try:
        with storage_errors(Path(shard.id)):
            failpoint("worker.shard")
            return ("done", *run_shard(pipeline, shard, beacon.advance, beacon.work_on, care))
    except MoaiError as error:
        return ("error", error)
    except MemoryError:
        os._exit(_NO_MEMORY)
    except Exception as error:
        return ("crash", f"{type(error).__name__}: {error}", traceback.format_exc())
    except BaseException as error:
        if not is_panic(error):
            raise
        name = type(error).__name__
        return ("panic", f"raised {name} ({' '.join(str(error).split())[:200]})", name)


def end_with_driver() -> None:
    """A worker must not outlive its driver, however that ends: the parent of a forkserver's child is not the driver, so
    a parent-death signal would not do; the sentinel is a pipe that only the driver holds open."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    with contextlib.suppress(
        OSError, AttributeError
    ):  # Linux: the kernel does it, also in the middle of a call that lets no other thread run
        fcntl.fcntl(parent.sentinel, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(parent.sentinel, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(parent.sentinel, fcntl.F_SETFL, fcntl.fcntl(parent.sentinel, fcntl.F_GETFL) | os.O_ASYNC)

    def watch() -> None:  # elsewhere, and where the driver was gone before
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, name="end-with-driver", daemon=True).start()


def _die_first_when_memory_is_short() -> None:
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("500")


def _keep_heap() -> None:
    """Have glibc keep freed blocks of up to 32 MB for the next batch; by default it gives each back to the kernel and
    fetches it anew, which cost an eighth of a worker's time. Other C libraries have other ways."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        for parameter, value in ((-3, _HEAP_BYTES), (-1, 4 * _HEAP_BYTES)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            libc.mallopt(parameter, value)


def _peak_bytes(pid: int) -> int:
    """The most memory a process has held so far; 0 once it is gone, or where the system does not tell."""
    with contextlib.suppress(OSError):
        if match := re.search(r"^VmHWM:\s+([0-9]+) kB", Path(f"/proc/{pid}/status").read_text(), flags=re.MULTILINE):
            return int(match[1]) * 1024
    return 0
