"""SIGTERM, or SIGHUP of a closed terminal, while a model trains: all ranks save at the end of the same step, and end
with 143 or 129.

A launcher sends it to every rank, a person perhaps to one, and a rank that saved alone would leave the others waiting
in a collective; so the ranks ask one another at the end of each step whether one was told (`group.Question`). What is
said here is heard by a thread, because the main one may be waiting inside a collective where Python handles no signal:

    word = Word()
    packed_trainer(word=word, ...)
    with word.heard(group.everyone(here)):
        trainer.train()
    if word.agreed: ...                       # on a signal: the checkpoint is there, and training ended early
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from select import select
from typing import TYPE_CHECKING, Any

from moai.core.distributed import is_gone
from moai.core.errors import MoaiError
from moai.core.failpoints import failpoint
from moai.core.stopping import by_others
from moai.training.process_group import Question

if TYPE_CHECKING:
    from transformers import TrainerCallback
else:
    TrainerCallback = object

PASSED_ON_SECONDS = 2.0
"""A SIGTERM this soon after the first is the same one: a cluster sends it to every process, and launchers pass on their
own.
"""
_LOOK_SECONDS = 0.5
_LAUNCHER_SECONDS = 1.0


class Word:
    """The signal by which this rank was `told` to stop, and the one on which all `agreed` to after a step; 0 while
    there is none.
    """

    def __init__(self) -> None:
        self.told = self.agreed = 0
        self._told_at = 0.0

    @contextlib.contextmanager
    def heard(self, everyone: Sequence[Mapping[str, Any]]) -> Iterator[None]:
        """Hear those signals in this block; `everyone` are the `distributed.owner`s of all ranks. Only where signals
        can be handled.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        ear, mouth = os.pipe()
        os.set_blocking(mouth, False)
        before = {number: signal.signal(number, lambda *_: None) for number in by_others()}
        mouth_before = signal.set_wakeup_fd(mouth, warn_on_full_buffer=False)
        thread = threading.Thread(target=self._listen, args=(ear, set(before), everyone), name="signals", daemon=True)
        thread.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(mouth_before)
            for number, handler in before.items():
                signal.signal(number, handler)
            os.write(mouth, b"\0")
            thread.join()
            os.close(ear)
            os.close(mouth)
        if self.told and not self.agreed:
            os.kill(
                os.getpid(), self.told
            )  # after the last step: nothing is left to save, and who handles signals now does what it does

    def _listen(self, ear: int, signals: set[signal.Signals], everyone: Sequence[Mapping[str, Any]]) -> None:
        while True:
            said = os.read(ear, 64) if select([ear], [], [], _LOOK_SECONDS if self.told else None)[0] else b""
            if b"\0" in said:
                return
            for number in signals & set(said):
                self._tell(number)
            if self.told and not self.agreed:
                for rank, who in enumerate(everyone):
                    if is_gone(who):
                        name = signal.Signals(self.told).name
                        _end(
                            f"stopped by {name}, and without a last checkpoint: rank {rank} is gone; the newest "
                            f"complete one is kept",
                            128 + self.told,
                        )

    def _tell(self, number: int) -> None:
        if number > self.told:  # SIGTERM is a new word after SIGHUP, and not the other way round
            self.told, self._told_at = number, time.monotonic()
        elif number == signal.SIGTERM and time.monotonic() - self._told_at > PASSED_ON_SECONDS:
            _end("stopped at once by a second SIGTERM; the newest complete checkpoint is kept", 128 + number)


class SaveAndStop(TrainerCallback):
    """At the end of a step, asks all ranks whether one was told; then all save and stop. After a save there is nothing
    more to save.
    """

    def __init__(self, word: Word, question: Question) -> None:
        self.word, self.question = word, question

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        failpoint("step.end")
        if self._agree():
            control.should_save = control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._agree():
            control.should_training_stop = True

    def _agree(self) -> bool:
        self.word.agreed = self.word.agreed or self.question.ask(self.word.told)
        return self.word.agreed > 0


def obey_own_rank() -> None:
    """In a process that reads rows: end by SIGTERM of its own rank only, which may need it for the last step before it
    saves.

    A launcher signals the whole process group of a rank, a cluster every process; who sent it is known to sigwaitinfo
    alone.
    """

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    parent = os.getppid()
    signal.set_wakeup_fd(-1)  # it would speak in the rank's name
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=wait, name="sigterm", daemon=True).start()


def end_with_launcher(environ: Mapping[str, str]) -> Callable[[], None]:
    """In a rank that torchrun or accelerate started: end when it is gone, wherever the main thread is. Nobody else
    would end the ranks of a launcher that was killed, nor start them anew.

    Returns what ends the process at once if it is gone: for an error that another rank's end may be the cause of.
    """
    if "TORCHELASTIC_RUN_ID" not in environ:
        return lambda: None
    launcher = os.getppid()

    def look() -> None:
        if os.getppid() != launcher:
            _end(
                f"[Rank {environ.get('RANK')}] ended, because its launcher (pid {launcher}) is gone; finished shards "
                f"and complete checkpoints are kept, --resume_from_checkpoint auto goes on from the newest",
                MoaiError.exit_code,
            )

    def watch() -> None:
        while True:
            look()
            time.sleep(_LAUNCHER_SECONDS)

    threading.Thread(target=watch, name="launcher", daemon=True).start()
    return look


def _end(line: str, code: int) -> None:
    """Wherever the main thread is."""
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode())
    os._exit(code)
