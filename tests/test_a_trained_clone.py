"""First in the suite, by its name: ./pretrain.sh, ./pretrain.sh again, and the tests of the wrappers, in one clone and
for real.
"""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STEPS = "2"
WRAPPERS = [
    "tests/training/test_launch.py",
    "tests/test_scripts.py::test_continued_pretraining_takes_old_weights_and_next_data",
]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What git keeps, with a .venv that counts as installed and has this one's packages, and a home beside it."""
    folder = tmp_path_factory.mktemp("a clone") / "moai"
    left_out = [line.strip("/") for line in (ROOT / ".gitignore").read_text(encoding="utf-8").split()]
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".git", *left_out))
    binaries = folder / ".venv" / "bin"
    binaries.mkdir(parents=True)
    for name, words in (("python", ""), ("accelerate", "-m accelerate.commands.accelerate_cli")):
        (binaries / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {words} "$@"\n')
        (binaries / name).chmod(0o755)
    stamp = f"{folder}\n{(folder / 'requirements.txt').read_text()}"
    (folder / ".venv" / ".bootstrap.stamp").write_text(stamp)
    (folder.parent / "home").mkdir()
    return folder


def in_clone(clone: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environ = {
        **os.environ,
        "HOME": str(clone.parent / "home"),
        "NUM_GPUS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "MAX_STEPS": STEPS,
    }
    return subprocess.run(words, cwd=clone, env=environ, stdin=subprocess.DEVNULL, capture_output=True, text=True)


def users(clone: Path) -> dict[str, tuple[int, int]]:
    """What a person has in outputs/ and at home: when each file was last written, and its size."""
    found = [
        path for folder in (clone / "outputs", clone.parent / "home" / ".cache" / "moai") for path in folder.rglob("*")
    ]
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in found}


@pytest.mark.timeout(1200)  # some 26 s of one CPU, which others may want too
def test_the_two_commands_work_one_after_the_other(clone: Path) -> None:
    first = in_clone(clone, "./pretrain.sh")
    assert first.returncode == 0, first.stderr
    trained = users(clone)
    assert str(clone / "outputs/demo/final_model/model.safetensors") in trained

    again = in_clone(clone, "./pretrain.sh")
    assert again.returncode == 0, again.stderr
    assert "moai pretraining: demo is trained already, so nothing was started" in again.stderr
    assert "Final model   outputs/demo/final_model" in again.stderr
    longer = in_clone(clone, "./pretrain.sh", "--max_steps", "3")
    assert longer.returncode == 2
    assert "outputs/demo: holds a run already, trained with other settings (max_steps 2 there, 3 here)" in longer.stderr

    tests = in_clone(clone, ".venv/bin/python", "-m", "pytest", "-q", "-p", "no:cacheprovider", *WRAPPERS)
    assert tests.returncode == 0, tests.stdout
    assert users(clone) == trained


def test_a_test_that_looks_at_what_is_the_users_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    for look in (
        lambda: os.listdir("outputs/demo"),
        lambda: Path("outputs/demo/settings.json").read_text(),
        lambda: os.open(ROOT / "outputs/demo/settings.json", os.O_RDONLY),
        lambda: os.mkdir("outputs/of a test"),
    ):
        with pytest.raises(
            AssertionError, match=r"a test touches .*, which is the user's: give it a place in tmp_path"
        ):
            look()
    (tmp_path / "outputs/demo").mkdir(parents=True)
    shutil.rmtree(tmp_path / "outputs")
    assert Path.home() != Path(pwd.getpwuid(os.getuid()).pw_dir), "the home is another one, for all that is started too"
