"""From nothing to a model that answers: the three commands of docs/instruction-tuning.md, as they stand there."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.long
def test_three_commands_lead_to_an_answer(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "instruction-tuning.md").read_text(encoding="utf-8")
    block = re.search(r"^```bash\n(\./pretrain\.sh\n.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert block
    commands = [shlex.split(line) for line in block[1].splitlines()]
    for name in ("configs", "data", "tokenizers", "train.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OUTPUT_DIR": str(tmp_path / "outputs" / "demo")}
    said = ""
    for words in commands:
        is_script = words[0] == "./pretrain.sh"  # beside its own .venv
        run = [*words, "--cache_dir", str(tmp_path / "cache")] if is_script else [sys.executable, *words[1:]]
        done = subprocess.run(run, cwd=ROOT if is_script else tmp_path, env=environ, capture_output=True, text=True)
        assert not done.returncode, done.stderr[-2000:]
        said = done.stdout
    assert said == "해수면의 기압에서 물은 섭씨 100도에서 끓습니다.\n"
