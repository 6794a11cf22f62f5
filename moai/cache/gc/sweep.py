"""Take finished things out of a cache while preparations may begin in it.

    with Retirement.open(cache) as retirement:
        retirement.retire([[receipt, data, bad_records]], reclaimed=lambda: False)

A preparation shows its attempt before it looks at a shard or a published directory, and takes it away after its
directory is published. So what goes is moved aside first, where no preparation finds it. If then there is an attempt, a
newly published directory, or whatever else `reclaimed` asks, all is put back; otherwise nobody can have seen it, and it
is deleted. Receipts go before their data: a kill leaves data that nobody counts, aside in an attempt like others.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from moai.cache.gc.mark import listed
from moai.cache.leases import lives, read_owner
from moai.cache.staging import OWNER
from moai.core.distributed import owner
from moai.core.failpoints import failpoint
from moai.core.files import canonical_json, link_or_copy, write_atomic

_UNSIGNED_SECONDS = 600.0
"""An attempt signs itself at once; one without a signature was killed before it could."""


@dataclass
class Retirement:
    cache: Path
    place: Path
    now: float
    known: set[str]
    """Names of the directories that were published when it began."""
    stopped: str = ""
    """Why nothing more is retired."""
    _moved: list[tuple[Path, Path]] = field(default_factory=list)

    @classmethod
    @contextlib.contextmanager
    def open(cls, cache: Path) -> Iterator[Retirement]:
        """Raises OSError where the cache cannot be written to."""
        place = cache / "attempts" / f"gc-{uuid.uuid4().hex}"
        place.mkdir(parents=True)
        retirement = None
        try:
            write_atomic(place / OWNER, canonical_json(owner()), durable=False)
            retirement = cls(cache, place, now=os.stat(place / OWNER).st_mtime, known=published(cache))
            retirement._check()
            yield retirement
        finally:
            if retirement:
                retirement._put_back()
            shutil.rmtree(place, ignore_errors=True)

    def retire(self, entries: Sequence[Sequence[Path]], *, reclaimed: Callable[[], bool]) -> bool:
        """Delete all entries, or put all back. Of an entry, the first path is what says that it exists."""
        for name, paths in (
            ("gc.receipts", [entry[0] for entry in entries]),
            ("gc.data", [path for entry in entries for path in entry[1:]]),
        ):
            self._check()
            for path in () if self.stopped else paths:
                failpoint(name, path)
                aside = self.place / f"{len(self._moved)}-{path.name}"
                with contextlib.suppress(FileNotFoundError):
                    os.rename(path, aside)
                    self._moved.append((path, aside))
        self._check()
        if self.stopped or reclaimed():
            self._put_back()
            return False
        failpoint("gc.delete", self.place)
        for _, aside in self._moved:
            remove(aside)
        self._moved.clear()
        return True

    def _check(self) -> None:
        if live := attempts(self.cache, self.now, own=self.place)[0]:
            self.stopped = f"{live[0].name} is at work in this cache"
        elif published(self.cache) - self.known:
            self.stopped = "a preparation has just ended in this cache"

    def _put_back(self) -> None:
        """Data before receipts. What was made again meanwhile has the same content by its name, and stays."""
        for path, aside in reversed(self._moved):
            if aside.is_dir():
                with contextlib.suppress(OSError):
                    os.rename(aside, path)
            else:
                with contextlib.suppress(FileExistsError):
                    link_or_copy(aside, path)
        self._moved.clear()


def attempts(cache: Path, now: float, *, own: Path | None = None) -> tuple[list[Path], list[Path]]:
    """The private directories of preparations, but for `own`: of those at work, and of those that were killed."""
    live: list[Path] = []
    dead: list[Path] = []
    for path in listed(cache / "attempts"):
        if path != own:
            (live if _is_at_work(path, now) else dead).append(path)
    return live, dead


def published(cache: Path) -> set[str]:
    """Names of the published directories."""
    return {path.name for path in listed(cache / "datasets")}


def remove(path: Path) -> None:
    """A file, a link, or a directory with all that is in it."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _is_at_work(attempt: Path, now: float) -> bool:
    try:
        changed_at = max(os.lstat(place).st_mtime for place in (attempt, *listed(attempt)))
    except FileNotFoundError:
        return False  # its preparation has just ended
    if not os.path.lexists(attempt / OWNER):
        return now - changed_at < _UNSIGNED_SECONDS
    return lives(read_owner(attempt / OWNER), now - changed_at)
