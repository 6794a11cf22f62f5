"""The table `reembed_runs`: one row a run, which the run itself keeps and every monitor reads.

    run = Run.begin(database, version_id=5, documents_total=14_306)     # refuses while another run is at work
    run.add(chunks=812); run.write()                                    # inside the writer's transaction
    run.beat()                                                          # between transactions, while the encoder works
    run.end("done")

All times are UTC. `reembed_samples` holds what was done by when, for rates.
"""

from __future__ import annotations

import itertools
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from moai.core.distributed import is_gone, owner
from moai.core.errors import StorageError
from moai.core.failpoints import failpoint
from moai.reembedding.database import Database

BEAT_SECONDS = 5.0
PAUSE_SECONDS = 30.0
"""A longer gap between two samples is a pause (a suspended machine, a stopped process) and counts for no rate."""
SILENT_SECONDS = 600.0
"""A run on another host, of whose process nothing can be known, counts as dead after this long without a heartbeat."""
_SAMPLES_KEPT = 2000

COUNTERS = (
    *("documents_seen", "characters_seen", "documents_embedded", "documents_skipped", "documents_gone"),
    *("chunks", "tokens", "truncated", "chunks_encoded", "encode_batches"),
)
STAGES = ("read", "chunk", "load", "encode", "wait", "write")
"""`load` is the model's; `wait` is how long the encoder had nothing to do."""
WINDOW_SECONDS = 600.0
"""A rate is that of the last so many working seconds."""

TABLES = (
    "CREATE TABLE IF NOT EXISTS reembed_runs(id INTEGER PRIMARY KEY, version_id INTEGER NOT NULL, state TEXT NOT NULL, "
    "owner TEXT NOT NULL, started_at TEXT NOT NULL, heartbeat_at TEXT NOT NULL, ended_at TEXT, "
    "documents_total INTEGER NOT NULL, characters_total INTEGER NOT NULL DEFAULT 0, "
    + "".join(f"{name} INTEGER NOT NULL DEFAULT 0, " for name in COUNTERS)
    + "".join(f"seconds_{name} REAL NOT NULL DEFAULT 0, " for name in STAGES)
    + "settings TEXT, message TEXT)",
    "CREATE TABLE IF NOT EXISTS reembed_samples(run_id INTEGER NOT NULL, at TEXT NOT NULL, documents INTEGER NOT NULL, "
    "chunks INTEGER NOT NULL, characters INTEGER NOT NULL DEFAULT 0, PRIMARY KEY(run_id, at)) WITHOUT ROWID",
)
ADDED_COLUMNS = {
    "reembed_runs": ("characters_total", "characters_seen"),
    "reembed_samples": ("characters",),
}
"""Of tables that an earlier moai made without them."""
_SAMPLE = "INSERT OR REPLACE INTO reembed_samples(run_id, at, documents, chunks, characters) VALUES(?,?,?,?,?)"


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def parse(at: str) -> datetime:
    """A time of these tables, or of the law database's own CURRENT_TIMESTAMP, which is UTC and does not say so."""
    found = datetime.fromisoformat(at)
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def clock(seconds: float | None) -> str:
    """`h:mm:ss`; unknown for None."""
    if seconds is None:
        return "unknown"
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


