"""Where a run's curves go beside training.html: the trackers that transformers knows, told apart before any data is
read.
"""

from __future__ import annotations

from importlib.util import find_spec

from moai.core.config import did_you_mean
from moai.core.errors import ConfigError

_PACKAGES = {
    "azure_ml": "azureml",
    "clearml": "clearml",
    "codecarbon": "codecarbon",
    "comet_ml": "comet_ml",
    "dagshub": "dagshub",
    "dvclive": "dvclive",
    "kubeflow": "kubeflow",
    "mlflow": "mlflow",
    "neptune": "neptune",
    "swanlab": "swanlab",
    "tensorboard": "tensorboard",
    "trackio": "trackio",
    "wandb": "wandb",
}
"""The package behind each name of --report_to (transformers.integrations)."""


def trackers(report_to: str) -> list[str]:
    """The names in `report_to`, of which each is installed. Raises ConfigError."""
    names = [name.strip() for name in report_to.split(",") if name.strip() not in ("", "none")]
    for name in names:
        if name not in _PACKAGES:
            raise ConfigError(
                f"report_to = {name}: no such tracker{did_you_mean(name, _PACKAGES)} (known: {', '.join(_PACKAGES)})"
            )
        if find_spec(_PACKAGES[name]) is None:
            here = [known for known, package in _PACKAGES.items() if find_spec(package)]
            raise ConfigError(
                f"report_to = {name}: not installed (here: {', '.join(here) or 'none of them'}); pip install "
                f"{_PACKAGES[name]}, or --report_to none"
            )
    return names
