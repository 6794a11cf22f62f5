"""Whether memory runs short while a run goes on: control groups of this process (v1 and v2), the host, and the kernel's
own word (PSI).

moai.core.resources plans with what is free at the start; neighbours, long documents and a driver that grows come later.
A reading costs some 0.3 ms and is taken once a second at most, so a run does not feel it.

    room = Room(workers=8)
    while room.for_one_more(busy): ...         # before each order
"""

from __future__ import annotations

import logging
import re
import time
from dataclasses import dataclass, replace
from pathlib import Path

from moai.core import resources
from moai.engine.processes.retries import Death

logger = logging.getLogger(__name__)

_SHORT_SHARE = 0.10
_SHORT_BYTES = 4 * resources.GB
"""Memory is short below a tenth of what there is to have, or below this: of a terabyte a tenth is plenty."""
_WAITING_PERCENT = 20.0
"""Some process of the group waited for memory in so much of the last 10 s: more is lost by one more worker than it
brings.
"""
_CALM = 1.5
"""Short memory is over when there is this much more, so that work does not stop and go at the limit."""
_OTHERS_SEND = ("SIGKILL", "SIGTERM", "SIGHUP", "SIGQUIT")
_READ_SECONDS = 1.0
_RETIRE_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True)
class Reading:
    free_bytes: int
    """What may still be taken before somebody is killed, where the least is left. Page cache counts: it goes as soon as
    memory is asked for.
    """
    of_bytes: int
    """What there is to have there."""
    limit: str
    """Which limit that is: MemAvailable, cgroup v1, cgroup v2."""
    waiting_percent: float
    """PSI `some avg10` of the innermost group that has one, else of the host; 0 where the kernel does not say."""

    def is_short(self, calm: float = 1.0) -> bool:
        least = min(self.of_bytes * _SHORT_SHARE, _SHORT_BYTES)
        return self.free_bytes < least * calm or self.waiting_percent > _WAITING_PERCENT / calm

    def __str__(self) -> str:
        waiting = (
            f", processes waited for it {self.waiting_percent:.0f} % of the last 10 s" if self.waiting_percent else ""
        )
        return (
            f"{self.free_bytes / resources.GB:.2f} of {self.of_bytes / resources.GB:.2f} GB left "
            f"({self.limit}){waiting}"
        )


def read(root: Path = Path("/")) -> Reading:
    """`root` is where /proc and /sys are found."""
    total, available, reason = resources.host_memory(root)
    limits, pressures = [(available, total, reason)], []
    for version, directory in resources.cgroups(root, "memory"):
        pressures.append(directory / "memory.pressure")
        limit = min(
            resources.bytes_in(directory / name) for name in ("memory.max", "memory.high", "memory.limit_in_bytes")
        )
        if limit < resources.UNLIMITED:
            limits.append((_free(directory, limit), limit, version))
    free, of, limit_of = min(limits, key=lambda one: one[0] / max(1, one[1]))
    return Reading(
        free_bytes=free,
        of_bytes=of,
        limit=limit_of,
        waiting_percent=_waiting([*pressures, root / "proc/pressure/memory"]),
    )


def oom_kills(root: Path = Path("/")) -> int:
    """How many processes of this group, or of the host, the kernel has killed for memory so far."""
    groups = [
        directory / name
        for _, directory in resources.cgroups(root, "memory")
        for name in ("memory.events", "memory.oom_control")
    ]
    for file in (*groups, root / "proc/vmstat"):
        if match := re.search(r"^oom_kill ([0-9]+)$", resources.read_text(file), flags=re.MULTILINE):
            return int(match[1])
    return 0


@dataclass
class Kills:
    """Whom the kernel killed for memory since it was last asked, so that a death can be told from one by somebody."""

    root: Path = Path("/")

    def __post_init__(self) -> None:
        self._number = oom_kills(self.root)

    def explained(self, death: Death) -> Death:
        """With whose doing it was, where a signal leaves that open."""
        before, self._number = self._number, oom_kills(self.root)
        if death.detail not in _OTHERS_SEND:
            return death
        if death.detail == "SIGKILL" and self._number > before:
            return replace(death, how=f"{death.how} (by the kernel, for memory)")
        return replace(death, how=f"{death.how} (from outside)", outside=True)


@dataclass
class Room:
    """How many workers may be busy at once: fewer while memory is short, and for good where it stays so."""

    workers: int
    root: Path = Path("/")
    _short_since: float | None = None
    _read_at: float = float("-inf")
    _said: bool = False

    def for_one_more(self, busy: int) -> bool:
        """One worker goes on whatever memory says: what waits for the others would wait for ever."""
        if busy == 0 or busy >= self.workers:
            return busy == 0
        now = time.monotonic()
        if now - self._read_at >= _READ_SECONDS:
            self._read_at = now
            self.heed(read(self.root), now)
        return self._short_since is None

    def heed(self, reading: Reading, now: float) -> None:
        """Judge a reading taken at `now`, in seconds of a clock that never goes back."""
        if not reading.is_short(1.0 if self._short_since is None else _CALM):
            self._short_since = None
        elif self._short_since is None:
            self._short_since = now
            if not self._said:
                logger.warning(
                    "Memory is short: %s. Shards in work are finished, and one at a time goes on until there is more",
                    reading,
                )
            self._said = True
        elif now - self._short_since >= _RETIRE_SECONDS and self.workers > 1:
            self._short_since = now
            self.retire(f"memory has been short for {_RETIRE_SECONDS:.0f} s: {reading}")

    def retire(self, why: str) -> None:
        """One worker fewer for the rest of the run."""
        if self.workers > 1:
            self.workers -= 1
            logger.warning("At most %d at work from now on: %s", self.workers, why)


def _free(directory: Path, limit: int) -> int:
    used = min(resources.bytes_in(directory / name) for name in ("memory.current", "memory.usage_in_bytes"))
    stat = dict(
        line.split() for line in resources.read_text(directory / "memory.stat").splitlines() if len(line.split()) == 2
    )
    cache = sum(int(stat.get(f"total_{name}", stat.get(name, "0"))) for name in ("inactive_file", "active_file"))
    return min(limit, max(0, limit - (used if used < resources.UNLIMITED else 0) + cache))


def _waiting(files: list[Path]) -> float:
    for file in files:
        if match := re.search(r"^some avg10=([0-9.]+)", resources.read_text(file), flags=re.MULTILINE):
            return float(match[1])
    return 0.0
