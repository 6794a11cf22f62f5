"""A cache of several states of one source."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import collecting
import pytest

from moai.prepared.manifest import Prepared


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Input to `collecting.changed`."""
    return collecting.write(tmp_path / "a.jsonl")


@pytest.fixture
def run(source: Path, prepare: Callable[..., Prepared]) -> Callable[[], Prepared]:
    """`run()`: prepare `source` as it is now, in several shards."""
    return lambda: prepare(source, shard_bytes=4000)


@pytest.fixture
def superseded(source: Path, run: Callable[[], Prepared]) -> Prepared:
    """What was prepared of `source` before it changed; it was prepared anew since."""
    old = run()
    collecting.changed(source)
    run()
    return old
