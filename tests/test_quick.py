"""`--quick` skips what is not quick, by whichever way it begins."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = """
import multiprocessing, os, subprocess, sys

def test_alone(): pass
def test_subprocess(): subprocess.run([sys.executable, "-c", "0"])
def test_forkserver(): multiprocessing.get_context("forkserver").Process(target=print).start()
def test_fork(): os.fork() or os._exit(0)
def test_torch():
    try:
        import torch
    except Exception:
        pass
"""


def test_what_starts_a_process_or_imports_torch_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "--quick", "-rs", "-p", "conftest", "-p", "no:cacheprovider", tmp_path]
    environ = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (Path(__file__).parents[1], Path(__file__).parent))),
    }
    said = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=120).stdout
    assert "1 passed, 4 skipped" in said, said
    assert "[3] " in said
    assert "--quick: imports torch or Kiwi" in said
