"""Trackers that transformers knows: whether each is installed, asked before any data is read, and which run they go on
with.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from moai.core.config import did_you_mean
from moai.core.errors import ConfigError
from moai.core.files import write_atomic

if TYPE_CHECKING:
    from moai.training.arguments import TrainConfig

_SAME = "clearml codecarbon comet_ml dagshub dvclive kubeflow mlflow neptune swanlab tensorboard trackio wandb"
_PACKAGES = {"azure_ml": "azureml", **{name: name for name in _SAME.split()}}
"""The package behind each name of --report_to (transformers.integrations)."""


def trackers(report_to: str) -> list[str]:
    """The names in `report_to`, of which each is installed. Raises ConfigError."""
    names = [name.strip() for name in report_to.split(",") if name.strip() not in ("", "none")]
    here = [name for name, package in _PACKAGES.items() if find_spec(package)] if names else []
    for name in names:
        if name not in _PACKAGES:
            raise ConfigError(
                f"report_to = {name}: no such tracker{did_you_mean(name, _PACKAGES)} (known: {', '.join(_PACKAGES)})"
            )
        if name not in here:
            raise ConfigError(
                f"report_to = {name}: not installed (here: {', '.join(here) or 'none of them'}); pip install "
                f"{_PACKAGES[name]}, or --report_to none"
            )
    return names


@contextlib.contextmanager
def same_run(config: TrainConfig, *, is_resumed: bool) -> Iterator[None]:
    """Within, TensorBoard and W&B go on with the run of `config.output_dir` where it is resumed, and begin a new one
    where it is not. What a user's own variables say wins.

    The run's W&B id lies beside its checkpoints. Every rank may call this; only rank 0's trackers write.
    """
    named, output = {}, Path(config.output_dir)
    names = trackers(config.report_to)
    place = Path(config.logging_dir).expanduser() if config.logging_dir else None
    if "tensorboard" in names:
        named["TENSORBOARD_LOGGING_DIR"] = str(place or output / "runs")
    if "wandb" in names:
        named |= {"WANDB_RUN_ID": _wandb_id(output / "wandb_run_id", is_resumed), "WANDB_RESUME": "allow"}
        named |= {"WANDB_DIR": str(place)} if place else {}
    ours = {name: value for name, value in named.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)


def _wandb_id(kept: Path, is_resumed: bool) -> str:
    if not (is_resumed and kept.is_file()):
        write_atomic(kept, uuid.uuid4().hex[:8].encode())
    return kept.read_text()
