"""Batches in the order of training, for a loop that is not moai's.

Batches(order, batch_size=4, rank=1, world_size=2)      # rows 4-7, 12-15, ...: the ranks take turns
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from itertools import count
from typing import Any

import numpy as np

from moai.core.errors import ConfigError
from moai.prepared.manifest import Prepared
from moai.prepared.rows import PackedRows
from moai.training.data import PackedCollator
from moai.training.mixture import Mixture, MixtureFlags
from moai.training.order import Order, sources_of


@dataclass(frozen=True)
class Batches:
    """torch's batch sampler: the numbers of the rows of this rank, batch by batch, from `position` on."""

    order: Order
    _: KW_ONLY
    batch_size: int
    rank: int = 0
    world_size: int = 1
    position: int = 0
    end: int | None = None
    """The first position that is not taken any more; None without end."""

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.position < 0:
            raise ConfigError(
                f"batch_size = {self.batch_size}, position = {self.position}: a batch has a row at least, and no "
                f"position is below 0"
            )
        if not 0 <= self.rank < self.world_size:
            raise ConfigError(
                f"rank = {self.rank}, world_size = {self.world_size}: ranks count from 0 up to world_size - 1"
            )

    def __iter__(self) -> Iterator[list[int]]:
        for number in range(len(self)) if self.end is not None else count():
            first = self.position + number * self._step + self.rank * self.batch_size
            yield self.order.rows_at(np.arange(first, first + self.batch_size)).tolist()

    def __len__(self) -> int:
        """Batches of this rank, as many as of every other. Raises TypeError where they have no end."""
        if self.end is None:
            raise TypeError("batches without end have no number")
        return max(0, self.end - self.position) // self._step

    @property
    def _step(self) -> int:
        return self.batch_size * self.world_size


def order_of(
    prepared: Prepared,
    *,
    epochs: float | None,
    seed: int,
    shuffle_window: int,
    mixture: Sequence[str],
    mixture_by: str,
    mixture_epochs: Sequence[str],
) -> tuple[Order, int | None]:
    """The order in which `train.py` takes the rows, and where it ends. Raises ConfigError."""
    if epochs is not None and not 0 < epochs < math.inf:
        raise ConfigError(f"epochs = {epochs}: must be above 0, or None for no end")
    if mixture_by not in ("tokens", "examples"):
        raise ConfigError(f"mixture_by = {mixture_by!r}: choose tokens or examples")
    sources = sources_of(prepared.manifest["content"]["shards"])
    rows = sum(source.rows for source in sources)
    end = None if epochs is None else math.floor(epochs * rows)
    mixture, mixture_epochs = ((words,) if isinstance(words, str) else words for words in (mixture, mixture_epochs))
    wish = MixtureFlags.parse(mixture=mixture, stages=(), epochs=mixture_epochs, by=mixture_by, temperature=1.0)
    order = Order(sources, seed, shuffle_window, Mixture.of(wish.resolve(sources, end or rows), seed) if wish else None)
    ends = [one for one in (end, order.total) if one is not None]
    return order, min(ends) if ends else None


def loader(prepared: Prepared, batches: Batches, *, num_workers: int, pad_to: int | None) -> Any:
    """torch's DataLoader of collated batches."""
    from torch.utils.data import DataLoader

    collator = PackedCollator(pad_id=prepared.content["tokenizer"]["eos_id"], pad_to=pad_to, beside=prepared.beside)
    sampler: Any = batches
    return DataLoader(PackedRows.of(prepared), batch_sampler=sampler, collate_fn=collator, num_workers=num_workers)  # type: ignore[arg-type]
