from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The shipped files without what runs left in outputs/."""
    folder = tmp_path / "project"
    folder.mkdir()
    for name in ("configs", "data", "tokenizers"):
        (folder / name).symlink_to(ROOT / name)
    return folder
