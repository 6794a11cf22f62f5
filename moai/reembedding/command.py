"""The command line of re-embedding: `python -m moai reembed` and
scripts/migrations/re_embed_existing_data_optimized.py.

reembed [build] [flags]        build a version (the flags of the old program; --help lists all)
reembed versions               list them, with what is in each
reembed search --query TEXT    the best chunks of the active version
"""

from __future__ import annotations

import itertools
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moai.core.config import option, resolve
from moai.core.errors import ConfigError, DamagedError, MoaiError
from moai.core.stopping import stoppable
from moai.core.without_pandas import without_pandas
from moai.reembedding import schema, search, versions
from moai.reembedding.build import Report, build, plan
from moai.reembedding.database import Database
from moai.reembedding.documents import check_tables
from moai.reembedding.embed import TokenBudget, encode_all
from moai.reembedding.encoders import SentenceEncoder, SentenceModel
from moai.reembedding.loading import opened
from moai.reembedding.options import ReembedConfig, bounded, known_device
from moai.reembedding.runs import refuse_while_running

logger = logging.getLogger(__name__)

_MOST_PROBLEMS = 20
KEPT = "what was committed is kept, run again to go on from it"


@dataclass(frozen=True, kw_only=True)
class VersionConfig:
    """Versions of one database."""

    db: str = option("data/lawfirm_v2.db", "the law database")
    version_id: int | None = option(None, "which version; the default is the strategy's active one")
    other: int | None = option(None, "the version to compare with")
    chunking_strategy: str = option("standard", "whose active version, where no number is given")
    query: str | None = option(None, "what to search for")
    top: int = option(5, "chunks to find")
    keep: int = option(1, "inactive versions of each strategy that gc keeps, the newest")
    model: str | None = option(None, "where the version's model is now, if it has moved", env="EMBEDDING_MODEL")
    device: str = option("auto", "auto, cpu, cuda or cuda:N")

    def require(self) -> VersionConfig:
        """Raises ConfigError for what no program could do."""
        for name in ("version_id", "other", "top"):
            bounded(name, getattr(self, name))
        bounded("keep", self.keep, least=0)
        known_device(self.device)
        return self


def main(argv: Sequence[str], environ: Mapping[str, str] = os.environ, *, prog: str = "python -m moai reembed") -> int:
    """Run one action; the first word names it, `build` if it is a flag. Raises MoaiError."""
    action = argv[0] if argv and argv[0] in ACTIONS else "build"
    if argv and argv[0] not in ACTIONS and not argv[0].startswith("-"):
        raise ConfigError(f"unknown action {argv[0]!r}: choose from {', '.join(ACTIONS)}")
    flags = list(argv[1:] if argv and argv[0] in ACTIONS else argv)
    with stoppable(KEPT):
        return ACTIONS[action](flags, environ, f"{prog} {action}" if argv and argv[0] in ACTIONS else prog)


def run_script(argv: Sequence[str], prog: str) -> int:
    """As the entry point of a script: a person's mistake is one line and an exit code."""
    without_pandas()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        return main(argv, prog=prog)
    except MoaiError as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        return 141


def _build(flags: list[str], environ: Mapping[str, str], prog: str) -> int:
    """Build a version, or bring one up to date."""
    epilog = "Other actions, each with its own --help:\n" + "\n".join(
        f"  {name:14} {(action.__doc__ or '').splitlines()[0]}" for name, action in ACTIONS.items()
    )
    resolved = resolve([ReembedConfig], flags, environ, prog=prog, description=_build.__doc__ or "", epilog=epilog)
    config = resolved[ReembedConfig]
    if config.dry_run:
        print("\n".join(plan(config, environ=environ)))
        return 0
    print("\n".join(summary(build(config, environ=environ))))
    return 0


def summary(report: Report) -> list[str]:
    """Counts, seconds and what stands now."""
    counts, seconds = report.counts, report.seconds
    unchanged = counts["documents_seen"] - counts["documents_embedded"] - counts["documents_skipped"]
    encode = seconds.get("encode", 0.0)
    state = "complete" if report.complete else "not complete (only a run over all documents completes it)"
    return [
        f"documents    {counts['documents_seen']:,} of {report.documents_total:,} looked at = "
        f"{counts['documents_embedded']:,} embedded + {counts['documents_skipped']:,} without chunks + "
        f"{unchanged:,} unchanged; {counts['documents_gone']:,} gone",
        f"chunks       {counts['chunks']:,} with {counts['tokens']:,} tokens, {counts['truncated']:,} truncated; "
        f"{counts['encode_batches']:,} encode calls",
        "seconds      "
        + ", ".join(
            f"{name} {seconds[name]:.2f}"
            for name in ("read", "chunk", "load", "encode", "wait", "write")
            if name in seconds
        )
        + (f"; {counts['chunks'] / encode:,.1f} chunks/s while encoding" if encode and counts["chunks"] else ""),
        f"version      {report.version_id}: {state}, {'active' if report.active else 'not active'}",
    ]


