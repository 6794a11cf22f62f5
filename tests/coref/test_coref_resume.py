"""The same bytes for any number of workers, and after SIGKILL of a worker, of the run, and of both, wherever it
hits.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from coref_corpus import contents, news, wordpiece, write

from moai import coref as entity_coref
from moai.core.config import Setting
from moai.core.resources import GB, Machine
from moai.coref.options import CorefConfig

ROOT = Path(__file__).parents[2]
DOCUMENTS = 24
FLAGS = ("--seq-len", "512", "--shard-bytes", "6000", "--token-chunk-size", "60", "--max-entity-freq", "9")
OPTIONS = {"seq_len": 512, "shard_bytes": 6000, "token_chunk_size": 60, "max_entity_freq": 9}

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(a file of some 12 shards, a model)"""
    folder = tmp_path_factory.mktemp("data")
    return write(folder / "news.jsonl", [news(seed) for seed in range(DOCUMENTS)]), wordpiece(folder / "wp")


@pytest.fixture(scope="module")
def undisturbed(data: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    files = contents(here(data, tmp_path_factory.mktemp("undisturbed")))
    assert len([name for name in files if name.endswith(".arrow")]) > 2
    return files


def here(data: tuple[Path, Path], output: Path) -> Path:
    config = CorefConfig(input=(str(data[0]),), model=str(data[1]), output_dir=str(output), num_workers=0, **OPTIONS)  # type: ignore[arg-type]
    return entity_coref.prepare(config, origins={"num_workers": "flag"})


@pytest.fixture
def start(data: tuple[Path, Path], tmp_path: Path) -> Start:
    """`start(workers, failpoint)`: the script in a process of its own, with a failpoint armed if one is named."""

    def popen(workers: int, failpoint: str = "", *flags: str) -> subprocess.Popen[str]:
        (tmp_path / "points").mkdir(exist_ok=True)
        command = [
            sys.executable,
            ROOT / "scripts" / "prepare_entity_coref_v2.py",
            "--input",
            data[0],
            "--model",
            data[1],
            "--output-dir",
            tmp_path / "out",
            *FLAGS,
        ]
        environment = {
            **os.environ,
            "MOAI_TESTING": "1",
            "MOAI_FAILPOINT_DIR": str(tmp_path / "points"),
            "MOAI_FAILPOINT": failpoint,
        }
        return subprocess.Popen(
            [*map(str, command), *flags, "--num-workers", str(workers)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    return popen


@pytest.mark.parametrize("workers", [5, *(pytest.param(number, marks=pytest.mark.long) for number in (1, 2))])
def test_workers_do_not_change_a_byte_and_the_guides_commands_find_their_lines(
    start: Start, undisturbed: dict[str, bytes], tmp_path: Path, workers: int
) -> None:
    process = start(workers)
    said, _ = process.communicate(timeout=100)
    assert process.returncode == 0, said
    assert contents(Path(said.splitlines()[-1])) == undisturbed
    assert len(list((tmp_path / "points").glob("coref.document.*"))) == DOCUMENTS  # Kiwi ran once a document
    lines = said.splitlines()
    assert f"[1/2] 배치 병렬 품질 필터링 ({workers} 워커)" in lines
    assert any(
        line.startswith(" → 24개 통과 | 누적: 24개 | 평균 속도:") for line in lines
    )  # grep "통과" LOG | tail -10
    assert any("총 샘플 수" in line and "배치 수" in line for line in lines)  # grep "배치" LOG | tail -1
    assert (tmp_path / "out" / "entity_coref_v2_512.progress.jsonl").read_text().count('"stage"') >= 2


def test_a_killed_worker_costs_no_sample(
    start: Start, data: tuple[Path, Path], undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    process = start(2, "coref.document:13=kill")
    said, _ = process.communicate(timeout=100)
    assert (tmp_path / "points" / "coref.document.13").exists()
    assert process.returncode == 0 or "news.jsonl:" in said, (
        said
    )  # either the engine does the shard again, or the run names it and ends
    assert contents(here(data, tmp_path / "out")) == undisturbed


def test_spawned_workers_give_the_same_bytes_and_may_be_killed_too(
    start: Start, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    process = start(2, "coref.document:13=pause", "--start-method", "spawn")
    waiting = tmp_path / "points" / "coref.document.13"
    wait_until(lambda: waiting.exists() and waiting.read_text() != "")
    worker = int(waiting.read_text())
    assert psutil.Process(worker).ppid() == process.pid  # a forked one is another process's child
    os.kill(worker, signal.SIGKILL)
    said, _ = process.communicate(timeout=100)
    assert process.returncode == 0, said
    assert f"worker {worker} was killed by SIGKILL (from outside) at record" in said
    assert contents(Path(said.splitlines()[-1])) == undisturbed


def test_where_a_loaded_process_cannot_be_forked_memory_sizes_the_workers(
    data: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(
        cpus=Setting(16, "all cores"),
        memory_bytes=Setting(8 * GB, "MemAvailable"),
        total_memory_bytes=8 * GB,
        disk_free_bytes=GB,
        gpus=0,
    )
    monkeypatch.setattr("moai.core.resources.detect", lambda *_, **__: machine)
    config = CorefConfig(input=(str(data[0]),), model=str(data[1]), output_dir=str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    assert entity_coref.start_method(config).value == "forkserver"
    forked = entity_coref.machine_plan(config, {"num_workers": "default"}, {}).num_proc
    monkeypatch.setattr(sys, "platform", "darwin")
    assert entity_coref.start_method(config).value == "spawn"
    spawned = entity_coref.machine_plan(config, {"num_workers": "default"}, {}).num_proc
    assert (forked.value, spawned.value) == (6, 2)  # a quarter of 8 GB, by 0.31 and by 0.81 GB
    assert "0.81 GB a worker" in spawned.reason


@pytest.mark.parametrize("who", ["both", pytest.param("run", marks=pytest.mark.long)])
def test_the_run_killed_within_a_shard_goes_on_from_what_was_finished(
    start: Start,
    data: tuple[Path, Path],
    undisturbed: dict[str, bytes],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    who: str,
) -> None:
    process = start(2, "coref.document:13=pause")
    waiting = tmp_path / "points" / "coref.document.13"
    wait_until(lambda: waiting.exists() and waiting.read_text() != "")
    worker = os.pidfd_open(int(waiting.read_text()))
    if who == "both":
        signal.pidfd_send_signal(worker, signal.SIGKILL)
    process.kill()
    process.communicate()
    assert select.select([worker], [], [], 20)[0], "a worker outlived its driver"
    assert not (tmp_path / "out" / "entity_coref_v2_512").exists()
    assert list((tmp_path / "out" / "cache_entity_coref" / "attempts").iterdir())
    with caplog.at_level("INFO"):
        assert contents(here(data, tmp_path / "out")) == undisturbed
    assert ", 0 reused" not in caplog.text
    assert list((tmp_path / "out" / "cache_entity_coref" / "attempts").iterdir()) == []


@pytest.mark.parametrize(
    "failpoint",
    [
        "coref.publish=kill",
        *(
            pytest.param(point, marks=pytest.mark.long)
            for point in ("stage.decided=kill", "coref.samples:2=kill", "coref.samples:1=enospc")
        ),
    ],
)
def test_a_death_between_two_steps_changes_nothing(
    start: Start, data: tuple[Path, Path], undisturbed: dict[str, bytes], tmp_path: Path, failpoint: str
) -> None:
    process = start(2, failpoint)
    said, _ = process.communicate(timeout=100)
    if "samples" not in failpoint:
        assert process.returncode == -signal.SIGKILL, said
        assert not (tmp_path / "out" / "entity_coref_v2_512").exists()
    assert contents(here(data, tmp_path / "out")) == undisturbed


@pytest.mark.long
def test_a_death_while_one_corpus_replaces_another_leaves_the_old_one_aside(
    start: Start, data: tuple[Path, Path], undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    config: dict[str, Any] = {
        "input": (str(data[0]),),
        "model": str(data[1]),
        "output_dir": str(tmp_path / "out"),
        "num_workers": 0,
        **OPTIONS,
    }
    old = contents(entity_coref.prepare(CorefConfig(**{**config, "max_entity_freq": 2}), origins={}))
    from moai.coref import publishing

    class Killed(Exception):
        pass

    def die(name: str, file: Path | None = None) -> None:
        if name == "coref.aside":
            raise Killed

    before, publishing.failpoint = publishing.failpoint, die  # type: ignore[assignment]
    try:
        with pytest.raises(Killed):
            entity_coref.prepare(CorefConfig(**config, replace=True), origins={})
    finally:
        publishing.failpoint = before
    (aside,) = (tmp_path / "out").glob("*replaced*")
    assert contents(aside) == old
    assert contents(here(data, tmp_path / "out")) == undisturbed


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
