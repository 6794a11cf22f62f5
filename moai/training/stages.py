"""One run, or with --sequential one run a dataset, each from the weights that the last one left.

    outputs/moai-2b/stage_0/ checkpoint-N final_model/ checkpoint -> final_model        a run like any other
    outputs/moai-2b/stage_1/ ...
    outputs/moai-2b/final_model -> stage_1/final_model

Stages that have their final model are not repeated when the run is resumed.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moai.core.errors import ConfigError
from moai.core.fsops import read_regular
from moai.prepared.manifest import Prepared
from moai.pretraining.dataset import own_mixture
from moai.pretraining.options import DataConfig
from moai.training import checkpoints
from moai.training import process_group as group
from moai.training.arguments import AUTO, TrainConfig
from moai.training.final_model import FINAL, point
from moai.training.record import MOST_BYTES
from moai.training.steps import wish_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stage:
    """What is trained on what; `held_out` is what it is evaluated on, `run` the place of the run that this is a stage
    of, `settings` what settings.json says.
    """

    config: TrainConfig
    data: DataConfig
    prepared: Prepared
    held_out: Prepared | None = None
    run: Path | None = None
    settings: Mapping[str, Any] | None = None


def stages_of(config: TrainConfig, data: DataConfig) -> list[tuple[TrainConfig, DataConfig]]:
    """The settings of every stage of a run that begins, with its place. Raises ConfigError."""
    if config.eval_dataset and data.eval_ratio:
        raise ConfigError(
            f"eval_dataset and eval_ratio = {data.eval_ratio} are both set: evaluate on other files, or hold documents "
            f"out; choose one"
        )
    config = _with_own_weights(config, data)
    if not config.sequential:
        if not config.prepared:
            _check_mixture(config, data)
        return [(config, data)]
    if config.resume_from_checkpoint not in (None, AUTO):
        raise ConfigError(
            f"resume_from_checkpoint = {config.resume_from_checkpoint}: with --sequential only auto, which finds the "
            f"stage and its checkpoint"
        )
    if config.mixture or config.mixture_stages or config.mixture_epochs:
        raise ConfigError(
            "sequential and mixture are both set: a stage holds one dataset; choose one (mixture_stages changes "
            "weights within one run)"
        )
    return [
        (_stage(config, number), replace(data, dataset=(spec,), dataset_config=None if number else data.dataset_config))
        for number, spec in enumerate(data.dataset)
    ]


def _with_own_weights(config: TrainConfig, data: DataConfig) -> TrainConfig:
    """With the weights and epochs that entries of --dataset carry themselves. Raises ConfigError where a flag says them
    too.
    """
    weights, epochs = own_mixture(data.dataset)
    for flag, own, said in (("mixture", weights, config.mixture), ("mixture_epochs", epochs, config.mixture_epochs)):
        if own and said:
            raise ConfigError(
                f"{flag} = {' '.join(said)} and the entries of dataset say {' '.join(own)}; say it in one place"
            )
    return replace(config, mixture=weights or config.mixture, mixture_epochs=epochs or config.mixture_epochs)


def _check_mixture(config: TrainConfig, data: DataConfig) -> None:
    """Raises ConfigError before hours of preparation, not after them. The names of data from elsewhere are not known
    yet.
    """
    wish, _ = wish_of(config)
    if wish and all(Path(place).expanduser().exists() for place in (data.tokenizer_path, *map(str, data.dataset))):
        from moai.pretraining.assembly import find

        wish.check_names([given.name for given in find(data).inputs])


def _stage(config: TrainConfig, number: int) -> TrainConfig:
    run = Path(config.output_dir)
    staged = replace(config, sequential=False, output_dir=str(run / f"stage_{number}"))
    if number == 0:
        return staged
    before = str(run / f"stage_{number - 1}" / FINAL)
    return replace(
        staged, pretrained_model=before, model_config=None, model_size=None, warmup_steps=config.stage_warmup_steps
    )


def check_places(config: TrainConfig, places: Sequence[TrainConfig], *, restarted: bool = False) -> None:
    """Refuse early, before hours of preparation, a place that holds another run or its model, or none to go on with.
    Raises ConfigError.
    """
    _check_model(config, restarted=restarted)
    if not config.sequential:
        checkpoints.check_place(config.resume_from_checkpoint, Path(config.output_dir), restarted=restarted)
        return
    begun = [place.output_dir for place in places if _is_done(place) or checkpoints.numbered(Path(place.output_dir))]
    if restarted or bool(begun) == (config.resume_from_checkpoint == AUTO):
        return
    if begun:
        raise ConfigError(
            f"--output_dir {config.output_dir}: holds a run already (newest: {Path(begun[-1]).name}); go on with it by "
            f"--resume_from_checkpoint auto, or name another --output_dir"
        )
    raise ConfigError(
        f"--resume_from_checkpoint auto: {config.output_dir} has no stage with a checkpoint; the same command without "
        f"it starts the run that makes one"
    )


def _check_model(config: TrainConfig, *, restarted: bool) -> None:
    run = Path(config.output_dir)
    begins = not restarted and config.resume_from_checkpoint != AUTO and not checkpoints.numbered(run)
    # A link is a stage's.
    if begins and not (run / FINAL).is_symlink() and checkpoints.weights_problem(run / FINAL) is None:
        raise ConfigError(
            f"--output_dir {run}: holds a {FINAL} already, and no checkpoint to go on from; move it away, or name "
            f"another --output_dir"
        )


def remaining(config: TrainConfig, stages: Sequence[Stage], *, restarted: bool = False) -> Iterator[Stage]:
    """The stages that are still to be trained; the one that was begun goes on from its newest checkpoint."""
    resuming = restarted or config.resume_from_checkpoint == AUTO
    for stage in stages:
        if config.sequential and resuming:
            if _is_done(stage.config):
                _check_done(stage)
                logger.info("%s is finished and stays as it is", stage.config.output_dir)
                continue
            begun = checkpoints.numbered(Path(stage.config.output_dir))
            stage = replace(stage, config=replace(stage.config, resume_from_checkpoint=AUTO if begun else None))
        yield stage


def _check_done(stage: Stage) -> None:
    """Raises ConfigError where a finished stage was trained on other data: the stages behind it would go on from what
    nobody asked for.
    """
    place = Path(stage.config.output_dir)
    try:
        digest = json.loads(read_regular(place / "summary.json", MOST_BYTES))["content_digest"]
    except (OSError, ValueError, KeyError, TypeError):
        return  # nothing to compare with; the model is whole
    if digest != stage.prepared.content_digest:
        refused = ConfigError(
            f"{place}: was trained on data {digest[:16]}, this run has {stage.prepared.content_digest[:16]} there "
            f"({', '.join(map(str, stage.data.dataset))}); resume with the same --dataset in the same order, or name "
            f"another --output_dir"
        )
        refused.add_note(group.SHARED)
        raise refused


def link(stage: Stage) -> None:
    """Give the model of a finished stage its other names: `checkpoint` beside it, and `final_model` of the whole run so
    far.
    """
    if stage.run is None:
        return
    place = Path(stage.config.output_dir)
    point(place / "checkpoint", FINAL)  # the guides' name
    point(stage.run / FINAL, f"{place.name}/{FINAL}")


def _is_done(stage: TrainConfig) -> bool:
    return checkpoints.weights_problem(Path(stage.output_dir) / FINAL) is None
