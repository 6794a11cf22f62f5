"""A stop is a stop: within 5 s whatever the encoder is in, and what is encoded is kept, to the bit."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_law

PROGRAM = (sys.executable, str(tiny_law.ROOT / "tests" / "tiny_law.py"))
FLAGS = ("--embedding-batch-size", "1024", "--doc-batch-size", "300", "--commit-interval", "5")  # the guide's
LONGEST_SECONDS = 5.0


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("undisturbed")
    before = tiny_law.make(folder / "before.db", documents=12)
    after = folder / "after.db"
    shutil.copy(before, after)
    tiny_law.reembed(after, embedding_batch_size=1024, doc_batch_size=300, commit_interval=5)
    return before, after


def stopped(db: Path, calls: Path, *, slow: float, after: int, sent: signal.Signals) -> float:
    """Seconds from the signal, sent once `after` device batches were begun, to the end of the process."""
    env = {**os.environ, "CALLS": str(calls), "SLOW": str(slow)}
    process = subprocess.Popen([*PROGRAM, str(db), *FLAGS], env=env, stderr=subprocess.PIPE, text=True)
    while not calls.exists() or len(calls.read_text().splitlines()) <= after:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    began = time.monotonic()
    process.send_signal(sent)
    error = process.communicate(timeout=60)[1]
    took = time.monotonic() - began
    assert process.returncode == 128 + sent, error
    assert "Traceback" not in error
    return took


def encoded(calls: Path) -> int:
    return sum(int(line) for line in calls.read_text().split() if line != "loaded") if calls.exists() else 0


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_stop_inside_a_batch_keeps_all_that_is_encoded_and_the_next_run_ends_with_the_same_bits(
    undisturbed: tuple[Path, Path], tmp_path: Path, sent: signal.Signals
) -> None:
    before, after = undisturbed
    db, calls = tmp_path / "law.db", tmp_path / "calls"
    shutil.copy(before, db)
    assert stopped(db, calls, slow=0.2, after=5, sent=sent) < LONGEST_SECONDS
    done = encoded(calls)
    committed = len(tiny_law.content(db, 5))
    ((kept, batches),) = tiny_law.rows(db, "SELECT count(*), count(DISTINCT batch) FROM reembed_unfinished")
    assert tiny_law.rows(db, "SELECT state, chunks_encoded FROM reembed_runs") == [("interrupted", done)]
    assert int(str(kept)) + committed == done > 0
    assert batches == 1
    calls.unlink()
    tiny_law.reembed(db, embedding_batch_size=1024, doc_batch_size=300, commit_interval=5)
    assert tiny_law.content(db, 5) == tiny_law.content(after, 5)
    assert tiny_law.rows(db, "SELECT chunks_encoded FROM reembed_runs WHERE id = 2") == [
        (len(tiny_law.content(after, 5)) - done,)
    ]
    assert tiny_law.rows(db, "SELECT count(*) FROM reembed_unfinished") == [(0,)]


def test_a_stop_waits_for_no_device_batch_that_takes_longer(undisturbed: tuple[Path, Path], tmp_path: Path) -> None:
    db, calls = tmp_path / "law.db", tmp_path / "calls"
    shutil.copy(undisturbed[0], db)
    assert stopped(db, calls, slow=60, after=1, sent=signal.SIGTERM) < LONGEST_SECONDS
    assert tiny_law.rows(db, "SELECT state FROM reembed_runs") == [("interrupted",)]


def test_what_is_encoded_is_committed_after_a_while_though_no_batch_is_done(
    undisturbed: tuple[Path, Path], tmp_path: Path
) -> None:
    """Also what a kill leaves: here at the place behind the second commit that time asked for."""
    before, after = undisturbed
    db, calls, points = tmp_path / "law.db", tmp_path / "calls", tmp_path / "points"
    shutil.copy(before, db)
    points.mkdir()
    wanted = {
        "MOAI_TESTING": "1",
        "MOAI_FAILPOINT_DIR": str(points),
        "MOAI_FAILPOINT": "reembed.batch.committed:2=kill",
    }
    env = {**os.environ, "CALLS": str(calls), "SLOW": "0.3", **wanted}
    killed = subprocess.run([*PROGRAM, str(db), *FLAGS, "--commit_seconds", "0.5"], env=env, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    ((kept,),) = tiny_law.rows(db, "SELECT count(*) FROM reembed_unfinished")
    done = int(str(kept)) + len(tiny_law.content(db, 5))
    assert int(str(kept)) > 0
    assert done <= encoded(calls)
    calls.unlink()
    tiny_law.reembed(db, embedding_batch_size=1024, doc_batch_size=300, commit_interval=5)
    assert tiny_law.content(db, 5) == tiny_law.content(after, 5)
    assert tiny_law.rows(db, "SELECT chunks_encoded FROM reembed_runs WHERE id = 2") == [
        (len(tiny_law.content(after, 5)) - done,)
    ]
