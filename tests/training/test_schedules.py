"""The learning rate at named steps, from the scheduler that transformers' Trainer makes of our arguments."""

import math

import pytest
import torch

from moai.core.config import resolve
from moai.core.errors import ConfigError
from moai.training.arguments import TrainConfig
from moai.training.machine import schedule_options, training_arguments


def rates(flags, steps, tmp_path):
    """Of each step, as a share of the highest."""
    from transformers import Trainer

    config = resolve(
        [TrainConfig], [*flags.split(), "--learning_rate", "1.0", "--output_dir", str(tmp_path)], {}, prog="train.py"
    )[TrainConfig]
    arguments = training_arguments(config, use_cpu=True, loader_processes=0)
    arguments.max_steps, arguments.lr_scheduler_kwargs = steps, schedule_options(config, steps)
    trainer = Trainer(model=torch.nn.Linear(2, 2), args=arguments)
    trainer.create_optimizer()
    scheduler = trainer.create_scheduler(num_training_steps=steps)
    found = []
    for _ in range(steps):
        found.append(scheduler.get_last_lr()[0])
        trainer.optimizer.step()
        scheduler.step()
    return found


def test_warm_up_then_stable_then_decay(tmp_path):
    found = rates("--lr_scheduler_type warmup_stable_decay --warmup_steps 2 --decay_steps 4", 10, tmp_path)
    decay = [1 - math.sqrt(part / 4) for part in range(4)]
    assert found == pytest.approx([0, 0.5, 1, 1, 1, 1, *decay])


def test_steps_may_be_shares_of_the_run_and_the_end_a_share_of_the_height(tmp_path):
    found = rates(
        "--lr_scheduler_type warmup_stable_decay --warmup_steps 0.1 --decay_steps 0.2 --min_lr_ratio 0.5", 20, tmp_path
    )
    assert found == pytest.approx([0.5, 0.75, *[1] * 14, *[0.5 + 0.5 * (1 - math.sqrt(part / 4)) for part in range(4)]])


def test_a_cosine_may_end_above_zero(tmp_path):
    found = rates("--warmup_steps 0 --min_lr_ratio 0.1", 10, tmp_path)
    assert found == pytest.approx([0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / 10)) for step in range(10)])
    assert rates("--warmup_steps 0", 10, tmp_path)[5] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--min_lr_ratio 0.1 --lr_scheduler_type linear", "linear has none"),
        ("--min_lr_ratio 1", "below 1"),
        ("--decay_steps 1.5", "a whole number of steps"),
        ("--decay_steps 5", "cosine has none"),
        ("--flash_attention --attention eager", "choose one"),
    ],
)
def test_nonsense_is_refused(flags, message):
    with pytest.raises(ConfigError, match=message):
        resolve([TrainConfig], flags.split(), {}, prog="train.py")


def test_a_warm_up_and_a_decay_that_are_longer_than_the_run_are_refused():
    config = resolve(
        [TrainConfig],
        ["--lr_scheduler_type", "warmup_stable_decay", "--warmup_steps", "8", "--decay_steps", "0.3"],
        {},
        prog="train.py",
    )[TrainConfig]
    with pytest.raises(ConfigError, match="warmup_steps 8 and decay_steps 3 are more than the 10 steps"):
        schedule_options(config, 10)
