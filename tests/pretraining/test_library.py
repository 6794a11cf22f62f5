"""moai from Python: what it exports, what it loads, rows and documents and batches, and its examples."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moai
from moai.core import errors
from moai.core.errors import ConfigError
from moai.training.order import Order, sources_of

ROOT = Path(__file__).parents[2]
EXPORTED = [
    "Column",
    "ConfigError",
    "DamagedError",
    "Filter",
    "Interrupted",
    "Map",
    "MoaiError",
    "Part",
    "PartFailed",
    "PreparationFailed",
    "PreparedData",
    "Signal",
    "SlowTokenizerError",
    "SourceError",
    "StorageError",
    "TokenizerError",
    "TooManyBadRecords",
    "WorkerDied",
    "open_prepared",
    "prepare",
]
TEXTS = [f"{number} " + "words of a document " * (number % 7 + 1) for number in range(90)] + ["", "  "]
SCRIPT = """
import moai

{guard}given = dict(dataset={corpus!r}, tokenizer_path={tokenizer!r}, cache_dir={cache!r})
{guard}prepared = moai.prepare(**given, seq_len=32, num_proc=1)
{guard}print("rows", len(prepared))
"""

MakeIt = Callable[..., moai.PreparedData]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "raw.jsonl"
    path.write_text("".join(json.dumps({"text": text, "id": number}) + "\n" for number, text in enumerate(TEXTS)))
    return path


@pytest.fixture
def make(tmp_path: Path, corpus: Path, tokenizer_dir: Path) -> MakeIt:
    def run(**options: Any) -> moai.PreparedData:
        given = {
            "dataset": corpus,
            "tokenizer_path": tokenizer_dir,
            "seq_len": 32,
            "packing": "bfd_split",
            "shard_bytes": 4000,
            "num_proc": 0,
            "cache_dir": tmp_path / "cache",
        }
        return moai.prepare(**{**given, **options})

    return run


def python(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], cwd=cwd, capture_output=True, text=True, timeout=600)


def test_the_exported_names_are_these_and_each_is_there() -> None:
    assert sorted(moai.__all__) == EXPORTED
    assert all(getattr(moai, name).__name__ == name for name in EXPORTED)
    assert set(EXPORTED) <= set(dir(moai))
    family = {
        name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, errors.MoaiError)
    }
    assert family - set(EXPORTED) == {"BackendRefused", "BackendDisagrees", "NotProven"}, "what no caller ever sees"
    with pytest.raises(AttributeError, match="has no attribute 'prepares'"):
        moai.prepares  # noqa: B018


def test_import_moai_loads_nothing_heavy_and_filters_load_no_torch() -> None:
    heavy = "{'torch', 'datasets', 'pyarrow', 'numpy', 'transformers', 'yaml'}"
    ended = python(
        "-c",
        f"import sys, moai; print(sorted({heavy} & set(sys.modules))); moai.prepare; moai.Filter; print(sorted({heavy} "
        f"& set(sys.modules)))",
    )
    assert ended.stdout.splitlines() == ["[]", "['numpy', 'pyarrow']"], ended.stderr


def test_options_are_checked_by_name_and_type(make: MakeIt, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"no option is called 'seqlen'; did you mean seq_len\?"):
        make(seqlen=3)
    with pytest.raises(ConfigError, match=r"moai.prepare\(seq_len=...\): 'many' is not a whole number"):
        make(seq_len="many")
    with pytest.raises(ConfigError, match="None is not a value for it"):
        make(seq_len=None)
    with pytest.raises(ConfigError, match="choose from none, wrapped, bfd, bfd_split"):
        make(packing="best")
    monkeypatch.setenv("DATASET_NUM_PROC", "many")
    with pytest.raises(ConfigError, match="DATASET_NUM_PROC"):
        make()


def test_rows_and_documents_are_those_of_the_files(make: MakeIt, corpus: Path) -> None:
    prepared = make()
    assert isinstance(prepared, moai.PreparedData)
    table = prepared.dataset()
    assert len(prepared) == table.num_rows > 20
    assert [row.input_ids.tolist() for row in prepared.rows()] == table["input_ids"][:]
    assert prepared[-1].input_ids.tolist() == table[-1]["input_ids"]
    with pytest.raises(IndexError):
        prepared[len(prepared)]
    documents = list(prepared.documents())
    assert len(documents) == len(TEXTS)
    assert [document["row"] is None for document in documents] == [not text.strip() for text in TEXTS]
    assert {document["reason"] for document in documents[-2:]} != {None}
    assert sum(document["tokens"] for document in documents) == prepared.content["tokens"]
    ends = [[0, *np.cumsum(row.seq_lengths).tolist()] for row in prepared.rows()]
    assert all(document["position"] in ends[document["row"]] for document in documents if document["pieces"])


def test_a_saved_directory_opens_with_both_sides_and_several_as_one(make: MakeIt, tmp_path: Path) -> None:
    saved = make(eval_ratio=0.3, save_to=tmp_path / "one")
    other = make(eval_ratio=0.3, packing="bfd", save_to=tmp_path / "two")
    opened = moai.open_prepared(tmp_path / "one")
    assert opened.content_digest == saved.content_digest
    assert isinstance(opened.held_out, moai.PreparedData)
    assert len(opened.held_out) > 0
    both = moai.open_prepared(tmp_path / "one", str(tmp_path / "two"))
    assert len(both) == len(opened) + len(other) == both.dataset().num_rows
    assert len(list(both.documents())) == 2 * len(TEXTS)
    assert {document["source"] for document in both.documents()} == {"one/raw.jsonl", "two/raw.jsonl"}


def test_batches_are_the_order_of_training_for_any_ranks_and_from_any_position(make: MakeIt) -> None:
    prepared = make(carry_columns=["id"])
    order = Order(sources_of(prepared.content["shards"]), 42)
    wanted = [prepared[row].input_ids.tolist() for row in order.rows_at(np.arange(len(prepared)))]

    padded = [row + [prepared.content["tokenizer"]["eos_id"]] * (32 - len(row)) for row in wanted]
    one = [batch for _, batch in zip(range(3), prepared.torch(batch_size=4, rank=0, world_size=1, pad_to=32))]
    assert [row for batch in one for row in batch["input_ids"].tolist()] == padded[:12]
    assert "id" in one[0]
    two = [prepared.torch(batch_size=2, rank=rank, world_size=2, position=12, pad_to=32) for rank in (0, 1)]
    turns = [row for pair in zip(*two, strict=True) for batch in pair for row in batch["input_ids"].tolist()]
    assert turns == padded[12:][: len(turns)]
    assert len(wanted) - 12 - len(turns) < 4, "only what fills no batch of both ranks is left out"
    loader = prepared.torch(batch_size=4, epochs=2.5, rank=0, world_size=1)
    assert len(loader) == int(2.5 * len(prepared)) // 4
    endless = prepared.torch(batch_size=4, epochs=None, rank=0, world_size=1)
    assert len([batch for _, batch in zip(range(len(prepared)), endless)]) == len(prepared)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size = 0"),
        ({"batch_size": 1, "rank": 2, "world_size": 2}, "rank = 2, world_size = 2"),
        ({"batch_size": 1, "epochs": 0}, "epochs = 0"),
        ({"batch_size": 1, "mixture": ["ko=1"]}, "mixture names 'ko'"),
        ({"batch_size": 1, "mixture": "ko=1"}, "mixture names 'ko'"),
    ],
)
def test_batches_that_cannot_be_are_refused(make: MakeIt, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make().torch(**options)


def test_a_script_without_a_main_guard_is_told_so_in_one_line(
    tmp_path: Path, corpus: Path, tokenizer_dir: Path
) -> None:
    given = {"corpus": str(corpus), "tokenizer": str(tokenizer_dir), "cache": str(tmp_path / "cache")}
    script = tmp_path / "script.py"
    environ = {"PYTHONPATH": str(ROOT)}
    script.write_text(SCRIPT.format(guard="", **given))
    ended = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=600, env=environ)
    last = ended.stderr.splitlines()[-1]
    assert last.startswith(f"moai.core.errors.ConfigError: {script}, line 5: worker processes import this program")
    assert "WorkerDied" not in ended.stderr
    script.write_text(SCRIPT.format(guard="if __name__ == '__main__': ", **given))
    ended = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=600, env=environ)
    assert ended.stdout.startswith("rows "), ended.stderr


def examples(page: Path) -> list[str]:
    return re.findall(r"^```python runnable\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_the_examples_of_the_documentation_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = examples(ROOT / "docs" / "library.md")
    assert len(found) >= 4
    assert examples(ROOT / "docs" / "ko" / "library.md") == found
    for name in ("data", "tokenizers", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for number, code in enumerate(found):
        script = tmp_path / f"example_{number}.py"
        script.write_text(code)
        runpy.run_path(str(script), run_name="__main__")
        assert capsys.readouterr().out, code


def test_the_engine_shown_in_the_architecture_runs_the_shards(make: MakeIt, tmp_path: Path) -> None:
    first = make()
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    block = next(code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "class Threads" in code)
    names: dict[str, Any] = {}
    exec(block.split("\nprepared = ")[0], names)
    again = make(cache_dir=tmp_path / "other", executor=names["Threads"]())
    assert again.content_digest == first.content_digest
