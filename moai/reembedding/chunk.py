"""Cut documents into chunks that an embedding model reads to their end.

    Chunk(strategy="dynamic", tokens=encoder.tokens)     # RecordBatch of documents -> RecordBatches of chunks

A chunk is a span of its document, the paragraphs joined by a newline. The spans of a pass cover every character but
blanks, none begins or ends with one, and none is longer than the strategy's size or, with the document's context before
it, than the model's limit of tokens.

Where the text is cut, best first: statutes at articles (제N조), clauses (①, 제N항), items (1., 가.); paragraphs at
their rows and at blank lines; what is still too long in windows that overlap, at a line's end, a sentence's end or a
blank in the last part of the window.
"""

from __future__ import annotations

import re
import sys
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

VERSION = 2  # 1 knew no context
"""Part of every document's content hash: raise it when the same text would be cut otherwise."""

STRATEGIES = ("standard", "dynamic", "hybrid")
GONE = "gone from its table"
"""The reason of a document that has to leave the version."""
_DOCUMENTS_AT_ONCE = 64
_PARAGRAPHS_A_CHUNK = 3
_CONTEXT_PART = 4
"""At most this part of what the model reads is context."""
_LATE_PART = 0.6
"""A window ends at a boundary if there is one behind this share of it."""

Span = tuple[int, int]


@dataclass(frozen=True)
class Size:
    """Characters of a chunk, and the share by which neighbours overlap. One under `least` takes in its successor where
    both fit.
    """

    least: int
    most: int
    overlap: float


DEFAULT = Size(400, 1800, 0.25)
_STATUTES = Size(300, 1000, 0.15)
_PARAGRAPHS = Size(500, 2000, 0.30)
BY_QUERY = {
    "law_inquiry": _STATUTES,
    "precedent_search": _PARAGRAPHS,
    "legal_advice": Size(400, 1500, 0.25),
    "procedure_guide": Size(400, 1500, 0.25),
    "term_explanation": Size(300, 1200, 0.20),
    "general": DEFAULT,
}
HYBRID = (Size(400, 800, 0.20), Size(800, 1500, 0.25), Size(1500, 2500, 0.30))


def sizes(strategy: str, source_type: str, query_type: str | None) -> tuple[Size, ...]:
    """One size a pass over the document."""
    if strategy == "hybrid":
        return HYBRID
    if strategy == "dynamic":
        by_type = _STATUTES if source_type == "statute_article" else _PARAGRAPHS
        return (BY_QUERY[query_type] if query_type else by_type,)
    return (DEFAULT,)


def category(characters: int) -> str:
    return "small" if characters < 800 else "medium" if characters < 1500 else "large"


class Tokens(Protocol):
    """The model's own tokenizer, without truncation."""

    @property
    def max_tokens(self) -> int:
        """What the model reads of a text, added tokens included."""
        ...

    def spans(self, texts: Sequence[str]) -> list[npt.NDArray[np.int64]]:
        """(n, 2) for each text: where its tokens begin and end, in characters, without added ones."""
        ...

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """What the model is given for each text, added tokens included."""
        ...


