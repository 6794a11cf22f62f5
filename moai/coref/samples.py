"""Picked candidates -> samples with labels: the mask over all tokens of the mention, the original ids as labels there,
-100 elsewhere.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from moai.core import columns
from moai.core.failpoints import failpoint
from moai.coref.mlm_tokens import MlmTokenizer
from moai.engine.part import Part
from moai.engine.pipeline import advance, count

IGNORED = -100
"""The label of a position that is not asked for."""
ROWS_PER_BATCH = 256
SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("attention_mask", pa.list_(pa.int8())),
        ("token_type_ids", pa.list_(pa.int8())),
        ("labels", pa.list_(pa.int32())),
        ("target", pa.string()),
        ("antecedent_pos", pa.int32()),
        ("coref_pos", pa.int32()),
        ("distance", pa.int32()),
        ("antecedent_begin", pa.int32()),
        ("antecedent_end", pa.int32()),
        ("span_exact", pa.bool_()),
        ("doc_id", pa.string()),
        ("source", pa.string()),
        ("split", pa.string()),
    ]
)
"""`antecedent_pos`, `coref_pos` and `distance` are characters of the document; `antecedent_begin` and `_end` are
positions in `input_ids`.
"""


@dataclass(frozen=True, kw_only=True)
class Samples(Part):
    """Rows of documents with picked candidates -> one row a sample, unpadded.

    labelled  False in mode `text`, where the mask was written into the text before it was tokenized, as the prior
              program did: no labels then
    """

    tokenizer: MlmTokenizer
    validation_ratio: float
    labelled: bool = True

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            failpoint("coref.samples")
            samples = (sample for document in _documents(batch) for sample in self._samples(document))
            while some := list(itertools.islice(samples, ROWS_PER_BATCH)):
                count("samples", len(some))
                count("samples.widened", sum(not sample["span_exact"] for sample in some))
                count("samples.validation", sum(sample["split"] == "validation" for sample in some))
                advance(len(some))
                yield _batch(some)

    def _samples(self, document: dict[str, Any]) -> Iterator[dict[str, Any]]:
        ids = document["input_ids"]
        for candidate in document["picked"]:
            begin, end = candidate["window_begin"], candidate["window_end"]
            shift = len(self.tokenizer.prefix) - begin
            row = np.concatenate((self.tokenizer.prefix, ids[begin:end], self.tokenizer.suffix)).astype(np.int32)
            labels = np.full(len(row), IGNORED, np.int32)
            masked = slice(candidate["mask_begin"] + shift, candidate["mask_end"] + shift)
            antecedent = candidate["antecedent_begin"] + shift, candidate["antecedent_end"] + shift
            assert (
                len(self.tokenizer.prefix)
                <= antecedent[0]
                < antecedent[1]
                <= masked.start
                < masked.stop
                <= len(row) - len(self.tokenizer.suffix)
            )
            if self.labelled:
                labels[masked] = row[masked]
                row[masked] = self.tokenizer.mask_id
            yield {
                "input_ids": row,
                "labels": labels,
                "target": candidate["entity"],
                "antecedent_pos": candidate["antecedent_pos"],
                "coref_pos": candidate["coref_pos"],
                "distance": candidate["coref_pos"] - candidate["antecedent_pos"],
                "antecedent_begin": antecedent[0],
                "antecedent_end": antecedent[1],
                "span_exact": candidate["span_exact"],
                "doc_id": document["doc_id"],
                "source": document["source"],
                "split": split_of(document["text_hash"], self.validation_ratio),
            }


def split_of(text_hash: int, validation_ratio: float) -> str:
    """By the document, never by the sample: all samples of one text fall on one side."""
    return "validation" if text_hash < validation_ratio * 2**64 else "train"


def _documents(batch: pa.RecordBatch) -> Iterator[dict[str, Any]]:
    ids, offsets = (
        batch["input_ids"].flatten().to_numpy(),
        np.concatenate(([0], np.cumsum(batch["input_ids"].value_lengths().to_numpy()))),
    )
    for index, row in enumerate(batch.select(["doc_id", "text_hash", "source", "candidates", "picked"]).to_pylist()):
        picked = [row["candidates"][which] for which in row["picked"]]
        yield {**row, "picked": picked, "input_ids": ids[offsets[index] : offsets[index + 1]]}


def _batch(samples: list[dict[str, Any]]) -> pa.RecordBatch:
    offsets = np.zeros(len(samples) + 1, np.int32)
    np.cumsum([len(sample["input_ids"]) for sample in samples], out=offsets[1:])
    lists: dict[str, pa.Array] = {
        name: columns.lists(offsets, np.concatenate([sample[name] for sample in samples]))
        for name in ("input_ids", "labels")
    }
    for name, value in (("attention_mask", 1), ("token_type_ids", 0)):
        bytes_: npt.NDArray[np.int8] = np.full(offsets[-1], value, np.int8)
        lists[name] = pa.ListArray.from_arrays(pa.array(offsets), pa.array(bytes_))
    return pa.record_batch(
        [
            lists[field.name]
            if field.name in lists
            else pa.array([sample[field.name] for sample in samples], field.type)
            for field in SCHEMA
        ],
        schema=SCHEMA,
    )
