"""A run that has ended is not run again. Known from its directory alone, before data is looked at and torch is
imported.

if done := finished(resolved, places):
    print("\n".join(done.lines()))
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moai.core.config import Resolved
from moai.core.fsops import read_regular
from moai.training import checkpoints
from moai.training.arguments import TrainConfig
from moai.training.final_model import FINAL, staging
from moai.training.record import MOST_BYTES
from moai.training.report import Summary

_MAKE_NO_OTHER_MODEL = {"resume_from_checkpoint", "output_dir", "cache_dir", "use_cpu"}


def ended(places: Sequence[TrainConfig]) -> Summary | None:
    """The summary of the last of these stages, if each has a whole final model and no checkpoint of another step than
    its last.
    """
    summary = None
    for place in places:
        folder = Path(place.output_dir)
        summary = Summary.load(folder)
        newest = checkpoints.numbered(folder)[:1]
        if summary is None or any(checkpoints.step_of(path) != summary.steps for path in newest):
            return None
        # What is staged still has to take the model's name, or was killed before the old one went.
        if staging(folder / FINAL, writes=False).exists() or checkpoints.weights_problem(folder / FINAL) is not None:
            return None
    return summary


def differing(resolved: Resolved) -> list[str]:
    """`learning_rate 0.001 there, 0.0002 here`: what the run in output_dir was not asked for, of what decides about its
    model.

    What the environment says is about the machine (DATASET_NUM_PROC), and left out. A run without settings.json differs
    in all.
    """
    try:
        there = json.loads(read_regular(Path(resolved[TrainConfig].output_dir) / "settings.json", MOST_BYTES))
        before = _chosen(there)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ["its settings.json cannot be read"]
    here = _chosen(json.loads(json.dumps(resolved.table())))
    names = sorted(name for name in before.keys() & here.keys() if before[name] != here[name])
    return [f"{name} {before[name]} there, {here[name]} here" for name in names]


def _chosen(table: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {
        name: entry["value"]
        for name, entry in table.items()
        if name not in _MAKE_NO_OTHER_MODEL and not entry["origin"].startswith("environment")
    }


def finished(resolved: Resolved, places: Sequence[TrainConfig]) -> Summary | None:
    """The summary of the run that was asked for, if it has ended."""
    summary, config = ended(places), resolved[TrainConfig]
    if config.sequential:
        named, last = (Path(folder) / FINAL for folder in (config.output_dir, places[-1].output_dir))
        if not named.is_symlink() or named.resolve() != last.resolve():
            return None  # killed after its last model was in its place: the run still has to give it its other name
    return summary if summary and not differing(resolved) else None
