"""transformers' Trainer with our order of rows, our log lines and our record in every checkpoint.

The classes here are the first halves of what `packed_trainer` joins with transformers' own: that library is loaded only then.
"""

from __future__ import annotations

import logging
import math
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from moai.distributed import Ranks
from moai.errors import ConfigError, DamagedError, MoaiError, StorageError
from moai.failpoints import failpoint
from moai.training import checkpoints, group
from moai.training.checkpoints import Record
from moai.training.data import IGNORE, EpochOrder
from moai.training.stop import SaveAndStop, Word, obey_own_rank

if TYPE_CHECKING:
    from transformers import Trainer, TrainerCallback
else:
    Trainer = TrainerCallback = object

logger = logging.getLogger(__name__)


def packed_trainer(**options: Any) -> PackedTrainer:
    """A PackedTrainer on transformers' Trainer; `options` are those of both."""
    import transformers

    joined: type[PackedTrainer] = type("PackedTrainer", (PackedTrainer, transformers.Trainer), {})
    return joined(**options)


class PackedTrainer(Trainer):
    """Trains on packed rows in the order of `order`, counts trained tokens over all ranks, and saves `record` in the `keep` newest checkpoints."""

    def __init__(self, *, order: EpochOrder, record: Record, keep: int, here: Ranks, word: Word, **others: Any) -> None:
        self.order = order
        self.record = record
        self.here = here
        self.clock = Clock(record.tokens_seen)
        super().__init__(**others)
        import torch
        from transformers import PrinterCallback, TrainerCallback

        self._own_tokens = torch.zeros((), dtype=torch.int64, device=self.args.device)
        self.remove_callback(PrinterCallback)
        # Before the course, which logs a step that is saved.
        self.add_callback(type("SaveAndStop", (SaveAndStop, TrainerCallback), {})(word, group.Question(here, self.args.device)))
        self.add_callback(type("Course", (_Course, TrainerCallback), {})(order, self.clock, keep))

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return self.order

    def get_train_dataloader(self) -> Any:
        loader = super().get_train_dataloader()
        reader: Any = getattr(loader, "base_dataloader", loader)  # accelerate's wrapper reads through this one
        if reader.num_workers:
            reader.worker_init_fn = partial(start_reader, then=reader.worker_init_fn)
        return loader

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """Also counts the targets of this rank, on the device: nothing waits for the number here."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        for batch in batches:
            self._own_tokens += (batch["labels"] != IGNORE).sum().to(self._own_tokens.device)
        return batches, num_items

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds tokens_per_second and tokens_seen to each line of training, for whatever --report_to names too.

        Raises MoaiError in every rank when the loss is no number any more: nothing after it could be used.
        """
        if "loss" in logs:
            logs |= self.clock.tick(self._tokens_seen())
            if not math.isfinite(logs["loss"]):
                raise MoaiError(
                    f"the loss is {logs['loss']} at step {self.state.global_step}: lower --learning_rate or lengthen --warmup_steps, "
                    f"then --resume_from_checkpoint auto goes on from the last checkpoint in {self.args.output_dir}"
                )
        super().log(logs, start_time)

    def _run_epoch(self, *positional: Any, **named: Any) -> None:
        """Not when a resumed run has all its steps: transformers looks at their number after a step only."""
        untyped: Any = super()
        if self.state.global_step < self.state.max_steps:
            untyped._run_epoch(*positional, **named)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Raises StorageError in every rank when one cannot write its part, and leaves nothing behind that looks like a checkpoint."""
        place = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        tokens = self._tokens_seen()  # a collective: none may come after the first file, which may fail in one rank

        def save() -> None:
            with checkpoints.storing(place):
                self._write_checkpoint(model, trial, tokens)

        try:
            group.together(save, self.here)
        except StorageError:
            if self.args.should_save:
                shutil.rmtree(place, ignore_errors=True)
            raise

    def _write_checkpoint(self, model: Any, trial: Any, tokens: int) -> None:
        self._saved = replace(self.record, tokens_seen=tokens)
        super()._save_checkpoint(model, trial)
        failpoint("checkpoint.complete")

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """In a checkpoint, the record comes with the weights: what is written after it is what makes it complete."""
        if not (_internal_call and output_dir and self.args.should_save):
            super().save_model(output_dir, _internal_call)
            return
        failpoint("checkpoint.model")
        super().save_model(output_dir, _internal_call)
        failpoint("checkpoint.record")
        self._saved.save(Path(output_dir))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.args.should_save:
            failpoint("checkpoint.optimizer")
        super()._save_optimizer_and_scheduler(output_dir)

    def _save_rng_state(self, output_dir: str) -> None:
        failpoint("checkpoint.random")
        super()._save_rng_state(output_dir)
        if self.args.should_save:
            failpoint("checkpoint.state")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        try:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        except RuntimeError as error:  # load_state_dict's, when shapes differ
            raise ConfigError(
                f"{resume_from_checkpoint}: {' '.join(str(error).split())[:200]}; its weights are another model's, resume with the --model_config it was made with"
            ) from error

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Weights that are missing from a checkpoint are an error, unless they are tied to one that is there."""
        tied = set(getattr(self.model, "all_tied_weights_keys", None) or ())
        missing = [name for name in load_result.missing_keys if name not in tied]
        if missing or load_result.unexpected_keys:
            names = ", ".join([*missing, *load_result.unexpected_keys][:4])
            raise DamagedError(
                f"the checkpoint's weights are not this model's: {len(missing)} missing, {len(load_result.unexpected_keys)} unexpected ({names}); resume with the --model_config it was made with"
            )

    def _tokens_seen(self) -> int:
        """Of all ranks since the run began; a collective."""
        return self.record.tokens_seen + int(self.accelerator.gather(self._own_tokens).sum())


