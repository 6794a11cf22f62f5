"""What the file system under the cache does: speed, locks, rename and links, measured there.

A second process of this machine takes part; how long another node's view lags is not seen.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from moai.doctor.check import ADVICE, BOOTSTRAP, FAILED, OK, Check, failed, judged

PROBE_BYTES = 64 * 2**20
LOW_SPACE_BYTES = 10 * 10**9
"""Prepared data takes 2-4 bytes a token, and the shards are kept beside it as links."""
SLOW_WRITE_MB_PER_SECOND = 50
ANSWER_SECONDS = 30.0
VISIBLE_SECONDS = 5.0

_ELSEWHERE = "name another place with --cache_dir"


def check_storage(cache_dir: Path) -> list[Check]:
    """Space, speed, rename and lock where the cache lies or will lie, in a directory that is removed."""
    place = cache_dir.expanduser().absolute()
    existing = next(path for path in (place, *place.parents) if path.exists())
    if not existing.is_dir():
        return [failed("disk space", f"{existing} is a file", _ELSEWHERE)]
    space = check_space(existing)
    if space.verdict == FAILED:
        return [space]
    try:
        with tempfile.TemporaryDirectory(prefix=".moai-doctor-", dir=existing) as name, second_process() as other:
            scratch = Path(name)
            speed = _attempt("disk speed", lambda: check_speed(scratch))
            rename = _attempt("rename", lambda: check_rename(scratch, other))
            return [space, speed, rename, _attempt("lock", lambda: check_lock(scratch, other))]
    except OSError as error:
        return [space, _failure("disk speed", error)]


def check_space(place: Path) -> Check:
    free = shutil.disk_usage(place).free
    verdict = FAILED if free < 2 * PROBE_BYTES else ADVICE if free < LOW_SPACE_BYTES else OK
    remedy = f"prepared data takes 2-4 bytes a token: free space or {_ELSEWHERE}" if verdict != OK else ""
    return Check("disk space", f"{free / 1e9:.1f} GB free in {place}", verdict, remedy, {"free_bytes": free})


def check_speed(scratch: Path) -> Check:
    """64 MiB written and synced, then read back with the page cache told to forget them."""
    file = scratch / "speed"
    block = os.urandom(2**22)  # random, so that a compressing file system has to write it
    start = time.perf_counter()
    with open(file, "wb", buffering=0) as out:
        for _ in range(PROBE_BYTES // len(block)):
            out.write(block)
        os.fsync(out.fileno())
        write = PROBE_BYTES / (time.perf_counter() - start) / 1e6
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(out.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    buffer = bytearray(2**22)
    start = time.perf_counter()
    with open(file, "rb", buffering=0) as source:
        while source.readinto(buffer):
            pass
    read = PROBE_BYTES / (time.perf_counter() - start) / 1e6
    file.unlink()
    remedy = f"a local SSD writes ten times as fast: {_ELSEWHERE}" if write < SLOW_WRITE_MB_PER_SECOND else ""
    value = f"write and sync {write:.0f} MB/s, read {read:.0f} MB/s"
    return judged("disk speed", value, remedy, write_mb_per_second=round(write, 1), read_mb_per_second=round(read, 1))


def check_lock(scratch: Path, other: SecondProcess) -> Check:
    """A lock held here keeps another process out, and a holder that is killed leaves it free. `other` does not
    survive.
    """
    fails = partial(failed, "lock")
    try:
        from filelock import FileLock, Timeout
    except ImportError:
        return fails("the library `filelock` is not installed", BOOTSTRAP)
    path = scratch / "probe.lock"
    remedy = f"two launches would prepare the same data at once: {_ELSEWHERE}, or prepare once before launching"
    with FileLock(path, timeout=0):
        if other.ask("take", path):
            return fails("a second process took a lock that was held", remedy)
    if not other.ask("take", path):
        return fails("a released lock could not be taken by a second process", remedy)
    if _take(str(path), []):
        return fails("a lock that a second process held could be taken", remedy)
    other.kill()
    start = time.perf_counter()
    try:
        with FileLock(path, timeout=10):
            seconds = time.perf_counter() - start
    except Timeout:
        remedy = f"a killed run would block the next one: {_ELSEWHERE}"
        return fails("still held 10 s after its holder was killed", remedy)
    value = f"keeps a second process out; free {seconds:.2f} s after its holder was killed"
    return judged("lock", value, free_after_seconds=round(seconds, 3))


def check_rename(scratch: Path, other: SecondProcess) -> Check:
    """Publishing needs three things: no rename over a directory with content, links, and names that others see at
    once.
    """
    for name in ("staged", "published"):
        (scratch / name).mkdir()
        (scratch / name / "data").write_bytes(b"x")
    if _works(os.rename, scratch / "staged", scratch / "published"):
        remedy = f"two preparations could overwrite each other's result: {_ELSEWHERE}"
        return failed("rename", "a directory with content was replaced by a rename", remedy)
    late = scratch / "late"
    other.ask("see", late / "data")  # a file system may remember that the name was absent
    os.rename(scratch / "staged", late)
    start = time.perf_counter()
    while not (seen := other.ask("see", late / "data")) and time.perf_counter() - start < VISIBLE_SECONDS:
        time.sleep(0.02)
    lag = time.perf_counter() - start
    if not seen:
        return failed("rename", f"a second process does not see a renamed directory after {lag:.0f} s", _ELSEWHERE)
    links = _works(os.link, late / "data", scratch / "link") and (late / "data").stat().st_nlink == 2
    value = (
        f"keeps published directories, seen by a second process after {lag * 1000:.0f} ms, links "
        f"{'work' if links else 'do not work'}"
    )
    remedy = "" if links else f"published data is copied instead, twice the space: {_ELSEWHERE}"
    return judged("rename", value, remedy, links=links, seen_after_seconds=round(lag, 3))


@dataclass
class SecondProcess:
    """Another process that answers questions about paths: "take" a lock, "see" a path."""

    _process: BaseProcess
    _connection: Connection

    def ask(self, verb: str, path: Path) -> bool:
        """Raises TimeoutError if no answer comes: a file system that hangs has to end the probe, not to hang it too."""
        self._connection.send((verb, str(path)))
        if not self._connection.poll(ANSWER_SECONDS):
            raise TimeoutError(f"no answer to '{verb} {path.name}' within {ANSWER_SECONDS:.0f} s")
        return bool(self._connection.recv())

    def kill(self) -> None:
        self._process.kill()
        self._process.join()


@contextlib.contextmanager
def second_process() -> Iterator[SecondProcess]:
    context = multiprocessing.get_context("spawn")  # a fork would inherit the very locks it is to be kept out of
    connection, remote = context.Pipe()
    process = context.Process(target=_answer, args=(remote,), daemon=True)
    process.start()
    remote.close()
    other = SecondProcess(process, connection)
    try:
        yield other
    finally:
        other.kill()
        connection.close()


def _answer(connection: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends this process
    held: list[Any] = []
    with contextlib.suppress(EOFError):
        while True:
            verb, path = connection.recv()
            connection.send(_take(path, held) if verb == "take" else _sees(path))


def _take(path: str, held: list[Any]) -> bool:
    from filelock import FileLock, Timeout

    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        return False
    held.append(lock)  # a lock that is collected is released
    return True


def _sees(path: str) -> bool:
    """By opening: a network file system asks its server on open, not on stat."""
    try:
        with open(path, "rb") as file:
            return file.read() == b"x"
    except FileNotFoundError:
        return False


def _attempt(name: str, probe: Callable[[], Check]) -> Check:
    try:
        return probe()
    except (OSError, EOFError) as error:
        return _failure(name, error)


def _failure(name: str, error: OSError | EOFError) -> Check:
    reason = getattr(error, "strerror", None) or str(error) or "the second process ended"
    return failed(name, f"the probe ended with {type(error).__name__}: {reason}", _ELSEWHERE)


def _works(call: Callable[[Path, Path], None], source: Path, target: Path) -> bool:
    try:
        call(source, target)
    except OSError:
        return False
    return True
