"""`text`, or records that hold one -> `tokens`: one list of ids a document, with EOS behind it and, if wanted, BOS
before it.

A fast backend works under the reference's eyes: one window of every batch is encoded by both, and a text that the fast
one refuses goes to the reference alone. A text that the reference fails on is left out, and counted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import numpy as np
import pyarrow as pa

from moai.core import columns
from moai.core.errors import BackendDisagrees, BackendRefused
from moai.engine.part import UNKEYED, Part
from moai.engine.pipeline import count, drop
from moai.tokenizers.backends import Backend, Ids, Offsets, Reference, difference
from moai.transforms.filters import Length

WINDOW_CHARS = 1024
WINDOW_EVERY = 1_000_000
"""The reference encodes so many characters too: of a shard's first batch, and again whenever so many ids have gone by.
That is a hundredth of the time.
"""


class Texts(Protocol):
    def read(self, batch: pa.RecordBatch) -> tuple[list[str], pa.RecordBatch]: ...


@dataclass(frozen=True, kw_only=True)
class Tokenize(Part):
    """The ids are flat from the tokenizer to the packer: offsets over one array, never a list of ints."""

    version: ClassVar[int] = 2  # 1 did not count texts that have their BOS or EOS already
    needs: ClassVar[tuple[str, ...]] = ("text",)

    backend: Backend = field(metadata=UNKEYED)
    reference: Reference
    to_text: Texts | None = field(default=None, metadata=UNKEYED)
    """Where nothing looks at the texts as a column, they are taken from the records right here, and no column is made
    of them.
    """

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        spec, length = self.reference.spec, Length()
        unseen = WINDOW_EVERY
        for batch in batches:
            texts, beside = length.without_blank(*self.to_text.read(batch)) if self.to_text else _texts_of(batch)
            if not texts:
                continue
            ids, offsets, lost = self._encode(texts)
            if lost:
                taken = np.ones(len(texts), bool)
                taken[lost] = False
                drop("tokenizer", beside.filter(pa.array(~taken)), ["refused"] * len(lost))
                texts, beside = [text for text, take in zip(texts, taken) if take], beside.filter(pa.array(taken))
                offsets = np.delete(offsets, lost)  # they have no ids
            if not texts:
                continue
            unseen += len(ids)
            if unseen >= WINDOW_EVERY and not isinstance(self.backend, Reference):
                compare_window(self.backend, self.reference, texts, ids, offsets)
                unseen = 0
            documents = len(offsets) - 1
            count("tokens.text", len(ids))
            count("tokens.special_in_text", _count_in(ids, spec.special_ids))
            count("tokens.eos", documents)
            count("tokens.bos", documents if spec.bos_id is not None else 0)
            full = offsets[1:] > offsets[:-1]
            count("tokens.eos_twice", int((ids[offsets[1:][full] - 1] == spec.eos_id).sum()))
            count("tokens.bos_twice", int((ids[offsets[:-1][full]] == spec.bos_id).sum()))
            ids, offsets = add_ends(ids, offsets, spec.bos_id, spec.eos_id)
            yield beside.append_column("tokens", columns.lists(offsets, ids))

    def _encode(self, texts: Sequence[str]) -> tuple[Ids, Offsets, list[int]]:
        """By halves around a text that the backend refuses, which the reference then encodes. Numbers of those that the
        reference fails on too come last; they have no ids.
        """
        with contextlib.suppress(BackendRefused):
            return (*self.backend.encode_batch(texts), [])
        if len(texts) > 1:
            half = len(texts) // 2
            first, offsets, lost = self._encode(texts[:half])
            second, more, also = self._encode(texts[half:])
            joined = np.concatenate((offsets, offsets[-1] + more[1:]))
            return np.concatenate((first, second)), joined, [*lost, *(half + index for index in also)]
        if not isinstance(self.backend, Reference):
            count("backend.refused")
            with contextlib.suppress(BackendRefused):
                return (*self.reference.encode_batch(texts), [])
        return np.empty(0, self.reference.spec.dtype), np.zeros(2, np.int64), [0]


def compare_window(backend: Backend, reference: Reference, texts: Sequence[str], ids: Ids, offsets: Offsets) -> None:
    """Compare one window of what `backend` made of a batch, chosen by what is in it. Raises BackendDisagrees."""
    which = len(ids) % len(texts)
    text = texts[which]
    found = ids[offsets[which] : offsets[which + 1]]
    try:
        if len(text) > WINDOW_CHARS:
            start = len(found) * 7919 % (len(text) - WINDOW_CHARS)
            text = text[start : start + WINDOW_CHARS]
            found = backend.encode_batch([text])[0]
        expected = reference.encode_batch([text])[0]
    except BackendRefused:
        return
    if not np.array_equal(found, expected):
        raise BackendDisagrees(difference(text, found, expected))


def _texts_of(batch: pa.RecordBatch) -> tuple[list[str], pa.RecordBatch]:
    return batch["text"].to_pylist(), batch.drop_columns(["text"])


def add_ends(ids: Ids, offsets: Offsets, bos_id: int | None, eos_id: int) -> tuple[Ids, Offsets]:
    """Each document of the flat array with its BOS (unless None) and EOS, and the new offsets."""
    before = 0 if bos_id is None else 1
    grown = offsets + np.arange(len(offsets)) * (1 + before)
    result = np.empty(grown[-1], ids.dtype)
    inside = np.ones(grown[-1], bool)
    inside[grown[1:] - 1] = False
    result[grown[1:] - 1] = eos_id
    if bos_id is not None:
        inside[grown[:-1]] = False
        result[grown[:-1]] = bos_id
    result[inside] = ids
    return result, grown


def _count_in(ids: Ids, special_ids: tuple[int, ...]) -> int:
    """How many of `ids` are special. Special ids stand side by side or nearly, so a range leaves few to look at one by
    one.
    """
    if not special_ids or not len(ids):
        return 0
    near = ids[(ids >= special_ids[0]) & (ids <= special_ids[-1])]
    return int(np.isin(near, special_ids).sum()) if len(near) else 0
