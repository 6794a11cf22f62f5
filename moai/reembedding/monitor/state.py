"""What the database says of a version and of its newest run, read in one look."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from moai.core.config import option, resolve
from moai.core.errors import ConfigError, StorageError
from moai.reembedding import versions
from moai.reembedding.database import Database
from moai.reembedding.documents import KINDS, check_tables, count_documents
from moai.reembedding.options import bounded
from moai.reembedding.runs import PAUSE_SECONDS, WINDOW_SECONDS, Pace, Sample, pace, parse, refuse_while_running


@dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """Watching a re-embedding."""

    db: str = option("data/lawfirm_v2.db", "the law database")
    version_id: int | None = option(None, "version to look at; the default is the one of the newest run")
    window: float = option(WINDOW_SECONDS, "working seconds that a rate is taken over")


@dataclass(frozen=True)
class OfType:
    total: int
    done: int
    chunks: int


@dataclass(frozen=True)
class State:
    """`run` is the newest run's row of reembed_runs by column name, empty without one."""

    version_id: int
    at: datetime
    by_type: dict[str, OfType]
    skipped: int
    run: dict[str, Any]
    is_running: bool
    pace: Pace | None

    @property
    def total(self) -> int:
        return sum(of.total for of in self.by_type.values())

    @property
    def done(self) -> int:
        """Documents with a receipt: embedded, or recorded with a reason why they have no chunk."""
        return sum(of.done for of in self.by_type.values())

    @property
    def chunks(self) -> int:
        return sum(of.chunks for of in self.by_type.values())

    @property
    def share(self) -> float:
        return self.done / self.total if self.total else 1.0

    @property
    def left(self) -> int:
        """Documents that the newest run has yet to look at, or that have no receipt where it has ended."""
        if self.is_running:
            return max(0, int(self.run["documents_total"]) - int(self.run["documents_seen"]))
        return self.total - self.done

    @property
    def eta_seconds(self) -> float | None:
        return self.left / self.pace.documents if self.pace and self.pace.documents > 0 else None


def look(config: WatchConfig) -> State:
    """Raises SourceError for what is no law database, ConfigError where nothing was re-embedded in it yet."""
    bounded("version_id", config.version_id)
    if not config.window > 0:
        raise ConfigError(f"window = {config.window}: above 0")
    with Database.open(Path(config.db)) as database:
        check_tables(database)
        version_id = config.version_id
        if not database.columns("reembed_runs"):
            newest = None
        else:
            newest = database.value("SELECT version_id FROM reembed_runs ORDER BY id DESC LIMIT 1")
        if newest is None:
            raise ConfigError(
                f"{config.db}: no re-embedding has run here yet; start one with python -m moai reembed --db {config.db}"
            )
        return _state(database, versions.get(database, newest if version_id is None else version_id).id, config.window)


def _state(database: Database, version_id: int, window: float) -> State:
    totals = count_documents(database, tuple(KINDS))
    sql = (
        "SELECT source_type, count(*), sum(chunks), sum(reason IS NOT NULL) FROM reembed_receipts WHERE version_id = ? "
        "GROUP BY source_type"
    )
    receipts = {row[0]: row[1:] for row in database.rows(sql, (version_id,))}
    row = database.row("SELECT * FROM reembed_runs WHERE version_id = ? ORDER BY id DESC LIMIT 1", (version_id,))
    run = dict(zip(database.columns("reembed_runs"), row)) if row else {}
    samples = database.rows(
        "SELECT at, documents, chunks FROM reembed_samples WHERE run_id = (SELECT max(id) FROM reembed_runs WHERE "
        "version_id = ? AND chunks_encoded > 0) ORDER BY at",
        (version_id,),
    )
    return State(
        version_id,
        datetime.now(UTC),
        {name: OfType(totals[name], *receipts.get(name, (0, 0))[:2]) for name in KINDS},
        sum(row[2] for row in receipts.values()),
        run,
        _is_running(database, run),
        pace([Sample(parse(at), *counts) for at, *counts in samples], window_seconds=window),
    )


def _is_running(database: Database, run: dict[str, Any]) -> bool:
    """By its process, where that can be asked; a run that was killed said no last word."""
    if not run or run["state"] != "running":
        return False
    try:
        refuse_while_running(database)
    except StorageError:
        return True
    return False


def is_paused(state: State) -> bool:
    """A live run whose heartbeat stands still: its process is stopped, or its machine sleeps."""
    return state.is_running and (state.at - parse(state.run["heartbeat_at"])).total_seconds() > PAUSE_SECONDS


def bar(share: float, width: int = 40) -> str:
    filled = int(min(1.0, share) * width)
    return "█" * filled + "░" * (width - filled)


def show(
    lines: Callable[[State], Iterator[str]], argv: Sequence[str], environ: Mapping[str, str], prog: str, said: str
) -> int:
    """Print what is to be said of one look."""
    config = resolve([WatchConfig], argv, environ, prog=prog, description=said)[WatchConfig]
    print("\n".join(lines(look(config))))
    return 0
