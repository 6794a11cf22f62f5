"""`moai repair`: only what is damaged is made again, to the same bytes, whatever kills it; what changed meanwhile is
named.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from moai.core.errors import DamagedError, SourceError
from moai.core.files import canonical_json
from moai.prepared.manifest import MANIFEST, Prepared, write_manifest
from moai.prepared.verify import verify
from moai.pretraining.publish import whereabouts
from moai.pretraining.repair import repair
from moai.sources.discover import Input
from moai.sources.kinds.lines import Lines

PrepareIt = Callable[..., Prepared]
RunIt = Callable[..., subprocess.CompletedProcess[str]]

LINES = [
    json.dumps(
        {"text": " ".join([str(number), *(hashlib.sha256(b"%d %d" % (number, word)).hexdigest() for word in range(8))])}
    )
    for number in range(60)
]
"""Nothing that a compressor could make small: a compressed file has several shards too."""
BAD = '{"text": broken'


def lines(path: Path) -> Path:
    path.write_text("\n".join([*LINES[:40], BAD, *LINES[40:], BAD]) + "\n")
    return path


def compressed(path: Path) -> Path:
    path.write_bytes(zstandard.compress(("\n".join(LINES) + "\n").encode()))
    return path


def parquet(path: Path) -> Path:
    pq.write_table(pa.table({"text": [json.loads(line)["text"] for line in LINES]}), path, row_group_size=7)
    return path


INPUTS = {"a.jsonl": lines, "a.jsonl.zst": compressed, "a.parquet": parquet}


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    with open(path, "r+b") as file:  # in place: whatever else links the file is damaged too
        file.write(data)


def data_files(directory: Path) -> list[Path]:
    return sorted(directory.glob("data-*.arrow"))


@pytest.mark.parametrize("name", INPUTS)
def test_damaged_cut_and_missing_shards_come_back_to_the_same_bytes(
    tmp_path: Path, prepare: PrepareIt, name: str
) -> None:
    prepared = prepare(INPUTS[name](tmp_path / name), shard_bytes=4000, seq_len=64, packing="bfd_split", add_bos=False)
    whole, finished = contents(prepared.path), contents(tmp_path / "cache" / "shards")
    first, second, third, *untouched = data_files(prepared.path)
    before = [path.stat().st_mtime_ns for path in untouched]
    flip(first)
    os.truncate(second, 100)
    third.unlink()
    said = list(repair(prepared.path))
    assert [line for line in said if "made again" in line] != []
    assert contents(prepared.path) == whole
    assert (
        contents(tmp_path / "cache" / "shards") == finished
    )  # the finished shard was the same file, and is mended with it
    assert [path.stat().st_mtime_ns for path in untouched] == before
    assert all(check.ok for check in verify(prepared.path))
    assert list((tmp_path / "cache" / "attempts").iterdir()) == []
    assert list(repair(prepared.path)) == [f"nothing to repair: every file of {prepared.path} has its recorded hash"]


def test_every_file_but_the_manifest_can_be_lost_together(
    tmp_path: Path, prepare: PrepareIt, tokenizer_dir: Path
) -> None:
    prepared = prepare(lines(tmp_path / "a.jsonl"), shard_bytes=4000)
    whole = contents(prepared.path)
    assert "quarantine.jsonl" in whole
    for path in prepared.path.iterdir():
        if path.name != MANIFEST:
            path.unlink()
    shutil.rmtree(tmp_path / "cache" / "shards")
    with pytest.raises(DamagedError, match="--tokenizer_path"):
        list(repair(prepared.path))
    list(repair(prepared.path, tokenizer_path=str(tokenizer_dir)))
    assert contents(prepared.path) == whole


def test_a_directory_carried_away_is_repaired_from_input_that_was_moved(tmp_path: Path, prepare: PrepareIt) -> None:
    source = lines(tmp_path / "a.jsonl")
    prepared = prepare(source, shard_bytes=4000)
    whole = contents(prepared.path)
    carried = shutil.copytree(prepared.path, tmp_path / "elsewhere")
    moved = source.rename(tmp_path / "b.jsonl")
    flip(data_files(carried)[1])
    (carried / "quarantine.jsonl").unlink()
    with pytest.raises(SourceError, match=r"a\.jsonl"):
        list(repair(carried))
    with pytest.raises(DamagedError, match=r"quarantine\.jsonl: made again it has the hash"):
        list(repair(carried, dataset=[str(moved)]))  # the file's name stands in it
    os.link(moved, tmp_path / "a.jsonl")
    list(repair(carried))
    assert contents(carried) == whole
    assert [path.name for path in tmp_path.iterdir() if "repair" in path.name] == []


def test_input_that_was_named_relatively_is_found_from_any_directory(
    tmp_path: Path, prepare: PrepareIt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what was prepared does not depend on where it lay: the same name, and the same bytes but for `run`."""
    made = []
    for place in (tmp_path / "here", tmp_path / "there"):
        (place / "data").mkdir(parents=True)
        lines(place / "data" / "a.jsonl")
        monkeypatch.chdir(place)
        made.append(prepare("data", shard_bytes=4000, cache_dir=str(place / "cache")))
    first, second = made
    assert first.path.name == second.path.name
    assert first.content_digest == second.content_digest
    whole = contents(first.path)
    assert {**whole, MANIFEST: b""} == {**contents(second.path), MANIFEST: b""}
    monkeypatch.chdir(tmp_path)
    flip(data_files(first.path)[0])
    list(repair(first.path))
    assert contents(first.path) == whole
    assert all(place.encode() not in canonical_json(first.content) for place in ("here", str(tmp_path)))


