"""Documents of a law database, from its original tables, page by page in the order of their ids.

    for batch in LawDocuments(path=db, version_id=5, content_key=key, doc_batch_size=300).pages():
        batch               # RecordBatch: source_type, source_id, paragraphs, content_hash, reason

A page is a range of ids, so where it is cut depends on the table alone, and nothing but a page is ever in memory. Of a
page those documents come out whose content hash is not in the receipt; those that are gone from their table come out
in batches of their own. The document of a statute is an article's row, of the other types the parent with all its
paragraphs.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from moai.core.errors import SourceError
from moai.core.files import digest_json
from moai.reembedding import chunk
from moai.reembedding.chunk import GONE
from moai.reembedding.database import Database, Row

NO_TEXT = "no text"
TOO_SHORT = "under 50 characters"
LEAST_CHARACTERS = 50
"""A stripped document shorter than this gets no chunk: "(삭제)", a heading, a page number."""

SCHEMA = pa.schema(
    [
        ("source_type", pa.string()),
        ("source_id", pa.int64()),
        ("paragraphs", pa.list_(pa.string())),
        ("content_hash", pa.string()),
        ("reason", pa.string()),
        ("characters", pa.int64()),
    ]
)
"""`reason` is set where the document gets no chunk; `paragraphs` is null then."""

_BEFORE_ALL, _AFTER_ALL = -(2**63), 2**63 - 1


@dataclass(frozen=True)
class Kind:
    """Where the documents of one source type are: `texts` holds their text, `parents` lists them, if it is another
    table.
    """

    texts: str
    key: str
    parents: str | None = None

    def tables(self) -> dict[str, tuple[str, ...]]:
        if self.parents is None:
            return {self.texts: (self.key, "text")}
        return {self.texts: (self.key, "para_index", "text"), self.parents: ("id",)}

    def page_sql(self) -> str:
        listed = f"SELECT {self.key} FROM {self.texts} WHERE {self.key} > ?1"
        if self.parents:
            # A merge of two indexes: a parent without paragraphs is counted, a paragraph without parent is not lost.
            listed = f"SELECT id FROM {self.parents} WHERE id > ?1 UNION {listed}"
        return f"{listed} ORDER BY 1 LIMIT ?2"

    def count_sql(self) -> str:
        parents = f"SELECT id FROM {self.parents} UNION " if self.parents else ""
        # In order, so that both sides are merged: an older SQLite keeps all ids in a temporary table otherwise.
        return f"SELECT count(*) FROM ({parents}SELECT {self.key} FROM {self.texts} ORDER BY 1)"

    def characters_sql(self) -> str:
        return f"SELECT coalesce(sum(length(text)), 0) FROM {self.texts}"

    def text_sql(self) -> str:
        order = f"{self.key}, para_index" if self.parents else self.key
        # As bytes: SQLite keeps in a TEXT column whatever was put there, valid UTF-8 or not.
        listed = f"SELECT {self.key}, CAST(text AS BLOB), length(text) FROM {self.texts}"
        return f"{listed} WHERE {self.key} BETWEEN ?1 AND ?2 ORDER BY {order}"


KINDS = {
    "statute_article": Kind("statute_articles", "id"),
    "case_paragraph": Kind("case_paragraphs", "case_id", "cases"),
    "decision_paragraph": Kind("decision_paragraphs", "decision_id", "decisions"),
    "interpretation_paragraph": Kind("interpretation_paragraphs", "interpretation_id", "interpretations"),
}
_NEEDED = {table: columns for kind in KINDS.values() for table, columns in kind.tables().items()} | {
    "text_chunks": ("id", "source_type", "source_id", "chunk_index", "text"),
    "embeddings": ("id", "chunk_id", "model", "dim", "vector"),
    "embedding_versions": (
        *("id", "version_name", "chunking_strategy", "model_name", "description", "created_at", "is_active"),
        "metadata",
    ),
}


def check_tables(database: Database) -> None:
    """Raises SourceError naming what is missing and what would have to be there."""
    found = {table: database.columns(table) for table in _NEEDED}
    missing = [table for table, columns in found.items() if not columns]
    if missing:
        what = "is not a law database" if len(missing) == len(_NEEDED) else "lacks part of a law database"
        raise SourceError(
            f"{database.path}: {what}: no table {', '.join(missing)}; name another file with --db, or run the "
            f"program's own migrations first"
        )
    for table, columns in _NEEDED.items():
        absent = [column for column in columns if column not in found[table]]
        if absent:
            raise SourceError(
                f"{database.path}: table {table} has no column {', '.join(absent)} (found: {', '.join(found[table])})"
            )


def count_documents(database: Database, source_types: Sequence[str]) -> dict[str, int]:
    return {source_type: int(database.value(KINDS[source_type].count_sql())) for source_type in source_types}


def count_characters(database: Database, source_types: Sequence[str]) -> int:
    return sum(int(database.value(KINDS[source_type].characters_sql())) for source_type in source_types)


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


def content_hash(content_key: str, paragraphs: Sequence[bytes]) -> str:
    """sha256 (160 bits of it) of what is embedded, as it is stored, and of all that decides how."""
    head = f"{content_key} {' '.join(str(len(paragraph)) for paragraph in paragraphs)}\0"
    return hashlib.sha256(b"".join((head.encode(), *paragraphs))).hexdigest()[:40]


@dataclass(frozen=True, kw_only=True)
class LawDocuments:
    """The documents that a version does not hold as they are now."""

    path: Path
    version_id: int
    content_key: str
    doc_batch_size: int
    source_types: tuple[str, ...] = tuple(KINDS)
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
            rows = []
            for source_id in ids:
                stored = texts.get(source_id, [])
                digest = content_hash(self.content_key, stored)
                if known.get(source_id) != digest:
                    paragraphs = [paragraph.decode(codec, "replace") for paragraph in stored]
                    reason = _skip_reason(paragraphs)
                    kept = None if reason else paragraphs
                    rows.append((source_type, source_id, kept, digest, reason, characters[source_id]))
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
    return [(source_type, source_id, None, digest, GONE, 0) for source_id, digest in receipts]


def _batch(rows: Sequence[Row], documents: int, characters: int) -> pa.RecordBatch:
    columns: list[Sequence[object]] = list(zip(*rows)) if rows else [()] * len(SCHEMA)
    arrays = [pa.array(column, field.type) for column, field in zip(columns, SCHEMA)]
    looked_at = {"documents": str(documents), "characters": str(characters)}
    return pa.record_batch(arrays, schema=SCHEMA.with_metadata(looked_at))


def _skip_reason(paragraphs: Sequence[str]) -> str | None:
    stripped = len("\n".join(paragraphs).strip())
    return NO_TEXT if stripped == 0 else TOO_SHORT if stripped < LEAST_CHARACTERS else None
