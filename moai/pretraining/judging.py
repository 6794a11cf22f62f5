"""Judging in the recipe: a stage that measures every document, the decision, and what of it the packing stage sees."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from moai.cache.ledger import Ledger
from moai.cache.shards import ArrowShards
from moai.core.distributed import Report
from moai.core.errors import SourceError
from moai.core.failpoints import failpoint
from moai.core.files import canonical_json, digest_json, link_or_copy
from moai.engine.part import Part, Signal, ordered
from moai.engine.pipeline import Pipeline
from moai.engine.progress import Progress
from moai.engine.run import Done
from moai.engine.stage import Results, Stage
from moai.prepared.bad_records import InputWatch
from moai.prepared.manifest import write_file
from moai.pretraining.assembly import Request, Stream
from moai.pretraining.keys import transform_identity
from moai.pretraining.options import DataConfig
from moai.quality.report import Tally, read_summary
from moai.quality.rules import Profile
from moai.quality.sidecars import Sidecar, Sidecars, once, sidecars
from moai.quality.statistics import TextStatistics, warn_without_numba
from moai.quality.verdicts import Drained, JudgedSource, Verdict, write_bits, write_verdict
from moai.sources.inputs import distinct_names
from moai.sources.local import LocalSource
from moai.transforms.chat import ToExamples
from moai.transforms.filters import Sample, Split

QUALITY_JSON, QUALITY_HTML = "quality.json", "quality.html"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Judgement:
    """What was decided of all inputs."""

    verdicts: tuple[dict[str, Verdict], ...]
    """By the ids of the shards, for each stream."""
    signals: tuple[Signal, ...]
    tally: Tally
    files: dict[str, Path]
    """What stands in the prepared directory of it, by name: signals and verdicts of each shard, in order."""

    @property
    def digest(self) -> str:
        """Of what was measured and decided, over all shards."""
        found = [[verdict.measured, verdict.dropped] for one in self.verdicts for verdict in one.values()]
        return digest_json([self.tally.profile.identity(), [one.identity() for one in self.signals], found])

    def reports(self) -> dict[str, bytes]:
        return {
            QUALITY_JSON: canonical_json(self.tally.summary()) + b"\n",
            QUALITY_HTML: self.tally.page("What was judged").encode(),
        }

    def write_into(self, directory: Path) -> list[str]:
        """The report, and links to the other files. Returns the names of those that are Arrow."""
        for name, path in self.files.items():
            link_or_copy(path, directory / name)
        for name, data in self.reports().items():
            write_file(directory / name, data)
        return list(self.files)


@dataclass(frozen=True)
class Measured:
    """An input on its way to what is measured of it: nothing of tokenizer, packing or the held-out side is in its
    keys.
    """

    stream: Stream
    """Named by what finds its documents and filters them: all but the Signals."""
    chain: tuple[Part, ...]
    """Maps, what takes a sample, Signals, and filters: these note their reasons, and every document is measured."""
    sidecars: tuple[Sidecar, ...]

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.stream.transform_key, *(one.key for one in self.sidecars))

    def pipeline(self, wanted: Request, staging: Path) -> Pipeline:
        """Its shards have no rows, but a documents file and a sidecar for each Signal."""
        shards = ArrowShards(cache=wanted.cache, staging=staging, schema=pa.schema([]))
        return Pipeline(
            source=self.stream.source,
            transforms=(self.stream.to_text, *once(self.chain, self.sidecars, wanted.cache), Drained()),
            sink=Sidecars(shards=shards, signals=self.sidecars),
            transform_key=self.stream.transform_key,
            measured=tuple(column for one in self.sidecars for column in one.signal.adds),
            probe=any(map(Ledger(wanted.cache).has_transform, self.keys)),
        )


def signals_of(config: DataConfig) -> tuple[Signal, ...]:
    """What is measured of every document under these settings."""
    return (TextStatistics(),) if config.quality else ()


def measuring(stream: Stream, signals: Sequence[Signal]) -> Measured:
    """The same input up to its Signals, moai's and the user's."""
    maps, filters, own = ordered([part for part in stream.inner if not isinstance(part, Split)])
    first = [one for one in filters if isinstance(one, Sample)]
    chain = (*maps, *first, *own, *signals, *(one for one in filters if one not in first))
    to_text = stream.to_text
    if isinstance(to_text, ToExamples):
        to_text = replace(to_text, shown=to_text.shown | {"text"})

    def identity(parts: Sequence[Part]) -> Mapping[str, Any]:
        needs = {name for part in parts for name in part.needs}
        looked_at = tuple(column for column in to_text.columns if column.name in needs)
        return transform_identity(stream.given, (replace(to_text, columns=looked_at), *parts), ())

    what = identity([part for part in chain if not isinstance(part, Signal)])
    found, source = sidecars(chain, identity), stream.source
    key = digest_json(what)[:40]
    if isinstance(source, LocalSource):
        source = replace(source, transform_keys=(key, *(one.key for one in found)))
    stream = replace(stream, source=source, to_text=to_text, identity=what, transform_key=key)
    return Measured(stream, chain, found)


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


def stage(
    wanted: Request, profile: Profile, streams: Sequence[Stream], staging: Path, *, label: str, report: Report
) -> Stage[None, Judgement]:
    """Measure every document and decide."""
    warn_without_numba()
    signals = signals_of(wanted.config)
    measured = [measuring(stream, signals) for stream in streams]
    progress = Progress(wanted.nominal_bytes, label=label, doing="Measuring")
    watch = watching(wanted, [one.stream for one in measured], progress, report)

    def decide(_: None, results: Results) -> Judgement:
        progress.end()
        for one in (one for input_ in measured for one in input_.sidecars):
            Ledger(wanted.cache).note_transform(one.key, one.identity)
        return _decide(wanted, profile, signals, measured, results, staging)

    return Stage(
        pipelines=lambda _: [one.pipeline(wanted, staging) for one in measured],
        reduce=decide,
        watch=lambda *_: watch,
    )


def _decide(
    wanted: Request,
    profile: Profile,
    signals: tuple[Signal, ...],
    measured: Sequence[Measured],
    results: Results,
    staging: Path,
) -> Judgement:
    """Verdicts over what was measured of the shards. Raises SourceError beyond --max_dropped."""
    folder = staging / "verdicts"
    folder.mkdir(exist_ok=True)
    tally, verdicts, files, number = Tally(profile), [], dict[str, Path](), 0
    for one, done in zip(measured, results, strict=True):
        found = {}
        for shard in done:
            table, bits = _table(wanted.cache, one, shard), f"verdicts-{number:05d}.arrow"
            files[f"signals-{number:05d}.arrow"] = Ledger(wanted.cache).documents(shard.receipt.shard_key)
            for name, sidecar in zip(distinct_names(each.signal.name for each in one.sidecars), one.sidecars):
                files[f"signals-{number:05d}-{name}.arrow"] = sidecar.file(wanted.cache, shard.receipt)
            files[bits] = folder / bits
            failed = tally.judge(one.stream.given.name, table)
            write_bits(files[bits], failed)
            found[shard.shard.id] = write_verdict(folder, shard.shard.id, shard.receipt.raw.digest, table, failed > 0)
            number += 1
        verdicts.append(found)
    for line in read_summary(tally.summary()):
        logger.info("%s", line)
    _check_dropped(tally, wanted.config.max_dropped)
    failpoint("quality.decided")
    return Judgement(tuple(verdicts), signals, tally, files)


def _table(cache: Path, measured: Measured, done: Done) -> pa.Table:
    """Of the documents of a shard the places and all that was measured."""
    with pa.memory_map(str(Ledger(cache).documents(done.receipt.shard_key))) as file:
        table = pa.ipc.open_file(file).read_all()
    for sidecar in measured.sidecars:
        found = sidecar.read(cache, done.receipt)
        for name in found.column_names:
            table = table.append_column(name, found[name])
    return table


def _check_dropped(tally: Tally, most: float | None) -> None:
    if most is None:
        return
    totals: dict[str, Any] = dict(tally.sources)
    names = ("documents", "dropped")
    totals["all sources"] = {name: sum(one[name] for one in tally.sources.values()) for name in names}
    for source, one in totals.items():
        if one["dropped"] > most * one["documents"]:
            raise SourceError(
                f"{source}: {one['dropped']:,} of {one['documents']:,} documents are judged away, more than "
                f"--max_dropped {most} allows; `moai quality` shows what each rule drops"
            )
