"""System 1: text -> filter -> tokenize -> pack -> sharded Arrow, prepared once a launch and opened by every rank.

prepared = prepare_or_wait(config)                          # in every rank, before any process group exists
dataset = datasets.load_from_disk(str(prepared.path))
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from moai.cache.leases import note_use
from moai.cache.staging import attempt, locked
from moai.core import resources
from moai.core.config import Setting
from moai.core.distributed import FIRST_SIGN_SECONDS, Ranks, Report, build_once, ranks
from moai.core.errors import BackendDisagrees, SourceError, StorageError
from moai.core.failpoints import failpoint
from moai.core.files import free_bytes, storage_errors
from moai.engine.executor import Cluster, Executor, Ray
from moai.engine.part import check_importable
from moai.engine.progress import Progress
from moai.engine.stage import Stage, run_stages
from moai.prepared.bad_records import check_content
from moai.prepared.manifest import MANIFEST, Prepared
from moai.prepared.places import Processed
from moai.pretraining import judging
from moai.pretraining import keys as identity
from moai.pretraining.assembly import (
    Found,
    Request,
    Stream,
    cluster_of,
    complete,
    executor_of,
    find,
    joining,
    pipeline,
    sample,
    streams,
)
from moai.pretraining.dataset import described
from moai.pretraining.losses import check_losses, losses
from moai.pretraining.options import DataConfig
from moai.pretraining.publish import publish
from moai.pretraining.tokenizer_backend import Chosen, Wrong, backends_of, choose, distrust, distrusted, forget
from moai.sources.discover import documents_in, many_small_texts
from moai.tokenizers.backends import Reference
from moai.transforms.chat import check_template, turn_ends

logger = logging.getLogger(__name__)

CALLER: Mapping[str, str] = MappingProxyType({})
"""Where no option says where it came from, it is the caller's."""
_FOLDERS = ("shards", "ranges", "transforms", "plans", "datasets", "attempts", "locks", "launches")
_ALONE = Ranks()
Finish = Callable[[list[Prepared]], list[Prepared]]
_SETTLE_SECONDS = 5.0
"""A directory that another launch renamed first, just now, may show up so much later."""
_FEW_SHARDS = 4
"""Until workers have started, this process alone, with a tokenizer on all cores, has done about as much
(benchmarks/startup.py).
"""
_PACKING = {"wrapped": "sequence concatenation", "bfd_split": "best-fit decreasing, long documents split"}
_DISK_PER_TEXT_BYTE = 1.0
"""Bytes written per byte of text at most: about 3 bytes of text a token, 2 or 4 bytes an id, packed."""


def prepare_or_wait(
    config: DataConfig, *, origins: Mapping[str, str] = CALLER, environ: Mapping[str, str] = os.environ
) -> Prepared:
    """The prepared data, from rank 0's work or, in the other ranks, from waiting for it. Raises errors of
    moai.core.errors.

    Must be called before TrainingArguments, Accelerator or anything else that makes a process group.
    """
    return prepare_all_or_wait([config], origins=origins, environ=environ)[0]


def prepare_all_or_wait(
    configs: Sequence[DataConfig],
    *,
    origins: Mapping[str, str] = CALLER,
    environ: Mapping[str, str] = os.environ,
    executor: Executor | None = None,
    finish: Finish | None = None,
) -> list[Prepared]:
    """The same for all that a launch needs, one behind the other in one cache: a launch prepares once.

    executor  what runs the shards, instead of this process or its workers; in no key
    finish    what rank 0 does with them at the end; its results take their place
    """
    here = ranks(environ)
    configs = [config.require() for config in configs]
    cache = Path(configs[0].cache_dir).expanduser().absolute()

    def prepare_here(report: Report) -> dict[str, Any]:
        common: dict[str, Any] = {"origins": origins, "here": here, "report": report, "environ": environ}
        with cluster_of(configs[0], here, environ, report) as cluster:
            made = [prepare(config, **common, executor=executor, cluster=cluster) for config in configs]
        made = finish(made) if finish else made
        return {
            "prepared": [
                {
                    "path": str(one.path),
                    "content_digest": one.content_digest,
                    "memory_mode": one.memory_mode,
                    "held_out": bool(one.content["config"].get("held_out")),
                }
                for one in made
            ]
        }

    with joining(configs[0], cache, here, environ) as heed:
        result = build_once(
            prepare_here,
            ranks=here,
            cache=cache,
            scope=configs[0].cache_scope,
            stall_timeout=configs[0].stall_timeout,
            environ=environ,
            heed=heed,
        )
    return [
        _open(Path(one["path"]), one["content_digest"], one["memory_mode"], _who(here, held_out=one["held_out"]))
        for one in result["prepared"]
    ]


