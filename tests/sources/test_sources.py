"""Every kind of input gives the same documents in the same order; shards are cut by content alone; what cannot be read
is one clear line.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from moai.cache.ledger import Ledger
from moai.core.errors import ConfigError, MoaiError, SourceError
from moai.engine.pipeline import Meter, Raw, Shard, shard_key
from moai.prepared.manifest import Prepared
from moai.pretraining.assembly import request
from moai.pretraining.options import DataConfig
from moai.sources.discover import discover
from moai.sources.local import LocalSource
from moai.sources.streams import open_blocks

PrepareIt = Callable[..., Prepared]
Texts = Callable[[Prepared], list[str]]

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    f"Document {n}: " + ("가나다 " if n % 3 else 'words \\ and "quotes" [and] {brackets}, ') * (n % 13 + 1)
    for n in range(300)
]
ROWS = [{"id": n, "text": text} for n, text in enumerate(DOCUMENTS)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
TABLE = pa.Table.from_pylist(ROWS)


def in_pieces(data: bytes, pack: Callable[[bytes], bytes]) -> bytes:
    """Frames or members that end in the middle of a line."""
    return b"".join(pack(data[start : start + 3333]) for start in range(0, len(data), 3333))


def save_arrow(path: Path, table: pa.Table = TABLE, rows: int = 10) -> None:
    with pa.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)


WRITERS: dict[str, Callable[[Path], object]] = {
    "a.jsonl": lambda p: p.write_bytes(LINES),
    "crlf.ndjson": lambda p: p.write_bytes(b"\n" + LINES.replace(b"\n", b"\r\n\r\n")),
    "no-newline.jsonl": lambda p: p.write_bytes(LINES.rstrip()),
    "frames.jsonl.zst": lambda p: p.write_bytes(in_pieces(LINES, zstandard.ZstdCompressor().compress)),
    "members.jsonl.gz": lambda p: p.write_bytes(in_pieces(LINES, gzip.compress)),
    "array.json": lambda p: p.write_text(json.dumps(ROWS, ensure_ascii=False)),
    "array-indented.json": lambda p: p.write_text(json.dumps(ROWS, indent=2)),
    "array.json.zst": lambda p: p.write_bytes(
        in_pieces(json.dumps(ROWS).encode(), zstandard.ZstdCompressor().compress)
    ),
    "lines.json": lambda p: p.write_bytes(LINES),
    "values-indented.json": lambda p: p.write_text("\n".join(json.dumps(row, indent=2) for row in ROWS)),
    "values-on-two-lines.json": lambda p: p.write_text(
        "\n".join(json.dumps(row).replace(', "text"', ',\n "text"') for row in ROWS)
    ),
    "values-in-one-line.json.gz": lambda p: p.write_bytes(
        gzip.compress("".join(json.dumps(row) for row in ROWS).encode())
    ),
    "groups.parquet": lambda p: pq.write_table(TABLE, p, row_group_size=7),
    "pages.parquet": lambda p: pq.write_table(
        TABLE, p, row_group_size=20, data_page_size=512, compression="zstd", use_dictionary=False
    ),
    "a.arrow": lambda p: save_arrow(p),
    "saved": lambda p: datasets.Dataset.from_list(ROWS).save_to_disk(str(p), num_shards=5),
}


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def fingerprint(prepared: Prepared) -> tuple[str, str]:
    digest = hashlib.sha256()
    for path in sorted(prepared.path.glob("data-*.arrow")):
        digest.update(path.read_bytes())
    return digest.hexdigest(), prepared.content_digest


def source_of(path: Path, cache: Path, **changes: Any) -> LocalSource:
    (given,) = discover(str(path))
    return LocalSource(
        **{
            "name": given.name,
            "kind": given.kind,
            "files": given.files,
            "shard_bytes": 2000,
            "cache": cache,
            "spool_dir": cache,
            "columns": ("text",),
            **changes,
        }
    )


# ---- the same documents from every kind


@pytest.mark.parametrize("shard_bytes", [2000, 16_000_000])
@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_gives_the_same_documents_in_order(
    tmp_path: Path, prepare: PrepareIt, texts: Texts, name: str, shard_bytes: int
) -> None:
    WRITERS[name](tmp_path / name)
    prepared = prepare(tmp_path / name, shard_bytes=shard_bytes)
    assert texts(prepared) == DOCUMENTS
    assert prepared.content["records"] == {"read": 300, "kept": 300, "filtered": 0, "quarantined": 0}
    shards = len(prepared.content["shards"])
    assert shards > 3 if shard_bytes == 2000 else shards == (5 if name == "saved" else 1)


@pytest.mark.parametrize("ending", ["txt", "txt.zst", "txt.gz"])
def test_text_files_are_a_document_a_line_or_a_document_a_file(
    tmp_path: Path, prepare: PrepareIt, texts: Texts, ending: str
) -> None:
    pack = {"txt": bytes, "txt.zst": zstandard.ZstdCompressor().compress, "txt.gz": gzip.compress}[ending]
    data = ("\n".join(DOCUMENTS) + "\n").encode()
    (tmp_path / f"a.{ending}").write_bytes(pack(data))
    assert texts(prepare(tmp_path / f"a.{ending}", shard_bytes=2000)) == DOCUMENTS
    assert texts(prepare(tmp_path / f"a.{ending}", shard_bytes=2000, txt_document="file", seq_len=100_000)) == [
        data.decode().rstrip("\n")
    ]


def test_a_folder_of_every_kind_is_read_whole_by_kinds_and_names(
    tmp_path: Path, prepare: PrepareIt, texts: Texts
) -> None:
    folder = tmp_path / "data"
    for number, (kind, name) in enumerate(
        [
            ("txt", "z.txt"),
            ("lines", "deep/b.jsonl"),
            ("lines", "a.jsonl.gz"),
            ("json", "c.json"),
            ("parquet", "d.parquet"),
        ]
    ):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        document = {"text": f"{kind} {number}"}
        if kind == "parquet":
            pq.write_table(pa.Table.from_pylist([document]), path)
        else:
            line = document["text"] if kind == "txt" else json.dumps([document] if kind == "json" else document)
            path.write_bytes(gzip.compress(line.encode()) if name.endswith("gz") else line.encode())
    for name in (".hidden.jsonl", "README.md", "__pycache__/x.jsonl", ".git/y.jsonl"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("not data")
    prepared = prepare(folder)
    assert texts(prepared) == ["json 3", "lines 2", "lines 1", "parquet 4", "txt 0"]
    assert [source["name"] for source in prepared.content["sources"]] == [
        "data.json",
        "data.lines",
        "data.parquet",
        "data.txt",
    ]


def test_globs_take_what_they_match_once(tmp_path: Path, prepare: PrepareIt, texts: Texts) -> None:
    for name in ("b.jsonl", "x/a.jsonl", "x/y/c.jsonl", "x/no.md"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_text(json.dumps({"text": name}))
    for pattern in ("**/*.jsonl", "**/**/*.jsonl"):  # the second gives some paths twice
        assert texts(prepare(tmp_path / "data" / pattern)) == ["b.jsonl", "x/a.jsonl", "x/y/c.jsonl"]
    assert texts(prepare(tmp_path / "data" / "x" / "?.jsonl")) == ["x/a.jsonl"]


def test_splits_of_a_saved_dict_are_named_behind_an_at_sign(tmp_path: Path, prepare: PrepareIt, texts: Texts) -> None:
    dataset = datasets.Dataset.from_dict({"text": ["train"]})
    both = datasets.DatasetDict({"train": dataset, "test": datasets.Dataset.from_dict({"text": ["test"]})})
    both.save_to_disk(str(tmp_path / "dict"))
    assert texts(prepare(tmp_path / "dict")) == ["train"]
    assert texts(prepare(f"{tmp_path / 'dict'}@test")) == ["test"]
    with pytest.raises(SourceError, match="holds the splits train, test; name one"):
        prepare(f"{tmp_path / 'dict'}@validation")


def test_a_name_that_is_no_utf8_is_a_name_too(tmp_path: Path, prepare: PrepareIt, texts: Texts) -> None:
    """Archives made on a Korean Windows unpack to cp949 names."""
    folder = tmp_path / "data"
    folder.mkdir()
    with open(os.path.join(os.fsencode(folder), "가.jsonl".encode("cp949")), "wb") as file:
        file.write(b'{"text": "inside"}\n{"broken"\n')
    prepared = prepare(folder)
    assert texts(prepared) == ["inside"]
    assert json.loads((prepared.path / "quarantine.jsonl").read_text(encoding="utf-8"))["file"] == "\\xb0\\xa1.jsonl"


def test_a_link_to_a_folder_is_not_followed_and_that_is_said(
    tmp_path: Path, prepare: PrepareIt, texts: Texts, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("data/a.jsonl", "elsewhere/b.jsonl"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(json.dumps({"text": name}))
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "c.jsonl").symlink_to(tmp_path / "elsewhere" / "b.jsonl")  # a linked file is read
    with caplog.at_level(logging.WARNING):
        assert texts(prepare(tmp_path / "data")) == ["data/a.jsonl", "elsewhere/b.jsonl"]
    assert "links to directories are not followed, the first linked" in caplog.text


# ---- shards: cut by content alone


def test_the_same_bytes_for_every_number_of_workers_and_every_batch_size(tmp_path: Path, prepare: PrepareIt) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("a.jsonl", "array.json", "frames.jsonl.zst", "groups.parquet", "a.arrow"):
        WRITERS[name](folder / name)
    made = set()
    for number, changes in enumerate(
        [
            {},
            {"num_proc": 2},
            {"dataset_batch_size": 3, "writer_batch_size": 1},
            {"dataset_batch_size": 100_000, "memory_mode": "disk"},
        ]
    ):
        cache = tmp_path / f"cache{number}"
        made.add(
            fingerprint(prepare(folder, shard_bytes=6000, seq_len=128, packing="bfd", cache_dir=str(cache), **changes))
        )
    assert len(made) == 1


@pytest.mark.parametrize("name", [name for name in WRITERS if name != "saved"])
def test_ranges_and_digests_do_not_depend_on_blocks(tmp_path: Path, name: str) -> None:
    """`batch_bytes` follows from the memory mode: it must not reach the keys."""
    WRITERS[name](tmp_path / name)
    seen = set()
    for block in (64, 1000, 4 << 20):
        source = source_of(tmp_path / name, tmp_path, batch_bytes=block, trust_stamps=False)
        shards = list(source.shards())
        seen.add(tuple(digest_by_reading(source, shard).digest for shard in shards))
        assert [source.digest(shard) for shard in shards] == [digest_by_reading(source, shard) for shard in shards]
        assert all(shard.raw in (None, source.digest(shard)) for shard in shards)
    assert len(seen) == 1
    assert len(seen.pop()) > 3


def digest_by_reading(source: LocalSource, shard: Shard) -> Raw:
    meter = Meter()
    for _ in source.read(shard, meter):
        pass
    return meter.raw()


def groups_of(folder: Path, cache: Path) -> set[tuple[str, ...]]:
    return {
        tuple(segment.file.name for segment in shard.segments)
        for shard in source_of(folder, cache, shard_bytes=20_000).shards()
    }


def test_one_more_small_file_changes_the_group_it_joins_and_hardly_another(tmp_path: Path) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    lot = random.Random(7)
    for number in range(2000):
        (folder / f"{number:04d}.jsonl").write_text(json.dumps({"text": "x" * lot.randrange(10, 1500)}) + "\n")
    before = groups_of(folder, tmp_path)
    assert sorted(name for group in before for name in group) == [f"{number:04d}.jsonl" for number in range(2000)]
    assert 50 < len(before) < 250
    changed = []
    for number in lot.sample(range(2000), 9):
        added = folder / f"{number:04d}-more.jsonl"
        added.write_text(json.dumps({"text": "y" * lot.randrange(10, 1500)}) + "\n")
        changed.append(len(groups_of(folder, tmp_path) - before))
        added.unlink()
    assert min(changed) >= 1
    assert sorted(changed)[4] <= 2
    assert max(changed) <= 6


def test_of_two_thousand_files_one_more_makes_one_shard_more_or_two_again(tmp_path: Path, prepare: PrepareIt) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(2000):
        (folder / f"{number:04d}.txt").write_text(f"Document {number}\n" * (number % 7 + 1))
    first = prepare(folder, shard_bytes=4000)
    shards = len(first.content["shards"])
    assert shards > 20
    (folder / "1000-more.txt").write_text("One more\n")
    second = prepare(folder, shard_bytes=4000)
    assert second.content["documents"] == first.content["documents"] + 1
    assert 1 <= second.manifest["run"]["shards_made"] <= 4
    assert second.manifest["run"]["shards_reused"] >= shards - 4


def test_a_file_appended_to_is_read_again_from_its_last_shard_on(
    tmp_path: Path, prepare: PrepareIt, texts: Texts
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINES)
    first = prepare(path, shard_bytes=2000)
    with open(path, "ab") as file:
        file.write(b'{"text": "appended"}\n')
    second = prepare(path, shard_bytes=2000)
    assert texts(second) == [*DOCUMENTS, "appended"]
    assert second.manifest["run"]["shards_made"] <= 2
    assert second.manifest["run"]["shards_reused"] >= len(first.content["shards"]) - 1


@pytest.fixture
def stamps_prove(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files just written count as old, so that a test need not wait two seconds."""
    monkeypatch.setattr("moai.core.files._RACY_NS", 0)


