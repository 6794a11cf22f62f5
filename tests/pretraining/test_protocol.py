"""Prepare or wait, with real processes: who works, who waits, and what each of them says when it goes wrong."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moai.core.distributed import Ranks, Status, build_once, cache_scope, launch_id, ranks, start_token, status_folders
from moai.core.errors import ConfigError, PreparationFailed
from moai.sources.streams import open_blocks

ROOT = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
WORDS = "--seq_len 256 --packing bfd_split --shard_bytes 200kB --num_proc 1 --tokenizer_backend tokenizers"
FLAGS = ["--tokenizer_path", str(ROOT / "tokenizers" / "demo"), *WORDS.split()]
# The reference is slow enough to be disturbed in the middle of its work.
RANK = str(ROOT / "tests" / "rank.py")
ENDS_WITHIN = 600  # seconds; FAULTS allow 10 after a death, the rest is a busy machine. Longer is a hang.


@pytest.fixture(scope="session")
def long_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough work that a launch can be disturbed in the middle of it."""
    path = tmp_path_factory.mktemp("long") / "long.jsonl"
    english = b"".join(open_blocks(str(ROOT / "data" / "demo" / "en.jsonl.zst"), "zst", 1 << 20))
    path.write_bytes(b"".join(english.replace(b'{"', b'{"copy":%d,"' % copy) for copy in range(4)))
    return path


class Launch:
    """Three ranks under a launcher that leaves each of them to itself."""

    def __init__(self, folder: Path, dataset: Path, *flags: str, world_size: int = 3, read_only: bool = False) -> None:
        self.folder, self.cache = folder, folder / "cache"
        self.cache.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, RANK, "--dataset", str(dataset), "--cache_dir", str(self.cache), *FLAGS, *flags]
        launcher = [sys.executable, str(ROOT / "tests" / "launch.py"), str(world_size)]
        self.process = subprocess.Popen(
            [*launcher, str(self.cache) if read_only else "-", *command], cwd=folder, stdout=subprocess.PIPE, text=True
        )

    def finished_shards(self) -> int:
        return len(list((self.cache / "shards").glob("[!.]*.json")))

    def status(self) -> dict[str, Any]:
        [path] = (self.cache / "launches").glob("[!.]*.json")
        return dict(json.loads(path.read_bytes()))

    def end(self) -> list[int]:
        """Exit codes by rank."""
        out, _ = self.process.communicate(timeout=ENDS_WITHIN)
        return [int(code) for code in out.split()]

    def said(self, rank: int) -> str:
        return (self.folder / f"rank{rank}").read_text()


def wait_until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 600
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def can_mount(folder: Path) -> bool:
    return (
        shutil.which("unshare") is not None
        and subprocess.run(["unshare", "--mount", "mount", "--bind", folder, folder], capture_output=True).returncode
        == 0
    )


def test_one_prepares_and_the_others_write_nothing(tmp_path: Path) -> None:
    """The others see the cache mounted read-only: a single write of theirs would fail."""
    if not can_mount(tmp_path):
        pytest.skip("needs the right to mount")
    launch = Launch(tmp_path, ROOT / "data" / "demo", read_only=True)
    assert launch.end() == [0, 0, 0]
    said = [launch.said(rank) for rank in range(3)]
    assert len({text.splitlines()[-1].partition("holds")[2] for text in said}) == 1
    assert "[Rank 0] Saving final dataset to:" in said[0]
    for rank in (1, 2):
        assert f"[Rank {rank}] Waiting for rank 0 to complete all processing..." in said[rank]
        assert f"[Rank {rank}] Loaded from disk in " in said[rank]
        assert "Preparing" not in said[rank]


def test_others_learn_the_cause_when_the_preparer_fails(tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "fine"}\n' * 20 + '{"text": broken}\n' * 20)
    launch = Launch(tmp_path, bad)
    assert launch.end() == [65, 75, 75]
    for rank in (1, 2):
        last = launch.said(rank).splitlines()[-1]
        assert "rank 0 failed while it prepared the data: TooManyBadRecords: 20 of 40 records" in last
        assert "bad.jsonl line 21 (broken JSON" in last


