"""Build a version: read and chunk -> encode -> one writer, beside each other; then check, then activate.

    report = build(config)                      # the flags' model
    report = build(config, model=MyModel())     # any object with the members of embed.Model

A document whose content hash (text, strategy, model, revision) has a receipt is neither chunked nor encoded.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from moai.core.errors import MoaiError, NotProven, StorageError
from moai.core.stopping import Stop
from moai.reembedding import schema, search, versions
from moai.reembedding.chunk import GONE, Chunk
from moai.reembedding.database import Database, sqlite_version, wal_reset_bug
from moai.reembedding.documents import LawDocuments
from moai.reembedding.embed import Embed, Model
from moai.reembedding.indexes import Indexes
from moai.reembedding.kinds import NOT_UTF8, check_tables, count_characters
from moai.reembedding.loading import LoadedWhenNeeded, sample_rows
from moai.reembedding.making import Making, dimensions, settle
from moai.reembedding.options import ReembedConfig, pragmas
from moai.reembedding.prefetch import Prefetch, Seconds
from moai.reembedding.progress import Progress
from moai.reembedding.proving import Conditions, prove
from moai.reembedding.runs import Run, refuse_while_running
from moai.reembedding.versions import Version
from moai.reembedding.writer import VersionWriter

logger = logging.getLogger(__name__)

DEVICE_BATCHES = 32
"""In an encoded batch, by tokens: enough to sort by length and to keep every lane busy, little to lose in a crash."""
_LAST_SECONDS, _CLOSE_SECONDS = 1.5, 0.5
"""A stop waits so long for the device batches at work, and for a thread; what takes longer is left behind."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a run did."""

    version_id: int
    documents_total: int
    counts: Mapping[str, int]
    seconds: Mapping[str, float]
    complete: bool
    active: bool
    skipped: Mapping[str, int]
    """Documents of the version without chunks, by reason."""
    backup: Path | None
    """The copy that was made before the unique index was migrated, if this run did that."""


def build(config: ReembedConfig, *, model: Model | None = None, environ: Mapping[str, str] = os.environ) -> Report:
    """Raises a MoaiError for everything a person can do something about; what was committed is kept."""
    with Database.open(Path(config.db), writable=True) as database:
        check_tables(database, config.source_types)
        conditions = Conditions.of(config)
        making = settle(config, database, model, environ)
        total = sum(making.totals.values())
        one_version = config.replace_all_versions
        if not one_version:
            schema.old_index(database)  # one that cannot be migrated is refused before anything is written
        refuse_while_running(database)
        if wal_reset_bug(sqlite_version()):
            logger.warning(
                "SQLite %s has the WAL-reset bug, which may damage a database that two programs write to at one "
                "moment; pip install apsw brings a newer one, which moai then uses",
                ".".join(map(str, sqlite_version())),
            )
        schema.tune(database, pragmas(making.memory_bytes))
        schema.create_tables(database)
        version = making.version or versions.register(
            database, config.version_id, config.chunking_strategy, making.model.name
        )
        settings = asdict(config) | {
            "model": making.model.name,
            "revision": making.model.revision,
            "threads": making.threads.value,
            "embedding_batch_size": making.embedding_batch_size.value,
        }
        # From here on other runs are refused: two would write to one backup.
        run = Run.begin(
            database,
            version_id=version.id,
            documents_total=total,
            characters_total=count_characters(database, config.source_types),
            settings=settings,
        )
        with _ended(run):
            old = None if one_version else schema.old_index(database)
            backup = schema.migrate(database, old, backup=config.backup, indexes=not config.skip_index_optimization)
            _update(config, making, version, database, run)
            if config.is_whole:
                _complete(config, database, version.id, conditions)
        database.run("PRAGMA wal_checkpoint(TRUNCATE)")
        now = versions.get(database, version.id)
        skipped = versions.skipped(database, version.id)
        if number := skipped.get(NOT_UTF8):
            first = versions.skipped_for(database, version.id, NOT_UTF8)
            said = "%s documents are set aside, since their text is no valid UTF-8, the first: %s"
            logger.warning(said, f"{number:,}", ", ".join(first))
    return Report(
        version_id=version.id,
        documents_total=total,
        counts=dict(run.counts),
        seconds=dict(run.seconds),
        complete=now.is_complete,
        active=now.is_active,
        skipped=skipped,
        backup=backup,
    )


