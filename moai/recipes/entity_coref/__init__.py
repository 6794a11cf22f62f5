"""System 2: Korean text -> documents worth it -> repeated names -> a cap over the corpus -> samples with labels.

path = prepare(config, origins=origins)         # <output-dir>/entity_coref_v2_<seq_len>, which datasets.load_from_disk opens

Two chained pipelines with a small reduce between them: candidates per shard (rules, Kiwi, tokens, places), one choice over all of them, samples
per shard. Every finished shard of either stays when a run is stopped, and the next run goes on from there.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from multiprocessing import get_all_start_methods
from pathlib import Path
from typing import Any

from moai import resources
from moai.config import Setting
from moai.engine.executor import Executor, Processes, Serial
from moai.engine.ledger import Ledger
from moai.engine.pipeline import Pipeline
from moai.engine.run import Done, run
from moai.failpoints import failpoint
from moai.files import storage_errors
from moai.recipes.assembly import Stream
from moai.recipes.attempts import attempt, locked
from moai.recipes.entity_coref import assembly
from moai.recipes.entity_coref.assembly import Wanted
from moai.recipes.entity_coref.options import CorefConfig
from moai.recipes.entity_coref.progress import Stage
from moai.recipes.entity_coref.publishing import Corpus, existing, funnel, no_samples, publish, refuse_other, total
from moai.recipes.entity_coref.selection import Selection, select
from moai.recipes.places import Processed
from moai.recipes.publish import BadRecords
from moai.stopping import stoppable

logger = logging.getLogger(__name__)

_FOLDERS = ("shards", "ranges", "transforms", "attempts", "locks")
_SHARDS_PER_WORKER = 64
"""A worker is replaced after this many shards, some 25,000 documents: what its libraries keep cannot grow, and the next one costs a fork."""
_KIWI_BYTES = 500_000_000
"""What a worker that loads its own Kiwi holds beside the others."""


def prepare(config: CorefConfig, *, origins: Mapping[str, str], environ: Mapping[str, str] = os.environ) -> Path:
    """Prepare the corpus, or find it prepared. Returns the published directory; raises errors of moai.errors."""
    with stoppable("finished shards are kept, run again to go on from them"):
        chosen = machine_plan(config, origins, environ)
        executor = _executor(config, chosen)
        if not assembly.places(config)[1].exists():
            executor.start()  # Kiwi loads while the tokenizer and the files are looked at here
        wanted = assembly.want(config)
        if manifest := existing(wanted):
            refuse_other(wanted, manifest)
            if manifest["run"]["plan_key"] == wanted.key and manifest["run"]["stamps_prove"] and not config.rehash:
                logger.info("이미 준비되어 있습니다 (nothing changed since it was prepared): %s", wanted.output)
                return wanted.output
        with storage_errors(wanted.cache):
            for folder in _FOLDERS:
                (wanted.cache / folder).mkdir(parents=True, exist_ok=True)
            wanted.output.parent.mkdir(parents=True, exist_ok=True)
            with locked(wanted.cache, wanted.key, lambda _: None), attempt(wanted.cache, wanted.key) as staging:
                return _work(wanted, staging, executor, chosen)


def machine_plan(config: CorefConfig, origins: Mapping[str, str], environ: Mapping[str, str]) -> resources.Plan:
    """Workers and bytes. Forked workers share one Kiwi, so memory hardly limits them; of spawned ones each has its own."""
    extra = _KIWI_BYTES if start_method(config).value == "spawn" else 0
    return resources.plan(
        resources.detect(assembly.places(config)[0], environ=environ), num_proc=config.num_workers, num_proc_origin=origins.get("num_workers", "the caller"),
        local_world_size=1, ranks_wait=True, memory_mode="auto", shard_bytes=config.shard_bytes, batch_size=1000, environ=environ,
        worker_extra_bytes=extra,
    )  # fmt: skip


def start_method(config: CorefConfig) -> Setting:
    """Whether a process that has loaded Kiwi can be forked here."""
    if config.start_method != "auto":
        return Setting(config.start_method, "set")
    if sys.platform == "darwin":
        return Setting("spawn", "macOS: its libraries do not bear to be forked once they are loaded")
    if "forkserver" not in get_all_start_methods():
        return Setting("spawn", "no forkserver here")
    return Setting("forkserver", "one Kiwi for all workers")


def _work(wanted: Wanted, staging: Path, executor: Executor, chosen: resources.Plan) -> Path:
    started, workers = time.monotonic(), chosen.num_proc
    for line in (*resources.lines(chosen), *chosen.warnings):
        logger.info("%s", line)
    if isinstance(executor, Processes):
        logger.info("start_method = %s: %s", executor.method, start_method(wanted.config).reason)
    inputs = assembly.streams(wanted, staging, chosen.batch_bytes.value)
    for stream in inputs:
        logger.info("%s: %d files, text from %s", stream.given.name, len(stream.given.files), stream.to_text.shape.name)
    record = wanted.output.with_name(f"{wanted.output.name}.progress.jsonl")
    record.unlink(missing_ok=True)

    wanted.tokenizer.reference.load()  # the report needs it; Kiwi is still loading elsewhere
    logger.info("[1/2] 배치 병렬 품질 필터링 (%s 워커)", workers.value)
    stages = [Stage(wanted.request.nominal_bytes, name="candidates", batches=_about(wanted), record=record)]
    parts = _candidates(wanted, inputs, executor, staging, stages[0])
    counts = total(done.receipt.counts for part in parts for done in part.done)
    for name, number, what in funnel(counts):
        logger.info("  %s%s: %s", "- " if what == "lost" else "  ", name, f"{number:,}")

    candidates = [done for part in parts for done in part.done]
    selection = _select(wanted, candidates)
    failpoint("coref.selected")
    if not selection.total:
        raise no_samples(counts)
    pipeline = assembly.samples(wanted, candidates, selection, staging)
    groups = list(pipeline.source.shards())
    logger.info("[2/2] 샘플 생성: 총 샘플 수: %s | 배치 수: %d개 (배치당 약 %s개)", f"{selection.total:,}", len(groups), f"{wanted.config.token_chunk_size:,}")
    stages.append(Stage(selection.total, name="samples", batches=len(groups), record=record))
    samples = _run_stage([pipeline], _without_kiwi(executor), stages[1])[0]

    logger.info("배치 병합 중... (links, no second copy)")
    made_how = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"), "seconds": round(time.monotonic() - started, 3), "num_workers": workers.value,
        "shards_made": sum(stage.shards - stage.reused for stage in stages), "shards_reused": sum(stage.reused for stage in stages),
        "stamps_prove": wanted.request.stamps_prove,
    }  # fmt: skip
    path = publish(wanted, staging, Corpus(parts, selection, samples), made_how)
    seconds = time.monotonic() - started
    logger.info("저장 완료: %s", path)
    logger.info("샘플 수: %s | 시간: %.1f초 (%.1f분) | shards: %d made, %d reused", f"{selection.total:,}", seconds, seconds / 60,
                made_how["shards_made"], made_how["shards_reused"])  # fmt: skip
    return path


def _candidates(wanted: Wanted, inputs: Sequence[Stream], executor: Executor, staging: Path, stage: Stage) -> list[Processed]:
    """All inputs from files to committed candidate shards. Raises TooManyBadRecords."""
    ledger = Ledger(wanted.cache)
    bad = BadRecords(wanted.config.max_bad_ratio, stage)

    def on_shard(done: Done) -> None:
        ledger.note_transform(done.receipt.transform_key, inputs[done.pipeline].identity)
        bad.add(done.receipt.counts)

    pipelines = [assembly.candidates(wanted, stream, staging) for stream in inputs]
    results = _run_stage(pipelines, executor, stage, on_shard)
    parts = [Processed(stream, done) for stream, done in zip(inputs, results)]
    bad.check(parts, wanted.cache / "quarantine" / f"{wanted.key}.jsonl")
    return parts


def _select(wanted: Wanted, candidates: Sequence[Done]) -> Selection:
    config, ledger = wanted.config, Ledger(wanted.cache)
    paths = [ledger.shard(done.receipt.shard_key) for done in candidates]
    return select(paths, cap=config.max_entity_freq, policy=config.cap_policy, max_samples=config.max_samples)


def _run_stage(pipelines: Sequence[Pipeline], executor: Executor, stage: Stage, on_shard: Any = lambda done: None) -> list[list[Done]]:
    def finished(done: Done) -> None:
        on_shard(done)
        stage.add(done.receipt.counts)
        stage.on_shard(done.shard.nominal_bytes, reused=done.reused)
        if "samples" in done.receipt.counts:
            logger.info(" → 배치 %d 완료: %s개", stage.shards, f"{done.receipt.counts['samples']:,}")
        if done.reused:
            stage.on_documents(Counter(done.receipt.counts)["read"] + Counter(done.receipt.counts)["samples"])

    results = run(pipelines, executor, on_documents=stage.on_documents, on_shard=finished)
    stage.close()
    return results


def _executor(config: CorefConfig, chosen: resources.Plan) -> Executor:
    if not chosen.num_proc.value:
        return Serial()
    return Processes(
        num_proc=chosen.num_proc.value, method=start_method(config).value, threads=1, stall_seconds=config.stall_timeout, shards_per_worker=_SHARDS_PER_WORKER,
        modules=assembly.WORKER_MODULES, warm=assembly.warm(config),
    )  # fmt: skip


def _without_kiwi(executor: Executor) -> Executor:
    """For the second pipeline: spawned workers shall not load for nothing what forked ones have anyway."""
    return replace(executor, warm=()) if isinstance(executor, Processes) else executor


def _about(wanted: Wanted) -> int:
    return max(1, -(-wanted.request.text_bytes // wanted.config.shard_bytes))