def test_others_end_when_the_preparer_is_killed_and_a_rerun_goes_on(tmp_path: Path, long_corpus: Path) -> None:
    launch = Launch(tmp_path, long_corpus)
    wait_until(lambda: launch.finished_shards() >= 3)
    os.kill(launch.status()["pid"], signal.SIGKILL)
    assert launch.end() == [-signal.SIGKILL, 75, 75]
    for rank in (1, 2):
        assert "died while it prepared the data, without a word" in launch.said(rank)
    finished = launch.finished_shards()
    again = Launch(tmp_path, long_corpus)
    assert again.end() == [0, 0, 0]
    assert f"{finished} reused" in again.said(0)


def test_others_learn_when_the_preparer_is_told_to_stop(tmp_path: Path, long_corpus: Path) -> None:
    launch = Launch(tmp_path, long_corpus)
    wait_until(lambda: launch.finished_shards() >= 1)
    os.kill(launch.status()["pid"], signal.SIGTERM)
    assert launch.end() == [143, 75, 75]
    assert "rank 0 was interrupted while it prepared the data" in launch.said(1)


def test_a_waiting_rank_told_to_stop_ends_and_disturbs_nobody(tmp_path: Path, long_corpus: Path) -> None:
    launch = Launch(tmp_path, long_corpus)
    wait_until(lambda: launch.finished_shards() >= 1)
    waiting = [pid for pid in children(launch.process.pid) if pid != launch.status()["pid"]]
    os.kill(waiting[0], signal.SIGTERM)
    codes = launch.end()
    assert codes[0] == 0
    assert sorted(codes[1:]) == [0, 143]


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_two_launches_of_one_plan_do_the_work_once(tmp_path: Path, long_corpus: Path) -> None:
    shared = ("--cache_dir", str(tmp_path / "cache"))
    first, second = (Launch(tmp_path / name, long_corpus, *shared, world_size=1) for name in ("a", "b"))
    assert first.end() == second.end() == [0]
    said = first.said(0) + second.said(0)
    assert said.count("Dataset saved in") == 1
    assert said.count("Found prepared") == 1
    assert len(list((tmp_path / "cache" / "datasets").iterdir())) == 1