def plan(config: ReembedConfig, *, model: Model | None = None, environ: Mapping[str, str] = os.environ) -> list[str]:
    """What a run would do, a line each; nothing is written and no model is loaded."""
    with Database.open(Path(config.db)) as database:
        check_tables(database, config.source_types)
        making = settle(config, database, model, environ)
        migrated = not config.replace_all_versions and schema.old_index(database) is not None
    version_id = making.version.id if making.version else config.version_id
    found = {name: {"changed": 0, "without chunks": 0, GONE: 0} for name in config.source_types}
    for batch in _documents(config, version_id or 0, making).pages():
        for source_type, reason in zip(batch["source_type"].to_pylist(), batch["reason"].to_pylist()):
            found[source_type][GONE if reason == GONE else "without chunks" if reason else "changed"] += 1
    said = [
        f"{f'version {version_id}' if version_id else 'a new version'}: "
        f"{'there' if making.version else 'would be registered'}, strategy {config.chunking_strategy}, model "
        f"{making.model.name}, revision {making.model.revision[:12]}"
    ]
    said += [
        f"{source_type:25} {making.totals[source_type]:>9,} documents, {counts['changed']:>9,} to embed, "
        f"{counts['without chunks']:>9,} to record without chunks, {counts[GONE]:,} gone"
        for source_type, counts in found.items()
    ]
    if migrated:
        said.append(f"the unique index of text_chunks would be migrated{', after a backup' if config.backup else ''}")
    for name, setting in (("threads", making.threads), ("embedding_batch_size", making.embedding_batch_size)):
        said.append(f"{name} = {setting.value}: {setting.reason}")
    return said


@contextlib.contextmanager
def _ended(run: Run) -> Iterator[None]:
    """The run's row says how it ended."""
    try:
        yield
    except BaseException as error:
        state, said = "failed", type(error).__name__ + (f": {error}" if isinstance(error, MoaiError) else "")
        if isinstance(error, Stop):
            state, said = "interrupted", str(error)
        with contextlib.suppress(MoaiError):  # what went wrong first is what to say
            run.end(state, said)
        raise
    run.end("done")


def _documents(config: ReembedConfig, version_id: int, making: Making) -> LawDocuments:
    return LawDocuments(
        path=Path(config.db),
        version_id=version_id,
        content_key=making.content_key,
        templates=making.templates,
        doc_batch_size=config.doc_batch_size,
        source_types=config.source_types,
        limit=config.limit,
    )


def _update(config: ReembedConfig, making: Making, version: Version, database: Database, run: Run) -> None:
    """Embed the documents that the version does not hold as they are now."""
    made, one_version = making.made, config.replace_all_versions
    if lost := versions.forget_lost(database, version.id):
        said = "%s documents of version %d had lost chunks or embeddings to another program: they are embedded again"
        logger.warning(said, f"{lost:,}", version.id)
    documents = _documents(config, version.id, making)
    seconds = Seconds()
    encoder = LoadedWhenNeeded(
        model=making.model,
        precision=making.precision,
        min_cosine=config.min_cosine,
        is_checked="precision" in made,
        seconds=seconds,
        sample=lambda tokens: sample_rows(documents, cut, tokens),
        expected_dim=None if one_version else made.get("dim") or dimensions(database, version.id),
        batch_tokens_made=made.get("batch_tokens") if making.is_as_before else None,
    )
    cut = Chunk(
        strategy=config.chunking_strategy,
        query_type=config.query_type,
        embedding_batch_size=making.embedding_batch_size.value,
        tokens=encoder.tokens,
        batch_tokens=lambda: DEVICE_BATCHES * encoder.batch_tokens,
    )

    def note_making() -> None:
        """In each transaction that changes the version: how it is made, and that it and its index are not whole."""
        versions.note(
            database,
            version.id,
            **{**encoder.chosen, "min_cosine": encoder.chosen.get("min_cosine") or made.get("min_cosine")},
            model=making.model.name,
            revision=making.model.revision,
            query_type=config.query_type,
            content_key=making.content_key,
            context=making.templates.spec,
            backend=making.backend,
            vector_dtype=making.vector_dtype,
            complete=False,
            faiss=None,
        )
        named = "UPDATE embedding_versions SET model_name = ?1 WHERE id = ?2 AND model_name <> ?1"
        database.run(named, (making.model.name, version.id))
        for other in versions.listing(database) if one_version else ():
            if other.id != version.id and other.made:
                versions.note(database, other.id, complete=False, faiss=None)

    writer = VersionWriter(
        database=database,
        run=run,
        version_id=version.id,
        strategy=config.chunking_strategy,
        query_type=config.query_type,
        model_name=making.model.name,
        commit_interval=config.commit_interval,
        indexes=Indexes.of(database, version.id, sqlite_vec=config.sqlite_vec),
        commit_seconds=config.commit_seconds,
        replace_all_versions=one_version,
        on_change=note_making,
    )
    embed = Embed(encoder=encoder, vector_dtype=making.vector_dtype, kept=writer.unfinished())
    _work(documents, cut, embed, writer, seconds)


