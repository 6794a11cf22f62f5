"""`moai gc`: what nothing leads to goes, by age and size; never anything in use, and whatever kills it."""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from collecting import PrepareIt, a_dead_owner, age, changed, gc, tree

from moai.cache.gc.collect import mapped
from moai.cache.leases import DEAD_SECONDS, lives, note_use, uses
from moai.core.distributed import owner
from moai.core.errors import ConfigError
from moai.core.files import canonical_json
from moai.prepared.manifest import Prepared
from moai.prepared.verify import verify
from moai.pretraining.keys import plan_key


def test_a_cache_of_nothing_but_what_is_needed_stays_as_it_is(cache: Path, run: Callable[[], Prepared]) -> None:
    run()
    assert len(gc(cache)) == 2  # a lock, and what is left
    before = tree(cache)
    assert len(gc(cache)) == 1
    assert tree(cache) == before


def test_a_superseded_directory_goes_with_its_shards_and_the_new_one_stays(
    cache: Path, source: Path, run: Callable[[], Prepared]
) -> None:
    old = run()
    changed(source)
    new = run()
    shared = {shard["shard_key"] for shard in old.content["shards"]} & {
        shard["shard_key"] for shard in new.content["shards"]
    }
    assert shared
    assert f"would go  datasets/{old.path.name}, its files changed and were prepared anew" in gc(cache, dry_run=True)[1]
    assert old.path.exists()
    assert f"removed   datasets/{old.path.name}, its files changed and were prepared anew" in gc(cache)[1]
    assert not old.path.exists()
    assert {path.name.split(".")[0] for path in (cache / "shards").iterdir()} == {
        shard["shard_key"] for shard in new.content["shards"]
    }
    assert all(check.ok for check in verify(new.path))
    assert run().path == new.path


def test_what_was_prepared_from_data_that_is_gone_stays(
    tmp_path: Path, cache: Path, source: Path, prepare: PrepareIt
) -> None:
    """Nothing could make it again, though a newer plan covers its file."""
    prepared = prepare(source, shard_bytes=4000)
    other = shutil.copy(source, tmp_path / "b.jsonl")
    prepare(source, other, shard_bytes=4000)
    source.unlink()
    gc(cache)
    assert all(check.ok for check in verify(prepared.path))
    source.write_text("another file of that name\n")
    gc(cache)
    assert not prepared.path.exists()


def test_other_flags_supersede_nothing(cache: Path, source: Path, prepare: PrepareIt) -> None:
    first, second = (prepare(source, shard_bytes=4000, seq_len=length, packing="bfd_split") for length in (32, 64))
    gc(cache)
    assert first.path.exists()
    assert second.path.exists()


def test_older_than_leaves_the_younger(cache: Path, source: Path, run: Callable[[], Prepared]) -> None:
    old = run()
    changed(source)
    run()
    gc(cache, older_than=7)
    assert old.path.exists()
    age(cache / "shards", 8)
    for path in (old.path, *(cache / "plans").iterdir()):
        age(path, 8)
    os.utime(
        max((cache / "plans").iterdir(), key=lambda path: json.loads(path.read_bytes())["directory"] != old.path.name)
    )  # the newer plan is of today
    gc(cache, older_than=9)
    assert old.path.exists()
    gc(cache, older_than=7)
    assert not old.path.exists()


def test_shards_of_a_run_that_was_killed_are_kept_until_they_are_old(cache: Path, run: Callable[[], Prepared]) -> None:
    prepared = run()
    shutil.rmtree(prepared.path)
    number = len(list((cache / "shards").iterdir()))
    gc(cache, older_than=7)
    assert len(list((cache / "shards").iterdir())) == number
    assert any(f"{number // 3} shards that no prepared directory links" in line for line in gc(cache))
    assert list((cache / "shards").iterdir()) == []


def test_by_size_the_longest_unused_goes_first_and_takes_what_it_alone_links(
    cache: Path, source: Path, prepare: PrepareIt
) -> None:
    first, second = (prepare(source, shard_bytes=4000, seq_len=length, packing="bfd_split") for length in (32, 64))
    for path in (first.path, *(cache / "plans").iterdir()):
        age(path, 3)
    size = sum({path.stat().st_ino: path.stat().st_size for path in cache.rglob("*") if path.is_file()}.values())
    gc(cache, older_than=7, max_bytes=size)
    assert first.path.exists()
    gc(cache, older_than=7, max_bytes=size - 1)
    assert not first.path.exists()
    assert {path.name.split(".")[0] for path in (cache / "shards").iterdir()} == {
        shard["shard_key"] for shard in second.content["shards"]
    }
    last = gc(cache, older_than=7, max_bytes=0)
    assert not second.path.exists()
    assert "all of it is in use" in last[-2]  # records of a few bytes, of which nothing is said


