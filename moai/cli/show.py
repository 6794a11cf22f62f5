"""What commands print."""

from __future__ import annotations

from collections.abc import Iterable


def show(lines: Iterable[object]) -> int:
    """Print each line as it comes; 0, the exit code of a command that did what was asked."""
    for line in lines:
        print(line, flush=True)
    return 0
