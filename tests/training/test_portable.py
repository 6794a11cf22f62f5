"""What a run leaves is read by others: other users, transformers 4, programs that know only older fields."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_training import train_here

from moai.training.portable import make_portable

GREEDY = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, __version__
model, tokenizer = (kind.from_pretrained(sys.argv[1]) for kind in (AutoModelForCausalLM, AutoTokenizer))
ids = torch.tensor([[3, 4, 5]])
print(__version__, model.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=None).tolist())
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    before = os.umask(0o027)
    try:
        return train_here(tmp_path_factory.mktemp("run"), "--max_steps", "2", "--save_dtype", "bfloat16")
    finally:
        os.umask(before)


def test_files_are_readable_as_the_umask_says(run: Path) -> None:
    saved = [path for folder in (run / "final_model", run / "checkpoint-2") for path in folder.iterdir()]
    assert len(saved) > 10
    assert {oct(path.stat().st_mode & 0o777) for path in saved} == {"0o640"}


def test_older_programs_find_the_fields_they_know(run: Path) -> None:
    config, tokenizer = (
        json.loads((run / "final_model" / name).read_text()) for name in ("config.json", "tokenizer_config.json")
    )
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 1e6
    assert config["use_cache"] is True
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not {"is_local", "local_files_only"} & set(tokenizer)


def test_scaled_positions_stand_in_the_older_field_too(tmp_path: Path) -> None:
    rope = {"rope_theta": 1e4, "rope_type": "yarn", "factor": 4.0}
    (tmp_path / "config.json").write_text(json.dumps({"rope_parameters": rope, "use_cache": False}))
    make_portable(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["rope_scaling"] == {"rope_type": "yarn", "factor": 4.0}


def test_the_final_model_has_the_asked_precision_and_checkpoints_have_all(run: Path) -> None:
    final, kept = (load_file(run / name / "model.safetensors") for name in ("final_model", "checkpoint-2"))
    assert {value.dtype for value in final.values()} == {torch.bfloat16}
    assert {value.dtype for value in kept.values()} == {torch.float32}
    assert all(torch.equal(kept[name].bfloat16(), value) for name, value in final.items())
    assert json.loads((run / "final_model" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.long
def test_transformers_4_generates_the_same(run: Path, tmp_path: Path) -> None:
    wanted = ["transformers==4.57.*", "huggingface_hub<1", "tokenizers<0.23", "requests", "urllib3", "certifi"]
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path)]
    if subprocess.run([*install, *wanted, "charset_normalizer", "idna"], capture_output=True).returncode:
        pytest.skip("no package index here")
    said = [
        subprocess.run(
            [sys.executable, "-c", GREEDY, str(run / "final_model")],
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split(" ", 1)
        for path in ("", str(tmp_path))
    ]
    assert [version[:2] for version, _ in said] == ["5.", "4."]
    assert said[0][1] == said[1][1]
