"""Masked language modelling on samples that carry their labels: the corpus as rows, batches, the likelihood of a span,
and filling several masks.

    corpus = Corpus.open("./prepared_datasets/entity_coref_v2_2048")
    batches = in_batches(corpus.rows("validation"), 16, PadBatch(pad_id=0))     # as long as their longest row
    scores = span_scores(model, batches)             # -log p of the masked name; is each token likeliest
    filled = fill(model, batch)                      # names of several tokens: the surest mask first

torch is imported in the functions, since whoever only wants flags should not pay for it.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pyarrow.compute as pc

from moai.core.config import resolve
from moai.core.errors import ConfigError, DamagedError, MoaiError
from moai.core.terminal import printing
from moai.coref.manifest import read_manifest
from moai.coref.mlm_tokens import MlmTokenizer, load_mlm_tokenizer
from moai.coref.mlm_trainer import logits_at
from moai.coref.samples import IGNORED
from moai.tokenizers.load import FILES

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
Sample = Mapping[str, Any]
"""A row of the corpus: at least `input_ids` and `labels`."""
_MULTIPLE = 8


@printing()
def run(
    config: type[T], work: Callable[[T], dict[str, Any]], argv: Sequence[str], *, prog: str, description: str | None
) -> int:
    """A script: flags in, JSON out; a person's mistake is one line and an exit code, never a traceback."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        resolved = resolve([config], argv, os.environ, prog=prog, description=description or "")
        if results := work(resolved[config]):  # of several ranks one has them
            print(json.dumps(results, indent=1))
    except MoaiError as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


@dataclass(frozen=True)
class Corpus:
    """An opened corpus. `rows("train")` is a `datasets.Dataset` of that split."""

    path: Path
    content: dict[str, Any]
    tokenizer: MlmTokenizer
    dataset: Any

    @classmethod
    def open(cls, path: str) -> Corpus:
        """Raises ConfigError where there is no corpus, or none that is whole."""
        folder = Path(path).expanduser()
        try:
            content = read_manifest(folder)["content"]
        except DamagedError as error:
            raise ConfigError(f"--dataset {path}: {error}; prepare one: python -m moai entity-coref --help") from error
        from datasets import load_from_disk

        tokenizer = load_mlm_tokenizer(str(folder), content["config"]["mask_token"])
        return cls(folder, content, tokenizer, load_from_disk(str(folder)))

    @property
    def labelled(self) -> bool:
        return bool(self.content["config"]["mode"] != "text")

    def rows(self, split: str, *, most: int | None = None, longest: int | None = None) -> Any:
        """The samples of a split; of more than `most`, as many spread evenly; none longer than `longest` tokens."""
        if split not in self.dataset:
            return []
        rows = self.dataset[split]
        wanted = np.ones(len(rows), bool)
        if longest is not None:
            wanted = pc.list_value_length(rows.data.column("input_ids")).to_numpy() <= longest
        found = np.flatnonzero(wanted)
        if most is not None and len(found) > most:
            found = found[np.linspace(0, len(found) - 1, most).astype(np.int64)]
        return rows.select(found)

    def files(self) -> dict[str, bytes]:
        """The tokenizer's, all of them."""
        return {name: (self.path / name).read_bytes() for name in FILES if (self.path / name).is_file()}

    def check_fit(self, model: Any, place: str) -> None:
        """Raises ConfigError unless the model knows every id."""
        ids, known = self.tokenizer.spec.vocab_size, model.config.vocab_size
        if known < ids:
            raise ConfigError(
                f"{place}: vocab_size {known:,}, but the corpus was made with a tokenizer of {ids:,} ids; use its own "
                f"model"
            )


def load_model(checkpoint: str) -> Any:
    """Raises ConfigError where there is no masked language model."""
    from transformers import AutoModelForMaskedLM

    try:
        return AutoModelForMaskedLM.from_pretrained(checkpoint)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--checkpoint {checkpoint}: no masked language model there ({' '.join(str(error).split())[:200]})"
        ) from error


def asked(sample: Sample) -> list[int]:
    """The places that have a label."""
    return [place for place, label in enumerate(sample["labels"]) if label != IGNORED]


def check_window(sample: Sample) -> None:
    """The antecedent stands unmasked before the mask, inside the row: without it there is nothing to look up. Raises
    DamagedError.
    """
    places, begin, end = asked(sample), sample["antecedent_begin"], sample["antecedent_end"]
    if not places or not 0 <= begin < end <= places[0] or places[-1] >= len(sample["input_ids"]):
        raise DamagedError(
            f"{sample['doc_id']}: the sample for {sample['target']!r} has its antecedent at {begin}:{end} and its "
            f"masks at {places[:1]}..{places[-1:]}"
        )


