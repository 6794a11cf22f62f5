"""How far a run is, for the person who waits: a bar on a terminal, else a line every 15 s or 5 %."""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from datetime import UTC, datetime

from moai.reembedding.runs import Run, Sample, clock, pace

logger = logging.getLogger(__name__)

_LINE_SECONDS, _LINE_SHARE = 15.0, 0.05
_BAR_SECONDS = 0.5
_SAMPLES = 600
_BAR_WIDTH = 30


@dataclass
class Progress:
    run: Run
    _samples: deque[Sample] = field(default_factory=lambda: deque([Sample(datetime.now(UTC), 0, 0)], maxlen=_SAMPLES))
    _said_at: float = field(default_factory=time.monotonic)
    _said_share: float = 0.0
    _has_bar: bool = False

    def say(self) -> None:
        live = {**self.run.counts, **self.run.live()}
        done, total = live["documents_seen"] + self.run.waiting, self.run.documents_total
        self._samples.append(Sample(datetime.now(UTC), done, live["chunks_encoded"]))
        share, now = min(1.0, done / total), time.monotonic()
        if sys.stderr.isatty():
            if now - self._said_at >= _BAR_SECONDS or share == 1:
                bar = "#" * int(share * _BAR_WIDTH)
                sys.stderr.write(f"\r[{bar:{_BAR_WIDTH}}] {self._line(done, total)}\033[K")
                sys.stderr.flush()
                self._said_at, self._has_bar = now, True
        elif now - self._said_at >= _LINE_SECONDS or share - self._said_share >= _LINE_SHARE:
            logger.info("Re-embedding: %s", self._line(done, total))
            self._said_at, self._said_share = now, share

    def end(self) -> None:
        """What is said next, a summary or an error, begins on a line of its own."""
        if self._has_bar:
            sys.stderr.write("\n")

    def _line(self, done: int, total: int) -> str:
        line = f"{done / total:.0%}, {done:,} of {total:,} documents, {self._samples[-1].chunks:,} chunks"
        rate = pace(self._samples)
        if rate and rate.documents:
            line += f", {rate.chunks:,.1f} chunks/s"
            line += f", about {clock((total - done) / rate.documents)} left" if total > done else ""
        return line
