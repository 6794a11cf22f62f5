"""The examples of docs/other-trainers.md, run as they stand there."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from moai.core.errors import MoaiError
from moai.training.packed_attention import packed_forward_selfcheck

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "other-trainers.md"


def examples(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


LOOP, TRAINER, TRL = examples(PAGE)


@pytest.fixture
def run(prepare, tmp_path, monkeypatch):
    """`run(LOOP, ...)`: the examples one after another on a small prepared directory; the names they leave."""

    def call(*codes: str, chat: bool = False) -> dict[str, Any]:
        if chat:
            data, template = ROOT / "data" / "demo_chat.jsonl", str(ROOT / "configs" / "chat_template_demo.jinja")
            prepared = prepare(data, seq_len=128, data_format="chat", chat_template=template, packing="bfd")
        else:
            texts = [f"{number} times " * (number % 23) for number in range(400)]
            (tmp_path / "few.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
            prepared = prepare(tmp_path / "few.jsonl", seq_len=48, packing="bfd_split")
        assert any(len(row) > 1 for row in prepared_lengths(prepared.path)), "documents share rows"
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["loop.py", str(prepared.path)])
        names: dict[str, Any] = {}
        for code in codes:
            exec(compile(code, PAGE.name, "exec"), names)
        return names

    return call


def prepared_lengths(path: Path) -> list[list[int]]:
    from datasets import load_from_disk

    return load_from_disk(str(path))["seq_lengths"][:]


def losses(state: Path) -> list[float]:
    return [entry["loss"] for entry in json.loads(state.read_text())["log_history"] if "loss" in entry]


@pytest.mark.parametrize("chat", [False, True])
def test_the_loop_learns(chat, run, capsys):
    names = run(LOOP, chat=chat)
    printed = [float(loss) for loss in re.findall(r"^step \d+  loss ([\d.]+)$", capsys.readouterr().out, re.MULTILINE)]
    assert 3 <= len(printed) <= 10
    assert printed[-1] < printed[0] - 0.1
    learned = (names["batch"]["labels"] != -100).float().mean()
    assert (0.05 < learned < 0.8) if chat else (learned > 0.8)


@pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")
def test_the_trainer_of_transformers_learns(run, tmp_path):
    run(LOOP, TRAINER)
    found = losses(tmp_path / "outputs" / "trainer" / "checkpoint-10" / "trainer_state.json")
    assert len(found) == 10
    assert found[-1] < found[0]


@pytest.mark.filterwarnings("ignore")  # TRL is another's code
def test_the_trainer_of_trl_learns(run, tmp_path):
    pytest.importorskip("trl")
    run(LOOP, TRL)
    found = losses(tmp_path / "outputs" / "sft" / "checkpoint-10" / "trainer_state.json")
    assert len(found) == 10
    assert found[-1] < found[0]


def test_with_a_cache_documents_would_see_one_another(run):
    """What the page says of `use_cache`, and why its example checks the model."""
    names = run(LOOP.partition("optimizer =")[0])
    names["model"].config.use_cache = True
    with pytest.raises(MoaiError, match="attention leaks across documents"):
        packed_forward_selfcheck(names["model"], names["make_batch"])


def test_the_examples_are_the_same_in_both_languages():
    assert examples(PAGE) == examples(ROOT / "docs" / "ko" / PAGE.name)
