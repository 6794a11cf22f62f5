"""Named places where a test makes the program die, fail or wait; nothing happens anywhere else.

    failpoint("sink.rename", staged)                                   # in the code, just before the act that it names
    MOAI_TESTING=1 MOAI_FAILPOINT_DIR=d MOAI_FAILPOINT=sink.rename:3=kill python -m moai prepare ...

An occurrence is counted over all processes of the run and over later ones with the same directory: whoever comes by
creates `<dir>/<name>.<n>`, holding its pid. So each action is taken once, a run without one leaves the list of all
places it passed, and a new place is exercised by whoever walks through that list.

    kill  SIGKILL of this process        pause     until `<dir>/go` is there; `<dir>/<name>.<n>` says that it waits
    exit  os._exit(70)                   truncate  the file at hand loses its second half
    raise OSError(EIO)                   flip      one bit in the middle of the file at hand
    enospc OSError(ENOSPC)
"""

from __future__ import annotations

import errno
import itertools
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ACTIONS = ("kill", "exit", "raise", "enospc", "pause", "truncate", "flip")
_POLL_SECONDS = 0.01


@dataclass(frozen=True)
class Armed:
    """`at` is the name and occurrence (from 1) at which `action` is taken; None only counts."""

    directory: Path
    at: tuple[str, int] | None = None
    action: str = ""

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> Armed | None:
        """None unless MOAI_TESTING=1: no variable that was left behind can harm a run."""
        if environ.get("MOAI_TESTING") != "1" or not environ.get("MOAI_FAILPOINT_DIR"):
            return None
        directory = Path(environ["MOAI_FAILPOINT_DIR"])
        wanted = environ.get("MOAI_FAILPOINT", "")
        if not wanted:
            return cls(directory)
        place, _, action = wanted.partition("=")
        name, _, number = place.partition(":")
        assert action in ACTIONS, f"MOAI_FAILPOINT={wanted}: the action is one of {', '.join(ACTIONS)}"
        return cls(directory, (name, int(number or 1)), action)

    def reach(self, name: str, file: Path | None) -> None:
        if (name, self._count(name)) == self.at:
            self._act(name, file)

    def _count(self, name: str) -> int:
        for number in itertools.count(1):
            try:
                with open(self.directory / f"{name}.{number}", "x") as seen:
                    seen.write(str(os.getpid()))
                return number
            except FileExistsError:
                continue
        raise AssertionError

    def _act(self, name: str, file: Path | None) -> None:
        if self.action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.action == "exit":
            os._exit(70)
        elif self.action == "raise":
            raise OSError(errno.EIO, f"failpoint {name}")
        elif self.action == "enospc":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file or name))
        elif self.action == "pause":
            while not (self.directory / "go").exists():
                time.sleep(_POLL_SECONDS)
        elif file is not None:
            _damage(file, cut=self.action == "truncate")


_armed = Armed.of(os.environ)


def failpoint(name: str, file: Path | None = None) -> None:
    """Pass the place `name`, about to act on `file`."""
    if _armed is not None:
        _armed.reach(name, file)


def _damage(file: Path, *, cut: bool) -> None:
    size = file.stat().st_size
    if cut:
        os.truncate(file, size // 2)
        return
    with open(file, "r+b") as opened:
        opened.seek(size // 2)
        byte = opened.read(1)
        opened.seek(size // 2)
        opened.write(bytes([byte[0] ^ 1]))