def _open(path: Path, content_digest: str, memory_mode: str, who: str) -> Prepared:
    started = time.monotonic()
    logger.info("[%s] Loading final dataset from: %s", who, path)
    prepared = Prepared.open(path, memory_mode=memory_mode, patience_seconds=FIRST_SIGN_SECONDS)
    if prepared.content_digest != content_digest:
        raise SourceError(
            f"{path}: holds {prepared.content_digest}, rank 0 said {content_digest}; do all ranks see the same "
            f"--cache_dir?"
        )
    logger.info(
        "[%s] Loaded from disk in %.1fs: %s samples",
        who,
        time.monotonic() - started,
        f"{prepared.content['rows']:,}",
    )
    return prepared


def find_prepared(wanted: Request) -> Prepared | None:
    """A hit: this plan was prepared before, its stamps prove that nothing changed, and its directory is whole."""
    record = identity.find_plan(wanted.cache, wanted.key)
    if record is None or not record["trusted"] or not record.get("files_judged") or wanted.config.rehash:
        return None
    path = wanted.cache / "datasets" / record["directory"]
    found = Prepared.open(path) if path.exists() else None
    return None if found and _distrusted(wanted, found) else found


def _distrusted(wanted: Request, found: Prepared) -> str | None:
    """The backend that made some of it and was wrong since, with the same tokenizer."""
    names = found.manifest["run"].get("tokenizer_backends", [])
    same = (
        wrong
        for wrong in distrusted(wanted.cache)
        if wanted.tokenizer.digest.startswith(wrong.made_by["tokenizer_sha256"])
    )
    return next((wrong.name for wrong in same if wrong.name in names), None)


def _hold(wanted: Request) -> Prepared | None:
    """A hit that stays: noted as used, and still there after that, so that no `gc` was faster."""
    found = find_prepared(wanted)
    if found:
        note_use(wanted.cache, found.path.name)
    return found if found and (found.path / MANIFEST).exists() else None


def why_missed(wanted: Request) -> str:
    """One line for people: why `find_prepared` found nothing."""
    record = identity.find_plan(wanted.cache, wanted.key)
    if record is None:
        return identity.explain_miss(wanted.cache, wanted.key, wanted.fields)
    if wanted.config.rehash:
        return (
            "--rehash: everything is read and digested again, finished shards are reused where their content is the "
            "same"
        )
    if not record["trusted"]:
        return (
            "files had just been written when they were prepared, so they are digested again; finished shards are "
            "reused"
        )
    if not record.get("files_judged"):
        return "it was prepared when files were not judged one by one; finished shards are reused"
    path = wanted.cache / "datasets" / record["directory"]
    if path.exists() and (backend := _distrusted(wanted, Prepared.open(path))):
        return f"{backend}, which made it, was wrong since; what it made is made anew"
    return f"its directory {record['directory']} is gone; finished shards are reused"


