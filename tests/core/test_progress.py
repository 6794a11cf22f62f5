"""A person who waits sees how far it is: lines where it is written to a file, a bar in a terminal."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys

import pytest

from moai.core import progress
from moai.core.progress import Waiting, clock

SLOW = """
import logging, sys, time
from moai.core.progress import Waiting
logging.basicConfig(format="%(message)s", level=logging.INFO)
with Waiting("Reading", total=40_000_000, unit="MB", scale=1e6) as waiting:
    for number in range(35):
        time.sleep(0.1)
        waiting.add(1_000_000)
    logging.info("in between")
"""


def test_in_a_file_it_is_whole_lines(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_FIRST_SECONDS", 0.05)
    with caplog.at_level("INFO"), Waiting("Reading", total=100) as waiting:
        waiting.add(25)
        while not caplog.messages:
            pass
    assert re.fullmatch(r"Reading: 25%, 25 of 100, [\d,.]+/s, about 0:00 left", caplog.messages[0])


def test_what_is_over_soon_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"), Waiting("Reading"):
        pass
    assert not caplog.messages


def test_in_a_terminal_it_is_a_bar_which_log_lines_do_not_run_into() -> None:
    main, terminal = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", SLOW], stderr=terminal)
    os.close(terminal)
    said = b""
    try:
        while block := os.read(main, 4096):
            said += block
    except OSError:  # how Linux says that nobody holds the terminal any more
        pass
    assert process.wait() == 0
    assert re.search(rb"\r\[#+ +\] Reading: \d+%, \d+ of 40 MB, [\d.]+ MB/s, about 0:0\d left\x1b\[K", said)
    assert b"\x1b[Kin between" in said


def test_other_ranks_write_there_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    said: list[str] = []
    reporter = progress.Reporter(said.append)
    reporter.tell(lambda: "half", 0.5, is_due=True)
    assert said == ["half"]


def test_clock() -> None:
    assert [clock(seconds) for seconds in (4.9, 64, 7384)] == ["0:04", "1:04", "2:03:04"]
