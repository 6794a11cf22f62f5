"""Prepared directories in a store: published once, manifest last; fetched once, every file checked."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import crashes
import pytest
from s3_server import Server

from moai.core.distributed import Ranks
from moai.core.errors import ConfigError, DamagedError, SourceError
from moai.prepared.manifest import MANIFEST, Prepared
from moai.prepared.stored import fetch, publish
from moai.prepared.verify import verify
from moai.pretraining.options import DataConfig
from moai.training.prepared_data import fetched, open_all

TO = "s3://bkt/ready"


@pytest.fixture
def made(prepare: Callable[..., Prepared], corpus: Path, server: Server) -> Prepared:
    (server.folder / "bkt").mkdir(parents=True)
    return prepare(str(corpus), seq_len=64, shard_bytes=20_000, max_bad_ratio=0.1)


def puts(server: Server) -> list[str]:
    return [line.split()[1].rpartition("/")[2] for line in server.seen if line.startswith("PUT")]


def test_what_is_published_is_fetched_whole_and_only_once(made: Prepared, server: Server, tmp_path: Path) -> None:
    url = publish([made], TO)
    assert url == f"{TO}/{made.content_digest}/"
    assert puts(server)[-1] == MANIFEST
    assert sorted(puts(server)) == sorted(path.name for path in made.path.iterdir())
    path = fetch(url, tmp_path / "there")
    assert path == tmp_path / "there" / "fetched" / made.content_digest
    assert all(check.ok for check in verify(path, full=True))
    asked = len(server.seen)
    assert fetch(url.rstrip("/"), tmp_path / "there") == path
    assert not [line for line in server.seen[asked:] if MANIFEST not in line]


def test_equal_content_is_published_once_and_other_content_is_refused(made: Prepared, server: Server) -> None:
    url = publish([made], TO)
    before = puts(server)
    assert publish([made], TO) == url
    assert puts(server) == before
    place = server.folder / url.removeprefix("s3://") / MANIFEST
    place.write_text(json.dumps({**json.loads(place.read_text()), "content_digest": "0" * 64}))
    with pytest.raises(ConfigError, match="holds other content"):
        publish([made], TO)
    with pytest.raises(DamagedError, match="its manifest is that of 0000"):
        fetch(url, server.folder / "cache")


def test_a_publishing_that_broke_off_is_no_directory_and_goes_on(
    made: Prepared, server: Server, tmp_path: Path
) -> None:
    url = publish([made], TO)
    place = server.folder / url.removeprefix("s3://")
    (place / MANIFEST).unlink()
    [lost, *_] = sorted(place.glob("data-*"))
    lost.unlink()
    with pytest.raises(SourceError, match="there is no such object or bucket"):
        fetch(url, tmp_path / "there")
    server.seen.clear()
    publish([made], TO)
    assert puts(server) == [lost.name, MANIFEST]


def test_a_changed_bit_in_the_store_is_found_and_what_was_fetched_is_kept(
    made: Prepared, server: Server, tmp_path: Path
) -> None:
    url = publish([made], TO)
    [*_, shard] = sorted((server.folder / url.removeprefix("s3://")).glob("data-*"))
    data = shard.read_bytes()
    shard.write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])
    with pytest.raises(DamagedError, match=rf"{shard.name}: has another hash than the manifest says"):
        fetch(url, tmp_path / "there")
    shard.write_bytes(data)
    server.seen.clear()
    assert all(check.ok for check in verify(fetch(url, tmp_path / "there"), full=True))
    assert len([line for line in server.seen if "data-" in line and line.startswith("GET")]) < len(
        made.content["shards"]
    )


def test_publish_from_the_command_line_and_open_it_in_every_rank(
    corpus: Path, server: Server, tmp_path: Path, run_moai: Callable[..., Any]
) -> None:
    """With what is held out, where neither data nor cache are. One rank fetches, the other hears of it."""
    flags = crashes.command(corpus, tmp_path / "cache", "serial")[4:]
    ran = run_moai("prepare", *flags, "--eval_ratio", "0.2", "--publish", TO)
    assert ran.returncode == 0, ran.stderr
    [url] = [line.split()[1] for line in ran.stdout.splitlines() if line.startswith("published")]
    assert not any("a-secret" in text for text in (ran.stdout, ran.stderr))
    shutil.rmtree(tmp_path / "cache")
    data = DataConfig(cache_dir=str(tmp_path / "there"))
    found = [fetched([url], data, Ranks(rank, rank, 2, 2), {"MOAI_LAUNCH_ID": "one"}) for rank in (0, 1)]
    assert found[0] == found[1]
    [prepared] = open_all(found[0])
    assert prepared.held_out
    assert prepared.held_out.content["documents"]
    assert len([line for line in server.seen if "GET" in line and MANIFEST in line]) == 1


def test_a_place_that_is_no_store_is_refused(run_moai: Callable[..., Any], corpus: Path, tmp_path: Path) -> None:
    ran = run_moai("prepare", *crashes.command(corpus, tmp_path / "cache", "serial")[4:], "--publish", "ready/here")
    assert ran.returncode == 2
    assert "--publish ready/here: is no place in a store" in ran.stderr
