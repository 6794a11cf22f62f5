"""How a run cuts its order into optimizer steps: from which row on, how many, of how many rows.

plan = plan_run(prepared.manifest, config, here, restarted=False)        # in every rank; rank 0 chooses the checkpoint
plan.steps.position(120)                                                 # rows trained on at the end of step 120
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moai.core.distributed import Ranks
from moai.core.errors import ConfigError
from moai.training import checkpoints
from moai.training import process_group as group
from moai.training.arguments import TrainConfig
from moai.training.mixture import Mixture, MixtureFlags, Shares
from moai.training.order import Order, Source, sources_of
from moai.training.record import Record

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Steps:
    """A run from its first step, or from step `first` at which it is resumed."""

    rows_per_step: int
    last: int
    first: int = 0
    first_position: int = 0
    """Rows that were trained on up to step `first`, over all ranks and since the run began."""

    def position(self, step: int) -> int:
        """Rows trained on at the end of this step."""
        return self.first_position + (step - self.first) * self.rows_per_step


@dataclass(frozen=True)
class Plan:
    """The order of a run, the steps that cut it, what its checkpoints record of both, and the checkpoint it goes on
    from.
    """

    order: Order
    steps: Steps
    record: Record
    resumed_from: Path | None


def plan_run(manifest: Mapping[str, Any], config: TrainConfig, here: Ranks, *, restarted: bool) -> Plan:
    """Raises ConfigError where the data does not suffice for a step, or a checkpoint is of another order."""
    sources = sources_of(manifest["content"]["shards"])
    size = config.batch_size * config.gradient_accumulation_steps * here.world_size
    wish, asked = wish_of(config)
    shares = wish.resolve(sources, _planned_rows(config, sources, size)) if wish else None
    order = _order(config, sources, shares)
    record = Record(
        content_digest=manifest["content_digest"], rows=order.rows, world_size=here.world_size, rows_per_step=size,
        order={**order.identity(), "asked": asked, "shares": shares.to_json() if shares else None},
    )  # fmt: skip
    steps = _steps(config, order, size)
    asked_for, place = config.resume_from_checkpoint, Path(config.output_dir)
    chosen = group.from_rank_0(lambda: checkpoints.choose(asked_for, place, record, restarted=restarted), here)
    if chosen is not None:
        found, step = Record.load(chosen), checkpoints.global_step(chosen)
        if shares:  # a share of a run is one of the run that began, whatever became of its length
            shares = Shares.from_json(found.order["shares"])
            order = _order(config, sources, shares)
        record = replace(record, order=found.order, tokens_seen=found.tokens_seen)
        steps = _steps(config, order, size, first=step, first_position=found.position)
        trained = f"{found.position:,} rows are trained on at step {step}{_recut(found, record)}"
        logger.info("Resuming from %s: %s", chosen, trained)
    if steps.last == steps.first:
        logger.info("Nothing is left to train: step %d is the last of this run", steps.last)
    names = ", ".join(f"{source.name} {source.rows:,}" for source in sources)
    epoch = f"{order.rows:,} rows in an epoch ({names})"
    logger.info("Steps: %s of %d rows each; %s", f"{steps.last:,}", size, epoch)
    for line in shares.lines() if shares else ():
        logger.info("Mixture: %s", line)
    if config.warmup_steps >= max(1, steps.last) and here.rank == 0:
        logger.warning(
            "warmup_steps %d: this run has %d steps, so the learning rate never reaches %g",
            config.warmup_steps,
            steps.last,
            config.learning_rate,
        )
    return Plan(order, steps, record, chosen)


def wish_of(config: TrainConfig) -> tuple[MixtureFlags | None, dict[str, Any]]:
    """What is asked for, and the flags that ask for it as a checkpoint keeps them. Raises ConfigError."""
    names = ("mixture", "mixture_stages", "mixture_epochs", "mixture_by", "mixture_temperature")
    values = {name: getattr(config, name) for name in names}
    flags: dict[str, Any] = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    return MixtureFlags.parse(**{name.removeprefix("mixture_"): value for name, value in flags.items()}), flags


def _order(config: TrainConfig, sources: tuple[Source, ...], shares: Shares | None) -> Order:
    return Order(sources, config.seed, config.shuffle_window, Mixture.of(shares, config.seed) if shares else None)


def _planned_rows(config: TrainConfig, sources: tuple[Source, ...], size: int) -> int:
    """The length of a run that begins now: what shares of it are shares of."""
    if config.max_steps > 0:
        return config.max_steps * size
    return math.floor(config.num_epochs * sum(source.rows for source in sources))


def _steps(config: TrainConfig, order: Order, size: int, *, first: int = 0, first_position: int = 0) -> Steps:
    """`max_steps` as asked for; or as many steps as are whole in the epochs, or in what is left of them."""
    end = math.inf if order.total is None else order.total
    wanted = (
        first_position + (config.max_steps - first) * size
        if config.max_steps > 0
        else math.floor(config.num_epochs * order.rows)
    )
    rows = int(min(wanted, end))
    last = first + max(0, rows - first_position) // size
    if not last:
        raise ConfigError(
            f"the run has {rows} rows, one step takes {size} (batch_size {config.batch_size} x "
            f"gradient_accumulation_steps {config.gradient_accumulation_steps} x "
            f"{size // config.batch_size // config.gradient_accumulation_steps} ranks): lower one of them, shorten "
            f"--seq_len, or add data"
        )
    if config.max_steps > 0 and wanted > end:
        logger.warning(
            "max_steps %d: step %d is the last, then the sources of the mixture are used up (--mixture_epochs)",
            config.max_steps,
            last,
        )
    return Steps(rows_per_step=size, last=last, first=first, first_position=first_position)


def _recut(found: Record, record: Record) -> str:
    if (found.world_size, found.rows_per_step) == (record.world_size, record.rows_per_step):
        return ""
    return (
        f"; {found.world_size} ranks and {found.rows_per_step} rows a step until here, {record.world_size} and "
        f"{record.rows_per_step} from here on"
    )
