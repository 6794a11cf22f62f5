"""Training on conversations: labels by hand, and a real run whose loss is that of the assistant's tokens and of no
others.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny_run

from moai.core.errors import ConfigError, DamagedError
from moai.prepared.rows import PackedRows, Row
from moai.pretraining.options import DataConfig
from moai.training.data import IGNORE, PackedCollator
from moai.training.generate import GenerateConfig, generate
from moai.training.launch import plan

ROOT = Path(__file__).parents[2]


def row(ids: list[int], lengths: list[int], runs: list[int] | None) -> Row:
    return Row(
        np.array(ids, np.uint16), np.array(lengths, np.uint32), None if runs is None else np.array(runs, np.uint32)
    )


ROWS = [row([5, 6, 7, 8, 9, 4], [3, 3], [1, 2, 2, 1]), row([1, 2, 3], [3], [3]), row([7, 8], [1, 1], [1, 1])]


def test_labels_by_hand() -> None:
    """Of the last row the learned token is the first of its document: nothing could predict it."""
    batch = PackedCollator(pad_id=99)(ROWS)
    x = IGNORE
    assert batch["labels"].tolist() == [[x, 6, 7, x, x, 4], [x, x, x, x, x, x], [x, x, x, x, x, x]]
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 4], [1, 2, 3, 99, 99, 99], [7, 8, 99, 99, 99, 99]]
    assert PackedCollator(pad_id=99, pad_to=8)(ROWS)["labels"].tolist()[0] == [x, 6, 7, x, x, 4, x, x]
    flat = PackedCollator(pad_id=99, flatten=True)(ROWS)
    assert flat["labels"].tolist() == [[x, 6, 7, x, x, 4, x, x, x, x, x]]
    assert flat["cu_seq_lens_q"].tolist() == [0, 3, 6, 9, 10, 11]


@pytest.mark.parametrize(
    "collator", [PackedCollator(pad_id=0), PackedCollator(pad_id=0, pad_to=9), PackedCollator(pad_id=0, flatten=True)]
)
def test_labels_are_those_of_a_slow_and_plain_rule(collator: PackedCollator) -> None:
    generator = np.random.default_rng(3)
    for _ in range(30):
        rows = []
        for _ in range(4):
            lengths = generator.integers(1, 4, generator.integers(1, 4)).tolist()
            mask = generator.integers(0, 2, sum(lengths))
            mask[np.cumsum([0, *lengths[:-1]])] = 0
            runs = np.diff(np.flatnonzero(np.diff(mask, prepend=1 - mask[0])), append=len(mask)).tolist()
            rows.append((mask, row(generator.integers(1, 50, len(mask)).tolist(), lengths, runs)))
        batch = collator([one for _, one in rows])
        wanted = [token for mask, one in rows for token, learn in zip(one.input_ids.tolist(), mask) if learn]
        assert batch["labels"][batch["labels"] != IGNORE].tolist() == wanted
        assert batch["input_ids"][batch["labels"] != IGNORE].tolist() == wanted


def test_runs_that_contradict_their_row_are_refused() -> None:
    for runs in ([2, 2], [9], []):
        with pytest.raises(DamagedError, match="trained_runs"):
            PackedCollator(pad_id=0)([row([1, 2, 3], [3], runs)])


def test_mode_and_format_must_agree() -> None:
    assert DataConfig().of_mode("sft").data_format == "chat"
    assert DataConfig(data_format="chat").of_mode("sft").data_format == "chat"
    assert DataConfig().of_mode("pretrain") == DataConfig()
    with pytest.raises(ConfigError, match="--mode sft"):
        DataConfig(data_format="chat").of_mode("pretrain")


def test_the_wrapper_keeps_the_mode_of_the_file(monkeypatch: pytest.MonkeyPatch, project: Path) -> None:
    monkeypatch.chdir(project)
    assert "flags=(--mode sft --config configs/sft_demo.yaml" in plan(
        ["pretrain", "configs/sft_demo.yaml"], {"NUM_GPUS": "1"}
    )
    assert "flags=(--mode pretrain --config configs/demo.yaml" in plan(["pretrain", "demo"], {"NUM_GPUS": "1"})


def test_a_real_run_learns_what_the_assistant_says(
    tmp_path: Path, train_py: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    """One step over all rows at once: its loss is the mean over the assistant's tokens, weighed by nothing else."""
    import torch
    from transformers import AutoModelForCausalLM

    from moai.prepared.manifest import Prepared

    model = tmp_path / "model.json"
    model.write_text(
        json.dumps(
            {
                **tiny_run.MODEL,
                "model_type": "moai",
                "vocab_size": 8192,
                "max_position_embeddings": 512,
                "eos_token_id": 4,
                "initializer_range": 0.3,
            }
        )
    )
    chosen = {
        "config": ROOT / "configs/sft_demo.yaml",
        "model_config": model,
        "output_dir": tmp_path / "out",
        "cache_dir": tmp_path / "cache",
        "max_steps": 1,
        "batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-12,
        "warmup_steps": 0,
        "use_cpu": "true",
        "num_proc": 0,
    }
    words = [word for name, value in chosen.items() for word in (f"--{name}", str(value))]
    train_py(*words)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    prepared = Prepared.open(Path(summary["prepared"]))
    rows = PackedRows.of(prepared)
    assert len(rows) == 8, "all of them in the one step"
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "final_model")
    losses, all_losses = [], []
    for one in rows.__getitems__(range(8)):
        mask = np.repeat(np.arange(len(one.trained_runs)) % 2 == 1, one.trained_runs)  # type: ignore[arg-type]
        start = 0
        for length in one.seq_lengths.tolist():
            ids = torch.tensor(one.input_ids[start : start + length].astype(np.int64))
            with torch.no_grad():
                logits = trained(ids[None]).logits[0, :-1].float()
            each = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
            losses += each[torch.from_numpy(mask[start + 1 : start + length])].tolist()
            all_losses += each.tolist()
            start += length
    assert len(losses) == prepared.content["token_counts"]["trained"]
    assert summary["loss_first"] == pytest.approx(np.mean(losses), abs=2e-4)
    assert abs(np.mean(losses) - np.mean(all_losses)) > 1e-3, "not vacuous: all tokens have another loss"
    final = tmp_path / "out" / "final_model"
    check_that_generation_stops(final, tmp_path / "ends", 6, caplog)


def check_that_generation_stops(final: Path, folder: Path, say: int, caplog: pytest.LogCaptureFixture) -> None:
    """A model that says nothing but the end of a turn says it once: by what was saved, and by the template where what
    was saved does not name it.
    """
    import torch
    from transformers import AutoModelForCausalLM

    settings = json.loads((final / "generation_config.json").read_text())
    assert settings["eos_token_id"] == [4, 6], "the end of a text, and of a turn"
    model = AutoModelForCausalLM.from_pretrained(final)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_(0.0 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0)
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            layer.weight[say] = 2
    shutil.copytree(final, folder)
    model.save_pretrained(folder)
    for named, chat, tokens in (([4, 6], True, 1), ([4, 6], False, 1), (4, True, 1), (4, False, 5)):
        (folder / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": named}))
        config = GenerateConfig(
            model=str(folder), prompt=("hi",), chat=chat, use_cpu=True, temperature=0, max_new_tokens=5
        )
        caplog.clear()
        generate(config, write=lambda _: None)
        assert caplog.messages[-1].startswith(f"{tokens} tokens after"), (named, chat)
        assert any("does not name" in line for line in caplog.messages) == (named == 4 and chat)
