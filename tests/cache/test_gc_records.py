"""`moai gc` and the small records of a cache: digests of input, transforms, verdicts. What still serves something
stays, whatever kills it.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from collecting import LINES, PrepareIt, age, begin_an_attempt, changed, collect_in, gc, paused, tree

from moai.cache.ledger import Ledger
from moai.core import files
from moai.core.errors import BackendDisagrees
from moai.prepared.manifest import Prepared
from moai.prepared.verify import verify
from moai.pretraining.tokenizer_backend import Wrong, distrust, distrusted
from moai.sources import local

RECORDS = ("ranges", "transforms", "distrusted")


@pytest.fixture(autouse=True)
def stamps_prove_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is remembered of a file that is younger than this."""
    monkeypatch.setattr(files, "_RACY_NS", 0)


@pytest.fixture
def superseded(source: Path, run: Callable[[], Prepared]) -> tuple[Prepared, Prepared]:
    old = run()
    changed(source)
    return old, run()


def digests(cache: Path) -> set[str]:
    """Of the ranges that are remembered."""
    return {
        str(known["digest"])
        for path in (cache / "ranges").rglob("*.json")
        if (known := Ledger(cache).known(path.stem)) and "digest" in known
    }


def ends(cache: Path) -> list[Path]:
    """Where streams were cut."""
    return [path for path in (cache / "ranges").rglob("*.json") if b'"ends"' in path.read_bytes()]


def made_of(prepared: Prepared) -> set[str]:
    return {shard["raw_digest"] for shard in prepared.content["shards"]}


def test_digests_go_with_the_last_shard_that_was_made_of_that_content(
    cache: Path, superseded: tuple[Prepared, Prepared]
) -> None:
    old, new = superseded
    assert made_of(old) - made_of(new)
    assert digests(cache) == made_of(old) | made_of(new)
    assert any("digests of input of which no finished shard is left" in line for line in gc(cache, dry_run=True))
    assert digests(cache) == made_of(old) | made_of(new)
    gc(cache)
    assert digests(cache) == made_of(new)
    assert not any(" digests of input" in line for line in gc(cache))