SCHEMA = pa.schema(
    [
        ("source_type", pa.string()),
        ("source_id", pa.int64()),
        ("content_hash", pa.string()),
        ("reason", pa.string()),
        ("chunk_index", pa.int32()),
        ("start_char", pa.int32()),
        ("end_char", pa.int32()),
        ("overlap_chars", pa.int32()),
        ("text", pa.string()),
        ("category", pa.string()),
        ("group_id", pa.string()),
        ("context_chars", pa.int32()),
        ("truncated", pa.bool_()),
        ("ids", pa.list_(pa.int32())),
    ]
)
"""A row is a chunk; a document without chunks is a row whose `chunk_index` is null and whose `reason` says why."""


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Documents in, chunks out. A batch never ends inside a document, nor holds documents of two that came in."""

    strategy: str
    tokens: Tokens
    embedding_batch_size: int
    """Chunks in a batch, unless one document has more."""
    query_type: str | None = None
    batch_tokens: Callable[[], int] = lambda: sys.maxsize
    """Tokens in a batch, unless one document has more: asked for when there is a chunk, since only the model knows."""

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            looked_at = looked_at_in(batch)
            waiting: list[tuple[Any, ...]] = []
            seen, tokens = Counter[str](), 0
            for start in range(0, batch.num_rows, _DOCUMENTS_AT_ONCE):
                documents = batch.slice(start, _DOCUMENTS_AT_ONCE).to_pylist()
                for document, rows in zip(documents, self._documents(documents)):
                    more = sum(len(row[-1] or ()) for row in rows)
                    if waiting and (
                        len(waiting) + len(rows) > self.embedding_batch_size or tokens + more > self.batch_tokens()
                    ):
                        yield _batch(waiting, seen)
                        waiting, tokens = [], 0
                        looked_at.subtract(seen)
                        seen.clear()
                    waiting += rows
                    tokens += more
                    seen.update(documents=int(document["reason"] != GONE), characters=document["characters"])
            yield _batch(waiting, looked_at)  # with the unchanged ones of the page

    def _documents(self, documents: list[dict[str, Any]]) -> Iterator[list[tuple[Any, ...]]]:
        """The rows of each document, all of them tokenized in two calls."""
        chunked = self._chunked([document for document in documents if document["reason"] is None])
        for document in documents:
            if document["reason"] is None:
                yield next(chunked)
            else:
                said = (document[name] for name in ("source_type", "source_id", "content_hash", "reason"))
                yield [(*said, *[None] * (len(SCHEMA) - 4))]

    def _chunked(self, documents: list[dict[str, Any]]) -> Iterator[list[tuple[Any, ...]]]:
        texts = ["\n".join(document["paragraphs"]) for document in documents]
        limit = self.tokens.max_tokens - len(self.tokens.ids([""])[0])
        before = self._contexts([document["context"] for document in documents], limit // _CONTEXT_PART)
        cut = [
            self._passes(document, _Measured(text, spans, limit - tokens))
            for document, text, spans, (_, tokens) in zip(documents, texts, self.tokens.spans(texts), before)
        ]
        of_spans = [
            context + text[slice(*_stripped(text, *span))]
            for text, passes, (context, _) in zip(texts, cut, before)
            for spans in passes
            for span in spans
        ]
        ids = iter(self.tokens.ids(of_spans))
        for document, text, passes, (context, _) in zip(documents, texts, cut, before):
            pieces = [
                [piece for span in spans for piece in self._within(text, context, span, next(ids))] for spans in passes
            ]
            yield list(self._rows(document, text, context, pieces))

    def _contexts(self, contexts: Sequence[str], most_tokens: int) -> list[tuple[str, int]]:
        """(what stands before each chunk with its newline, how many tokens that has); cut where it is too long."""
        found = []
        for context, spans in zip(contexts, self.tokens.spans(contexts)):
            kept = context if len(spans) <= most_tokens else context[: spans[most_tokens - 1][1] if most_tokens else 0]
            found.append((f"{kept}\n", min(len(spans), most_tokens) + 1) if kept.strip() else ("", 0))
        return found

    def _passes(self, document: dict[str, Any], measured: _Measured) -> list[list[Span]]:
        wanted = sizes(self.strategy, document["source_type"], self.query_type)
        if document["source_type"] == "statute_article":
            return [cut_statute(measured, size) for size in wanted]
        return [cut_paragraphs(measured, size, document["paragraphs"]) for size in wanted]

    def _within(self, text: str, context: str, span: Span, ids: list[int]) -> list[tuple[Span, list[int], bool]]:
        """The span, or halves of it where it has more tokens by itself than it had inside its document."""
        if len(ids) <= self.tokens.max_tokens:
            return [(_stripped(text, *span), ids, False)]
        middle = _middle(text, span)
        if middle is None:
            return [(_stripped(text, *span), ids[: self.tokens.max_tokens], True)]
        halves = [(span[0], middle), (middle, span[1])]
        return [
            piece
            for half, of_half in zip(halves, self.tokens.ids([context + text[a:b].strip() for a, b in halves]))
            for piece in self._within(text, context, half, of_half)
        ]

    def _rows(
        self, document: dict[str, Any], text: str, context: str, passes: list[list[tuple[Span, list[int], bool]]]
    ) -> Iterator[tuple[Any, ...]]:
        which = document["source_type"], document["source_id"], document["content_hash"]
        group = f"{which[0]}_{which[1]}_{which[2][:8]}" if self.strategy == "hybrid" else None
        index = 0
        for pieces in passes:
            before = 0
            for (start, end), ids, truncated in pieces:
                place = index, start, end, max(0, before - start)
                said = context + text[start:end], category(end - start), group, max(0, len(context) - 1)
                yield (*which, None, *place, *said, truncated, ids)
                index, before = index + 1, end


class _Measured:
    """A text with its tokens, and how much of both a span holds."""

    def __init__(self, text: str, spans: npt.NDArray[np.int64], limit: int) -> None:
        self.text, self.limit = text, max(1, limit)
        self.starts, self.ends = spans[:, 0].tolist(), spans[:, 1].tolist()

    def fits(self, start: int, end: int, size: Size) -> bool:
        start, end = _stripped(self.text, start, end)
        return end - start <= size.most and bisect_left(self.starts, end) - bisect_right(self.ends, start) <= self.limit

    def reach(self, start: int, most: int) -> int:
        """How far a window may go that begins at `start`, which is no blank: at least one character."""
        beyond = bisect_right(self.ends, start) + self.limit
        by_tokens = self.starts[beyond] if beyond < len(self.starts) else len(self.text)
        return max(start + 1, min(start + most, by_tokens))


_ARTICLE = re.compile(r"^[ \t]*제\s*\d+\s*조(?:\s*의\s*\d+)?", re.MULTILINE)
_CLAUSE = re.compile(r"^[ \t]*(?:[\u2460-\u2473\u3251-\u325f]|제\s*\d+\s*항)", re.MULTILINE)
_ITEM = re.compile(r"^[ \t]*(?:\d+(?:의\d+)?\.|[가-하]\.)", re.MULTILINE)
_TEXT = re.compile(r"\S")
_WORD = re.compile(r"\s\S")
_BLANK_LINE = re.compile(r"\n[^\S\n]*\n\s*")
_ENDS = (re.compile(r"\n\s*"), re.compile(r"[.?!。]['\"”’)\]]*\s+"), re.compile(r"\s+"))
"""Where a window may end, best first: behind a line, a sentence, a word."""


def cut_statute(measured: _Measured, size: Size) -> list[Span]:
    """An article, a clause or an item a chunk, small ones together; text before the first header is kept."""
    pieces = _split(measured, (0, len(measured.text)), size, (_ARTICLE, _CLAUSE, _ITEM), first=True)
    return _fill(measured, pieces, size, most_pieces=1)


def cut_paragraphs(measured: _Measured, size: Size, paragraphs: Sequence[str]) -> list[Span]:
    """One to three paragraphs a chunk, more while it is small; the next chunk begins with the last ones of this."""
    marks, at = [], 0
    for paragraph in paragraphs:
        marks.append(at)
        marks += [at + match.end() for match in _BLANK_LINE.finditer(paragraph)]
        at += len(paragraph) + 1
    return _fill(measured, _pieces(measured, (0, len(measured.text)), marks), size, most_pieces=_PARAGRAPHS_A_CHUNK)


def _split(
    measured: _Measured, span: Span, size: Size, levels: Sequence[re.Pattern[str]], *, first: bool = False
) -> list[Span]:
    """`first`: articles are pieces even where several would fit into one chunk."""
    if not levels or (not first and measured.fits(*span, size)):
        return [span]
    marks = [match.start() for match in levels[0].finditer(measured.text, *span)]
    return [piece for part in _pieces(measured, span, marks) for piece in _split(measured, part, size, levels[1:])]


def _pieces(measured: _Measured, span: Span, marks: Sequence[int]) -> list[Span]:
    """The span cut at `marks`; a blank piece goes to its predecessor, the first one to its successor."""
    edges = [span[0], *sorted({mark for mark in marks if span[0] < mark < span[1]}), span[1]]
    pieces: list[Span] = []
    start = span[0]
    for end in edges[1:]:
        if measured.text[start:end].strip():
            pieces.append((start, end))
            start = end
        elif pieces:
            pieces[-1] = (pieces[-1][0], end)
            start = end
    return pieces


def _fill(measured: _Measured, pieces: Sequence[Span], size: Size, *, most_pieces: int) -> list[Span]:
    """Neighbours in one chunk while they fit; a piece that does not fit alone is cut into windows."""
    chunks: list[Span] = []
    first = 0
    while first < len(pieces):
        start, end = pieces[first]
        if not measured.fits(start, end, size):
            chunks += _windows(measured, (start, end), size)
            first += 1
            continue
        last = first + 1
        while (
            last < len(pieces)
            and (last - first < most_pieces or end - start < size.least)
            and measured.fits(start, pieces[last][1], size)
        ):
            end = pieces[last][1]
            last += 1
        chunks.append((start, end))
        if last == len(pieces):
            break
        # A step back over whole pieces, never over a chunk of one; and the piece that ends this chunk may not begin one
        # that adds nothing.
        back = max(1, int((last - first) * size.overlap)) if most_pieces > 1 and last - first > 1 else 0
        while back and not measured.fits(pieces[last - back][0], pieces[last][1], size):
            back -= 1
        first = last - back
    return chunks


def _windows(measured: _Measured, span: Span, size: Size) -> list[Span]:
    chunks: list[Span] = []
    start, overlap = span[0], int(size.most * size.overlap)
    while True:
        end = _window_end(measured, start, span[1], size)
        if chunks and end <= chunks[-1][1]:  # the overlap and the blanks behind it fill the window: go on without
            start = chunks[-1][1]
            end = _window_end(measured, start, span[1], size)
        chunks.append((start, end))
        if end >= span[1]:
            return chunks
        begin, content_end = _stripped(measured.text, start, end)
        # With a short token limit a window is shorter than the size: the overlap is a share of what it holds.
        step_back = min(overlap, int((content_end - begin) * size.overlap))
        start = _word_start(measured.text, max(begin + 1, content_end - step_back), end)


def _window_end(measured: _Measured, start: int, stop: int, size: Size) -> int:
    """Behind the blanks that follow the window's text, so that the rest begins with text or is nothing."""
    text = measured.text
    begin = _text_start(text, start, stop)
    reach = min(stop, measured.reach(begin, size.most))
    if reach < stop and not text[reach].isspace():
        earliest = begin + max(1, int((reach - begin) * _LATE_PART))
        for pattern in _ENDS:
            if found := [match.end() for match in pattern.finditer(text, earliest, reach)]:
                reach = found[-1]
                break
    return _text_start(text, reach, stop)


