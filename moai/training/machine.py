"""What training runs on: the device, the processes that read rows, the threads, and transformers' arguments for all of
it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from moai.core.config import Setting
from moai.core.distributed import Ranks
from moai.core.errors import ConfigError
from moai.training.arguments import TrainConfig
from moai.training.trackers import trackers

logger = logging.getLogger(__name__)

_SAME_NAME = (
    "output_dir", "max_steps", "gradient_accumulation_steps", "learning_rate", "weight_decay", "warmup_steps", "bf16",
    "fp16", "seed", "ddp_timeout", "logging_steps", "run_name", "save_steps",
)  # fmt: skip
"""Settings that transformers calls as we do."""


def choose_device(config: TrainConfig, here: Ranks) -> Setting:
    """Whether to train on the CPU, with the reason. Raises ConfigError where the accelerators do not suffice."""
    import torch

    device = torch.accelerator.current_accelerator(check_available=True)
    found = device.type if device else None
    if config.use_cpu:
        return Setting(True, "set")
    if found is None:
        if config.use_cpu is False:
            raise ConfigError(
                "use_cpu = false: torch sees no accelerator here; drop the flag to train on the CPU, or install torch "
                "for your GPU"
            )
        use_cpu = Setting(True, "torch sees no accelerator")
    elif found == "mps" and here.world_size > 1:
        use_cpu = Setting(True, "MPS serves one process, this launch has more")
    elif here.local_world_size > torch.accelerator.device_count():
        raise ConfigError(
            f"{here.local_world_size} ranks on this node, but {torch.accelerator.device_count()} devices: start as "
            f"many ranks as devices (NUM_GPUS), or set --use_cpu"
        )
    else:
        use_cpu = Setting(False, f"torch sees {torch.accelerator.device_count()} x {found}")
    if use_cpu.value and config.fp16:
        raise ConfigError(f"fp16 needs a GPU, and training is on the CPU ({use_cpu.reason}): use --bf16, or neither")
    return use_cpu


def choose_loader_processes(config: TrainConfig, origins: Mapping[str, str], cpus: Setting, here: Ranks) -> Setting:
    """Processes that read rows for one rank: as set, or what its share of the CPUs leaves beside itself."""
    wanted = config.dataloader_num_workers
    if origins.get("dataloader_num_workers", "default") != "default":
        return Setting(wanted, "set")
    share = cpus.value // here.local_world_size
    return Setting(
        max(0, min(wanted, share - 1)),
        f"{cpus.value} CPUs ({cpus.reason}) / {here.local_world_size} ranks, one for the rank itself",
    )


def limit_threads(cpus: Setting, here: Ranks) -> None:
    """torch takes all cores of the host; this rank's share of what it may use is less in a container or beside other
    ranks.
    """
    import torch

    share = max(1, cpus.value // here.local_world_size)
    if torch.get_num_threads() > share:
        torch.set_num_threads(share)


def half_precision(config: TrainConfig) -> Any:
    """The torch dtype of 16-bit computation."""
    import torch

    return torch.float16 if config.fp16 else torch.bfloat16


def allow_tf32() -> None:
    import torch

    torch.set_float32_matmul_precision("high")


def training_arguments(config: TrainConfig, *, use_cpu: bool, loader_processes: int) -> Any:
    """transformers' arguments; constructing them joins the process group on accelerators. Raises ConfigError for what
    they refuse.
    """
    from transformers import TrainingArguments

    with_least = config.lr_scheduler_type == "cosine" and config.min_lr_ratio
    try:
        arguments = TrainingArguments(
            **{name: getattr(config, name) for name in _SAME_NAME},
            num_train_epochs=config.num_epochs,
            per_device_train_batch_size=config.batch_size,
            lr_scheduler_type="cosine_with_min_lr" if with_least else config.lr_scheduler_type,
            max_grad_norm=1.0,
            optim="adamw_torch_fused",
            torch_compile=config.compile,
            use_cpu=use_cpu,
            ddp_find_unused_parameters=False,
            activation_checkpointing=config.gradient_checkpointing,
            activation_checkpointing_kwargs={"use_reentrant": False} if config.gradient_checkpointing else None,
            logging_first_step=True,
            logging_nan_inf_filter=False,
            log_level="warning",
            log_level_replica="warning",
            disable_tqdm=True,
            report_to=trackers(config.report_to),
            save_strategy="steps",
            save_total_limit=None,  # checkpoints.rotate keeps save_total_limit
            dataloader_num_workers=loader_processes,
            dataloader_prefetch_factor=4 if loader_processes else None,
            dataloader_drop_last=True,
            ignore_data_skip=True,  # the sampler begins where the run is resumed
            dataloader_persistent_workers=loader_processes > 0,
            dataloader_pin_memory=not use_cpu,
            remove_unused_columns=False,
        )
    except (ValueError, ImportError) as error:
        raise ConfigError(" ".join(str(error).split())) from error
    if arguments.n_gpu > 1:
        logger.warning("1 of %d GPUs is used: start through torchrun or accelerate launch to use all", arguments.n_gpu)
        arguments._n_gpu = 1  # else transformers splits each batch among them in one process, slowly
    return arguments


def schedule_options(config: TrainConfig, steps: int) -> dict[str, Any]:
    """What transformers must know of the learning rate's schedule beside the warm-up, in a run of so many steps. Raises
    ConfigError.

    warmup_stable_decay falls as one minus the square root of the part of the decay that is over: better than a straight
    line in https://arxiv.org/abs/2405.18392.
    """
    if config.lr_scheduler_type == "cosine" and config.min_lr_ratio:
        return {"min_lr_rate": config.min_lr_ratio}
    if config.lr_scheduler_type != "warmup_stable_decay":
        return {}
    warmup, decay = (
        int(given) if given >= 1 else math.ceil(given * steps) for given in (config.warmup_steps, config.decay_steps)
    )
    if warmup + decay > steps:
        raise ConfigError(
            f"warmup_steps {warmup} and decay_steps {decay} are more than the {steps} steps of this run: lower one of "
            f"them"
        )
    return {"num_decay_steps": decay, "decay_type": "1-sqrt", "min_lr_ratio": config.min_lr_ratio}