def test_what_stays_saves_reading_and_tokenizing_as_before(
    cache: Path, source: Path, prepare: PrepareIt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With directories and plans gone, shards of input that was read are found by the digests alone, of a stream by its
    ends too.
    """
    stream = source.with_name("b.jsonl.zst")
    stream.write_bytes(zstandard.compress(("\n".join(LINES) + "\n").encode(), 1))
    made = prepare(source, stream, shard_bytes=1000)
    before = {name: data for name, data in tree(cache).items() if name.startswith(RECORDS)}
    assert len(ends(cache)) == 1
    gc(cache)
    assert {name: data for name, data in tree(cache).items() if name.startswith(RECORDS)} == before
    for folder in ("datasets", "plans"):
        shutil.rmtree(cache / folder)

    def refuse(*_: object) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr(local.LocalSource, "digest", refuse)
    monkeypatch.setattr(local, "RangeWriter", refuse)
    assert prepare(source, stream, shard_bytes=1000).manifest["run"]["shards_made"] == 0
    assert made.path.exists()


def test_the_ends_of_a_stream_go_with_its_ranges(tmp_path: Path, cache: Path, prepare: PrepareIt) -> None:
    stream = tmp_path / "b.json"
    stream.write_text("[" + ",\n".join(LINES) + "]")
    prepare(stream, shard_bytes=4000)
    gc(cache)
    [before] = ends(cache)
    stream.write_text("[" + ",\n".join(LINES[1:]) + "]")
    prepare(stream, shard_bytes=4000)
    assert len(ends(cache)) == 2
    gc(cache)
    assert len(ends(cache)) == 1
    assert not before.exists()


def test_a_transform_goes_with_its_last_shard(cache: Path, source: Path, prepare: PrepareIt) -> None:
    first, second = (prepare(source, shard_bytes=4000, seq_len=length, packing="bfd_split") for length in (32, 64))
    assert len(list((cache / "transforms").iterdir())) == 2
    for path in (first.path, *(cache / "plans").iterdir()):
        age(path, 3)
    size = sum({path.stat().st_ino: path.stat().st_size for path in cache.rglob("*") if path.is_file()}.values())
    gc(cache, max_bytes=size - 2000)
    assert (first.path.exists(), second.path.exists()) == (False, True)
    [left] = (cache / "transforms").iterdir()
    pack = next(part for part in json.loads(left.read_bytes())["parts"] if part["class"] == "Pack")
    assert pack["fields"]["seq_len"] == 64
    assert digests(cache) == made_of(second)


def wrong(sha: str) -> Wrong:
    return Wrong(
        {"tokenizer": "fastokens", "version": "0.0.1", "tokenizer_sha256": sha[:16]}, str(BackendDisagrees("other ids"))
    )


def test_a_verdict_stays_as_long_as_anything_was_made_with_its_tokenizer(
    cache: Path, source: Path, prepare: PrepareIt
) -> None:
    made = prepare(source, shard_bytes=4000)
    judged, other = wrong(made.content["tokenizer_digest"]), wrong("0" * 64)
    distrust(cache, judged)
    distrust(cache, other)
    (cache / "distrusted" / "cut.json").write_bytes(b'{"made_by"')
    gc(cache)
    assert distrusted(cache) == [judged]
    assert len(list((cache / "distrusted").iterdir())) == 1
    shutil.rmtree(cache / "shards")  # the directory alone speaks of the tokenizer
    shutil.rmtree(cache / "plans")
    gc(cache)
    assert distrusted(cache) == [judged]
    shutil.rmtree(made.path)
    gc(cache)
    assert distrusted(cache) == []


def test_younger_records_stay(cache: Path, superseded: tuple[Prepared, Prepared]) -> None:
    distrust(cache, wrong("0" * 64))
    age(cache / "shards", 8)
    for path in (superseded[0].path, *(cache / "plans").iterdir()):
        age(path, 8)
    newest = max(
        (cache / "plans").iterdir(),
        key=lambda path: json.loads(path.read_bytes())["directory"] == superseded[1].path.name,
    )
    age(newest, 0)
    before = {name: data for name, data in tree(cache).items() if name.startswith(RECORDS)}
    gc(cache, older_than=7)
    assert not superseded[0].path.exists()
    assert {name: data for name, data in tree(cache).items() if name.startswith(RECORDS)} == before
    for folder in RECORDS:
        age(cache / folder, 8)
    gc(cache, older_than=7)
    assert digests(cache) == made_of(superseded[1])
    assert distrusted(cache) == []


def test_garbage_among_the_records_is_no_obstacle(cache: Path, source: Path, prepare: PrepareIt) -> None:
    made = prepare(source, shard_bytes=4000)
    for folder in (*RECORDS, "ranges/ab", "shards"):
        (cache / folder).mkdir(exist_ok=True)
        for number, data in enumerate(
            (
                b"",
                b"[1]",
                b"null",
                b'{"ends": 5}',
                b'{"made_by": 5}',
                b'{"made_by": {"tokenizer_sha256": []}}',
                b"[" * 3000,
            )
        ):
            (cache / folder / f"garbage{number}.json").write_bytes(data)
    gc(cache)
    assert [
        name for name in tree(cache) if "garbage" in name and not name.startswith("ranges/garbage")
    ] == []  # beside the folders of digests nothing is looked for
    assert digests(cache) == made_of(made)


def exit_code(process: subprocess.Popen[str]) -> int:
    process.communicate(timeout=600)
    return process.returncode


@pytest.mark.parametrize("step", [3, pytest.param(1, marks=pytest.mark.long)])
def test_killed_at_every_place_it_leaves_a_cache_in_which_all_that_is_referenced_works(
    tmp_path: Path, cache: Path, source: Path, superseded: tuple[Prepared, Prepared], prepare: PrepareIt, step: int
) -> None:
    """At every third in the default run."""
    new = superseded[1]
    distrust(cache, wrong("0" * 64))
    shutil.copy(next((cache / "transforms").iterdir()), cache / "transforms" / "aa.json")
    original = tmp_path / "original"
    cache.rename(original)

    def copy() -> None:
        shutil.rmtree(cache, ignore_errors=True)
        subprocess.run(["cp", "-a", original, cache], check=True)  # with its hard links

    copy()
    assert exit_code(collect_in(cache, tmp_path / "marks", "")) == 0
    places = sorted(path.name.replace(".", ":").replace("gc:", "gc.") for path in (tmp_path / "marks").iterdir())
    assert (
        sum(place.startswith("gc.receipts") for place in places) >= 5
    )  # a directory, a shard, and a record of each kind
    for place in places[::step]:
        copy()
        marks = tmp_path / place
        assert exit_code(collect_in(cache, marks, f"{place}=kill")) == -signal.SIGKILL
        assert all(check.ok for check in verify(new.path)), place
        assert made_of(new) <= digests(cache), place
        assert all(Ledger(cache).receipt(shard["shard_key"]) for shard in new.content["shards"]), place
        assert prepare(source, shard_bytes=4000).path == new.path, place
        gc(cache)
        assert digests(cache) == made_of(new), place
        assert len(list((cache / "transforms").iterdir())) == 1, place
        assert distrusted(cache) == [], place
        assert list((cache / "attempts").iterdir()) == [], place


def test_a_preparation_that_begins_meanwhile_gets_its_records_back(
    tmp_path: Path, cache: Path, prepare: PrepareIt, source: Path
) -> None:
    """All that speaks of nothing any more, since the shards went before."""
    prepare(source, shard_bytes=4000)
    distrust(cache, wrong("0" * 64))
    for name in ("datasets", "shards", "plans"):
        shutil.rmtree(cache / name)
        (cache / name).mkdir()
    before = [tree(cache / name) for name in RECORDS]
    assert all(before)
    place = len(before[0])  # the last of the first kind: those of the other kinds were not looked at yet
    process = collect_in(cache, tmp_path / "marks", f"gc.receipts:{place}=pause")
    paused(process, tmp_path / "marks" / f"gc.receipts.{place}")
    begin_an_attempt(cache)
    (tmp_path / "marks" / "go").touch()
    out, _ = process.communicate(timeout=600)
    assert "kept      the rest: begun is at work in this cache; run again later" in out
    assert [tree(cache / name) for name in RECORDS] == before
