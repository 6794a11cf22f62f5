"""Documents of a law database, from its original tables, page by page in the order of their ids.

    for batch in LawDocuments(path=db, version_id=5, content_key=key, doc_batch_size=300).pages():
        batch               # RecordBatch: source_type, source_id, context, paragraphs, content_hash, reason, characters

A page is a range of ids, so where it is cut depends on the table alone, and nothing but a page is ever in memory. Of a
page those documents come out whose content hash is not in the receipt; those that are gone from their table come out
in batches of their own. The document of a statute is an article's row, of the other types the parent with all its
paragraphs.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from moai.core.files import digest_json
from moai.reembedding import chunk
from moai.reembedding.chunk import GONE
from moai.reembedding.context import Templates
from moai.reembedding.database import Database, Row
from moai.reembedding.kinds import KINDS, NOT_UTF8, skip_reason

SCHEMA = pa.schema(
    [
        ("source_type", pa.string()),
        ("source_id", pa.int64()),
        ("context", pa.string()),
        ("paragraphs", pa.list_(pa.string())),
        ("content_hash", pa.string()),
        ("reason", pa.string()),
        ("characters", pa.int64()),
    ]
)
"""`reason` is set where the document gets no chunk; `context` and `paragraphs` are null then."""

_BEFORE_ALL, _AFTER_ALL = -(2**63), 2**63 - 1


def content_key(strategy: str, query_type: str | None, revision: str) -> str:
    """All that decides a document's chunks and vectors besides its text. Precision is not in it: it belongs to a
    version and does not change within one.
    """
    sizes = {
        name: [[size.least, size.most, size.overlap] for size in chunk.sizes(strategy, name, query_type)]
        for name in KINDS
    }
    made_by = {"chunk_version": chunk.VERSION, "strategy": strategy, "sizes": sizes, "query_type": query_type}
    return digest_json({**made_by, "revision": revision})


def content_hash(content_key: str, context: str, paragraphs: Sequence[bytes]) -> str:
    """sha256 (160 bits of it) of what is embedded, as it is stored, and of all that decides how."""
    head = f"{content_key} {context}\0{' '.join(str(len(paragraph)) for paragraph in paragraphs)}\0"
    return hashlib.sha256(b"".join((head.encode(), *paragraphs))).hexdigest()[:40]


@dataclass(frozen=True, kw_only=True)
class LawDocuments:
    """The documents that a version does not hold as they are now."""

    path: Path
    version_id: int
    content_key: str
    doc_batch_size: int
    source_types: tuple[str, ...] = tuple(KINDS)
    templates: Templates = field(default_factory=Templates.default)
    limit: int | None = None
    """Documents that need work, at most; None for all."""

    def pages(self) -> Iterator[pa.RecordBatch]:
        """A batch a page: the documents that need work; "documents" and "characters" in its schema's metadata say how
        many were looked at. The connection belongs to the thread that asks for the first batch.
        """
        left = self.limit
        with Database.open(self.path) as database:
            codec = str(database.value("PRAGMA encoding"))  # Python knows UTF-8, UTF-16le and UTF-16be by these names
            for source_type in self.source_types:
                for documents, characters, rows in self._pages_of(database, source_type, codec):
                    if left is not None and len(rows) > left:
                        documents = max(0, documents - len(rows) + left)  # what is left out was not looked at
                        characters -= sum(row[-1] for row in rows[left:])
                        rows = rows[:left]
                    yield _batch(rows, documents, characters)
                    if left is not None:
                        left -= len(rows)
                        if left == 0:
                            return

    def _pages_of(self, database: Database, source_type: str, codec: str) -> Iterator[tuple[int, int, list[Row]]]:
        """(documents looked at, their characters, rows of those that need work)."""
        kind, last = KINDS[source_type], _BEFORE_ALL
        while ids := [row[0] for row in database.rows(kind.page_sql(), (last, self.doc_batch_size))]:
            here = set(ids)
            known: dict[int, str] = {}
            for receipts in self._receipts(database, source_type, last, ids[-1]):
                known |= {source_id: digest for source_id, digest in receipts if source_id in here}
                if gone := [receipt for receipt in receipts if receipt[0] not in here]:
                    yield 0, 0, _gone(source_type, gone)
            texts: dict[int, list[bytes]] = {}
            characters = Counter[int]()
            for source_id, data, length in database.rows(kind.text_sql(), (ids[0], ids[-1])):
                if data is not None:
                    texts.setdefault(source_id, []).append(bytes(data))
                    characters[source_id] += length
            contexts = self.templates.contexts(database, source_type, ids[0], ids[-1])
            rows = []
            for source_id in ids:
                stored, context = texts.get(source_id, []), contexts.get(source_id, "")
                digest = content_hash(self.content_key, context, stored)
                if known.get(source_id) != digest:
                    paragraphs, reason = _paragraphs(stored, codec)
                    kept = (context, paragraphs) if reason is None else (None, None)
                    rows.append((source_type, source_id, *kept, digest, reason, characters[source_id]))
            yield len(ids), characters.total(), rows
            last = ids[-1]
        for receipts in self._receipts(database, source_type, last, _AFTER_ALL):
            yield 0, 0, _gone(source_type, receipts)

    def _receipts(self, database: Database, source_type: str, after: int, last: int) -> Iterator[list[Row]]:
        """A page at a time: between two documents that are there, any number may be gone."""
        if not database.columns("reembed_receipts"):
            return
        sql = (
            "SELECT source_id, content_hash FROM reembed_receipts WHERE version_id = ? AND source_type = ? AND "
            "source_id > ? AND source_id <= ? ORDER BY source_id LIMIT ?"
        )
        while rows := database.rows(sql, (self.version_id, source_type, after, last, self.doc_batch_size)):
            yield rows
            after = rows[-1][0]
            if len(rows) < self.doc_batch_size:
                return


def _gone(source_type: str, receipts: Sequence[Row]) -> list[Row]:
    return [(source_type, source_id, None, None, digest, GONE, 0) for source_id, digest in receipts]


def _paragraphs(stored: Sequence[bytes], codec: str) -> tuple[list[str], str | None]:
    """(the paragraphs, why they get no chunk). What is no text is never embedded as something else."""
    try:
        paragraphs = [paragraph.decode(codec) for paragraph in stored]
    except UnicodeDecodeError:
        return [], NOT_UTF8
    return paragraphs, skip_reason(paragraphs)


def _batch(rows: Sequence[Row], documents: int, characters: int) -> pa.RecordBatch:
    columns: list[Sequence[object]] = list(zip(*rows)) if rows else [()] * len(SCHEMA)
    arrays = [pa.array(column, field.type) for column, field in zip(columns, SCHEMA)]
    looked_at = {"documents": str(documents), "characters": str(characters)}
    return pa.record_batch(arrays, schema=SCHEMA.with_metadata(looked_at))
