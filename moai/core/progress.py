"""How far something is that a person waits for: a bar in a terminal, elsewhere a line every 15 s or 5 %.

with Waiting("Reading", total=num_bytes, unit="MB", scale=1e6) as waiting:
    waiting.add(len(block))

Reading: 34%, 40 of 117 MB, 1.2 MB/s, about 1:04 left
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from moai.core.distributed import ranks

logger = logging.getLogger(__name__)

_FIRST_SECONDS = 2.0
_LINE_SECONDS, _LINE_SHARE = 15.0, 0.05
_BAR_SECONDS, _BAR_WIDTH = 0.5, 30


class Reporter:
    """Says a line when it is due: over the last one in a terminal, unless other ranks write there too."""

    def __init__(self, say: Callable[[str], None], *, draws: bool = True) -> None:
        self._say = say
        self._has_bar = draws and sys.stderr.isatty() and ranks(os.environ).world_size == 1
        self._is_drawn = False
        self._said_at, self._said_share = time.monotonic(), 0.0
        if self._has_bar:
            for handler in logging.getLogger().handlers:
                handler.addFilter(self._clear)

    def tell(self, line: Callable[[], str], share: float | None, *, is_due: bool = False) -> None:
        """`share` of the whole, where that is known. `is_due` however recently something was said."""
        now = time.monotonic()
        if self._has_bar:
            if is_due or now - self._said_at >= _BAR_SECONDS:
                self._said_at, self._is_drawn = now, True
                done = "" if share is None else f"[{'#' * int(min(1.0, share) * _BAR_WIDTH):{_BAR_WIDTH}}] "
                print(f"\r{done}{line()}\033[K", end="", file=sys.stderr, flush=True)
            return
        seconds, more = now - self._said_at, (share or 0.0) - self._said_share
        if is_due or seconds >= _LINE_SECONDS or (seconds >= 1 and more >= _LINE_SHARE):
            self._said_at, self._said_share = now, share or 0.0
            self._say(line())

    def end(self) -> None:
        """What is printed next begins on an empty line."""
        self._clear()
        for handler in logging.getLogger().handlers:
            handler.removeFilter(self._clear)

    def _clear(self, _: object = None) -> bool:
        if self._is_drawn:
            self._is_drawn = False
            print("\r\033[K", end="", file=sys.stderr, flush=True)
        return True


class Waiting:
    """Counts what is done of `total` (0 where nobody knows it), and says so after two seconds and then when due.

    It speaks too while nothing is counted: from a thread of its own, which touches nothing but the counters.
    """

    def __init__(
        self, what: str, *, total: int = 0, unit: str = "", scale: float = 1, say: Callable[[str], None] = logger.info
    ) -> None:
        self._what, self._total, self._unit, self._scale = what, total, unit, scale
        self.done, self._began = 0, time.monotonic()
        self._reporter = Reporter(say)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        self._reporter.end()

    def add(self, number: int = 1) -> None:
        self.done += number

    def _watch(self) -> None:
        is_first = True
        while not self._ended.wait(_FIRST_SECONDS if is_first else _BAR_SECONDS):
            self._reporter.tell(self._line, self.done / self._total if self._total else None, is_due=is_first)
            is_first = False

    def _line(self) -> str:
        seconds = time.monotonic() - self._began
        if not self.done:
            return f"{self._what}: {clock(seconds)} so far"
        rate = self.done / seconds
        unit = f" {self._unit}" if self._unit else ""
        parts = [f"{self._amount(self.done)}{unit}", f"{self._amount(rate)}{unit}/s"]
        if self._total:
            share = min(1.0, self.done / self._total)
            parts[0] = f"{share:.0%}, {self._amount(self.done)} of {self._amount(self._total)}{unit}"
            parts.append(f"about {clock(max(0, self._total - self.done) / rate)} left")
        return f"{self._what}: {', '.join(parts)}"

    def _amount(self, number: float) -> str:
        value = number / self._scale
        return f"{value:,.0f}" if value >= 10 or (self._scale == 1 and value == int(value)) else f"{value:,.1f}"


def clock(seconds: float) -> str:
    """1:04, or 2:03:04."""
    whole = int(seconds)
    minutes = f"{whole // 60 % 60:02d}:{whole % 60:02d}"
    return f"{whole // 3600}:{minutes}" if whole >= 3600 else f"{whole // 60}:{whole % 60:02d}"
