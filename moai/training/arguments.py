"""The training flags of train.py. Nothing heavy is imported here: worker processes and `--help` read this file too."""

from __future__ import annotations

import math
from dataclasses import dataclass

from moai.config import option
from moai.errors import ConfigError

SCHEDULERS = ("cosine", "linear", "constant", "constant_with_warmup")
AUTO = "auto"
"""`--resume_from_checkpoint auto`: the newest complete checkpoint in output_dir."""

_AT_LEAST = {"batch_size": 1, "gradient_accumulation_steps": 1, "logging_steps": 1, "save_steps": 1, "save_total_limit": 1, "dataloader_num_workers": 0,
             "seed": 0, "ddp_timeout": 1, "weight_decay": 0, "warmup_steps": 0}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Training: from packed rows to a model."""

    mode: str = option("pretrain", "what is trained: pretrain")
    model_config: str | None = option(None, "JSON file of the model: moai's fields, or any transformers configuration with its model_type")
    pretrained_model: str | None = option(None, "directory of a saved model to start from: old weights, new optimizer")
    output_dir: str = option("", "where checkpoints, logs, settings.json and final_model/ go (required)")
    num_epochs: float = option(1.0, "passes over the data", names=("num_train_epochs",))
    max_steps: int = option(-1, "optimizer steps; above 0 it wins over num_epochs")
    batch_size: int = option(4, "rows a device takes at once", names=("per_device_train_batch_size",))
    gradient_accumulation_steps: int = option(8, "batches of every device in one optimizer step")
    learning_rate: float = option(3e-4, "the highest learning rate")
    lr_scheduler_type: str = option("cosine", "how the learning rate falls after the warm-up", choices=SCHEDULERS)
    warmup_steps: float = option(2000.0, "steps until the highest learning rate; below 1 a share of all steps")
    weight_decay: float = option(0.1, "AdamW's weight decay")
    bf16: bool = option(False, "compute in bfloat16; weights and optimizer stay in 32 bits")
    fp16: bool = option(False, "compute in float16 with loss scaling, for GPUs without bfloat16")
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, about a third more time")
    flash_attention: bool = option(False, "use flash_attention_2 where it is installed")
    compile: bool = option(False, "torch.compile the model", names=("torch_compile",))
    logging_steps: int = option(100, "steps between two log lines")
    save_steps: int = option(1000, "steps between two checkpoints; the last step always makes one")
    save_total_limit: int = option(3, "checkpoints kept")
    resume_from_checkpoint: str | None = option(None, "go on with a run: auto (the newest complete checkpoint) or a checkpoint's directory", bare=AUTO)
    dataloader_num_workers: int = option(4, "processes a rank that read rows; fewer by default where CPUs are few, 0 reads in the rank itself")
    seed: int = option(42, "of weights and of the rows' order")
    report_to: str = option("none", "none, or tensorboard, wandb, mlflow, ... (several with commas), where installed")
    run_name: str | None = option(None, "the run's name there")
    ddp_timeout: int = option(1800, "seconds a collective may take; preparation is not part of any")
    use_cpu: bool | None = option(None, "train on the CPU; by default where there is no accelerator")

    def __post_init__(self) -> None:
        if self.mode == "sft":
            raise ConfigError("mode = sft: training on instructions comes with instruction data, which this version does not read; use --mode pretrain")
        if self.mode != "pretrain":
            raise ConfigError(f"mode = {self.mode!r}: choose pretrain")
        for name, least in _AT_LEAST.items():
            if not getattr(self, name) >= least:  # NaN is refused too
                raise ConfigError(f"{name} = {getattr(self, name)}: must be at least {least}")
        if not 0 < self.learning_rate < math.inf:
            raise ConfigError(f"learning_rate = {self.learning_rate}: must be above 0")
        if self.max_steps != -1 and self.max_steps < 1:
            raise ConfigError(f"max_steps = {self.max_steps}: must be at least 1, or -1 to count epochs")
        if not 0 < self.num_epochs < math.inf:
            raise ConfigError(f"num_epochs = {self.num_epochs}: must be above 0")
        if self.warmup_steps >= 1 and self.warmup_steps != int(self.warmup_steps):
            raise ConfigError(f"warmup_steps = {self.warmup_steps}: a whole number of steps, or a share below 1")
        if self.bf16 and self.fp16:
            raise ConfigError("bf16 and fp16 are both set: choose one (bf16 where the GPU has it)")
        if self.fp16 and self.use_cpu:
            raise ConfigError("fp16 needs a GPU: drop --fp16 or --use_cpu (bf16 works on the CPU)")

    def require(self) -> TrainConfig:
        """This configuration if it names a model and a place. Raises ConfigError with the missing flag."""
        if not self.output_dir:
            raise ConfigError("no place for the model: set --output_dir DIR")
        if not self.model_config and not self.pretrained_model:
            raise ConfigError("no model: set --model_config FILE for a new one (configs/model_config_demo.json is one) or --pretrained_model DIR")
        return self
