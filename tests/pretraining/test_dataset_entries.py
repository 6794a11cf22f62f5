"""Entries of --dataset that look like something else, and sources of a user's own: their names, their keys."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from test_repair_parts import Numbers

from moai.core.config import resolve
from moai.core.errors import ConfigError, PartFailed, SourceError
from moai.prepared.manifest import Prepared
from moai.pretraining.dataset import own_mixture, parse_dataset
from moai.pretraining.options import DataConfig

PrepareIt = Callable[..., Prepared]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("year=2024/a.jsonl", "a=b.jsonl", "one/train.jsonl", "two/train.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"text": "a"}\n')
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("path", ["year=2024/a.jsonl", "year=2024/*.jsonl", "year=*/a.jsonl", "a=b.jsonl"])
def test_what_is_there_under_that_spelling_is_no_name(here: Path, prepare: PrepareIt, path: str) -> None:
    (entry,) = parse_dataset([path], place="--dataset")
    assert (entry.path, entry.name) == (path, None)
    assert prepare(path).content["documents"] == 1


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("n=a=b.jsonl,weight=[", r"--dataset: n: weight: '\[' is not readable as YAML"),
        ("n=a=b.jsonl,weight=.nan", "weight = nan: must be a number, and not negative"),
        ({"path": "a=b.jsonl", "weight": math.inf}, "weight = inf: must be a number"),
        ("a=b.jsonl,weight=2", None),
        ("one/train.jsonl,weight=2", "settings follow a name; write NAME=one/train.jsonl,weight=2"),
        ("n=a=b.jsonl,min_chars=few", r"^--dataset: n, field min_chars = 'few': is no int$"),
    ],
)
def test_settings_that_say_nothing_are_refused(here: Path, entry: Any, said: str | None) -> None:
    if said is None:  # a name `a`, as it is written
        assert parse_dataset([entry], place="--dataset")[0].name == "a"
        return
    with pytest.raises(ConfigError, match=said):
        parse_dataset([entry], place="--dataset")


def test_weights_go_to_the_names_that_sources_of_one_name_get(here: Path, prepare: PrepareIt) -> None:
    entries = [{"path": f"{place}/train.jsonl", "weight": weight} for place, weight in (("one", 0.25), ("two", 0.75))]
    names = [source["name"] for source in prepare(*entries).content["sources"]]
    assert own_mixture(entries)[0] == tuple(f"{name}={weight}" for name, weight in zip(names, (0.25, 0.75)))


def test_two_sources_may_call_their_shards_alike(prepare: PrepareIt, texts: Any) -> None:
    prepared = prepare(Numbers(10), Numbers(20))
    assert [source["name"] for source in prepared.content["sources"]] == ["numbers", "numbers-2"]
    assert texts(prepared) == [f"number {n}" for n in (*range(10), *range(20))]


@dataclass(frozen=True)
class Twice(Numbers):
    def shards(self) -> Any:
        yield from [*super().shards()] * 2


class Undecorated(Numbers):
    def __init__(self, size: int) -> None:
        super().__init__(size)


class NoFields:
    name = "no fields"
    shards = digest = read = remember = None


@pytest.mark.parametrize(
    ("source", "error", "said"),
    [
        (Twice(10), SourceError, "numbers: gives two shards called 'numbers:00000'"),
        (NoFields(), ConfigError, r"NoFields .* has no fields to be told by; write @dataclass\(frozen=True\)"),
        (Undecorated(10), ConfigError, r"Undecorated .*: its fields cannot be told; write @dataclass"),
    ],
)
def test_a_source_that_cannot_be_told_by_what_it_is_is_refused(
    prepare: PrepareIt, source: Any, error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        prepare(source)


def test_a_changed_source_serves_no_old_shard(prepare: PrepareIt, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare(Numbers(10))
    monkeypatch.setattr(Numbers, "version", 2, raising=False)
    assert prepare(Numbers(10)).content["shards"][0]["shard_key"] != first.content["shards"][0]["shard_key"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "dataset: a.jsonl\n\tseq_len: 2\n",
            r"line 2, column 1: .* character '\\t' that cannot start any token; indent with spaces$",
        ),
        (
            "seq_len: 2\ndataset: [a\npacking: bfd\n",
            r"line 3, column 8: while parsing a flow sequence expected ',' or '\]', but got ':'$",
        ),
        ("seq_len: 2\ndataset: a.jsonl\nseq_len: 4\n", r"line 3, column 1: 'seq_len' is there twice, first in line 1$"),
        (
            "dataset:\n  - {path: a, min_chars: 2, min_chars: 4}\n",
            r"line 2, column 29: 'min_chars' is there twice, first in line 2$",
        ),
    ],
)
def test_a_file_of_settings_that_is_no_yaml_or_says_a_thing_twice_is_refused_with_its_line(
    tmp_path: Path, text: str, said: str
) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError, match=said):
        resolve([DataConfig], ["--config", str(tmp_path / "run.yaml")], {}, prog="test")


def test_a_file_of_settings_may_share_values_and_name_one_anew(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("dataset:\n  - &first {path: a, min_chars: 2}\n  - {<<: *first, path: b}\n")
    config = resolve([DataConfig], ["--config", str(tmp_path / "run.yaml")], {}, prog="test")[DataConfig]
    assert [(entry.path, entry.min_chars) for entry in config.dataset] == [("a", 2), ("b", 2)]  # type: ignore[union-attr]


@pytest.mark.parametrize("method", ["shards", "read", "remember"])
def test_a_source_that_raises_is_one_line_with_its_place(
    prepare: Callable[..., Prepared], monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def fails(self: Any, *given: Any) -> Any:
        raise ValueError("no net")

    monkeypatch.setattr(Numbers, method, fails)
    with pytest.raises(
        PartFailed, match=r"numbers: source Numbers \(test_repair_parts.py\) failed in line \d+ .*: ValueError: no net"
    ):
        prepare({"source": Numbers(30), "name": "numbers"})