def _work(documents: LawDocuments, cut: Chunk, embed: Embed, writer: VersionWriter, seconds: Seconds) -> None:
    """Read and chunk in one thread, encode in another, write in this one."""
    run = writer.run
    run.seconds = seconds.by_stage
    run.live = lambda: {"chunks_encoded": embed.chunks, "encode_batches": embed.batches}
    progress = Progress(run)

    def idle() -> None:
        writer.beat(lambda: embed.unfinished)
        progress.say()

    read = seconds.waiting("chunk", cut(seconds.waiting("read", documents.pages())))
    chunks = Prefetch(read, stop=embed.stop)
    encoded = Prefetch(seconds.waiting("encode", embed(seconds.waiting("wait", chunks))), idle=idle, stop=embed.stop)
    try:
        for batch in encoded:
            with seconds.of("write"):
                writer.add(batch)
            idle()
        with seconds.of("write"):
            writer.commit()
    except BaseException as error:
        embed.stop.set()
        if not isinstance(error, StorageError):  # what is encoded is kept, unless the disk refused it already
            with contextlib.suppress(MoaiError):
                _keep(encoded, embed, writer)
        raise
    finally:
        for stage in (encoded, chunks):
            stage.close(within_seconds=_CLOSE_SECONDS)
        progress.end()


def _keep(encoded: Prefetch[pa.RecordBatch], embed: Embed, writer: VersionWriter) -> None:
    """Commit what is encoded: at once what waits, then what the device batches at work give while there is time."""
    writer.commit(embed.unfinished)
    for batch in encoded.rest(within_seconds=_LAST_SECONDS):
        writer.hold(batch)
    unfinished = embed.unfinished
    writer.commit(unfinished)
    if unfinished:
        said = "Stopped inside a batch: %s encoded chunks of it are kept for the next run"
        logger.info(said, f"{len(unfinished.vectors):,}")


def _complete(config: ReembedConfig, database: Database, version_id: int, conditions: Conditions) -> None:
    """Index the version, which holds every document now, and put it in its place in one transaction.

    It is activated once, when it is first complete: a version that was rolled back from stays where it was put.
    """
    with database.transaction("reembed.indexes"):  # of a version from before there were such tables, too
        Indexes.of(database, version_id, sqlite_vec=config.sqlite_vec).ensure(dimensions(database, version_id))
    made = versions.get(database, version_id).made
    noted: dict[str, Any] = {} if made.get("complete") else {"complete": True}
    faiss = config.faiss
    if faiss and not search.is_indexed(database.path, version_id, made.get("faiss") or {}, faiss):
        noted["faiss"] = search.build_index(database, version_id, faiss)
    refusal = None
    if conditions.questions and config.activate and not made.get("activated"):
        proof = prove(database.path, version_id, conditions, model=config.model, device=config.device)
        refusal, noted["dense_weight"] = proof.refusal, proof.dense_weight
    if refusal is None and config.activate and not made.get("activated"):
        before = versions.activate(database, version_id, activated=True, **noted)
        place = f", in the place of version {before.id}" if before else ""
        logger.info("Version %d is complete and active now%s", version_id, place)
    elif noted:
        with database.transaction("reembed.complete"):
            versions.note(database, version_id, **noted)
    if refusal:
        raise NotProven(f"version {version_id} is complete, but not activated: {refusal}")
