"""An output_dir is one run's: every rank of a launch holds `in_use.json` there while it lives, and no other launch may.

    with held(Path(config.output_dir), here, environ):
        ...                                             # ConfigError in the ranks of another launch

The lock is the kernel's (flock): it is gone with the last process that holds it, however that ended, and holds between
hosts where a shared file system keeps locks. The file says who was first. Where there are no locks its word is all
there is: a process of this host is looked up, and of one elsewhere a warning says what is known.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import stat
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from moai.core.distributed import Ranks, is_gone, owner, start_token
from moai.core.errors import ConfigError
from moai.core.fsops import kind_of
from moai.training.process_group import SHARED

logger = logging.getLogger(__name__)

NAME = "in_use.json"
_TRIES, _PAUSE_SECONDS = 100, 0.05
"""Five seconds for the rest of a launch that has just died, and for one that is writing its name."""
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_MOST_BYTES = 1 << 16


@contextlib.contextmanager
def held(place: Path, here: Ranks, environ: Mapping[str, str]) -> Iterator[None]:
    """Raises ConfigError when another launch is at work in `place`, or it cannot be written."""
    launch = _launch(here, environ)
    descriptor = _open(place)
    try:
        other = _taken(descriptor, launch)
        if other is not None:
            refused = ConfigError(
                f"--output_dir {place}: a run is at work there{_who(other)}; wait for its end, stop it, or name "
                f"another --output_dir"
            )
            refused.add_note(SHARED)
            raise refused
        yield
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # for processes that were forked from this one, too
    finally:
        os.close(descriptor)


def _launch(here: Ranks, environ: Mapping[str, str]) -> list[str]:
    """What all ranks of a launch have in common, and no two launches at a time: on one node the process that started
    them.
    """
    if environ.get("MOAI_LAUNCH_ID"):
        return [environ["MOAI_LAUNCH_ID"]]
    who = os.getpid() if here.world_size == 1 else os.getppid()
    common = [environ.get(name, "") for name in ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT")]
    return common if here.nodes > 1 else [*common, owner()["host"], owner()["boot_id"], str(who), str(start_token(who))]


def _open(place: Path) -> int:
    try:
        place.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(place / NAME, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise ConfigError(f"--output_dir {place}: {error.strerror}; name a directory that can be written") from error
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise ConfigError(f"--output_dir {place}: {NAME} there is {kind_of(mode)}; remove it, or name another")
    return descriptor


def _taken(descriptor: int, launch: list[str]) -> dict[str, Any] | None:
    """Who else has it, or None once it is this launch's."""
    try:
        for _ in range(_TRIES):
            if _lock(descriptor, fcntl.LOCK_EX):
                _write(descriptor, launch)
            # From here on nobody writes. The two steps are not one: another may have written in between.
            other: dict[str, Any] = {}
            if _lock(descriptor, fcntl.LOCK_SH):
                other = _read(descriptor)
                if other.get("launch") == launch:
                    return None
                fcntl.flock(descriptor, fcntl.LOCK_UN)
                if not _is_known_gone(other):
                    return other
            time.sleep(_PAUSE_SECONDS)
        return other
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return _by_word(descriptor, launch)


def _by_word(descriptor: int, launch: list[str]) -> dict[str, Any] | None:
    other = _read(descriptor)
    if other and other.get("launch") != launch and not _is_known_gone(other):
        if other["host"] == owner()["host"]:
            return other
        logger.warning("A run was begun here%s; this file system has no locks that tell if it still works", _who(other))
    _write(descriptor, launch)
    return None


def _is_known_gone(other: Mapping[str, Any]) -> bool:
    return bool(other) and is_gone(other)


def _lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False


def _write(descriptor: int, launch: list[str]) -> None:
    since = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps({**owner(), "since": since, "launch": launch}).encode(), 0)


def _read(descriptor: int) -> dict[str, Any]:
    """What it says; nothing where it says something else."""
    try:
        found = json.loads(os.pread(descriptor, _MOST_BYTES, 0))
        return found if found.keys() >= {*owner(), "since", "launch"} else {}
    except (ValueError, AttributeError, RecursionError):
        return {}


def _who(other: Mapping[str, Any]) -> str:
    return f" (pid {other['pid']} on {other['host']}, since {other['since']})" if other else ""
