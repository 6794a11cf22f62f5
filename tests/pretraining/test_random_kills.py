"""Killed and told to stop at random moments, by whoever it hits: one line or nothing, and in the end the same bytes.

Failpoints are between acts; these moments are anywhere. Kills fall between the first and the last receipt, signals into
the seconds after the command began to care for them.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import crashes
import pytest
from stamps import wait_until_stamps_prove

DOCUMENTS = 1500
SECONDS = 3.0
VICTIMS = ("driver", "worker", "worker", "forkserver", "tracker")
"""Of a kill; workers twice as often. Before the first receipt the forkserver's only child is the helper."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some forty shards."""
    data = tmp_path_factory.mktemp("random") / "data"
    data.mkdir()
    lines = [
        json.dumps({"text": f"Document {n}, 문서 {n * 7919}. " * 20}, ensure_ascii=False) for n in range(DOCUMENTS)
    ]
    lines[40] = '{"text": 5}'
    (data / "a.jsonl").write_text("\n".join(lines) + "\n")
    wait_until_stamps_prove(data)
    return data


@pytest.fixture(scope="module")
def right(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    cache = tmp_path_factory.mktemp("right") / "cache"
    assert crashes.run(data, cache, "serial").codes == [0]
    return crashes.content(cache)


@dataclass
class Run:
    """One preparation in a session of its own."""

    data: Path
    cache: Path
    way: str
    process: subprocess.Popen[str] = field(init=False)

    def __post_init__(self) -> None:
        self.process = subprocess.Popen(
            crashes.command(self.data, self.cache, self.way),
            cwd=crashes.ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def wait(self, true: Callable[[], bool]) -> bool:
        while self.process.poll() is None and not true():
            time.sleep(0.005)
        return self.process.poll() is None

    def receipts(self) -> int:
        return len(list((self.cache / "shards").glob("[!.]*.json")))

    def cares(self) -> bool:
        """It catches SIGTERM."""
        with contextlib.suppress(OSError):
            [caught] = [
                line.split()[1]
                for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
                if line.startswith("SigCgt")
            ]
            return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)
        return False

    def processes(self) -> Iterator[tuple[str, int]]:
        """(role, pid) of all that live in the session."""
        parents: dict[int, int] = {}
        said: dict[int, bytes] = {}
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError, IndexError):
                state, parent, _, session, *_ = (path / "stat").read_text().rpartition(")")[2].split()
                if int(session) == self.process.pid and state not in "ZX":
                    parents[int(path.name)], said[int(path.name)] = int(parent), (path / "cmdline").read_bytes()
        for pid, parent in parents.items():
            if pid == self.process.pid:
                yield "driver", pid
            elif parent == self.process.pid:
                yield "tracker" if b"resource_tracker" in said[pid] else "forkserver", pid
            else:
                yield "worker", pid

    def kill(self, role: str, rnd: random.Random) -> bool:
        pids = [pid for found, pid in self.processes() if found == role]
        if not pids:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(rnd.choice(pids), signal.SIGKILL)
        return True

    def end(self, right: dict[str, str], codes: set[int]) -> tuple[int, bool]:
        """Its exit code, and whether it took a second run. Raises AssertionError unless all is as it should be."""
        _, said = self.process.communicate(timeout=crashes.ENDS_WITHIN)
        code = self.process.returncode
        own = [line for line in said.splitlines() if "stopped" in line or "error: " in line]
        assert not [word for word in ("Traceback", "Exception", "Error:") if word in said], said
        assert code in {0, *codes}, (code, said)
        assert len(own) == (code > 0), (code, said)
        if code and self.receipts():
            again = crashes.run(self.data, self.cache, self.way)
            assert again.codes == [0], again.said
        assert (code and not self.receipts()) or crashes.content(self.cache) == right
        return code, bool(code)


def kill_at_random(rnd: random.Random, data: Path, folder: Path, right: dict[str, str]) -> tuple[list[str], bool]:
    """One to three kills; whom they hit, and whether it took a second run."""
    run, hit = Run(data, folder / "cache", "processes"), []
    if rnd.random() < 0.15 and run.wait(lambda: any(role == "worker" for role, _ in run.processes())):
        hit += ["helper"] if not run.receipts() and run.kill("worker", rnd) else []
    for _ in range(rnd.randint(1, 3)):
        at = run.receipts() + rnd.randint(1, 12)
        if run.wait(lambda: run.receipts() >= at):  # noqa: B023 - asked at once
            time.sleep(rnd.random() * 0.03)
            role = rnd.choice(VICTIMS)
            hit += [role] if run.kill(role, rnd) else []
    return hit, run.end(right, {-signal.SIGKILL, 70})[1]


def stop_at_random(rnd: random.Random, data: Path, folder: Path, right: dict[str, str]) -> int:
    """The exit code after a signal to the driver, or to all as a terminal sends it."""
    run = Run(data, folder / "cache", rnd.choice(["serial", "processes"]))
    signum = rnd.choice([signal.SIGINT, signal.SIGTERM])
    moment = 0.0
    if run.wait(run.cares):
        moment = time.monotonic() + rnd.random() * SECONDS
    if run.wait(lambda: time.monotonic() >= moment):
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if rnd.random() < 0.5 else os.kill)(run.process.pid, signum)
    return run.end(right, {128 + signum})[0]


@pytest.mark.parametrize("rounds", [2, pytest.param(150, marks=[pytest.mark.long, pytest.mark.timeout(14400)])])
def test_random_kills_cost_no_document(
    rounds: int, data: Path, right: dict[str, str], tmp_path: Path, record: Callable[..., None]
) -> None:
    hits: Counter[str] = Counter()
    again = 0
    for number in range(rounds):
        hit, more = kill_at_random(random.Random(number), data, tmp_path / str(number), right)
        hits, again = hits + Counter(hit), again + more
    assert sum(hits.values()) >= rounds / 2
    said = ", ".join(f"{times} {role}" for role, times in sorted(hits.items()))
    outcome = f"{sum(hits.values())} kills ({said}); {again} runs ended by them went on; all {rounds} the same bytes"
    record("1 to 3 random kills between the first and the last receipt", rounds, outcome)


@pytest.mark.parametrize("rounds", [2, pytest.param(100, marks=[pytest.mark.long, pytest.mark.timeout(14400)])])
def test_random_signals_are_one_line(
    rounds: int, data: Path, right: dict[str, str], tmp_path: Path, record: Callable[..., None]
) -> None:
    codes = Counter(stop_at_random(random.Random(n), data, tmp_path / str(n), right) for n in range(rounds))
    said = f"{codes[130]} ended with 130, {codes[143]} with 143 and one line, {codes[0]} were through; no traceback"
    record(f"a signal in the first {SECONDS:.0f} s", rounds, f"{said}; what had begun went on to the same bytes")
