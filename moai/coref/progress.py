"""Progress lines in the words people grep for (배치, 통과, 누적, 속도), or in English, and as JSON lines.

    tail -f LOG      grep "배치" LOG | tail -1      grep "통과" LOG | tail -10      tail -f progress.jsonl

A 배치 is a shard. 통과 and 후보 count finished shards: documents that passed, and candidates in them. How many
documents there are is told from those of finished shards and their share of the bytes; the percentage goes by
documents, and the time left by those that this run worked on. Rates are over the last minute; memory is what a process
has beside what it shares.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import psutil

from moai.coref.wording import said
from moai.engine.progress import Progress
from moai.engine.run import Done
from moai.engine.stage import Results

logger = logging.getLogger(__name__)

_MEMORY_SECONDS = 10.0
"""Between two readings of the memory: the kernel walks every page, some 15 ms for each process that holds Kiwi, on the
workers' processors.
"""


_FIRST = 1000


@dataclass(kw_only=True)
class StageProgress(Progress):
    """One of the two stages. `batches` is about how many shards there are."""

    draws: ClassVar[bool] = False  # people grep the lines
    name: str
    batches: int
    record: Path
    lang: str
    losses: Callable[[Counter[str]], list[str]] | None = None
    """What is said once about the first _FIRST documents."""
    most: int | None = None
    """Documents at most, of all inputs."""
    counts: Counter[str] = field(default_factory=Counter)
    finished: int = 0
    """Documents (or samples) of finished shards."""
    found_before: int = 0
    """Those of shards that stood there already."""
    memory: tuple[int, int] = (0, 0)
    """(this process, all processes below it), in bytes: proportional shares where the kernel tells, so that what
    workers share counts once.
    """
    memory_read: float = float("-inf")

    def on_shard(self, done: Done) -> None:
        counts = done.receipt.counts
        number = counts.get("read", counts.get("samples", 0))
        self.counts.update(counts)
        self.finished += number
        self.found_before += number if done.reused else 0
        super().on_shard(done)
        if "samples" in counts:
            logger.info(said(self.lang, "written", batch=self.shards, number=counts["samples"]))
        if done.reused:
            self.on_documents(counts.get("samples", 0))
        if self.losses and self.finished >= _FIRST:
            logger.info(said(self.lang, "losses", number=self.finished))
            for line in self.losses(self.counts):
                logger.info("  %s", line)
            self.losses = None

    @property
    def passed(self) -> int:
        return self.counts["passed"] + self.counts["samples"]

    @property
    def found(self) -> int:
        """Candidates, or samples."""
        return self.counts["candidates"] + self.counts["samples"]

    @property
    def total(self) -> int | None:
        """About how many documents there are; None before the first shard."""
        if not self.share or not self.finished:
            return None
        told = round(self.finished / self.share)
        return max(self.documents, told if self.most is None else min(told, self.most))

    def eta_seconds(self) -> float | None:
        worked = self.documents - self.found_before
        if self.total is None or worked <= 0:
            return None
        return (time.monotonic() - self.started) * (self.total - self.documents) / worked

    def close(self, results: Results) -> None:
        """The last line of the stage, with its average."""
        speed = (self.documents - self.found_before) / max(time.monotonic() - self.started, 1e-6)
        self._log(said(self.lang, "stage end", passed=self.passed, speed=speed))

    def _log(self, line: str = "") -> None:
        now, here = time.monotonic(), psutil.Process()
        if now - self.memory_read >= _MEMORY_SECONDS:
            self.memory_read = now
            self.memory = _memory(here), sum(map(_memory, here.children(recursive=True)))
        logger.info("%s", line or self._line())
        found = {
            "time": time.time(),
            "stage": self.name,
            "batch": self.shards,
            "batches": self._batches(),
            "reused": self.reused,
            "documents": self.documents,
            "documents_in_all": self.total,
            "passed": self.passed,
            "found": self.found,
            "documents_per_second": round(self.documents_per_second(), 1),
            "eta_seconds": self.eta_seconds(),
            "parent_bytes": self.memory[0],
            "workers_bytes": self.memory[1],
            "counts": dict(sorted(self.counts.items())),
        }
        with open(self.record, "a", encoding="utf-8") as file:
            file.write(json.dumps(found, ensure_ascii=False) + "\n")

    def _line(self) -> str:
        parent, workers = self.memory
        eta, total = self.eta_seconds(), self.total
        clock = f"{int(eta) // 60}:{int(eta) % 60:02d}" if eta is not None else ""
        return said(
            self.lang,
            "batch",
            batch=self.shards,
            batches=self._batches(),
            documents=self.documents,
            of=f" / {total:,} ({self.documents / max(1, total):.1%})" if total is not None else "",
            passed=self.passed,
            found=self.found,
            speed=self.documents_per_second(),
            errors=self.counts["quarantined"],
            left=said(self.lang, "left", clock=clock) if clock else "",
            parent=parent / 1e9,
            workers=workers / 1e9,
        )

    def _batches(self) -> int:
        """Of a compressed file nobody knows before it was read: then from the share of the bytes, once there is one."""
        return max(self.shards, round(self.shards / self.share)) if self.share else max(self.batches, self.shards)


def _memory(process: psutil.Process) -> int:
    with contextlib.suppress(psutil.Error, OSError):
        with contextlib.suppress(AttributeError):
            return int(process.memory_full_info().pss)
        return int(process.memory_info().rss)
    return 0