def test_what_killed_runs_left_goes(cache: Path, source: Path, run: Callable[[], Prepared]) -> None:
    """One of each kind that lies about, and beside each one that must stay."""
    prepared = run()
    gc(cache)
    before = tree(cache)
    left = {
        "attempts/dead/owner.json": a_dead_owner(),
        "attempts/dead/half.arrow": b"x" * 100,
        "shards/.a.json.0123456789abcdef0123456789abcdef.tmp": b"",
        "shards/aa.corrupt-01": b"x",
        "shards/bb.arrow": b"x",
        "shards/cc.json": b"{}",
        "shards/dd.bad.jsonl": b"{}\n",
        "launches/ended.json": a_dead_owner(),
        "uses/x-1.json": a_dead_owner(),
        "quarantine/q.jsonl": b"{}\n",
        "locks/free.lock": b"",
    }
    for name, data in left.items():
        (cache / name).parent.mkdir(exist_ok=True)
        (cache / name).write_bytes(data)
    record = json.loads(next(iter((cache / "plans").iterdir())).read_bytes())
    fields = {**record["fields"], "files": {}}
    lost = cache / "plans" / f"{plan_key(fields)}.json"
    lost.write_bytes(canonical_json({**record, "fields": fields, "directory": "gone"}))
    shutil.copytree(prepared.path, prepared.path.with_name(f"{prepared.path.name}.wrong-01"))
    os.utime(cache / "shards/.a.json.0123456789abcdef0123456789abcdef.tmp", (0, 0))
    dry = gc(cache, dry_run=True)
    assert tree(cache).keys() > before.keys() | left.keys()
    said = gc(cache)
    assert tree(cache) == before
    assert [line.replace("would go ", "removed  ") for line in dry[:-1]] == said[:-1]
    assert len(said) == 11


def test_nothing_goes_while_a_preparation_is_at_work(cache: Path, source: Path, run: Callable[[], Prepared]) -> None:
    """Of this host, of another as long as it writes, and one that has not signed yet."""
    old = run()
    changed(source)
    run()
    for content in (canonical_json(owner()), a_dead_owner(host="another"), None):
        attempt = cache / "attempts" / "live"
        attempt.mkdir()
        if content:
            (attempt / "owner.json").write_bytes(content)
        assert gc(cache)[-2] == "kept      all shards and prepared directories: live is at work in this cache"
        assert old.path.exists()
        age(attempt, 3 if content else 0.01)
        if content != canonical_json(owner()):
            gc(cache)
            assert not attempt.exists()  # silent for so long
        shutil.rmtree(attempt, ignore_errors=True)
        assert old.path.exists() == (content is not None and b"another" not in content)
        if not old.path.exists():
            break
    assert not old.path.exists()


def test_a_directory_that_a_process_notes_as_used_stays(cache: Path, superseded: Prepared) -> None:
    code = (
        f"from moai.cache.leases import note_use\nfrom pathlib import Path\nnote_use(Path({str(cache)!r}), "
        f"{superseded.path.name!r})\nprint('noted', flush=True)\ninput()"
    )
    training = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert training.stdout is not None
    assert training.stdout.readline() == "noted\n"
    gc(cache)
    assert superseded.path.exists()
    training.communicate("\n", timeout=150)
    gc(cache)
    assert not superseded.path.exists()
    assert list(uses(cache)) == []


def test_a_directory_that_a_process_has_mapped_stays(cache: Path, superseded: Prepared) -> None:
    """Whoever opened it by other means than moai has left no note."""
    with (
        open(next(iter(superseded.path.glob("data-*.arrow"))), "rb") as file,
        mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ),
    ):
        assert mapped(cache) == {superseded.path.name}
        gc(cache)
        assert superseded.path.exists()
    gc(cache)
    assert not superseded.path.exists()


def test_a_record_of_use_lives_as_its_process_or_as_its_file() -> None:
    me = owner()
    assert lives(me, 10**9)
    assert not lives({**me, "start_token": "another"}, 0)
    assert lives(
        {**me, "start_token": "another", "pid_namespace": "pid:[1]"}, DEAD_SECONDS - 1
    )  # a container with this host's name
    assert lives({**me, "host": "another"}, DEAD_SECONDS - 1)
    assert not lives({**me, "host": "another"}, DEAD_SECONDS + 1)
    assert not lives(None, DEAD_SECONDS + 1)


def test_where_no_use_can_be_noted_nothing_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    note_use(tmp_path / "file", "x")


def test_a_lock_that_is_held_stays(cache: Path, run: Callable[[], Prepared]) -> None:
    run()
    path = cache / "locks" / "held.lock"
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        gc(cache)
        assert path.exists()
    gc(cache)
    assert not path.exists()


def test_odd_things_in_a_cache_are_neither_opened_nor_followed(
    cache: Path, tmp_path: Path, run: Callable[[], Prepared]
) -> None:
    run()
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("x")
    for folder in ("attempts", "launches", "uses", "locks", "plans", "quarantine", "shards"):
        (cache / folder).mkdir(exist_ok=True)
        (cache / folder / "link.json").symlink_to(tmp_path / "precious")
        os.mkfifo(cache / folder / "fifo.json")
        os.mkfifo(cache / folder / "fifo.lock")
    gc(cache, max_bytes=0)
    assert (tmp_path / "precious" / "file").read_text() == "x"


def test_a_place_that_is_no_cache_is_refused(tmp_path: Path) -> None:
    (tmp_path / "shards.txt").touch()
    with pytest.raises(ConfigError, match="holds no cache of moai"):
        gc(tmp_path)
    assert (tmp_path / "shards.txt").exists()
