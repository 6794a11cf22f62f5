"""A private place for unfinished work, and a lock that saves doing it twice. Correctness depends on neither.

    with locked(cache, key, report):
        ...                              # prepared in the meantime?
        with attempt(cache, key) as staging:
            ...

`<cache>/attempts/<key>-<unique>/owner.json` beats while its process lives. Who waits for the lock watches those beats
on its own clock: the kernel gives back the lock of a process that ends, but not that of one that is stopped, frozen or
cut off. Such a one is not waited for longer than DEAD_SECONDS. If it wakes up later it does no harm: shards are named
by their content, and of two directories for one name the first to be renamed stays.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from moai.core.distributed import DEAD_SECONDS, Report, Status, is_gone
from moai.core.fsops import file_lock, names_in, read_regular

logger = logging.getLogger(__name__)

OWNER = "owner.json"
_SAY_SECONDS = 60.0
_POLL_SECONDS = 1.0
_MOST_BYTES = 1 << 16


@contextlib.contextmanager
def attempt(cache: Path, key: str) -> Iterator[Path]:
    """A directory of its own; removed afterwards, with those that dead processes of this host left."""
    attempts = cache / "attempts"
    for name in names_in(attempts):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            if is_gone(json.loads(read_regular(attempts / name / OWNER, _MOST_BYTES))):
                shutil.rmtree(attempts / name)
    path = attempts / f"{_prefix(key)}{uuid.uuid4().hex}"
    path.mkdir()
    try:
        with Status(path / OWNER).beating():
            yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def locked(cache: Path, key: str, report: Report = lambda _: None) -> Iterator[None]:
    """Wait while another run does the same work, as long as it lives. Where the file system has no locks, go on
    without.
    """
    from filelock import Timeout

    rivals = _Rivals(cache, key)
    path = cache / "locks" / f"{key}.lock"
    with contextlib.ExitStack() as held:
        waited, said = 0.0, 0.0
        while True:
            started = time.monotonic()
            try:
                held.enter_context(file_lock(path, _POLL_SECONDS if waited else 0.0))
                break
            except Timeout:
                if waited >= said:
                    logger.info("Another launch prepares the same data (plan %s); waiting for it", key[:12])
                    said += _SAY_SECONDS
            except (OSError, NotImplementedError) as error:
                logger.warning(
                    "%s: no locks here (%s); going on without one, a second run would repeat the work", cache, error
                )
                break
            if rivals.are_silent():
                logger.warning(
                    "The launch that prepares the same data (plan %s) has given no sign of life for %.0f s; taking "
                    "over from its finished shards",
                    key[:12],
                    DEAD_SECONDS,
                )
                break
            waited += max(time.monotonic() - started, 1e-3)
            report(
                {
                    "line": f"waiting for another launch that prepares the same data ({waited:.0f} s)",
                    "counter": round(waited),
                }
            )
        yield


class _Rivals:
    """Attempts at the same key, judged on this process's clock."""

    def __init__(self, cache: Path, key: str) -> None:
        self.folder, self.prefix = cache / "attempts", _prefix(key)
        self.beats: dict[str, int] = {}
        self.moved_at = time.monotonic()

    def are_silent(self) -> bool:
        """None has beaten for DEAD_SECONDS."""
        now = time.monotonic()
        for name in names_in(self.folder):
            if not name.startswith(self.prefix):
                continue
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                beat = json.loads(read_regular(self.folder / name / OWNER, _MOST_BYTES))["beat"]
                if self.beats.get(name) != beat:
                    self.beats[name], self.moved_at = beat, now
        return now - self.moved_at > DEAD_SECONDS


def _prefix(key: str) -> str:
    return f"{key[:24]}-"