def _text_start(text: str, start: int, stop: int) -> int:
    """The first character that is no blank; `stop` where there is none."""
    match = _TEXT.search(text, start, stop)
    return match.start() if match else stop


def _stripped(text: str, start: int, end: int) -> Span:
    """The span without the blanks at its ends."""
    piece = text[start:end]
    return start + len(piece) - len(piece.lstrip()), start + len(piece.rstrip())


def _word_start(text: str, start: int, end: int) -> int:
    """The next beginning of a word, so that an overlap does not open inside one."""
    match = _WORD.search(text, start - 1, end)
    return match.end() - 1 if match else start


def _middle(text: str, span: Span) -> int | None:
    """A cut that leaves text on both sides, at a blank near the middle if there is one; None in a span of one
    character.
    """
    first, last = _stripped(text, *span)
    if last - first < 2:
        return None
    middle = (first + last) // 2
    near = (last - first) // 4
    blanks = [match.end() for match in re.compile(r"\s+(?=\S)").finditer(text, middle - near, middle + near)]
    return min((mark for mark in blanks if first < mark < last), key=lambda mark: abs(mark - middle), default=middle)


def looked_at_in(batch: pa.RecordBatch) -> Counter[str]:
    """How many documents, and characters of them, were looked at up to this batch's end."""
    return Counter({name.decode(): int(number) for name, number in (batch.schema.metadata or {}).items()})


def _batch(rows: list[tuple[Any, ...]], looked_at: Mapping[str, int]) -> pa.RecordBatch:
    columns: list[Sequence[Any]] = list(zip(*rows)) if rows else [()] * len(SCHEMA)
    return pa.record_batch(
        [pa.array(column, field.type) for column, field in zip(columns, SCHEMA)],
        schema=SCHEMA.with_metadata({name: str(number) for name, number in looked_at.items()}),
    )
