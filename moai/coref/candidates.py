"""Documents -> candidate samples: Kiwi once, the rules on tags, repeated names, places among the tokens.

A row is a document with its tokens and a list of candidates; samples are cut out of it later, when the cap over the
whole corpus is known. So the text and its tokens are kept once, however many samples they give. (In mode `text` every
candidate is tokenized anew, with the mask written into the text, and is a row of its own.)
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
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
from moai.coref.placement import Edit, Placed, Placement, Spans
from moai.engine.part import Part
from moai.engine.pipeline import count, quarantine

_RANGES = ("window_begin", "window_end", "antecedent_begin", "antecedent_end")
EDIT = pa.struct(
    {
        "begin": pa.int32(),
        "end": pa.int32(),
        **dict.fromkeys(("name", "before", "behind"), pa.list_(pa.int32())),
    }
)
CANDIDATE = pa.struct(
    {
        "entity": pa.string(),
        "entity_hash": pa.uint64(),
        "rank": pa.uint64(),
        **dict.fromkeys(("antecedent_pos", "coref_pos", "competitors", *_RANGES), pa.int32()),
        "span_exact": pa.bool_(),
        **dict.fromkeys(("kind", "nearest", "frequent"), pa.string()),
        "mask": EDIT,
        "hidden": pa.list_(EDIT),
    }
)
SCHEMA = pa.schema(
    {
        "doc_id": pa.string(),
        "cluster": pa.uint64(),
        "source": pa.string(),
        "input_ids": pa.list_(pa.int32()),
        "candidates": pa.list_(CANDIDATE),
    }
)


@dataclass(frozen=True)
class _Row:
    """A document (or one form of it) with its tokens, and the candidates that have a place in them."""

    document: Mapping[str, Any]
    ids: npt.NDArray[Any]
    placed: list[Placed]


_OPENING = 100
"""Letters at the beginning of a text that tell which texts are copies."""
_Found = tuple[Mapping[str, Any], Sequence[Candidate]]
"""A document, and what may be asked for in it."""


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
            found = [(row, candidates) for row in batch.to_pylist() if (candidates := self._analyse(row))]
            tokenize = self._textual if self.placement.mode == "text" else self._spans
            rows = [row for row in tokenize(found) if row.placed] if found else []
            count("documents", len({id(row.document) for row in rows}))
            count("candidates", sum(len(row.placed) for row in rows))
            if rows:
                yield self._batch(rows)

    def _analyse(self, row: Mapping[str, Any]) -> list[Candidate]:
        """Kiwi, once. Nothing if a rule drops the document, Kiwi fails on it, or no name in it comes again."""
        failpoint("coref.document")
        text, kiwi = row["text"], analyser(self.kiwi.model)
        try:
            morphemes = kiwi.tokenize(text)
        except Exception as error:
            place = {name: row[name] for name in PLACE}
            quarantine(f"Kiwi: {type(error).__name__}", detail=str(error), sample=text.encode()[:200], **place)
            return []
        if rules := self.quality.failed_by([morpheme.tag for morpheme in morphemes]):
            count("filtered")
            count(f"filtered.{RULE}.{rules[0]}")
            count(f"alone.{rules[0]}", len(rules) == 1)
            return []
        count("passed")
        names = self.repetition.finder.names(text, morphemes, row["doc_id"])
        candidates, lost = self.repetition.candidates(text, morphemes, names)
        count("mentions", len(candidates) + lost.total())
        for reason, number in lost.items():
            count(f"skipped.{reason}", number)
        return candidates

    def _spans(self, found: Sequence[_Found]) -> Iterator[_Row]:
        encoded = self._encoded([document["text"] for document, _ in found])
        for (document, candidates), (ids, array) in zip(found, encoded):
            listed, spans, text = ids.tolist(), Spans.of(array), document["text"]
            places = [self.placement.place(candidate, text, listed, spans) for candidate in candidates]
            yield _Row(document, ids, _placed(places))

    def _textual(self, found: Sequence[_Found]) -> Iterator[_Row]:
        """The prior form: one mask in place of the whole mention, and the text around it tokenized as it then
        stands.
        """
        pairs = [(document, candidate) for document, candidates in found for candidate in candidates]
        halves = [(document["text"][: one.mention], document["text"][one.behind :]) for document, one in pairs]
        encoded = self._encoded([*itertools.chain(*halves)])
        for (document, candidate), (before, earlier), (behind, later) in zip(pairs, encoded[::2], encoded[1::2]):
            ids = np.concatenate((before, [self.tokenizer.mask_id], behind))
            mention = [[candidate.mention, candidate.behind]]
            spans = Spans.of(np.concatenate((earlier, mention, later + candidate.behind)))
            mask = Edit(len(before), len(before) + 1, (self.tokenizer.mask_id,))
            antecedent = spans.covering(candidate.antecedent, candidate.antecedent + len(candidate.entity))
            place = self.placement.around(candidate, spans, antecedent, mask, True) if antecedent else "untokenized"
            yield _Row(document, ids, _placed([place]))

    def _encoded(self, texts: list[str]) -> list[tuple[npt.NDArray[Any], npt.NDArray[np.int64]]]:
        """(ids, the characters of each) of every text."""
        ids, offsets, spans = self.tokenizer.reference.encode_with_offsets(texts)
        return [(ids[begin:end], spans[begin:end]) for begin, end in itertools.pairwise(offsets)]

    def _batch(self, rows: Sequence[_Row]) -> pa.RecordBatch:
        offsets = np.zeros(len(rows) + 1, np.int32)
        np.cumsum([len(row.ids) for row in rows], out=offsets[1:])
        hashes = [_hash(row.document["text"]) for row in rows]
        listed = [[_as_struct(row, digest, one) for one in row.placed] for row, digest in zip(rows, hashes)]
        return pa.record_batch(
            [
                pa.array([row.document["doc_id"] for row in rows], pa.string()),
                pa.array([cluster_of(row.document["text"]) for row in rows], pa.uint64()),
                pa.array([self.source] * len(rows), pa.string()),
                columns.lists(offsets, np.concatenate([row.ids for row in rows]).astype(np.int32)),
                pa.array(listed, pa.list_(CANDIDATE)),
            ],
            schema=SCHEMA,
        )


def entity_hash(entity: str) -> int:
    """Two names share one with odds of one in a million among five million names."""
    return _hash(entity)


def _hash(text: str) -> int:
    return int(xxhash.xxh3_64_intdigest(text.encode()))


def cluster_of(text: str) -> int:
    """What the split goes by: equal texts, and copies that differ in their layout or their end, fall on the same
    side.
    """
    letters = itertools.islice((letter for letter in text if letter.isalnum()), _OPENING)
    return _hash("".join(letters))


def _as_struct(row: _Row, digest: int, placed: Placed) -> dict[str, Any]:
    one = placed.candidate
    return {
        **{name: getattr(one, name) for name in ("entity", "kind", "competitors", "nearest", "frequent")},
        "entity_hash": entity_hash(one.entity),
        "rank": _hash(f"{row.document['doc_id']}\0{digest}\0{one.entity}\0{one.mention}"),
        "antecedent_pos": one.antecedent,
        "coref_pos": one.mention,
        "span_exact": placed.exact,
        **dict(zip(_RANGES, (*placed.window, *placed.antecedent))),
        "mask": vars(placed.mask),
        "hidden": [vars(edit) for edit in placed.hidden],
    }


def _placed(places: Sequence[Placed | str]) -> list[Placed]:
    """Those that have a place; of the others the reason is counted."""
    for reason in places:
        if isinstance(reason, str):
            count(f"skipped.{reason}")
    return [place for place in places if not isinstance(place, str)]
