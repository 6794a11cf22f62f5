"""Wall-clock seconds, processor seconds and peak memory of a command and of everything it starts. Linux only.

The processor seconds are the kernel's own sums, not samples: this process declares itself the one that orphans fall to,
so a forkserver that outlives its parent, and through it every worker it has waited for, is counted here. Memory is the
proportional set size summed over the tree, sampled at most 20 times a second, and less often where reading it (the
kernel walks every page) would take more than a fiftieth of one core.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import select
import subprocess
import tempfile
import time
from dataclasses import dataclass

import psutil

PR_SET_CHILD_SUBREAPER = 36
GRACE_SECONDS = 10.0
"""What outlives the command (a forkserver, a resource tracker) has this long to end by itself."""


class CommandFailed(Exception):
    """The command ended with an error, or did not end in time; the message holds the end of what it said."""


@dataclass(frozen=True)
class Measured:
    seconds: float
    """Until the command itself ended; its orphans' last moments are not in it."""
    cpu_seconds: float
    """User and system time of the command and all its descendants."""
    peak_bytes: int
    peak_anonymous_bytes: int
    """Without the pages of mapped files, which the kernel takes back when memory is short."""
    output: str


def measure(
    command: list[str], *, environment: dict[str, str] | None = None, limit_seconds: float = float("inf")
) -> Measured:
    """Run `command` alone: the caller must have no other child processes. Raises CommandFailed."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        started = time.perf_counter()
        running = subprocess.Popen(
            command,
            stdout=out,
            stderr=err,
            env={**os.environ, "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", **(environment or {})},
        )
        try:
            peak, anonymous = _watch(running.pid, started + limit_seconds)
            seconds = time.perf_counter() - started
            failed = running.wait() and f"failed with {running.returncode}"
        except TimeoutError:
            failed = f"not done after {limit_seconds:.0f} s"
        finally:
            _end_tree(GRACE_SECONDS if running.returncode is not None else 0.0)
        if failed:
            err.seek(max(0, err.seek(0, os.SEEK_END) - 4000))
            raise CommandFailed(f"{failed}: {' '.join(command)}\n{err.read().decode(errors='replace')}")
        out.seek(0)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return Measured(seconds, cpu_seconds, peak, anonymous, out.read().decode(errors="replace"))


def _watch(pid: int, deadline: float) -> tuple[int, int]:
    """The two peaks, in bytes, once `pid` has ended. Waking on the descriptor makes the end exact, however rarely
    memory is read.
    """
    ended, peak, anonymous, pause = os.pidfd_open(pid), 0, 0, 0.0
    try:
        while not select.select([ended], [], [], pause)[0]:
            at = time.perf_counter()
            if at > deadline:
                raise TimeoutError
            now = _tree_bytes()
            peak, anonymous = max(peak, now[0]), max(anonymous, now[1])
            pause = max(0.05, 49 * (time.perf_counter() - at))
    finally:
        os.close(ended)
    return peak, anonymous


def _tree_bytes() -> tuple[int, int]:
    """Proportional set size of all descendants, and the anonymous part of it."""
    total = {b"Pss": 0, b"Pss_Anon": 0}
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(OSError), open(f"/proc/{process.pid}/smaps_rollup", "rb") as lines:
            for name, _, size in (line.partition(b":") for line in lines):
                if name in total:
                    total[name] += int(size.split()[0]) * 1024
    return total[b"Pss"], total[b"Pss_Anon"]


def _end_tree(grace_seconds: float) -> None:
    """Wait for every descendant, so that its processor time is counted; end those that stay."""
    deadline = time.monotonic() + grace_seconds
    with contextlib.suppress(ChildProcessError):
        while True:
            if os.waitpid(-1, os.WNOHANG)[0]:
                continue
            if time.monotonic() > deadline:
                for process in psutil.Process().children(recursive=True):
                    with contextlib.suppress(psutil.Error):
                        process.kill()
            time.sleep(0.01)
