"""Signals: the first is an error with an exit code, what a launcher passes on afterwards is not a second, an impatient
one ends it all.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from moai.core.errors import Interrupted
from moai.core.stopping import stoppable

ROOT = Path(__file__).parents[2]

TIDYING = """
import os, signal, sys
from moai.core.stopping import stoppable
first, second = (signal.Signals[name] for name in sys.argv[1:])
try:
    with stoppable("all is kept"):
        try:
            os.kill(os.getpid(), first)
        finally:
            os.kill(os.getpid(), second)
            print("tidied up", flush=True)
except Exception as error:
    sys.exit(f"{error} {error.exit_code}")
"""


LOST = """
import os, signal, time
from moai.core import stopping
stopping._TIDY_SECONDS = 0.2
class Lost:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0)
with stopping.stoppable("all is kept"):
    Lost()
    time.sleep(60)
"""


def lose_and(then: Callable[[], object]) -> None:
    with stoppable("all is kept"):
        with contextlib.suppress(BaseException):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0)
        then()


@pytest.mark.parametrize("then", [lambda: None, lambda: 1 / 0], ids=["nothing", "an error"])
def test_a_signal_that_is_lost_is_raised_when_its_block_is_left(then: Callable[[], object]) -> None:
    with pytest.raises(Interrupted, match="stopped by SIGTERM; all is kept"):
        lose_and(then)


def test_a_signal_that_is_lost_in_a_destructor_ends_the_process_all_the_same() -> None:
    ran = subprocess.run([sys.executable, "-c", LOST], capture_output=True, text=True, timeout=30)
    assert (ran.returncode, ran.stderr.splitlines()[-1]) == (143, "stopped by SIGTERM; all is kept")


IMPORTING = """
import os, runpy, signal, sys
class SignalAt:
    def find_spec(self, name, path=None, target=None):
        if name == sys.argv[2]:
            os.kill(os.getpid(), signal.Signals[sys.argv[3]])
sys.meta_path.insert(0, SignalAt())
sys.path.insert(0, os.getcwd())
run = runpy.run_path if sys.argv[1].endswith(".py") else runpy.run_module
run(sys.argv[1], run_name="__main__")
"""


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(("program", "module"), [("moai", "moai.cli"), ("train.py", "moai.training.command")])
def test_a_signal_while_a_program_is_imported_is_one_line(program: str, module: str, signum: signal.Signals) -> None:
    command = [sys.executable, "-c", IMPORTING, program, module, signum.name]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 128 + signum
    assert ran.stderr == f"stopped by {signum.name}; what is finished is kept\n"


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_an_error_that_names_it(signum: signal.Signals) -> None:
    before = signal.getsignal(signum)
    with (
        pytest.raises(Interrupted, match=f"stopped by {signum.name}; all is kept") as stopped,
        stoppable("all is kept"),
    ):
        os.kill(os.getpid(), signum)
    assert stopped.value.exit_code == 128 + signum
    assert signal.getsignal(signum) is before


@pytest.mark.parametrize(
    ("first", "second", "code", "printed", "said"),
    [("SIGINT", "SIGTERM", 1, "tidied up\n", "stopped by SIGINT; all is kept 130\n"), ("SIGINT", "SIGINT", 130, "", ""),
     ("SIGHUP", "SIGHUP", 1, "tidied up\n", "stopped by SIGHUP; all is kept 129\n")],
)  # fmt: skip
def test_tidying_up_is_ended_by_the_same_signal_only(
    first: str, second: str, code: int, printed: str, said: str
) -> None:
    """Not by a second SIGHUP: the terminal sends one to the group, and the shell in it another to its children."""
    ran = subprocess.run([sys.executable, "-c", TIDYING, first, second], capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stdout, ran.stderr) == (code, printed, said)


IN_A_LIBRARY = """
import hashlib, os, signal, threading
from moai.core.stopping import stoppable
with stoppable("all is kept", within_seconds=1):
    threading.Timer(1, os.kill, (os.getpid(), signal.SIGTERM)).start()
    hashlib.pbkdf2_hmac("sha256", b"a", b"b", 2_000_000_000)
"""


def test_a_signal_ends_a_library_call_that_does_not_return() -> None:
    ran = subprocess.run([sys.executable, "-c", IN_A_LIBRARY], capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stderr) == (143, "error: stopped by SIGTERM; all is kept\n")


def test_a_process_that_was_started_to_outlive_its_terminal_does() -> None:
    script = "trap '' HUP; exec \"$@\""
    ran = subprocess.run(
        ["sh", "-c", script, "sh", sys.executable, "-c", TIDYING, "SIGHUP", "SIGHUP"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "tidied up\n", "")


def test_in_another_thread_signals_are_left_alone() -> None:
    seen = []

    def run() -> None:
        with stoppable("all is kept"):
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGTERM)]
