"""Versions of the embeddings of one database: register, list, compare, activate, roll back, delete.

A strategy has one active version at most, which is what programs that read the database ask for. How a version was made
is in its `metadata`, under "moai".
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from moai.core.errors import ConfigError
from moai.core.failpoints import failpoint
from moai.reembedding import serving as alias
from moai.reembedding.database import Database
from moai.reembedding.runs import now, refuse_while_running

logger = logging.getLogger(__name__)

_DELETE_AT_ONCE = 2000
_ACTIVATED = "INSERT INTO reembed_activations(strategy, version_id, previous_id, served_id, at) VALUES(?,?,?,?,?)"
_DELETED = 0
"""Stands for a version that is deleted since, whose number may be given again; no version has it."""


@dataclass(frozen=True)
class Version:
    id: int
    name: str
    strategy: str
    model_name: str
    is_active: bool
    metadata: dict[str, Any]
    created_at: str

    @property
    def made(self) -> dict[str, Any]:
        """What moai noted of how it was made; empty for a version of another program."""
        return dict(self.metadata.get("moai", {}))

    @property
    def is_complete(self) -> bool:
        return bool(self.made.get("complete"))


def listing(database: Database) -> list[Version]:
    return _select(database, "ORDER BY id")


def find(database: Database, version_id: int) -> Version | None:
    return next(iter(_select(database, "WHERE id = ?", version_id)), None)


def get(database: Database, version_id: int) -> Version:
    """Raises ConfigError naming those that are there."""
    found = find(database, version_id)
    if found is None:
        there = ", ".join(str(version.id) for version in listing(database)) or "none"
        raise ConfigError(f"version_id = {version_id}: no such version (there are: {there})")
    return found


def active(database: Database, strategy: str) -> Version | None:
    found = _select(database, "WHERE chunking_strategy = ? AND is_active = 1 ORDER BY id DESC LIMIT 1", strategy)
    return found[0] if found else None


def wanted(database: Database, version_id: int | None, strategy: str) -> Version | None:
    """By number, else the strategy's active one, else v1.0.0-<strategy>; None where it must be registered."""
    if version_id is not None:
        return find(database, version_id)
    named = _select(database, "WHERE version_name = ?", f"v1.0.0-{strategy}")
    return active(database, strategy) or (named[0] if named else None)


def register(database: Database, version_id: int | None, strategy: str, model_name: str) -> Version:
    """A new, inactive version under its number."""
    name = f"v{1 if version_id is None else version_id}.0.0-{strategy}"
    taken = {version.name for version in listing(database)}
    if name in taken:
        name = next(f"{name}.{n}" for n in range(2, len(taken) + 3) if f"{name}.{n}" not in taken)
    with database.transaction("reembed.register"):
        database.run(
            "INSERT INTO embedding_versions(id, version_name, chunking_strategy, model_name, description, is_active, "
            "metadata) VALUES(?,?,?,?,?,0,?)",
            (version_id, name, strategy, model_name, "made by moai", "{}"),
        )
        registered = int(database.value("SELECT last_insert_rowid()"))
    logger.info("Registered version %d (%s)", registered, name)
    return get(database, registered)


def note(database: Database, version_id: int, **changes: Any) -> None:
    """Change what `metadata` says under "moai", in the caller's transaction or on its own; None removes a name."""
    metadata = get(database, version_id).metadata
    made = {**metadata.get("moai", {}), **changes}
    metadata["moai"] = {name: value for name, value in made.items() if value is not None}
    database.run(
        "UPDATE embedding_versions SET metadata = ? WHERE id = ?",
        (json.dumps(metadata, ensure_ascii=False, sort_keys=True), version_id),
    )


def serving(database: Database) -> Version | None:
    """The version that the serving alias names."""
    found = alias.version_id(database)
    return None if found is None else find(database, found)


def activate(database: Database, version_id: int, **noted: Any) -> Version | None:
    """Make it its strategy's active version and the one that serves, in one transaction with `noted`. Returns another
    one of the strategy that was active.
    """
    with database.transaction("reembed.activate"):
        version = get(database, version_id)
        before = active(database, version.strategy)
        if noted:
            note(database, version_id, **noted)
        served = alias.version_id(database)
        alias.point(database, version_id)
        if before and before.id == version_id:
            before = None
            if served != version_id:
                database.run(_ACTIVATED, (version.strategy, version_id, version_id, served, now()))
        else:
            failpoint("reembed.deactivate", database.path)
            database.run(
                "UPDATE embedding_versions SET is_active = 0 WHERE chunking_strategy = ? AND id <> ?",
                (version.strategy, version_id),
            )
            failpoint("reembed.set_active", database.path)
            database.run("UPDATE embedding_versions SET is_active = 1 WHERE id = ?", (version_id,))
            database.run(_ACTIVATED, (version.strategy, version_id, before.id if before else None, served, now()))
    return before


