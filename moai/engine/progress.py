"""How far a run is: one object that the bar or the log, the status file and the waiting ranks read from.

Rates are over the last minute.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any, ClassVar

from moai.core.progress import Reporter, clock
from moai.engine.run import Done
from moai.engine.stage import Results

logger = logging.getLogger(__name__)

_WINDOW_SECONDS = 60.0


@dataclass
class Progress:
    """Counts of one run. `total_bytes` is nominal: what the sources say there is to read, compressed size for
    compressed files.
    """

    total_bytes: int
    label: str = "Rank 0"
    doing: str = "Tokenizing"
    bytes: int = 0
    shards: int = 0
    reused: int = 0
    documents: int = 0
    started: float = field(default_factory=time.monotonic)
    _recent: deque[tuple[float, int]] = field(default_factory=deque)
    _reporter: Reporter = field(init=False)
    draws: ClassVar[bool] = True
    """In a terminal as a bar."""

    def __post_init__(self) -> None:
        self._reporter = Reporter(self._log, draws=self.draws)

    def on_documents(self, number: int) -> None:
        self.documents += number
        self._say()

    def on_shard(self, done: Done) -> None:
        self.bytes += done.shard.nominal_bytes
        self.shards += 1
        self.reused += done.reused
        self.on_documents(done.receipt.counts.get("read", 0) if done.reused else 0)

    def close(self, results: Results) -> None:
        """The stage is over."""

    def end(self) -> None:
        """The last line, with the rate of the whole run."""
        self._reporter.end()
        logger.info(
            "[%s] %s: %s",
            self.label,
            self.doing,
            self.line(self.documents / max(time.monotonic() - self.started, 1e-6)),
        )

    @property
    def share(self) -> float:
        return min(1.0, self.bytes / self.total_bytes) if self.total_bytes else 0.0

    def documents_per_second(self) -> float:
        """Over the last minute."""
        then, documents = self._recent[0] if self._recent else (self.started, 0)
        return (self.documents - documents) / max(time.monotonic() - then, 1e-6)

    def eta_seconds(self) -> float | None:
        """From the whole run so far: shards finish in bursts, so a minute's rate would jump."""
        seconds = time.monotonic() - self.started
        return seconds * (1 - self.share) / self.share if self.share > 0 else None

    def snapshot(self) -> dict[str, Any]:
        """For the status file."""
        per_second = self.documents_per_second()
        return {
            "share": round(self.share, 4),
            "shards": self.shards,
            "reused": self.reused,
            "documents": self.documents,
            "bytes": self.bytes,
            "total_bytes": self.total_bytes,
            "documents_per_second": round(per_second, 1),
            "eta_seconds": self.eta_seconds(),
            "line": f"held out: {self.line(per_second)}" if "held out" in self.label else self.line(per_second),
        }

    def line(self, documents_per_second: float) -> str:
        eta = self.eta_seconds()
        reused = f" ({self.reused} reused)" if self.reused else ""
        left = f", about {clock(eta)} left" if eta is not None and self.share < 1 else ""
        return (
            f"{self.share:.0%}, {self.shards} shards{reused}, {self.documents:,} documents, "
            f"{documents_per_second:,.0f} examples/s{left}"
        )

    def _say(self) -> None:
        now = time.monotonic()
        if not self._recent or now - self._recent[-1][0] >= 1.0:
            self._recent.append((now, self.documents))
            while now - self._recent[0][0] > _WINDOW_SECONDS:
                self._recent.popleft()
        self._reporter.tell(self._line, self.share)

    def _line(self) -> str:
        return self.line(self.documents_per_second())

    def _log(self, line: str) -> None:
        logger.info("[%s] %s: %s", self.label, self.doing, line)
