"""benchmarks/race.py in small: the guides' way, moai, moai killed and started again, moai with other workers."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_race_ends_with_one_content_and_draws_it(tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text(
        "".join(json.dumps({"text": f"Document {number} says a word. " * 40}) + "\n" for number in range(400))
    )
    command = [sys.executable, "benchmarks/race.py", str(texts), "--tokenizer_path", "tokenizers/demo"]
    sizes = ["--megabytes", "3", "--shard_bytes", "200KB"]
    places = ["--json", str(tmp_path / "race.json"), "--svg", str(tmp_path / "race.svg")]
    done = subprocess.run([*command, *sizes, *places], cwd=ROOT, capture_output=True, text=True)
    assert not done.returncode, done.stdout + done.stderr
    laps = json.loads((tmp_path / "race.json").read_text())["laps"]
    guides, cold, killed, again, five = laps
    assert guides["rows"] > 0
    assert cold["digest"] == again["digest"] == five["digest"]
    assert (cold["reused"], five["reused"]) == (0, 0)
    assert 0 < again["reused"] < again["shards"]
    assert "rank 0 (pid" in killed["cause"]
    drawn = ElementTree.parse(tmp_path / "race.svg").getroot()
    assert len(drawn.findall(".//{*}rect")) == 5
