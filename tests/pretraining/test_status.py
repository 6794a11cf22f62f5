"""`moai status`: a look at real status files of real processes, which writes nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moai.core import distributed
from moai.core.errors import ConfigError
from moai.core.files import canonical_json
from moai.pretraining.status import StatusConfig, show

RunIt = Callable[..., subprocess.CompletedProcess[str]]

PREPARER = """
import sys
from pathlib import Path
from moai.core import distributed
distributed.HEARTBEAT_SECONDS = 0.2
status = distributed.Status.open(Path(sys.argv[1]), sys.argv[2])
status.report({"line": "42%, 3 shards", "documents_per_second": 1234.5, "eta_seconds": 60.0})
print("begun", flush=True)
word = input()
if word == "ready":
    status.end("ready", result={"prepared": [{"path": "there"}]})
else:
    error = {"type": "SourceError", "message": "gone\\x1b[2J", "traceback": "", "rank": 0}
    status.end("failed", error=error)
"""


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches of read-only caches leave their files in the temporary directory of the machine."""
    monkeypatch.setattr(distributed.tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    begun: list[subprocess.Popen[str]] = []

    def start(launch: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", PREPARER, str(tmp_path), launch],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        begun.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        return process

    yield start
    for process in begun:
        process.kill()
        process.communicate()


def look(tmp_path: Path, **flags: object) -> list[str]:
    return list(show(StatusConfig(cache_dir=str(tmp_path), **flags)))  # type: ignore[arg-type]


def line(lines: list[str], name: str) -> str:
    return next(text.partition(" ")[2].strip() for text in lines if text.startswith(name))


def test_a_launch_at_work_is_shown_with_its_progress_and_its_beat(
    tmp_path: Path, begin: Callable[[str], subprocess.Popen[str]]
) -> None:
    process = begin("one")
    lines = look(tmp_path)
    assert line(lines, "launch") == "one"
    assert line(lines, "state") == "preparing"
    assert line(lines, "preparer").startswith(f"pid {process.pid} on ")
    assert line(lines, "progress") == "42%, 3 shards"
    assert line(lines, "rate") == "1,234 documents/s, about 60 s left"
    assert line(lines, "heartbeat").startswith("moved 0.")


def test_a_preparer_that_is_stopped_has_no_beat_and_one_that_is_killed_is_dead(
    tmp_path: Path, begin: Callable[[str], subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moai.pretraining.status.LOOK_SECONDS", 1.0)
    process = begin("one")
    os.kill(process.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
    assert line(look(tmp_path), "heartbeat").startswith("none in the 1.")
    process.kill()
    process.wait()
    lines = look(tmp_path)
    assert line(lines, "state") == "dead: its process ended without a word"
    assert not any(text.startswith("heartbeat") for text in lines)


def test_how_launches_ended_is_told_and_no_file_can_steer_the_terminal(
    tmp_path: Path, begin: Callable[[str], subprocess.Popen[str]]
) -> None:
    begin("good").communicate("ready\n", timeout=150)
    begin("bad").communicate("failed\n", timeout=150)
    lines = look(tmp_path)
    assert line(lines, "result") == "there"
    assert line(lines, "cause") == "SourceError: gone\\x1b[2J"
    assert [text for text in look(tmp_path, launch="go") if text.startswith("launch")] == ["launch       good"]
    with pytest.raises(ConfigError, match="--launch x: no status file of that name"):
        look(tmp_path, launch="x")


def test_watching_ends_with_the_launch(
    tmp_path: Path, begin: Callable[[str], subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moai.pretraining.status.HEARTBEAT_SECONDS", 0.2)
    process = begin("one")
    watching = show(StatusConfig(cache_dir=str(tmp_path), watch=True))
    while next(watching) != "":  # the end of the first look
        pass
    assert "state        preparing" in [next(watching) for _ in range(3)]
    process.communicate("ready\n", timeout=150)
    assert "state        ready" in list(watching)


def test_nothing_is_written_and_odd_files_are_passed_over(
    tmp_path: Path, begin: Callable[[str], subprocess.Popen[str]]
) -> None:
    begin("good").communicate("ready\n", timeout=150)
    folder = tmp_path / "launches"
    for name, data in (
        ("empty", b""),
        ("zeros", b"\0" * 1_000_000),
        ("deep", b"[" * 100_000),
        ("list", b"[]"),
        ("other", json.dumps({"state": 1}).encode()),
    ):
        (folder / f"{name}.json").write_bytes(data)
    os.mkfifo(folder / "fifo.json")
    (folder / "directory.json").mkdir()
    (folder / "link.json").symlink_to(folder / "good.json")
    before = {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert [text for text in look(tmp_path) if text.startswith("launch")] == ["launch       good"]
    assert {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_cache_without_launches_is_told(tmp_path: Path, start_moai: RunIt) -> None:
    ended = start_moai("status", "--cache_dir", tmp_path, env={"TMPDIR": str(tmp_path)})
    assert ended.returncode == 0
    assert ended.stdout.startswith("no launch has left a status file under ")
    assert list(tmp_path.iterdir()) == []


def test_a_real_preparation_is_seen_at_work_and_at_its_end(
    tmp_path: Path, tokenizer_dir: Path, start_moai: RunIt
) -> None:
    """Held at its start by the lock of its plan, which this test has taken."""
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')
    flags = [
        "--dataset",
        str(tmp_path / "a.jsonl"),
        "--tokenizer_path",
        str(tokenizer_dir),
        "--cache_dir",
        str(tmp_path / "cache"),
        "--num_proc",
        "0",
    ]
    key = start_moai("plan", *flags).stdout.split()[2]
    (tmp_path / "cache" / "locks").mkdir(parents=True)
    import fcntl

    with open(tmp_path / "cache" / "locks" / f"{key}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = subprocess.Popen(
            [sys.executable, "-m", "moai", "prepare", *flags], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        while not list(
            (tmp_path / "cache" / "launches").glob("[!.]*.json") if (tmp_path / "cache" / "launches").exists() else []
        ):
            assert process.poll() is None
            time.sleep(0.01)
        lines = look(tmp_path / "cache")
        assert line(lines, "state") == "preparing"
        assert line(lines, "preparer").startswith(f"pid {process.pid} on ")
    process.communicate(timeout=150)
    lines = look(tmp_path / "cache")
    assert line(lines, "state") == "ready"
    assert line(lines, "result").startswith(str(tmp_path / "cache" / "datasets"))


ATTEMPT = """
import sys
from pathlib import Path
from moai.core import distributed
from moai.cache.staging import attempt
distributed.HEARTBEAT_SECONDS = 0.2
launch = distributed.Status.open(Path(sys.argv[1]), sys.argv[2]) if sys.argv[2:] else None
with attempt(Path(sys.argv[1]), "a" * 40):
    print("begun", flush=True)
    input()
launch and launch.end("ready")
"""


def test_work_that_is_no_launch_is_shown_by_its_attempt_as_long_as_it_is_at_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moai.pretraining.status.HEARTBEAT_SECONDS", 0.2)
    (tmp_path / "attempts" / "gc-1").mkdir(parents=True)
    (tmp_path / "attempts" / "gc-1" / "owner.json").write_bytes(canonical_json(distributed.owner()))
    process = subprocess.Popen(
        [sys.executable, "-c", ATTEMPT, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    lines = look(tmp_path)
    assert line(lines, "attempt").startswith("a" * 24)
    assert line(lines, "state") == "preparing"
    assert line(lines, "preparer").startswith(f"pid {process.pid} on ")
    assert line(lines, "heartbeat").startswith("moved 0.")
    watching = show(StatusConfig(cache_dir=str(tmp_path), watch=True))
    assert next(watching).startswith("attempt")
    process.communicate("\n", timeout=150)
    assert "no launch has left a status file" in list(watching)[-1]


def test_an_attempt_is_not_shown_beside_its_launch_and_a_killed_one_is_dead(tmp_path: Path) -> None:
    (tmp_path / "attempts").mkdir()
    for words in ([str(tmp_path), "one"], [str(tmp_path)]):
        process = subprocess.Popen(
            [sys.executable, "-c", ATTEMPT, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        process.kill()
        process.communicate()
        lines = look(tmp_path)
        assert [text for text in lines if text.startswith("launch")] == ["launch       one"]
        assert len([text for text in lines if text.startswith("attempt")]) == (len(words) == 1)
        assert all("dead: its process ended without a word" in text for text in lines if text.startswith("state"))
