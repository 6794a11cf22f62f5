"""Progress lines in the words people grep for (배치, 통과, 누적, 속도), and the same as JSON lines.

    tail -f LOG      grep "배치" LOG | tail -1      grep "통과" LOG | tail -10      tail -f progress.jsonl

A 배치 is a shard. Rates are over the last minute, the time left is by bytes; memory is what a process has beside what
it shares.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import psutil

from moai.engine.progress import Progress
from moai.engine.run import Done
from moai.engine.stage import Results

logger = logging.getLogger(__name__)

_MEMORY_SECONDS = 10.0
"""Between two readings of the memory: the kernel walks every page, some 15 ms for each process that holds Kiwi, on the
workers' processors.
"""


@dataclass(kw_only=True)
class StageProgress(Progress):
    """One of the two pipelines. `batches` is about how many shards there are: of a compressed file nobody knows before
    it was read.
    """

    draws: ClassVar[bool] = False  # people grep the lines
    name: str
    batches: int
    record: Path
    counts: Counter[str] = field(default_factory=Counter)
    last_passed: int = 0
    memory: tuple[int, int] = (0, 0)
    """(this process, all processes below it), in bytes: proportional shares where the kernel tells, so that what
    workers share counts once.
    """
    memory_read: float = float("-inf")

    def on_shard(self, done: Done) -> None:
        counts = done.receipt.counts
        self.counts.update(counts)
        self.last_passed = counts.get("passed", counts.get("samples", 0))
        super().on_shard(done)
        if "samples" in counts:
            logger.info(" → 배치 %d 완료: %s개", self.shards, f"{counts['samples']:,}")
        if done.reused:
            self.on_documents(counts.get("samples", 0))

    @property
    def passed(self) -> int:
        return self.counts["passed"] + self.counts["samples"]

    def close(self, results: Results) -> None:
        """The last line of the stage, with its average."""
        rate = self.documents / max(time.monotonic() - self.started, 1e-6)
        self._log(f" → {self.passed:,}개 통과 | 누적: {self.passed:,}개 | 평균 속도: {rate:,.0f} docs/s")

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
            "batches": max(self.batches, self.shards),
            "reused": self.reused,
            "documents": self.documents,
            "share": round(self.share, 4),
            "passed_in_batch": self.last_passed,
            "passed": self.passed,
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
        eta = self.eta_seconds()
        done = self.counts["read"] + self.counts["samples"]  # of finished shards, as the share is
        of = f" / {max(self.documents, round(done / self.share)):,} ({self.share:.1%})" if self.share else ""
        left = f" | 남은 시간: {int(eta) // 60}:{int(eta) % 60:02d}" if eta is not None else ""
        return (
            f"배치 {self.shards}/{max(self.batches, self.shards)}: 처리 중: {self.documents:,}{of} | 통과: "
            f"{self.last_passed:,} | 누적: {self.passed:,}개 | 속도: {self.documents_per_second():,.0f} docs/s | "
            f"오류: {self.counts['quarantined']:,}{left} | 메모리: {parent / 1e9:.2f} GB + 워커 {workers / 1e9:.2f} GB"
        )


def _memory(process: psutil.Process) -> int:
    with contextlib.suppress(psutil.Error, OSError):
        with contextlib.suppress(AttributeError):
            return int(process.memory_full_info().pss)
        return int(process.memory_info().rss)
    return 0
