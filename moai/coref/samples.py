"""Picked candidates -> samples with labels: the mask over all tokens of the mention, the original ids as labels there,
-100 elsewhere.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
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
        prefix, suffix = self.tokenizer.prefix, self.tokenizer.suffix
        for candidate in document["picked"]:
            begin, end = candidate["window_begin"], candidate["window_end"]
            row = np.concatenate((prefix, document["input_ids"][begin:end], suffix)).astype(np.int32)
            labels = np.full(len(row), IGNORED, np.int32)
            first, last, mask, behind = (
                candidate[name] + len(prefix) - begin
                for name in ("antecedent_begin", "antecedent_end", "mask_begin", "mask_end")
            )
            assert len(prefix) <= first < last <= mask < behind <= len(row) - len(suffix)
            if self.labelled:
                labels[mask:behind] = row[mask:behind]
                row[mask:behind] = self.tokenizer.mask_id
            yield {
                **{name: candidate[name] for name in ("antecedent_pos", "coref_pos", "span_exact")},
                **{name: document[name] for name in ("doc_id", "source")},
                "input_ids": row,
                "labels": labels,
                "target": candidate["entity"],
                "distance": candidate["coref_pos"] - candidate["antecedent_pos"],
                "antecedent_begin": first,
                "antecedent_end": last,
                "split": split_of(document["text_hash"], self.validation_ratio),
            }


def split_of(text_hash: int, validation_ratio: float) -> str:
    """By the document, never by the sample: all samples of one text fall on one side."""
    return "validation" if text_hash < validation_ratio * 2**64 else "train"


def _documents(batch: pa.RecordBatch) -> Iterator[dict[str, Any]]:
    lists = batch["input_ids"]
    documents = batch.select(["doc_id", "text_hash", "source", "candidates", "picked"]).to_pylist()
    for row, ids in zip(documents, lists):
        picked = [row["candidates"][which] for which in row["picked"]]
        yield {**row, "picked": picked, "input_ids": ids.values.to_numpy()}


def _batch(samples: list[dict[str, Any]]) -> pa.RecordBatch:
    offsets = np.zeros(len(samples) + 1, np.int32)
    np.cumsum([len(sample["input_ids"]) for sample in samples], out=offsets[1:])
    lists: dict[str, pa.Array] = {
        name: columns.lists(offsets, np.concatenate([sample[name] for sample in samples]))
        for name in ("input_ids", "labels")
    }
    for name, value in (("attention_mask", 1), ("token_type_ids", 0)):
        lists[name] = pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.full(offsets[-1], value, np.int8)))
    single = (field for field in SCHEMA if field.name not in lists)
    made = lists | {field.name: pa.array([sample[field.name] for sample in samples], field.type) for field in single}
    return pa.record_batch([made[name] for name in SCHEMA.names], schema=SCHEMA)
