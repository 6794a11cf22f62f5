"""A cache to collect: input, what a killed process leaves, and everything in it by name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moai.cache.gc.collect import GcConfig, collect
from moai.core.distributed import owner
from moai.core.files import canonical_json
from moai.prepared.manifest import Prepared

PrepareIt = Callable[..., Prepared]

LINES = [json.dumps({"text": f"document {number} " + f"words {number * 7919} " * 20}) for number in range(40)]
DAY = 24 * 3600


def write(source: Path) -> Path:
    source.write_text("\n".join(LINES) + "\n")
    return source


def changed(source: Path) -> None:
    source.write_text("\n".join([*LINES[:-1], json.dumps({"text": "another end"})]) + "\n")


def gc(cache: Path, **flags: Any) -> list[str]:
    return list(collect(GcConfig(cache_dir=str(cache), **{"older_than": 0.0, **flags})))


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def a_dead_owner(**changes: Any) -> bytes:
    return canonical_json({**owner(), "pid": 1, "start_token": "no process began then", **changes})


def age(path: Path, days: float) -> None:
    for place in [path, *path.rglob("*")]:
        os.utime(place, (time.time() - days * DAY,) * 2)


def collect_in(cache: Path, marks: Path, wanted: str) -> subprocess.Popen[str]:
    """The command in a process of its own, with `wanted` armed."""
    marks.mkdir(exist_ok=True)
    env = {**os.environ, "MOAI_TESTING": "1", "MOAI_FAILPOINT_DIR": str(marks), "MOAI_FAILPOINT": wanted}
    return subprocess.Popen(
        [sys.executable, "-m", "moai", "gc", "--cache_dir", str(cache), "--older_than", "0"],
        env=env,
        stdout=subprocess.PIPE,
        text=True,
    )


def paused(process: subprocess.Popen[str], mark: Path) -> None:
    while not mark.exists():
        assert process.poll() is None
        time.sleep(0.01)


def begin_an_attempt(cache: Path) -> Path:
    attempt = cache / "attempts" / "begun"
    attempt.mkdir()
    (attempt / "owner.json").write_bytes(canonical_json(owner()))
    return attempt