@dataclass(frozen=True, kw_only=True)
class PadBatch:
    """Rows -> tensors as long as the longest of them, rounded up to 8: on the corpus of 2,048 a third of what padding
    to seq_len would take.
    """

    pad_id: int

    def __call__(self, rows: Sequence[Sample]) -> dict[str, torch.Tensor]:
        import torch

        shape = len(rows), -(-max(len(row["input_ids"]) for row in rows) // _MULTIPLE) * _MULTIPLE
        batch = {name: np.full(shape, fill) for name, fill in (("input_ids", self.pad_id), ("labels", IGNORED))}
        attention = np.zeros(shape, np.int64)
        for place, row in enumerate(rows):
            size = len(row["input_ids"])
            attention[place, :size] = 1
            for name, values in batch.items():
                values[place, :size] = row[name]
        return {name: torch.from_numpy(values) for name, values in (*batch.items(), ("attention_mask", attention))}


@dataclass(kw_only=True)
class RandomMasking:
    """What the prior program trained with: 15 % of the tokens, of these 80 % masked, 10 % another token, 10 % as they
    are.

    Special tokens are never chosen, so a mask that was in the text already is never asked for. Names with labels are
    put back before.
    """

    pad: PadBatch
    mask_id: int
    special_ids: tuple[int, ...]
    vocab_size: int
    seed: int

    def __post_init__(self) -> None:
        self._random = np.random.default_rng(self.seed)

    def __call__(self, rows: Sequence[Sample]) -> dict[str, torch.Tensor]:
        pairs = ((np.array(row["input_ids"]), np.array(row["labels"])) for row in rows)
        return self.pad([self._masked(np.where(labels == IGNORED, ids, labels)) for ids, labels in pairs])

    def _masked(self, ids: Any) -> Sample:
        chosen = (self._random.random(len(ids)) < 0.15) & ~np.isin(ids, self.special_ids)
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
    return summary(*each_span(model, batches))


def summary(nlls: Any, sizes: Any, exact: Any) -> SpanScores:
    """Of what `each_span` gives."""
    number, tokens = max(1, len(nlls)), max(1, int(sizes.sum()))
    nll = float(nlls.sum())
    return SpanScores(len(nlls), int(sizes.sum()), nll / number, nll / tokens, float(exact.sum()) / number)


def each_span(model: Any, batches: Iterable[Mapping[str, torch.Tensor]]) -> tuple[Any, Any, Any]:
    """Of every row, in order: -log p of its name, the number of its tokens, whether `fill` finds all of them."""
    import torch
    from torch.nn.functional import cross_entropy

    parts: list[tuple[torch.Tensor, ...]] = []
    model.eval()
    for batch in (_to(model, batch) for batch in batches):
        labels = batch["labels"]
        wanted = labels != IGNORED
        losses = cross_entropy(_logits(model, batch, wanted).float(), labels[wanted], reduction="none")
        nlls = torch.zeros(labels.shape, device=losses.device).masked_scatter(wanted, losses).sum(1)
        exact = ((fill(model, batch) == labels) | ~wanted).all(1)
        parts.append((nlls.double().cpu(), wanted.sum(1).cpu(), exact.cpu()))
    if not parts:
        return np.empty(0), np.empty(0, int), np.empty(0, bool)
    nll_of, size_of, exact_of = (torch.cat(part).numpy() for part in zip(*parts))
    return nll_of, size_of, exact_of


def fill(model: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """`input_ids` with every asked-for position filled: in each round the surest mask of every row takes its likeliest
    token.
    """
    import torch

    batch = _to(model, batch)
    ids, open_ = batch["input_ids"].clone(), batch["labels"] != IGNORED
    while bool(open_.any()):
        shares, likeliest = _logits(model, {**batch, "input_ids": ids}, open_).float().softmax(-1).max(-1)
        surest = torch.full(ids.shape, -1.0, device=ids.device).masked_scatter(open_, shares)
        tokens = torch.zeros_like(ids).masked_scatter(open_, likeliest)
        rows = open_.any(1).nonzero()[:, 0]
        places = surest.argmax(1)[rows]
        ids[rows, places] = tokens[rows, places]
        open_[rows, places] = False
    return ids


def likeliest(model: Any, batch: Mapping[str, torch.Tensor], number: int) -> list[list[int]]:
    """The `number` likeliest tokens of each row's first asked-for position, the likeliest first."""
    import torch

    batch = _to(model, batch)
    asked = batch["labels"] != IGNORED
    first = torch.zeros_like(asked)
    first[range(len(asked)), asked.int().argmax(1)] = True
    found: list[list[int]] = _logits(model, batch, first).topk(number).indices.tolist()
    return found


def with_one_mask(sample: Sample) -> dict[str, Any]:
    """The sample as a textual mask would stand there: one mask for the whole name, labelled with its first token."""
    places = asked(sample)
    keep = [*range(places[0] + 1), *range(places[-1] + 1, len(sample["input_ids"]))]
    return {name: [sample[name][place] for place in keep] for name in ("input_ids", "labels")}


def in_batches(rows: Iterable[Sample], size: int, collate: PadBatch) -> Iterator[dict[str, torch.Tensor]]:
    waiting = iter(rows)
    while few := list(islice(waiting, size)):
        yield collate(few)


def _logits(model: Any, batch: Mapping[str, torch.Tensor], wanted: torch.Tensor) -> torch.Tensor:
    import torch

    with torch.no_grad():
        return logits_at(model, dict(batch), wanted)


def _to(model: Any, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.to(model.device) for name, tensor in batch.items()}