@dataclass
class Run:
    """This process's run. Only the writer's thread touches it."""

    database: Database
    id: int
    documents_total: int
    characters_total: int
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTERS, 0))
    seconds: Mapping[str, float] = field(default_factory=dict)
    """By stage; whoever measures keeps writing to it."""
    waiting: Counter[str] = field(default_factory=Counter)
    """Documents and characters that were looked at and wait for their commit."""
    live: Callable[[], Mapping[str, int]] = dict
    """Counters of the stages that run beside the writer."""
    _said_at: float = 0.0

    @classmethod
    def begin(
        cls,
        database: Database,
        *,
        version_id: int,
        documents_total: int,
        characters_total: int,
        settings: Mapping[str, object],
    ) -> Run:
        """Raises StorageError while another run writes to this database."""
        with database.transaction("reembed.run"):
            for run_id in refuse_while_running(database):
                database.run("UPDATE reembed_runs SET state = 'died', ended_at = heartbeat_at WHERE id = ?", (run_id,))
            at = now()
            database.run(
                "INSERT INTO reembed_runs(version_id, state, owner, started_at, heartbeat_at, documents_total, "
                "characters_total, settings) VALUES(?,'running',?,?,?,?,?,?)",
                (
                    *(version_id, json.dumps(owner()), at, at, documents_total, characters_total),
                    json.dumps(settings, ensure_ascii=False),
                ),
            )
            run_id = int(database.value("SELECT last_insert_rowid()"))
            database.run(_SAMPLE, (run_id, at, 0, 0, 0))
        return cls(database, run_id, documents_total, characters_total, _said_at=time.monotonic())

    def add(self, **counts: int) -> None:
        for name, number in counts.items():
            self.counts[name] += number

    def looked_at(self) -> Mapping[str, int]:
        """Documents and characters, those that wait for their commit included."""
        return {name: self.counts[f"{name}_seen"] + self.waiting[name] for name in ("documents", "characters")}

    def write(self) -> None:
        """Counts, seconds and a sample, in the caller's transaction: they are what is committed, never more."""
        self.counts.update(self.live())
        values = [self.counts[name] for name in COUNTERS] + [self.seconds.get(stage, 0.0) for stage in STAGES]
        names = ", ".join(f"{name} = ?" for name in (*COUNTERS, *(f"seconds_{stage}" for stage in STAGES)))
        at = now()
        self.database.run(f"UPDATE reembed_runs SET heartbeat_at = ?, {names} WHERE id = ?", (at, *values, self.id))
        failpoint("reembed.sample", self.database.path)
        done = self.looked_at()
        sample = (done["documents"], self.counts["chunks_encoded"], done["characters"])
        self.database.run(_SAMPLE, (self.id, at, *sample))
        self._said_at = time.monotonic()

    def beat(self) -> None:
        """At most every BEAT_SECONDS, a transaction of its own."""
        if time.monotonic() - self._said_at >= BEAT_SECONDS:
            with self.database.transaction("reembed.beat"):
                self.write()

    def end(self, state: str, message: str = "") -> None:
        with self.database.transaction("reembed.end"):
            self.write()
            self.database.run(
                "UPDATE reembed_runs SET state = ?, ended_at = ?, message = ? WHERE id = ?",
                (state, now(), message, self.id),
            )
            self.database.run("DELETE FROM reembed_samples WHERE run_id < ?", (self.id - 20,))
            self.database.run(
                "DELETE FROM reembed_samples WHERE run_id = ?1 AND at < (SELECT at FROM reembed_samples WHERE run_id = "
                "?1 ORDER BY at DESC LIMIT 1 OFFSET ?2)",
                (self.id, _SAMPLES_KEPT),
            )


def refuse_while_running(database: Database) -> list[int]:
    """Raises StorageError while a run writes to this database; else the runs that died without a word."""
    if not database.columns("reembed_runs"):
        return []
    dead = []
    running = "SELECT id, owner, heartbeat_at FROM reembed_runs WHERE state = 'running'"
    for run_id, text, heartbeat in database.rows(running):
        who = json.loads(text)
        if not _is_dead(who, heartbeat):
            raise StorageError(
                f"{database.path}: run {run_id} (pid {who['pid']} on {who['host']}) is writing to it; wait for it, or "
                f"end that process. Nothing was changed"
            )
        dead.append(int(run_id))
    return dead


@dataclass(frozen=True)
class Sample:
    """What a run had done by a moment: documents and their characters that were looked at, chunks that were encoded."""

    at: datetime
    documents: int
    chunks: int
    characters: int = 0


@dataclass(frozen=True)
class Pace:
    """Documents, chunks and characters a second, over `seconds` of work."""

    documents: float
    chunks: float
    characters: float
    seconds: float


def pace(samples: Sequence[Sample], *, window_seconds: float = WINDOW_SECONDS) -> Pace | None:
    """Over the newest samples that embedding took time in. None while there is nothing to measure.

    What counts for nothing: gaps longer than PAUSE_SECONDS, the time until the first chunk (a model is loaded), and
    stretches of documents without a chunk, which pass a thousand times as fast as what is left.
    """
    seconds = documents = chunks = characters = 0.0
    for before, after in reversed(list(itertools.pairwise(samples))):
        gap = (after.at - before.at).total_seconds()
        burst = after.chunks == before.chunks and after.documents > before.documents
        if gap > PAUSE_SECONDS or after.chunks == 0 or burst:
            continue
        seconds += gap
        documents += after.documents - before.documents
        chunks += after.chunks - before.chunks
        characters += after.characters - before.characters
        if seconds >= window_seconds:
            break
    if seconds == 0:
        return None
    return Pace(documents / seconds, chunks / seconds, characters / seconds, seconds)


def _is_dead(who: Mapping[str, object], heartbeat: str) -> bool:
    """Of a process of this host and pid namespace the kernel knows; any other is dead when it is silent."""
    here = owner()
    elsewhere = any(who.get(name, "") != here[name] for name in ("host", "pid_namespace"))
    return is_gone(who) or (elsewhere and (datetime.now(UTC) - parse(heartbeat)).total_seconds() > SILENT_SECONDS)
