"""Build a version: read and chunk -> encode -> one writer, beside each other; then check, then activate.

    report = build(config)                                # the flags' model
    report = build(config, model=MyModel())               # any object with the members of transforms.embed.Model

What a run does follows from the receipts: a document whose content hash (text, strategy, model, revision) is in the
version already is not chunked and not encoded. When nothing is to be done, no model is loaded.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from moai.core import resources
from moai.core.config import Setting
from moai.core.errors import ConfigError, MoaiError, SourceError, StorageError
from moai.core.files import digest_json
from moai.core.stopping import Stop
from moai.reembedding import chunk, schema, search, versions
from moai.reembedding.database import Database, sqlite_version, wal_reset_bug
from moai.reembedding.documents import GONE, KINDS, LawDocuments, check_tables, count_documents
from moai.reembedding.embed import Embed, Model
from moai.reembedding.encoders import SentenceModel
from moai.reembedding.loading import LoadedWhenNeeded, sample_rows
from moai.reembedding.options import DEFAULT_MODEL, ReembedConfig, cuda_bytes, embedding_batch_size, pragmas
from moai.reembedding.overlapped import Seconds, ahead
from moai.reembedding.progress import Progress
from moai.reembedding.runs import Run, refuse_while_running
from moai.reembedding.versions import Version
from moai.reembedding.writer import VersionWriter

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a run did."""

    version_id: int
    documents_total: int
    counts: Mapping[str, int]
    seconds: Mapping[str, float]
    complete: bool
    active: bool
    backup: Path | None = None
    """The copy that was made before the unique index was migrated, if this run did that."""


def build(config: ReembedConfig, *, model: Model | None = None, environ: Mapping[str, str] = os.environ) -> Report:
    """Raises a MoaiError for everything a person can do something about; what was committed is kept."""
    config.require()
    path = Path(config.db)
    with Database.open(path, writable=True) as writer:
        check_tables(writer)
        asked = _ask(config, writer, model, environ)
        total = sum(_totals(config, writer).values())
        if not config.replace_all_versions:
            schema.old_index(writer)  # one that cannot be migrated is refused before anything is written
        refuse_while_running(writer)
        _warn_of_sqlite(sqlite_version())
        schema.tune(writer, pragmas(asked.machine.memory_bytes.value))
        schema.create_tables(writer)
        version = asked.version or versions.register(
            writer, config.version_id, config.chunking_strategy, asked.model.name
        )
        # From here on other runs are refused: two would write to one backup.
        run = Run.begin(writer, version_id=version.id, documents_total=total, settings=_settings(config, asked))
        try:
            old_index = None if config.replace_all_versions else schema.old_index(writer)
            backup = schema.migrate(writer, old_index, backup=config.backup, indexes=not config.skip_index_optimization)
            report = _work(config, asked, version, writer, run, total)
        except BaseException as error:
            said = (
                str(error)
                if isinstance(error, Stop)
                else f"{type(error).__name__}: {error}"
                if isinstance(error, MoaiError)
                else type(error).__name__
            )
            with contextlib.suppress(MoaiError):  # what went wrong first is what to say
                run.end("interrupted" if isinstance(error, Stop) else "failed", said)
            raise
        run.end("done")
        writer.run("PRAGMA wal_checkpoint(TRUNCATE)")
    return replace(report, backup=backup)


