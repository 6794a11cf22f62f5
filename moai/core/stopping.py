"""How a process ends: by Ctrl-C, SIGTERM or a closed terminal (SIGHUP), with one line and an exit code that names the
signal; and of itself, by `end`.

with stoppable("finished shards are kept, run again to go on from them"):
    ...                                            # Stop rises in the main thread, Interrupted leaves
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

from moai.core.errors import Interrupted, MoaiError, PartFailed, StorageError

_TOO_LITTLE = ("can't start new thread", "cannot allocate memory", "failed to map segment")
_TIDY_SECONDS = 20.0
"""How long tidying up may take. Then the process ends all the same: Stop may have been lost on its way, in a destructor
or while a library was imported.
"""


class Stop(KeyboardInterrupt):
    """What a signal raises on the spot. No Exception: code that tries something out would take that for its answer and
    go on.
    """


def hangup_is_ignored() -> bool:
    """Whether this process was started to outlive its terminal, as nohup does it."""
    return signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def by_others() -> set[signal.Signals]:
    """The signals that launchers, clusters and terminals end a process with. Ctrl-C is a person's."""
    return {signal.SIGTERM} if hangup_is_ignored() else {signal.SIGTERM, signal.SIGHUP}


@contextlib.contextmanager
def stoppable(
    what_remains: str, *, within_seconds: float | None = None, tidy_seconds: float | None = None
) -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP as Interrupted, so that there is time to tidy up and to tell others. Only where
    signals can be handled.

    Python hears of a signal once the library call that it is in returns; `within_seconds` ends a process that has not
    by then, untidied: for work that survives a kill. So does `tidy_seconds`, where tidying up takes longer.

    After the first, one of another kind is the same wish, since a launcher passes on what its group has had from the
    terminal; the same one again is an impatient person, and ends the process at once. Not SIGHUP, which a shell passes
    on too.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    seen: list[signal.Signals] = []
    told, over = threading.Event(), threading.Event()

    def force() -> None:
        told.wait()
        if not over.wait(_TIDY_SECONDS if tidy_seconds is None else tidy_seconds):
            with contextlib.suppress(OSError):
                os.write(2, f"stopped by {seen[0].name}; {what_remains}\n".encode())
            os._exit(128 + seen[0])

    def stop(signum: int, frame: FrameType | None) -> None:
        if signum in seen and signum != signal.SIGHUP:
            os._exit(128 + signum)
        seen.append(signal.Signals(signum))
        if len(seen) == 1:
            told.set()  # once: another signal may come while its lock is held
            raise Stop(f"stopped by {seen[0].name}; {what_remains}")

    before = {number: signal.signal(number, stop) for number in {signal.SIGINT, *by_others()}}
    threading.Thread(target=force, name="stop", daemon=True).start()
    try:
        with _watched(told, within_seconds, what_remains) if within_seconds else contextlib.nullcontext():
            yield
        if seen:
            raise Stop(f"stopped by {seen[0].name}; {what_remains}")  # the first was lost
    except Exception as error:
        if not seen or isinstance(error, MoaiError):
            raise
        raise Interrupted(f"stopped by {seen[0].name}; {what_remains}", seen[0]) from error  # what became of Stop
    except Stop as stopped:
        raise Interrupted(str(stopped), seen[0]) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        over.set()
        told.set()  # not while `stop` may be called, which sets it too


@contextlib.contextmanager
def _watched(heard: threading.Event, seconds: float, what_remains: str) -> Iterator[None]:
    """The system's own handler writes a signal's number into a pipe at once, whatever the main thread is in."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)

    def watch() -> None:
        while number := os.read(reading, 1):
            if number[0] in {signal.SIGINT, *by_others()} and not heard.wait(seconds):
                print(
                    f"error: stopped by {signal.Signals(number[0]).name}; {what_remains}", file=sys.stderr, flush=True
                )
                os._exit(128 + number[0])

    watcher = threading.Thread(target=watch, name="stopping", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writing)
        watcher.join()
        os.close(reading)


def stop_at_once() -> None:
    """Until a command takes better care of them, a signal ends this process on the spot, with one line. For programs,
    first of all.
    """

    def stop(signum: int, frame: FrameType | None) -> None:
        with contextlib.suppress(OSError):
            os.write(2, f"stopped by {signal.Signals(signum).name}; what is finished is kept\n".encode())
        os._exit(128 + signum)

    for number in {signal.SIGINT, *by_others()}:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, stop)


def is_panic(error: BaseException) -> bool:
    """What is no Exception and nobody's wish to end: how a library in Rust says that it failed."""
    return not isinstance(error, Exception | KeyboardInterrupt | SystemExit | GeneratorExit)


@contextlib.contextmanager
def machine_errors() -> Iterator[None]:
    """Turn what a process raises that gets too little, or whose library gave up, into one line."""
    try:
        yield
    except (MemoryError, RuntimeError, ImportError) as error:
        said = str(error)
        if not isinstance(error, MemoryError) and not any(hint in said for hint in _TOO_LITTLE):
            raise
        raise StorageError(
            f"too little memory, address space or threads for this process ({said or type(error).__name__}); look at "
            f"ulimit -v and -u, or ask for less: --num_proc 0, a smaller --shard_bytes"
        ) from error
    except BaseException as error:
        if not is_panic(error):
            raise
        raise PartFailed(f"a library gave up: {type(error).__name__}: {' '.join(str(error).split())[:300]}") from error


def end(code: int) -> NoReturn:
    """End the process once what it printed is out, without tearing the interpreter down. A rank that joined a group
    must end so.

    gloo's threads may still be dropping the tensors of the last collective. For that they need the interpreter's lock,
    which Python takes away from them while it tears itself down: the rank hangs or aborts (-6), after its work was done
    and said.
    """
    atexit._run_exitfuncs()
    os._exit(_flushed(code))


def _flushed(code: int) -> int:
    """The exit code, once what was printed has really gone out."""
    try:
        if sys.stdout:
            sys.stdout.flush()
    except BrokenPipeError:
        return 141
    except OSError as error:
        print(f"error: standard output: {error.strerror}; what was printed is not whole", file=sys.stderr)
        return StorageError.exit_code
    finally:
        with contextlib.suppress(OSError, AttributeError):  # it may be full, or closed
            sys.stderr.flush()
    return code
