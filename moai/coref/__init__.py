"""System 2: Korean text -> documents worth it -> repeated names -> a cap over the corpus -> samples with labels.

path = prepare(config, origins=origins)         # <output-dir>/entity_coref_v2_<seq_len>, for datasets.load_from_disk

Two stages: candidates per shard (rules, Kiwi, tokens, places) and one choice over all of them; samples per shard. Every
finished shard of either stays when a run is stopped, and the next run goes on from there.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from multiprocessing import get_all_start_methods
from pathlib import Path

from moai.cache.ledger import Ledger
from moai.cache.staging import attempt, locked
from moai.core import resources
from moai.core.config import Setting
from moai.core.files import storage_errors
from moai.core.stopping import stoppable
from moai.coref import assembly
from moai.coref.assembly import Stream, Wanted
from moai.coref.options import CorefConfig
from moai.coref.progress import StageProgress
from moai.coref.publishing import Corpus, funnel, is_published, losses, mentions, no_samples, publish
from moai.coref.selection import select
from moai.coref.wording import said
from moai.engine.executor import Cluster, Executor, Ray, make_executor
from moai.engine.pipeline import Pipeline
from moai.engine.stage import Results, Stage, run_stages
from moai.prepared.bad_records import InputWatch

logger = logging.getLogger(__name__)

_FOLDERS = ("shards", "ranges", "transforms", "attempts", "locks")
_SHARDS_PER_WORKER = 64
"""A worker is replaced after this many shards, some 25,000 documents: what its libraries keep cannot grow, and the next
one costs a fork.
"""
_KIWI_BYTES = 500_000_000
"""What a worker that loads its own Kiwi holds beside the others."""


def prepare(config: CorefConfig, *, origins: Mapping[str, str], environ: Mapping[str, str] = os.environ) -> Path:
    """Prepare the corpus, or find it prepared. Returns the published directory; raises errors of moai.core.errors."""
    with stoppable("finished shards are kept, run again to go on from them", within_seconds=4):
        cache, output = assembly.places(config)
        on_ray = config.executor == "ray"
        with Cluster(shared=cache / "attempts", environ=environ) if on_ray else nullcontext() as cluster:
            return _prepare(config, cache, output, cluster, origins, environ)


def _prepare(
    config: CorefConfig,
    cache: Path,
    output: Path,
    cluster: Cluster | None,
    origins: Mapping[str, str],
    environ: Mapping[str, str],
) -> Path:
    machine, method = machine_plan(config, origins, environ), start_method(config)
    executor = make_executor(
        machine.num_proc.value,
        cluster=cluster,
        method=method.value,
        threads=1,
        stall_seconds=config.stall_timeout,
        shards_per_worker=_SHARDS_PER_WORKER,
        modules=assembly.WORKER_MODULES,
        warm=assembly.warm(config),
    )
    if not output.exists():
        executor.start()  # Kiwi loads while the tokenizer and the files are looked at here
    wanted = assembly.want(config)
    if is_published(wanted):
        logger.info(said(config.lang, "published", path=output))
        return output
    with storage_errors(cache):
        for folder in _FOLDERS:
            (cache / folder).mkdir(parents=True, exist_ok=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        executor.start()
        if isinstance(executor, Ray):
            machine = replace(machine, num_proc=executor.workers())
        for line in (*resources.lines(machine), *machine.warnings):
            logger.info("%s", line)
        if machine.num_proc.value and not cluster:
            logger.info("start_method = %s: %s", method.value, method.reason)
        with locked(cache, wanted.key, lambda _: None), attempt(cache, wanted.key) as staging:
            _make(wanted, staging, executor, machine)
    return output


def machine_plan(config: CorefConfig, origins: Mapping[str, str], environ: Mapping[str, str]) -> resources.Plan:
    """Workers and bytes. Forked workers share one Kiwi, so memory hardly limits them; of spawned ones each has its
    own.
    """
    chosen = resources.plan(
        resources.detect(assembly.places(config)[0], environ=environ),
        num_proc=config.num_workers,
        num_proc_origin=origins.get("num_workers", "the caller"),
        local_world_size=1,
        ranks_wait=True,
        memory_mode="auto",
        shard_bytes=config.shard_bytes,
        batch_size=1000,
        environ=environ,
        worker_extra_bytes=_KIWI_BYTES if start_method(config).value == "spawn" else 0,
    )
    return resources.over_cluster(chosen, config.num_workers) if config.executor == "ray" else chosen


def start_method(config: CorefConfig) -> Setting:
    """Whether a process that has loaded Kiwi can be forked here."""
    if config.start_method != "auto":
        return Setting(config.start_method, "set")
    if sys.platform == "darwin":
        return Setting("spawn", "macOS: its libraries do not bear to be forked once they are loaded")
    if "forkserver" not in get_all_start_methods():
        return Setting("spawn", "no forkserver here")
    return Setting("forkserver", "one Kiwi for all workers")


def _make(wanted: Wanted, staging: Path, executor: Executor, machine: resources.Plan) -> None:
    """Both stages, and the corpus of what they made."""
    started = time.monotonic()
    streams = assembly.streams(wanted, staging, machine.batch_bytes.value)
    for stream in streams:
        logger.info("%s: %d files, text from %s", stream.given.name, len(stream.given.files), stream.shape.name)
    wanted.tokenizer.reference.load()  # the report needs it; Kiwi is still loading elsewhere
    lang = wanted.config.lang
    logger.info(said(lang, "stage 1", workers=machine.num_proc.value))
    corpus: Corpus = run_stages(_stages(wanted, streams, staging), executor)
    logger.info(said(lang, "merge"))
    shards = [*corpus.candidates, *corpus.samples]
    reused, seconds = sum(done.reused for done in shards), time.monotonic() - started
    run = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 3),
        "num_workers": machine.num_proc.value,
        "shards_made": len(shards) - reused,
        "shards_reused": reused,
        "stamps_prove": wanted.stamps_prove,
    }
    publish(wanted, staging, corpus, run)
    seconds = time.monotonic() - started
    for line in losses(corpus.counts):
        logger.info("  %s", line)
    logger.info(said(lang, "saved", path=wanted.output))
    ended = {"number": corpus.selection.total, "seconds": seconds, "minutes": seconds / 60}
    logger.info(said(lang, "end", **ended, made=len(shards) - reused, reused=reused))


def _stages(
    wanted: Wanted, streams: Sequence[Stream], staging: Path
) -> tuple[Stage[None, Corpus], Stage[Corpus, Corpus]]:
    """Candidates in every document, and which of them are picked over all; then a sample of each of these."""
    config, cache, inputs = wanted.config, wanted.cache, wanted.inputs
    record = wanted.output.with_name(f"{wanted.output.name}.progress.jsonl")
    record.unlink(missing_ok=True)
    progress = StageProgress(
        sum(given.nominal_bytes for given in inputs),
        name="candidates",
        batches=max(1, -(-sum(given.text_bytes for given in inputs) // config.shard_bytes)),
        record=record,
        lang=config.lang,
        losses=losses,
        most=config.max_documents * len(inputs) if config.max_documents else None,
    )
    reading = InputWatch(
        streams=streams, progress=progress, cache=cache, key=wanted.key, max_ratio=config.max_bad_ratio
    )

    def pick(_: None, results: Results) -> Corpus:
        paths = [Ledger(cache).shard(done.receipt.shard_key) for part in results for done in part]
        assert config.cap_policy is not None
        assert config.max_name_share is not None
        assert config.min_difficulty is not None
        selection = select(
            paths,
            cap=config.max_entity_freq,
            policy=config.cap_policy,
            max_samples=config.max_samples,
            max_name_share=config.max_name_share,
            min_difficulty=config.min_difficulty,
            validation_ratio=config.validation_ratio,
        )
        return Corpus(reading.processed(results), selection)

    def samples(corpus: Corpus) -> list[Pipeline]:
        for name, number, what in [*funnel(corpus.counts), *mentions(corpus.counts, corpus.selection)]:
            logger.info("  %s%s: %s", "- " if what == "lost" else "  ", name, f"{number:,}")
        if not corpus.selection.total:
            raise no_samples(corpus)
        return assembly.samples(wanted, corpus.candidates, corpus.selection, staging)

    def watch_samples(corpus: Corpus, pipelines: Sequence[Pipeline]) -> StageProgress:
        files, number = sum(1 for pipeline in pipelines for _ in pipeline.source.shards()), corpus.selection.total
        logger.info(said(config.lang, "stage 2", number=number, files=files, each=config.token_chunk_size))
        return StageProgress(number, name="samples", batches=files, record=record, lang=config.lang)

    return (
        Stage(
            pipelines=lambda _: [assembly.candidates(cache, stream, staging) for stream in streams],
            reduce=pick,
            watch=lambda *_: reading,
        ),
        Stage(
            pipelines=samples,
            reduce=lambda corpus, results: replace(corpus, samples=[done for part in results for done in part]),
            watch=watch_samples,
        ),
    )
