"""Train the tiny model in this process."""

import json
from pathlib import Path

import tiny_run

from moai.core.config import resolve
from moai.pretraining.options import DataConfig
from moai.training.arguments import TrainConfig

FLAGS = [
    "--batch_size",
    "2",
    "--gradient_accumulation_steps",
    "1",
    "--warmup_steps",
    "0",
    "--logging_steps",
    "1",
    "--save_steps",
    "1000",
]


def train_here(folder: Path, *flags: str) -> Path:
    """The output_dir of a run on the counting documents."""
    from moai.training.stages import Stage
    from moai.training.trainer import train

    tokenizer = tiny_run.write_tokenizer(folder / "tokenizer")
    prepared = tiny_run.open_prepared(tiny_run.write_prepared(folder / "prepared", tokenizer))
    argv = [
        "--output_dir",
        str(folder / "out"),
        "--model_config",
        str(tiny_run.write_model_config(folder)),
        "--tokenizer_path",
        str(tokenizer),
        *FLAGS,
        *flags,
    ]
    resolved = resolve([TrainConfig, DataConfig], argv, {}, prog="test")
    train(
        resolved[TrainConfig],
        [Stage(resolved[TrainConfig], resolved[DataConfig], prepared)],
        resolved.origins,
        environ={},
    )
    return folder / "out"


def losses(output: Path) -> list[float]:
    """Of every logged step, from the newest checkpoint."""
    newest = max(output.glob("checkpoint-*[0-9]"), key=lambda path: int(path.name.rpartition("-")[2]))
    return [
        entry["loss"]
        for entry in json.loads((newest / "trainer_state.json").read_text())["log_history"]
        if "loss" in entry
    ]
