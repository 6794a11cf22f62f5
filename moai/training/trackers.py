"""Trackers that transformers knows, and whether each is installed: asked before any data is read."""

from __future__ import annotations

from importlib.util import find_spec

from moai.core.config import did_you_mean
from moai.core.errors import ConfigError

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
