"""`text` -> `tokens`: one list of ids a document, with EOS behind it and, if wanted, BOS before it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from moai.engine.pipeline import count
from moai.tokenizer import Reference


@dataclass(frozen=True, kw_only=True)
class Tokenize:
    """The ids are flat from the tokenizer to the packer: offsets over one array, never a list of ints."""

    backend: Reference

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        spec = self.backend.spec
        for batch in batches:
            ids, offsets = self.backend.encode_batch(batch["text"].to_pylist())
            documents = len(offsets) - 1
            count("tokens.text", len(ids))
            count("tokens.special_in_text", int(np.isin(ids, self.backend.special_ids).sum()))
            count("tokens.eos", documents)
            count("tokens.bos", documents if spec.bos_id is not None else 0)
            ids, offsets = add_ends(ids, offsets, spec.bos_id, spec.eos_id)
            yield pa.record_batch([pa.LargeListArray.from_arrays(offsets, ids)], names=["tokens"])


def add_ends(ids: np.ndarray, offsets: np.ndarray, bos_id: int | None, eos_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Each document of the flat array with its BOS (unless None) and EOS, and the new offsets."""
    before = 0 if bos_id is None else 1
    documents = np.arange(len(offsets))
    grown = offsets + documents * (1 + before)
    result = np.empty(grown[-1], np.uint32)
    inside = np.ones(grown[-1], bool)
    inside[grown[1:] - 1] = False
    result[grown[1:] - 1] = eos_id
    if bos_id is not None:
        inside[grown[:-1]] = False
        result[grown[:-1]] = bos_id
    result[inside] = ids
    return result, grown
