"""What watches a re-embedding: reads `reembed_runs` and the receipts, never writes, and needs no model.

progress      how many documents of each type a version holds
speed         a line every --interval seconds, a summary at Ctrl-C
performance   seconds a document, documents an hour, what is left, a verdict
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from moai.core.config import option, resolve
from moai.core.errors import ConfigError, MoaiError, StorageError
from moai.core.without_pandas import without_pandas
from moai.reembedding import runs, versions
from moai.reembedding.database import Database
from moai.reembedding.kinds import check_tables, count_documents, present
from moai.reembedding.options import check_number
from moai.reembedding.runs import PAUSE_SECONDS, STAGES, WINDOW_SECONDS, Pace, Sample, clock, pace, parse

_LONGEST_INTERVAL = 86_400
_VERDICTS = ((5.0, "very fast"), (15.0, "fast"), (30.0, "normal"), (float("inf"), "slow"))
"""Seconds a document below which the old program said so."""
_JUDGED_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """Watching a re-embedding."""

    db: str = option("data/lawfirm_v2.db", "the law database")
    version_id: int | None = option(None, "version to look at; the default is the one of the newest run")
    window: float = option(WINDOW_SECONDS, "working seconds that a rate is taken over")


@dataclass(frozen=True, kw_only=True)
class SpeedConfig:
    """Lines of the speed monitor."""

    interval: float = option(60.0, "seconds between two lines")
    lines: int | None = option(None, "end after so many lines; the default is to go on until the run has ended")


def run(main: Callable[[Sequence[str]], int], prog: str) -> int:
    """How the scripts start: a person's mistake is one line and an exit code, Ctrl-C is an end like any other."""
    without_pandas()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        return main(sys.argv[1:])
    except MoaiError as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 141


def progress(argv: Sequence[str], environ: Mapping[str, str] = os.environ) -> int:
    said = "How far a version is: totals, documents and chunks of each type, and the state of the newest run."
    config = resolve([WatchConfig], argv, environ, prog="monitor_re_embedding_progress.py", description=said)
    print("\n".join(progress_lines(look(config[WatchConfig]))))
    return 0


def performance(argv: Sequence[str], environ: Mapping[str, str] = os.environ) -> int:
    said = "How fast a version is built: seconds a document, what is left, a verdict, and where the time goes."
    config = resolve([WatchConfig], argv, environ, prog="check_re_embedding_performance.py", description=said)
    print("\n".join(performance_lines(look(config[WatchConfig]))))
    return 0


def speed(argv: Sequence[str], environ: Mapping[str, str] = os.environ) -> int:
    said = "A line every --interval seconds: documents, what came in, the rate, what is left; at Ctrl-C a summary."
    classes = [WatchConfig, SpeedConfig]
    resolved = resolve(classes, argv, environ, prog="monitor_re_embedding_speed.py", description=said)
    watch, every = resolved[WatchConfig], resolved[SpeedConfig]
    if not 0 < every.interval <= _LONGEST_INTERVAL:
        raise ConfigError(f"interval = {every.interval}: above 0, at most {_LONGEST_INTERVAL:,} seconds")
    check_number("lines", every.lines)
    follow(lambda: look(watch), lambda line: print(line, flush=True), interval=every.interval, lines=every.lines)
    return 0


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
    def characters_left(self) -> int:
        """Of the live run; documents differ too much in length to tell the time by."""
        return max(0, int(self.run.get("characters_total", 0)) - int(self.run.get("characters_seen", 0)))

    @property
    def eta_seconds(self) -> float | None:
        if not self.pace:
            return None
        if self.is_running and self.pace.characters > 0:
            return self.characters_left / self.pace.characters
        return self.left / self.pace.documents if self.pace.documents > 0 else None

    @property
    def is_paused(self) -> bool:
        """A live run whose heartbeat stands still: its process is stopped, or its machine sleeps."""
        return self.is_running and (self.at - parse(self.run["heartbeat_at"])).total_seconds() > PAUSE_SECONDS


def look(config: WatchConfig) -> State:
    """Raises SourceError for what is no law database, ConfigError where nothing was re-embedded in it yet."""
    check_number("version_id", config.version_id)
    if not config.window > 0:
        raise ConfigError(f"window = {config.window}: above 0")
    newest = None
    with Database.open(Path(config.db)) as database:
        check_tables(database)
        if database.columns("reembed_runs"):
            newest = database.value("SELECT version_id FROM reembed_runs ORDER BY id DESC LIMIT 1")
        if newest is None:
            raise ConfigError(
                f"{config.db}: no re-embedding has run here yet; start one with python -m moai reembed --db {config.db}"
            )
        version_id = versions.get(database, newest if config.version_id is None else config.version_id).id
        totals = count_documents(database, present(database))
        sql = (
            "SELECT source_type, count(*), sum(chunks), sum(reason IS NOT NULL) FROM reembed_receipts WHERE "
            "version_id = ? GROUP BY source_type"
        )
        receipts = {row[0]: row[1:] for row in database.rows(sql, (version_id,))}
        row = database.row("SELECT * FROM reembed_runs WHERE version_id = ? ORDER BY id DESC LIMIT 1", (version_id,))
        newest_run = dict(zip(database.columns("reembed_runs"), row)) if row else {}
        counted = ", characters" * ("characters" in database.columns("reembed_samples"))  # none of an earlier moai
        samples = database.rows(
            f"SELECT at, documents, chunks{counted} FROM reembed_samples WHERE run_id = (SELECT max(id) FROM "
            "reembed_runs WHERE version_id = ? AND chunks_encoded > 0) ORDER BY at",
            (version_id,),
        )
        return State(
            version_id,
            datetime.now(UTC),
            {name: OfType(totals[name], *receipts.get(name, (0, 0))[:2]) for name in totals},
            sum(row[2] for row in receipts.values()),
            newest_run,
            newest_run.get("state") == "running" and _lives(database),
            pace([Sample(parse(at), *counts) for at, *counts in samples], window_seconds=config.window),
        )


