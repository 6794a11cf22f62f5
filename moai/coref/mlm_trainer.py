"""The transformers Trainer as masked names need it: logits where there is a label, rows of like length together.

A row of the corpus asks for some three of a thousand tokens. Logits of them all would take 16 rows x 1,441 tokens x
130,000 pieces x 4 bytes = 12 GB for a batch of kf-deberta-base; of the labelled ones they take 25 MB.
"""

from __future__ import annotations

import json
import logging
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moai.training.checkpoints import numbered, weights_problem

if TYPE_CHECKING:
    import torch
    from transformers import Trainer
else:
    Trainer = object

logger = logging.getLogger(__name__)

_POOL = 50
"""Batches among which rows are sorted by their length: enough for little padding, few enough for a new order every
time.
"""


def logits_at(model: Any, batch: dict[str, Any], wanted: torch.Tensor) -> torch.Tensor:
    """(number of `wanted` places, vocabulary): the head's logits there and nowhere else, row by row. `wanted` is a mask
    of the shape of `input_ids`.
    """
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    if not hasattr(getattr(model, "module", model), "base_model"):
        every: torch.Tensor = model(**inputs).logits
        return every[wanted]
    with _head_at(model, wanted):
        logits: torch.Tensor = model(**inputs).logits
    return logits[0]


@contextmanager
def _head_at(model: Any, wanted: torch.Tensor) -> Iterator[None]:
    """The model's head sees the hidden states of these places only, as one row. Every head of a masked language model
    looks at one place at a time, so that its logits are the same.
    """

    def narrow(module: Any, given: Any, output: Any) -> Any:
        hidden = output[0][wanted].unsqueeze(0)
        if isinstance(output, tuple):
            return (hidden, *output[1:])
        output["last_hidden_state"] = hidden
        return output

    hook = getattr(model, "module", model).base_model.register_forward_hook(narrow)
    try:
        yield
    finally:
        hook.remove()


class LikeLengths:
    """Row numbers in a new order every epoch, so that rows of a batch are about as long: chance decides which _POOL
    batches' rows are sorted among each other, and then where each batch stands. The same order in every rank, and after
    a resume.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = np.asarray(lengths), batch_size, seed, 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        random = np.random.default_rng((self.seed, self.epoch))
        order = random.permutation(len(self.lengths))
        pool = self.batch_size * _POOL
        parts = [order[at : at + pool] for at in range(0, len(order), pool)]
        order = np.concatenate([part[np.argsort(-self.lengths[part], kind="stable")] for part in parts])
        whole = len(order) // self.batch_size * self.batch_size
        batches = order[:whole].reshape(-1, self.batch_size)
        yield from np.concatenate((random.permutation(batches).ravel(), order[whole:])).tolist()


class NamesTrainer(Trainer):
    """`lengths` are those of the rows to train on."""

    def __init__(self, *, lengths: Sequence[int], **others: Any) -> None:
        self._lengths = lengths
        super().__init__(**others)
        self.model_accepts_loss_kwargs = True  # the loss below is divided by the labels of a whole optimizer step

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        size = self.args.train_batch_size * self.args.world_size  # a step of all ranks
        return LikeLengths(self._lengths, size, self.args.seed)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean -log p of a labelled token over the optimizer step, of all ranks together."""
        from torch.nn.functional import cross_entropy

        from moai.coref.samples import IGNORED

        labels = inputs["labels"]
        wanted = labels != IGNORED
        loss = cross_entropy(logits_at(model, inputs, wanted).float(), labels[wanted], reduction="sum")
        if num_items_in_batch is None:
            loss = loss / wanted.sum().clamp(min=1)
        else:
            loss = loss / num_items_in_batch * (self.accelerator.num_processes if self._over_ranks else 1)
        return (loss, {}) if return_outputs else loss

    @property
    def _over_ranks(self) -> bool:
        return bool(self.args.average_tokens_across_devices)


def names_trainer(**options: Any) -> NamesTrainer:
    """A NamesTrainer on transformers' Trainer, which is loaded now; `options` are those of both."""
    import transformers

    joined: type[NamesTrainer] = type("NamesTrainer", (NamesTrainer, transformers.Trainer), {})
    return joined(**options)


def newest_whole(output: Path) -> Path | None:
    """The newest checkpoint that was written to its end; newer ones that were not are named and left alone."""
    for path in numbered(output):
        problem = weights_problem(path) or _problem(path)
        if problem is None:
            return path
        logger.warning("%s: passed over, it is not whole: %s", path, problem)
    return None


def _problem(checkpoint: Path) -> str | None:
    try:
        json.loads((checkpoint / "trainer_state.json").read_bytes())  # written last
        for name in ("optimizer.pt", "scheduler.pt"):
            with open(checkpoint / name, "rb") as file:
                zipfile.ZipFile(file).close()  # the directory of a zip archive is at its end: a cut one has none
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        return f"{type(error).__name__}: {error}"
    return None
