"""Take finished things out of a cache while preparations may begin in it.

    with Retirement.open(cache) as retirement:
        retirement.retire([[receipt, data, bad_records]], reclaimed=lambda: False)

A preparation shows its attempt before it looks at a shard or a published directory, and takes it away after its
directory is published. So: what goes is moved aside first, where no preparation finds it any more, and only then is
looked for attempts, for directories published meanwhile, and for whatever else `reclaimed` asks. If there is any,
everything is put back; otherwise nobody can have seen it, and it is deleted. Receipts go before their data, so that a
kill in between leaves data that nobody counts, in the place aside too: that is an attempt like others, which the next
preparation on this host removes.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from moai.cache.leases import lives, read_owner
from moai.cache.staging import OWNER
from moai.core.distributed import owner
from moai.core.failpoints import failpoint
from moai.core.files import canonical_json, link_or_copy, write_atomic

_UNSIGNED_SECONDS = 600.0
"""An attempt signs itself at once; one without a signature was killed before it could."""


@dataclass(frozen=True)
class Attempts:
    """The private directories of preparations, but for `own`."""

    cache: Path
    now: float
    own: Path | None = None

    def dead(self) -> list[Path]:
        return [path for path in self._others() if not self._lives(path)]

    def live(self) -> list[Path]:
        return [path for path in self._others() if self._lives(path)]

    def _others(self) -> Iterator[Path]:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            yield from sorted(path for path in (self.cache / "attempts").iterdir() if path != self.own)

    def _lives(self, path: Path) -> bool:
        try:
            changed_at = max(os.lstat(place).st_mtime for place in (path, *_inside(path)))
        except FileNotFoundError:
            return False  # its preparation has just ended
        if not os.path.lexists(path / OWNER):
            return self.now - changed_at < _UNSIGNED_SECONDS
        return lives(read_owner(path / OWNER), self.now - changed_at)


@dataclass
class Retirement:
    cache: Path
    place: Path
    now: float
    known: frozenset[str]
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
        try:
            write_atomic(place / OWNER, canonical_json(owner()), durable=False)
            retirement = cls(cache, place, now=os.stat(place / OWNER).st_mtime, known=published(cache))
            retirement._check()
            yield retirement
            retirement._put_back()  # reached with something moved only by an exception that was caught in the block
        except BaseException:
            retirement._put_back()
            raise
        finally:
            shutil.rmtree(place, ignore_errors=True)

    @property
    def attempts(self) -> Attempts:
        return Attempts(self.cache, self.now, self.place)

    def retire(self, entries: Sequence[Sequence[Path]], *, reclaimed: Callable[[], bool]) -> bool:
        """Delete all entries, or put all back. Of an entry, the first path is what says that it exists."""
        for name, paths in (
            ("gc.receipts", [entry[0] for entry in entries]),
            ("gc.data", [path for entry in entries for path in entry[1:]]),
        ):
            self._check()
            if self.stopped:
                break
            for path in paths:
                failpoint(name, path)
                self._move(path)
        self._check()
        if self.stopped or reclaimed():
            self._put_back()
            return False
        failpoint("gc.delete", self.place)
        for _, aside in self._moved:
            shutil.rmtree(aside) if aside.is_dir() and not aside.is_symlink() else aside.unlink()
        self._moved.clear()
        return True

    def _check(self) -> None:
        if live := self.attempts.live():
            self.stopped = f"{live[0].name} is at work in this cache"
        elif published(self.cache) - self.known:
            self.stopped = "a preparation has just ended in this cache"

    def _move(self, path: Path) -> None:
        aside = self.place / f"{len(self._moved)}-{path.name}"
        with contextlib.suppress(FileNotFoundError):
            os.rename(path, aside)
            self._moved.append((path, aside))

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


def published(cache: Path) -> frozenset[str]:
    """Names of the published directories."""
    try:
        return frozenset(os.listdir(cache / "datasets"))
    except FileNotFoundError:
        return frozenset()


def _inside(path: Path) -> list[Path]:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return list(path.iterdir())
    return []
