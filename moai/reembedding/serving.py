"""The one version that serves, whatever its strategy: an alias that a web application reads through two views.

    SELECT chunk_id, source_type, source_id, text FROM serving_chunks WHERE ...
    SELECT version_id, model, dim FROM serving_version

The alias is moved in the transaction that activates a version or rolls back, so a reader sees the old version or the
new one, whole, and never both; a program asks for `is_active` of no strategy.
"""

from __future__ import annotations

from moai.reembedding.database import Database

ALIAS = "reembed_alias"
TABLES = (
    f"CREATE TABLE IF NOT EXISTS {ALIAS}(name TEXT PRIMARY KEY CHECK(name = 'serving'), version_id INTEGER NOT NULL) "
    "WITHOUT ROWID",
)
VIEWS = (
    f"CREATE VIEW IF NOT EXISTS serving_version AS SELECT v.id AS version_id, v.version_name, v.chunking_strategy, "
    f"v.model_name AS model FROM {ALIAS} a JOIN embedding_versions v ON v.id = a.version_id WHERE a.name = 'serving'",
    f"CREATE VIEW IF NOT EXISTS serving_chunks AS SELECT c.id AS chunk_id, c.source_type, c.source_id, c.chunk_index, "
    f"c.start_char, c.end_char, c.text, c.meta, e.dim, e.vector, c.embedding_version_id AS version_id FROM "
    f"text_chunks c JOIN embeddings e ON e.chunk_id = c.id WHERE c.embedding_version_id = (SELECT version_id FROM "
    f"{ALIAS} WHERE name = 'serving')",
)


def begin(database: Database) -> None:
    """Once: the newest active version serves, since programs have read that one so far."""
    database.run(
        f"INSERT OR IGNORE INTO {ALIAS} SELECT 'serving', max(id) FROM embedding_versions WHERE is_active = 1 HAVING "
        f"max(id) IS NOT NULL"
    )


def version_id(database: Database) -> int | None:
    """None before any version was active."""
    if not database.columns(ALIAS):
        return None
    found = database.value(f"SELECT version_id FROM {ALIAS} WHERE name = 'serving'")
    return None if found is None else int(found)


def point(database: Database, version: int | None) -> None:
    """In the caller's transaction. None takes the alias away."""
    if version is None:
        database.run(f"DELETE FROM {ALIAS}")
    else:
        database.run(f"INSERT OR REPLACE INTO {ALIAS} VALUES('serving', ?)", (version,))
