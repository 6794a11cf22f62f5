"""Seconds until a waiting rank notices what became of rank 0: by its status file, and by a `filelock.FileLock`.

    python benchmarks/waiting.py [--rounds 7]

Rank 0 holds the lock and reports; one process waits with `build_once`, one for the lock, and each notes when its wait
ended. After at least six seconds, when the looks at the status file are as rare as they get (one a second), rank 0 is
killed (SIGKILL), or raises, or is frozen (SIGSTOP) and killed 40 s later. "cpu" is the processor time that a wait takes
of each second. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock

from moai.core.distributed import build_once, ranks
from moai.core.errors import MoaiError

FROZEN_SECONDS = 40.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--role", choices=sorted(ROLES), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.role:
        ROLES[given.role](given.folder)
        return 0
    fates = {"killed": given.rounds, "raised": given.rounds, "frozen": 1}
    found: dict[str, list[list[dict[str, Any]]]] = {fate: [] for fate in fates}
    for number in range(given.rounds):
        for fate, rounds in fates.items():
            if number < rounds:
                found[fate].append(one_round(fate))
    print("| rank 0 | status file, s | it says | lock, s | it says | cpu, status file | cpu, lock |")
    print("|---|---|---|---|---|---|---|")
    for fate, all_rounds in found.items():
        by_status, by_lock = zip(*all_rounds)
        cells = [f"{spread(by_status)} | {by_status[0]['says']}", f"{spread(by_lock)} | {by_lock[0]['says']}"]
        cpu = [f"{statistics.median(each['cpu'] for each in way):.2%}" for way in (by_status, by_lock)]
        print(f"| {fate} | {' | '.join([*cells, *cpu])} |")
    return 0


def spread(way: tuple[dict[str, Any], ...]) -> str:
    seconds = [each["seconds"] for each in way]
    return f"{statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})"


def one_round(fate: str) -> list[dict[str, Any]]:
    """What the waiter for the status file and the one for the lock found."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        preparer = start("preparer", folder, rank=0)
        until(lambda: (folder / "held").exists())
        waiters = [start("by_status", folder, rank=1), start("by_lock", folder, rank=1)]
        until(lambda: all((folder / f"{waiter.pid}.waits").exists() for waiter in waiters))
        time.sleep(6 + random.random())
        happened = time.monotonic()
        if fate == "raised":
            (folder / "raise").touch()
        else:
            os.kill(preparer.pid, signal.SIGSTOP if fate == "frozen" else signal.SIGKILL)
        if fate == "frozen":
            time.sleep(FROZEN_SECONDS)
            os.kill(preparer.pid, signal.SIGKILL)
        preparer.wait()
        results = []
        for waiter in waiters:
            waiter.wait()
            ended = json.loads((folder / f"{waiter.pid}.waited").read_text())
            results.append({**ended, "seconds": ended["at"] - happened})
        return results


def start(role: str, folder: Path, *, rank: int) -> subprocess.Popen[bytes]:
    launch = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MOAI_LAUNCH_ID": folder.name}
    environment = os.environ | {name: str(value) for name, value in launch.items()}
    command = [sys.executable, __file__, "--role", role, "--folder", str(folder)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)


def until(holds: Callable[[], bool]) -> None:
    while not holds():
        time.sleep(0.02)


def preparer(folder: Path) -> None:
    def work(report: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        with FileLock(folder / "lock"):
            (folder / "held").touch()
            for number in range(100_000):
                report({"line": f"shard {number}", "counter": number})
                if (folder / "raise").exists():
                    raise MoaiError("the disk is full")
                time.sleep(0.05)
        return {}

    build(work, folder)


def build(work: Callable[[Callable[[dict[str, Any]], None]], dict[str, Any]], folder: Path) -> None:
    build_once(work, ranks=ranks(os.environ), cache=folder, scope="node", stall_timeout=600, environ=os.environ)


def by_status(folder: Path) -> None:
    def wait() -> str:
        try:
            build(lambda _: {}, folder)
        except MoaiError as error:
            return str(error).split(";")[0]
        return "ready"

    waited(folder, wait)


def by_lock(folder: Path) -> None:
    def wait() -> str:
        with FileLock(folder / "lock"):
            return "free"

    waited(folder, wait)


def waited(folder: Path, wait: Callable[[], str]) -> None:
    (folder / f"{os.getpid()}.waits").touch()
    started, cpu = time.monotonic(), time.process_time()
    says = wait()
    ended = time.monotonic()
    found = {"says": says, "at": ended, "cpu": (time.process_time() - cpu) / (ended - started)}
    (folder / f"{os.getpid()}.waited").write_text(json.dumps(found))


ROLES = {"preparer": preparer, "by_status": by_status, "by_lock": by_lock}


if __name__ == "__main__":
    sys.exit(main())
