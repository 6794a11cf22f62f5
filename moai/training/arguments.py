"""The training flags of train.py. Nothing heavy is imported here: worker processes and `--help` read this file too."""

from __future__ import annotations

import math
from dataclasses import dataclass

from moai.core.config import option
from moai.core.errors import ConfigError
from moai.training.portable import SAVE_DTYPES
from moai.training.sizes import SIZES
from moai.training.trackers import trackers

SCHEDULERS = ("cosine", "linear", "constant", "constant_with_warmup", "warmup_stable_decay")
ATTENTIONS = ("auto", "sdpa", "eager", "flex", "flash")
MODES = ("pretrain", "sft")
AUTO = "auto"
"""`--resume_from_checkpoint auto`: the newest complete checkpoint in output_dir."""

_AT_LEAST = {
    "batch_size": 1, "gradient_accumulation_steps": 1, "logging_steps": 1, "save_steps": 1, "save_total_limit": 1,
    "dataloader_num_workers": 0, "seed": 0, "shuffle_window": 0, "ddp_timeout": 1, "weight_decay": 0,
    "warmup_steps": 0, "stage_warmup_steps": 0, "decay_steps": 0,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Training: from packed rows to a model."""

    mode: str = option(
        "pretrain", "what is learned: every token of texts, or of conversations what the assistant says", choices=MODES
    )
    prepared: tuple[str, ...] = option(
        (), "train on these prepared directories, without raw data, cache or tokenizer; their sources are mixed by name"
    )
    model_config: str | None = option(
        None, "JSON file of the model: moai's fields, or any transformers configuration with its model_type"
    )
    model_size: str | None = option(
        None, "a new model of about so many parameters, with the tokenizer's vocabulary; no JSON needed", choices=SIZES
    )
    pretrained_model: str | None = option(None, "directory of a saved model to start from: old weights, new optimizer")
    output_dir: str = option("", "where checkpoints, logs, settings.json and final_model/ go (required)")
    num_epochs: float = option(1.0, "passes over the data", names=("num_train_epochs",))
    max_steps: int = option(-1, "optimizer steps; above 0 it wins over num_epochs")
    batch_size: int = option(4, "rows a device takes at once", names=("per_device_train_batch_size",))
    gradient_accumulation_steps: int = option(8, "batches of every device in one optimizer step")
    learning_rate: float = option(3e-4, "the highest learning rate")
    lr_scheduler_type: str = option("cosine", "how the learning rate falls after the warm-up", choices=SCHEDULERS)
    warmup_steps: float = option(2000.0, "steps until the highest learning rate; below 1 a share of all steps")
    decay_steps: float = option(
        0.1,
        "with warmup_stable_decay: the last steps of the run, in which the learning rate falls; below 1 a share of all "
        "steps",
    )
    min_lr_ratio: float = option(
        0.0, "the lowest learning rate as a share of the highest, for cosine and warmup_stable_decay"
    )
    sequential: bool = option(
        False, "one stage a dataset, each from the weights of the last: OUTPUT_DIR/stage_0, stage_1, ..."
    )
    stage_warmup_steps: float = option(100.0, "warm-up of the stages after the first")
    weight_decay: float = option(0.1, "AdamW's weight decay")
    bf16: bool = option(False, "compute in bfloat16; weights and optimizer stay in 32 bits")
    fp16: bool = option(False, "compute in float16 with loss scaling, for GPUs without bfloat16")
    gradient_checkpointing: bool = option(
        False, "recompute activations in the backward pass: less memory, about a third more time"
    )
    attention: str = option(
        "auto", "what computes attention; auto takes flash where it can run, else sdpa", choices=ATTENTIONS
    )
    flash_attention: bool = option(False, "the same as --attention flash")
    compile: bool = option(False, "torch.compile the model", names=("torch_compile",))
    logging_steps: int = option(100, "steps between two log lines")
    save_steps: int = option(1000, "steps between two checkpoints; the last step always makes one")
    save_total_limit: int = option(3, "checkpoints kept")
    save_dtype: str = option(
        "float32", "precision of the weights in final_model/; checkpoints keep all 32 bits", choices=SAVE_DTYPES
    )
    eval_dataset: tuple[str, ...] = option(
        (), "files, folders or Hub names to evaluate on, where not --eval_ratio holds documents out"
    )
    eval_steps: int | None = option(
        None, "steps between two evaluations of what is held out; without it at each checkpoint; always at the end"
    )
    eval_rows: int | None = option(1000, "rows of each source that are evaluated: the first of what is held out")
    resume_from_checkpoint: str | None = option(
        None, "go on with a run: auto (the newest complete checkpoint) or a checkpoint's directory", bare=AUTO
    )
    dataloader_num_workers: int = option(
        4, "processes a rank that read rows; fewer by default where CPUs are few, 0 reads in the rank itself"
    )
    seed: int = option(42, "of weights and of the rows' order")
    mixture: tuple[str, ...] = option(
        (), "weights of the sources, as in ko=0.6 en=0.4; a source that is not named is left out"
    )
    mixture_by: str = option("tokens", "what the weights are shares of", choices=("tokens", "examples"))
    mixture_temperature: float = option(
        1.0, "weights to the power of 1/T: above 1 small sources come more often than they are large"
    )
    mixture_epochs: tuple[str, ...] = option(
        (), "the most passes over a source, as in ko=4 en=1; then the others share its place"
    )
    mixture_stages: tuple[str, ...] = option((), "other weights from a share of the run on, as in 0.8:ko=1,en=3")
    shuffle_window: int = option(
        0, "shards among which rows are shuffled, window after window of permuted shards; 0 shuffles all rows"
    )
    report_to: str = option("none", "none, or tensorboard, wandb, mlflow, ... (several with commas), where installed")
    run_name: str | None = option(None, "the run's name there")
    logging_dir: str | None = option(
        None, "where trackers write; TensorBoard's default is OUTPUT_DIR/runs, and a resumed run goes on in it"
    )
    ddp_timeout: int = option(1800, "seconds a collective may take; preparation is not part of any")
    use_cpu: bool | None = option(None, "train on the CPU; by default where there is no accelerator")

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(f"mode = {self.mode!r}: choose {' or '.join(MODES)}")
        for name, least in _AT_LEAST.items():
            if not getattr(self, name) >= least:  # NaN is refused too
                raise ConfigError(f"{name} = {getattr(self, name)}: must be at least {least}")
        if any(value is not None and value < 1 for value in (self.eval_steps, self.eval_rows)):
            raise ConfigError(f"eval_steps = {self.eval_steps}, eval_rows = {self.eval_rows}: must be at least 1")
        for name in ("mixture_temperature", "learning_rate", "num_epochs"):
            if not 0 < (value := getattr(self, name)) < math.inf:
                raise ConfigError(f"{name} = {value}: must be above 0")
        if self.max_steps != -1 and self.max_steps < 1:
            raise ConfigError(f"max_steps = {self.max_steps}: must be at least 1, or -1 to count epochs")
        for name in ("warmup_steps", "stage_warmup_steps", "decay_steps"):
            if (steps := getattr(self, name)) >= 1 and steps != int(steps):
                raise ConfigError(f"{name} = {steps}: a whole number of steps, or a share below 1")
        if not 0 <= self.min_lr_ratio < 1:
            raise ConfigError(f"min_lr_ratio = {self.min_lr_ratio}: must be at least 0 and below 1")
        schedule, stable = self.lr_scheduler_type, "warmup_stable_decay"
        for name, default, which in (("min_lr_ratio", 0, ("cosine", stable)), ("decay_steps", 0.1, (stable,))):
            if (value := getattr(self, name)) != default and schedule not in which:
                raise ConfigError(
                    f"{name} = {value:g}: lr_scheduler_type {schedule} has none; use {' or '.join(which)}"
                )
        if self.flash_attention and self.attention not in ("auto", "flash"):
            raise ConfigError(f"flash_attention and attention = {self.attention} are both set: choose one")
        if self.bf16 and self.fp16:
            raise ConfigError("bf16 and fp16 are both set: choose one (bf16 where the GPU has it)")
        if self.fp16 and self.use_cpu:
            raise ConfigError("fp16 needs a GPU: drop --fp16 or --use_cpu (bf16 works on the CPU)")

    def require(self) -> TrainConfig:
        """This configuration if it names a model and a place. Raises ConfigError with the missing flag."""
        if not self.output_dir:
            raise ConfigError("no place for the model: set --output_dir DIR")
        if not (self.model_size or self.model_config or self.pretrained_model):
            raise ConfigError(
                f"no model: set --model_size for a new one ({', '.join(SIZES)}), --model_config FILE for another "
                f"shape, or --pretrained_model DIR"
            )
        trackers(self.report_to)
        return self
