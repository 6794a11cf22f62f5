"""Records of a cache are believed only as they were written."""

from __future__ import annotations

from pathlib import Path

from moai.cache.ledger import Ledger
from moai.engine.pipeline import Raw


def test_a_record_of_which_a_letter_changed_is_none(tmp_path: Path) -> None:
    ledger, raw = Ledger(tmp_path), Raw("digest", (7,), (1,))
    ledger.remember_raw("ab" * 20, raw)
    assert ledger.known_raw("ab" * 20) == raw
    [path] = tmp_path.rglob("*.json")
    path.write_bytes(path.read_bytes().replace(b'"digest":"d', b'"digest":"D'))
    assert ledger.known_raw("ab" * 20) is None