def _versions(flags: list[str], environ: Mapping[str, str], prog: str) -> int:
    """List the versions and what is in each."""
    with _open(_resolved(flags, environ, prog, _versions)) as database:
        for version in versions.listing(database):
            found = versions.statistics(database, version.id)
            marks = (
                ", ".join(
                    word for word, holds in (("active", version.is_active), ("complete", version.is_complete)) if holds
                )
                or "inactive"
            )
            made = version.made
            print(f"{version.id:4}  {version.name:24} {version.strategy:9} {marks}")
            print(
                f"      model {version.model_name}"
                + (
                    f", revision {made['revision'][:12]}, {made.get('precision', 'float32')}, {made['vector_dtype']}"
                    if made
                    else ""
                )
            )
            skipped = "".join(f", {number:,} {reason}" for reason, number in sorted(found["skipped"].items()))
            print(
                f"      {found['documents']:,} documents, {found['chunks']:,} chunks, {found['embeddings']:,} "
                f"embeddings, dim {found['dim']}, {found['tokens']:,} tokens{skipped}"
            )
    return 0


def _compare(flags: list[str], environ: Mapping[str, str], prog: str) -> int:
    """Put two versions side by side (--version-id N --other M)."""
    config = _resolved(flags, environ, prog, _compare)
    with _open(config) as database:
        one, other = _asked(config, database), versions.get(database, _needed(config.other, "other"))
        left, right = versions.statistics(database, one.id), versions.statistics(database, other.id)
        print(f"{'':20} {'version ' + str(one.id):>16} {'version ' + str(other.id):>16}")
        for name in ("documents", "chunks", "embeddings", "dim", "mean_characters", "longest_characters", "tokens"):
            print(f"{name.replace('_', ' '):20} {left[name]!s:>16} {right[name]!s:>16}")
        print(
            f"{'strategy':20} {one.strategy:>16} {other.strategy:>16}\n{'model':20} {one.model_name[-16:]:>16} "
            f"{other.model_name[-16:]:>16}"
        )
        print(
            f"{'documents only here':20} {versions.only_in(database, one.id, other.id):>16} "
            f"{versions.only_in(database, other.id, one.id):>16}"
        )
    return 0


def _activate(flags: list[str], environ: Mapping[str, str], prog: str) -> int:
    """Make a complete version its strategy's active one (--version-id N)."""
    config = _resolved(flags, environ, prog, _activate)
    with _open(config, writable=True) as database:  # also while a run builds another version
        version = versions.get(database, _needed(config.version_id, "version_id"))
        if version.made and not version.is_complete:
            raise ConfigError(f"version {version.id} is not complete: run the build over all documents first")
        before = versions.activate(database, version.id, **({"activated": True} if version.made else {}))
        print(f"version {version.id} is active" + (f", in the place of version {before.id}" if before else ""))
    return 0


def _rollback(flags: list[str], environ: Mapping[str, str], prog: str) -> int:
    """Undo a strategy's last activation (--chunking-strategy S, or --version-id N of it)."""
    config = _resolved(flags, environ, prog, _rollback)
    with _open(config, writable=True) as database:
        strategy = (
            versions.get(database, config.version_id).strategy
            if config.version_id is not None
            else config.chunking_strategy
        )
        was, now = versions.roll_back(database, strategy)
        print(
            f"version {was} is inactive; "
            + (
                f"version {now} is active again"
                if now is not None
                else f"strategy {strategy} has no active version, as before it"
            )
        )
    return 0


def _delete(flags: list[str], environ: Mapping[str, str], prog: str) -> int:
    """Delete an inactive version with its chunks, embeddings and index (--version-id N)."""
    config = _resolved(flags, environ, prog, _delete)
    with _open(config, writable=True) as database:
        _delete_one(database, _needed(config.version_id, "version_id"))
    return 0


def _gc(flags: list[str], environ: Mapping[str, str], prog: str) -> int:
    """Delete inactive versions that moai made, but the newest of each strategy (--keep N)."""
    config = _resolved(flags, environ, prog, _gc)
    with _open(config, writable=True) as database:
        found = versions.garbage(database, config.keep)
        for version in found:
            _delete_one(database, version.id)
    if not found:
        print(f"nothing to delete: no strategy has more than {config.keep} inactive versions that moai made")
    return 0