def settled(*paths: Path) -> None:
    """Until the stamps of these files are old enough to prove anything."""
    while any(file.stamp.is_racy() for path in paths for given in discover(str(path)) for file in given.files):
        time.sleep(0.05)


@pytest.mark.usefixtures("stamps_prove")
@pytest.mark.parametrize("name", ["frames.jsonl.zst", "array.json"])
def test_a_second_look_at_a_file_without_inner_doors_reads_it_once_or_not_at_all(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a word on what is finished, each range of a compressed file would be decompressed to from the
    beginning.
    """
    WRITERS[name](tmp_path / name)
    cache = tmp_path / "cache"
    for part in ("ranges", "shards", "spool"):
        (cache / part).mkdir(parents=True)
    source = source_of(tmp_path / name, cache, spool_dir=cache / "spool", transform_keys=("key",))
    first = list(source.shards())
    assert len(first) > 3
    again = list(source.shards())
    compressed = name.endswith("zst")
    assert [shard.raw for shard in again] == [shard.raw for shard in first]
    assert all(
        bool(shard.segments[0].spool) == compressed for shard in again
    )  # nothing is finished: the driver hands the ranges on
    records = [batch["record"].to_pylist() for shard in again for batch in source.read(shard, Meter())]
    monkeypatch.setattr(
        Ledger,
        "receipt",
        lambda self, key: key in {shard_key(shard.raw, "key") for shard in first if shard.raw} or None,
    )
    known = list(source.shards())
    assert not any(shard.segments[0].spool for shard in known)  # all is finished: nobody opens the file
    assert [batch["record"].to_pylist() for shard in known for batch in source.read(shard, Meter())] == records


# ---- identity: nothing stale, nothing mistaken for another


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "txt", "parquet"])
def test_the_same_size_and_time_of_another_content_is_noticed(
    tmp_path: Path, prepare: PrepareIt, texts: Texts, ending: str
) -> None:
    path = tmp_path / f"a.{ending}"

    def write(text: str) -> None:
        if ending == "parquet":
            pq.write_table(pa.table({"text": [text]}), path)
        else:
            line = text if ending == "txt" else json.dumps({"text": text})
            path.write_bytes(gzip.compress(line.encode(), mtime=0) if ending.endswith("gz") else line.encode())
        os.utime(path, ns=(10**18, 10**18))

    write("old text")
    size = path.stat().st_size
    assert texts(prepare(path)) == ["old text"]
    assert not list(
        (tmp_path / "cache" / "ranges").rglob("*.json")
    )  # stamps this young prove nothing, so nothing is kept under them
    write("new text")
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (size, 10**18)
    assert texts(prepare(path)) == ["new text"]
    if ending == "jsonl":  # once is enough to wait for
        settled(path)
        assert texts(prepare(path)) == ["new text"]
        write("new TEXT")
        assert texts(prepare(path)) == ["new TEXT"]


def test_columns_with_dots_in_their_names_are_told_apart_by_their_content(
    tmp_path: Path, prepare: PrepareIt, texts: Texts
) -> None:
    for name, text in (("a", "one text"), ("b", "quite another text")):
        pq.write_table(pa.table({"my.text": [text], "my": [{"text": "decoy"}]}), tmp_path / f"{name}.parquet")
        assert texts(prepare(tmp_path / f"{name}.parquet", text_column="my.text")) == [text]


def test_the_same_pages_under_another_type_are_another_content(
    tmp_path: Path, prepare: PrepareIt, texts: Texts
) -> None:
    """Strings and bytes have the same pages; only the schema tells which they are."""
    pq.write_table(
        pa.table({"text": pa.array([b"words"], pa.binary())}), tmp_path / "bytes.parquet", store_schema=False
    )
    pq.write_table(
        pa.table({"text": pa.array(["words"], pa.string())}), tmp_path / "string.parquet", store_schema=False
    )
    with pytest.raises(SourceError, match="its column 'text' is binary, not text"):
        prepare(tmp_path / "bytes.parquet", text_column="text")
    assert texts(prepare(tmp_path / "string.parquet", text_column="text")) == ["words"]


def test_columns_that_make_no_text_make_no_difference(tmp_path: Path, prepare: PrepareIt) -> None:
    pq.write_table(TABLE, tmp_path / "a.parquet", row_group_size=100)
    pq.write_table(
        TABLE.set_column(0, "id", pa.array([f"other {n}" for n in range(300)])),
        tmp_path / "b.parquet",
        row_group_size=100,
    )
    first, second = (prepare(tmp_path / name).content["shards"] for name in ("a.parquet", "b.parquet"))
    assert [shard["shard_key"] for shard in first] == [shard["shard_key"] for shard in second]


def test_text_template_and_column_make_other_shards_of_the_same_bytes(
    tmp_path: Path, prepare: PrepareIt, texts: Texts
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "text", "title": "title", "body": "body"}\n')
    found = [
        texts(prepare(tmp_path / "a.jsonl", **changes))
        for changes in ({}, {"text_column": "title"}, {"text_template": "{title}: {body}"})
    ]
    assert found == [["text"], ["title"], ["title: body"]]
    assert (
        prepare(tmp_path / "a.jsonl", text_column="text").path == prepare(tmp_path / "a.jsonl").path
    )  # the same said in words


@pytest.mark.usefixtures("stamps_prove")
def test_a_file_named_several_times_is_read_several_times(tmp_path: Path, prepare: PrepareIt, texts: Texts) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "again"}\n')
    assert texts(prepare(path)) == ["again"]
    assert texts(prepare(path, path)) == ["again"] * 2


@pytest.mark.usefixtures("stamps_prove")
def test_a_folder_and_its_files_named_one_by_one_do_not_answer_for_each_other(
    tmp_path: Path, prepare: PrepareIt
) -> None:
    """Files of a folder share shards, files named alone do not: other rows from the same documents."""
    folder = tmp_path / "data"
    folder.mkdir()
    for name in "ab":
        (folder / f"{name}.jsonl").write_text(json.dumps({"text": f"{name} " * 40}) + "\n")
    alone = prepare(folder / "a.jsonl", folder / "b.jsonl", packing="wrapped", cache_dir=str(tmp_path / "alone"))
    prepare(folder, packing="wrapped")
    after = prepare(folder / "a.jsonl", folder / "b.jsonl", packing="wrapped")
    assert fingerprint(after)[0] == fingerprint(alone)[0]


def test_sources_of_the_same_name_are_told_apart(tmp_path: Path, prepare: PrepareIt, texts: Texts) -> None:
    for name in ("x/train", "y/train", "z/train-2"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "a.jsonl").write_text(json.dumps({"text": name}))
    assert texts(prepare(*(tmp_path / name for name in ("x/train", "y/train", "z/train-2")))) == [
        "x/train",
        "y/train",
        "z/train-2",
    ]


def test_a_renamed_file_is_named_by_its_new_name(tmp_path: Path, prepare: PrepareIt) -> None:
    path = tmp_path / "old.jsonl"
    path.write_text('{"text": "good"}\n{"text": 5}\n')
    prepare(path)
    prepared = prepare(path.rename(tmp_path / "new.jsonl"))
    assert json.loads((prepared.path / "quarantine.jsonl").read_bytes())["file"] == "new.jsonl"


def test_stamps_that_were_too_young_to_prove_anything_do_not_grow_old_in_the_hand(
    tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    wanted = request(
        DataConfig(
            dataset=(str(tmp_path / "a.jsonl"),), tokenizer_path=str(tokenizer_dir), cache_dir=str(tmp_path / "cache")
        )
    )
    assert not wanted.stamps_prove
    monkeypatch.setattr("moai.core.files._RACY_NS", 0)  # as if two seconds had gone by while the work was done
    assert not wanted.stamps_prove


@pytest.mark.usefixtures("stamps_prove")
def test_another_seq_len_decompresses_a_file_once_and_not_once_a_shard(
    tmp_path: Path, prepare: PrepareIt, monkeypatch: pytest.MonkeyPatch
) -> None:
    WRITERS["frames.jsonl.zst"](tmp_path / "a.jsonl.zst")
    assert len(prepare(tmp_path / "a.jsonl.zst", shard_bytes=2000).content["shards"]) > 10
    opened = []
    monkeypatch.setattr(
        "moai.sources.kinds.stream.open_blocks", lambda path, *rest: opened.append(path) or open_blocks(path, *rest)
    )
    prepare(tmp_path / "a.jsonl.zst", shard_bytes=2000, seq_len=100)
    assert (
        len(opened) <= 3
    )  # two looks at its first records, for its shape and for the tokenizer's probe, and the one pass


def test_a_file_may_be_named_whose_name_is_no_utf8(tmp_path: Path, prepare: PrepareIt, texts: Texts) -> None:
    path = os.fsdecode(os.path.join(os.fsencode(tmp_path), "가.jsonl".encode("cp949")))
    Path(path).write_text('{"text": "inside"}\n')
    assert texts(prepare(path)) == ["inside"]


def test_a_cache_inside_the_data_is_refused(tmp_path: Path, prepare: PrepareIt) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(ConfigError, match="cache_dir"):
        prepare(tmp_path / "data", cache_dir=str(tmp_path / "data" / "cache"))


def test_a_shard_whose_bad_records_are_lost_is_made_again(tmp_path: Path, prepare: PrepareIt) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": 5}\n')
    (tmp_path / "b.jsonl").write_text('{"text": "b"}\n')
    prepare(tmp_path / "a.jsonl")
    for path in (tmp_path / "cache" / "shards").glob("*.bad.jsonl"):
        path.unlink()
    assert prepare(tmp_path / "a.jsonl", tmp_path / "b.jsonl").content["records"]["quarantined"] == 1


def test_a_damaged_shard_is_made_again_when_its_directory_is_gone(
    tmp_path: Path, prepare: PrepareIt, texts: Texts
) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    prepared = prepare(tmp_path / "a.jsonl")
    for shard in (tmp_path / "cache" / "shards").glob("*.arrow"):
        os.truncate(shard, shard.stat().st_size - 8)
    with pytest.raises(MoaiError, match=r"remove .* and prepare again"):
        prepare(tmp_path / "a.jsonl")
    shutil.rmtree(prepared.path)  # what the message says
    assert texts(prepare(tmp_path / "a.jsonl")) == DOCUMENTS
