"""A run that is resumed goes on in its trackers' run; another one begins its own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tiny_training import train_here

from moai.core.errors import ConfigError
from moai.training import trackers
from moai.training.arguments import TrainConfig
from moai.training.trackers import same_run


def test_tensorboard_goes_on_in_one_directory(tmp_path: Path) -> None:
    flags = ["--report_to", "tensorboard", "--save_steps", "1"]
    out = train_here(tmp_path, *flags, "--max_steps", "1")
    train_here(tmp_path, *flags, "--max_steps", "2", "--resume_from_checkpoint")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert [path.is_file() for path in (out / "runs").iterdir()] == [True, True]  # one run, two files of events
    events = EventAccumulator(str(out / "runs"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2]
    assert "TENSORBOARD_LOGGING_DIR" not in os.environ


def test_logging_dir_is_where_trackers_write(tmp_path: Path) -> None:
    train_here(tmp_path, "--report_to", "tensorboard", "--max_steps", "1", "--logging_dir", str(tmp_path / "events"))
    assert any((tmp_path / "events").glob("events.*"))
    assert not (tmp_path / "out" / "runs").exists()


def test_wandb_goes_on_with_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What W&B reads: https://docs.wandb.ai/guides/runs/resuming."""
    monkeypatch.setattr(trackers, "find_spec", lambda package: package)
    config = TrainConfig(output_dir=str(tmp_path), report_to="wandb")
    seen = []
    for is_resumed in (False, True, False):
        with same_run(config, is_resumed=is_resumed):
            seen.append((os.environ["WANDB_RUN_ID"], os.environ["WANDB_RESUME"]))
    assert seen[0] == seen[1] != seen[2]
    assert seen[0][1] == "allow"
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    with same_run(config, is_resumed=True):
        assert os.environ["WANDB_RUN_ID"] == "mine"


def test_an_unknown_tracker_is_refused() -> None:
    with pytest.raises(ConfigError, match="no such tracker"):
        trackers.trackers("tensorbord")
