"""A line every --interval seconds: documents, what came in, the rate, what is left; at Ctrl-C a summary of the time
watched.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from moai.core.config import option, resolve
from moai.core.errors import ConfigError
from moai.reembedding.monitor.state import State, WatchConfig, is_paused, look
from moai.reembedding.options import bounded
from moai.reembedding.runs import clock

_LONGEST = 86_400


@dataclass(frozen=True, kw_only=True)
class SpeedConfig:
    """Lines of the speed monitor."""

    interval: float = option(60.0, "seconds between two lines")
    lines: int | None = option(None, "end after so many lines; the default is to go on until the run has ended")


def main(argv: Sequence[str], environ: Mapping[str, str] = os.environ) -> int:
    resolved = resolve(
        [WatchConfig, SpeedConfig], argv, environ, prog="monitor_re_embedding_speed.py", description=__doc__ or ""
    )
    watch, speed = resolved[WatchConfig], resolved[SpeedConfig]
    if not 0 < speed.interval <= _LONGEST:
        raise ConfigError(f"interval = {speed.interval}: above 0, at most {_LONGEST:,} seconds")
    bounded("lines", speed.lines)
    follow(lambda: look(watch), lambda line: print(line, flush=True), interval=speed.interval, lines=speed.lines)
    return 0


def follow(
    look: Callable[[], State],
    say: Callable[[str], None],
    *,
    interval: float,
    lines: int | None = None,
    pause: Callable[[float], None] = time.sleep,
) -> None:
    """Until so many lines are said, or no run is at work, or Ctrl-C; a summary at the end in every case."""
    first = last = look()
    watched, said = 0.0, 0
    try:
        say(_line(first, first))
        while last.is_running and (lines is None or said < lines):
            pause(interval)
            now = look()
            say(_line(last, now))
            watched += (now.at - last.at).total_seconds()
            last, said = now, said + 1
    except KeyboardInterrupt:
        say("")
    finally:  # also where the database cannot be read any more
        say(summary(first, last, watched))


def summary(first: State, last: State, seconds: float) -> str:
    documents, chunks = last.done - first.done, last.chunks - first.chunks
    rate = "no document was committed meanwhile"
    if documents and seconds:
        rate = f"{3600 * documents / seconds:,.0f} documents an hour, {seconds / documents:.3f} s a document"
    gain = f"+{documents:,} documents, +{chunks:,} chunks"
    return f"watched {clock(seconds)}: {gain}, {rate}; {last.done:,} of {last.total:,} done"


def _line(before: State, now: State) -> str:
    rate = ""
    if now.pace and now.pace.documents > 0:
        rate = (
            f" | {3600 * now.pace.documents:,.0f} docs/h | {1 / now.pace.documents:.3f} s/doc | "
            f"{now.pace.chunks:,.1f} chunks/s | {clock(now.eta_seconds)} left"
        )
    state = "" if now.is_running else " | no run is at work"
    return (
        f"{now.at.strftime('%H:%M:%S')}Z {now.done:,}/{now.total:,} | "
        f"+{now.done - before.done:,}{rate}{' | paused' if is_paused(now) else state}"
    )