def test_two_launches_without_locks_end_with_the_same_directory(
    tmp_path: Path, long_corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both work, one publishes, both hold the same: the lock only saves work."""
    monkeypatch.setenv("MOAI_TESTING", "1")
    monkeypatch.setenv("MOAI_WEATHER", "nolocks")
    launches = [
        Launch(tmp_path / name, long_corpus, "--cache_dir", str(tmp_path / "cache"), world_size=1)
        for name in ("a", "b")
    ]
    assert [launch.end() for launch in launches] == [[0], [0]]
    said = [launch.said(0) for launch in launches]
    assert all("no locks here" in text for text in said)
    assert len({text.splitlines()[-1] for text in said}) == 1
    assert len(list((tmp_path / "cache" / "datasets").iterdir())) == 1
    assert not list((tmp_path / "cache" / "attempts").iterdir())


def test_torchrun_ends_everybody_with_the_cause(tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": broken}\n' * 20)
    launcher = [*TORCHRUN, "--standalone", "--nproc_per_node", "3", "--log_dir", str(tmp_path / "logs")]
    places = ["--dataset", str(bad), "--cache_dir", str(tmp_path / "cache")]
    command = [*launcher, "--redirects", "3", RANK, *places, *FLAGS]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert ended.returncode != 0
    said = {path.parent.name: path.read_text() for path in (tmp_path / "logs").rglob("stderr.log")}
    assert "none of its first records is a JSON object" in said["0"]
    for rank in ("1", "2"):
        assert "rank 0 failed while it prepared the data: SourceError" in said[rank]


@pytest.mark.parametrize("scope", ["shared", pytest.param("node", marks=pytest.mark.long)])
def test_two_nodes_prepare_once_in_a_shared_cache_and_once_each_in_their_own(tmp_path: Path, scope: str) -> None:
    """Two agents stand for two nodes; they know each other only by their store."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    agents = []
    for node in range(2):
        cache = tmp_path / ("cache" if scope == "shared" else f"cache{node}")
        where = f"--nnodes 2 --node_rank {node} --nproc_per_node 2 --master_addr 127.0.0.1 --master_port {port}"
        launcher = [*TORCHRUN, *where.split(), "--log_dir", str(tmp_path / f"logs{node}"), "--redirects", "3"]
        places = ["--dataset", str(ROOT / "data" / "demo_next"), "--cache_dir", str(cache), "--cache_scope", scope]
        command = [*launcher, RANK, *places, *FLAGS]
        agents.append(subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
    assert [agent.wait(timeout=600) for agent in agents] == [0, 0]
    said = [path.read_text() for node in range(2) for path in (tmp_path / f"logs{node}").rglob("stderr.log")]
    assert len(said) == 4
    assert sum("Dataset saved in" in text for text in said) == (1 if scope == "shared" else 2)
    held = {path.read_text() for node in range(2) for path in (tmp_path / f"logs{node}").rglob("stdout.log")}
    assert len({text.partition("holds")[2] for text in held}) == 1


def test_of_two_nodes_with_caches_of_their_own_each_prepares(tmp_path: Path) -> None:
    second = Ranks(rank=2, local_rank=0, world_size=4, local_world_size=2)
    given = alone(ranks=second, environ={"MOAI_LAUNCH_ID": "nodes"}, stall_timeout=0.5)
    assert build_once(lambda report: {"x": 1}, cache=tmp_path, **{**given, "scope": "node"}) == {"x": 1}
    with pytest.raises(PreparationFailed, match="no sign of rank 0"):
        build_once(lambda report: {"x": 1}, cache=tmp_path / "shared", **{**given, "scope": "shared"})


def alone(**changes: Any) -> dict[str, Any]:
    return {"ranks": Ranks(), "scope": "auto", "stall_timeout": 60.0, "environ": {}, **changes}


def test_a_preparer_without_progress_counts_as_failed_on_my_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environ = {"MOAI_LAUNCH_ID": "stall"}
    released = threading.Event()

    def prepare(report: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        report({"line": "at shard 7"})
        released.wait()
        return {"x": 1}

    preparer = threading.Thread(
        target=lambda: build_once(prepare, cache=tmp_path, **alone(ranks=Ranks(0, 0, 2, 2), environ=environ))
    )
    preparer.start()
    try:
        with pytest.raises(PreparationFailed, match=r"no progress for 4 s \(last heard: at shard 7\)"):
            build_once(prepare, cache=tmp_path, **alone(ranks=Ranks(1, 1, 2, 2), environ=environ, stall_timeout=4.0))
    finally:
        released.set()
        preparer.join()
    assert build_once(prepare, cache=tmp_path, **alone(ranks=Ranks(1, 1, 2, 2), environ=environ)) == {"x": 1}


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\0" * 1_000_000, b"[]", b'{"state": "odd"}'], ids=["empty", "cut", "zeros", "list", "odd"]
)
def test_garbage_where_the_status_file_should_be_is_no_sign_of_life(tmp_path: Path, content: bytes) -> None:
    environ = {"MOAI_LAUNCH_ID": "garbage"}
    name = launch_id(Ranks(1, 1, 2, 2), shared=True, environ=environ)
    folder = status_folders(tmp_path)[0]
    folder.mkdir(parents=True)
    (folder / f"{name}.json").write_bytes(content)
    with pytest.raises(PreparationFailed, match="no sign of rank 0"):
        build_once(
            lambda report: {}, cache=tmp_path, **alone(ranks=Ranks(1, 1, 2, 2), environ=environ, stall_timeout=0.5)
        )


@pytest.mark.parametrize(
    ("pid", "token", "host"),
    [(2**22 - 3, "1", None), ("mine", "1", None), ("mine", "right", "another-host")],
    ids=["dead pid", "reused pid", "silent other host"],
)
def test_a_marker_of_a_dead_preparer_is_seen_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pid: Any, token: str, host: str | None
) -> None:
    monkeypatch.setattr("moai.core.distributed.DEAD_SECONDS", 0.5)
    environ = {"MOAI_LAUNCH_ID": "dead"}
    status = Status(tmp_path / "made-by-hand.json")
    status.end("preparing")
    content = json.loads(status.path.read_bytes())
    content["pid"] = os.getpid() if pid == "mine" else pid
    content["start_token"] = start_token(os.getpid()) if token == "right" else token
    content["host"] = host or socket.gethostname()
    folder = status_folders(tmp_path)[0]
    folder.mkdir(parents=True)
    (folder / f"{launch_id(Ranks(1, 1, 2, 2), shared=True, environ=environ)}.json").write_text(json.dumps(content))
    with pytest.raises(PreparationFailed, match="died while it prepared" if host is None else "gave no heartbeat"):
        build_once(lambda report: {}, cache=tmp_path, **alone(ranks=Ranks(1, 1, 2, 2), environ=environ))


def test_each_launch_has_its_own_name() -> None:
    two = Ranks(1, 1, 2, 2)
    first = launch_id(two, shared=True, environ={"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "0"})
    assert first == launch_id(
        Ranks(0, 0, 2, 2), shared=True, environ={"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "0"}
    )
    assert first != launch_id(
        two, shared=True, environ={"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "1"}
    )
    assert launch_id(Ranks(), shared=True, environ={}) != launch_id(Ranks(), shared=True, environ={})
    with pytest.raises(ConfigError, match="set MOAI_LAUNCH_ID"):
        launch_id(Ranks(2, 0, 4, 2), shared=True, environ={})


def test_the_cache_scope_follows_the_file_system(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(f"/dev/vda / ext4 rw 0 0\nserver:/x {tmp_path}/shared\\040folder nfs4 rw 0 0\n")
    (tmp_path / "shared folder").mkdir()
    assert cache_scope(tmp_path / "shared folder" / "cache", "auto", mounts) == "shared"
    assert cache_scope(tmp_path / "cache", "auto", mounts) == "node"
    assert cache_scope(tmp_path / "cache", "shared", mounts) == "shared"


def test_ranks_come_from_the_launcher_or_are_refused() -> None:
    assert ranks({}) == Ranks(0, 0, 1, 1)
    assert ranks({"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}) == Ranks(5, 1, 8, 4)
    assert ranks({"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}).nodes == 2
    for wrong in ({"RANK": "x"}, {"RANK": "2", "WORLD_SIZE": "2"}):
        with pytest.raises(ConfigError):
            ranks(wrong)


@pytest.mark.long
@pytest.mark.parametrize(("action", "deadline"), [("raise", 5.0), ("kill", 10.0)])
def test_waiting_ranks_end_within_the_deadline(
    action: str, deadline: float, tmp_path: Path, record: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the moment rank 0 raises or is killed until the last of the other ranks has ended."""
    monkeypatch.setenv("MOAI_TESTING", "1")
    monkeypatch.setenv("MOAI_FAILPOINT", f"dataset.manifest={action}")
    seconds = []
    for number in range(20):
        folder, points = tmp_path / str(number), tmp_path / f"points{number}"
        points.mkdir()
        monkeypatch.setenv("MOAI_FAILPOINT_DIR", str(points))
        launch = Launch(folder, ROOT / "data" / "demo")
        wait_until((points / "dataset.manifest.1").exists)
        started = time.monotonic()
        codes = launch.end()
        seconds.append(time.monotonic() - started)
        assert codes[0] in (1, -signal.SIGKILL)
        assert codes[1:] == [75, 75]
    said = f"median {statistics.median(seconds):.2f}, worst {max(seconds):.2f} (deadline {deadline:.0f})"
    record(
        f"seconds until the waiting ranks ended, after {'a raise' if action == 'raise' else 'SIGKILL'} in rank 0",
        20,
        said,
    )
    assert max(seconds) < deadline