def _delete_one(database: Database, version_id: int) -> None:
    deleted = versions.delete(database, version_id)
    search.index_path(database.path, version_id).unlink(missing_ok=True)
    print(f"version {version_id} is deleted: {deleted:,} chunks")


def _search(flags: list[str], environ: Mapping[str, str], prog: str) -> int:
    """Find the chunks nearest to a question (--query TEXT), by the version's index or by brute force."""
    config = _resolved(flags, environ, prog, _search)
    with _open(config) as database:
        version = _asked(config, database)
        query = config.query or ""
        if not query.strip():
            raise ConfigError("nothing to search for: give --query TEXT")
        made = version.made
        model = SentenceModel.find(config.model or str(made.get("model", version.model_name)), device=config.device)
        if made and model.revision != made["revision"]:
            raise ConfigError(
                f"version {version.id} was made with revision {made['revision'][:12]} of its model, this is "
                f"{model.revision[:12]}: scores would mean nothing; name the version's model with --model"
            )
        vectors = query_vector(model, query)
        noted = made.get("faiss")
        found = (
            search.search_index(database.path, version.id, noted, vectors, k=config.top)
            if noted
            else search.brute_force(database, version.id, vectors, k=config.top)
        )
        for score, chunk_id in found[0]:
            row = database.row(
                "SELECT source_type, source_id, start_char, end_char, text FROM text_chunks WHERE id = ? AND "
                "embedding_version_id = ?",
                (chunk_id, version.id),
            )
            if row is None:
                raise DamagedError(
                    f"{search.index_path(database.path, version.id)}: chunk {chunk_id} is none of version "
                    f"{version.id}: "
                    f"this is another version's index; delete that file and build it again with --faiss "
                    f"{made['faiss']['kind']}"
                )
            source_type, source_id, start, end, text = row
            print(f"{score:.4f}  {source_type} {source_id} [{start}:{end}]  {' '.join(text.split())[:100]}")
    return 0


def query_vector(model: SentenceModel, query: str) -> search.Vectors:
    encoder = opened(model, "float32")
    assert isinstance(encoder, SentenceEncoder)
    ids, limit = encoder.tokens.question_ids(query), encoder.tokens.max_tokens
    if len(ids) > limit:
        logger.warning(
            "The question has %s tokens, the model reads %s: what is behind them is not searched for",
            f"{len(ids):,}",
            f"{limit:,}",
        )
    return encode_all(encoder, [ids[:limit]], TokenBudget())


def _check(flags: list[str], environ: Mapping[str, str], prog: str) -> int:
    """Read the whole file and see that every document has the chunks and embeddings that it should have."""
    with _open(_resolved(flags, environ, prog, _check)) as database:
        found = list(itertools.islice(versions.problems(database), _MOST_PROBLEMS))
        if found:
            print("\n".join(found))
            raise DamagedError(
                f"{database.path}: {'at least ' * (len(found) == _MOST_PROBLEMS)}{len(found)} problems, named above; "
                f"for a damaged file restore a backup"
            )
        print(f"{database.path}: whole; {len(versions.listing(database))} versions have what their receipts say")
    return 0


def _restore_index(flags: list[str], environ: Mapping[str, str], prog: str) -> int:
    """Put the original unique index back, where one version is left."""
    with _open(_resolved(flags, environ, prog, _restore_index), writable=True) as database:
        refuse_while_running(database)
        print(schema.restore_index(database))
    return 0


ACTIONS: dict[str, Callable[[list[str], Mapping[str, str], str], int]] = {
    "build": _build,
    "versions": _versions,
    "compare": _compare,
    "activate": _activate,
    "rollback": _rollback,
    "search": _search,
    "delete": _delete,
    "gc": _gc,
    "check": _check,
    "restore-index": _restore_index,
}


def _resolved(flags: list[str], environ: Mapping[str, str], prog: str, action: Callable[..., int]) -> VersionConfig:
    return resolve(
        [VersionConfig], flags, environ, prog=prog, description=action.__doc__ or "", others=[ReembedConfig]
    )[VersionConfig].require()


def _open(config: VersionConfig, *, writable: bool = False) -> Database:
    database = Database.open(Path(config.db), writable=writable)
    try:
        check_tables(database)
        if "embedding_version_id" not in database.columns("text_chunks"):
            raise ConfigError(
                f"{config.db}: its chunks know no versions yet: build one first with python -m moai reembed --db "
                f"{config.db}"
            )
        if writable:
            database.run("PRAGMA foreign_keys = ON")
            schema.create_tables(database)
    except BaseException:
        database.close()
        raise
    return database


def _asked(config: VersionConfig, database: Database) -> versions.Version:
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
