"""The one writer of a version: chunks, embeddings, receipts and the run's counts of several batches in one short
transaction.

    into = VersionWriter(database=database, run=run, version_id=5, ...)
    for batch in ahead(...):
        into.add(batch)          # every `commit_interval` batches that change something: delete, insert, receipts
    into.commit()

What was encoded before the transaction begins is all it needs, so it lasts milliseconds, and at no moment is a document
without the embeddings it had: before COMMIT the old ones are there, after it the new ones. The receipt row of a
document is written in the same transaction, so a document without a receipt has nothing of this version that counts.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from moai.core.errors import StorageError
from moai.core.failpoints import failpoint
from moai.reembedding.database import Database
from moai.reembedding.runs import Run, now

TABLES = (
    "CREATE TABLE IF NOT EXISTS reembed_receipts(version_id INTEGER NOT NULL, source_type TEXT NOT NULL, source_id "
    "INTEGER NOT NULL, "
    "content_hash TEXT NOT NULL, chunks INTEGER NOT NULL, tokens INTEGER NOT NULL, truncated INTEGER NOT NULL, reason "
    "TEXT, embedded_at TEXT NOT NULL, "
    "PRIMARY KEY(version_id, source_type, source_id)) WITHOUT ROWID",
)
"""A row a document that was looked at: with chunks, or with the reason why it has none."""

_LEVELS = {"statute_article": "article"}
_CHUNK_COLUMNS = (
    "id, source_type, source_id, level, chunk_index, start_char, end_char, overlap_chars, text, token_count, meta, "
    "chunking_strategy, chunk_size_category, query_type, chunk_group_id, original_document_id, embedding_version_id"
)
_META = {False: json.dumps({"truncated": False}), True: json.dumps({"truncated": True})}


@dataclass
class _Document:
    source_type: str
    source_id: int
    content_hash: str
    reason: str | None
    chunks: list[dict[str, Any]] = field(default_factory=list)

    @property
    def key(self) -> tuple[str, int]:
        return self.source_type, self.source_id


@dataclass(kw_only=True)
class VersionWriter:
    """`gone` is the reason that marks a document which left its table."""

    database: Database
    run: Run
    version_id: int
    strategy: str
    query_type: str | None
    model_name: str
    commit_interval: int
    gone: str
    replace_all_versions: bool = False
    on_change: Callable[[], None] = lambda: None
    """Called inside every transaction that changes the version: what was derived from it is stale now."""
    _waiting: list[pa.RecordBatch] = field(default_factory=list)
    """As Arrow until their transaction: as rows of Python objects they take several times as much."""

    def add(self, batch: pa.RecordBatch) -> None:
        self.run.waiting += int((batch.schema.metadata or {}).get(b"documents", b"0"))
        if batch.num_rows:
            self._waiting.append(batch)
        if not self._waiting:
            self._note_seen()
        if (
            len(self._waiting) >= self.commit_interval
        ):  # batches without a chunk too: a million deleted documents may not wait in memory
            self.commit()

    def commit(self) -> None:
        """Commit what waits. Without anything but unchanged documents there is nothing to commit."""
        if self._waiting:
            self._transact()
            self._waiting = []
        self._note_seen()

    def beat(self) -> None:
        with contextlib.suppress(
            StorageError
        ):  # a sign of life that somebody's lock swallows is missed by nobody but the monitors
            self.run.beat()

    def _note_seen(self) -> None:
        self.run.add(documents_seen=self.run.waiting)
        self.run.waiting = 0

    def _transact(self) -> None:
        before, waiting = dict(self.run.counts), self.run.waiting
        try:
            self._note_seen()
            with self.database.transaction("reembed.batch"):
                self.on_change()
                for batch in self._waiting:
                    self._write(list(_documents(batch)))
                failpoint("reembed.run_row", self.database.path)
                self.run.write()
        except BaseException:
            self.run.counts, self.run.waiting = before, waiting  # what was rolled back was not done
            raise
        self.database.run(
            "PRAGMA shrink_memory"
        )  # the page cache serves a transaction; kept, it would grow with the database

    def _write(self, documents: Sequence[_Document]) -> None:
        chunks = [chunk for document in documents for chunk in document.chunks]
        self._delete(documents)
        first = self._next_id()
        self.database.run_many(
            f"INSERT INTO text_chunks({_CHUNK_COLUMNS}) VALUES({','.join('?' * 17)})",
            _passing("reembed.insert_chunk", (self._chunk_row(first + n, chunk) for n, chunk in enumerate(chunks))),
        )
        self.database.run_many(
            "INSERT INTO embeddings(chunk_id, model, dim, vector, version_id) VALUES(?,?,?,?,?)",
            _passing(
                "reembed.insert_embedding",
                (
                    (first + n, self.model_name, chunk["dim"], chunk["vector"], self.version_id)
                    for n, chunk in enumerate(chunks)
                ),
            ),
        )
        self._receipts(documents)
        self._count(documents, chunks)

    def _delete(self, documents: Sequence[_Document]) -> None:
        which, values = "source_type = ? AND source_id = ?", [document.key for document in documents]
        keys: list[tuple[Any, ...]] = list(values)
        if not self.replace_all_versions:
            which += " AND embedding_version_id = ?"
            keys = [(*key, self.version_id) for key in values]
        # Looked for first: without an index on chunk_id each of these would search all embeddings, also for a document
        # that is new.
        old = [key for key in keys if self.database.row(f"SELECT 1 FROM text_chunks WHERE {which} LIMIT 1", key)]
        # By document, never "type IN (...) AND id IN (...)": that also meets one document's type with another one's id.
        self.database.run_many(
            f"DELETE FROM embeddings WHERE chunk_id IN (SELECT id FROM text_chunks WHERE {which})",
            _passing("reembed.delete_embeddings", old),
        )
        self.database.run_many(f"DELETE FROM text_chunks WHERE {which}", _passing("reembed.delete_chunks", old))
        if self.replace_all_versions:
            self.database.run_many(
                "DELETE FROM reembed_receipts WHERE source_type = ? AND source_id = ?",
                _passing("reembed.delete_receipts", keys),
            )

    def _next_id(self) -> int:
        """Read inside the transaction, so no other id comes between; never one that was given before."""
        failpoint("reembed.next_id", self.database.path)
        highest = int(self.database.value("SELECT max(id) FROM text_chunks") or 0)
        given = (
            self.database.value("SELECT seq FROM sqlite_sequence WHERE name = 'text_chunks'")
            if self.database.columns("sqlite_sequence")
            else 0
        )
        return max(highest, int(given or 0)) + 1

    def _chunk_row(self, chunk_id: int, chunk: dict[str, Any]) -> tuple[Any, ...]:
        return (
            chunk_id,
            chunk["source_type"],
            chunk["source_id"],
            _LEVELS.get(chunk["source_type"], "paragraph"),
            chunk["chunk_index"],
            chunk["start_char"],
            chunk["end_char"],
            chunk["overlap_chars"],
            chunk["text"],
            chunk["token_count"],
            _META[chunk["truncated"]],
            self.strategy,
            chunk["category"],
            self.query_type,
            chunk["group_id"],
            chunk["source_id"],
            self.version_id,
        )

    def _receipts(self, documents: Sequence[_Document]) -> None:
        at = now()
        kept = [document for document in documents if document.reason != self.gone]
        rows = (
            (
                self.version_id,
                *document.key,
                document.content_hash,
                len(document.chunks),
                sum(chunk["token_count"] for chunk in document.chunks),
                sum(chunk["truncated"] for chunk in document.chunks),
                document.reason,
                at,
            )
            for document in kept
        )
        self.database.run_many(
            "INSERT OR REPLACE INTO reembed_receipts VALUES(?,?,?,?,?,?,?,?,?)", _passing("reembed.receipt", rows)
        )
        vanished = [(self.version_id, *document.key) for document in documents if document.reason == self.gone]
        self.database.run_many(
            "DELETE FROM reembed_receipts WHERE version_id = ? AND source_type = ? AND source_id = ?",
            _passing("reembed.forget", vanished),
        )

    def _count(self, documents: Sequence[_Document], chunks: Sequence[dict[str, Any]]) -> None:
        gone = sum(document.reason == self.gone for document in documents)
        with_chunks = sum(bool(document.chunks) for document in documents)
        self.run.add(
            documents_embedded=with_chunks,
            documents_gone=gone,
            documents_skipped=len(documents) - with_chunks - gone,
            chunks=len(chunks),
            tokens=sum(chunk["token_count"] for chunk in chunks),
            truncated=sum(chunk["truncated"] for chunk in chunks),
        )


def _documents(batch: pa.RecordBatch) -> Iterator[_Document]:
    """Neighbouring rows of one document together."""
    document: _Document | None = None
    for row in batch.to_pylist():
        if document is None or document.key != (row["source_type"], row["source_id"]):
            if document is not None:
                yield document
            document = _Document(row["source_type"], row["source_id"], row["content_hash"], row["reason"])
        if row["chunk_index"] is not None:
            document.chunks.append(row)
    if document is not None:
        yield document


def _passing(place: str, rows: Iterable[Sequence[Any]]) -> Iterator[Sequence[Any]]:
    """`rows`, with a failpoint before each statement that is made of one."""
    for row in rows:
        failpoint(place)
        yield row
