"""The one writer of a version: several batches with their receipts and the run's counts in one short transaction.

    writer = VersionWriter(database=database, run=run, version_id=5, ...)
    for batch in Prefetch(...):
        writer.add(batch)        # every `commit_interval` batches that change something: delete, insert, receipts
    writer.commit()

What a transaction needs is encoded before it begins. A document without a receipt has nothing that counts. What is
encoded of a batch that is not done is kept beside, when a minute has passed or the run is stopped.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from moai.core.errors import StorageError
from moai.core.failpoints import failpoint
from moai.reembedding.chunk import GONE, looked_at_in
from moai.reembedding.database import Database
from moai.reembedding.embed import Unfinished
from moai.reembedding.indexes import Indexes
from moai.reembedding.runs import Run, now

TABLES = (
    "CREATE TABLE IF NOT EXISTS reembed_receipts(version_id INTEGER NOT NULL, source_type TEXT NOT NULL, "
    "source_id INTEGER NOT NULL, content_hash TEXT NOT NULL, chunks INTEGER NOT NULL, tokens INTEGER NOT NULL, "
    "truncated INTEGER NOT NULL, reason TEXT, embedded_at TEXT NOT NULL, "
    "PRIMARY KEY(version_id, source_type, source_id)) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS reembed_unfinished(version_id INTEGER NOT NULL, batch TEXT NOT NULL, "
    "place INTEGER NOT NULL, vector BLOB NOT NULL, PRIMARY KEY(version_id, place)) WITHOUT ROWID",
)
"""`reembed_receipts`: a row a document that was looked at, with chunks, or with the reason why it has none.
`reembed_unfinished`: float32 vectors of the one batch of a version that was left half encoded.
"""

_CHUNK_COLUMNS = (
    "id, source_type, source_id, level, chunk_index, start_char, end_char, overlap_chars, text, token_count, meta, "
    "chunking_strategy, chunk_size_category, query_type, chunk_group_id, original_document_id, embedding_version_id"
)


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
    database: Database
    run: Run
    version_id: int
    strategy: str
    query_type: str | None
    model_name: str
    commit_interval: int
    indexes: Indexes
    commit_seconds: float = 60.0
    replace_all_versions: bool = False
    on_change: Callable[[], None] = lambda: None
    """Called inside every transaction that changes the version: what was derived from it is stale now."""
    _waiting: list[pa.RecordBatch] = field(default_factory=list)
    """As Arrow until their transaction: as rows of Python objects they take several times as much."""
    _committed_at: float = field(default_factory=time.monotonic)

    def add(self, batch: pa.RecordBatch) -> None:
        self.hold(batch)
        # Batches without a chunk count too: a million deleted documents may not wait in memory.
        if not self._waiting or len(self._waiting) >= self.commit_interval:
            self.commit()

    def hold(self, batch: pa.RecordBatch) -> None:
        """Take the batch for the next commit."""
        self.run.waiting.update(looked_at_in(batch))
        if batch.num_rows:
            self._waiting.append(batch)

    def commit(self, unfinished: Unfinished | None = None) -> None:
        """Commit what waits. Without anything but unchanged documents there is nothing to commit."""
        if self._waiting or unfinished:
            self._transact(unfinished)
            self._waiting = []
        self._note_seen()
        self._committed_at = time.monotonic()

    def beat(self, unfinished: Callable[[], Unfinished | None] = lambda: None) -> None:
        """A sign of life; and a commit where the last one is `commit_seconds` ago."""
        if time.monotonic() - self._committed_at >= self.commit_seconds:
            self.commit(unfinished())
        with contextlib.suppress(StorageError):  # a sign of life is not worth a run
            self.run.beat()

    def unfinished(self) -> Unfinished | None:
        """What the run before left of a batch."""
        rows = self.database.rows(
            "SELECT batch, place, vector FROM reembed_unfinished WHERE version_id = ?", (self.version_id,)
        )
        return Unfinished(rows[0][0], {place: np.frombuffer(data, "<f4") for _, place, data in rows}) if rows else None

    def _note_seen(self) -> None:
        waiting = self.run.waiting
        self.run.add(documents_seen=waiting["documents"], characters_seen=waiting["characters"])
        self.run.waiting = Counter()

    def _transact(self, unfinished: Unfinished | None) -> None:
        before, waiting = dict(self.run.counts), self.run.waiting
        try:
            self._note_seen()
            with self.database.transaction("reembed.batch"):
                self.on_change()
                self._keep(unfinished)
                for batch in self._waiting:
                    self._write(_documents(batch))
                failpoint("reembed.run_row", self.database.path)
                self.run.write()
        except BaseException:
            self.run.counts, self.run.waiting = before, waiting  # what was rolled back was not done
            raise
        self.database.run("PRAGMA shrink_memory")  # a page cache that is kept would grow with the database

    def _keep(self, unfinished: Unfinished | None) -> None:
        self.database.run("DELETE FROM reembed_unfinished WHERE version_id = ?", (self.version_id,))
        if unfinished:
            self.database.run_many(
                "INSERT INTO reembed_unfinished VALUES(?,?,?,?)",
                (
                    (self.version_id, unfinished.batch, place, vector.astype("<f4").tobytes())
                    for place, vector in unfinished.vectors.items()
                ),
            )

    def _write(self, documents: Sequence[_Document]) -> None:
        self.indexes.ensure(next((chunk["dim"] for document in documents for chunk in document.chunks), None))
        self._delete(documents)
        first = self._next_id()
        chunks = list(enumerate((chunk for document in documents for chunk in document.chunks), first))
        self._each(
            "reembed.insert_chunk",
            f"INSERT INTO text_chunks({_CHUNK_COLUMNS}) VALUES({','.join('?' * 17)})",
            (self._chunk_row(chunk_id, chunk) for chunk_id, chunk in chunks),
        )
        self._each(
            "reembed.insert_embedding",
            "INSERT INTO embeddings(chunk_id, model, dim, vector, version_id) VALUES(?,?,?,?,?)",
            ((at, self.model_name, chunk["dim"], chunk["vector"], self.version_id) for at, chunk in chunks),
        )
        failpoint("reembed.indexes", self.database.path)
        self.indexes.add(chunks)
        self._receipts(documents)

    def _each(self, place: str, sql: str, rows: Iterable[Sequence[Any]]) -> None:
        """A statement for each row, with a failpoint before it."""

        def passing() -> Iterator[Sequence[Any]]:
            for row in rows:
                failpoint(place)
                yield row

        self.database.run_many(sql, passing())

    def _delete(self, documents: Sequence[_Document]) -> None:
        which = "source_type = ? AND source_id = ?"
        keys: list[tuple[Any, ...]] = [document.key for document in documents]
        if not self.replace_all_versions:
            which += " AND embedding_version_id = ?"
            keys = [(*key, self.version_id) for key in keys]
        # Looked for first: without an index on chunk_id each would search all embeddings, for a new document too.
        old = [key for key in keys if self.database.row(f"SELECT 1 FROM text_chunks WHERE {which} LIMIT 1", key)]
        # By document, never "type IN (...) AND id IN (...)": that also meets one document's type with another one's id.
        self.indexes.remove(which, old, every_version=self.replace_all_versions)
        embeddings = f"DELETE FROM embeddings WHERE chunk_id IN (SELECT id FROM text_chunks WHERE {which})"
        self._each("reembed.delete_embeddings", embeddings, old)
        self._each("reembed.delete_chunks", f"DELETE FROM text_chunks WHERE {which}", old)
        if self.replace_all_versions:
            self._each("reembed.delete_receipts", f"DELETE FROM reembed_receipts WHERE {which}", keys)

    def _next_id(self) -> int:
        """Read inside the transaction, so no other id comes between; never one that was given before."""
        failpoint("reembed.next_id", self.database.path)
        highest = int(self.database.value("SELECT max(id) FROM text_chunks") or 0)
        given = 0
        if self.database.columns("sqlite_sequence"):
            given = self.database.value("SELECT seq FROM sqlite_sequence WHERE name = 'text_chunks'") or 0
        return max(highest, int(given)) + 1

    def _chunk_row(self, chunk_id: int, chunk: dict[str, Any]) -> tuple[Any, ...]:
        named = ("chunk_index", "start_char", "end_char", "overlap_chars", "text", "token_count")
        return (
            *(chunk_id, chunk["source_type"], chunk["source_id"]),
            "article" if chunk["source_type"] == "statute_article" else "paragraph",
            *(chunk[name] for name in named),
            json.dumps({name: chunk[name] for name in ("truncated", "context_chars")}),
            *(self.strategy, chunk["category"], self.query_type),
            *(chunk["group_id"], chunk["source_id"], self.version_id),
        )

    def _receipts(self, documents: Sequence[_Document]) -> None:
        at, rows, gone = now(), [], []
        for document in documents:
            chunks = document.chunks
            tokens = sum(chunk["token_count"] for chunk in chunks)
            truncated = sum(chunk["truncated"] for chunk in chunks)
            self.run.add(chunks=len(chunks), tokens=tokens, truncated=truncated)
            if document.reason == GONE:
                gone.append((self.version_id, *document.key))
                self.run.add(documents_gone=1)
            else:
                counts = (len(chunks), tokens, truncated)
                rows.append((self.version_id, *document.key, document.content_hash, *counts, document.reason, at))
                self.run.add(**{"documents_embedded" if chunks else "documents_skipped": 1})
        self._each("reembed.receipt", "INSERT OR REPLACE INTO reembed_receipts VALUES(?,?,?,?,?,?,?,?,?)", rows)
        forget = "DELETE FROM reembed_receipts WHERE version_id = ? AND source_type = ? AND source_id = ?"
        self._each("reembed.forget", forget, gone)


def _documents(batch: pa.RecordBatch) -> list[_Document]:
    """Neighbouring rows of one document together."""
    documents: list[_Document] = []
    for row in batch.to_pylist():
        if not documents or documents[-1].key != (row["source_type"], row["source_id"]):
            documents.append(_Document(row["source_type"], row["source_id"], row["content_hash"], row["reason"]))
        if row["chunk_index"] is not None:
            documents[-1].chunks.append(row)
    return documents