def roll_back(database: Database, strategy: str) -> tuple[int, int | None]:
    """Undo the last activation. Returns the version that was active, and the one that is now. Raises ConfigError."""
    with database.transaction("reembed.roll_back"):
        row = database.row(
            "SELECT id, version_id, previous_id, served_id FROM reembed_activations WHERE strategy = ? ORDER BY id "
            "DESC LIMIT 1",
            (strategy,),
        )
        if row is None:
            raise ConfigError(
                f"nothing to roll back: moai has activated no version of strategy {strategy} (name another with "
                f"--chunking-strategy)"
            )
        activation, version_id, previous, served = row
        if previous == _DELETED:
            raise ConfigError(
                f"the version that was active before version {version_id} is deleted: activate another one instead"
            )
        if previous is not None and not _chunks(database, previous):
            raise ConfigError(
                f"version {previous}, which was active before version {version_id}, holds no chunks any more: activate "
                f"another one instead"
            )
        database.run("UPDATE embedding_versions SET is_active = 0 WHERE chunking_strategy = ?", (strategy,))
        if previous is not None:
            database.run("UPDATE embedding_versions SET is_active = 1 WHERE id = ?", (previous,))
        database.run("DELETE FROM reembed_activations WHERE id = ?", (activation,))
        if alias.version_id(database) == version_id:
            alias.point(database, served if served and find(database, served) else previous)
    return version_id, previous


def _chunks(database: Database, version_id: int) -> bool:
    return database.row("SELECT 1 FROM text_chunks WHERE embedding_version_id = ? LIMIT 1", (version_id,)) is not None


_LOST = (
    "FROM reembed_receipts AS r WHERE version_id = ?1 AND chunks <> (SELECT count(*) FROM text_chunks c JOIN "
    "embeddings ON chunk_id = c.id WHERE c.source_type = r.source_type AND c.source_id = r.source_id AND "
    "c.embedding_version_id = ?1)"
)


def problems(database: Database) -> Iterator[str]:
    """What is wrong with the file, or with the versions in it, in words; every page of the file is read."""
    for (found,) in database.rows("PRAGMA integrity_check"):
        if found != "ok":
            yield str(found)
    for table in ("text_chunks", "embeddings"):
        for _, row, parent, _ in database.rows(f"PRAGMA foreign_key_check({table})"):
            yield f"{table} {row} belongs to a row of {parent} that is not there"
    for version in listing(database):
        if version.made and (lost := int(database.value(f"SELECT count(*) {_LOST}", (version.id,)))):
            yield f"version {version.id}: {lost:,} documents have lost chunks or embeddings; run its build again"


def forget_lost(database: Database, version_id: int) -> int:
    """Drop the receipts of documents whose chunks or embeddings another program has taken away; how many."""
    different = database.rows(
        "SELECT coalesce(sum(chunks), 0) FROM reembed_receipts WHERE version_id = ?1 UNION SELECT count(*) FROM "
        "text_chunks WHERE embedding_version_id = ?1 UNION SELECT count(*) FROM embeddings WHERE version_id = ?1",
        (version_id,),
    )
    if len(different) == 1:
        return 0
    with database.transaction("reembed.forget_lost"):
        database.run(f"DELETE {_LOST}", (version_id,))
        lost = database.changes()
        if lost:
            note(database, version_id, complete=False, faiss=None)
    return lost


def statistics(database: Database, version_id: int) -> dict[str, Any]:
    """Chunks, documents, embeddings and sizes, and documents without chunks by reason."""
    chunks, documents, characters, longest, tokens = database.rows(
        "SELECT count(*), count(DISTINCT source_type || ' ' || source_id), coalesce(sum(length(text)), 0), "
        "coalesce(max(length(text)), 0), sum(token_count) FROM text_chunks WHERE embedding_version_id = ?",
        (version_id,),
    )[0]
    embedded, least, most = database.rows(
        "SELECT count(*), min(dim), max(dim) FROM embeddings JOIN text_chunks ON text_chunks.id = chunk_id WHERE "
        "embedding_version_id = ?",
        (version_id,),
    )[0]
    return {
        "documents": documents,
        "chunks": chunks,
        "embeddings": embedded,
        "dim": least if least == most else [least, most],
        "mean_characters": round(characters / chunks, 1) if chunks else 0.0,
        "longest_characters": longest,
        "tokens": tokens or 0,
        "skipped": skipped(database, version_id),
    }


