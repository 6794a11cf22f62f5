"""System 1: text -> filter -> tokenize -> pack -> sharded Arrow, prepared once a launch and opened by every rank.

prepared = prepare_or_wait(config, origins=origins)         # in every rank, before any process group exists
dataset = datasets.load_from_disk(str(prepared.path))
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from moai import resources
from moai.config import Setting
from moai.distributed import Ranks, Report, build_once, is_gone, owner, ranks
from moai.engine.executor import Executor, Processes, Serial
from moai.engine.ledger import Ledger
from moai.engine.pipeline import Pipeline
from moai.engine.progress import Progress
from moai.engine.run import Done, run
from moai.errors import ConfigError, SourceError, StorageError
from moai.files import canonical_json, digest_json, free_bytes, storage_errors, write_atomic
from moai.recipes import identity
from moai.recipes.options import DataConfig
from moai.recipes.prepared import Prepared
from moai.recipes.publish import BadRecords, Part, publish
from moai.sinks.arrow import ArrowShards
from moai.sources.discover import Input, discover
from moai.sources.local import LocalSource
from moai.sources.schema import columns_of
from moai.tokenizer import Reference, TokenizerSpec, load_tokenizer
from moai.transforms.filters import Length
from moai.transforms.pack import Pack
from moai.transforms.text import TextShape, ToText, choose_shape
from moai.transforms.tokenize import Tokenize

logger = logging.getLogger(__name__)

_FOLDERS = ("shards", "ranges", "transforms", "plans", "datasets", "attempts", "locks", "launches")
_OWNER = "owner.json"
_ALONE = Ranks()
_DISK_PER_TEXT_BYTE = 1.0
"""Bytes written per byte of text at most: about 3 bytes of text a token, 2 or 4 bytes an id, packed."""


@dataclass(frozen=True)
class Request:
    """What is wanted, resolved as far as it goes without reading data: the same for `prepare` and `plan`."""

    config: DataConfig
    cache: Path
    tokenizer: TokenizerSpec
    inputs: tuple[Input, ...]
    fields: Mapping[str, Any]
    key: str
    stamps_prove: bool
    """No file was so young when it was looked at that a later write could leave its stamp as it is."""

    @property
    def nominal_bytes(self) -> int:
        return sum(file.stamp.size for given in self.inputs for file in given.files)

    @property
    def text_bytes(self) -> int:
        """About how much there is once decompressed."""
        return sum(file.stamp.size * (4 if file.compression else 1) for given in self.inputs for file in given.files)


def prepare_or_wait(config: DataConfig, *, origins: Mapping[str, str], environ: Mapping[str, str] = os.environ) -> Prepared:
    """The prepared data, from rank 0's work or, in the other ranks, from waiting for it. Raises errors of moai.errors.

    Must be called before TrainingArguments, Accelerator or anything else that makes a process group.
    """
    here = ranks(environ)
    config = config.require()
    cache = Path(config.cache_dir).expanduser().absolute()

    def prepare_here(report: Report) -> dict[str, Any]:
        prepared = prepare(config, origins=origins, here=here, report=report, environ=environ)
        return {"path": str(prepared.path), "content_digest": prepared.content_digest, "memory_mode": prepared.memory_mode}

    result = build_once(prepare_here, ranks=here, cache=cache, scope=config.cache_scope, stall_timeout=config.stall_timeout, environ=environ)
    started = time.monotonic()
    prepared = Prepared.open(Path(result["path"]), memory_mode=result["memory_mode"])
    if prepared.content_digest != result["content_digest"]:
        raise SourceError(f"{result['path']}: holds {prepared.content_digest}, rank 0 said {result['content_digest']}; do all ranks see the same --cache_dir?")
    logger.info("[Rank %d] Loaded from disk in %.1fs: %s samples", here.rank, time.monotonic() - started, f"{prepared.content['rows']:,}")
    return prepared


def request(config: DataConfig) -> Request:
    """Find files and tokenizer; read no data. Raises SourceError, TokenizerError."""
    tokenizer = load_tokenizer(config.tokenizer_path, eos_token=config.eos_token, need_bos=config.add_bos)
    inputs = tuple(_distinct(given for index, spec in enumerate(config.dataset) for given in discover(spec, config.dataset_config if index == 0 else None)))
    stamps_prove = not any(file.stamp.is_racy() for given in inputs for file in given.files)
    cache = Path(config.cache_dir).expanduser().absolute()
    _keep_apart(cache, config.dataset)
    fields = identity.plan_fields(config, tokenizer, inputs)
    return Request(config, cache, tokenizer, inputs, fields, identity.plan_key(fields), stamps_prove)


def _keep_apart(cache: Path, dataset: Sequence[str]) -> None:
    """A cache inside the data would be data of the next run."""
    for spec in dataset:
        folder = Path(spec).expanduser()
        if not folder.is_dir() or not cache.resolve().is_relative_to(folder.resolve()):
            continue
        if not any(part.startswith((".", "__")) for part in cache.resolve().relative_to(folder.resolve()).parts):  # folders that are passed over
            raise ConfigError(f"--cache_dir {cache} lies inside the data {spec} and would be read as data by the next run; name another")


def find_prepared(wanted: Request) -> Prepared | None:
    """A hit: this plan was prepared before, its stamps prove that nothing changed, and its directory is whole."""
    record = identity.find_plan(wanted.cache, wanted.key)
    if record is None or not record["trusted"] or wanted.config.rehash:
        return None
    path = wanted.cache / "datasets" / record["directory"]
    return Prepared.open(path) if path.exists() else None


def why_missed(wanted: Request) -> str:
    """One line for people: why `find_prepared` found nothing."""
    record = identity.find_plan(wanted.cache, wanted.key)
    if record is None:
        return identity.explain_miss(wanted.cache, wanted.key, wanted.fields)
    if wanted.config.rehash:
        return "--rehash: everything is read and digested again, finished shards are reused where their content is the same"
    if not record["trusted"]:
        return "files had just been written when they were prepared, so they are digested again; finished shards are reused"
    return f"its directory {record['directory']} is gone; finished shards are reused"


def prepare(
    config: DataConfig, *, origins: Mapping[str, str], here: Ranks = _ALONE, report: Report = lambda _: None, environ: Mapping[str, str] = os.environ
) -> Prepared:
    """Prepare in this process and its workers, or find it prepared."""
    wanted = request(config.require())
    logger.info(
        "[Rank %d] Fast tokenizer: %s, %s ids, EOS %s", here.rank, config.tokenizer_path, f"{wanted.tokenizer.vocab_size:,}", wanted.tokenizer.eos_token
    )
    chosen = machine_plan(wanted, origins, here, environ)
    if found := find_prepared(wanted):
        return _hit(found, wanted, chosen.memory_mode.value, here)
    with storage_errors(wanted.cache):
        for folder in _FOLDERS:
            (wanted.cache / folder).mkdir(parents=True, exist_ok=True)
        with _locked(wanted, report):
            if found := find_prepared(wanted):
                return _hit(found, wanted, chosen.memory_mode.value, here)
            logger.info("[Rank %d] Cache miss for plan %s: %s", here.rank, wanted.key[:12], why_missed(wanted))
            for line in (*resources.lines(chosen), *chosen.warnings):
                logger.info("[Rank %d] %s", here.rank, line)
            return _work(wanted, chosen, here, report)


def _work(wanted: Request, chosen: resources.Plan, here: Ranks, report: Report) -> Prepared:
    started = time.monotonic()
    check_space(wanted)
    progress = Progress(wanted.nominal_bytes, label=f"Rank {here.rank}")
    bad = BadRecords(wanted.config.max_bad_ratio, progress)
    with _attempt(wanted) as attempt:
        parts = _run(wanted, chosen, attempt, progress, bad, report)
        bad.check(parts, wanted.cache / "quarantine" / f"{wanted.key}.jsonl")
        logger.info("[Rank %d] Saving final dataset to: %s", here.rank, wanted.cache / "datasets")
        saving = time.monotonic()
        made = {
            "created": datetime.now(UTC).isoformat(timespec="seconds"), "seconds": round(time.monotonic() - started, 3), "num_proc": chosen.num_proc.value,
            "shards_reused": progress.reused, "shards_made": progress.shards - progress.reused, "inputs": [os.fsencode(given.spec).decode("utf-8", "backslashreplace") for given in wanted.inputs],
        }  # fmt: skip
        path = publish(wanted.cache, attempt, wanted.config, wanted.tokenizer, parts, made)
    identity.note_plan(wanted.cache, wanted.key, wanted.fields, directory=path.name, trusted=wanted.stamps_prove)
    prepared = Prepared.open(path, memory_mode=chosen.memory_mode.value)
    seconds = time.monotonic() - started
    logger.info("[Rank %d] Dataset saved in %.1fs", here.rank, time.monotonic() - saving)
    logger.info("[Rank %d] Prepared %s documents in %.1fs (%s examples/s): %d shards, %d reused", here.rank, f"{prepared.content['documents']:,}", seconds,
                f"{progress.documents / max(seconds, 1e-6):,.0f}", progress.shards, progress.reused)  # fmt: skip
    return prepared


def _run(wanted: Request, chosen: resources.Plan, attempt: Path, progress: Progress, bad: BadRecords, report: Report) -> list[Part]:
    """All inputs from files to committed shards."""
    ledger = Ledger(wanted.cache)
    pipelines, shapes, identities = [], [], []
    for given in wanted.inputs:
        source, shape = open_source(wanted, given, attempt, chosen.batch_bytes.value)
        logger.info("%s: %d files, text from %s", given.name, len(given.files), shape.name if shape else "plain text")
        what = identity.transform_identity(wanted.config, wanted.tokenizer, given, shape)
        key = digest_json(what)[:40]
        pipelines.append(_pipeline(wanted, replace(source, transform_key=key), shape, attempt, key, ledger))
        shapes.append(shape.name if shape else "plain text")
        identities.append(what)

    def on_documents(number: int) -> None:
        progress.on_documents(number)
        report(progress.snapshot())

    def on_shard(done: Done) -> None:
        ledger.note_transform(done.receipt.transform_key, identities[done.pipeline])
        progress.on_shard(done.shard.nominal_bytes, reused=done.reused)
        if done.reused:
            progress.on_documents(done.receipt.counts.get("read", 0))
        bad.add(done.receipt.counts)
        report(progress.snapshot())

    results = run(pipelines, _executor(wanted, chosen), on_documents=on_documents, on_shard=on_shard)
    return [Part(given, shape, done) for given, shape, done in zip(wanted.inputs, shapes, results)]


def _executor(wanted: Request, chosen: resources.Plan) -> Executor:
    if chosen.num_proc.value == 0:
        return Serial()
    return Processes(num_proc=chosen.num_proc.value, threads=chosen.threads.value, stall_seconds=wanted.config.stall_timeout)


def open_source(wanted: Request, given: Input, spool_dir: Path, batch_bytes: int) -> tuple[LocalSource, TextShape | None]:
    """The source of one input, with the columns its text is made of. The shape is chosen here, once."""
    config = wanted.config
    source = LocalSource(
        name=given.name, kind=given.kind, files=given.files, shard_bytes=config.shard_bytes, cache=wanted.cache, spool_dir=spool_dir, txt_document=config.txt_document,
        max_record_bytes=config.max_doc_bytes, batch_rows=config.dataset_batch_size, batch_bytes=batch_bytes, trust_stamps=not config.rehash,
    )  # fmt: skip
    if given.kind == "txt":
        return source, None
    shape = choose_shape(columns_of(source, given), source=given.spec, text_column=config.text_column, template=config.text_template)
    return replace(source, columns=shape.columns), shape


def _pipeline(wanted: Request, source: LocalSource, shape: TextShape | None, attempt: Path, transform_key: str, ledger: Ledger) -> Pipeline:
    config = wanted.config
    dtype = np.dtype(wanted.tokenizer.dtype).name
    backend = Reference(spec=wanted.tokenizer, split_special_tokens=config.split_special_tokens)
    return Pipeline(
        source=source,
        transforms=(
            ToText(shape=shape or TextShape(name="plain text"), plain=shape is None, max_doc_bytes=config.max_doc_bytes),
            Length(min_chars=config.min_chars, max_chars=config.max_chars),
            Tokenize(backend=backend),
            Pack(seq_len=config.seq_len, strategy=config.packing, dtype=dtype, split_long=config.long_documents == "split"),
        ),
        sink=ArrowShards(cache=wanted.cache, staging=attempt, dtype=dtype, writer_batch_size=config.writer_batch_size, made_by=backend.made_by()),
        transform_key=transform_key,
        probe=ledger.has_transform(transform_key),
    )


def machine_plan(wanted: Request, origins: Mapping[str, str], here: Ranks, environ: Mapping[str, str]) -> resources.Plan:
    """Workers, threads and bytes. Where moai chooses the workers itself, data of one shard is not worth starting any."""
    config = wanted.config
    small = config.num_proc is None and wanted.text_bytes <= config.shard_bytes
    chosen = resources.plan(
        resources.detect(wanted.cache, environ=environ), num_proc=0 if small else config.num_proc, num_proc_origin=origins.get("num_proc", "the caller"),
        local_world_size=here.local_world_size, ranks_wait=True, memory_mode=config.memory_mode, shard_bytes=config.shard_bytes, batch_size=config.dataset_batch_size,
        environ=environ,
    )  # fmt: skip
    return replace(chosen, num_proc=Setting(0, "no more than one shard of data: worked on in this process")) if small else chosen


def check_space(wanted: Request) -> None:
    """Refuse what cannot end well before hours are spent. Raises StorageError with what is missing."""
    need = int(wanted.text_bytes * _DISK_PER_TEXT_BYTE * np.dtype(wanted.tokenizer.dtype).itemsize / 3)
    free = free_bytes(wanted.cache)
    if free < need // 2:
        raise StorageError(
            f"{wanted.cache}: about {need / 2**30:.1f} GiB are needed, {free / 2**30:.1f} GiB are free; free space there or name another --cache_dir"
        )
    if free < need:
        logger.warning("%s: about %.1f GiB may be needed, %.1f GiB are free", wanted.cache, need / 2**30, free / 2**30)


def _hit(found: Prepared, wanted: Request, memory_mode: str, here: Ranks) -> Prepared:
    BadRecords(wanted.config.max_bad_ratio, None).check_content(found.content)
    logger.info("[Rank %d] Found prepared (plan %s unchanged, %d shards reused: all): %s", here.rank, wanted.key[:12], len(found.content["shards"]), found.path)
    return Prepared(found.path, found.manifest, memory_mode)


@contextlib.contextmanager
def _locked(wanted: Request, report: Report) -> Iterator[None]:
    """Keep a second launch of the same plan from doing the same work. Correctness does not depend on it."""
    from filelock import FileLock, Timeout

    lock = FileLock(wanted.cache / "locks" / f"{wanted.key}.lock", fallback_to_soft=False)
    waited = 0.0
    while True:
        try:
            lock.acquire(timeout=5.0 if waited else 0.0)
            break
        except Timeout:
            if waited % 60 == 0:
                logger.info("Another launch prepares the same data (plan %s); waiting for it", wanted.key[:12])
            waited += 5.0
            report({"line": f"waiting for another launch that prepares the same data ({waited:.0f} s)", "counter": waited})
        except (OSError, NotImplementedError) as error:
            logger.warning("%s: no locks here (%s); going on without one, a second launch would repeat the work", wanted.cache, error)
            break
    try:
        yield
    finally:
        if lock.is_locked:
            lock.release()


@contextlib.contextmanager
def _attempt(wanted: Request) -> Iterator[Path]:
    """A private directory for what is not finished; removed afterwards, with those that dead attempts left on this host."""
    attempts = wanted.cache / "attempts"
    for left in attempts.iterdir():
        with contextlib.suppress(OSError, ValueError, KeyError):
            if is_gone(json.loads((left / _OWNER).read_bytes())):
                shutil.rmtree(left)
    path = attempts / f"{wanted.key[:24]}-{uuid.uuid4().hex}"
    path.mkdir()
    try:
        write_atomic(path / _OWNER, canonical_json(owner()), durable=False)
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _distinct(inputs: Iterator[Input]) -> Iterator[Input]:
    """Names of sources are names of shards: a second `train` becomes `train-2`."""
    seen: set[str] = set()
    for given in inputs:
        name = next(name for number in itertools.count(1) if (name := given.name if number == 1 else f"{given.name}-{number}") not in seen)
        seen.add(name)
        yield replace(given, name=name)