def plan(config: ReembedConfig, *, model: Model | None = None, environ: Mapping[str, str] = os.environ) -> list[str]:
    """What a run would do, a line each; nothing is written and no model is loaded."""
    with Database.open(Path(config.require().db)) as reader:
        check_tables(reader)
        asked = _ask(config, reader, model, environ)
        version_id = asked.version.id if asked.version else config.version_id
        totals = _totals(config, reader)
        migrated = not config.replace_all_versions and schema.old_index(reader) is not None
    found = {name: {"changed": 0, "without chunks": 0, GONE: 0} for name in config.source_types}
    for batch in _documents(config, asked, version_id or 0).pages():
        for source_type, reason in zip(batch["source_type"].to_pylist(), batch["reason"].to_pylist()):
            found[source_type][GONE if reason == GONE else "without chunks" if reason else "changed"] += 1
    name = f"version {version_id}" if version_id else "a new version"
    return [
        f"{name}: {'there' if asked.version else 'would be registered'}, strategy {config.chunking_strategy}, model "
        f"{asked.model.name}, revision {asked.model.revision[:12]}",
        *(
            f"{source_type:25} {totals[source_type]:>9,} documents, {counts['changed']:>9,} to embed, "
            f"{counts['without chunks']:>9,} to record without chunks, {counts[GONE]:,} gone"
            for source_type, counts in found.items()
        ),
        *(
            [
                "the unique index of text_chunks would be migrated, after a backup"
                if config.backup
                else "the unique index of text_chunks would be migrated"
            ]
            if migrated
            else []
        ),
        *(f"{name} = {setting.value}: {setting.reason}" for name, setting in asked.settings.items()),
    ]


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """The run as it was asked for, resolved against the version and the machine, before anything is written."""

    version: Version | None
    model: Model
    made: Mapping[str, Any]
    """How the version was made so far."""
    content_key: str
    precision: str
    backend: str
    vector_dtype: str
    machine: resources.Machine
    settings: Mapping[str, Setting] = field(default_factory=dict)


def _totals(config: ReembedConfig, database: Database) -> dict[str, int]:
    """Documents by source type. Raises SourceError where there are none: they are not taken for deleted, and nothing
    would be a complete version.
    """
    totals = count_documents(database, config.source_types)
    if not any(totals.values()):
        raise SourceError(
            f"{database.path}: no documents of {', '.join(config.source_types)}: fill the tables first, or name "
            f"another file with --db"
        )
    return totals


def _ask(config: ReembedConfig, database: Database, model: Model | None, environ: Mapping[str, str]) -> _Asked:
    version = versions.wanted(database, config.version_id, config.chunking_strategy)
    if version and version.strategy != config.chunking_strategy:
        raise ConfigError(
            f"version {version.id} has strategy {version.strategy}, asked for is {config.chunking_strategy}: name "
            f"another --version-id or --chunking-strategy {version.strategy}"
        )
    made = version.made if version else {}
    machine = resources.detect(Path(config.db).parent, environ=environ)
    threads = _threads(machine, environ)
    backend = str(made.get("backend", config.backend)) if config.backend == "torch" else config.backend
    chosen = model or _model(config, version, backend, threads.value)
    asked = _Asked(
        version=version,
        model=chosen,
        made=made,
        content_key=_content_key(config, chosen),
        machine=machine,
        backend=backend,
        precision=_kept("precision", config.precision, made, "float32"),
        vector_dtype=_kept("vector_dtype", config.vector_dtype, made, "float32"),
        settings={"threads": threads, "embedding_batch_size": _batch_size(config, machine)},
    )
    _check_backend(config, made, backend)
    if version and not config.replace_all_versions:
        _check_fits(asked, version, database)
    return asked


def _model(config: ReembedConfig, version: Version | None, backend: str, threads: int) -> Model:
    """The one asked for, else the version's, else the guides'. Raises SourceError where it is not to be had."""
    if config.model:
        name = Setting(config.model, "set by --model or EMBEDDING_MODEL")
    elif version and (named := version.made.get("model") or version.model_name):
        name = Setting(str(named), f"version {version.id} names it")
    else:
        name = Setting(DEFAULT_MODEL, "the default; another one: --model or EMBEDDING_MODEL")
    logger.info("model = %s: %s", name.value, name.reason)  # before it is looked for, which may take a download
    return SentenceModel.find(
        name.value, revision=config.revision, device=config.device, backend=backend, threads=threads
    )


def _content_key(config: ReembedConfig, model: Model) -> str:
    """All that decides a document's chunks and vectors besides its text. Precision is not in it: it belongs to a
    version and does not change within one.
    """
    sizes = {
        name: [
            [size.least, size.most, size.overlap]
            for size in chunk.sizes(config.chunking_strategy, name, config.query_type)
        ]
        for name in KINDS
    }
    return digest_json(
        {
            "chunk_version": chunk.VERSION,
            "strategy": config.chunking_strategy,
            "sizes": sizes,
            "query_type": config.query_type,
            "revision": model.revision,
        }
    )


