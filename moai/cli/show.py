"""What commands print."""

from __future__ import annotations

from collections.abc import Iterable

from moai.core.errors import StorageError


def show(lines: Iterable[object]) -> int:
    """Print each line as it comes; 0, the exit code of a command that did what was asked."""
    for line in lines:
        try:
            print(line, flush=True)
        except BrokenPipeError:
            raise
        except OSError:  # of which the end of the process tells, when it prints what is left
            return StorageError.exit_code
    return 0
