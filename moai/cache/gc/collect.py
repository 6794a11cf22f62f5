"""Give space in a cache back: what killed runs left, what newer data replaced, what nothing leads to.

    python -m moai gc --cache_dir DIR --dry_run          what would go
    python -m moai gc --older_than 30                    only what has lain for 30 days
    python -m moai gc --max_bytes 200GB                  then the longest unused, until the cache is that small

Never anything in use; what that is, and what is superseded: docs/cache.md. `moai.cache.gc.sweep` keeps a preparation
safe that begins meanwhile. Ages are file times against that of a file just written there, so only one clock is asked.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import re
import stat
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moai.cache.gc.mark import listed, records_in, useless
from moai.cache.gc.sweep import Retirement, attempts, published, remove
from moai.cache.leases import lives, read_owner, uses
from moai.core.config import option
from moai.core.errors import ConfigError, DamagedError
from moai.core.failpoints import failpoint
from moai.core.files import stamp, storage_errors
from moai.prepared.manifest import MANIFEST, read_manifest
from moai.pretraining.keys import plans, stands_for

_DAY_SECONDS = 24 * 3600.0
_TEMPORARY_SECONDS = 3600.0
"""A file on its way to its name takes seconds."""
_BATCH = 64
"""Shards or records that are retired together: few enough that a preparation which begins meanwhile is seen soon."""


@dataclass(frozen=True, kw_only=True)
class GcConfig:
    """What goes."""

    cache_dir: str = option("~/.cache/moai", "the cache", env="MOAI_CACHE_DIR")
    older_than: float = option(7.0, "days that something must have lain unused; 0 takes all that nothing leads to")
    max_bytes: int | None = option(
        None, "then let the longest unused go, prepared directories too, until the cache takes no more than this"
    )
    dry_run: bool = option(False, "only say what would go")

    def __post_init__(self) -> None:
        for name in ("older_than", "max_bytes"):
            if (getattr(self, name) or 0) < 0:
                raise ConfigError(f"{name} = {getattr(self, name)}: must be 0 or more")


def collect(config: GcConfig) -> Iterator[str]:
    """Lines about what went. Raises ConfigError where there is no cache, StorageError where it cannot be written to."""
    cache = Path(config.cache_dir).expanduser().absolute()
    if not (cache / "shards").is_dir() and not (cache / "datasets").is_dir():
        raise ConfigError(f"--cache_dir {cache}: holds no cache of moai")
    with storage_errors(cache), contextlib.ExitStack() as stack:
        space = _Space(cache)
        retirement = None if config.dry_run else stack.enter_context(Retirement.open(cache))
        yield from _Collection(cache, config, retirement.now if retirement else time.time(), retirement, space).run()


@dataclass(frozen=True)
class _Shard:
    """All that bears one key in shards/. `paths` in the order of removal."""

    key: str
    paths: tuple[Path, ...]
    written_at: float


@dataclass
class _Collection:
    cache: Path
    config: GcConfig
    now: float
    retirement: Retirement | None
    """None with --dry_run."""
    space: _Space
    gone: set[Path] = field(default_factory=set)
    """What was retired, or with --dry_run would have been."""

    def run(self) -> Iterator[str]:
        verb, freed = ("would go", "would be freed") if self.config.dry_run else ("removed", "freed")
        before, most_bytes = self.space.bytes, self.config.max_bytes
        yield from (f"{verb:9} {line}" for what, paths in self._left_behind() for line in self._remove(paths, what))
        own = self.retirement.place if self.retirement else None
        if live := attempts(self.cache, self.now, own=own)[0]:
            yield f"kept      all shards and prepared directories: {live[0].name} is at work in this cache"
        else:
            by_size = [self._largest(most_bytes), self._unneeded()] if most_bytes is not None else []
            for lines in (self._unreached(), self._unneeded(), *by_size):
                yield from (f"{verb:9} {line}" for line in lines)
            if self.retirement and self.retirement.stopped:
                yield f"kept      the rest: {self.retirement.stopped}; run again later"
        if most_bytes is not None and self.space.bytes > most_bytes:
            yield f"kept      {_size(self.space.bytes)}, more than {_size(most_bytes)}: all of it is in use"
        yield f"{_size(before - self.space.bytes)} {freed}, {_size(self.space.bytes)} left in {self.cache}"

    def _left_behind(self) -> Iterator[tuple[str, list[Path]]]:
        """What no preparation would ever look for again; each list is removed before the next is made."""
        yield "attempts of preparations that were killed", attempts(self.cache, self.now)[1]
        names = ("shards", "transforms", "plans", "launches", "uses", "distrusted")
        places = [path for name in names for path in listed(self.cache / name)]
        places += [path for folder in listed(self.cache / "ranges") for path in listed(folder)]
        unfinished = [path for path in places if re.fullmatch(r"\..+\.[0-9a-f]{32}\.tmp", path.name)]
        yield (
            "files that were never finished",
            [path for path in unfinished if self.now - _written_at(path) > _TEMPORARY_SECONDS],
        )
        launches = [path for path in listed(self.cache / "launches") if re.fullmatch(r"[^.].*\.json", path.name)]
        yield (
            "status files of launches that ended",
            [p for p in launches if self._is_old(p) and not lives(read_owner(p), self.now - _written_at(p))],
        )
        yield "lists of bad records of failed runs", list(filter(self._is_old, listed(self.cache / "quarantine")))
        ended = [use.path for use in uses(self.cache) if not use.is_live(self.now) and self._is_old(use.path)]
        yield "records of uses that ended", ended
        with contextlib.ExitStack() as held:
            # Removed while held here. Who waits for one makes a new one: filelock looks whether its file has its name.
            free = []
            for path in listed(self.cache / "locks"):
                with contextlib.suppress(OSError, ValueError):
                    held.enter_context(_locked(path))
                    free.append(path)
            yield "locks that nobody holds", free

    def _unreached(self) -> Iterator[str]:
        """Directories and shards that nothing leads to, and that are old."""
        for path, why in self._replaced():
            if self.now - self._used_at(path) >= self.config.older_than * _DAY_SECONDS:
                yield from self._retire_directory(path, why)
        there = published(self.cache)
        lost = [path for path, plan in plans(self.cache) if plan["directory"] not in there and self._is_old(path)]
        yield from self._remove(lost, "plans whose prepared directory is gone")
        old = [shard for shard in self._unlinked() if all(map(self._is_old, shard.paths))]
        yield from self._retire_shards(old, "that no prepared directory links")
        folders = [self.cache / name for name in ("shards", "plans", "transforms", "distrusted")]
        found = (path for folder in (*folders, *listed(self.cache / "ranges")) for path in listed(folder))
        asides = [path for path in found if ".corrupt-" in path.name and self._is_old(path)]
        yield from self._remove(asides, "damaged files that were set aside")

    def _unneeded(self) -> Iterator[str]:
        """Old records that serve nothing any more, retired like shards: a preparation may count on what it saw."""
        found = useless(
            self.cache,
            shards=[path.stem for path in records_in(self.cache / "shards") if path not in self.gone],
            directories=self._directories(),
            plans=[record for _, record in plans(self.cache)],
        )
        for what, paths in found:
            yield from self._retire([(path,) for path in paths if path not in self.gone and self._is_old(path)], what)

    def _largest(self, most_bytes: int) -> Iterator[str]:
        """The longest unused, until the cache takes `most_bytes`: shards that nothing links, then directories with what
        only they link.
        """
        for shard in sorted(self._unlinked(), key=lambda shard: shard.written_at):
            if self.space.bytes <= most_bytes:
                return
            yield from self._retire_shards([shard], "that no prepared directory links")
        for path in sorted(self._directories(), key=self._used_at):
            if self.space.bytes <= most_bytes:
                return
            keys, days = _keys(path), (self.now - self._used_at(path)) / _DAY_SECONDS
            yield from self._retire_directory(path, f"unused for {days:.1f} days")
            if path in self.gone:
                freed = [shard for shard in self._unlinked() if shard.key in keys]
                yield from self._retire_shards(freed, "that it alone linked")

    def _is_old(self, path: Path) -> bool:
        return self.now - _written_at(path) >= self.config.older_than * _DAY_SECONDS

    def _directories(self) -> list[Path]:
        return [path for path in listed(self.cache / "datasets") if path not in self.gone]

    def _unlinked(self) -> list[_Shard]:
        """Shards of which no directory that stays was made, and whose data has no other name: removal frees space."""
        needed = {key for path in self._directories() for key in _keys(path)}
        endings = ("json", "arrow", "bad.jsonl", "documents")
        by_key: dict[str, dict[str, Path]] = {}
        for path in listed(self.cache / "shards"):
            key, _, ending = path.name.partition(".")
            if key and key not in needed and ending in endings and path not in self.gone:
                by_key.setdefault(key, {})[ending] = path
        shards = []
        for key, found in sorted(by_key.items()):
            paths = tuple(found[ending] for ending in endings if ending in found)
            if all(self.space.names(path) == 1 for path in paths):
                shards.append(_Shard(key, paths, max(map(_written_at, paths))))
        return shards

    def _replaced(self) -> Iterator[tuple[Path, str]]:
        """Directories that were set aside, and those to which only superseded plans lead."""
        records = list(plans(self.cache))
        superseded: dict[str, list[bool]] = {}
        for path, record in records:
            superseded.setdefault(record["directory"], []).append(_is_superseded(path, record, records, self.cache))
        for path in listed(self.cache / "datasets"):
            if ".wrong-" in path.name:
                yield path, "made by a tokenizer backend that was wrong"
            elif all(superseded.get(path.name, [False])):
                yield path, "its files changed and were prepared anew"

    def _used_at(self, directory: Path) -> float:
        """When it was made or set aside, led to anew, or last used."""
        times = [_written_at(path) for path, record in plans(self.cache) if record["directory"] == directory.name]
        times += [use.written_at for use in uses(self.cache) if use.directory == directory.name]
        with contextlib.suppress(FileNotFoundError):
            times.append(os.lstat(directory / MANIFEST).st_mtime)
        if ".wrong-" in directory.name or not times:
            times.append(os.lstat(directory).st_ctime)
        return max(times)

    def _is_used(self, directory: str) -> bool:
        """Also one that was set aside may be: its readers noted the name it had."""
        names = {directory, directory.partition(".wrong-")[0]}
        noted = any(use.directory in names and use.is_live(self.now) for use in uses(self.cache))
        return noted or directory in mapped(self.cache)

    def _retire_directory(self, path: Path, why: str) -> Iterator[str]:
        if self._is_used(path.name):
            return
        paths = [path, *_tree(path)]
        if self.retirement and not self.retirement.retire([[path]], reclaimed=lambda: self._is_used(path.name)):
            return
        self.gone.add(path)
        yield f"datasets/{path.name}, {why}: {_size(self.space.drop(paths))}"

    def _retire_shards(self, shards: Iterable[_Shard], why: str) -> Iterator[str]:
        yield from self._retire([shard.paths for shard in shards], f"shards {why}")

    def _retire(self, entries: Sequence[Sequence[Path]], what: str) -> Iterator[str]:
        """As many as go before a preparation begins. Of an entry, the first path is what says that it exists."""
        number = size = 0
        for start in range(0, len(entries), _BATCH):
            batch = entries[start : start + _BATCH]
            if self.retirement and not self.retirement.retire(batch, reclaimed=lambda: False):
                break
            paths = [path for entry in batch for path in entry]
            self.gone.update(paths)
            number, size = number + len(batch), size + self.space.drop(paths)
        if number:
            yield f"{number:,} {what}: {_size(size)}"

    def _remove(self, paths: Sequence[Path], what: str) -> Iterator[str]:
        """Things that no preparation looks for go at once."""
        if not paths:
            return
        size = self.space.drop([inner for path in paths for inner in (path, *_tree(path))])
        for path in paths if self.retirement else ():
            failpoint("gc.remove", path)
            with contextlib.suppress(FileNotFoundError):
                remove(path)
        yield f"{len(paths):,} {what}: {_size(size)}"


class _Space:
    """What the cache takes, counted by file, not by name: a shard and the directory that links it are one."""

    def __init__(self, cache: Path) -> None:
        self._files: dict[Path, tuple[tuple[int, int], int]] = {}
        self._names: dict[tuple[int, int], int] = {}
        for path in _tree(cache):
            with contextlib.suppress(FileNotFoundError):
                found = os.lstat(path)
                if stat.S_ISREG(found.st_mode):
                    inode = (found.st_dev, found.st_ino)
                    self._files[path], self._names[inode] = (inode, found.st_size), found.st_nlink
        self.bytes = sum(dict(self._files.values()).values())

    def names(self, path: Path) -> int:
        """How many names the file still has."""
        return self._names[self._files[path][0]] if path in self._files else 1

    def drop(self, paths: Iterable[Path]) -> int:
        """Count these names as gone. Returns the bytes of the files that have none left."""
        freed = 0
        for path in paths:
            inode, size = self._files.pop(path, (None, 0))
            if inode is not None:
                self._names[inode] -= 1
                freed += 0 if self._names[inode] else size
        self.bytes -= freed
        return freed


def mapped(cache: Path) -> set[str]:
    """Names of the published directories of which a process on this host, as far as it may be asked, maps a file."""
    inside = re.compile(re.escape(os.path.realpath(cache / "datasets")) + r"/([^/\n]+)/")
    names: set[str] = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            names.update(inside.findall(maps.read_text(errors="replace")))
    return names


def _is_superseded(
    path: Path, record: Mapping[str, Any], records: Sequence[tuple[Path, Mapping[str, Any]]], cache: Path
) -> bool:
    """Whether a newer plan stands in for one that can no longer be met: a file is another now, or the versions are."""
    instead = [
        other["fields"]
        for other_path, other in records
        if _written_at(other_path) > _written_at(path)
        and other["directory"] != record["directory"]
        and (cache / "datasets" / other["directory"]).is_dir()
        and stands_for(other["fields"], record["fields"])
    ]
    if any(other[group] != record["fields"][group] for other in instead for group in ("tokenizer", "format")):
        return True
    return bool(instead) and any(_is_another(Path(name), seen) for name, seen in record["fields"]["files"].items())


def _is_another(file: Path, seen: Sequence[int]) -> bool:
    """A file that is absent may come back, with the disk it is on."""
    try:
        return stamp(file).as_list() != list(seen)
    except OSError:
        return False


def _keys(directory: Path) -> set[str]:
    """Of the shards that a published directory was made of. Of a damaged one only the links tell."""
    try:
        return {shard["shard_key"] for shard in read_manifest(directory)["content"]["shards"]}
    except DamagedError:
        return set()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of this file. Raises OSError where another process does, or where there are no locks."""
    descriptor = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _tree(path: Path) -> Iterator[Path]:
    """All that lies in a directory, no link followed."""
    if path.is_dir() and not path.is_symlink():
        for folder, folders, files in os.walk(path):
            yield from (Path(folder) / name for name in [*folders, *files])


def _written_at(path: Path) -> float:
    """What vanishes meanwhile is not old."""
    try:
        return os.lstat(path).st_mtime
    except FileNotFoundError:
        return math.inf


def _size(size: int) -> str:
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size} bytes"
