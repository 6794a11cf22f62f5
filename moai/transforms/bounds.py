"""Bounds for programs that come with the data's tokenizer: a chat template may loop for hours or ask for a terabyte.

    with more_memory(2 << 30), processor_time(5.0):
        fill_in()                  # MemoryError, OutOfTime

Both hold in a process's main thread, where moai's executors work; in another thread they do nothing.
"""

from __future__ import annotations

import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class OutOfTime(BaseException):
    """No Exception: what a template's compiler tries, it takes for impossible when it raises one, and does it later."""


@contextmanager
def processor_time(seconds: float) -> Iterator[None]:
    """Raises OutOfTime after so much of this process's own time: a stopped machine or a busy one costs none."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGVTALRM, _stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@contextmanager
def more_memory(most_bytes: int) -> Iterator[None]:
    """MemoryError for who asks for more than this in addition, before the kernel ends the process for it."""
    used = _address_space()
    if not used or threading.current_thread() is not threading.main_thread():
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = used + most_bytes
    resource.setrlimit(resource.RLIMIT_AS, (most if soft == resource.RLIM_INFINITY else min(soft, most), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _stop(*_: Any) -> None:
    raise OutOfTime


def _address_space() -> int:
    """Bytes of this process's address space; 0 where nothing tells."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        return 0