class Clock:
    """Tokens per second between two log lines and over the run."""

    def __init__(self, tokens: int) -> None:
        self.first_tokens = self.tokens = tokens
        self.started = self.at = time.monotonic()

    def start(self) -> None:
        self.started = self.at = time.monotonic()

    def tick(self, tokens: int) -> dict[str, float]:
        now = time.monotonic()
        rate = (tokens - self.tokens) / max(now - self.at, 1e-9)
        self.tokens, self.at = tokens, now
        return {"tokens_per_second": round(rate, 1), "tokens_seen": tokens}

    @property
    def seconds(self) -> float:
        return self.at - self.started

    @property
    def tokens_per_second(self) -> float:
        return (self.tokens - self.first_tokens) / self.seconds if self.seconds > 0 else 0.0


class _Course(TrainerCallback):
    """Sets the epoch of the order, logs the last step and each that is saved, writes the log lines, keeps the newest checkpoints."""

    def __init__(self, order: EpochOrder, clock: Clock, keep: int) -> None:
        self.order, self.clock, self.keep = order, clock, keep
        self.first_step = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.first_step = state.global_step
        self.clock.start()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # From the step alone, so that a resumed run is in the same epoch: transformers hands the epoch on to some samplers only.
        self.order.epoch = state.global_step // self.order.steps

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # With the log comes the look at the loss, before weights that are no numbers become the newest checkpoint.
        if state.global_step >= state.max_steps or control.should_save:
            control.should_log = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            done = state.global_step - self.first_step
            left = (time.monotonic() - self.clock.started) / max(done, 1) * (state.max_steps - state.global_step)
            logger.info("step %d/%d  loss %.4f  lr %.3e  %s tokens/s  %s left", state.global_step, state.max_steps, logs["loss"],
                        logs.get("learning_rate", math.nan), f"{logs['tokens_per_second']:,.0f}", clock_text(left))  # fmt: skip

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if args.should_save:
            logger.info("Saved %s", Path(args.output_dir) / f"checkpoint-{state.global_step}")
            checkpoints.rotate(Path(args.output_dir), self.keep)


def start_reader(worker: int, *, then: Callable[[int], None]) -> None:
    """In a process that reads rows: it ends with its rank and not before, and quietly, in the middle of handing over a batch too.

    multiprocessing's thread for that prints a traceback otherwise, one for every process of every rank.
    """

    def say(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not isinstance(error, ConnectionError | EOFError):
            sys.__excepthook__(kind, error, trace)

    obey_own_rank()
    sys.excepthook = say
    then(worker)


def clock_text(seconds: float) -> str:
    """`3725` -> `1:02:05`, `65` -> `1:05`."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}" if whole >= 3600 else f"{whole // 60}:{whole % 60:02d}"