@pytest.mark.parametrize(
    ("spec", "dataset", "where"),
    [
        ("data/a.jsonl", "", "{}/data/a.jsonl"),
        ("data/*.jsonl", "", "{}/data/*.jsonl"),
        ("data:ko@train", "data", "{}/data:ko@train"),
        ("my/data:ko", "my/data", "my/data:ko"),
    ],
)
def test_only_what_lies_here_is_named_in_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, dataset: str, where: str
) -> None:
    """The last one is of the Hub, since there is no such folder."""
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    given = Input(spec, "a", Lines(), (), {"dataset": dataset} if dataset else {})
    assert whereabouts(given) == where.format(tmp_path)


def test_a_manifest_that_knows_only_a_relative_name_says_from_where_to_repair(
    tmp_path: Path, prepare: PrepareIt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As earlier versions wrote it. The name could be one of the Hub's, which is not asked."""
    (tmp_path / "my" / "data").mkdir(parents=True)
    lines(tmp_path / "my" / "data" / "a.jsonl")
    prepared = prepare(tmp_path / "my" / "data", shard_bytes=4000)
    (prepared.path / MANIFEST).unlink()
    write_manifest(prepared.path, prepared.content, {**prepared.manifest["run"], "inputs": ["my/data"]})
    whole = contents(prepared.path)
    flip(data_files(prepared.path)[0])
    monkeypatch.chdir(tmp_path / "my")
    with pytest.raises(
        SourceError,
        match=r"my/my/data: no such file.*run repair in the directory where prepare was given my/data, or name the "
        r"input with --dataset",
    ):
        list(repair(prepared.path))
    monkeypatch.chdir(tmp_path)
    list(repair(prepared.path))
    assert contents(prepared.path) == whole


def test_a_range_that_other_files_have_pushed_along_is_found(tmp_path: Path, prepare: PrepareIt) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "m.jsonl").write_text("\n".join(LINES[:30]) + "\n")
    prepared = prepare(folder, shard_bytes=4000)
    whole = contents(prepared.path)
    (folder / "a.jsonl").write_text("\n".join(LINES[30:]) + "\n")
    flip(data_files(prepared.path)[1])
    list(repair(prepared.path))
    assert contents(prepared.path) == whole


