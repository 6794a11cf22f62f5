"""Documents -> candidate samples: Kiwi once, rules 5 and 6, repeated names, places among the tokens.

A row is a document with its tokens and a list of candidates; samples are cut out of it later, when the cap over the
whole corpus is known. So the text and its tokens are kept once, however many samples they give. (In mode `text` every
candidate is tokenized anew, with the mask written into the text, and is a row of its own.)
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from moai.core import columns
from moai.core.failpoints import failpoint
from moai.coref.documents import PLACE
from moai.coref.entities import Candidate, Repetition
from moai.coref.korean import RULE, Kiwi, KiwiQuality, analyser
from moai.coref.mlm_tokens import MlmTokenizer
from moai.coref.placement import Placed, Placement, Spans
from moai.engine.part import Part
from moai.engine.pipeline import count, quarantine

CANDIDATE = pa.struct(
    [
        ("entity", pa.string()),
        ("entity_hash", pa.uint64()),
        ("rank", pa.uint64()),
        ("antecedent_pos", pa.int32()),
        ("coref_pos", pa.int32()),
        *(
            (name, pa.int32())
            for name in ("window_begin", "window_end", "antecedent_begin", "antecedent_end", "mask_begin", "mask_end")
        ),
        ("span_exact", pa.bool_()),
    ]
)
SCHEMA = pa.schema(
    [
        ("doc_id", pa.string()),
        ("text_hash", pa.uint64()),
        ("source", pa.string()),
        ("input_ids", pa.list_(pa.int32())),
        ("candidates", pa.list_(CANDIDATE)),
    ]
)


@dataclass(frozen=True)
class _Document:
    doc_id: str
    text: str
    candidates: tuple[Candidate, ...]


Row = tuple[_Document, npt.NDArray[Any], list[Placed]]
"""A document (or one form of it), its tokens, and the candidates that have a place in them."""


@dataclass(frozen=True, kw_only=True)
class Candidates(Part):
    """The only stage that costs time: Kiwi takes some 97 % of it."""

    source: str
    kiwi: Kiwi
    quality: KiwiQuality
    repetition: Repetition
    tokenizer: MlmTokenizer
    placement: Placement

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            documents = [document for row in batch.to_pylist() if (document := self._analyse(row)) is not None]
            rows = [row for row in self._tokenize(documents) if row[2]] if documents else []
            count("documents", len({id(row[0]) for row in rows}))
            count("candidates", sum(len(row[2]) for row in rows))
            if rows:
                yield self._batch(rows)

    def _analyse(self, row: dict[str, Any]) -> _Document | None:
        """Kiwi, once. None if a rule drops the document, Kiwi fails on it, or no name in it comes again."""
        failpoint("coref.document")
        text, kiwi = row["text"], analyser(self.kiwi.model)
        try:
            morphemes = kiwi.tokenize(text)
        except Exception as error:
            quarantine(
                f"Kiwi: {type(error).__name__}",
                detail=str(error),
                sample=text.encode()[:200],
                **{name: row[name] for name in PLACE},
            )
            return None
        tags = [morpheme.tag for morpheme in morphemes]
        if rule := self.quality.failed_by(tags):
            count("filtered")
            count(f"filtered.{RULE}.{rule}")
            return None
        count("passed")
        candidates = self.repetition.candidates(text, morphemes, tags)
        count("mentions", len(candidates))
        return _Document(row["doc_id"], text, tuple(candidates)) if candidates else None

    def _tokenize(self, documents: Sequence[_Document]) -> Iterator[Row]:
        if self.placement.mode == "text":
            yield from self._textual(documents)
            return
        encoded = self.tokenizer.reference.encode_with_offsets([document.text for document in documents])
        for document, (ids, array) in zip(documents, _split(*encoded)):
            listed, spans = ids.tolist(), Spans.of(array)
            yield (
                document,
                ids,
                _found(
                    self.placement.place(candidate, document.text, listed, spans) for candidate in document.candidates
                ),
            )

    def _textual(self, documents: Sequence[_Document]) -> Iterator[Row]:
        """The prior form: one mask in place of the whole mention, and the text around it tokenized as it then
        stands.
        """
        pairs = [(document, candidate) for document in documents for candidate in document.candidates]
        texts = [
            part
            for document, candidate in pairs
            for part in (document.text[: candidate.mention], document.text[candidate.mention + len(candidate.entity) :])
        ]
        encoded = _split(*self.tokenizer.reference.encode_with_offsets(texts))
        for (document, candidate), (before, earlier), (behind, later) in zip(pairs, encoded[::2], encoded[1::2]):
            ids = np.concatenate((before, [self.tokenizer.mask_id], behind))
            resumes = candidate.mention + len(candidate.entity)
            spans = Spans.of(np.concatenate((earlier, [[candidate.mention, resumes]], later + resumes)))
            antecedent = spans.covering(candidate.antecedent, candidate.antecedent + len(candidate.entity))
            mask = (len(before), len(before) + 1)
            yield (
                document,
                ids,
                _found(
                    [self.placement.around(candidate, spans, antecedent, mask, True) if antecedent else "untokenized"]
                ),
            )

    def _batch(self, rows: list[Row]) -> pa.RecordBatch:
        offsets = np.zeros(len(rows) + 1, np.int32)
        np.cumsum([len(ids) for _, ids, _ in rows], out=offsets[1:])
        hashes = [text_hash(document.text) for document, _, _ in rows]
        return pa.record_batch(
            [
                pa.array([document.doc_id for document, _, _ in rows], pa.string()),
                pa.array(hashes, pa.uint64()),
                pa.array([self.source] * len(rows), pa.string()),
                columns.lists(offsets, np.concatenate([ids for _, ids, _ in rows]).astype(np.int32)),
                pa.array(
                    [
                        [_as_struct(document, digest, one) for one in placed]
                        for (document, _, placed), digest in zip(rows, hashes)
                    ],
                    pa.list_(CANDIDATE),
                ),
            ],
            schema=SCHEMA,
        )


def text_hash(text: str) -> int:
    """What the split goes by: equal texts fall on the same side, whatever they are called."""
    return int(xxhash.xxh3_64_intdigest(text.encode()))


def entity_hash(entity: str) -> int:
    """Two names share one with odds of one in a million among five million names."""
    return int(xxhash.xxh3_64_intdigest(entity.encode()))


def _as_struct(document: _Document, digest: int, placed: Placed) -> dict[str, Any]:
    entity, mention = placed.candidate.entity, placed.candidate.mention
    ranges = {"window": placed.window, "antecedent": placed.antecedent, "mask": placed.mask}
    return {
        "entity": entity,
        "entity_hash": entity_hash(entity),
        "rank": xxhash.xxh3_64_intdigest(f"{document.doc_id}\0{digest}\0{entity}\0{mention}".encode()),
        "antecedent_pos": placed.candidate.antecedent,
        "coref_pos": mention,
        "span_exact": placed.exact,
        **{f"{name}_{side}": value for name, pair in ranges.items() for side, value in zip(("begin", "end"), pair)},
    }


def _found(results: Any) -> list[Placed]:
    placed = []
    for result in results:
        if isinstance(result, str):
            count(f"skipped.{result}")
        else:
            placed.append(result)
    return placed


def _split(
    ids: npt.NDArray[Any], offsets: npt.NDArray[np.int64], spans: npt.NDArray[np.int64]
) -> list[tuple[npt.NDArray[Any], npt.NDArray[np.int64]]]:
    return [(ids[begin:end], spans[begin:end]) for begin, end in itertools.pairwise(offsets)]