def prepare(
    config: DataConfig,
    *,
    origins: Mapping[str, str] = CALLER,
    here: Ranks = _ALONE,
    report: Report = lambda _: None,
    environ: Mapping[str, str] = os.environ,
    executor: Executor | None = None,
    cluster: Cluster | None = None,
) -> Prepared:
    """Prepare in this process and its workers, on the cluster or by `executor`, or find it prepared."""
    who = _who(here, held_out=config.held_out)
    files = find(config.require())
    planned = machine_plan(files, origins, here, environ)
    if executor is None and planned.num_proc.value != 0:
        own = (value for entry in files.entries for value in (*entry.transforms, entry.source))
        check_importable((*files.config.transforms, *own))
    executor = executor or executor_of(files, planned, cluster=cluster)
    if identity.is_new(files.cache):
        # There is work to do, whatever its key: what it needs loads beside this process's own tokenizer.
        executor.start()
    wanted = complete(files)
    logger.info(
        "[%s] ✅ Using Fast Tokenizer (Rust-based): %s, %s ids, EOS %s",
        who,
        config.tokenizer_path,
        f"{wanted.tokenizer.vocab_size:,}",
        wanted.tokenizer.eos_token,
    )
    if wanted.tokenizer.wants_bos and not wanted.template and not config.held_out:
        logger.warning(
            "[%s] %s puts %s before a text, and documents begin without it: --add_bos adds it, where the model "
            "expects it",
            who,
            config.tokenizer_path,
            wanted.tokenizer.wants_bos,
        )
    if found := _hold(wanted):
        return _hit(found, wanted, planned.memory_mode.value, here)
    with storage_errors(wanted.cache):
        make_folders(wanted.cache)
        with locked(wanted.cache, wanted.key, report):
            if found := _hold(wanted):
                return _hit(found, wanted, planned.memory_mode.value, here)
            logger.info("[%s] Cache miss for plan %s: %s", who, wanted.key[:12], why_missed(wanted))
            executor.start()
            if isinstance(executor, Ray):
                planned = replace(planned, num_proc=executor.workers())
            for line in (
                *resources.lines(planned),
                f"  - Writer batch size: writer_batch_size = {config.writer_batch_size}: rows at most",
                *planned.warnings,
            ):
                logger.info("[%s] %s", who, line)
            return _work(wanted, planned, executor, here, report)


def make_folders(cache: Path) -> None:
    """Of a cache, before anything is prepared in it."""
    for folder in _FOLDERS:
        (cache / folder).mkdir(parents=True, exist_ok=True)


