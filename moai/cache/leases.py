"""Who uses a prepared directory, so that `moai gc` leaves it alone.

    note_use(cache, prepared.path.name)          # once a launch, by the process that prepared or found the directory

`<cache>/uses/<directory>-<random>.json` holds the owner and is written anew every hour. It stays when its process ends:
its age then says when the directory was last used. Whether a process of this host still runs is asked of the kernel.
What another host wrote counts as in use until it is two days old, by the clock of the file system that holds the cache.

None of this is part of the protocol of preparing and waiting, which compares no times.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moai.core.distributed import is_gone, owner, pid_namespace
from moai.core.files import canonical_json, write_atomic
from moai.core.fsops import read_regular

BEAT_SECONDS = 3600.0
DEAD_SECONDS = 2 * 24 * 3600.0
"""A record of another host this old has missed 48 beats."""
_MOST_BYTES = 1 << 16
_noted: dict[Path, bytes] = {}
"""What this process has taken down."""


def note_use(cache: Path, directory: str) -> None:
    """Take down that this process uses `<cache>/datasets/<directory>`, for as long as it runs. Where nothing can be
    written, nothing is collected either.
    """
    path = cache / "uses" / f"{directory}-{uuid.uuid4().hex}.json"
    content = canonical_json({**owner(), "directory": directory})
    with contextlib.suppress(OSError):
        path.parent.mkdir(exist_ok=True)
        write_atomic(path, content, durable=False)
        if not _noted:
            threading.Thread(target=_beat, name="uses", daemon=True).start()
        _noted[path] = content


@dataclass(frozen=True)
class Use:
    """One record. `written_at` is the file system's time."""

    path: Path
    directory: str
    who: Mapping[str, Any] | None
    written_at: float

    def is_live(self, now: float) -> bool:
        return lives(self.who, now - self.written_at)


def uses(cache: Path) -> Iterator[Use]:
    """Every record in the cache. One that cannot be read speaks for the directory in its name, by its age alone."""
    for path in sorted((cache / "uses").glob("[!.]*.json")):
        with contextlib.suppress(FileNotFoundError):
            yield Use(path, path.stem.rpartition("-")[0], read_owner(path), os.lstat(path).st_mtime)


def lives(who: Mapping[str, Any] | None, age_seconds: float) -> bool:
    """Whether the process of an owner record that was written `age_seconds` ago is to be taken for alive."""
    if who is None or who.get("pid_namespace", pid_namespace()) != pid_namespace() or who["host"] != owner()["host"]:
        return age_seconds < DEAD_SECONDS
    return not is_gone(who)


def read_owner(path: Path) -> dict[str, Any] | None:
    """An owner record, or None where the file is absent or holds something else."""
    try:
        who = json.loads(read_regular(path, _MOST_BYTES))
        return dict(who) if isinstance(who["pid"], int) and who.keys() >= {"start_token", "host", "boot_id"} else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def _beat() -> None:
    while True:
        time.sleep(BEAT_SECONDS)
        for path, content in list(_noted.items()):
            with contextlib.suppress(OSError):
                write_atomic(path, content, durable=False)
