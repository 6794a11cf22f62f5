"""Failpoints: counted over processes, taken once, and dead unless a test says so."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from moai.core.failpoints import Armed, failpoint

PASS_TWICE = "from moai.core.failpoints import failpoint\nfor _ in range(2): failpoint('here')\nprint('through')"


def run(directory: Path, wanted: str = "", testing: str = "1") -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "MOAI_TESTING": testing, "MOAI_FAILPOINT_DIR": str(directory), "MOAI_FAILPOINT": wanted}
    return subprocess.run([sys.executable, "-c", PASS_TWICE], env=env, capture_output=True, text=True, timeout=60)


def test_an_occurrence_is_counted_over_processes_and_taken_once(tmp_path: Path) -> None:
    assert run(tmp_path, "here:3=kill").stdout == "through\n"
    assert run(tmp_path, "here:3=kill").returncode == -signal.SIGKILL
    assert run(tmp_path, "here:3=kill").stdout == "through\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"here.{n}" for n in range(1, 6)]


def test_without_the_word_for_tests_nothing_is_counted_and_nothing_taken(tmp_path: Path) -> None:
    assert run(tmp_path, "here=kill", testing="").stdout == "through\n"
    assert list(tmp_path.iterdir()) == []
    failpoint("here")  # this process was not started with it


@pytest.mark.parametrize(("action", "number"), [("raise", errno.EIO), ("enospc", errno.ENOSPC)])
def test_errors_that_the_disk_would_give(tmp_path: Path, action: str, number: int) -> None:
    with pytest.raises(OSError) as raised:
        Armed(tmp_path, ("here", 1), action).reach("here", None)
    assert raised.value.errno == number


@pytest.mark.parametrize(("action", "left"), [("truncate", b"ab"), ("flip", b"abbd")])
def test_damage_to_the_file_at_hand(tmp_path: Path, action: str, left: bytes) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"abcd")
    Armed(tmp_path, ("here", 1), action).reach("here", file)
    assert file.read_bytes() == left


def test_a_pause_lasts_until_it_is_let_go(tmp_path: Path) -> None:
    env = {**os.environ, "MOAI_TESTING": "1", "MOAI_FAILPOINT_DIR": str(tmp_path), "MOAI_FAILPOINT": "here=pause"}
    process = subprocess.Popen([sys.executable, "-c", PASS_TWICE], env=env, stdout=subprocess.PIPE, text=True)
    while not (tmp_path / "here.1").exists():
        assert process.poll() is None
    assert not (tmp_path / "here.2").exists()
    (tmp_path / "go").touch()
    assert process.communicate(timeout=60)[0] == "through\n"
