"""The tables beside a version's chunks that searches read: words always, vectors where `sqlite-vec` is installed.

    tables = Indexes.of(database, 5, sqlite_vec=True)
    with database.transaction(...):
        tables.ensure(dim)                  # made anew where they are absent, or not in step with the chunks
        tables.remove(which, values); tables.add(chunks)

What says that a table is in step is noted with the version, in the transaction that writes it. A run without the
package takes the note away, so a search never reads vectors that were left behind.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moai.reembedding import keyword, search, vectors, versions
from moai.reembedding.database import Database

logger = logging.getLogger(__name__)


@dataclass
class Indexes:
    database: Database
    version_id: int
    has_vectors: bool
    """Whether this connection can keep a table of vectors."""

    @classmethod
    def of(cls, database: Database, version_id: int, *, sqlite_vec: bool) -> Indexes:
        return cls(database, version_id, sqlite_vec and vectors.load(database))

    def ensure(self, dim: int | None) -> None:
        """In the caller's transaction. `dim` is None while there is no vector."""
        made = versions.get(self.database, self.version_id).made
        if made.get("words") != keyword.ANALYZER or not keyword.is_there(self.database, self.version_id):
            keyword.drop(self.database, self.version_id)
            keyword.build(self.database, self.version_id)
            versions.note(self.database, self.version_id, words=keyword.ANALYZER)
        if not self.has_vectors:
            if made.get("sqlite_vec"):
                said = "The vectors of version %d are not kept in its sqlite-vec table any more: searches compare all"
                logger.warning(said, self.version_id)
                versions.note(self.database, self.version_id, sqlite_vec=None)
        elif dim is not None and made.get("sqlite_vec") != dim:
            vectors.drop(self.database, self.version_id)
            vectors.create(self.database, self.version_id, dim)
            for ids, found in search.pages(self.database, self.version_id):
                kinds = _kinds(self.database, ids.tolist())
                rows = ((int(chunk), kinds[chunk], vector) for chunk, vector in zip(ids.tolist(), found))
                vectors.add(self.database, self.version_id, rows)
            versions.note(self.database, self.version_id, sqlite_vec=dim)

    def remove(self, which: str, keys: Sequence[tuple[Any, ...]], *, every_version: bool = False) -> None:
        """Of the chunks that are about to be deleted."""
        ids = f"SELECT id FROM text_chunks WHERE {which}"
        for version in versions.listing(self.database) if every_version else [None]:
            version_id = version.id if version else self.version_id
            if keyword.is_there(self.database, version_id):
                self.database.run_many(f"DELETE FROM {keyword.table(version_id)} WHERE rowid IN ({ids})", keys)
            if self.has_vectors and vectors.is_there(self.database, version_id):
                self.database.run_many(f"DELETE FROM {vectors.table(version_id)} WHERE rowid IN ({ids})", keys)

    def add(self, chunks: Sequence[tuple[int, dict[str, Any]]]) -> None:
        """Chunk ids with the columns of embed.SCHEMA."""
        keyword.add(
            self.database,
            self.version_id,
            ((at, chunk["source_type"], chunk["text"], chunk["context_chars"]) for at, chunk in chunks),
        )
        if self.has_vectors and chunks:
            rows = ((at, chunk["source_type"], _floats(chunk["vector"], chunk["dim"])) for at, chunk in chunks)
            vectors.add(self.database, self.version_id, rows)


def drop(database: Database, version_id: int) -> None:
    """With the version. What only an absent package can drop stays, unread, and is said."""
    keyword.drop(database, version_id)
    if not vectors.is_there(database, version_id):
        return
    if vectors.load(database):
        vectors.drop(database, version_id)
    else:
        logger.warning("Table %s stays: only with sqlite-vec (pip install it) can it go", vectors.table(version_id))


def _kinds(database: Database, ids: Sequence[int]) -> dict[int, str]:
    sql = "SELECT id, source_type FROM text_chunks WHERE id BETWEEN ? AND ?"
    return {row[0]: str(row[1]) for row in database.rows(sql, (ids[0], ids[-1]))}


def _floats(data: bytes, dim: int) -> Any:
    return np.frombuffer(data, "<f4" if len(data) == 4 * dim else "<f2").astype(np.float32)
