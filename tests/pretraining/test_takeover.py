"""Who goes on when a preparer dies or freezes: another launch of the same data, or the same one restarted. And what the
first can still spoil: nothing.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import crashes
import pytest

from moai.cache import staging as attempts

POINT = "receipt.commit"


class Paused:
    """A preparation that has two shards done and stands before the third, as long as nobody lets it go on."""

    def __init__(self, data: Path, folder: Path) -> None:
        self.points = folder / "points"
        self.points.mkdir()
        env = {
            **os.environ,
            "MOAI_TESTING": "1",
            "MOAI_FAILPOINT_DIR": str(self.points),
            "MOAI_FAILPOINT": f"{POINT}:3=pause",
        }
        self.process = subprocess.Popen(
            crashes.command(data, folder / "cache", "serial"),
            cwd=crashes.ROOT,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        wait_until((self.points / f"{POINT}.3").exists)

    def go_on(self) -> tuple[int, str]:
        (self.points / "go").touch()
        self.process.send_signal(signal.SIGCONT)
        said, _ = self.process.communicate(timeout=600)
        return self.process.returncode, said


@pytest.fixture
def paused(corpus: Path, tmp_path: Path) -> Iterator[Paused]:
    started = Paused(corpus, tmp_path)
    yield started
    started.process.kill()
    started.process.communicate()


def wait_until(true: Callable[[], object]) -> None:
    end = time.monotonic() + 600
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def start(data: Path, cache: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        crashes.command(data, cache, "serial"),
        cwd=crashes.ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def inodes(cache: Path) -> dict[str, int]:
    return {str(path): path.stat().st_ino for path in (cache / "datasets").rglob("*")}


def test_a_waiting_launch_takes_over_from_a_dead_preparer(
    paused: Paused, corpus: Path, tmp_path: Path, undisturbed: dict[str, str]
) -> None:
    second = start(corpus, tmp_path / "cache")
    assert second.stdout
    wait_until(lambda: "waiting for it" in second.stdout.readline())
    paused.process.kill()
    killed_at = time.monotonic()
    said, _ = second.communicate(timeout=600)
    assert second.returncode == 0, said
    assert time.monotonic() - killed_at < attempts.DEAD_SECONDS
    assert "2 reused" in said
    assert crashes.content(tmp_path / "cache") == undisturbed
    assert list((tmp_path / "cache" / "attempts").iterdir()) == []


def test_a_frozen_preparer_is_not_waited_for_and_spoils_nothing_when_it_wakes_up(
    paused: Paused,
    corpus: Path,
    tmp_path: Path,
    undisturbed: dict[str, str],
    prepare: Callable[..., object],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Frozen with its lock in hand, as by a debugger, a full pipe, a suspended machine."""
    paused.process.send_signal(signal.SIGSTOP)
    monkeypatch.setattr(attempts, "DEAD_SECONDS", 3.0)
    cache = tmp_path / "cache"
    flags = {"packing": "bfd_split", "shard_bytes": crashes.SHARD_BYTES, "max_bad_ratio": 0.1, "seq_len": 128}
    prepare(corpus, cache_dir=str(cache), **flags)
    assert "has given no sign of life" in caplog.text
    assert crashes.content(cache) == undisturbed
    before = inodes(cache)
    code, said = paused.go_on()
    assert code == 0, said
    assert "already published" in said
    assert crashes.content(cache) == undisturbed
    assert inodes(cache) == before


def test_a_slow_preparer_that_lives_is_waited_for(
    paused: Paused,
    corpus: Path,
    tmp_path: Path,
    prepare: Callable[..., object],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It stands still, but its heart beats. The second one is given more heartbeats than it would take to be believed
    dead.
    """
    monkeypatch.setattr(attempts, "DEAD_SECONDS", 4.0)
    waited: list[float] = []
    real = attempts._Rivals.are_silent

    def watch(rivals: attempts._Rivals) -> bool:
        waited.append(time.monotonic())
        if waited[-1] - waited[0] > 6.0:
            (paused.points / "go").touch()
        return real(rivals)

    monkeypatch.setattr(attempts._Rivals, "are_silent", watch)
    prepare(
        corpus,
        cache_dir=str(tmp_path / "cache"),
        packing="bfd_split",
        shard_bytes=crashes.SHARD_BYTES,
        max_bad_ratio=0.1,
        seq_len=128,
    )
    assert waited[-1] - waited[0] > 6.0
    assert "has given no sign of life" not in caplog.text
    assert paused.go_on()[0] == 0


def test_a_restarted_launch_goes_on_from_the_committed_shards(
    corpus: Path, tmp_path: Path, undisturbed: dict[str, str]
) -> None:
    """torchrun starts all ranks anew when rank 0 is killed; nobody waits for the status file of the first start."""
    cache, points = tmp_path / "cache", tmp_path / "points"
    points.mkdir()
    agent = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "--max_restarts",
        "1",
        "--monitor_interval",
        "0.1",
        "-m",
        "moai",
    ]
    env = {**os.environ, "MOAI_TESTING": "1", "MOAI_FAILPOINT_DIR": str(points), "MOAI_FAILPOINT": f"{POINT}:3=kill"}
    ran = subprocess.run(
        [*agent, *crashes.command(corpus, cache, "serial")[3:]],
        cwd=crashes.ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ran.returncode == 0, ran.stderr
    assert (points / f"{POINT}.3").exists()
    assert ran.stderr.count("Using Fast Tokenizer") == 2
    assert "2 reused" in ran.stderr
    assert crashes.content(cache) == undisturbed
