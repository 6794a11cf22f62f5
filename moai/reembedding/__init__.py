"""Re-embedding a law database: `build(ReembedConfig(db="lawfirm_v2.db", version_id=5))`, and asking it, see
docs/reembedding.md.

    with Searcher.open("lawfirm_v2.db") as search:
        search.ask("이혼하면 재산은 어떻게 나누나")
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moai.reembedding.retrieval import Hit as Hit
    from moai.reembedding.retrieval import Searcher as Searcher


def __getattr__(name: str) -> object:
    if name not in ("Hit", "Searcher"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from moai.reembedding import retrieval  # what it imports is not needed by a monitor

    return getattr(retrieval, name)
