"""transformers' Trainer with our order of rows, our log lines and our record in every checkpoint.

The classes here are the first halves of what `packed_trainer` joins with transformers' own: that library is loaded only
then.
"""

from __future__ import annotations

import logging
import math
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from moai.core.distributed import Ranks
from moai.core.errors import ConfigError, DamagedError, MoaiError, StorageError
from moai.core.failpoints import failpoint
from moai.engine.schema import Column
from moai.training import checkpoints
from moai.training import process_group as group
from moai.training.callback import Clock, RunCallback
from moai.training.data import IGNORE
from moai.training.evaluate import Evaluation, log_figures
from moai.training.order import Sampler
from moai.training.portable import make_portable
from moai.training.record import Files, digests
from moai.training.steps import Plan
from moai.training.stop import SaveAndStop, Word, obey_own_rank

if TYPE_CHECKING:
    from transformers import Trainer
else:
    Trainer = object

logger = logging.getLogger(__name__)


def packed_trainer(**options: Any) -> PackedTrainer:
    """A PackedTrainer on transformers' Trainer; `options` are those of both."""
    import transformers

    joined: type[PackedTrainer] = type("PackedTrainer", (PackedTrainer, transformers.Trainer), {})
    return joined(**options)


class PackedTrainer(Trainer):
    """Trains on packed rows in the order of `plan`, counts trained tokens over all ranks, and saves the plan's record
    in the `keep` newest checkpoints.
    """

    def __init__(
        self,
        *,
        plan: Plan,
        keep: int,
        here: Ranks,
        word: Word,
        evaluation: Evaluation | None = None,
        beside: Sequence[Column] = (),
        **others: Any,
    ) -> None:
        self.plan = plan
        self._beside = {column.name for column in beside}
        self.evaluation = evaluation
        self.here = here
        self.clock = Clock(plan.record.tokens_seen)
        super().__init__(**others)
        import torch
        from transformers import PrinterCallback, TrainerCallback

        self._own_tokens = torch.zeros((), dtype=torch.int64, device=self.args.device)
        self.remove_callback(PrinterCallback)
        saving, running = (type(cls.__name__, (cls, TrainerCallback), {}) for cls in (SaveAndStop, RunCallback))
        self.add_callback(saving(word, group.Question(here, self.args.device)))  # first: a step that is saved is logged
        self.add_callback(running(plan, self.clock, keep, evaluation))

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return Sampler(self.plan.order, self.plan.steps.first_position)

    def get_train_dataloader(self) -> Any:
        loader = super().get_train_dataloader()
        reader: Any = getattr(loader, "base_dataloader", loader)  # accelerate's wrapper reads through this one
        if reader.num_workers:
            reader.worker_init_fn = partial(start_reader, then=reader.worker_init_fn)
        return loader

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """Also counts the wait for batches, and the targets of this rank, on the device: nothing waits for that number
        here.

        A step may have no target at all, of one row that is a single token: its loss is the sum of none over one, not
        over none.
        """
        import torch

        batches, num_items = super().get_batch_samples(self.clock.waiting(epoch_iterator), num_batches, device)
        if isinstance(num_items, torch.Tensor):
            num_items = num_items.clamp(min=1)
        for batch in batches:
            self._own_tokens += (batch["labels"] != IGNORE).sum().to(self._own_tokens.device)
        return batches, num_items

    def training_step(self, model: Any, inputs: dict[str, Any], *more: Any, **named: Any) -> Any:
        """The step on what the model takes: columns that travel beside the tokens are taken off."""
        return super().training_step(
            model, {name: value for name, value in inputs.items() if name not in self._beside}, *more, **named
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds tokens_per_second, tokens_seen, data_wait and memory_gb to each line of training, for whatever
        --report_to names too.

        Raises MoaiError in every rank when the loss is no number any more: nothing after it could be used.
        """
        if "loss" in logs:
            logs |= self.clock.tick(*self._gathered())
            if not math.isfinite(logs["loss"]):
                raise MoaiError(
                    f"the loss is {logs['loss']} at step {self.state.global_step}: lower --learning_rate or lengthen "
                    f"--warmup_steps, then --resume_from_checkpoint auto goes on from the last checkpoint in "
                    f"{self.args.output_dir}"
                )
        super().log(logs, start_time)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Our own measures on what was held out, where transformers evaluates. A collective."""
        assert self.evaluation is not None, "RunCallback asks for an evaluation only where there is one"
        with self.clock.paused():
            scores = self.evaluation(self.model_wrapped, self.here, self.args.device, self.accelerator.autocast)
        figures = log_figures(scores)
        self.log(figures)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, figures)
        return figures

    def _run_epoch(self, *positional: Any, **named: Any) -> None:
        """Not when a resumed run has all its steps: transformers looks at their number after a step only."""
        untyped: Any = super()
        if self.state.global_step < self.state.max_steps:
            untyped._run_epoch(*positional, **named)
        else:
            self.control.should_training_stop = True

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Raises StorageError in every rank when one cannot write its part, and leaves nothing behind that looks like a
        checkpoint.
        """
        place = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        tokens, _ = self._gathered()  # a collective: none may come after the first file, which may fail in one rank
        group.together(partial(self._check_room, place), self.here)  # FSDP's own gathers do come after it

        def save() -> Files:
            with checkpoints.storing(place):
                super(PackedTrainer, self)._save_checkpoint(model, trial)
                return digests(place, self.here.rank)

        def seal() -> None:
            if self.args.should_save:
                failpoint("checkpoint.record")
                with checkpoints.storing(place):
                    record.save(place, files)

        record = replace(
            self.plan.record, position=self.plan.steps.position(self.state.global_step), tokens_seen=tokens
        )
        try:
            files = {name: digest for one in group.together(save, self.here) for name, digest in one.items()}
            group.together(seal, self.here)
            failpoint("checkpoint.complete")
        except StorageError:
            if self.args.should_save:
                shutil.rmtree(place, ignore_errors=True)
            raise

    def _check_room(self, place: Path) -> None:
        """Of a model that FSDP divides, whole weights are written twice; DeepSpeed's ranks each write their own."""
        if self.args.should_save and not self.is_deepspeed_enabled:
            untyped: Any = self
            moments = (value for state in untyped.optimizer.state.values() for value in state.values())
            tensors = [value for value in moments if hasattr(value, "element_size")]
            tensors += list(untyped.model.parameters()) * (2 if self.is_fsdp_enabled else 1)
            with checkpoints.storing(place):
                checkpoints.check_room(place, sum(tensor.numel() * tensor.element_size() for tensor in tensors))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if _internal_call and self.args.should_save:
            failpoint("checkpoint.model")
        super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Of weights that were gathered from shards, tied ones are two tensors, where one is enough. transformers lets
        every rank write the tokenizer's files; here one does, so that nobody writes them after `make_portable`.
        """
        if not self.args.should_save:
            return
        if state_dict:
            tied = set(getattr(self.model, "all_tied_weights_keys", None) or ())
            state_dict = {name: tensor for name, tensor in state_dict.items() if name not in tied}
        super()._save(output_dir, state_dict)
        make_portable(Path(output_dir or str(self.args.output_dir)))

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
        """Raises ConfigError when it is of another model, or of a run that divided its model and this one does not, or
        the other way round.
        """
        wrote = checkpoints.written_by(Path(resume_from_checkpoint))
        reads = checkpoints.FSDP if self.is_fsdp_enabled else checkpoints.PLAIN
        if wrote != reads:
            raise ConfigError(
                f"{resume_from_checkpoint}: its optimizer was saved by {wrote}, this run is one of {reads}; resume as "
                f"it was launched, or take its weights with a new optimizer: --pretrained_model "
                f"{resume_from_checkpoint} and a new --output_dir"
            )
        try:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        except RuntimeError as error:  # load_state_dict's, when shapes differ
            raise ConfigError(
                f"{resume_from_checkpoint}: {' '.join(str(error).split())[:200]}; its weights are another model's, "
                f"resume with the --model_config it was made with"
            ) from error

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with checkpoints.loading(checkpoint, "optimizer or scheduler"):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with checkpoints.loading(checkpoint, "random state"):
            super()._load_rng_state(checkpoint)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Weights that are missing from a checkpoint are an error, unless they are tied to one that is there."""
        tied = set(getattr(self.model, "all_tied_weights_keys", None) or ())
        missing = [name for name in load_result.missing_keys if name not in tied]
        if missing or load_result.unexpected_keys:
            names = ", ".join([*missing, *load_result.unexpected_keys][:4])
            raise DamagedError(
                f"the checkpoint's weights are not this model's: {len(missing)} missing, "
                f"{len(load_result.unexpected_keys)} unexpected ({names}); resume with the --model_config it "
                f"was made with"
            )

    def _gathered(self) -> tuple[int, float]:
        """Trained tokens of all ranks since the run began, and the longest wait for batches since the line before, in
        seconds; a collective.
        """
        import torch

        waited = torch.tensor(int(self.clock.waited * 1e6), device=self._own_tokens.device)
        found = self.accelerator.gather(torch.stack([self._own_tokens, waited])).reshape(-1, 2)
        return self.plan.record.tokens_seen + int(found[:, 0].sum()), int(found[:, 1].max()) / 1e6


def start_reader(worker: int, *, then: Callable[[int], None]) -> None:
    """In a process that reads rows: it ends with its rank and not before, and quietly, in the middle of handing over a
    batch too.

    multiprocessing's thread for that prints a traceback otherwise, one for every process of every rank.
    """

    def say(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not isinstance(error, ConnectionError | EOFError):
            sys.__excepthook__(kind, error, trace)

    obey_own_rank()
    sys.excepthook = say
    then(worker)