def skipped(database: Database, version_id: int) -> dict[str, int]:
    """Documents without chunks, by reason."""
    if not database.columns("reembed_receipts"):
        return {}
    sql = "SELECT reason, count(*) FROM reembed_receipts WHERE version_id = ? AND reason IS NOT NULL GROUP BY reason"
    return dict(database.rows(sql, (version_id,)))


def skipped_for(database: Database, version_id: int, reason: str, *, most: int = 3) -> list[str]:
    """The first documents that have no chunks for this reason."""
    sql = (
        "SELECT source_type || ' ' || source_id FROM reembed_receipts WHERE version_id = ? AND reason = ? ORDER BY "
        "source_type, source_id LIMIT ?"
    )
    return [str(row[0]) for row in database.rows(sql, (version_id, reason, most))]


def only_in(database: Database, version_id: int, other_id: int) -> int:
    """Documents that have chunks in the first version and none in the second."""
    documents = "SELECT source_type, source_id FROM text_chunks WHERE embedding_version_id = ?"
    return int(database.value(f"SELECT count(*) FROM ({documents} EXCEPT {documents})", (version_id, other_id)))


def delete(database: Database, version_id: int, *, on_end: Callable[[], None] = lambda: None) -> int:
    """Delete a version with its chunks and embeddings, a piece at a time. Returns the number of chunks. `on_end` is
    called in the last transaction.

    Raises ConfigError for an active one, StorageError while a run is at work. Each piece looks again: a run that began
    between two of them finds no receipts of what is deleted and makes the version whole.
    """
    deleted = 0
    while True:
        with database.transaction("reembed.delete"):
            refuse_while_running(database)
            if get(database, version_id).is_active or alias.version_id(database) == version_id:
                raise ConfigError(f"version {version_id} is active: activate another one or roll back first")
            note(database, version_id, complete=False)
            database.run("DELETE FROM reembed_receipts WHERE version_id = ?", (version_id,))
            some = "SELECT id FROM text_chunks WHERE embedding_version_id = ? ORDER BY id LIMIT ?"
            ids = database.rows(some, (version_id, _DELETE_AT_ONCE))
            database.run_many("DELETE FROM embeddings WHERE chunk_id = ?", ids)
            database.run_many("DELETE FROM text_chunks WHERE id = ?", ids)
            if not ids:
                previous = "UPDATE reembed_activations SET previous_id = ? WHERE previous_id = ?"
                database.run(previous, (_DELETED, version_id))
                database.run("DELETE FROM reembed_activations WHERE version_id = ?", (version_id,))
                database.run("DELETE FROM embedding_versions WHERE id = ?", (version_id,))
                on_end()
                return deleted
        deleted += len(ids)


def garbage(database: Database, keep: int) -> list[Version]:
    """What `gc` deletes: of each strategy the inactive versions but the newest `keep`; only versions that moai made."""
    found = []
    of_moai = [version for version in listing(database) if version.made and not version.is_active]
    of_moai.sort(key=lambda version: (version.created_at, version.id))  # numbers are given by hand
    for strategy in sorted({version.strategy for version in of_moai}):
        inactive = [version for version in of_moai if version.strategy == strategy]
        found += inactive[: max(0, len(inactive) - keep)]
    return found


def _select(database: Database, which: str, *values: object) -> list[Version]:
    columns = "id, version_name, chunking_strategy, model_name, coalesce(is_active, 0), metadata, created_at"
    return [
        Version(int(row[0]), str(row[1]), str(row[2]), str(row[3]), bool(row[4]), _metadata(row[5]), str(row[6]))
        for row in database.rows(f"SELECT {columns} FROM embedding_versions {which}", values)
    ]


def _metadata(text: str | None) -> dict[str, Any]:
    try:
        metadata = json.loads(text) if text else {}
    except ValueError:
        return {"unreadable": text}
    return metadata if isinstance(metadata, dict) else {"value": metadata}
