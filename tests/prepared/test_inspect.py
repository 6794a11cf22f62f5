"""Which rows are looked at: the first, some from everywhere, those of one source."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moai.core.errors import ConfigError
from moai.prepared.inspect import View, inspect


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from moai import prepare

    folder = tmp_path_factory.mktemp("inspected")
    for name, number in (("many", 300), ("few", 60)):
        lines = [json.dumps({"text": f"{name} {index} " * 40}) + "\n" for index in range(number)]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    tokenizer = Path(__file__).parents[2] / "tokenizers" / "demo"
    options: dict[str, Any] = {"seq_len": 256, "packing": "bfd", "num_proc": 0, "cache_dir": str(folder / "cache")}
    dataset = [str(folder / "many.jsonl"), str(folder / "few.jsonl")]
    return prepare(dataset=dataset, tokenizer_path=str(tokenizer), shard_bytes="32KB", **options).path


def test_rows_from_everywhere_are_the_same_each_time_and_are_the_rows_of_their_numbers(directory: Path) -> None:
    view = View.open(directory)
    every = {row.number: row for row in view.rows(10**6)}
    assert list(every) == list(range(view.prepared.content["rows"]))
    some = list(view.rows(20, at_random=True))
    assert {row.source for row in some} == {"many.jsonl", "few.jsonl"}
    assert [every[row.number] for row in some] == some == list(view.rows(20, at_random=True))
    assert some[-1].number > 20


def test_rows_of_one_source(directory: Path) -> None:
    view = View.open(directory)
    every = [row for row in view.rows(10**6) if row.source == "few.jsonl"]
    assert len(every) > 2
    assert list(view.rows(10**6, source="few.jsonl")) == every
    with pytest.raises(ConfigError, match=r"--source fw: has no rows here \(sources: few.jsonl, many.jsonl\)"):
        next(view.rows(1, source="fw"))


def test_the_page_names_sources_and_rows(directory: Path, tmp_path: Path) -> None:
    [said] = inspect(directory, rows=3, html=tmp_path / "page.html", at_random=True, source="few.jsonl")
    page = Path(said).read_text()
    assert "<td>many.jsonl</td><td>300</td>" in page
    assert page.count(" of few.jsonl <small>") == 3
