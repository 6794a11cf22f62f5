"""Ctrl-C, SIGTERM and a closed terminal (SIGHUP): what is committed is kept, one line is said, the exit code names the signal.

with stoppable("finished shards are kept, run again to go on from them"):
    ...                                            # Stop is raised wherever the main thread is; Interrupted leaves the block
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from moai.errors import Interrupted


class Stop(KeyboardInterrupt):
    """What a signal raises on the spot. No Exception: code that tries something out would take that for its answer and go on."""


def hangup_is_ignored() -> bool:
    """Whether this process was started to outlive its terminal, as nohup does it."""
    return signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def by_others() -> set[signal.Signals]:
    """The signals that launchers, clusters and terminals end a process with. Ctrl-C is a person's."""
    return {signal.SIGTERM} if hangup_is_ignored() else {signal.SIGTERM, signal.SIGHUP}


@contextlib.contextmanager
def stoppable(what_remains: str) -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP as Interrupted, so that there is time to tidy up and to tell others. Only where signals can be handled.

    After the first, one of another kind is the same wish, since a launcher passes on what its group has had from the
    terminal; the same one again is an impatient person, and ends the process at once. Not SIGHUP, which a shell passes on too.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    seen: list[signal.Signals] = []

    def stop(signum: int, frame: FrameType | None) -> None:
        if signum in seen and signum != signal.SIGHUP:
            os._exit(128 + signum)
        seen.append(signal.Signals(signum))
        if len(seen) == 1:
            raise Stop(f"stopped by {seen[0].name}; {what_remains}")

    before = {number: signal.signal(number, stop) for number in {signal.SIGINT, *by_others()}}
    try:
        yield
    except Stop as stopped:
        raise Interrupted(str(stopped), seen[0]) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
