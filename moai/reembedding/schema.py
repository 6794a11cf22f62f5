"""What moai adds to a law database, and the one thing it changes: the unique index of text_chunks takes in the version.

    migrate(database, old_index(database), backup=True, indexes=True)      # a backup, then one transaction; once
    restore_index(database)                                                # the way back

Before, a document has chunks of one version only. Every statement here can be run twice.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from moai.core.errors import ConfigError, StorageError
from moai.core.failpoints import failpoint
from moai.core.files import free_bytes
from moai.reembedding import runs, serving, writer
from moai.reembedding.database import Database, staged

logger = logging.getLogger(__name__)

OLD_KEY = ("source_type", "source_id", "chunk_index")
NEW_KEY = ("source_type", "source_id", "embedding_version_id", "chunk_index")
_USUAL_INDEX = "ux_text_chunks"
_WITH_VERSION = "_version"
"""What the new unique index has behind the name of the old one, so that the way back finds that name."""
_ADDED_COLUMNS = {
    "text_chunks": (
        *("level TEXT", "start_char INTEGER", "end_char INTEGER", "overlap_chars INTEGER", "token_count INTEGER"),
        *("meta TEXT", "chunking_strategy TEXT", "chunk_size_category TEXT", "query_type TEXT", "chunk_group_id TEXT"),
        *("original_document_id INTEGER", "embedding_version_id INTEGER"),
    ),
    "embeddings": ("version_id INTEGER",),
}
"""Of the law program's own migrations 002 and 004, for a database that has not seen them."""
_INDEXES = (
    "CREATE INDEX IF NOT EXISTS ix_chunks_lookup ON text_chunks(source_type, source_id, chunking_strategy, "
    "embedding_version_id)",
    "CREATE INDEX IF NOT EXISTS ix_reembed_chunk_version ON text_chunks(embedding_version_id)",
    # Without it every deleted chunk makes the foreign key search all embeddings.
    "CREATE INDEX IF NOT EXISTS ix_reembed_embedding_chunk ON embeddings(chunk_id)",
    "CREATE INDEX IF NOT EXISTS ix_reembed_embedding_version ON embeddings(version_id)",
)
ACTIVATIONS = (
    "CREATE TABLE IF NOT EXISTS reembed_activations(id INTEGER PRIMARY KEY, strategy TEXT NOT NULL, "
    "version_id INTEGER NOT NULL, previous_id INTEGER, at TEXT NOT NULL)"
)


def tune(database: Database, values: Mapping[str, int]) -> None:
    """PRAGMAs of the one writer. The journal mode comes first: the others are meant for it."""
    mode = database.value("PRAGMA journal_mode = WAL")
    if mode != "wal":
        said = "%s: no WAL here (journal_mode %s), so monitors may have to wait for commits"
        logger.warning(said, database.path, mode)
    for name, value in {"synchronous": "NORMAL", "foreign_keys": "ON", "temp_store": "MEMORY", **values}.items():
        database.run(f"PRAGMA {name} = {value}")


def old_index(database: Database) -> str | None:
    """The unique index that has to be migrated; None where it is done. Raises ConfigError where it cannot be."""
    old = _unique_index(database, OLD_KEY)
    if old is not None and old.startswith("sqlite_autoindex"):
        raise ConfigError(
            f"{database.path}: UNIQUE(source_type, source_id, chunk_index) is part of the table text_chunks itself, so "
            f"two versions cannot stand beside each other; "
            "rebuild the table without it, or use --replace-all-versions, which keeps one version"
        )
    return old