def _kept(name: str, wanted: str | None, made: Mapping[str, Any], otherwise: str) -> str:
    """A version has one precision and one kind of vectors: the flag's, where the version has none yet."""
    have = made.get(name)
    if have is not None and wanted not in (None, "auto", have):
        raise ConfigError(
            f"the version was made with {name} {have}, asked for is {wanted}: leave the flag out, or build another "
            f"--version-id"
        )
    return str(have or wanted or otherwise)


def _check_backend(config: ReembedConfig, made: Mapping[str, Any], backend: str) -> None:
    if made and made.get("backend", backend) != backend:
        raise ConfigError(
            f"the version was made with backend {made['backend']}, asked for is {config.backend}: leave the flag out, "
            f"or build another --version-id"
        )


def _check_fits(asked: _Asked, version: Version, database: Database) -> None:
    """An active version is what people search in: it is never turned into another one under their hands. Raises
    ConfigError.
    """
    same = asked.made.get("content_key") == asked.content_key
    if asked.made and not same:
        what = (
            f"version {version.id} was made with model {asked.made['model']}, revision "
            f"{asked.made['revision'][:12]}, query type {asked.made.get('query_type')}"
        )
        if version.is_active:
            raise ConfigError(
                f"{what}; it is active, so it is not rebuilt with another: name a new --version-id, which takes its "
                f"place once it is complete"
            )
        logger.warning(
            "%s; all of its documents are embedded again with %s, revision %s",
            what,
            asked.model.name,
            asked.model.revision[:12],
        )
    elif not asked.made and version.is_active and version.model_name != asked.model.name and _dim(database, version.id):
        raise ConfigError(
            f"version {version.id} is active and was made by {version.model_name} with {_dim(database, version.id)} "
            f"dimensions, not by {asked.model.name}: "
            "name a new --version-id, which takes its place once it is complete"
        )


def _dim(database: Database, version_id: int) -> int | None:
    if "embedding_version_id" not in database.columns(
        "text_chunks"
    ):  # a database before the program's own migrations; a dry run adds nothing
        return None
    value = database.value(
        "SELECT dim FROM embeddings JOIN text_chunks ON text_chunks.id = chunk_id WHERE embedding_version_id = ? LIMIT "
        "1",
        (version_id,),
    )
    return None if value is None else int(value)


def _threads(machine: resources.Machine, environ: Mapping[str, str]) -> Setting:
    """torch takes all cores of the host otherwise, which a container does not have."""
    text = environ.get("OMP_NUM_THREADS", "")
    if text.isdigit() and int(text) > 0:
        return Setting(int(text), f"OMP_NUM_THREADS={text}")
    return machine.cpus


def _batch_size(config: ReembedConfig, machine: resources.Machine) -> Setting:
    if config.embedding_batch_size is not None:
        return Setting(config.embedding_batch_size, "set")
    return embedding_batch_size(
        machine.memory_bytes.value, cuda_bytes=cuda_bytes(config.device) if machine.gpus else None
    )


def _settings(config: ReembedConfig, asked: _Asked) -> dict[str, object]:
    return {
        **{name: value for name, value in asdict(config).items() if name != "dry_run"},
        "model": asked.model.name,
        "revision": asked.model.revision,
        **{name: setting.value for name, setting in asked.settings.items()},
    }


def _warn_of_sqlite(version: tuple[int, ...]) -> None:
    if wal_reset_bug(version):
        logger.warning(
            "SQLite %s has the WAL-reset bug, which may damage a database that two programs write to at one moment; "
            "pip install apsw brings a newer one, which moai then uses",
            ".".join(map(str, version)),
        )


def _documents(config: ReembedConfig, asked: _Asked, version_id: int) -> LawDocuments:
    return LawDocuments(
        path=Path(config.db),
        version_id=version_id,
        content_key=asked.content_key,
        doc_batch_size=config.doc_batch_size,
        source_types=config.source_types,
        limit=config.limit,
    )