def _work(wanted: Request, planned: resources.Plan, executor: Executor, here: Ranks, report: Report) -> Prepared:
    started, who = time.monotonic(), _who(here, held_out=wanted.config.held_out)
    check_space(wanted)
    with attempt(wanted.cache, wanted.key) as staging:
        if wanted.template:
            check_chat(wanted, who)
        inputs = streams(wanted, staging, planned.batch_bytes.value)
        for stream in inputs:
            own = described(stream.reading.entry)
            logger.info(
                "%s: %d files, text from %s%s",
                stream.given.name,
                len(stream.given.files),
                stream.to_text.shape.name + (f", {documents_in(stream.given)}" if stream.given.kind.plain else ""),
                f"; {own}" if own else "",
            )
            if warning := many_small_texts(stream.given):
                logger.warning("%s", warning)
            if stream.not_read:
                logger.info("%s: not read: %s", stream.given.name, ", ".join(stream.not_read))
        for wrong in distrusted(
            wanted.cache
        ):  # whoever took that down may have been stopped before it forgot the shards
            forget(wanted.cache, wrong)
        # Where the workers run it is loaded anyway, so this process need not load it too.
        backend = executor.call(
            choose, wanted.config, wanted.tokenizer, distrusted(wanted.cache), sample(inputs), planned.threads.value
        )
        if backend.wrong:
            _distrust(wanted, backend.wrong, here)
        logger.info("[%s] %s", who, backend)
        for line in _steps(wanted.config, planned.num_proc.value):
            logger.info("[%s] %s", who, line)
        try:
            parts, judgement, progress = _run(wanted, inputs, backend, executor, staging, here, report)
        except BackendDisagrees as error:
            wrong = Wrong(backend.backend.made_by(), str(error))
            _distrust(wanted, wrong, here)
            parts, judgement, progress = _run(wanted, inputs, backend.without(wrong), executor, staging, here, report)
        logger.info("[%s] Saving final dataset to: %s", who, wanted.cache / "datasets")
        saving = time.monotonic()
        made_how = {
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - started, 3),
            "num_proc": planned.num_proc.value,
            "shards_reused": progress.reused,
            "shards_made": progress.shards - progress.reused,
            "tokenizer_backends": backends_of([done for part in parts for done in part.done]),
        }
        path = publish(
            wanted.cache, staging, wanted.config, wanted.tokenizer, parts, made_how, wanted.template, judgement
        )
        failpoint("plan.note")
        identity.note_plan(wanted.cache, wanted.key, wanted.fields, directory=path.name, trusted=wanted.stamps_prove)
        failpoint("plan.noted")
        note_use(wanted.cache, path.name)  # before the attempt goes: `gc` sees the one or the other
        prepared = Prepared.open(path, memory_mode=planned.memory_mode.value, patience_seconds=_SETTLE_SECONDS)
    _say_losses(prepared.content, who)
    seconds = time.monotonic() - started
    logger.info("[%s] Dataset saved in %.1fs", who, time.monotonic() - saving)
    logger.info(
        "[%s] Prepared %s documents in %.1fs (%s examples/s): %d shards, %d reused",
        who,
        f"{prepared.content['documents']:,}",
        seconds,
        f"{progress.documents / max(seconds, 1e-6):,.0f}",
        progress.shards,
        progress.reused,
    )
    return prepared


def _who(here: Ranks, *, held_out: bool) -> str:
    """Before every line: of what is held out that it is."""
    return f"Rank {here.rank}{', held out' if held_out else ''}"


def _distrust(wanted: Request, wrong: Wrong, here: Ranks) -> None:
    who = _who(here, held_out=wanted.config.held_out)
    made = distrust(wanted.cache, wrong)
    logger.warning(
        "[%s] %s gave other ids than tokenizers (%s). It is not used in this cache again, the %d shards it made "
        "here are made anew",
        who,
        wrong.name,
        wrong.because,
        made,
    )


def _run(
    wanted: Request,
    inputs: Sequence[Stream],
    backend: Chosen,
    executor: Executor,
    staging: Path,
    here: Ranks,
    report: Report,
) -> tuple[list[Processed[Stream]], judging.Judgement | None, Progress]:
    """All inputs from files to committed shards. Raises TooManyBadRecords, BackendDisagrees."""
    who = _who(here, held_out=wanted.config.held_out)
    progress = Progress(wanted.nominal_bytes, label=who)
    judges = wanted.config.judges
    judgement = judging.judge(wanted, inputs, executor, staging, label=who, report=report) if judges else None
    watch = judging.watching(wanted, inputs, progress, report, warns=judgement is None)
    pack: Stage[None, list[Processed[Stream]]] = Stage(
        pipelines=lambda _: [
            pipeline(wanted, stream, backend, staging) for stream in judging.judged(inputs, judgement)
        ],
        reduce=lambda _, results: watch.processed(results),
        watch=lambda *_: watch,
    )
    parts = run_stages([pack], executor)
    progress.end()
    read, kept = (
        sum(done.receipt.counts.get(name, 0) for part in parts for done in part.done) for name in ("read", "kept")
    )
    logger.info("[%s] Conversion completed: %s documents of %s", who, f"{kept:,}", f"{read:,}")
    return parts, judgement, progress