def migrate(database: Database, old: str | None, *, backup: bool, indexes: bool) -> Path | None:
    """Add what is missing and take the version into the unique index `old`, if any. Returns the backup, if one was
    made.
    """
    copy = _back_up(database) if old is not None and backup else None
    with database.transaction("reembed.migrate"):
        for table, columns in _ADDED_COLUMNS.items():
            present = database.columns(table)
            for column in columns:
                if column.split()[0] not in present:
                    database.run(f"ALTER TABLE {table} ADD COLUMN {column}")
        for sql in _INDEXES if indexes else ():
            database.run(sql)
        if old is not None:
            failpoint("reembed.drop_index", database.path)
            database.run(f'DROP INDEX "{old}"')
            failpoint("reembed.create_index", database.path)
            database.run(f'CREATE UNIQUE INDEX "{old}{_WITH_VERSION}" ON text_chunks({", ".join(NEW_KEY)})')
        for sql in serving.VIEWS:  # they name columns that were added above
            database.run(sql)
    if old is not None:
        logger.info(
            "The unique index of text_chunks now includes the version, so that versions stand side by side; way back: "
            "restore-index"
        )
    return copy


def create_tables(database: Database) -> None:
    """Those of moai that are not there."""
    with database.transaction("reembed.tables"):
        for sql in (*writer.TABLES, *runs.TABLES, ACTIVATIONS, *serving.TABLES):
            failpoint("reembed.create", database.path)
            database.run(sql)
        if "served_id" not in database.columns("reembed_activations"):
            database.run("ALTER TABLE reembed_activations ADD COLUMN served_id INTEGER")
        serving.begin(database)
        for table, columns in runs.ADDED_COLUMNS.items():
            for column in set(columns) - set(database.columns(table)):
                database.run(f"ALTER TABLE {table} ADD COLUMN {column} INTEGER NOT NULL DEFAULT 0")


def restore_index(database: Database) -> str:
    """Put the unique index back, and say so. Raises ConfigError while two versions hold chunks of one document."""
    if _unique_index(database, OLD_KEY):
        return "The unique index is the original one already"
    key = ", ".join(OLD_KEY)
    clashing = database.value(f"SELECT count(*) FROM (SELECT 1 FROM text_chunks GROUP BY {key} HAVING count(*) > 1)")
    if clashing:
        found = database.rows("SELECT DISTINCT embedding_version_id FROM text_chunks ORDER BY 1")
        versions = [str(row[0] or "no version") for row in found]
        raise ConfigError(
            f"{database.path}: {clashing:,} chunks stand in more than one version ({', '.join(versions)}); "
            "delete all versions but one first (reembed delete --version-id N), or restore the backup"
        )
    new = _unique_index(database, NEW_KEY)
    with database.transaction("reembed.restore"):
        if new:
            database.run(f'DROP INDEX "{new}"')
        name = (new or _USUAL_INDEX).removesuffix(_WITH_VERSION)
        database.run(f'CREATE UNIQUE INDEX "{name}" ON text_chunks({key})')
    return "The unique index is the original one again"


def _back_up(database: Database) -> Path:
    """A copy as it was before the first migration; one from a run which died before its migration is made anew."""
    final = database.path.with_name(f"{database.path.name}.before-reembed.bak")
    need, free = database.path.stat().st_size, free_bytes(database.path.parent)
    if need > free:
        raise StorageError(
            f"{final}: the backup needs {need / 2**20:,.0f} MiB, {free / 2**20:,.0f} MiB are free; free space there, "
            f"or keep a copy yourself and use --no_backup"
        )
    with staged(final, "reembed.backup_rename") as part:
        failpoint("reembed.backup", part)
        database.copy_to(part)
    logger.info("Backup before the migration: %s", final)
    return final


def _unique_index(database: Database, key: tuple[str, ...]) -> str | None:
    """Its name: of a unique index on exactly these columns, in any order."""
    for (name,) in database.rows("SELECT name FROM pragma_index_list('text_chunks') WHERE \"unique\" = 1"):
        columns = [row[0] for row in database.rows("SELECT name FROM pragma_index_info(?)", (name,))]
        if sorted(map(str, columns)) == sorted(key):
            return str(name)
    return None
