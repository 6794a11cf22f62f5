"""The command line of re-embedding: `python -m moai reembed` and the script of the old program's name.

reembed [build] [flags]        build a version
reembed versions               list them, with what is in each
reembed search --query TEXT    the best chunks of the active version
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moai.core.config import option, resolve
from moai.core.errors import ConfigError, DamagedError, NotProven
from moai.core.stopping import stoppable
from moai.reembedding import asking, indexes, schema, search, serving, versions
from moai.reembedding.build import Report, build, plan
from moai.reembedding.database import Database
from moai.reembedding.kinds import check_tables
from moai.reembedding.options import ReembedConfig, check_number
from moai.reembedding.proving import Conditions, prove
from moai.reembedding.runs import STAGES, refuse_while_running

logger = logging.getLogger(__name__)

_MOST_PROBLEMS = 20
_HEARD_SECONDS, _TIDY_SECONDS = 1.5, 3.0
"""Of a signal: together under the 5 s in which a run ends. What is not tidied up by then survives it, as a kill."""
KEPT = "what was committed is kept, run again to go on from it"


@dataclass(frozen=True, kw_only=True)
class VersionConfig:
    """Versions of one database."""

    db: str = option("data/lawfirm_v2.db", "the law database")
    version_id: int | None = option(None, "which version; the default is the strategy's active one")
    other: int | None = option(None, "the version to compare with")
    chunking_strategy: str = option("standard", "whose active version, where no number is given")
    questions: str | None = option(None, "of activate: JSON lines to measure the version on first")
    min_recall: float | None = option(None, "of activate: the share of answers among the first 10 that is needed")
    not_worse: bool = option(False, "of activate: no recall below that of the version that serves")
    model: str | None = option(None, "where the version's model is now, if it has moved", env="EMBEDDING_MODEL")
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    keep: int = option(1, "inactive versions of each strategy that gc keeps, the newest")

    def __post_init__(self) -> None:
        for name in ("version_id", "other"):
            check_number(name, getattr(self, name))
        check_number("keep", self.keep, least=0)


def main(argv: Sequence[str], environ: Mapping[str, str] = os.environ, *, prog: str = "python -m moai reembed") -> int:
    """Run one action; the first word names it, `build` if it is a flag. Raises MoaiError."""
    flags = list(argv)
    name = flags.pop(0) if flags and not flags[0].startswith("-") else ""
    if name not in ("", "build", *ACTIONS, *asking.ACTIONS):
        raise ConfigError(f"unknown action {name!r}: choose from build, {', '.join((*ACTIONS, *asking.ACTIONS))}")
    run = _act if name in ACTIONS else asking.act if name in asking.ACTIONS else _build
    with stoppable(KEPT, within_seconds=_HEARD_SECONDS, tidy_seconds=_TIDY_SECONDS):
        for line in run(name, flags, environ, f"{prog} {name}".rstrip()):
            print(line)
    return 0


def _build(_: str, flags: list[str], environ: Mapping[str, str], prog: str) -> Iterable[str]:
    summaries = "".join(f"\n  {name:14} {action.__doc__}" for name, action in (ACTIONS | asking.ACTIONS).items())
    epilog = f"Other actions, each with its own --help:{summaries}"
    said = "Build a version, or bring one up to date."
    config = resolve([ReembedConfig], flags, environ, prog=prog, description=said, epilog=epilog)[ReembedConfig]
    return plan(config, environ=environ) if config.dry_run else summary(build(config, environ=environ))


def summary(report: Report) -> list[str]:
    """Counts, seconds and what stands now."""
    counts, seconds = report.counts, report.seconds
    unchanged = counts["documents_seen"] - counts["documents_embedded"] - counts["documents_skipped"]
    encode = seconds.get("encode", 0.0)
    rate = f"; {counts['chunks'] / encode:,.1f} chunks/s while encoding" if encode and counts["chunks"] else ""
    state = "complete" if report.complete else "not complete (only a run over all documents completes it)"
    reasons = ", ".join(f"{number:,} {reason}" for reason, number in sorted(report.skipped.items())) or "none"
    return [
        f"documents    {counts['documents_seen']:,} of {report.documents_total:,} looked at = "
        f"{counts['documents_embedded']:,} embedded + {counts['documents_skipped']:,} without chunks + "
        f"{unchanged:,} unchanged; {counts['documents_gone']:,} gone",
        f"left out     {reasons}",
        f"chunks       {counts['chunks']:,} with {counts['tokens']:,} tokens, {counts['truncated']:,} truncated; "
        f"{counts['encode_batches']:,} encode calls",
        f"seconds      {', '.join(f'{name} {seconds[name]:.2f}' for name in STAGES if name in seconds)}{rate}",
        f"version      {report.version_id}: {state}, {'active' if report.active else 'not active'}",
    ]


Action = Callable[[VersionConfig, Database], Iterator[str]]


def _versions(config: VersionConfig, database: Database) -> Iterator[str]:
    """List the versions and what is in each."""
    for version in versions.listing(database):
        found, made = versions.statistics(database, version.id), version.made
        states = {
            "active": version.is_active,
            "complete": version.is_complete,
            "serving": version.id == serving.version_id(database),
        }
        marks = [word for word, holds in states.items() if holds]
        yield f"{version.id:4}  {version.name:24} {version.strategy:9} {', '.join(marks) or 'inactive'}"
        line = f"      model {version.model_name}"
        if made:
            line += f", revision {made['revision'][:12]}, {made.get('precision', 'float32')}, {made['vector_dtype']}"
        yield line
        skipped = "".join(f", {number:,} {reason}" for reason, number in sorted(found["skipped"].items()))
        yield (
            f"      {found['documents']:,} documents, {found['chunks']:,} chunks, {found['embeddings']:,} "
            f"embeddings, dim {found['dim']}, {found['tokens']:,} tokens{skipped}"
        )


def _compare(config: VersionConfig, database: Database) -> Iterator[str]:
    """Put two versions side by side (--version-id N --other M)."""
    one, other = _meant(config, database), versions.get(database, _needed(config.other, "other"))
    left, right = versions.statistics(database, one.id), versions.statistics(database, other.id)
    names = ("documents", "chunks", "embeddings", "dim", "mean_characters", "longest_characters", "tokens")
    table: list[tuple[str, object, object]] = [("", f"version {one.id}", f"version {other.id}")]
    table += [(name.replace("_", " "), left[name], right[name]) for name in names]
    table.append(("strategy", one.strategy, other.strategy))
    table.append(("model", one.model_name[-16:], other.model_name[-16:]))
    only_here = versions.only_in(database, one.id, other.id), versions.only_in(database, other.id, one.id)
    for name, mine, its in (*table, ("documents only here", *only_here)):
        yield f"{name:20} {mine!s:>16} {its!s:>16}"


def _activate(config: VersionConfig, database: Database) -> Iterator[str]:
    """Make a complete version its strategy's active one (--version-id N)."""
    version = versions.get(database, _needed(config.version_id, "version_id"))
    if version.made and not version.is_complete:
        raise ConfigError(f"version {version.id} is not complete: run the build over all documents first")
    conditions = Conditions.of(config)
    noted: dict[str, object] = {"activated": True} if version.made else {}
    if conditions.questions:
        proof = prove(database.path, version.id, conditions, model=config.model, device=config.device)
        if proof.refusal:
            raise NotProven(f"version {version.id} is not activated: {proof.refusal}")
        if proof.dense_weight is not None and version.made:
            noted["dense_weight"] = proof.dense_weight
    before = versions.activate(database, version.id, **noted)
    yield f"version {version.id} is active" + (f", in the place of version {before.id}" if before else "")