def _steps(config: DataConfig, workers: int) -> Iterator[str]:
    """What the one pass does, in the words that people look for."""
    what = ("tasks of Ray", "task of Ray") if config.executor == "ray" else ("processes", "process")
    who = f"{workers} {what[0]}" if workers > 1 else f"1 {what[1]}"
    yield f"Converting dataset with {who}, in one pass with all that follows..."
    if config.data_format == "text" and config.min_chars:
        yield (
            f"Filtering {'empty texts' if config.min_chars == 1 else f'texts under {config.min_chars:,} characters'} "
            f"with {who}..."
        )
    yield f"⚡ Tokenizing with {who}..."
    if config.packing != "none":
        yield f"📦 Using {_PACKING.get(config.packing, 'best-fit decreasing')} (packing mode {config.packing})"


def machine_plan(found: Found, origins: Mapping[str, str], here: Ranks, environ: Mapping[str, str]) -> resources.Plan:
    """Workers, threads and bytes. Where moai chooses the workers itself, a few shards are not worth starting any."""
    config, on_ray = found.config, found.config.executor == "ray"
    small = not on_ray and config.num_proc is None and found.text_bytes <= _FEW_SHARDS * config.shard_bytes
    chosen = resources.plan(
        resources.detect(found.cache, environ=environ),
        num_proc=0 if small else config.num_proc,
        num_proc_origin="the size of the data" if small else origins.get("num_proc", "the caller"),
        local_world_size=here.local_world_size,
        ranks_wait=True,
        memory_mode=config.memory_mode,
        shard_bytes=config.shard_bytes,
        batch_size=config.dataset_batch_size,
        environ=environ,
    )
    if on_ray:
        return resources.over_cluster(chosen, config.num_proc)
    return replace(chosen, num_proc=Setting(0, "a few shards of data: worked on in this process")) if small else chosen


def check_chat(wanted: Request, who: str) -> None:
    """Refuse a template that cannot be learned from before any work. Raises TokenizerError."""
    assert wanted.template
    where = wanted.config.chat_template or wanted.config.tokenizer_path
    enders = tuple(token for token in Reference(spec=wanted.tokenizer).special_tokens() if token.strip())
    warning, eos = check_template(wanted.template, enders, where), wanted.tokenizer.eos_token
    if not warning and (others := [end for end in turn_ends(wanted.template, enders) if end != eos]):
        warning = (
            f"a turn ends with {' or '.join(others)}, a text with {eos}: generation_config.json of what is trained "
            f"names all of them, so that generation stops at each"
        )
    if warning and not wanted.config.held_out:  # the rest of the data was told it
        logger.warning("[%s] %s", who, warning)


def _say_losses(content: Mapping[str, Any], who: str) -> None:
    for line in losses(content):
        logger.warning("[%s] %s", who, line)


def check_space(wanted: Request) -> None:
    """Refuse what cannot end well before hours are spent. Raises StorageError with what is missing."""
    need = int(wanted.text_bytes * _DISK_PER_TEXT_BYTE * np.dtype(wanted.tokenizer.dtype).itemsize / 3)
    free = free_bytes(wanted.cache)
    if free < need // 2:
        raise StorageError(
            f"{wanted.cache}: about {need / 2**30:.1f} GiB are needed, {free / 2**30:.1f} GiB are free; free space "
            f"there or name another --cache_dir"
        )
    if free < need:
        logger.warning("%s: about %.1f GiB may be needed, %.1f GiB are free", wanted.cache, need / 2**30, free / 2**30)


def _hit(found: Prepared, wanted: Request, memory_mode: str, here: Ranks) -> Prepared:
    who = _who(here, held_out=wanted.config.held_out)
    check_content(found.content, wanted.config.max_bad_ratio, wanted.config.max_bad_files)
    check_losses(found.content, wanted.config.max_bad_ratio)
    _say_losses(found.content, who)
    logger.info(
        "[%s] Found prepared (plan %s unchanged, %d shards reused: all): %s",
        who,
        wanted.key[:12],
        len(found.content["shards"]),
        found.path,
    )
    return Prepared(found.path, found.manifest, memory_mode)
