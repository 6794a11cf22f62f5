"""Reading what another process or host may just have written: the few operations that preparing and waiting stand on.

Relied upon is this and nothing else: one of several creates a name exclusively, a rename is whole, and who opens a file
after it was closed gets what was written, sooner or later. Not relied upon are locks, file times, and that a name or a
listing is fresh: a shared file system may show a file late, or say once that a handle is stale.

With MOAI_TESTING=1, MOAI_WEATHER gives a local disk such manners, for the tests: `late=0.5` hides what is younger than
half a second, `estale` lets the first look at every path fail, `nolocks` refuses locks.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

_TRIES = 3


@dataclass(frozen=True)
class Weather:
    """What a file system does to those who look at it."""

    late_seconds: float = 0.0
    estale: bool = False
    locks: bool = True
    _seen: set[Path] = field(default_factory=set)

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> Weather | None:
        if environ.get("MOAI_TESTING") != "1" or not environ.get("MOAI_WEATHER"):
            return None
        wanted = dict(word.partition("=")[::2] for word in environ["MOAI_WEATHER"].split(","))
        assert wanted.keys() <= {"late", "estale", "nolocks"}, environ["MOAI_WEATHER"]
        return cls(float(wanted.get("late") or 0), "estale" in wanted, "nolocks" not in wanted)

    def look(self, path: Path) -> None:
        """Raises what this file system would."""
        if self.estale and path not in self._seen:
            self._seen.add(path)
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        if self.late_seconds and self._hides(path):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))

    def _hides(self, path: Path) -> bool:
        try:
            return time.time() - os.lstat(path).st_ctime < self.late_seconds
        except OSError:
            return False


_weather = Weather.of(os.environ)


def read_regular(path: Path, most_bytes: int) -> bytes:
    """All of a regular file. No link is followed, no FIFO or device waited for. Raises OSError; ValueError where it is
    none, or has more than `most_bytes`.
    """
    return _patiently(path, lambda: _read_regular(path, most_bytes))


@contextlib.contextmanager
def open_regular(path: Path, *, follow_links: bool = False) -> Iterator[BufferedReader]:
    """A regular file. No FIFO or device is waited for. Raises OSError; ValueError where it is none."""
    with contextlib.suppress(OSError):
        if not follow_links and stat.S_ISLNK(os.lstat(path).st_mode):
            raise ValueError(kind_of(stat.S_IFLNK))
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow_links else os.O_NOFOLLOW)
    # With an opener a descriptor that turns out to be a directory's is closed again.
    with open(path, "rb", opener=lambda name, _: os.open(name, flags)) as file:
        mode = os.fstat(file.fileno()).st_mode
        if not stat.S_ISREG(mode):
            raise ValueError(kind_of(mode))
        yield file


def look_at(path: Path) -> os.stat_result:
    """What `path` itself is, links not followed. Raises OSError."""
    return _patiently(path, lambda: os.lstat(path))


def names_in(folder: Path) -> list[str]:
    """Names in a directory, in order; none where it is not there. On NFS a listing also lets the client forget that a
    name was absent.
    """
    with contextlib.suppress(FileNotFoundError):
        return sorted(_patiently(folder, lambda: os.listdir(folder)))
    return []


@contextlib.contextmanager
def file_lock(path: Path, seconds: float) -> Iterator[Any]:
    """filelock's lock, held. Raises filelock.Timeout after `seconds`, OSError or NotImplementedError where the file
    system has none.
    """
    from filelock import FileLock

    if _weather and not _weather.locks:
        raise NotImplementedError("no locks")
    lock = FileLock(path, fallback_to_soft=False)
    with lock.acquire(timeout=seconds):
        yield lock


def kind_of(mode: int) -> str:
    """What stands where a file should, for people."""
    kinds = {
        stat.S_IFLNK: "a symbolic link",
        stat.S_IFDIR: "a directory",
        stat.S_IFIFO: "a FIFO",
        stat.S_IFSOCK: "a socket",
    }
    return f"{kinds.get(stat.S_IFMT(mode), 'a device')}, not a regular file"


def _patiently(path: Path, look: Callable[[], T]) -> T:
    """A stale handle is no answer: asked again, the file system looks the name up anew."""
    for _ in range(_TRIES):
        try:
            if _weather:
                _weather.look(path)
            return look()
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
            stale = error
    raise stale


def _read_regular(path: Path, most_bytes: int) -> bytes:
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most_bytes:
            raise ValueError(f"larger than {most_bytes:,} bytes")
        return file.read(size)  # a buffer of `most_bytes` may be more memory than this process gets
