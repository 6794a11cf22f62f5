"""Whether a version may serve: measured on questions with known answers, against a bound and the version that serves.

    proof = prove(database.path, 5, Conditions(Path("questions.jsonl"), min_recall=0.9, not_worse=True))
    proof.refusal                     # None, or why version 5 is not activated

The questions also tell how much the model's list is worth beside the words: the weight of fusion that answers most,
among those that leave no recall below that of words alone, is noted with the version.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from moai.core.errors import ConfigError
from moai.reembedding import evaluation, versions
from moai.reembedding.evaluation import RECALL_AT, Figures, Measured
from moai.reembedding.retrieval import Searcher
from moai.reembedding.versions import Version

logger = logging.getLogger(__name__)

WEIGHTS = (1.0, 0.7, 0.5, 0.3, 0.2, 0.1, 0.0)
GOAL = "recall@10"
"""What `--min_recall` is a bound of."""


class Asked(Protocol):
    """The flags of `build` and `activate`."""

    @property
    def questions(self) -> str | None: ...
    @property
    def min_recall(self) -> float | None: ...
    @property
    def not_worse(self) -> bool: ...


@dataclass(frozen=True)
class Conditions:
    questions: Path | None
    min_recall: float | None = None
    not_worse: bool = False

    @classmethod
    def of(cls, config: Asked) -> Conditions:
        """Of the flags. A file that holds no questions is said now, not after hours."""
        found = cls(Path(config.questions) if config.questions else None, config.min_recall, config.not_worse)
        if found.questions:
            evaluation.read(found.questions)
        return found

    def __post_init__(self) -> None:
        if self.questions is None and (self.min_recall is not None or self.not_worse):
            raise ConfigError("--min_recall and --not_worse need --questions FILE to measure on")
        if self.min_recall is not None and not 0 < self.min_recall <= 1:
            raise ConfigError(f"min_recall = {self.min_recall}: above 0, at most 1")


@dataclass(frozen=True)
class Proof:
    measured: Measured
    dense_weight: float | None
    """Of the fusion; None where the version cannot be searched by meaning."""
    refusal: str | None


def prove(
    db: Path, version_id: int, conditions: Conditions, *, model: str | None = None, device: str = "auto"
) -> Proof:
    """Reads only. Raises SourceError for a file that holds no questions."""
    assert conditions.questions is not None
    questions = evaluation.read(conditions.questions)
    with Searcher.open(db, model=model, device=device) as searcher:
        version = versions.get(searcher.database, version_id)
        measured, weight = _fitted(searcher, version, questions)
        before = versions.serving(searcher.database)
        other = None
        if conditions.not_worse and before and before.id != version_id:
            searcher.model = None  # the version's own
            other = evaluation.measure(searcher, before, questions)
    refusal = _too_low(measured, conditions.min_recall) or (other and _worse(measured, other))
    best = _best(measured)
    said = ", ".join(f"{name} {value:.3f}" for name, value in best.values.items())
    logger.info("Version %d on %s questions: %s", version_id, f"{len(questions):,}", said)
    return Proof(measured, weight, refusal or None)


def _fitted(
    searcher: Searcher, version: Version, questions: Sequence[evaluation.Question]
) -> tuple[Measured, float | None]:
    """Measured with the weight that answers most without losing to words at any k."""
    found: dict[float, Measured] = {}
    for weight in WEIGHTS:
        weighted = replace(version, metadata=version.metadata | {"moai": version.made | {"dense_weight": weight}})
        modes = ("hybrid",) if found else None  # words and meaning alone are the same for every weight
        measured = evaluation.measure(searcher, weighted, questions, modes=modes)
        if measured.unsearchable:
            return measured, None
        found[weight] = measured
    first = found[WEIGHTS[0]]
    words = first.modes["keyword"]
    good = [weight for weight, one in found.items() if not _below(one.modes["hybrid"], words)] or [0.0]
    weight = max(good, key=lambda weight: found[weight].modes["hybrid"].values["mrr"])
    return replace(first, modes={**first.modes, "hybrid": found[weight].modes["hybrid"]}), weight


def _below(figures: Figures, others: Figures) -> str | None:
    for k in RECALL_AT:
        ours, theirs = figures.values[f"recall@{k}"], others.values[f"recall@{k}"]
        if ours < theirs:
            return f"recall@{k} is {ours:.3f}, below {theirs:.3f}"
    return None


def _best(measured: Measured) -> Figures:
    return measured.modes.get("hybrid") or measured.modes["keyword"]


def _too_low(measured: Measured, bound: float | None) -> str | None:
    value = _best(measured).values[GOAL]
    return f"{GOAL} is {value:.3f}, below --min_recall {bound}" if bound is not None and value < bound else None


def _worse(measured: Measured, other: Measured) -> str | None:
    found = _below(_best(measured), _best(other))
    by = "" if other.unsearchable is None else ", which was searched by words alone, since its model is gone"
    return f"{found}, that of version {other.version_id}, which serves{by}" if found else None