def _work(config: ReembedConfig, asked: _Asked, version: Version, writer: Database, run: Run, total: int) -> Report:
    documents, seconds = _documents(config, asked, version.id), Seconds()
    if lost := versions.forget_lost(writer, version.id):
        logger.warning(
            "%s documents of version %d had lost chunks or embeddings to another program: they are embedded again",
            f"{lost:,}",
            version.id,
        )
    same = asked.made.get("content_key") == asked.content_key
    lazy = LoadedWhenNeeded(
        model=asked.model,
        precision=asked.precision,
        min_cosine=config.min_cosine,
        seconds=seconds,
        sample=lambda tokens: sample_rows(documents, cut, tokens),
        expected_dim=None if config.replace_all_versions else asked.made.get("dim") or _dim(writer, version.id),
        batch_tokens_made=asked.made.get("batch_tokens") if same else None,
    )
    size = int(asked.settings["embedding_batch_size"].value)
    cut = chunk.Chunk(
        strategy=config.chunking_strategy, query_type=config.query_type, embedding_batch_size=size, tokens=lazy.tokens
    )
    embed = Embed(encoder=lazy, vector_dtype=asked.vector_dtype)
    run.seconds, run.live = (
        seconds.by_stage,
        lambda: {"chunks_encoded": embed.encoded.chunks, "encode_batches": embed.encoded.batches},
    )
    into = VersionWriter(
        database=writer,
        run=run,
        version_id=version.id,
        strategy=config.chunking_strategy,
        query_type=config.query_type,
        model_name=asked.model.name,
        commit_interval=config.commit_interval,
        gone=GONE,
        replace_all_versions=config.replace_all_versions,
        on_change=lambda: _note_making(config, asked, version, writer, lazy),
    )
    progress = Progress(total=total, run=run)
    chunks = ahead(seconds.waiting("chunk", cut(seconds.waiting("read", documents.pages()))))

    def idle() -> None:
        into.beat()
        progress.say()

    encoded = ahead(seconds.waiting("encode", embed(seconds.waiting("wait", chunks))), idle=idle)
    try:
        for batch in encoded:
            with seconds.of("write"):
                into.add(batch)
                into.beat()
            progress.say()
        with seconds.of("write"):
            into.commit()
    except BaseException as error:
        embed.stop.set()
        encoded.close()
        if not isinstance(
            error, StorageError
        ):  # what is encoded and whole is kept; where the disk refused it, it would refuse again
            with contextlib.suppress(MoaiError):
                into.commit()
        raise
    finally:
        progress.end()
    if config.is_whole:
        _finish(config, version.id, writer)
    now = versions.get(writer, version.id)
    return Report(
        version_id=version.id,
        documents_total=total,
        counts=dict(run.counts),
        seconds=dict(seconds.by_stage),
        complete=now.is_complete,
        active=now.is_active,
    )


def _note_making(
    config: ReembedConfig, asked: _Asked, version: Version, writer: Database, lazy: LoadedWhenNeeded
) -> None:
    """In each transaction that changes the version: how it is made, that it is not whole, and that an index of it is
    stale.
    """
    versions.note(
        writer,
        version.id,
        **{**lazy.chosen, "min_cosine": lazy.chosen.get("min_cosine") or asked.made.get("min_cosine")},
        model=asked.model.name,
        revision=asked.model.revision,
        query_type=config.query_type,
        content_key=asked.content_key,
        backend=asked.backend,
        vector_dtype=asked.vector_dtype,
        complete=False,
        faiss=None,
    )
    if version.model_name != asked.model.name:
        writer.run("UPDATE embedding_versions SET model_name = ? WHERE id = ?", (asked.model.name, version.id))
    if config.replace_all_versions:
        for other in versions.listing(writer):
            if other.id != version.id and other.made:
                versions.note(writer, other.id, complete=False, faiss=None)


def _finish(config: ReembedConfig, version_id: int, writer: Database) -> None:
    """The version holds every document as it is now: index it, and put it in its place in one transaction.

    It is activated once, when it is first complete: a version that somebody rolled back from stays where it was put.
    """
    made = versions.get(writer, version_id).made
    noted: dict[str, Any] = {} if made.get("complete") else {"complete": True}
    if config.faiss and not search.is_indexed(writer.path, version_id, made.get("faiss") or {}, config.faiss):
        noted["faiss"] = search.build_index(writer, version_id, config.faiss)
    if config.activate and not made.get("activated"):
        before = versions.activate(writer, version_id, activated=True, **noted)
        logger.info(
            "Version %d is complete and active now%s",
            version_id,
            f", in the place of version {before.id}" if before else "",
        )
    elif noted:
        with writer.transaction("reembed.complete"):
            versions.note(writer, version_id, **noted)
