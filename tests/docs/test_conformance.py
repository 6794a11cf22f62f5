"""The page that says where each thing asked for is: files, names, tests, lines and commands on it are really there."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest
from test_docs import ROOT, check, prose, read, string_pieces, tables

PAGES = [ROOT / "docs" / "conformance.md", ROOT / "docs" / "ko" / "conformance.md"]
COMMANDS = ("python ", "torchrun ", "accelerate ", "./")


def spans(page: Path, column: int) -> list[str]:
    """What stands as code in that column of the tables of five."""
    cells = [row[column] for row in tables(page) if len(row) == 5]
    return [span for cell in cells for span in re.findall(r"`([^`]+)`", cell)]


def names_in(path: Path) -> set[str]:
    return {node.name for node in ast.parse(read(path)).body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_every_file_and_name_is_there(page: Path) -> None:
    where = spans(page, 1)
    assert len(where) > 50
    for span in where:
        file, _, name = span.partition("::")
        assert (ROOT / file).exists(), file
        assert not name or name in names_in(ROOT / file), span


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_every_line_is_printed_and_every_command_parses(page: Path) -> None:
    printed = string_pieces()
    shown = [span.replace("\\|", "|") for span in spans(page, 2)]
    commands = [span for span in shown if span.startswith(COMMANDS)]
    lines = [span for span in shown if "..." in span and span not in commands]
    assert len(commands) > 10
    assert len(lines) > 15
    for command in commands:
        check(command)
    for line in lines:
        for piece in filter(None, (piece.strip() for piece in line.split("..."))):
            assert any(piece in constant for constant in printed), f"{line!r}: {piece!r} is nowhere in the code"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_each_promise_names_a_test(page: Path) -> None:
    tests = [row[3] for row in tables(page) if len(row) == 5]
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", prose(page))
    assert len(named) > 50
    assert all(tests)
    for file, name in named:
        (found,) = (ROOT / "tests").rglob(file)
        assert name in names_in(found), f"{file}::{name}"


def test_the_packages_and_the_top_level_are_those_asked_for() -> None:
    project = tomllib.loads(read(ROOT / "pyproject.toml"))["project"]
    needed = {re.split(r"[^\w-]", package)[0] for package in project["dependencies"]}
    assert {"torch", "transformers", "datasets", "accelerate", "tokenizers", "filelock", "psutil"} <= needed
    for name in ("train.py", "pretrain.sh", "pretrain_cont.sh", "optimize_env.sh", "verify_optimization.py"):
        assert (ROOT / name).is_file(), name
    for name in ("moai", "configs", "tests"):
        assert (ROOT / name).is_dir(), name