def _lives(database: Database) -> bool:
    """By its process, where that can be asked; a run that was killed said no last word."""
    try:
        runs.refuse_while_running(database)
    except StorageError:
        return True
    return False


def progress_lines(state: State) -> Iterator[str]:
    yield f"Version {state.version_id} at {state.at.isoformat(timespec='seconds')}"
    yield (
        f"documents  {state.done:,} of {state.total:,} ({state.share:.1%}), {state.skipped:,} of them recorded without "
        f"chunks; {state.chunks:,} chunks"
    )
    for name, of in state.by_type.items():
        per_document = f"{of.chunks / of.done:.2f}" if of.done else "-"
        yield (
            f"{name:25} {of.total:>8,} total {of.done:>8,} done {of.chunks:>9,} chunks {per_document:>7} chunks/doc  "
            f"{_bar(of.done / of.total if of.total else 1.0)}"
        )
    if not state.run:
        said = f"none of moai; python -m moai reembed versions says what is in version {state.version_id}"
    else:
        word = state.run["state"]
        word = "paused" if state.is_paused else "died" if word == "running" and not state.is_running else word
        said = f"{state.run['id']} {word}, started {state.run['started_at']}, heartbeat {state.run['heartbeat_at']}"
        encoded, committed = state.run["chunks_encoded"], state.run["chunks"]
        total = state.run.get("characters_total", 0)
        yield (
            f"this run   {state.run.get('characters_seen', 0) / total if total else 1.0:.1%} of the characters; "
            f"{encoded:,} chunks encoded, {committed:,} of them committed"
        )
        if state.is_running and state.pace:
            said += f", {state.pace.chunks:,.1f} chunks/s, about {clock(state.eta_seconds)} left"
        said += f" ({state.run['message']})" if state.run.get("message") else ""
    yield f"run        {said}"


def performance_lines(state: State) -> Iterator[str]:
    yield f"{_bar(state.share, 50)} {state.share:.1%}"
    left = state.total - state.done
    yield f"processed  {state.done:,} of {state.total:,} documents, {left:,} left; {state.chunks:,} chunks"
    if not state.run:
        return
    yield f"started    {state.run['started_at']} (UTC)"
    seconds = {stage: float(state.run[f"seconds_{stage}"]) for stage in STAGES}
    stages = ", ".join(f"{stage} {took:.1f}" for stage, took in seconds.items())
    worked = seconds["load"] + seconds["encode"] + seconds["wait"]
    yield f"seconds    {stages}; {worked:.1f} in the encoder's thread"
    if state.pace is None or state.pace.documents <= 0:
        yield "speed      not known yet: nothing was embedded"
        return
    each = 1 / state.pace.documents
    yield (
        f"speed      {each:.3f} s a document, {3600 * state.pace.documents:,.0f} documents an hour, "
        f"{state.pace.chunks:,.1f} chunks/s over {clock(state.pace.seconds)} of work: {verdict(each)}"
    )
    yield f"left       {state.left:,} documents, about {clock(state.eta_seconds)}"
    wait, encode = seconds["wait"] - seconds["load"], seconds["encode"]
    if encode > _JUDGED_SECONDS and wait > 0.2 * encode:
        yield f"advice     the encoder waited {wait:.0f} s for chunks: a larger --doc-batch-size, or a faster disk"
    if verdict(each) == "slow":
        yield (
            "advice     --precision auto computes in bfloat16 or int8 where that stays close to float32; python "
            "scripts/check_pytorch_threads.py shows whether all cores work"
        )


def verdict(seconds_per_document: float) -> str:
    return next(word for below, word in _VERDICTS if seconds_per_document < below)


def follow(
    look: Callable[[], State],
    say: Callable[[str], None],
    *,
    interval: float,
    lines: int | None = None,
    pause: Callable[[float], None] = time.sleep,
) -> None:
    """Until so many lines are said, or no run is at work, or Ctrl-C; a summary at the end in every case."""
    first = last = look()
    watched, said = 0.0, 0
    try:
        say(_speed_line(first, first))
        while last.is_running and (lines is None or said < lines):
            pause(interval)
            now = look()
            say(_speed_line(last, now))
            watched += (now.at - last.at).total_seconds()
            last, said = now, said + 1
    except KeyboardInterrupt:
        say("")
    finally:  # also where the database cannot be read any more
        documents, chunks = last.done - first.done, last.chunks - first.chunks
        rate = "no document was committed meanwhile"
        if documents and watched:
            rate = f"{3600 * documents / watched:,.0f} documents an hour, {watched / documents:.3f} s a document"
        gain = f"+{documents:,} documents, +{chunks:,} chunks"
        say(f"watched {clock(watched)}: {gain}, {rate}; {last.done:,} of {last.total:,} done")


def _speed_line(before: State, now: State) -> str:
    line = f"{now.at.strftime('%H:%M:%S')}Z {now.done:,}/{now.total:,} | +{now.done - before.done:,}"
    if now.pace and now.pace.documents > 0:
        line += (
            f" | {3600 * now.pace.documents:,.0f} docs/h | {1 / now.pace.documents:.3f} s/doc | "
            f"{now.pace.chunks:,.1f} chunks/s | {clock(now.eta_seconds)} left"
        )
    return line + (" | paused" if now.is_paused else "" if now.is_running else " | no run is at work")


def _bar(share: float, width: int = 40) -> str:
    filled = int(min(1.0, share) * width)
    return "█" * filled + "░" * (width - filled)
