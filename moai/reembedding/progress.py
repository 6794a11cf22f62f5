"""How far a run is, for the person who waits: a bar on a terminal, else a line every 15 s or 5 %. What monitors read is
in the database.
"""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from datetime import UTC, datetime

from moai.reembedding.runs import Pace, Run, Sample, pace

logger = logging.getLogger(__name__)

_LINE_SECONDS, _LINE_SHARE = 15.0, 0.05
_BAR_SECONDS = 0.5
_SAMPLES = 600
_BAR_WIDTH = 30


@dataclass
class Progress:
    """`total` documents; what is done stands in `run`."""

    total: int
    run: Run
    _samples: deque[Sample] = field(default_factory=lambda: deque(maxlen=_SAMPLES))
    _said_at: float = field(default_factory=time.monotonic)
    _said_share: float = 0.0
    _has_bar: bool = False

    def __post_init__(self) -> None:
        self._samples.append(Sample(datetime.now(UTC), 0, 0))

    def say(self) -> None:
        live = {**self.run.counts, **self.run.live()}
        done = live["documents_seen"] + self.run.waiting
        self._samples.append(Sample(datetime.now(UTC), done, live["chunks_encoded"]))
        share, now = min(1.0, done / self.total) if self.total else 1.0, time.monotonic()
        if sys.stderr.isatty():
            if now - self._said_at >= _BAR_SECONDS or share == 1:
                sys.stderr.write(
                    f"\r[{'#' * int(share * _BAR_WIDTH):{_BAR_WIDTH}}] {self._line(done, live['chunks_encoded'])}\033[K"
                )
                sys.stderr.flush()
                self._said_at, self._has_bar = now, True
        elif now - self._said_at >= _LINE_SECONDS or share - self._said_share >= _LINE_SHARE:
            logger.info("Re-embedding: %s", self._line(done, live["chunks_encoded"]))
            self._said_at, self._said_share = now, share

    def end(self) -> None:
        """What is said next, a summary or an error, begins on a line of its own."""
        if self._has_bar:
            sys.stderr.write("\n")

    def _line(self, done: int, chunks: int) -> str:
        share = done / self.total if self.total else 1.0
        return (
            f"{share:.0%}, {done:,} of {self.total:,} documents, {chunks:,} "
            f"chunks{_rates(pace(list(self._samples)), self.total - done)}"
        )


def _rates(now: Pace | None, left: int) -> str:
    if now is None or not now.documents:
        return ""
    return f", {now.chunks:,.1f} chunks/s" + (f", about {clock(left / now.documents)} left" if left > 0 else "")


def clock(seconds: float) -> str:
    """`h:mm:ss`, as the other recipes print it."""
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
