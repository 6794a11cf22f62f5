"""Signals: the first is an error with an exit code, what a launcher passes on afterwards is not a second, an impatient one ends it all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from moai.errors import Interrupted
from moai.stopping import stoppable

TIDYING = """
import os, signal, sys
from moai.stopping import stoppable
try:
    with stoppable("all is kept"):
        try:
            os.kill(os.getpid(), signal.SIGINT)
        finally:
            os.kill(os.getpid(), signal.Signals[sys.argv[1]])
            print("tidied up", flush=True)
except Exception as error:
    sys.exit(f"{error} {error.exit_code}")
"""


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_an_error_that_names_it(signum: signal.Signals) -> None:
    before = signal.getsignal(signum)
    with pytest.raises(Interrupted, match=f"stopped by {signum.name}; all is kept") as stopped, stoppable("all is kept"):
        os.kill(os.getpid(), signum)
    assert stopped.value.exit_code == 128 + signum
    assert signal.getsignal(signum) is before


@pytest.mark.parametrize(
    ("second", "code", "printed", "said"), [("SIGTERM", 1, "tidied up\n", "stopped by SIGINT; all is kept 130\n"), ("SIGINT", 130, "", "")]
)
def test_tidying_up_is_ended_by_the_same_signal_only(second: str, code: int, printed: str, said: str) -> None:
    ran = subprocess.run([sys.executable, "-c", TIDYING, second], capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stdout, ran.stderr) == (code, printed, said)


def test_in_another_thread_signals_are_left_alone() -> None:
    seen = []

    def run() -> None:
        with stoppable("all is kept"):
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGTERM)]
