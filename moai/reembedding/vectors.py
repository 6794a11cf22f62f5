"""The vectors of one version in a `sqlite-vec` table: inside the database, in the transaction that writes the chunks,
so it cannot go stale.

    if vectors.load(database):                                   # where the package is installed
        vectors.find(database, 5, query, k=10)                   # [(cosine, chunk id), ...], best first

It compares with every vector, as brute force does, but without carrying them through Python.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from moai.reembedding.database import Database

MOST = 4096
"""What sqlite-vec gives at most."""


def load(database: Database) -> bool:
    """Whether this connection has sqlite-vec now."""
    try:
        import sqlite_vec
    except ImportError:
        return False
    return database.load_extension(sqlite_vec.loadable_path())


def table(version_id: int) -> str:
    return f"reembed_vectors_{version_id}"


def is_there(database: Database, version_id: int) -> bool:
    """Whether the table is, also where the module that reads it is not."""
    return database.row("SELECT 1 FROM sqlite_master WHERE name = ?", (table(version_id),)) is not None


def create(database: Database, version_id: int, dim: int) -> None:
    database.run(
        f"CREATE VIRTUAL TABLE {table(version_id)} USING vec0(embedding float[{dim}] distance_metric=cosine, kind text)"
    )


def drop(database: Database, version_id: int) -> None:
    database.run(f"DROP TABLE IF EXISTS {table(version_id)}")


def add(database: Database, version_id: int, rows: Iterable[tuple[int, str, npt.NDArray[np.float32]]]) -> None:
    """(chunk id, source type, vector) each."""
    database.run_many(
        f"INSERT INTO {table(version_id)}(rowid, embedding, kind) VALUES(?,?,?)",
        ((chunk_id, vector.astype("<f4").tobytes(), kind) for chunk_id, kind, vector in rows),
    )


def find(
    database: Database,
    version_id: int,
    query: npt.NDArray[np.float32],
    *,
    k: int,
    source_types: Sequence[str] = (),
) -> list[tuple[float, int]]:
    sql = f"SELECT distance, rowid FROM {table(version_id)} WHERE embedding MATCH ? AND k = ?"
    values = (query.astype("<f4").tobytes(), min(k, MOST))
    if source_types:
        found = [row for kind in source_types for row in database.rows(f"{sql} AND kind = ?", (*values, kind))]
    else:
        found = database.rows(sql, values)
    return sorted(((1 - float(distance), int(chunk)) for distance, chunk in found), key=lambda hit: (-hit[0], hit[1]))[
        :k
    ]
