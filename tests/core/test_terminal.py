"""What is printed steers no terminal, wherever the text came from, and an output that takes nothing is one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moai.core.terminal import plain

ROOT = Path(__file__).parents[2]
TOKENIZER = ROOT / "tokenizers" / "demo"
HOSTILE = "a\x1b[2J\x07b\x9bc\u202ed\u2066\r"
STEERING = {*HOSTILE} - {*"abcd[2J"}


def test_what_steers_a_terminal_is_spelled_and_nothing_else() -> None:
    assert plain(HOSTILE) == r"a\x1b[2J\x07b\x9bc\u202ed\u2066\r"
    assert plain("한글\t👩‍💻 é\n\udcff") == "한글\t👩‍💻 é\n\udcff"  # the last is a byte of a path
    assert plain("\ud800") == r"\ud800"  # and that is none


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory and a cache that were made of hostile text from a file with a hostile name."""
    folder = tmp_path_factory.mktemp("hostile")
    data = folder / "b\x1b[2J\u202e.jsonl"
    data.write_text(
        "".join(json.dumps({"text": f"{HOSTILE} document {n}"}) + "\n" for n in range(3)) + "no JSON\x1b[2J"
    )
    ran = moai(*prepare(data, folder / "cache"), "--max_bad_ratio", "1")
    assert ran.returncode == 0, ran.stderr
    return Path(ran.stdout.splitlines()[-1])


def prepare(data: Path, cache: Path) -> list[Any]:
    given = {"dataset": data, "cache_dir": cache, "tokenizer_path": TOKENIZER, "seq_len": 64, "num_proc": 0}
    return ["prepare", *(word for name, value in given.items() for word in (f"--{name}", value))]


def moai(*words: Any, **how: Any) -> subprocess.CompletedProcess[str]:
    how = {"capture_output": True, "errors": "surrogateescape", "text": True, **how}
    return subprocess.run([sys.executable, "-m", "moai", *map(str, words)], cwd=ROOT, timeout=120, **how)


@pytest.mark.parametrize(
    "words",
    [
        lambda made: ["inspect", made],
        lambda made: ["verify", made, "--full"],
        lambda made: ["status", "--cache_dir", made.parents[1]],
        lambda made: prepare(made.parents[2] / "b\x1b[2J\u202e.jsonl", made.parents[1]),  # too many bad records
        lambda made: ["verify", "nowhere\x1b[2J"],
    ],
)
def test_no_command_hands_control_characters_on(prepared: Path, words: Callable[[Path], list[Any]]) -> None:
    ran = moai(*words(prepared))
    assert ran.stdout + ran.stderr
    assert not STEERING & {*ran.stdout, *ran.stderr}


@pytest.mark.parametrize(
    ("into", "code", "said", "buffered"),
    [
        (">&-", 74, "error: standard output: it is closed; what was printed is not whole\n", True),
        (">/dev/full", 74, "error: standard output: No space left on device; what was printed is not whole\n", True),
        (">/dev/full", 74, "error: standard output: No space left on device; what was printed is not whole\n", False),
        ("| true", 141, "", False),
        ("2>&- <&-", 0, "", True),
        ("2>/dev/full", 0, "", False),
    ],
)
def test_an_output_that_takes_nothing_is_one_line(
    prepared: Path, into: str, code: int, said: str, buffered: bool
) -> None:
    command = f'"{sys.executable}" -m moai verify "{prepared}" {into}'
    script = f"{command}; exit ${{PIPESTATUS[0]}}"
    env = {**os.environ, **({} if buffered else {"PYTHONUNBUFFERED": "1"})}
    ran = subprocess.run(["bash", "-c", script], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert ran.returncode == code
    assert ran.stderr.endswith(said) if said else "Traceback" not in ran.stderr
    assert ran.stderr.count("\n") <= 1
