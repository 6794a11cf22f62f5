"""What was there and was not used: said, counted in the manifest, and the end of the run where whole files are lost."""

from __future__ import annotations

import gzip
import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moai.core.errors import SourceError, TooManyBadRecords
from moai.prepared.inspect import View
from moai.prepared.manifest import Prepared
from moai.pretraining.options import DataConfig
from moai.pretraining.plan import describe
from moai.pretraining.recipe import prepare_or_wait
from moai.pretraining.repair import repair
from moai.pretraining.status import StatusConfig, show

PrepareIt = Callable[..., Prepared]
GOOD = "".join(json.dumps({"text": f"document {n}"}) + "\n" for n in range(50))
LFS = f"version https://git-lfs.github.com/spec/v1\noid sha256:{4:064d}\nsize 1037962819\n"
UNREADABLE = {
    "lfs": (LFS, "7 files hold no data: shard-4.jsonl is a Git LFS pointer: run `git lfs pull`"),
    "page": ("<html>" + "<p>x</p>\n" * 9, "7 files hold no data: shard-4.jsonl is an HTML page"),
    "broken": ('{"text": "cut\n', r"7 files: shard-4.jsonl (1 broken JSON)"),
    "other": ('{"title": "a", "body": "b"}\n' * 3, r"7 files: shard-4.jsonl (3 no text)"),
    "late page": (" " * 5000 + "\n<html>\n", r"7 files: shard-4.jsonl (1 broken JSON)"),
}


def shards(folder: Path, **other: str) -> Path:
    """Seven of them, of which some are something else."""
    folder.mkdir(parents=True)
    for number in range(7):
        (folder / f"shard-{number}.jsonl").write_text(other.get(f"shard_{number}", GOOD))
    return folder


def source(prepared: Prepared, which: int = 0) -> dict[str, Any]:
    return dict(prepared.content["sources"][which])


@pytest.mark.parametrize(
    ("what", "shard_bytes"),
    [("lfs", 1000), ("page", 16_000_000), ("broken", 16_000_000), ("other", 1000), ("late page", 16_000_000)],
)
def test_a_file_of_which_nothing_is_read_ends_the_run_unless_its_share_is_allowed(
    tmp_path: Path, prepare: PrepareIt, what: str, shard_bytes: int
) -> None:
    text, said = UNREADABLE[what]
    folder = shards(tmp_path / "data", shard_4=text, shard_6=text if what == "lfs" else GOOD)
    bad = 2 if what == "lfs" else 1
    for allowed in ({}, {"max_bad_files": bad / 7 - 0.01}):
        with pytest.raises(TooManyBadRecords) as failed:
            prepare(folder, shard_bytes=shard_bytes, **allowed)
        assert said in str(failed.value)
        assert "--max_bad_files" in str(failed.value)
    for allowed in ({"max_bad_files": bad / 7}, {"max_bad_ratio": 1.0}):
        prepared = prepare(folder, shard_bytes=shard_bytes, **allowed)
        assert prepared.content["documents"] == 350 - bad * 50
        (entry,) = source(prepared)["bad_files"].values()
        assert entry["files"] == bad
        assert entry["first"][0] == "shard-4.jsonl"
        assert source(prepared)["files"] == 7
    with pytest.raises(TooManyBadRecords, match=r"[12] of 7 files"):  # what is published is judged again
        prepare(folder, shard_bytes=shard_bytes)


def test_columnar_files_and_text_are_judged_alike(tmp_path: Path, prepare: PrepareIt) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(3):
        text = pa.array([None, None] if number == 1 else ["a", "b"], pa.string())
        pq.write_table(pa.table({"text": text}), folder / f"{number}.parquet")
    with pytest.raises(TooManyBadRecords, match=r"1 of 3 files: 1.parquet \(2 null text\)"):
        prepare(folder)
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_bytes(b"words\n" * 30)
    (texts / "b.txt").write_bytes(b"\xff\xfe\n" * 3)
    with pytest.raises(TooManyBadRecords, match=r"1 of 2 files: b.txt \(3 invalid UTF-8\)"):
        prepare(texts)
    prepared = prepare(texts, txt_document="file")  # each file is one record, and counts as one
    assert prepared.content["records"] == {"read": 2, "kept": 1, "filtered": 0, "quarantined": 1}


