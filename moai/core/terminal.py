"""What a command prints: text from files steers no terminal, and an output that takes nothing more is one line.

with printing():
    print(document)                     # ESC, BEL, C1 and marks that turn the writing direction are spelled out
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

from moai.core.errors import StorageError, printable

_BYTES = re.compile("([\udc80-\udcff]+)")
"""Of a path that is not UTF-8: they are printed as they are."""


def plain(text: str) -> str:
    """`printable`, but for the bytes of paths."""
    return "".join(part if number % 2 else printable(part) for number, part in enumerate(_BYTES.split(text)))


@contextlib.contextmanager
def printing() -> Iterator[None]:
    """Standard output and standard error, closed ones too, take text of any kind within."""
    for descriptor in range(3):  # what is opened next would be it, and be printed into
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    if isinstance(sys.stdout, Plain):  # a command within a command
        yield
        return
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="surrogateescape")
    with (
        contextlib.redirect_stdout(Plain(sys.stdout, "standard output")),
        contextlib.redirect_stderr(Plain(sys.stderr, "")),
    ):
        yield


class Plain:
    """A stream of text that takes `plain` text only. Where it is `named`, an error of it is one of moai."""

    def __init__(self, stream: Any, named: str) -> None:
        self._stream, self._named = stream, named
        self.is_gone = False
        """Something could not be written: who has another place for it says it there."""

    def write(self, text: str) -> int:
        # A bar, which begins with a return, is drawn by a program and on a terminal only.
        drawn = not self._named and text[:1] == "\r"
        with self._errors():
            if self._stream is None and self._named:
                raise OSError(errno.EBADF, "it is closed")
            if self._stream is not None:
                self._stream.write(text if drawn else plain(text))
        return len(text)

    def flush(self) -> None:
        with self._errors():
            if self._stream is not None:
                self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            raise
        except OSError as error:
            if not self._named:
                self.is_gone = True
                return
            raise StorageError(f"{self._named}: {error.strerror}; what was printed is not whole") from None
