"""moai: from raw text to the first training step.

    import moai

    prepared = moai.prepare(dataset="corpus.jsonl", tokenizer_path="tokenizers/mine", seq_len=2048, packing="bfd_split")
    for batch in prepared.torch(batch_size=8): ...

Nothing is loaded before a name is used. What stands here is for programs; everything below may change.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moai.core.errors import (
        ConfigError,
        DamagedError,
        Interrupted,
        MoaiError,
        PartFailed,
        PreparationFailed,
        SlowTokenizerError,
        SourceError,
        StorageError,
        TokenizerError,
        TooManyBadRecords,
        WorkerDied,
    )
    from moai.engine.part import Filter, Map, Part, Signal
    from moai.engine.schema import Column
    from moai.library import PreparedData, open_prepared, prepare

__version__ = "0.1.0"
__all__ = [
    "Column",
    "ConfigError",
    "DamagedError",
    "Filter",
    "Interrupted",
    "Map",
    "MoaiError",
    "Part",
    "PartFailed",
    "PreparationFailed",
    "PreparedData",
    "Signal",
    "SlowTokenizerError",
    "SourceError",
    "StorageError",
    "TokenizerError",
    "TooManyBadRecords",
    "WorkerDied",
    "open_prepared",
    "prepare",
]
_PLACES = {
    "moai.library": ("PreparedData", "open_prepared", "prepare"),
    "moai.engine.part": ("Filter", "Map", "Part", "Signal"),
    "moai.engine.schema": ("Column",),
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'moai' has no attribute {name!r}")
    place = next((place for place, names in _PLACES.items() if name in names), "moai.core.errors")
    found = globals()[name] = getattr(import_module(place), name)
    return found


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
