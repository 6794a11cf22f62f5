"""Monitors read what a run writes: right in any time zone, right after a pause, and they never write."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import tiny_law

from moai.core.config import Setting
from moai.core.distributed import owner
from moai.core.errors import ConfigError, StorageError
from moai.core.resources import Machine
from moai.doctor import reembedding as doctor
from moai.reembedding import monitor, options
from moai.reembedding.build import build
from moai.reembedding.database import Database
from moai.reembedding.monitor import State, WatchConfig, look
from moai.reembedding.options import GIB, ReembedConfig, embedding_batch_size
from moai.reembedding.runs import SILENT_SECONDS, Sample, _is_dead, pace, parse

START = datetime(2026, 11, 21, 1, 0, tzinfo=UTC)


@pytest.fixture
def law(law: Path) -> Path:
    tiny_law.reembed(law)
    return law


def running(law: Path, *, silent_seconds: float = 0.0, seen: int = 10) -> None:
    """As if a live run were in the middle: its owner is this process."""
    at = (datetime.now(UTC) - timedelta(seconds=silent_seconds)).isoformat(timespec="milliseconds")
    tiny_law.change(
        law,
        "UPDATE reembed_runs SET state = 'running', owner = ?, heartbeat_at = ?, documents_seen = ?, "
        "characters_total = 10000, characters_seen = 9000, chunks_encoded = chunks + 7",
        (json.dumps(owner()), at, seen),
    )


def samples(*steps: tuple[float, int]) -> list[Sample]:
    """(seconds since the start, documents)"""
    return [Sample(START + timedelta(seconds=at), documents, 2 * documents) for at, documents in steps]


def test_a_rate_is_that_of_the_last_minutes_and_a_pause_does_not_count() -> None:
    assert pace(samples((0, 0))) is None
    steady = pace(samples(*((n * 10, n) for n in range(100))), window_seconds=600)
    assert steady is not None
    assert (round(steady.documents, 6), round(steady.chunks, 6), steady.seconds) == (0.1, 0.2, 600)
    paused = pace(samples((0, 0), (10, 5), (20, 10), (7220, 10), (7230, 15)))
    assert paused is not None
    assert (round(paused.documents, 6), paused.seconds) == (0.5, 30)
    resumed = pace(
        [
            Sample(START, 0, 0),
            *(
                Sample(START + timedelta(seconds=at), documents, chunks)
                for at, documents, chunks in ((1, 900, 0), (11, 900, 10), (21, 905, 20))
            ),
        ]
    )
    assert resumed is not None
    assert resumed.documents == 0.25  # 900 unchanged documents say nothing about the 5 that were encoded


def test_times_are_utc_also_where_the_database_does_not_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Asia/Seoul")
    time.tzset()
    assert parse("2026-11-21 01:00:00") == START == parse("2026-11-21T10:00:00+09:00")
    monkeypatch.undo()
    time.tzset()


def test_all_documents_are_done_when_the_short_ones_are_recorded(law: Path) -> None:
    state = look(WatchConfig(db=str(law)))
    assert (state.version_id, state.done, state.total, state.skipped, state.left) == (5, 26, 26, 2, 0)
    said = "\n".join(monitor.progress_lines(state))
    assert "26 of 26 (100.0%), 2 of them recorded without chunks" in said
    assert said.count("█" * 40) == 4


def test_what_is_left_follows_the_live_run_and_its_pace(law: Path) -> None:
    running(law)
    tiny_law.change(law, "DELETE FROM reembed_samples")
    for n in range(3):
        at = (datetime.now(UTC) - timedelta(seconds=20 - 10 * n)).isoformat(timespec="milliseconds")
        tiny_law.change(law, "INSERT INTO reembed_samples VALUES(1, ?, ?, ?, ?)", (at, 5 * n, 10 * n, 400 * n))
    state = look(WatchConfig(db=str(law)))
    assert state.is_running
    assert not state.is_paused
    assert state.left == 16
    # A tenth of the characters is left, at 40 a second. By documents, of which the short ones come first, it is 32.
    assert state.eta_seconds == pytest.approx(25, rel=0.01)
    chunks = state.run["chunks"]
    counted = f"90.0% of the characters; {chunks + 7:,} chunks encoded, {chunks:,} of them committed"
    assert counted in "\n".join(monitor.progress_lines(state))
    said = "\n".join(monitor.performance_lines(state))
    assert state.pace is not None
    assert (state.pace.documents, state.pace.chunks) == (pytest.approx(0.5, rel=0.01), pytest.approx(1, rel=0.01))
    assert " s a document, " in said
    assert "very fast" in said


def test_the_verdict_has_the_old_programs_words() -> None:
    assert [monitor.verdict(seconds) for seconds in (4.9, 5, 15, 30)] == ["very fast", "fast", "normal", "slow"]


def test_a_stopped_process_shows_as_paused_and_a_killed_one_as_died(law: Path) -> None:
    running(law, silent_seconds=120)
    assert "paused" in "\n".join(monitor.progress_lines(look(WatchConfig(db=str(law)))))
    tiny_law.change(law, "UPDATE reembed_runs SET owner = ?", (json.dumps({**owner(), "start_token": "0"}),))
    assert "1 died" in "\n".join(monitor.progress_lines(look(WatchConfig(db=str(law)))))


def test_the_speed_monitor_says_what_came_in_and_sums_up_what_it_watched(law: Path) -> None:
    state = replace(look(WatchConfig(db=str(law))), is_running=True)
    types = state.by_type
    states = iter(
        [_with(state, types, done, START + timedelta(seconds=at)) for at, done in ((0, 5), (60, 8), (120, 14))]
    )

    def interrupted(seconds: float, calls: list[float] = []) -> None:  # noqa: B006
        calls.append(seconds)
        if len(calls) == 3:
            raise KeyboardInterrupt

    said: list[str] = []
    monitor.follow(lambda: next(states), said.append, interval=60, pause=interrupted)
    assert [line.split(" | ")[1] for line in said[:3]] == ["+0", "+3", "+6"]
    assert said[-1].startswith("watched 0:02:00: +9 documents")
    assert "270 documents an hour, 13.333 s a document; 14 of 26 done" in said[-1]


def _with(state: State, types: dict[str, object], done: int, at: datetime) -> State:
    first = next(iter(types))
    cleared = {name: replace(of, done=done if name == first else 0) for name, of in state.by_type.items()}
    return replace(state, by_type=cleared, at=at)


def test_the_scripts_run_as_the_guide_writes_them_and_write_nothing(law: Path) -> None:
    before = tiny_law.rows(law, "SELECT * FROM reembed_runs")
    for script in ("monitor_re_embedding_progress.py", "check_re_embedding_performance.py"):
        done = subprocess.run(
            [sys.executable, str(tiny_law.ROOT / "scripts" / script), "--db", str(law), "--version-id", "5"],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert "26 of 26" in done.stdout
    assert tiny_law.rows(law, "SELECT * FROM reembed_runs") == before
    with Database.open(law) as db, pytest.raises(Exception, match=r"(?i)read-?only"):
        db.run("DELETE FROM reembed_runs")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_bar_of_a_terminal_ends_full_and_on_its_own_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, terminal = tiny_law.make(tmp_path / "law.db"), Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    build(ReembedConfig(db=str(path), version_id=5), model=tiny_law.HashingModel(), environ={})
    assert (
        terminal.getvalue().rpartition("\r")[2].startswith(f"[{'#' * 30}] 100% of the characters, 26 of 26 documents")
    )
    assert terminal.getvalue().endswith("\033[K\n")


def test_ctrl_c_ends_the_speed_monitor_with_a_summary(law: Path) -> None:
    running(law)
    process = subprocess.Popen(
        [sys.executable, "scripts/monitor_re_embedding_speed.py", "--db", str(law), "--interval", "30"],
        cwd=tiny_law.ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TZ": "Asia/Seoul"},
    )
    assert process.stdout
    first = process.stdout.readline()
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=60)[0]
    assert first[:2] == datetime.now(UTC).strftime("%H") or datetime.now(UTC).minute == 0
    assert "watched 0:00:00" in rest
    assert process.returncode == 0


def test_intervals_and_windows_that_no_clock_has(law: Path) -> None:
    for words in (
        "--interval nan",
        "--interval inf",
        "--interval 0",
        "--lines 0",
        "--window -5",
        f"--version-id {2**70}",
    ):
        with pytest.raises(ConfigError, match=words.split()[0].removeprefix("--").replace("-", "_") + " = "):
            monitor.speed(["--db", str(law), *words.split()], {})


def test_the_summary_is_said_also_where_the_database_goes_away(law: Path) -> None:
    state = replace(look(WatchConfig(db=str(law))), is_running=True)
    looks = iter([state])

    def once() -> State:
        for found in looks:
            return found
        raise StorageError("gone")

    said: list[str] = []
    with pytest.raises(StorageError):
        monitor.follow(once, said.append, interval=60, pause=lambda _: None)
    assert said[-1].startswith("watched 0:00:00")


def test_of_a_version_that_another_program_made_it_says_where_to_look(law: Path) -> None:
    assert "moai reembed versions says what is in version 1" in "\n".join(
        monitor.progress_lines(look(WatchConfig(db=str(law), version_id=1)))
    )


def test_a_database_without_a_run_says_how_to_start_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="python -m moai reembed"):
        look(WatchConfig(db=str(tiny_law.make(tmp_path / "law.db"))))


def test_the_guides_sizes_with_tolerance_for_what_a_card_reports() -> None:
    sizes = {(7, 0): 512, (8, 0): 1024, (10, 0): 1536, (15.7, 0): 2048, (8, 3.9): 2048, (8, 7.8): 4096, (8, 2): 1024}
    for (memory, cuda), size in sizes.items():
        assert embedding_batch_size(int(memory * GIB), cuda_bytes=int(cuda * GIB) or None).value == size


def test_specs_recommend_by_what_this_process_may_use() -> None:
    small = Machine(
        cpus=Setting(2, "cgroup v2"),
        memory_bytes=Setting(6 * GIB, "cgroup v2"),
        total_memory_bytes=64 * GIB,
        disk_free_bytes=10 * GIB,
        gpus=0,
    )
    said = list(doctor.specs_lines(small, None))
    assert said[0] == "CPUs       2 (cgroup v2)"
    assert said[-1] == "use        --doc-batch-size 100 --embedding-batch-size 512 --commit-interval 5"
    large = replace(small, memory_bytes=Setting(32 * GIB, "MemAvailable"))
    assert doctor.recommended(large, None) == {
        "doc-batch-size": 500,
        "embedding-batch-size": 2048,
        "commit-interval": 5,
    }


def test_threads_are_those_this_process_may_use() -> None:
    machine = Machine(
        cpus=Setting(2, "affinity"), memory_bytes=Setting(GIB, ""), total_memory_bytes=GIB, disk_free_bytes=GIB, gpus=0
    )
    said = "\n".join(doctor.threads_lines(False, machine, {"OMP_NUM_THREADS": "1"}))
    assert "CPUs       2 (affinity)" in said
    assert "OMP_NUM_THREADS=1" in said


def test_a_run_of_another_container_is_dead_once_it_is_silent_and_not_before() -> None:
    """Its host may have the name of this one, and its pid may be anybody's."""
    who = {**owner(), "pid_namespace": "pid:[1]"}
    now = datetime.now(UTC)
    assert not _is_dead(who, now.isoformat())
    assert _is_dead(who, (now - timedelta(seconds=SILENT_SECONDS + 5)).isoformat())
    assert not _is_dead(owner(), (now - timedelta(seconds=SILENT_SECONDS + 5)).isoformat())


@pytest.mark.parametrize(
    ("memory", "doc_batch", "chunks", "cache", "mapped"),
    [(8, 200, 1024, -128_000, 256), (16, 300, 2048, -256_000, 512), (32, 500, 2048, -512_000, 1024)],
)
def test_the_specs_are_the_guides_for_8_16_and_32_gb(
    memory: int, doc_batch: int, chunks: int, cache: int, mapped: int
) -> None:
    machine = Machine(
        cpus=Setting(8, "affinity"),
        memory_bytes=Setting(memory * GIB, "MemAvailable"),
        total_memory_bytes=memory * GIB,
        disk_free_bytes=10 * GIB,
        gpus=0,
    )
    said = doctor.recommended(machine, None)
    assert (said["doc-batch-size"], said["embedding-batch-size"], said["commit-interval"]) == (doc_batch, chunks, 5)
    assert options.pragmas(memory * GIB) == {"cache_size": cache, "mmap_size": mapped * 2**20}