def _rollback(config: VersionConfig, database: Database) -> Iterator[str]:
    """Undo a strategy's last activation (--chunking-strategy S, or --version-id N of it)."""
    strategy = config.chunking_strategy
    if config.version_id is not None:
        strategy = versions.get(database, config.version_id).strategy
    was, now = versions.roll_back(database, strategy)
    after = f"version {now} is active again" if now else f"strategy {strategy} has no active version, as before it"
    yield f"version {was} is inactive; {after}"


def _delete(config: VersionConfig, database: Database) -> Iterator[str]:
    """Delete an inactive version with its chunks, embeddings and index (--version-id N)."""
    yield _deleted(database, _needed(config.version_id, "version_id"))


def _gc(config: VersionConfig, database: Database) -> Iterator[str]:
    """Delete inactive versions that moai made, but the newest of each strategy (--keep N)."""
    found = versions.garbage(database, config.keep)
    yield from (_deleted(database, version.id) for version in found)
    if not found:
        yield f"nothing to delete: no strategy has more than {config.keep} inactive versions that moai made"


def _deleted(database: Database, version_id: int) -> str:
    chunks = versions.delete(database, version_id, on_end=lambda: indexes.drop(database, version_id))
    search.index_path(database.path, version_id).unlink(missing_ok=True)
    return f"version {version_id} is deleted: {chunks:,} chunks"


def _check(config: VersionConfig, database: Database) -> Iterator[str]:
    """Read the whole file and see that every document has the chunks and embeddings that it should have."""
    found = list(itertools.islice(versions.problems(database), _MOST_PROBLEMS))
    yield from found
    if found:
        raise DamagedError(
            f"{database.path}: {'at least ' * (len(found) == _MOST_PROBLEMS)}{len(found)} problems, named above; for a "
            f"damaged file restore a backup"
        )
    yield f"{database.path}: whole; {len(versions.listing(database))} versions have what their receipts say"


def _restore_index(config: VersionConfig, database: Database) -> Iterator[str]:
    """Put the original unique index back, where one version is left."""
    refuse_while_running(database)
    yield schema.restore_index(database)


ACTIONS: dict[str, Action] = {
    "versions": _versions,
    "compare": _compare,
    "activate": _activate,
    "rollback": _rollback,
    "delete": _delete,
    "gc": _gc,
    "check": _check,
    "restore-index": _restore_index,
}
_READERS = (_versions, _compare, _check)


def _act(name: str, flags: list[str], environ: Mapping[str, str], prog: str) -> Iterable[str]:
    action, writable = ACTIONS[name], ACTIONS[name] not in _READERS
    said = action.__doc__ or ""
    resolved = resolve(
        [VersionConfig], flags, environ, prog=prog, description=said, others=[ReembedConfig, asking.AskConfig]
    )
    config = resolved[VersionConfig]
    with Database.open(Path(config.db), writable=writable) as database:
        check_tables(database)
        if "embedding_version_id" not in database.columns("text_chunks"):
            raise ConfigError(
                f"{config.db}: its chunks know no versions yet: build one first with python -m moai reembed --db "
                f"{config.db}"
            )
        if writable:
            database.run("PRAGMA foreign_keys = ON")
            schema.create_tables(database)
        yield from action(config, database)


def _meant(config: VersionConfig, database: Database) -> versions.Version:
    if config.version_id is not None:
        return versions.get(database, config.version_id)
    found = versions.active(database, config.chunking_strategy)
    if found is None:
        raise ConfigError(
            f"strategy {config.chunking_strategy} has no active version: name one with --version-id, or another "
            f"strategy"
        )
    return found


def _needed(value: int | None, name: str) -> int:
    if value is None:
        raise ConfigError(f"{name} is needed: give --{name.replace('_', '-')} N")
    return value
