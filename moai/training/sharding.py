"""Weights and optimizer divided among the ranks (FSDP2, DeepSpeed), as an accelerate configuration file asks for it.

    accelerate launch --config_file configs/accelerate/fsdp2.yaml train.py --config configs/2b.yaml

Every rank builds the whole model, proves its attention on it, and keeps its part. Checkpoints hold whole tensors,
gathered by rank 0: any number of ranks goes on from one, and any tool opens it. This module says in one line what
cannot be driven so.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from moai.core.errors import ConfigError

logger = logging.getLogger(__name__)


def check_launch(environ: Mapping[str, str], *, on_cpu: bool, rank: int) -> None:
    """What the launcher asked for, before a library answers with a traceback or with silence. Raises ConfigError."""
    deepspeed = environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true"
    if deepspeed and find_spec("deepspeed") is None:
        raise ConfigError(
            "the launcher asks for DeepSpeed, which is not installed: pip install deepspeed, or launch with "
            "configs/accelerate/fsdp2.yaml"
        )
    if on_cpu and rank == 0 and (deepspeed or environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"):
        logger.warning(
            "The launcher asks to divide the model among the ranks; accelerate does so on accelerators only, so here "
            "each rank holds all of it"
        )


def check(trainer: Any) -> None:
    """Raises ConfigError for a way of dividing the model that leaves no complete checkpoint, or a model that is not
    whole when it is checked.
    """
    if trainer.is_deepspeed_enabled:
        if trainer.accelerator.state.deepspeed_plugin.zero3_init_flag:
            raise ConfigError(
                "the accelerate configuration's zero3_init_flag must be false: every rank builds the model and checks "
                "its attention"
            )
        if trainer.args.process_index == 0:
            logger.warning(
                "DeepSpeed: moai's own tests do not run it; try a short run and its resume first, or take "
                "configs/accelerate/fsdp2.yaml"
            )
        return
    if not trainer.is_fsdp_enabled:
        return
    plugin = trainer.accelerator.state.fsdp_plugin
    whole, whole_model = "FULL_STATE_DICT", "every rank builds the model and checks its attention"
    for wrong, right in (
        (plugin.fsdp_version != 2, "fsdp_version must be 2"),
        (
            whole not in str(plugin.state_dict_type),
            f"fsdp_state_dict_type must be {whole}: a checkpoint of parts is complete for one number of ranks",
        ),
        (plugin.cpu_ram_efficient_loading, f"fsdp_cpu_ram_efficient_loading must be false: {whole_model}"),
    ):
        if wrong:
            raise ConfigError(
                f"the accelerate configuration's {right}; configs/accelerate/fsdp2.yaml is one that works"
            )
