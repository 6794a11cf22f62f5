"""`moai gc` beside preparations that begin, and killed: what is referenced works, and nobody finds less than he may."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from collecting import begin_an_attempt, collect_in, gc, paused, tree

from moai.cache.gc.sweep import Retirement
from moai.core.distributed import owner
from moai.core.files import canonical_json
from moai.prepared.manifest import Prepared
from moai.prepared.verify import verify


def test_killed_anywhere_it_leaves_a_cache_that_prepares_and_verifies(
    tmp_path: Path, cache: Path, superseded: Prepared, run: Callable[[], Prepared]
) -> None:
    """Between receipts and data; tests/cache/test_gc_records.py takes every place in turn."""
    (cache / "shards" / "bb.json").write_bytes(b"{}")  # more to retire
    killed = collect_in(cache, tmp_path / "marks", "gc.data:1=kill")
    killed.communicate(timeout=600)
    assert killed.returncode == -signal.SIGKILL
    assert all(
        path.with_suffix(".arrow").exists() for path in (cache / "shards").glob("[!b]*.json")
    )  # no receipt without its data
    assert not superseded.path.exists() or all(check.ok for check in verify(superseded.path))
    now = run()
    assert all(check.ok for check in verify(now.path))
    gc(cache)
    assert list((cache / "attempts").iterdir()) == []
    assert {path.name.split(".")[0] for path in (cache / "shards").iterdir()} == {
        shard["shard_key"] for shard in now.content["shards"]
    }


def test_a_preparation_that_begins_meanwhile_gets_everything_back(
    tmp_path: Path, cache: Path, run: Callable[[], Prepared]
) -> None:
    """Its attempt is seen once the shards lie aside: all are put back, and what it links is whole."""
    whole = run()
    shutil.rmtree(whole.path)
    before = tree(cache / "shards")
    process = collect_in(cache, tmp_path / "marks", "gc.data:3=pause")
    paused(process, tmp_path / "marks" / "gc.data.3")
    attempt = begin_an_attempt(cache)
    (tmp_path / "marks" / "go").touch()
    out, _ = process.communicate(timeout=600)
    assert "kept      the rest: begun is at work in this cache; run again later" in out
    assert tree(cache / "shards") == before
    shutil.rmtree(attempt)
    assert run().manifest["run"]["shards_made"] == 0


@pytest.mark.parametrize("place", ["gc.data:1", "gc.delete:1"])
def test_a_whole_preparation_in_the_midst_of_it_ends_with_the_same_bytes(
    tmp_path: Path, cache: Path, run: Callable[[], Prepared], place: str
) -> None:
    """It finds less than there was, makes that again, and publishes; what it published is not touched."""
    first = run()
    whole = {path.name: path.read_bytes() for path in first.path.glob("data-*")}
    shutil.rmtree(first.path)
    process = collect_in(cache, tmp_path / "marks", f"{place}=pause")
    paused(process, tmp_path / "marks" / place.replace(":", "."))
    meanwhile = run()
    (tmp_path / "marks" / "go").touch()
    process.communicate(timeout=600)
    assert process.returncode == 0
    assert {path.name: path.read_bytes() for path in meanwhile.path.glob("data-*")} == whole
    assert all(check.ok for check in verify(meanwhile.path))
    finished = {path.name for path in (cache / "shards").iterdir()}
    assert {
        f"{shard['shard_key']}.{ending}"
        for shard in meanwhile.content["shards"]
        for ending in ("json", "arrow", "documents")
    } == finished
    assert run().path == meanwhile.path
    gc(cache)
    assert all(check.ok for check in verify(meanwhile.path))


def test_a_directory_that_is_used_again_meanwhile_is_put_back(
    tmp_path: Path, cache: Path, superseded: Prepared
) -> None:
    process = collect_in(cache, tmp_path / "marks", "gc.receipts:1=pause")
    paused(process, tmp_path / "marks" / "gc.receipts.1")
    (cache / "uses").mkdir()
    (cache / "uses" / f"{superseded.path.name}-1.json").write_bytes(canonical_json(owner()))
    (tmp_path / "marks" / "go").touch()
    process.communicate(timeout=600)
    assert all(check.ok for check in verify(superseded.path))


@pytest.fixture
def retirement(cache: Path, run: Callable[[], Prepared]) -> Iterator[Retirement]:
    run()
    with Retirement.open(cache) as opened:
        yield opened


def test_two_at_once_leave_the_shards_to_neither(cache: Path, retirement: Retirement) -> None:
    shutil.rmtree(cache / "datasets")
    assert f"kept      all shards and prepared directories: {retirement.place.name} is at work in this cache" in gc(
        cache
    )
    assert list((cache / "shards").iterdir())
    assert retirement.stopped == ""


def test_what_raises_in_the_midst_puts_everything_back(cache: Path, run: Callable[[], Prepared]) -> None:
    run()
    before = tree(cache / "shards")
    entries = [sorted(cache.glob(f"shards/{path.stem}.*"), reverse=True) for path in (cache / "shards").glob("*.json")]

    def fails() -> bool:
        assert tree(cache / "shards") == {}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Retirement.open(cache) as opened:
        opened.retire(entries, reclaimed=fails)
    assert tree(cache / "shards") == before
