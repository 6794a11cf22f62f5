"""Inputs from an object store, by a real client and a real server on loopback: the same bytes, few requests, faults."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from s3_server import Server

from moai.core import stores
from moai.core.errors import ConfigError, MoaiError, SourceError
from moai.core.files import read_range, storage_of
from moai.prepared.manifest import Prepared
from moai.sources.discover import discover


@pytest.fixture
def bucket(server: Server) -> Path:
    """Every kind of file, plain and compressed."""
    folder = server.folder / "bkt" / "corpus"
    folder.mkdir(parents=True)
    texts = [f"document {n}: the quick brown fox 그리고 문서 {n * 7919}. " * 8 for n in range(300)]
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode()
    (folder / "a.jsonl").write_bytes(lines)
    (folder / "b.jsonl.zst").write_bytes(zstandard.compress(lines[: len(lines) // 2].rpartition(b"\n")[0]))
    pq.write_table(pa.table({"text": texts}), folder / "c.parquet", row_group_size=50)
    (folder / "d.csv").write_text("text\n" + "".join(f'"{text}"\n' for text in texts[:50]))
    with pa.OSFile(str(folder / "e.arrow"), "w") as out, pa.ipc.new_file(out, pa.schema({"text": pa.string()})) as file:
        file.write_table(pa.table({"text": texts[:20]}), max_chunksize=5)
    (folder / "LICENSE.txt").write_text("of the data")
    (folder / "notes.pdf").write_text("nobody reads it")
    return folder


def test_every_kind_of_object_gives_the_bytes_of_the_file(
    bucket: Path, server: Server, prepare: Callable[..., Prepared], tmp_path: Path
) -> None:
    how = {"seq_len": 128, "packing": "bfd_split", "shard_bytes": 20_000, "max_bad_ratio": 0.1}
    local = prepare(str(bucket), **how)
    assert len(local.content["shards"]) > 10
    there = prepare("s3://bkt/corpus/", cache_dir=str(tmp_path / "other"), **how)
    assert there.content_digest == local.content_digest
    assert {one["file"]: one["xxh3_128"] for one in there.content["shards"]} == {
        one["file"]: one["xxh3_128"] for one in local.content["shards"]
    }
    asked = len(server.seen)
    again = prepare("s3://bkt/corpus/", cache_dir=str(tmp_path / "other"), **how)
    assert again.path == there.path
    assert [line.split()[0] for line in server.seen[asked:]] == ["GET"]  # one listing tells that nothing changed


def test_what_names_mean(bucket: Path, server: Server, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    below = discover("s3://bkt/corpus")
    assert [(one.kind.name, [file.name for file in one.files]) for one in below] == [
        ("arrow", ["e.arrow"]),
        ("csv", ["d.csv"]),
        ("lines", ["a.jsonl", "b.jsonl.zst"]),
        ("parquet", ["c.parquet"]),
    ]
    assert below[0].left_out == {"not data": ("LICENSE.txt",)}
    assert below[0].passed_over == ("notes.pdf",)
    assert "not data: 1 (LICENSE.txt)" in caplog.text
    [matching] = discover("s3://bkt/**/*.jsonl*")
    assert [file.path for file in matching.files] == ["s3://bkt/corpus/a.jsonl", "s3://bkt/corpus/b.jsonl.zst"]
    [web] = discover(f"{server.url}/bkt/corpus/a.jsonl")
    assert web.name == "a.jsonl"
    assert web.files[0].stamp == discover("s3://bkt/corpus/a.jsonl")[0].files[0].stamp


def test_splits_below_a_prefix_are_those_of_a_folder(bucket: Path) -> None:
    for name in ("train", "test"):
        shutil.copy(bucket / "a.jsonl", bucket.parent / f"{name}.jsonl")
    shutil.rmtree(bucket)
    [train] = discover("s3://bkt/")
    assert [file.name for file in train.files] == ["train.jsonl"]
    assert train.left_out == {"split test": ("test.jsonl",)}
    [test] = discover("s3://bkt@test")
    assert [file.name for file in test.files] == ["test.jsonl"]
    with pytest.raises(SourceError, match="holds the splits train, test; name one, as in s3://bkt@"):
        discover("s3://bkt@validation")


def test_ranges_are_read_and_nothing_else(bucket: Path, server: Server) -> None:
    data, url = (bucket / "c.parquet").read_bytes(), "s3://bkt/corpus/c.parquet"
    (bucket / "c.parquet").write_bytes(data := data + bytes(3 << 20))
    assert b"".join(read_range(url, 1 << 20, 2 << 20, 1 << 19)) == data[1 << 20 : 2 << 20]
    assert [line.split("bytes=")[1] for line in server.seen if "bytes=" in line] == ["1048576-2097151"]
    with storage_of(url).random_access(url, mapped=False) as file:
        assert file.size() == len(data)
        file.seek(5)
        assert file.read(7) == data[5:12]


@pytest.mark.parametrize("failing", [0.3])
def test_faults_cost_time_and_nothing_else(
    bucket: Path, server: Server, prepare: Callable[..., Prepared], tmp_path: Path, failing: float
) -> None:
    """503, resets and late answers, to a third of the requests."""
    wanted = prepare("s3://bkt/corpus/*.jsonl", shard_bytes=20_000).content_digest
    server.failing = failing
    found = prepare("s3://bkt/corpus/*.jsonl", shard_bytes=20_000, cache_dir=str(tmp_path / "other"))
    assert found.content_digest == wanted


@pytest.mark.parametrize(
    ("spec", "environ", "said"),
    [
        ("s3://bkt/corpus/none.jsonl", {}, "there is no such object or bucket"),
        ("s3://none/corpus/", {}, "there is no such object or bucket"),
        (
            "s3://bkt/corpus/a.jsonl",
            {"AWS_ACCESS_KEY_ID": "AKIAWRONG"},
            "the store denies access: check its credentials",
        ),
        ("s3://bkt/corpus/a.jsonl", {"AWS_ENDPOINT_URL": "http://127.0.0.1:1"}, "the store does not answer"),
    ],
)
def test_what_is_wrong_is_one_line_within_five_seconds(
    bucket: Path, monkeypatch: pytest.MonkeyPatch, spec: str, environ: dict[str, str], said: str
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    stores._store.cache_clear()
    began = time.monotonic()
    with pytest.raises(MoaiError, match=f"^{re.escape(spec)}: not readable \\({re.escape(said)}") as error:
        discover(spec)
    assert time.monotonic() - began < 5
    assert "\n" not in str(error.value)
    assert not any(word in str(error.value) for word in ("AKIA", "secret", "echoed"))


def test_credentials_have_no_place_in_a_name() -> None:
    for url in ("https://me:hidden@host/a.jsonl", "https://host/a.jsonl?X-Amz-Signature=hidden"):
        with pytest.raises(ConfigError) as error:
            discover(url)
        assert "hidden" not in str(error.value)


def test_an_object_that_changes_while_it_is_read_is_refused(bucket: Path) -> None:
    url = "s3://bkt/corpus/c.parquet"
    (bucket / "c.parquet").write_bytes(bytes(5 << 20))
    with storage_of(url).open(url) as file:
        assert file.read(1 << 20)
        (bucket / "c.parquet").write_bytes(bytes([1]) * (5 << 20))
        file.seek(3 << 20)
        with pytest.raises(OSError, match="changed while it was read"):
            file.read(1 << 20)


def test_without_obstore_the_way_to_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "find_spec", lambda name: None)
    stores._store.cache_clear()
    with pytest.raises(ConfigError, match=re.escape("pip install 'moai[store]'")):
        discover("s3://bkt/a.jsonl")
