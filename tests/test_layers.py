"""The house's rule: imports go down, never up and never sideways; no lazy import dodges it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
GROUND = {
    "errors",
    "config",
    "files",
    "resources",
    "distributed",
    "tokenizer",
    "backends",
    "probes",
    "columns",
    "lean",
    "pages",
    "failpoints",
    "fsops",
    "hub",
    "stopping",
    "database",
}
LAYERS = {**dict.fromkeys(GROUND, 0), "engine": 1, "sources": 2, "transforms": 2, "sinks": 2, "recipes": 3}
TOP = 4  # training, verify, monitor, inspect, doctor, planning
HEAVY = {"torch", "transformers", "datasets", "accelerate", "kiwipiepy", "sentence_transformers", "huggingface_hub"}


def modules() -> list[Path]:
    return sorted((ROOT / "moai").rglob("*.py"))


def room(module: str) -> str:
    return module.split(".")[1]


def layer(name: str) -> int:
    return 5 if name == "__main__" else LAYERS.get(name, TOP)


def imports(tree: ast.AST) -> list[tuple[int, str]]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            module = node.module or ""
            found += [(node.lineno, f"{module}.{alias.name}" if module == "moai" else module) for alias in node.names]
    return found


def violations(path: Path, source: str) -> list[str]:
    relative = path.relative_to(ROOT)
    here = relative.with_suffix("").parts
    name = here[1] if len(here) > 1 else here[0]
    said = []
    for line, module in imports(ast.parse(source)):
        if not module.startswith("moai."):
            continue
        other = room(module)
        sideways = other != name and layer(other) == layer(name) == 2
        if layer(other) > layer(name) or sideways:
            said.append(f"{relative}:{line}: {name} imports {module}")
    return said


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path: Path) -> None:
    assert violations(path, path.read_text()) == []


def test_the_rule_finds_an_upward_a_sideways_and_a_lazy_import() -> None:
    path = ROOT / "moai" / "sources" / "x.py"
    assert violations(path, "from moai.recipes.options import DataConfig") != []
    assert violations(path, "import moai.transforms.text") != []
    assert violations(path, "def f():\n    from moai import sinks") != []
    assert violations(path, "from moai.engine.pipeline import count\nfrom moai.sources.hub import fetch") == []


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_heavy_packages_are_imported_where_they_are_needed(path: Path) -> None:
    """A worker, and every start of the command line, pays for what stands at the top of a module."""
    tree = ast.parse(path.read_text())
    top = ast.Module([node for node in tree.body if not _is_type_checking(node)], [])
    outside = [node for node in ast.walk(top) if isinstance(node, ast.Import | ast.ImportFrom) and not _inside_function(top, node)]
    names = {module.split(".")[0] for node in outside for _, module in imports(ast.Module([node], []))}
    assert names & HEAVY == set()


@pytest.mark.parametrize("module", ["distributed", "recipes/attempts", "recipes/publish", "engine/ledger", "engine/run"])
def test_the_protocol_compares_no_file_times_and_no_wall_clock(module: str) -> None:
    source = (ROOT / "moai" / f"{module}.py").read_text()
    assert not re.search(r"time\.time|[mca]time|datetime\.now", source)


def _is_type_checking(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _inside_function(tree: ast.AST, wanted: ast.AST) -> bool:
    return any(wanted in ast.walk(node) for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
