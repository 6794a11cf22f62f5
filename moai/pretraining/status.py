"""What launches are doing, from their status files: a look from outside that writes nothing.

    python -m moai status --cache_dir DIR [LAUNCH] [--watch]

Work that nobody waits for, such as that on an entity-coref corpus, has no status file: then the owner of its attempt is
shown.

Whether a preparer still beats is found by looking twice, on this process's own clock: the beat in the file has moved,
or it has not for so long. Times in files are not asked; only the order in which ended launches are listed goes by them.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moai.cache.staging import OWNER
from moai.core.config import option
from moai.core.distributed import HEARTBEAT_SECONDS, is_gone, status_folders
from moai.core.errors import ConfigError, printable
from moai.core.fsops import read_regular

LOOK_SECONDS = 2.5 * HEARTBEAT_SECONDS
"""How long a first look waits for a beat before it says that there is none."""
_POLL_SECONDS = 0.1
_ENDED_SHOWN = 5
_MOST_BYTES = 1 << 20
_SHAPE: dict[str, type | tuple[type, ...]] = {
    "state": str,
    "pid": int,
    "start_token": (str, type(None)),
    "host": str,
    "boot_id": str,
    "beat": int,
    "progress": dict,
}


@dataclass(frozen=True, kw_only=True)
class StatusConfig:
    """What is looked at."""

    cache_dir: str = option("~/.cache/moai", "the cache of the launches", env="MOAI_CACHE_DIR")
    launch: str | None = option(None, "one launch, by the beginning of its id")
    watch: bool = option(False, "look again and again, until no launch prepares any more")


def show(config: StatusConfig) -> Iterator[str]:
    """Lines, one launch after the other; with `watch`, all of them every two seconds. Raises ConfigError when the
    launch that is named is not there.
    """
    watch = _Watch(Path(config.cache_dir).expanduser().absolute(), config.launch or "")
    watch.look()
    if config.launch and not watch.launches:
        raise ConfigError(
            f"--launch {config.launch}: no status file of that name under {' or '.join(map(str, watch.folders))}"
        )
    watch.until_beats_are_judged()
    yield from watch.lines()
    while config.watch and watch.preparing():
        yield ""
        time.sleep(HEARTBEAT_SECONDS)
        watch.look()
        yield from watch.lines()


@dataclass
class _Launch:
    """One status file as it was last read, and since when its beat stands."""

    status: dict[str, Any]
    gone: bool
    beat_since: float
    moved: bool = False
    """The beat was seen to move, so that its age is known and not only a lower bound."""

    @property
    def preparing(self) -> bool:
        return self.status["state"] == "preparing" and not self.gone


class _Watch:
    def __init__(self, cache: Path, prefix: str) -> None:
        self.cache, self.folders, self.prefix = cache, status_folders(cache), prefix
        self.launches: dict[str, _Launch] = {}
        self.attempts: set[str] = set()
        """Names of those that are no launch, but work that nobody waits for."""
        self.ended: dict[str, float] = {}

    def look(self) -> None:
        for folder in self.folders:
            for path in _listed(folder):
                status = _read(path) if path.stem.startswith(self.prefix) else None
                # Beside the cache lie those of read-only caches, of whom nobody knows which: the ended ones are shown
                # by name.
                if status and (folder == self.folders[0] or self.prefix or status["state"] == "preparing"):
                    self._see(path.stem, path, status)
        found = {path.parent.name: path for path in _attempts(self.cache) if path.parent.name.startswith(self.prefix)}
        for name in self.attempts - found.keys():
            del self.launches[name]  # who ends in good order takes its attempt away
        self.attempts &= found.keys()
        for name, path in found.items():
            status = _read(path)
            if status and (name in self.attempts or not self._has_launch(status)):
                self.attempts.add(name)
                self._see(name, path, status)

    def _see(self, name: str, path: Path, status: dict[str, Any]) -> None:
        now = time.monotonic()
        gone = status["state"] == "preparing" and is_gone(status)
        status = (gone and _read(path)) or status  # its last word may have come between the two looks
        known = self.launches.setdefault(name, _Launch(status, gone, now))
        if status["beat"] != known.status["beat"]:
            known.beat_since, known.moved = now, True
        known.status, known.gone = status, gone
        with contextlib.suppress(OSError):
            self.ended[name] = os.lstat(path).st_mtime

    def _has_launch(self, owner: dict[str, Any]) -> bool:
        """The process that works in this attempt reports to a launch, under whatever name."""
        statuses = (_read(path) for folder in self.folders for path in _listed(folder))
        return any(
            status and all(status[name] == owner[name] for name in ("pid", "start_token", "host"))
            for status in statuses
        )

    def preparing(self) -> list[str]:
        return [name for name, launch in self.launches.items() if launch.preparing]

    def until_beats_are_judged(self) -> None:
        """Until every launch that prepares has beaten, or has not for longer than it should take."""
        end = time.monotonic() + LOOK_SECONDS
        while (
            any(launch.preparing and not launch.moved for launch in self.launches.values()) and time.monotonic() < end
        ):
            time.sleep(_POLL_SECONDS)
            self.look()

    def lines(self) -> Iterator[str]:
        if not self.launches:
            yield f"no launch has left a status file under {' or '.join(map(str, self.folders))}"
        at_work = self.preparing()
        ended = sorted(
            (name for name in self.launches if name not in at_work),
            key=lambda name: self.ended.get(name, 0.0),
            reverse=True,
        )
        for name in [*at_work, *ended[:_ENDED_SHOWN]]:
            yield f"{'attempt' if name in self.attempts else 'launch '}      {_plain(name)}"
            yield from _lines(self.launches[name])
        if len(ended) > _ENDED_SHOWN:
            yield f"and {len(ended) - _ENDED_SHOWN} more that ended"


def _lines(launch: _Launch) -> Iterator[str]:
    status, progress = launch.status, launch.status["progress"]
    dead = status["state"] == "preparing" and launch.gone
    yield f"state        {'dead: its process ended without a word' if dead else _plain(status['state'])}"
    yield f"preparer     pid {status['pid']} on {_plain(status['host'])}"
    if progress.get("line"):
        yield f"progress     {_plain(progress['line'])}"
    if isinstance(progress.get("documents_per_second"), int | float):
        eta = progress.get("eta_seconds")
        yield (
            f"rate         {progress['documents_per_second']:,.0f} documents/s, "
            f"{f'about {eta:,.0f} s left' if isinstance(eta, int | float) else 'time left not known yet'}"
        )
    if launch.preparing:
        age = time.monotonic() - launch.beat_since
        if launch.moved:
            yield f"heartbeat    moved {age:.1f} s ago"
        else:
            every = f"one comes every {HEARTBEAT_SECONDS:.0f} s"
            yield f"heartbeat    none in the {age:.1f} s since the first look; {every}"
    result = status.get("result")
    for one in result.get("prepared", ()) if isinstance(result, dict) else ():
        if isinstance(one, dict) and "path" in one:
            yield f"result       {_plain(one['path'])}{' (held out)' if one.get('held_out') else ''}"
    if isinstance(status.get("error"), dict):
        yield f"cause        {_plain(status['error'].get('type'))}: {_plain(status['error'].get('message'))}"


def _listed(folder: Path) -> list[Path]:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return sorted(path for path in folder.iterdir() if path.suffix == ".json" and not path.name.startswith("."))
    return []


def _attempts(cache: Path) -> list[Path]:
    """Of whoever works in this cache, the file that beats; the folders of `gc` and `repair` have none of that shape."""
    with contextlib.suppress(OSError):
        return sorted(path / OWNER for path in (cache / "attempts").iterdir())
    return []


def _read(path: Path) -> dict[str, Any] | None:
    """A status; None for anything else that lies there."""
    try:
        status = json.loads(read_regular(path, _MOST_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    whole = isinstance(status, dict) and all(isinstance(status.get(name), kind) for name, kind in _SHAPE.items())
    return status if whole else None


def _plain(value: Any) -> str:
    """What a file says, without what would steer a terminal."""
    return printable(" ".join(str(value)[:500].split()))
