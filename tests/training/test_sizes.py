"""A model by its size: a shape, the tokenizer's vocabulary, and what the run costs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_training import train_here

from moai.core.config import resolve
from moai.core.errors import ConfigError
from moai.pretraining.options import DataConfig
from moai.training.arguments import TrainConfig
from moai.training.model import config_of_size
from moai.training.sizes import SIZES, budget, fields

REPO = Path(__file__).parents[2]


@pytest.mark.parametrize(("size", "millions"), [("10m", 18), ("124m", 124), ("350m", 360), ("1b", 1076), ("2b", 2519)])
def test_a_size_has_about_so_many_parameters(size: str, millions: int) -> None:
    """With GPT-2's vocabulary of 50,257."""
    from transformers import AutoModelForCausalLM

    config = config_of_size(size, vocab_size=50_257, seq_len=1024)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert config.vocab_size == 50_304
    assert sum(value.numel() for value in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.02)


@pytest.mark.parametrize("size", ["2b", "5b"])
def test_the_large_ones_are_the_configurations_of_that_name(size: str) -> None:
    named = json.loads((REPO / f"configs/model_config_{size}.json").read_text())
    made = fields(size, vocab_size=named["vocab_size"], seq_len=1024)
    del made["vocab_size"]
    assert made == {name: named[name] for name in made}


def test_the_last_row_has_a_position() -> None:
    assert fields("10m", vocab_size=300, seq_len=65_536)["max_position_embeddings"] == 65_536


def test_a_run_by_size_trains_and_says_what_it_costs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        out = train_here(tmp_path, "--model_size", "10m", "--max_steps", "1")
    assert json.loads((out / "final_model" / "config.json").read_text())["hidden_size"] == 256
    said = caplog.text
    assert "--model_size 10m says the shape" in said
    assert "compute-optimal is about 20" in said


def test_a_budget_by_hand() -> None:
    """6 x 1e6 x 1e8 FLOPs at half of 1e11 a second are 12,000 s; 1e8 tokens of 1e7 are ten passes."""
    line = budget(parameters=10**6, tokens=10**8, distinct_tokens=10**7, flops_per_second=1e11)
    assert line.startswith("100.0 M tokens, 100.0 a parameter (compute-optimal is about 20: 20.0 M), 10.0 passes")
    assert "roughly 3.3 hours here" in line
    assert "beyond 4 passes" in line


@pytest.mark.parametrize(
    ("flags", "said"),
    [("--model_size 11m", f"choose from {', '.join(SIZES)}"), ("", "no model: set --model_size")],
)
def test_what_is_no_size_is_refused(flags: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        resolve([TrainConfig, DataConfig], ["--output_dir", "o", *flags.split()], {}, prog="t")[TrainConfig].require()
