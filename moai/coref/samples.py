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
SPLITS = ("train", "validation")
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
        ("kind", pa.string()),
        ("competitors", pa.int32()),
        ("difficulty", pa.float32()),
        ("nearest", pa.string()),
        ("frequent", pa.string()),
        ("doc_id", pa.string()),
        ("source", pa.string()),
    ]
)
"""`antecedent_pos`, `coref_pos` and `distance` are characters of the document; `antecedent_begin` and `_end` are
positions in `input_ids`; `nearest` and `frequent` are what the two baselines answer (moai.coref.entities.Candidate).
"""
_OF_CANDIDATES = ("antecedent_pos", "coref_pos", "span_exact", "kind", "competitors", "nearest", "frequent")


@dataclass(frozen=True, kw_only=True)
class Samples(Part):
    """Rows of documents with picked candidates -> one row a sample, unpadded.

    split     `train` or `validation`: which side these documents stand on
    labelled  False in mode `text`, where the mask was written into the text before it was tokenized, as the prior
              program did: no labels then
    """

    tokenizer: MlmTokenizer
    split: str
    labelled: bool = True

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            failpoint("coref.samples")
            samples = (sample for document in _documents(batch) for sample in self._samples(document))
            while some := list(itertools.islice(samples, ROWS_PER_BATCH)):
                count("samples", len(some))
                count("samples.widened", sum(not sample["span_exact"] for sample in some))
                count(f"samples.{self.split}", len(some))
                advance(len(some))
                yield _batch(some)

    def _samples(self, document: dict[str, Any]) -> Iterator[dict[str, Any]]:
        for candidate, hundredths in document["picked"]:
            ids, labels, first, last = self._row(candidate, document["input_ids"])
            yield {
                **{name: candidate[name] for name in _OF_CANDIDATES},
                **{name: document[name] for name in ("doc_id", "source")},
                "input_ids": ids,
                "labels": labels,
                "target": candidate["entity"],
                "distance": candidate["coref_pos"] - candidate["antecedent_pos"],
                "antecedent_begin": first,
                "antecedent_end": last,
                "difficulty": hundredths / 100,
            }

    def _row(self, candidate: dict[str, Any], tokens: Any) -> tuple[Any, Any, int, int]:
        """(ids, labels, begin and end of the antecedent): the window with its edits made."""
        begin, end, asked = candidate["window_begin"], candidate["window_end"], candidate["mask"]
        ids, labels = [list(self.tokenizer.prefix)], [[IGNORED] * len(self.tokenizer.prefix)]
        at, shift = begin, len(self.tokenizer.prefix) - begin
        antecedent = candidate["antecedent_begin"]
        for edit in sorted([asked, *candidate["hidden"]], key=lambda edit: edit["begin"]):
            assert at <= edit["begin"] < edit["end"] <= end
            name, size = edit["name"], len(edit["name"])
            kept = tokens[at : edit["begin"]].tolist()
            masks = [self.tokenizer.mask_id] * size if self.labelled else name
            asked_for = name if edit is asked and self.labelled else [IGNORED] * size
            ids += [kept, edit["before"], masks, edit["behind"]]
            labels += [[IGNORED] * (len(kept) + len(edit["before"])), asked_for, [IGNORED] * len(edit["behind"])]
            at = edit["end"]
            if edit["end"] <= antecedent:
                shift += size + len(edit["before"]) + len(edit["behind"]) - (edit["end"] - edit["begin"])
        rest = [*tokens[at:end].tolist(), *self.tokenizer.suffix]
        row = np.fromiter(itertools.chain(*ids, rest), np.int32)
        wanted = np.fromiter(itertools.chain(*labels, itertools.repeat(IGNORED, len(rest))), np.int32)
        return row, wanted, antecedent + shift, candidate["antecedent_end"] + shift


def _documents(batch: pa.RecordBatch) -> Iterator[dict[str, Any]]:
    lists = batch["input_ids"]
    documents = batch.select(["doc_id", "source", "candidates", "picked", "values"]).to_pylist()
    for row, ids in zip(documents, lists):
        picked = [(row["candidates"][which], value) for which, value in zip(row["picked"], row["values"])]
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