def test_a_source_that_changed_is_named_and_the_rest_is_repaired(tmp_path: Path, prepare: PrepareIt) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for name, part in (("a.jsonl", LINES[:30]), ("b.jsonl", LINES[30:])):
        (folder / name).write_text("\n".join(part) + "\n")
    prepared = prepare(folder, shard_bytes=4000)
    whole = contents(prepared.path)
    first, last = data_files(prepared.path)[0], data_files(prepared.path)[-1]
    flip(first)
    flip(last)
    damaged = last.read_bytes()
    (folder / "b.jsonl").write_text("\n".join(LINES[31:]) + "\n")
    with pytest.raises(SourceError, match=rf"{folder}/b\.jsonl: changed since {prepared.path.name} was prepared"):
        list(repair(prepared.path))
    assert contents(prepared.path) == {**whole, last.name: damaged}


def test_a_damaged_manifest_is_left_to_prepare_which_reuses_the_shards(tmp_path: Path, prepare: PrepareIt) -> None:
    source = lines(tmp_path / "a.jsonl")
    prepared = prepare(source, shard_bytes=4000)
    flip(prepared.path / MANIFEST)
    with pytest.raises(DamagedError, match="prepare again: finished shards are reused"):
        list(repair(prepared.path))
    shutil.rmtree(prepared.path)
    again = prepare(source, shard_bytes=4000)
    assert again.manifest["run"]["shards_made"] == 0


def test_a_directory_that_holds_the_same_damaged_file_is_named(tmp_path: Path, prepare: PrepareIt) -> None:
    source = lines(tmp_path / "a.jsonl")
    first = prepare(source, shard_bytes=4000)
    source.write_text(source.read_text() + LINES[0] + "\n")
    second = prepare(source, shard_bytes=4000)
    assert first.path != second.path
    flip(data_files(first.path)[0])
    assert f"damaged too  {second.path}: shares shards with this one; repair it as well" in list(repair(first.path))
    assert any("linked from the finished shard" in line for line in repair(second.path))
    assert all(check.ok for directory in (first.path, second.path) for check in verify(directory))


def test_a_directory_where_a_shard_should_be_is_not_removed(tmp_path: Path, prepare: PrepareIt) -> None:
    prepared = prepare(lines(tmp_path / "a.jsonl"), shard_bytes=4000)
    shard = data_files(prepared.path)[0]
    shard.unlink()
    shard.mkdir()
    with pytest.raises(DamagedError, match="a directory, not a regular file; remove it and repair again"):
        list(repair(prepared.path))


def run_repair(directory: Path, marks: Path, wanted: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "MOAI_TESTING": "1", "MOAI_FAILPOINT_DIR": str(marks), "MOAI_FAILPOINT": wanted}
    return subprocess.run(
        [sys.executable, "-m", "moai", "repair", str(directory)], env=env, capture_output=True, text=True, timeout=150
    )


@pytest.mark.parametrize(
    "wanted", ["repair.check:1", "repair.check:2", "repair.replace:1", "repair.replace:2", "repair.relink:1"]
)
def test_killed_anywhere_a_second_repair_ends_with_the_same_bytes(
    tmp_path: Path, prepare: PrepareIt, wanted: str
) -> None:
    prepared = prepare(lines(tmp_path / "a.jsonl"), shard_bytes=4000)
    whole = contents(prepared.path)
    damaged = data_files(prepared.path)[0]
    flip(damaged)
    (prepared.path / "state.json").unlink()
    (tmp_path / "marks").mkdir()
    assert run_repair(prepared.path, tmp_path / "marks", f"{wanted}=kill").returncode == -signal.SIGKILL
    left = contents(prepared.path)
    assert all(left[name] == whole[name] for name in left if name != damaged.name)  # nothing half written
    list(repair(prepared.path))
    assert contents(prepared.path) == whole


def test_what_was_damaged_on_its_way_does_not_replace_anything(tmp_path: Path, prepare: PrepareIt) -> None:
    prepared = prepare(lines(tmp_path / "a.jsonl"), shard_bytes=4000)
    flip(data_files(prepared.path)[0])
    damaged = contents(prepared.path)
    (tmp_path / "marks").mkdir()
    ended = run_repair(prepared.path, tmp_path / "marks", "repair.check:1=flip")
    assert ended.returncode == DamagedError.exit_code
    assert "made again it has the hash" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert contents(prepared.path) == damaged
