"""Ctrl-C and SIGTERM: what is committed is kept, one line is said, the exit code names the signal.

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


@contextlib.contextmanager
def stoppable(what_remains: str) -> Iterator[None]:
    """SIGINT and SIGTERM as Interrupted, so that there is time to tidy up and to tell others. Only where signals can be handled.

    After the first, one of the other kind is the same wish, since a launcher passes on what its group has had from the
    terminal; the same one again is an impatient person, and ends the process at once.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    seen: list[signal.Signals] = []

    def stop(signum: int, frame: FrameType | None) -> None:
        if signum in seen:
            os._exit(128 + signum)
        seen.append(signal.Signals(signum))
        if len(seen) == 1:
            raise Stop(f"stopped by {seen[0].name}; {what_remains}")

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except Stop as stopped:
        raise Interrupted(str(stopped), seen[0]) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