def test_files_without_a_record_are_a_warning_by_name(
    tmp_path: Path, prepare: PrepareIt, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shards(tmp_path / "data", shard_2="", shard_3="\n \n", shard_5="")
    (folder / "nothing.jsonl.gz").write_bytes(gzip.compress(b""))
    caplog.set_level(logging.WARNING)
    prepared = prepare(folder)
    assert source(prepared)["left_out"] == {
        "empty": {"files": 2, "first": ["shard-2.jsonl", "shard-5.jsonl"]},
        "without a record": {"files": 2, "first": ["nothing.jsonl.gz", "shard-3.jsonl"]},
    }
    assert "empty: 2 (shard-2.jsonl, shard-5.jsonl)" in caplog.text
    assert "2 files hold no record: nothing.jsonl.gz, shard-3.jsonl" in caplog.text


def test_a_directory_without_its_bad_files_is_repaired_to_the_same_bytes(tmp_path: Path, prepare: PrepareIt) -> None:
    folder = shards(tmp_path / "data", shard_4=LFS, shard_5='{"cut\n')
    (folder / "texts").mkdir()
    for name in ("a.txt", "b.txt", "c.txt", "LICENSE.txt"):
        (folder / "texts" / name).write_text(LFS if name == "b.txt" else f"words of {name}\n" * 40)
    prepared = prepare(folder, shard_bytes=1000, max_bad_files=0.3)
    damaged = prepared.path / prepared.content["shards"][-1]["file"]
    whole = damaged.read_bytes()
    damaged.unlink()
    shutil.rmtree(tmp_path / "cache" / "shards")  # else the finished one is linked again
    list(repair(prepared.path))
    assert damaged.read_bytes() == whole


def test_a_cache_of_before_is_judged_again_and_its_shards_are_reused(
    tmp_path: Path, prepare: PrepareIt, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shards(tmp_path / "data")
    prepared = prepare(folder)
    (plan,) = (tmp_path / "cache" / "plans").glob("*.json")
    record = json.loads(plan.read_bytes())
    del record["files_judged"]
    plan.write_text(json.dumps({**record, "trusted": True}))
    caplog.set_level(logging.INFO)
    again = prepare(folder)
    assert (again.path, again.content) == (prepared.path, prepared.content)
    assert "prepared when files were not judged one by one" in caplog.text
    assert f"{len(again.content['shards'])} reused" in caplog.text


def test_what_fits_no_shape_is_named_with_its_file(tmp_path: Path, prepare: PrepareIt) -> None:
    folder = shards(tmp_path / "data")
    for number in range(6):
        (folder / f"labels-{number}.json").write_text(json.dumps({str(n): "x" for n in range(3)}))
    with pytest.raises(SourceError, match=r"data \(labels-0\.json and 5 more\): no known shape among its columns"):
        prepare(folder)
    with pytest.raises(SourceError, match=r"data/labels-0\.json: no known shape among its columns"):
        prepare(folder / "labels-0.json")


def test_names_of_files_do_not_steer_the_terminal(
    tmp_path: Path, prepare: PrepareIt, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shards(tmp_path / "data")
    for name, text in (("b\x1b[2J.jsonl", ""), ("\u202etxt.jsonl", "\n"), ("c\x07.md", ""), ("d\x9b.jsonl", "{\n")):
        (folder / name).write_text(text)
    with pytest.raises(TooManyBadRecords) as failed:
        prepare(folder)
    said = str(failed.value) + caplog.text
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", said.replace("\n", ""))
    assert "d\\x9b.jsonl (1 broken JSON)" in said
    assert "empty: 1 (b\\x1b[2J.jsonl)" in said


def test_a_licence_beside_the_data_and_its_other_splits_are_no_documents(
    tmp_path: Path, prepare: PrepareIt, tokenizer_dir: Path, texts: Callable[[Prepared], list[str]]
) -> None:
    folder = tmp_path / "clone"
    for name in ("data/train.jsonl", "data/validation.jsonl", "data/test.jsonl", "LICENSE.txt", "dataset_infos.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps({"text": name}) + "\n")
    (folder / "README.md").write_text("words")
    config = DataConfig(dataset=(str(folder),), tokenizer_path=str(tokenizer_dir), cache_dir=str(tmp_path / "cache"))
    planned = list(describe(config))
    assert "input        clone: 1 lines files, 29 bytes" in planned
    assert "not read     clone: split test: 1 (data/test.jsonl)" in planned
    assert "passed over  clone: 1 (README.md)" in planned
    prepared = prepare(folder)
    assert texts(prepared) == ["data/train.jsonl"]
    assert {why: entry["first"] for why, entry in source(prepared)["left_out"].items()} == {
        "split validation": ["data/validation.jsonl"],
        "split test": ["data/test.jsonl"],
        "not data": ["LICENSE.txt", "dataset_infos.json"],
    }
    assert prepared.manifest["run"]["passed_over"] == {"clone": {"files": 1, "first": ["README.md"]}}
    (folder / "data" / "test.jsonl").unlink()
    again = prepare(folder)  # the same documents, and another word about the rest
    assert again.content["shards"] == prepared.content["shards"]
    assert "split test" not in source(again)["left_out"]


def test_plain_text_is_a_document_a_line_and_many_small_files_are_asked_about(
    tmp_path: Path, prepare: PrepareIt, tokenizer_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(30):
        (folder / f"{number}.txt").write_text("A title\n\nA story.\n")
    asked = "texts: 30 text files of 18 bytes on average are read as a document a line; if each is one document, set "
    caplog.set_level(logging.INFO)
    prepare(folder)
    assert "texts: 30 files, text from plain text, a document a line" in caplog.messages
    assert f"{asked}--txt_document file" in caplog.messages
    caplog.clear()
    prepare(folder, txt_document="file")
    assert "texts: 30 files, text from plain text, a document a file" in caplog.messages
    assert "--txt_document file" not in caplog.text
    config = DataConfig(dataset=(str(folder),), tokenizer_path=str(tokenizer_dir), cache_dir=str(tmp_path / "other"))
    planned = "\n".join(describe(config))
    assert "texts: 30 txt files, 540 bytes, a document a line" in planned
    assert asked in planned


def test_what_is_held_out_is_called_that(
    tmp_path: Path, prepare: PrepareIt, tokenizer_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shards(tmp_path / "data")
    caplog.set_level(logging.INFO)
    prepare(folder, eval_ratio=0.1)
    assert "held out" not in caplog.text.lower()
    caplog.clear()
    prepare(folder, eval_ratio=0.1, held_out=True)
    said = [line for line in caplog.messages if "ocuments" in line]
    assert said
    assert all(line.startswith("[Rank 0, held out] ") for line in said)
    given = {"dataset": (str(folder),), "tokenizer_path": str(tokenizer_dir), "eval_ratio": 0.1}
    aside = prepare_or_wait(DataConfig(**given, cache_dir=str(tmp_path / "cache"), held_out=True), environ={})
    view = View.open(aside.path)
    assert next(view.lines(view.rows(1))).startswith("--- held-out row 0 of ")
    (result,) = (line for line in show(StatusConfig(cache_dir=str(tmp_path / "cache"))) if line.startswith("result"))
    assert result == f"result       {aside.path} (held out)"
    config = DataConfig(**given, cache_dir=str(tmp_path / "other"))
    assert "held out     10.00% of the documents, by the hash of their text: in a pass of its own (--held_out)" in list(
        describe(config)
    )
