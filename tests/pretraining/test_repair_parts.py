"""`repair` of a directory with everything in it: a user's parts and source, settings of single sources, carried
columns, a shard without rows.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from moai.core.errors import DamagedError, SourceError
from moai.engine.part import Filter, Signal
from moai.engine.pipeline import Meter, Raw, Shard
from moai.engine.schema import Column
from moai.prepared.manifest import Prepared
from moai.prepared.verify import verify
from moai.pretraining import keys as identity
from moai.pretraining.repair import repair
from moai.tokenizers.load import FILES


@dataclass(frozen=True)
class NotSeven(Filter):
    needs = ("n",)

    def keep(self, batch: pa.RecordBatch) -> Any:
        return [n != 7 for n in batch["n"].to_pylist()]


@dataclass(frozen=True)
class Size(Signal):
    needs = ("text",)
    adds = (Column("size", "float32", per="piece"), Column("start", "string", per="document"))

    def measure(self, batch: pa.RecordBatch) -> Any:
        texts = batch["text"].to_pylist()
        return {"size": [len(text) for text in texts], "start": [text[:2] for text in texts]}


@dataclass(frozen=True)
class Numbers:
    upto: int
    name: str = "numbers"

    def shards(self) -> Iterator[Shard]:
        for first in range(0, self.upto, 10):
            yield Shard(f"numbers:{first:05d}", (first,), "", 100)

    def digest(self, shard: Shard) -> Raw:
        meter = Meter()
        self._note(shard, meter)
        return meter.raw()

    def read(self, shard: Shard, meter: Meter) -> Iterator[pa.RecordBatch]:
        self._note(shard, meter)
        (first,) = shard.segments
        yield pa.record_batch(
            {"text": [f"number {n}" for n in range(first, first + 10)], "n": list(range(first, first + 10))}
        )

    def remember(self, shard: Shard, raw: Raw) -> None:
        pass

    def _note(self, shard: Shard, meter: Meter) -> None:
        meter.begin_segment()
        meter.update(str(shard.segments).encode(), lines=10)


@pytest.fixture
def prepared(prepare: Callable[..., Prepared], tmp_path: Path) -> Prepared:
    def lines(name: str, rows: list[Any]) -> Path:
        path = tmp_path / name
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return path

    one = lines("a.jsonl", [{"body": f"letters {n} " + "word " * (n % 9), "n": n} for n in range(100)] + ["broken"])
    other = lines(
        "b.jsonl", [{"text": "seven" * 5, "n": 7}] * 40 + [{"text": f"other {n}", "n": None} for n in range(40)]
    )
    found = prepare(
        {"path": other, "name": "sevens", "sample": 0.95},
        {"path": one, "text_column": "body", "min_chars": 5},
        Numbers(20),
        carry_columns=("n",), transforms=(NotSeven(), Size()), shard_bytes=1000, packing="bfd", seq_len=32,
    )  # fmt: skip
    assert found.content["shards"][0]["file"] is None  # all its documents are filtered
    assert len(found.content["sources"]) == 3
    return found


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


@pytest.mark.parametrize("place", ["cache", "no shards", "elsewhere", "other input"])
def test_every_file_is_made_again_to_the_same_bytes(prepared: Prepared, tmp_path: Path, place: str) -> None:
    before, directory, dataset = contents(prepared.path), prepared.path, list[str]()
    if place == "no shards":
        shutil.rmtree(tmp_path / "cache" / "shards")
        (tmp_path / "cache" / "shards").mkdir()
    if place in ("elsewhere", "other input"):
        directory = tmp_path / "copy"
        shutil.copytree(prepared.path, directory)
    if place == "other input":
        (tmp_path / "moved").mkdir()
        dataset = [str((tmp_path / name).rename(tmp_path / "moved" / name)) for name in ("b.jsonl", "a.jsonl")]
    for name in before:
        if name not in ("manifest.json", *FILES):  # of the tokenizer nothing but a copy can be put there
            (directory / name).unlink()
    assert list(repair(directory, dataset=dataset))[-1].startswith("whole")
    assert contents(directory) == before
    assert all(check.ok for check in verify(directory))


def test_a_shard_without_rows_that_cannot_be_made_again_is_named(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(tmp_path / "cache" / "shards")
    (prepared.path / "documents-00000.arrow").unlink()
    monkeypatch.setattr(NotSeven, "version", 2)
    with pytest.raises(DamagedError, match=r"documents-00000.arrow: cannot be made again here"):
        list(repair(prepared.path))
    monkeypatch.setattr(NotSeven, "version", 1)
    (tmp_path / "b.jsonl").write_text('{"text": "another", "n": 1}\n' * 50)
    with pytest.raises(SourceError, match=r"b.jsonl: changed since .* that documents-00000.arrow was made from"):
        list(repair(prepared.path))


def test_a_part_that_is_not_found_is_named_with_the_way_out(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    (prepared.path / "sources.json").unlink()
    monkeypatch.delattr(__import__(__name__), "NotSeven")
    with pytest.raises(
        SourceError, match=r"'NotSeven' is not there .*; run repair in the folder that holds what it was prepared with"
    ):
        list(repair(prepared.path))


def test_a_plan_and_its_record_are_the_same(
    prepared: Prepared, tmp_path: Path, prepare: Callable[..., Prepared], caplog: pytest.LogCaptureFixture
) -> None:
    """What a record gives back of `carry_columns` is a list, which must not be another thing than the flag's tuple."""
    ((_, record),) = identity.plans(tmp_path / "cache")
    caplog.set_level("INFO", "moai")
    prepare(
        tmp_path / "b.jsonl",
        carry_columns=("n",),
        transforms=(NotSeven(), Size()),
        shard_bytes=1000,
        packing="bfd",
        seq_len=32,
    )
    (said,) = [line for line in caplog.messages if "Cache miss" in line]
    assert "carry_columns" not in said
    assert "packing" not in said
    assert "sources" in said
    assert record["fields"]["config"]["carry_columns"] == ["n"]
