"""Judging in the recipe: a stage that measures every document, the decision, and what of it the packing stage sees."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from moai.cache.ledger import Ledger
from moai.core.distributed import Report
from moai.core.errors import SourceError
from moai.core.failpoints import failpoint
from moai.core.files import canonical_json, digest_json, link_or_copy
from moai.engine.documents import read_documents
from moai.engine.executor import Executor
from moai.engine.part import Signal
from moai.engine.progress import Progress
from moai.engine.run import Done
from moai.engine.stage import Results, Stage, run_stages
from moai.prepared.bad_records import InputWatch
from moai.prepared.manifest import write_file
from moai.pretraining.against import open_against
from moai.pretraining.assembly import Request, Stream
from moai.pretraining.duplicates import Search
from moai.pretraining.measuring import Measured, measuring, signals_of
from moai.quality.contamination import Contamination
from moai.quality.corpus import ShardSidecars
from moai.quality.fasttext import FastText, check_installed
from moai.quality.findings import Findings
from moai.quality.hashes import DocumentHash
from moai.quality.language import Language
from moai.quality.minhash import MinHash
from moai.quality.report import Tally, read_summary
from moai.quality.statistics import warn_without_numba
from moai.quality.verdicts import JudgedSource, Verdict, write_bits, write_verdict

QUALITY_JSON, QUALITY_HTML = "quality.json", "quality.html"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Judgement:
    """What was decided of all inputs."""

    verdicts: tuple[dict[str, Verdict], ...]
    """By the ids of the shards, for each stream."""
    signals: tuple[Signal, ...]
    copies: Mapping[str, Any]
    """What counts as one: `dedup` and `similarity` as they were set."""
    tally: Tally
    files: dict[str, Path]
    """What stands in the prepared directory of it, by name: signals and verdicts of each shard, in order."""

    @property
    def digest(self) -> str:
        """Of what was measured and decided, over all shards."""
        found = [[verdict.measured, verdict.dropped] for one in self.verdicts for verdict in one.values()]
        return digest_json(
            [self.tally.profile.identity(), dict(self.copies), [one.identity() for one in self.signals], found]
        )

    def summary(self) -> dict[str, Any]:
        """What the manifest says of it."""
        return {
            "profile": self.tally.profile.identity(),
            **self.copies,
            "signals": [one.identity() for one in self.signals],
            "sources": self.tally.sources,
        }

    def reports(self) -> dict[str, bytes]:
        return {
            QUALITY_JSON: canonical_json({**self.tally.summary(), **self.summary()}) + b"\n",
            QUALITY_HTML: self.tally.page("What was judged").encode(),
        }

    def write_into(self, directory: Path) -> list[str]:
        """The report, and links to the other files. Returns the names of those that are Arrow."""
        for name, path in self.files.items():
            link_or_copy(path, directory / name)
        for name, data in self.reports().items():
            write_file(directory / name, data)
        return list(self.files)


def judged(streams: Sequence[Stream], judgement: Judgement | None) -> list[Stream]:
    """The inputs without the documents that were judged away."""
    if judgement is None:
        return list(streams)
    return [
        replace(stream, source=JudgedSource(source=stream.source, verdicts=verdicts))
        for stream, verdicts in zip(streams, judgement.verdicts, strict=True)
    ]


def watching(
    wanted: Request, streams: Sequence[Stream], progress: Progress, report: Report, *, warns: bool = True
) -> InputWatch[Stream]:
    """Who hears how far a stage over the inputs is, and ends it where too much of them is bad."""
    return InputWatch(
        streams=streams,
        progress=progress,
        cache=wanted.cache,
        key=wanted.key,
        max_ratio=wanted.config.max_bad_ratio,
        max_files=wanted.config.max_bad_files,
        report=report,
        warns=warns,
    )


def judge(
    wanted: Request, streams: Sequence[Stream], executor: Executor, staging: Path, *, label: str, report: Report
) -> Judgement:
    """Measure every document and decide. Raises SourceError beyond --max_dropped."""
    if wanted.config.has_rules:
        warn_without_numba()
    signals = signals_of(wanted.config)
    if any(isinstance(one, Language | FastText) for stream in streams for one in (*signals, *stream.inner)):
        check_installed()
    items = next((one.items for one in signals if isinstance(one, Contamination)), ())
    measured = [measuring(stream, signals) for stream in streams]
    profile = wanted.config.profile().of_sources(
        {stream.given.name: one for stream in streams if (one := stream.reading.entry.quality)}
    )
    profile.check([column for one in measured for each in one.sidecars for column in each.signal.adds])
    progress = Progress(wanted.nominal_bytes, label=label, doing="Measuring")
    watch = watching(wanted, [one.stream for one in measured], progress, report)

    def note(_: None, results: Results) -> Results:
        progress.end()
        for one in (one for input_ in measured for one in input_.sidecars):
            Ledger(wanted.cache).note_transform(one.key, one.identity)
        return results

    stage = Stage(
        pipelines=lambda _: [one.pipeline(wanted, staging) for one in measured],
        reduce=note,
        watch=lambda *_: watch,
    )
    results: Results = run_stages([stage], executor)
    shards = [(at, done) for at, finished in enumerate(results) for done in finished]
    tally, failed, kept = Tally(profile, Findings(items)), [], []
    for at, done in shards:
        table = _table(wanted.cache, measured[at], done)
        failed.append(tally.judge(streams[at].given.name, table, done.receipt.counts))
        kept.append(table["reason"].is_null().to_numpy() & (failed[-1] == 0))
    duplicates = None
    if wanted.config.dedup != "none":
        directory = wanted.config.dedup_against
        hashes = tuple(one for one in signals if isinstance(one, DocumentHash | MinHash))
        search = Search(
            wanted=wanted,
            executor=executor,
            staging=staging,
            label=label,
            report=report,
            own=tuple(_listed(wanted.cache, measured[at], done) for at, done in shards),
            against=open_against(directory, hashes) if directory else None,
            shards=[(measured[at], done) for at, done in shards],
            source_of=np.array([at for at, _ in shards]),
            priorities=[stream.reading.entry.priority or 0 for stream in streams],
            names=[stream.given.name for stream in streams],
        )
        duplicates = search.duplicates(np.concatenate(kept))
        tally.clusters = duplicates.clusters
    folder = staging / "verdicts"
    folder.mkdir(exist_ok=True)
    files, verdicts = dict[str, Path](), [dict[str, Verdict]() for _ in streams]
    for number, (at, done) in enumerate(shards):
        documents, bits = Ledger(wanted.cache).documents(done.receipt.shard_key), f"verdicts-{number:05d}.arrow"
        files[f"signals-{number:05d}.arrow"] = documents
        for name, sidecar in measured[at].named():
            files[f"signals-{number:05d}-{name}.arrow"] = sidecar.file(wanted.cache, done.receipt)
        files[bits] = folder / bits
        found = read_documents(documents)
        copies = duplicates.of_shard(number) if duplicates else None
        write_bits(files[bits], failed[number], profile.names, copies)
        gone = failed[number] > 0
        if copies:
            tally.lose(streams[at].given.name, found["bytes"].to_numpy()[copies.rows])
            gone[copies.rows] = True
        verdicts[at][done.shard.id] = write_verdict(folder, done.shard.id, done.receipt.raw.digest, found, gone)
    for line in read_summary(tally.summary()):
        logger.info("%s", line)
    _check_dropped(tally, wanted.config.max_dropped)
    failpoint("quality.decided")
    return Judgement(tuple(verdicts), signals, wanted.config.copies, tally, files)


def _listed(cache: Path, measured: Measured, done: Done) -> ShardSidecars:
    names = {name: one.shard_key(done.receipt) for name, one in measured.named()}
    ledger = Ledger(cache)
    rows = max(receipt.rows for key in names.values() if (receipt := ledger.receipt(key)))
    return ShardSidecars(rows, {name: str(ledger.shard(key)) for name, key in names.items()}, names)


def _table(cache: Path, measured: Measured, done: Done) -> pa.Table:
    """Of the documents of a shard the places and all that was measured."""
    table = read_documents(Ledger(cache).documents(done.receipt.shard_key))
    for sidecar in measured.sidecars:
        found = sidecar.read(cache, done.receipt)
        for name in found.column_names:
            table = table.append_column(name, found[name])
    return table


def _check_dropped(tally: Tally, most: float | None) -> None:
    if most is None:
        return
    totals: dict[str, Any] = dict(tally.sources)
    names = ("documents", "dropped", "duplicates")
    totals["all sources"] = {name: sum(one[name] for one in tally.sources.values()) for name in names}
    for source, one in totals.items():
        if (lost := one["dropped"] + one["duplicates"]) > most * one["documents"]:
            raise SourceError(
                f"{source}: {lost:,} of {one['documents']:,} documents are judged away, more than "
                f"--max_dropped {most} allows; `moai quality` shows what each rule drops"
            )
