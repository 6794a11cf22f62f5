"""Masked language modelling on samples that carry their labels: batches, likelihood of a span, and filling several
masks.

    collate = PadBatch(pad_id=0)                     # pads to the longest row of the batch, never to seq_len
    scores = span_scores(model, batches)             # -log p of the masked name; is each token likeliest
    filled = fill(model, batch)                      # names of several tokens: the surest mask first

torch is imported in the functions, since whoever only wants flags should not pay for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moai.coref.samples import IGNORED

if TYPE_CHECKING:
    import torch

Sample = Mapping[str, Any]
"""A row of the corpus: at least `input_ids` and `labels`."""
_MULTIPLE = 8


@dataclass(frozen=True, kw_only=True)
class PadBatch:
    """Rows -> tensors as long as the longest of them, rounded up to 8: on the corpus of 2,048 a third of what padding
    to seq_len would take.
    """

    pad_id: int

    def __call__(self, rows: Sequence[Sample]) -> dict[str, torch.Tensor]:
        import torch

        length = -(-max(len(row["input_ids"]) for row in rows) // _MULTIPLE) * _MULTIPLE
        ids, labels = np.full((len(rows), length), self.pad_id), np.full((len(rows), length), IGNORED)
        attention = np.zeros((len(rows), length), np.int64)
        for place, row in enumerate(rows):
            size = len(row["input_ids"])
            ids[place, :size], labels[place, :size], attention[place, :size] = row["input_ids"], row["labels"], 1
        return {
            "input_ids": torch.from_numpy(ids),
            "attention_mask": torch.from_numpy(attention),
            "labels": torch.from_numpy(labels),
        }


@dataclass(kw_only=True)
class RandomMasking:
    """What the prior program trained with: 15 % of the tokens, of these 80 % masked, 10 % another token, 10 % as they
    are.

    Special tokens are never chosen, so a mask that was in the text already is never asked for.
    """

    pad: PadBatch
    mask_id: int
    special_ids: tuple[int, ...]
    vocab_size: int
    seed: int
    probability: float = 0.15

    def __post_init__(self) -> None:
        self._random = np.random.default_rng(self.seed)

    def __call__(self, rows: Sequence[Sample]) -> dict[str, torch.Tensor]:
        return self.pad([self._masked(np.array(row["input_ids"])) for row in rows])

    def _masked(self, ids: Any) -> dict[str, Any]:
        chosen = (self._random.random(len(ids)) < self.probability) & ~np.isin(ids, self.special_ids)
        fate = self._random.random(len(ids))
        others = self._random.integers(0, self.vocab_size, len(ids))
        changed = np.where(chosen & (fate < 0.8), self.mask_id, np.where(chosen & (fate >= 0.9), others, ids))
        return {"input_ids": changed, "labels": np.where(chosen, ids, IGNORED)}


@dataclass(frozen=True)
class SpanScores:
    """Means over spans. `nll` is of a whole name, `nll_per_token` over tokens, in nats; `exact` fills one mask after
    another, all or nothing.
    """

    spans: int
    tokens: int
    nll: float
    nll_per_token: float
    exact: float


def span_scores(model: Any, batches: Iterable[Mapping[str, torch.Tensor]]) -> SpanScores:
    """Every masked name with all its tokens masked at once; then decoded by `fill`."""
    import torch

    spans = tokens = exact = 0
    nll = 0.0
    model.eval()
    for batch in (_to(model, batch) for batch in batches):
        labels = batch["labels"]
        asked = labels != IGNORED
        with torch.no_grad():
            logits = _logits(model, batch)[asked]
        chosen = torch.log_softmax(logits.float(), -1).gather(1, labels[asked][:, None])
        nll -= float(chosen.sum())
        spans, tokens = spans + len(labels), tokens + int(asked.sum())
        exact += int(((fill(model, batch) == labels) | ~asked).all(1).sum())
    return SpanScores(spans, tokens, nll / max(1, spans), nll / max(1, tokens), exact / max(1, spans))


def fill(model: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """`input_ids` with every asked-for position filled: in each round the surest mask of every row takes its likeliest
    token.
    """
    import torch

    batch = _to(model, batch)
    ids, open_ = batch["input_ids"].clone(), batch["labels"] != IGNORED
    rows = torch.arange(len(ids), device=ids.device)
    with torch.no_grad():
        while bool(open_.any()):
            surest, tokens = torch.softmax(_logits(model, {**batch, "input_ids": ids}).float(), -1).max(-1)
            place = surest.masked_fill(~open_, -1.0).argmax(1)
            waiting = open_.any(1)
            ids[rows[waiting], place[waiting]] = tokens[rows[waiting], place[waiting]]
            open_[rows[waiting], place[waiting]] = False
    return ids


def likeliest(model: Any, batch: Mapping[str, torch.Tensor], number: int) -> list[list[int]]:
    """The `number` likeliest tokens of each row's first asked-for position, the likeliest first."""
    import torch

    batch = _to(model, batch)
    with torch.no_grad():
        logits = _logits(model, batch)
    first = (batch["labels"] != IGNORED).int().argmax(1)
    found: list[list[int]] = logits[torch.arange(len(first)), first].topk(number).indices.tolist()
    return found


def with_one_mask(sample: Sample) -> dict[str, Any]:
    """The sample as a textual mask would stand there: one mask for the whole name, labelled with its first token."""
    asked = [place for place, label in enumerate(sample["labels"]) if label != IGNORED]
    keep = [*range(asked[0] + 1), *range(asked[-1] + 1, len(sample["input_ids"]))]
    return {
        "input_ids": [sample["input_ids"][place] for place in keep],
        "labels": [sample["labels"][place] for place in keep],
    }


def in_batches(rows: Iterable[Sample], size: int, collate: PadBatch) -> Iterator[dict[str, torch.Tensor]]:
    waiting: list[Sample] = []
    for row in rows:
        waiting.append(row)
        if len(waiting) == size:
            yield collate(waiting)
            waiting = []
    if waiting:
        yield collate(waiting)


def _logits(model: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return logits


def _to(model: Any, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.to(model.device) for name, tensor in batch.items()}
