"""How well a model predicts rows it was not trained on: loss, perplexity and bits per byte, of every source and of all.

    scores = evaluate(model, HeldOut.of(prepared, limit=1000), collator, bytes_of, here)
    scores["web"].bits_per_byte

    loss           -ln p, the mean over all predicted tokens: every token but the first of each document, as in training
    perplexity     e to the loss
    bits_per_byte  the sum of -log2 p over the UTF-8 bytes of the predicted text. It does not depend on how a tokenizer
                   cuts text, so models with different tokenizers compare. The end of a document is predicted and
                   is no text: its loss counts, and it has no bytes.

Rows are taken in the order in which they lie on disk, in batches that do not depend on the number of ranks, each of one
source. No random number is drawn, and no process is started.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np

from moai.core.distributed import Ranks
from moai.core.progress import Waiting
from moai.prepared.manifest import Prepared
from moai.prepared.rows import PackedRows
from moai.training.data import IGNORE
from moai.training.token_bytes import TokenBytes

ALL = "all sources"
"""The name under which all sources together are reported."""
_PART = 2048
"""Positions whose logits are 32-bit at once: 1.2 GB for 150,000 ids."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """Sums over predicted tokens, and what follows from them. `nll` is in nats."""

    rows: int
    tokens: int
    text_bytes: int
    nll: float

    @property
    def loss(self) -> float:
        return self.nll / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float:
        return self.nll / math.log(2) / self.text_bytes if self.text_bytes else math.nan

    def figures(self) -> dict[str, float | None]:
        """For JSON: without a predicted token there is no loss, and none is no number there."""
        names = ("rows", "tokens", "text_bytes", "nll", "loss", "perplexity", "bits_per_byte")
        return {name: value if math.isfinite(value := getattr(self, name)) else None for name in names}


@dataclass(frozen=True)
class HeldOut:
    """Rows of a prepared directory to be scored: of each source the first `limit`, by their numbers."""

    rows: PackedRows
    sources: dict[str, tuple[int, ...]]

    @classmethod
    def of(cls, prepared: Prepared, *, limit: int | None = None) -> HeldOut:
        found: dict[str, list[int]] = {}
        first = 0
        for shard in prepared.content["shards"]:
            numbers = found.setdefault(shard["source"], [])
            room = shard["rows"] if limit is None else min(shard["rows"], limit - len(numbers))
            numbers += range(first, first + room)
            first += shard["rows"]
        return cls(PackedRows.of(prepared), {name: tuple(numbers) for name, numbers in found.items() if numbers})

    def batches(self, size: int) -> list[tuple[str, tuple[int, ...]]]:
        return [
            (name, numbers[at : at + size])
            for name, numbers in self.sources.items()
            for at in range(0, len(numbers), size)
        ]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What is evaluated in the middle of training, and how often: every `every` steps, or without it where a checkpoint
    is saved; always at the end.
    """

    held_out: HeldOut
    collator: Callable[..., dict[str, Any]]
    bytes_of: TokenBytes
    batch_size: int
    every: int | None = None

    def __call__(
        self, model: Any, here: Ranks, device: Any, autocast: Callable[[], AbstractContextManager[Any]]
    ) -> dict[str, Score]:
        how: dict[str, Any] = {"batch_size": self.batch_size, "device": device, "autocast": autocast}
        return evaluate(model, self.held_out, self.collator, self.bytes_of, here, **how)


def evaluate(
    model: Any, held_out: HeldOut, collator: Callable[..., dict[str, Any]], bytes_of: TokenBytes, here: Ranks, *,
    batch_size: int, device: Any, autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> dict[str, Score]:  # fmt: skip
    """The score of each source, then of all. A collective: every rank calls it with the same rows, and gets the same
    scores.
    """
    import torch

    names = list(held_out.sources)
    sums = torch.zeros(len(names), 4, dtype=torch.float64)
    training = model.training
    model.eval()
    batches = held_out.batches(batch_size)
    try:
        with torch.no_grad(), autocast(), Waiting("Evaluating", total=len(batches), unit="batches") as waiting:
            for name, numbers, counts in _share(batches, here):
                batch = collator(held_out.rows.__getitems__(numbers))
                predicted = batch["labels"].numpy() != IGNORE
                moved = {key: value.to(device) if hasattr(value, "to") else value for key, value in batch.items()}
                nll = _nll(model, moved)
                if counts:
                    text_bytes = bytes_of(batch["input_ids"].numpy(), predicted)
                    found = [len(numbers), int(predicted.sum()), text_bytes, nll]
                    sums[names.index(name)] += torch.tensor(found, dtype=torch.float64)
                waiting.add(here.world_size)
    finally:
        model.train(training)
    return _scores(names, _total(sums, here, device).numpy())


def log_figures(scores: dict[str, Score]) -> dict[str, float]:
    """As they are logged: `eval_loss`, `eval_bits_per_byte`, and `eval_<source>_...` where there are several
    sources.
    """
    several = len(scores) > 2
    return {
        f"eval_{'' if name == ALL else f'{name}_'}{figure}": round(getattr(score, figure), 6)
        for name, score in scores.items()
        if several or name == ALL
        for figure in ("loss", "perplexity", "bits_per_byte")
    }


def lines(scores: dict[str, Score]) -> Iterator[str]:
    """A table."""
    width = max(map(len, [*scores, "source"]))
    yield (
        f"{'source':{width}}  {'rows':>9}  {'tokens':>13}  {'text bytes':>13}  {'loss':>8}  {'perplexity':>10}  "
        f"{'bits/byte':>9}"
    )
    for name, score in scores.items():
        yield (
            f"{name:{width}}  {score.rows:>9,}  {score.tokens:>13,}  {score.text_bytes:>13,}  {score.loss:>8.4f}  "
            f"{score.perplexity:>10.4g}  {score.bits_per_byte:>9.4f}"
        )


def _share(batches: list[tuple[str, tuple[int, ...]]], here: Ranks) -> Iterator[tuple[str, tuple[int, ...], bool]]:
    """Every world_size-th batch, and as many for each rank: the forward of a model in pieces is a collective. What is
    over does not count.
    """
    for at in range(0, len(batches), here.world_size):
        number = at + here.rank
        yield *batches[min(number, len(batches) - 1)], number < len(batches)


def _nll(model: Any, batch: dict[str, Any]) -> float:
    """The sum over all targets of a batch. Part after part, so that 32-bit logits of a batch are never held beside
    those of the model.
    """
    import torch
    from torch.nn.functional import cross_entropy

    labels = batch.pop("labels")
    logits = model(**batch, use_cache=False).logits
    with torch.autocast(logits.device.type, enabled=False):
        parts = [
            cross_entropy(part.float(), targets, ignore_index=IGNORE, reduction="none").double().sum()
            for row, wanted in zip(logits, labels)
            for part, targets in zip(row[:-1].split(_PART), wanted[1:].split(_PART))
        ]
    return float(torch.stack(parts).sum())


def _total(sums: Any, here: Ranks, device: Any) -> Any:
    if here.world_size == 1:
        return sums
    from torch.distributed import all_reduce

    there = sums.to(device)
    all_reduce(there)
    return there.cpu()


def _scores(names: list[str], sums: Any) -> dict[str, Score]:
    return {
        name: Score(rows=int(rows), tokens=int(tokens), text_bytes=int(text_bytes), nll=float(nll))
        for name, (rows, tokens, text_bytes, nll) in zip([*names, ALL], [*sums, np.sum(sums, axis=0)])
    }
