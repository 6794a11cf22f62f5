"""Judging in the recipe: a stage that measures every document, the decision, and what of it the packing stage sees."""

from __future__ import annotations

import logging
from collections.abc import Sequence
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
from moai.engine.part import Signal, class_identity
from moai.engine.pipeline import Pipeline
from moai.engine.progress import Progress
from moai.engine.stage import Results, Stage
from moai.prepared.bad_records import InputWatch
from moai.prepared.manifest import write_file
from moai.pretraining.assembly import Request, Stream
from moai.pretraining.keys import transform_identity
from moai.quality.report import Tally, read_summary
from moai.quality.rules import Profile
from moai.quality.statistics import TextStatistics, warn_without_numba
from moai.quality.verdicts import Drained, JudgedSource, Verdict, write_bits, write_verdict
from moai.sources.local import LocalSource
from moai.transforms.chat import ToExamples
from moai.transforms.filters import Split

QUALITY_JSON, QUALITY_HTML = "quality.json", "quality.html"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Judgement:
    """What was decided of all inputs."""

    verdicts: tuple[dict[str, Verdict], ...]
    """By the ids of the shards, for each stream."""
    tally: Tally
    files: dict[str, Path]
    """What stands in the prepared directory of it, by name: signals and verdicts of each shard, in order."""

    @property
    def digest(self) -> str:
        """Of what was measured and decided, over all shards."""
        found = [[verdict.measured, verdict.dropped] for one in self.verdicts for verdict in one.values()]
        return digest_json([self.tally.profile.identity(), class_identity(TextStatistics), found])

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


def measuring(stream: Stream) -> Stream:
    """The same input up to its signals: nothing of tokenizer, packing or the held-out side is in its key."""
    parts = [part for part in stream.inner if not isinstance(part, Split | Signal)]
    inner = (*parts, *(part for part in stream.inner if isinstance(part, Signal)), TextStatistics())
    to_text = stream.to_text
    if isinstance(to_text, ToExamples):
        to_text = replace(to_text, shown=to_text.shown | {"text"})
    what = transform_identity(stream.given, (to_text, *inner), ())
    key = digest_json(what)[:40]
    source = replace(stream.source, transform_key=key) if isinstance(stream.source, LocalSource) else stream.source
    return replace(stream, source=source, to_text=to_text, inner=inner, identity=what, transform_key=key)


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
    measured = [measuring(stream) for stream in streams]
    progress = Progress(wanted.nominal_bytes, label=label, doing="Measuring")
    watch = watching(wanted, measured, progress, report)

    def decide(_: None, results: Results) -> Judgement:
        progress.end()
        return _decide(wanted, profile, measured, results, staging)

    return Stage(
        pipelines=lambda _: [_pipeline(wanted, stream, staging) for stream in measured],
        reduce=decide,
        watch=lambda *_: watch,
    )


def _pipeline(wanted: Request, stream: Stream, staging: Path) -> Pipeline:
    """Of a stream that is `measuring`: its shards have no rows, and a documents file with what was measured."""
    return Pipeline(
        source=stream.source,
        transforms=(stream.to_text, *stream.inner, Drained()),
        sink=ArrowShards(cache=wanted.cache, staging=staging, schema=pa.schema([])),
        transform_key=stream.transform_key,
        measured=stream.measured,
        probe=Ledger(wanted.cache).has_transform(stream.transform_key),
    )


def _decide(wanted: Request, profile: Profile, streams: Sequence[Stream], results: Results, staging: Path) -> Judgement:
    """Verdicts over the documents files of the measured shards. Raises SourceError beyond --max_dropped."""
    folder = staging / "verdicts"
    folder.mkdir(exist_ok=True)
    tally, verdicts, files = Tally(profile), [], dict[str, Path]()
    for stream, done in zip(streams, results, strict=True):
        found = {}
        for one in done:
            number = len(files) // 2
            signals, bits = f"signals-{number:05d}.arrow", f"verdicts-{number:05d}.arrow"
            files[signals], files[bits] = Ledger(wanted.cache).documents(one.receipt.shard_key), folder / bits
            with pa.memory_map(str(files[signals])) as file:
                table = pa.ipc.open_file(file).read_all()
                failed = tally.judge(stream.given.name, table)
                write_bits(files[bits], failed)
                found[one.shard.id] = write_verdict(folder, one.shard.id, one.receipt.raw.digest, table, failed > 0)
        verdicts.append(found)
    for line in read_summary(tally.summary()):
        logger.info("%s", line)
    _check_dropped(tally, wanted.config.max_dropped)
    failpoint("quality.decided")
    return Judgement(tuple(verdicts), tally, files)


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
