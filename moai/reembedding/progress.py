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
    _samples: deque[Sample] = field(
        default_factory=lambda: deque([Sample(datetime.now(UTC), 0, 0, 0)], maxlen=_SAMPLES)
    )
    _said_at: float = field(default_factory=time.monotonic)
    _said_share: float = 0.0
    _has_bar: bool = False

    def say(self) -> None:
        done, encoded = self.run.looked_at(), self.run.live()["chunks_encoded"]
        self._samples.append(Sample(datetime.now(UTC), done["documents"], encoded, done["characters"]))
        share, now = min(1.0, done["characters"] / max(1, self.run.characters_total)), time.monotonic()
        if sys.stderr.isatty():
            if now - self._said_at >= _BAR_SECONDS or share == 1:
                bar = "#" * int(share * _BAR_WIDTH)
                sys.stderr.write(f"\r[{bar:{_BAR_WIDTH}}] {self._line(share)}\033[K")
                sys.stderr.flush()
                self._said_at, self._has_bar = now, True
        elif now - self._said_at >= _LINE_SECONDS or share - self._said_share >= _LINE_SHARE:
            logger.info("Re-embedding: %s", self._line(share))
            self._said_at, self._said_share = now, share

    def end(self) -> None:
        """What is said next, a summary or an error, begins on a line of its own."""
        if self._has_bar:
            sys.stderr.write("\n")

    def _line(self, share: float) -> str:
        newest, total = self._samples[-1], self.run.characters_total
        line = (
            f"{share:.0%} of the characters, {newest.documents:,} of {self.run.documents_total:,} documents, "
            f"{newest.chunks:,} chunks encoded, {self.run.counts['chunks']:,} committed"
        )
        rate = pace(self._samples)
        if rate and rate.characters:
            line += f", {rate.chunks:,.1f} chunks/s"
            line += f", about {clock((total - newest.characters) / rate.characters)} left" if share < 1 else ""
        return line
