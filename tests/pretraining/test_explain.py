"""`moai explain`: two keys, field by field, and what each difference costs."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moai.core.config import identity as affecting
from moai.core.errors import DamagedError
from moai.prepared.manifest import Prepared
from moai.pretraining.explain import explain
from moai.pretraining.options import DataConfig

PrepareIt = Callable[..., Prepared]

FLAGS: dict[str, Any] = {"seq_len": 64, "packing": "bfd_split", "shard_bytes": 4000, "num_proc": 0}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"document {number}", "body": "b"}) + "\n" for number in range(20)))
    return path


@pytest.fixture
def asked(tmp_path: Path, source: Path, tokenizer_dir: Path) -> Callable[..., list[str]]:
    def ask(against: Path | None = None, **changes: Any) -> list[str]:
        flags = {
            "dataset": (str(source),),
            "tokenizer_path": str(tokenizer_dir),
            "cache_dir": str(tmp_path / "cache"),
            **FLAGS,
            **changes,
        }
        return list(explain(DataConfig(**flags), str(against) if against else None))

    return ask


def differing(lines: list[str]) -> list[str]:
    return [line.split(maxsplit=1)[1] for line in lines if line.startswith("differs")]


def test_without_anything_prepared_it_says_so(asked: Callable[..., list[str]]) -> None:
    assert any("nothing was prepared in this cache yet" in line for line in asked())


def test_the_same_flags_are_a_hit_with_every_field_the_same(
    source: Path, prepare: PrepareIt, asked: Callable[..., list[str]]
) -> None:
    prepared = prepare(source, **FLAGS)
    lines = asked(prepared.path)
    assert differing(lines) == []
    same = next(line for line in lines if line.startswith("same"))
    assert all(name in same for name in [*affecting(DataConfig()), "tokenizer_sha256", "format_version", "all files"])
    assert not lines[-1].startswith("verdict      a miss: seq_len")


OTHERS: dict[str, Any] = {
    "seq_len": 128,
    "packing": "wrapped",
    "long_documents": "split",
    "min_chars": 2,
    "max_chars": 99,
    "max_doc_bytes": 1000,
    "shard_bytes": 5000,
    "text_column": "body",
    "text_template": "{text}{body}",
    "txt_document": "file",
    "eos_token": "<|endoftext|>",
    "split_special_tokens": True,
    "dataset_config": "x",
    "carry_columns": ("body",),
    "sample": 0.5,
    "eval_ratio": 0.5,
}


def test_every_field_of_the_key_is_named_with_both_values(
    source: Path, prepare: PrepareIt, asked: Callable[..., list[str]]
) -> None:
    prepare(source, **FLAGS)
    of_chat = {field.name for field in dataclasses.fields(DataConfig) if field.metadata["only"] == "chat"} | {
        "data_format"
    }
    assert OTHERS.keys() == affecting(DataConfig()).keys() - of_chat - {
        "add_bos",
        "held_out",
    }  # the tokenizer here has none
    before = {**{field.name: field.default for field in dataclasses.fields(DataConfig)}, **FLAGS}
    for name, value in OTHERS.items():
        [said] = differing(asked(**{name: value}))
        was, now = (
            list(one) if isinstance(one, tuple) else one for one in (before[name], value)
        )  # as a plan's record holds it
        assert said.startswith(f"{name}: {was} -> {now}  (")
        free = name in ("shard_bytes", "text_column", "text_template", "dataset_config")
        assert ("nothing is reused" in said) is not free


def test_what_is_in_no_key_makes_no_difference(
    source: Path, prepare: PrepareIt, asked: Callable[..., list[str]]
) -> None:
    prepare(source, **FLAGS)
    assert differing(asked(num_proc=3, writer_batch_size=7, max_bad_ratio=0.5)) == []


def test_files_that_changed_came_and_went_are_named(
    tmp_path: Path, source: Path, prepare: PrepareIt, asked: Callable[..., list[str]]
) -> None:
    other = tmp_path / "b.jsonl"
    shutil.copy(source, other)
    prepare(source, other, **FLAGS)
    size = source.stat().st_size
    with open(source, "a") as file:
        file.write('{"text": "more"}\n')
    third = shutil.copy(source, tmp_path / "c.jsonl")
    said = differing(asked(dataset=(str(source), str(third))))
    assert said[0].startswith(f"file {source} changed (size {size:,} -> {source.stat().st_size:,})")
    assert [line.split("  (")[0] for line in said[1:]] == [f"file {third} added", f"file {other} gone"]
    assert differing(asked(dataset=(str(other), str(source), str(source))))[-1] != ""


def test_the_order_of_files_is_a_difference_of_its_own(
    tmp_path: Path, source: Path, prepare: PrepareIt, asked: Callable[..., list[str]]
) -> None:
    other = shutil.copy(source, tmp_path / "b.jsonl")
    prepare(source, other, **FLAGS)
    assert differing(asked(dataset=(str(other), str(source)))) == ["the files' order, repetition or grouping changed"]


def test_the_nearest_is_compared_and_another_one_when_it_is_named(
    source: Path, prepare: PrepareIt, asked: Callable[..., list[str]]
) -> None:
    far = prepare(source, **{**FLAGS, "seq_len": 512, "min_chars": 5})
    near = prepare(source, **{**FLAGS, "seq_len": 32})
    assert str(near.path) in asked()[1]
    assert len(differing(asked())) == 1
    assert str(far.path) in asked(far.path)[1]
    assert [line.split(":")[0] for line in differing(asked(far.path))] == ["min_chars", "seq_len"]


def test_a_directory_of_another_cache_is_compared_by_its_manifest(
    tmp_path: Path, source: Path, prepare: PrepareIt, asked: Callable[..., list[str]]
) -> None:
    prepared = prepare(source, **FLAGS, cache_dir=str(tmp_path / "other"))
    shutil.copy(source, tmp_path / "b.jsonl")
    lines = asked(prepared.path, seq_len=32, dataset=(str(source), str(tmp_path / "b.jsonl")))
    assert "by its manifest" in lines[1]
    assert differing(lines)[0].startswith("seq_len: 64 -> 32")
    assert differing(lines)[1].startswith(
        "sources: a.jsonl: 1 lines files -> a.jsonl: 1 lines files; b.jsonl: 1 lines files  (other data)"
    )
    with pytest.raises(DamagedError, match=r"has no manifest\.json"):
        asked(tmp_path)


def test_the_command_takes_the_flags_of_prepare_and_writes_nothing(
    tmp_path: Path, source: Path, tokenizer_dir: Path, run_moai: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    before = sorted(tmp_path.rglob("*"))
    ended = run_moai(
        "explain",
        "--dataset",
        source,
        "--tokenizer_path",
        tokenizer_dir,
        "--cache_dir",
        tmp_path / "cache",
        "--seq_len",
        "64",
    )
    assert ended.returncode == 0
    assert ended.stdout.splitlines()[-1] == "verdict      a miss: nothing was prepared in this cache yet"
    assert sorted(tmp_path.rglob("*")) == before
