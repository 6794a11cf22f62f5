"""The house's rule: imports go down, never up and never sideways; no lazy import dodges it."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = (
    ("core",),
    ("tokenizers",),
    ("engine", "cache"),
    ("sources", "transforms", "quality"),
    ("prepared",),
    ("pretraining", "coref", "reembedding", "tokenizers.train", "tokenizers.convert"),
    (
        "training",
        "cache.gc",
        "doctor",
        "bench",
        "library",
        "view",
        *(f"coref.mlm{name}" for name in ("", "_evaluate", "_finetune", "_trainer")),
        *(f"prepared.{name}" for name in ("verify", "inspect", "export")),
        *(f"pretraining.{name}" for name in ("repair", "rebuild", "plan", "status", "explain")),
    ),
    ("cli",),
    ("__main__",),
)
"""From the ground up. A module is on the floor of the longest name that it begins with."""
APART = ("sources", "transforms")
"""Rooms of one floor that never import one another."""
HEAVY = {
    "torch",
    "transformers",
    "datasets",
    "accelerate",
    "kiwipiepy",
    "sentence_transformers",
    "huggingface_hub",
    "ray",
    "obstore",
}


CLOCKLESS = ("core/distributed", "cache/staging", "pretraining/publish", "cache/ledger", "engine/run")


def sources() -> Iterator[tuple[Path, str]]:
    paths = sorted((ROOT / "moai").rglob("*.py"))
    assert len(paths) > 100
    return ((path.relative_to(ROOT), path.read_text(encoding="utf-8")) for path in paths)


def floor(module: str) -> int:
    """Of `cache.gc.mark`: that of `cache.gc`."""
    found = [
        (len(name), number)
        for number, names in enumerate(FLOORS)
        for name in names
        if f"{module}.".startswith(f"{name}.")
    ]
    assert found, f"{module} is on no floor"
    return max(found)[1]


def imports(nodes: Iterable[ast.AST]) -> Iterator[tuple[int, str]]:
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{module}.{alias.name}" if module == "moai" else module) for alias in node.names)


def at_once(node: ast.AST) -> Iterator[ast.AST]:
    """What runs when a module is imported: all but the insides of functions, and what stands there for the type
    checker.
    """
    for child in ast.iter_child_nodes(node):
        types_only = isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING"
        if not types_only and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child
            yield from at_once(child)


def not_down(path: Path, source: str) -> list[str]:
    """Imports that go up or sideways, or are relative, wherever in the file they stand."""
    here = ".".join(path.with_suffix("").parts[1:]).removesuffix(".__init__")
    if here == "__init__":
        return []  # the public face, which imports when it is asked
    said = []
    for line, module in imports(ast.walk(ast.parse(source))):
        if module.startswith("moai.") and module != "moai.__version__":
            other = module.removeprefix("moai.")
            rooms = {name.split(".")[0] for name in (here, other)}
            if floor(other) > floor(here) or rooms == set(APART):
                said.append(f"{path}:{line}: {here} imports {module}")
        elif module.startswith("."):
            said.append(f"{path}:{line}: relative import of {module}")
    return said


def heavy(path: Path, source: str) -> list[str]:
    """A worker, and every start of the command line, pays for what stands at the top of a module."""
    found = imports(at_once(ast.parse(source)))
    return [f"{path}:{line}: imports {module} at once" for line, module in found if module.split(".")[0] in HEAVY]


@pytest.mark.parametrize("rule", [not_down, heavy])
def test_every_module_keeps_the_rule(rule: Callable[[Path, str], list[str]]) -> None:
    assert [line for path, source in sources() for line in rule(path, source)] == []


def test_the_rules_find_an_upward_a_sideways_a_relative_a_lazy_and_a_heavy_import() -> None:
    path = Path("moai/sources/x.py")
    assert not_down(path, "\nfrom moai.pretraining.options import DataConfig") == [
        "moai/sources/x.py:2: sources.x imports moai.pretraining.options"
    ]
    assert not_down(path, "import moai.transforms.text") != []
    assert not_down(path, "from .hub import fetch") != []
    assert not_down(path, "def f():\n    from moai import training") != []
    assert not_down(path, "from moai.engine.pipeline import count\nfrom moai.sources.hub import fetch") == []
    assert heavy(path, "try:\n    import torch.nn\nfinally:\n    pass") == [
        "moai/sources/x.py:2: imports torch.nn at once"
    ]
    assert heavy(path, "if TYPE_CHECKING:\n    import torch\ndef f():\n    import torch") == []


def test_the_protocol_compares_no_file_times_and_no_wall_clock() -> None:
    looks = re.compile(r"time\.time|[mca]time|datetime\.now")
    found = {name: looks.findall((ROOT / "moai" / f"{name}.py").read_text(encoding="utf-8")) for name in CLOCKLESS}
    assert not any(found.values()), found
