"""One run an output_dir: real processes that hold it, are killed, and others that want it."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moai.core.distributed import Ranks, owner
from moai.core.errors import ConfigError
from moai.training import history, in_use
from moai.training.logs import start_logging
from moai.training.report import Summary

ROOT = Path(__file__).parents[2]
HOLDS = """
import os, sys
from pathlib import Path
from moai.core.distributed import ranks
from moai.core.errors import ConfigError
from moai.training.in_use import held
try:
    with held(Path(sys.argv[1]), ranks(os.environ), os.environ):
        print("held", flush=True)
        sys.stdin.read()
except ConfigError as error:
    print(error, flush=True)
"""


def rank(place: Path, launch: int, number: int = 0, of: int = 1) -> subprocess.Popen[str]:
    """A rank of a launch, as this process would be its launcher."""
    environ = {"RANK": str(number), "WORLD_SIZE": str(of), "LOCAL_WORLD_SIZE": str(of), "MASTER_PORT": str(launch)}
    return subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(place)],
        cwd=ROOT,
        env={**os.environ, **environ},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def word(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    return process.stdout.readline()


def test_a_place_is_held_until_the_last_rank_of_a_launch_is_gone(tmp_path: Path) -> None:
    ranks = {process.pid: process for process in (rank(tmp_path, 1, number, of=2) for number in (0, 1))}
    assert [word(process) for process in ranks.values()] == ["held\n", "held\n"]
    named = json.loads((tmp_path / in_use.NAME).read_text())["pid"]
    with rank(tmp_path, 2) as other:
        assert word(other).startswith(f"--output_dir {tmp_path}: a run is at work there (pid {named} on ")
    ranks[named].kill()
    ranks.pop(named).communicate()
    [left] = ranks.values()
    with rank(tmp_path, 2) as other:
        assert "a run is at work there" in word(other), "the one that is left still works there"
    with rank(tmp_path, 3) as other:
        left.kill()
        left.communicate()
        assert word(other) == "held\n"
        assert json.loads((tmp_path / in_use.NAME).read_text())["pid"] == other.pid
        other.communicate()


@pytest.mark.parametrize(
    ("content", "refused"),
    [
        ({}, True),
        ({"start_token": "0"}, False),
        ({"host": "elsewhere"}, False),
        (None, False),
    ],
    ids=["alive", "gone", "on another host", "garbage"],
)
def test_without_locks_the_word_of_the_file_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, content: Any, refused: bool
) -> None:
    def no_locks(descriptor: int, kind: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(in_use.fcntl, "flock", no_locks)
    said = "?" if content is None else json.dumps({**owner(), "since": "noon", "launch": ["another"], **content})
    (tmp_path / in_use.NAME).write_text(said)
    if refused:
        with pytest.raises(ConfigError, match="a run is at work there"), in_use.held(tmp_path, Ranks(), {}):
            pass
    else:
        with in_use.held(tmp_path, Ranks(), {}):
            assert json.loads((tmp_path / in_use.NAME).read_text())["launch"] != ["another"]
    assert ("no locks that tell" in caplog.text) == ("elsewhere" in said)


def test_what_stands_in_the_place_of_the_lock_is_neither_followed_nor_waited_for(tmp_path: Path) -> None:
    for put in (os.mkfifo, lambda path: path.symlink_to("/etc/passwd"), Path.mkdir):
        path = tmp_path / str(len(list(tmp_path.iterdir()))) / in_use.NAME
        path.parent.mkdir()
        put(path)
        with pytest.raises(ConfigError, match="--output_dir"), in_use.held(path.parent, Ranks(), {}):
            pass


def test_no_file_of_an_output_directory_is_waited_for(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    for name in (history.NAME, "summary.json", "logs/rank0.log"):
        os.mkfifo(tmp_path / name)
    assert Summary.load(tmp_path) is None
    history.History(tmp_path / history.NAME).begin(0, [], {})
    assert [entry["kind"] for entry in history.read(tmp_path / history.NAME)] == ["start"]
    with pytest.raises(ConfigError, match=r"logs/rank0.log: no file stands there; remove it"):
        start_logging(tmp_path, 0)
