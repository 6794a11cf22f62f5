"""How a run makes its version: flags, version and machine settled with one another before anything is written."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moai.core import resources
from moai.core.config import Setting
from moai.core.errors import ConfigError, SourceError
from moai.reembedding import versions
from moai.reembedding.context import Templates
from moai.reembedding.database import Database
from moai.reembedding.documents import content_key
from moai.reembedding.embed import Model
from moai.reembedding.encoders import SentenceModel
from moai.reembedding.kinds import count_documents
from moai.reembedding.options import DEFAULT_MODEL, ReembedConfig, cuda_bytes, embedding_batch_size
from moai.reembedding.versions import Version

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Making:
    version: Version | None
    """None where it is not registered yet."""
    totals: Mapping[str, int]
    """Documents by source type."""
    made: Mapping[str, Any]
    """How it was made so far."""
    model: Model
    content_key: str
    templates: Templates
    precision: str
    backend: str
    vector_dtype: str
    memory_bytes: int
    threads: Setting
    embedding_batch_size: Setting

    @property
    def is_as_before(self) -> bool:
        return self.made.get("content_key") == self.content_key


def settle(config: ReembedConfig, database: Database, model: Model | None, environ: Mapping[str, str]) -> Making:
    """Raises ConfigError where the flags do not fit the version, SourceError without such a model or any document."""
    strategy = config.chunking_strategy
    given = Templates.read(Path(config.context)) if config.context else None
    totals = count_documents(database, config.source_types)
    # None are not taken for deleted, and nothing would be a complete version.
    if not any(totals.values()):
        raise SourceError(
            f"{database.path}: no documents of {', '.join(totals)}: fill the tables first, or name another file with "
            f"--db"
        )
    version = versions.wanted(database, config.version_id, strategy)
    if version and version.strategy != strategy:
        raise ConfigError(
            f"version {version.id} has strategy {version.strategy}, asked for is {strategy}: name another "
            f"--version-id or --chunking-strategy {version.strategy}"
        )
    made = version.made if version else {}
    precision = _kept("precision", config.precision, made, "float32")
    backend = _kept("backend", None if config.backend == "torch" else config.backend, made, "torch")
    vector_dtype = _kept("vector_dtype", config.vector_dtype, made, "float32")
    name = _model_name(config.model, version)
    machine = resources.detect(database.path.parent, environ=environ)
    # torch takes all cores of the host otherwise, which a container does not have.
    text = environ.get("OMP_NUM_THREADS", "")
    threads = Setting(int(text), f"OMP_NUM_THREADS={text}") if text.isdecimal() and int(text) else machine.cpus
    if model is None:
        logger.info("model = %s: %s", name.value, name.reason)  # before it is looked for, which may take a download
        model = SentenceModel.find(
            name.value,
            revision=config.revision,
            device=config.device,
            backend=backend,
            threads=threads.value,
            exports=Path(config.exports),
        )
        if precision == "bfloat16" and backend != "onnx" and (config.device == "cpu" or not machine.gpus):
            _check_bfloat16(version, made)
    memory = machine.memory_bytes.value
    if config.embedding_batch_size is not None:
        batch_size = Setting(config.embedding_batch_size, "set")
    else:
        batch_size = embedding_batch_size(memory, cuda_bytes=cuda_bytes(config.device) if machine.gpus else None)
    making = Making(
        version=version,
        totals=totals,
        made=made,
        model=model,
        content_key=content_key(strategy, config.query_type, model.revision),
        templates=given or templates_of(made),
        precision=precision,
        backend=backend,
        vector_dtype=vector_dtype,
        memory_bytes=memory,
        threads=threads,
        embedding_batch_size=batch_size,
    )
    if version and not config.replace_all_versions:
        _check_fits(making, version, database)
    return making


def templates_of(made: Mapping[str, Any]) -> Templates:
    """What the version was made with, else the default."""
    return Templates.of(made["context"], "the version's") if made.get("context") else Templates.default()


def dimensions(database: Database, version_id: int) -> int | None:
    """Of the version's vectors; None where it has none."""
    if "embedding_version_id" not in database.columns("text_chunks"):  # before the law program's own migrations
        return None
    sql = "SELECT dim FROM embeddings JOIN text_chunks c ON c.id = chunk_id WHERE embedding_version_id = ? LIMIT 1"
    value = database.value(sql, (version_id,))
    return None if value is None else int(value)


def _model_name(asked: str | None, version: Version | None) -> Setting:
    """The one asked for, else the version's, else the guides'."""
    if asked:
        return Setting(asked, "set by --model or EMBEDDING_MODEL")
    if version and (named := version.made.get("model") or version.model_name):
        return Setting(str(named), f"version {version.id} names it")
    return Setting(DEFAULT_MODEL, "the default; another one: --model or EMBEDDING_MODEL")


def _kept(name: str, wanted: str | None, made: Mapping[str, Any], otherwise: str) -> str:
    """What the version was made with, which a flag may not change; the flag's where it has none yet."""
    have = made.get(name)
    if have is not None and wanted not in (None, "auto", have):
        raise ConfigError(
            f"the version was made with {name} {have}, asked for is {wanted}: leave the flag out, or build another "
            f"--version-id"
        )
    return str(have or wanted or otherwise)


def _check_bfloat16(version: Version | None, made: Mapping[str, Any]) -> None:
    """Without the instructions for it bfloat16 took 6.7 times as long as float32."""
    have = resources.instruction_sets()
    if not have or have & {"avx512_bf16", "amx_bf16"}:
        return
    what = f"this processor computes bfloat16 without instructions for it ({', '.join(sorted(have))})"
    if version is None or made.get("precision") != "bfloat16":
        raise ConfigError(f"{what}, which takes several times as long as float32: leave --precision out")
    said = "Version %d was made in bfloat16 and goes on in it; %s, so it takes several times as long"
    logger.warning(said, version.id, what)


def _check_fits(making: Making, version: Version, database: Database) -> None:
    """An active version is what people search in: it is never turned into another one under their hands."""
    made, model = making.made, making.model
    way_out = "name a new --version-id, which takes its place once it is complete"
    if made and not making.is_as_before:
        what = (
            f"version {version.id} was made with model {made['model']}, revision {made['revision'][:12]}, "
            f"query type {made.get('query_type')}"
        )
        if version.is_active:
            raise ConfigError(f"{what}; it is active, so it is not rebuilt with another: {way_out}")
        again = "%s; all of its documents are embedded again with %s, revision %s"
        logger.warning(again, what, model.name, model.revision[:12])
    elif not made and version.is_active and version.model_name != model.name and dimensions(database, version.id):
        raise ConfigError(
            f"version {version.id} is active and was made by {version.model_name} with "
            f"{dimensions(database, version.id)} dimensions, not by {model.name}: {way_out}"
        )
