"""The main job as people start it: train.py under torchrun, accelerate launch and plain python, from text to
final_model/.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moai.sources.streams import open_blocks

ROOT = Path(__file__).parent.parent
MODEL = {
    "vocab_size": 8192,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "use_qk_norm": True,
    "hidden_act": "swiglu",
    "tie_word_embeddings": True,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "attention_bias": False,
    "mlp_bias": False,
}


@pytest.fixture(scope="session")
def slow_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """More than three seconds of work for one process."""
    path = tmp_path_factory.mktemp("slow") / "slow.jsonl"
    english = b"".join(open_blocks(str(ROOT / "data" / "demo" / "en.jsonl.zst"), "zst", 1 << 20))
    path.write_bytes(b"".join(english.replace(b'{"', b'{"copy":%d,"' % copy) for copy in range(20)))
    return path


def flags(folder: Path, dataset: Path, /, **more: Any) -> list[str]:
    model = folder / "model.json"
    model.write_text(json.dumps(MODEL))
    given = {
        "mode": "pretrain",
        "dataset": dataset,
        "tokenizer_path": ROOT / "tokenizers" / "demo",
        "model_config": model,
        "output_dir": folder / "out",
        "cache_dir": folder / "cache",
        "seq_len": 64,
        "packing": "bfd_split",
        "batch_size": 4,
        "gradient_accumulation_steps": 1,
        "max_steps": 6,
        "warmup_steps": 1,
        "learning_rate": 0.01,
        "logging_steps": 1,
        "save_steps": 100,
        "num_proc": 1,
        "dataloader_num_workers": 0,
        "use_cpu": True,
        **more,
    }
    return [str(word) for name, value in given.items() for word in (f"--{name}", value)]


def torchrun(ranks: int, logs: Path) -> list[str]:
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", ranks]
    return [*map(str, [*words, "--log_dir", logs, "--redirects", 3, ROOT / "train.py"])]


def said(logs: Path) -> dict[str, str]:
    """What each rank wrote on standard error."""
    return {path.parent.name: path.read_text() for path in logs.rglob("stderr.log")}


def test_preparation_longer_than_the_collective_timeout_trains(tmp_path: Path, slow_corpus: Path) -> None:
    command = [
        *torchrun(3, tmp_path / "logs"),
        *flags(tmp_path, slow_corpus, ddp_timeout=3, tokenizer_backend="tokenizers"),
    ]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, said(tmp_path / "logs")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    manifest = json.loads((Path(summary["prepared"]) / "manifest.json").read_text())
    assert manifest["run"]["seconds"] > 3  # not vacuous: the others did wait longer than a collective may take
    assert summary["steps"] == 6
    assert summary["loss_last"] < summary["loss_first"]
    assert (tmp_path / "out" / "final_model" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("change", "code", "line"),
    [
        ({"dataset": "absent.jsonl"}, 66, "absent.jsonl: no such file or directory"),
        ({"seq_len": "many"}, 2, "'many' is not a whole number"),
        ({"model_config": "absent.json"}, 2, "absent.json"),
        ({"tokenizer_path": "/nowhere/at/all"}, 2, "no such tokenizer directory"),
    ],
)
def test_a_mistake_is_one_line_and_an_exit_code(
    tmp_path: Path, run_moai: Callable[..., Any], change: dict[str, Any], code: int, line: str
) -> None:
    ended = run_moai("train", *flags(tmp_path, ROOT / "data" / "demo", **change))
    assert ended.returncode == code
    assert line in ended.stderr.splitlines()[-1]
