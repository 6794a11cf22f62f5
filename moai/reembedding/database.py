"""An SQLite file through `apsw` where that is installed, else through the standard library; errors as one line.

    with Database.open(path, writable=True) as database, database.transaction("reembed"):
        database.run("UPDATE t SET a = ?", (1,))

Both drivers run in autocommit: a transaction begins and ends where the code says. `apsw` brings a newer SQLite: the
one in the operating system may hold the WAL-reset bug.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from moai.core.errors import DamagedError, MoaiError, SourceError, StorageError
from moai.core.failpoints import failpoint
from moai.core.files import sync

try:
    import apsw as _apsw
except ImportError:
    _apsw = None  # type: ignore[assignment]
apsw: Any = _apsw

Row = tuple[Any, ...]
BUSY_SECONDS = 30
"""How long a statement waits for another program's transaction."""
_BACKUP_PAGES = 4096
_LOCKED = (
    "the database is locked: another program is writing to it. Close that program, or run again when it is done; "
    "nothing was changed"
)
_ADVICE: dict[int, tuple[type[MoaiError], str]] = {
    5: (StorageError, _LOCKED),
    6: (StorageError, _LOCKED),
    8: (
        StorageError,
        "the database is read-only: make the file and its directory writable for this user; nothing was changed",
    ),
    10: (
        StorageError,
        "the disk gave an error: check that it has room (df, ulimit -f) and is healthy; what was committed is kept, "
        "run again to go on",
    ),
    11: (DamagedError, "the database is damaged: run `PRAGMA integrity_check` on it and restore a backup"),
    13: (StorageError, "the disk is full: free space there; what was committed is kept, run again to go on"),
    14: (
        SourceError,
        "cannot be opened as a database: check that the path is right and that its directory may be written",
    ),
    19: (
        DamagedError,
        "a rule of the database itself refuses a row: look at its triggers, unique indexes and foreign keys; what was "
        "committed before is kept",
    ),
    26: (SourceError, "is not an SQLite database: name one with --db"),
}


def sqlite_version() -> tuple[int, ...]:
    """Of the library that is used."""
    return tuple(int(part) for part in (apsw.sqlite_lib_version() if apsw else sqlite3.sqlite_version).split("."))


def wal_reset_bug(version: tuple[int, ...]) -> bool:
    """Whether this SQLite may lose a page when two connections checkpoint and write at one moment.

    sqlite.org/wal.html#walresetbug: 3.7.0 to 3.51.2; mended in 3.51.3 and in the branches 3.50.7 and 3.44.6.
    """
    mended = (3, 50, 7) <= version < (3, 51) or (3, 44, 6) <= version < (3, 45)
    return (3, 7, 0) <= version < (3, 51, 3) and not mended


@dataclass
class Database:
    """One connection, for one thread. Raises StorageError, SourceError or DamagedError where a person can act."""

    path: Path
    _connection: Any

    @classmethod
    def open(cls, path: Path, *, writable: bool = False) -> Database:
        """An existing file. A reader never writes, not even a journal."""
        if not path.is_file():
            what = "is a directory" if path.is_dir() else "there is no such database file"
            raise SourceError(f"{path}: {what}; name a database file with --db")
        with _plain(path):
            if apsw:
                flags = apsw.SQLITE_OPEN_READWRITE if writable else apsw.SQLITE_OPEN_READONLY
                connection: Any = apsw.Connection(str(path), flags=flags)
                connection.set_busy_timeout(BUSY_SECONDS * 1000)
            else:
                uri = f"file:{quote(str(path.absolute()))}?mode={'rw' if writable else 'ro'}"
                connection = sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS, isolation_level=None)
            database = cls(path, connection)
        try:
            database.rows("SELECT name FROM sqlite_master LIMIT 1")  # a file that is no database says so now
        except BaseException:
            database.close()
            raise
        return database

    def __enter__(self) -> Database:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._connection.close()

    def rows(self, sql: str, values: Sequence[Any] = ()) -> list[Row]:
        with _plain(self.path):
            return list(self._connection.execute(sql, tuple(values)))

    def row(self, sql: str, values: Sequence[Any] = ()) -> Row | None:
        found = self.rows(sql, values)
        return found[0] if found else None

    def value(self, sql: str, values: Sequence[Any] = ()) -> Any:
        """The first column of the first row; None without one."""
        found = self.row(sql, values)
        return found[0] if found else None

    def run(self, sql: str, values: Sequence[Any] = ()) -> None:
        self.rows(sql, values)

    def run_many(self, sql: str, values: Iterable[Sequence[Any]]) -> None:
        with _plain(self.path):
            self._connection.executemany(sql, values)

    @contextlib.contextmanager
    def transaction(self, place: str) -> Iterator[None]:
        """All or nothing. `place` names the failpoints around its commit."""
        failpoint(f"{place}.begin", self.path)
        try:
            self.run("BEGIN IMMEDIATE")  # inside the try: a signal right behind it may not leave it open
            yield
            failpoint(f"{place}.commit", self.path)
            self.run("COMMIT")
        except BaseException:
            with contextlib.suppress(Exception):
                self._connection.execute("ROLLBACK")  # a full disk has rolled back by itself
            raise
        failpoint(f"{place}.committed", self.path)

    def load_extension(self, path: str) -> bool:
        """Whether this connection has it now. Not every Python can load one."""
        try:
            self._connection.enable_load_extension(True)
            self._connection.load_extension(path)
            self._connection.enable_load_extension(False)
        except Exception as error:
            if not isinstance(error, AttributeError | sqlite3.Error) and not (apsw and isinstance(error, apsw.Error)):
                raise
            return False
        return True

    def changes(self) -> int:
        """Rows that the last statement inserted, changed or deleted."""
        return int(self.value("SELECT changes()"))

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[None]:
        """What is read inside is of one moment, whatever others write meanwhile."""
        self.run("BEGIN")
        try:
            yield
        finally:
            self.run("COMMIT")

    def columns(self, table: str) -> list[str]:
        """Empty where there is no such table."""
        return [str(row[0]) for row in self.rows("SELECT name FROM pragma_table_info(?)", (table,))]

    def copy_to(self, path: Path) -> None:
        """A consistent copy, made through SQLite's backup API while others may read and write."""
        with _plain(path):
            target: Any = apsw.Connection(str(path)) if apsw else sqlite3.connect(path)
            with contextlib.closing(target):
                if not apsw:
                    self._connection.backup(target, pages=_BACKUP_PAGES)
                    return
                with target.backup("main", self._connection, "main") as backup:
                    while not backup.done:
                        backup.step(_BACKUP_PAGES)


@contextlib.contextmanager
def staged(final: Path, place: str) -> Iterator[Path]:
    """A path beside `final`; what was written there gets that name, or is removed. `place` names the failpoint."""
    part = final.with_name(f"{final.name}.part")
    try:
        part.unlink(missing_ok=True)
        yield part
        sync(part)
        failpoint(place, part)
        part.replace(final)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def _plain(path: Path) -> Iterator[None]:
    """Turn what a driver raises into one line, where a person can act on it."""
    try:
        yield
    except Exception as error:
        code = getattr(error, "sqlite_errorcode", None) or getattr(error, "result", None)
        of_driver = isinstance(error, sqlite3.Error) or (apsw and isinstance(error, apsw.Error))
        if not of_driver or not isinstance(code, int) or code & 0xFF not in _ADVICE:
            raise
        cls, advice = _ADVICE[code & 0xFF]
        raise cls(f"{path}: {advice} (SQLite: {error})") from error
