"""`examples` of conversations -> `tokens` of each, and `trained_runs`: which of them are learned.

Where a token stands in its text is the reference tokenizer's to say. A fast backend's ids stand where their bytes do,
once these are shown to be the text's (moai.tokenizers.spelling); a text of which that is not so goes to the reference,
alone, and is counted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa

from moai.core import columns
from moai.core.errors import BackendRefused
from moai.engine.part import EXAMPLES, UNKEYED, Part
from moai.engine.pipeline import count, drop
from moai.engine.schema import TRAINED
from moai.tokenizers.backends import Backend, Ids, Offsets, Reference
from moai.tokenizers.spelling import Spelling
from moai.transforms.template import Marks
from moai.transforms.tokenize import WINDOW_EVERY, compare_window

REFUSED = "tokenizer_refused"
"""Why an example is left out that the tokenizer fails on."""
_EXAMPLES_AT_ONCE = 256
"""Texts that are tokenized together: their tokens' places take some 100 bytes a token until they are arrays."""

Trained = npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class EncodeExamples(Part):
    """`examples` -> `tokens` of each, and which are learned. Those longer than `seq_len` are left out, or cut where
    `truncate` is set and a token to learn remains. A conversation is kept if one of its examples is."""

    version: ClassVar[int] = 2  # 1 had one word for nothing to learn and nothing verified
    needs: ClassVar[tuple[str, ...]] = (EXAMPLES,)

    backend: Backend = field(metadata=UNKEYED)
    """A fast one where ids are shown to spell their texts, and by `reference` where they do not; or the reference."""
    reference: Reference
    seq_len: int
    truncate: bool = False

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        unseen = WINDOW_EVERY
        for batch in batches:
            records = [orjson.loads(examples) for examples in batch[EXAMPLES].to_pylist()]
            beside = batch.drop_columns([name for name in (EXAMPLES, "text", "messages") if name in batch.schema.names])
            kept = np.zeros(len(records), bool)
            lost = ["unverified" if record is None else "untrained" for record in records]
            examples = [(number, example) for number, record in enumerate(records) for example in record or ()]
            for first in range(0, len(examples), _EXAMPLES_AT_ONCE):
                some = examples[first : first + _EXAMPLES_AT_ONCE]
                texts = [text for _, (text, _) in some]
                if unseen >= WINDOW_EVERY and self.backend is not self.reference:
                    with contextlib.suppress(BackendRefused):
                        compare_window(self.backend, self.reference, texts, *self.backend.encode_batch(texts))
                    unseen = 0
                unseen += sum(map(len, texts)) // 4  # ids, about
                yield from self._encode(some, beside, kept, lost)
            if not kept.all():
                drop("chat", beside.filter(pa.array(~kept)), [reason for reason, keep in zip(lost, kept) if not keep])

    def _encode(
        self, examples: Sequence[tuple[int, Any]], beside: pa.RecordBatch, kept: np.ndarray, lost: list[str]
    ) -> Iterator[pa.RecordBatch]:
        try:
            ids, offsets, trained = self._marked([example for _, example in examples])
        except BackendRefused:  # one of them: each for itself
            if len(examples) == 1:
                lost[examples[0][0]] = REFUSED
                count(f"chat.{REFUSED}")
                return
            for example in examples:
                yield from self._encode([example], beside, kept, lost)
            return
        count("tokens.text", len(ids))
        keep = np.zeros(len(ids), bool)
        lengths, of = list[int](), list[int]()
        for (number, _), start, end in zip(examples, offsets[:-1].tolist(), offsets[1:].tolist()):
            length = self._length(trained[start:end])
            if length:
                keep[start : start + length] = kept[number] = True
                lengths.append(length)
                of.append(number)
            else:
                lost[number] = "too_long" if end - start > self.seq_len else "untrained"
                count(f"chat.{lost[number]}")
        count("tokens.dropped", len(ids) - sum(lengths))
        count("tokens.trained", int(trained[keep].sum()))
        count("chat.examples", len(lengths))
        if lengths:
            grown = np.concatenate(([0], np.cumsum(lengths)))
            made = beside.take(pa.array(of)).append_column("tokens", columns.lists(grown, ids[keep]))
            yield made.append_column(TRAINED.name, columns.lists(grown, trained[keep]))

    def _marked(self, examples: Sequence[tuple[str, Marks]]) -> tuple[Ids, Offsets, Trained]:
        """Ids of all texts, offsets into them, and which are learned. By halves around a text that the backend does not
        take, or spells otherwise. Raises BackendRefused where the reference fails on one.
        """
        if not isinstance(self._spelling, Spelling):
            return self._by_reference(examples)
        found, why = None, "backend.respelled"
        try:
            found = self._spelled(examples, self._spelling)
        except BackendRefused:
            why = "backend.refused"
        if found is not None:
            return found
        if len(examples) == 1:
            count(why)
            return self._by_reference(examples)
        half = len(examples) // 2
        (ids, offsets, trained), (more, further, also) = (
            self._marked(some) for some in (examples[:half], examples[half:])
        )
        joined = np.concatenate((offsets, offsets[-1] + further[1:]))
        return np.concatenate((ids, more)), joined, np.concatenate((trained, also))

    def _spelled(
        self, examples: Sequence[tuple[str, Marks]], spelling: Spelling
    ) -> tuple[Ids, Offsets, Trained] | None:
        """None where the ids do not spell the texts. Places are bytes of all texts, one behind another."""
        ids, offsets = self.backend.encode_batch([text for text, _ in examples])
        raws = [text.encode() for text, _ in examples]
        begins, ends = np.cumsum([0, *map(len, raws)]), spelling.ends(ids)
        if not np.array_equal(np.concatenate(([0], ends))[offsets], begins):
            return None
        if not spelling.spells(ids, ends, b"".join(raws)):
            return None
        spans = [
            (start + begin, end + begin)
            for (text, marks), raw, begin in zip(examples, raws, begins.tolist())
            for start, end in _in_bytes(text, raw, marks)
        ]
        trained = np.zeros(len(ids), np.uint8)
        if spans:
            first, last = np.array(spans).T
            # From the first token that ends behind the beginning to the last that begins before the end.
            steps = np.zeros(len(ids) + 1, np.int64)
            np.add.at(steps, np.searchsorted(ends, first, "right"), 1)
            np.add.at(steps, np.searchsorted(ends, last, "left") + 1, -1)
            trained[:] = np.cumsum(steps[:-1]) > 0
        trained[offsets[:-1][offsets[1:] > offsets[:-1]]] = 0
        return ids, offsets, trained

    def _by_reference(self, examples: Sequence[tuple[str, Marks]]) -> tuple[Ids, Offsets, Trained]:
        ids, offsets, places = self.reference.encode_with_offsets([text for text, _ in examples])
        trained = np.zeros(len(ids), np.uint8)
        for (_, marks), start, end in zip(examples, offsets[:-1].tolist(), offsets[1:].tolist()):
            _mark(trained[start:end], places[start:end], marks)
        return ids, offsets, trained

    @cached_property
    def _spelling(self) -> Spelling | None:
        """Where a fast backend is used."""
        if self.backend is self.reference or isinstance(self.backend, Reference):
            return None
        found = Spelling.of(self.reference.spec.path, self.reference.spec.digest)
        return found if isinstance(found, Spelling) else None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_spelling"}

    def _length(self, trained: Trained) -> int:
        """Tokens of an example that are kept; 0 leaves it out."""
        if len(trained) > self.seq_len and not self.truncate:
            return 0
        return min(len(trained), self.seq_len) if trained[: self.seq_len].any() else 0


def _in_bytes(text: str, raw: bytes, marks: Marks) -> Marks:
    """Spans of characters as spans of bytes, without empty ones."""
    marks = [(start, end) for start, end in marks if end > start]
    if len(raw) == len(text):
        return marks
    found, before, size = dict[int, int](), 0, 0
    for place in sorted({place for mark in marks for place in mark}):
        size += len(text[before:place].encode())
        found[place], before = size, place
    return [(found[start], found[end]) for start, end in marks]


def _mark(trained: Trained, places: npt.NDArray[np.int64], spans: Marks) -> None:
    """Set the tokens of each span: from the first that reaches into it to the last, all between included. A document's
    first token has nothing that could predict it."""
    for start, end in spans:
        inside = np.flatnonzero((places[:, 1] > start) & (places[:, 0] < end))
        if len(inside) and end > start:
            trained[inside[0] : inside[-1] + 1] = 1
    trained[:1] = 0
