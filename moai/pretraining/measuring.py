"""What is measured of inputs: the Signals that settings ask for, and the pipelines that measure them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from moai.cache.ledger import Ledger
from moai.cache.shards import ArrowShards
from moai.core.files import digest_json
from moai.engine.part import Map, Part, Signal, ordered
from moai.engine.pipeline import Pipeline
from moai.pretraining.assembly import Request, Stream
from moai.pretraining.dataset import entries_of
from moai.pretraining.keys import contamination_of, transform_identity
from moai.pretraining.options import DataConfig
from moai.quality.c4 import C4Statistics
from moai.quality.hashes import DocumentHash
from moai.quality.korean import KoreanWords
from moai.quality.language import Language
from moai.quality.minhash import MinHash
from moai.quality.personal import PersonalData
from moai.quality.sidecars import Sidecar, Sidecars, once, sidecars
from moai.quality.statistics import TextStatistics
from moai.quality.verdicts import Drained
from moai.sources.inputs import distinct_names
from moai.sources.local import LocalSource
from moai.transforms.chat import ToExamples
from moai.transforms.filters import Sample, Split


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

    def identity(self, parts: Sequence[Part]) -> Mapping[str, Any]:
        """Of what these parts make of its texts."""
        return _identity(self.stream, parts)

    def read_for(self, *keys: str) -> Any:
        """Its source, where finished shards have these transform keys."""
        source = self.stream.source
        return replace(source, transform_keys=keys) if isinstance(source, LocalSource) else source

    def named(self) -> Iterator[tuple[str, Sidecar]]:
        """The sidecars, each under a name of its own."""
        yield from zip(distinct_names(one.signal.name for one in self.sidecars), self.sidecars)

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
    found: list[Signal] = [TextStatistics()] if config.has_rules else []
    profiles = [config.profile(), *(one for entry in entries_of(config.dataset) if (one := entry.quality))]
    used = {name for profile in profiles for name in profile.used}
    if any(profile.needs_language for profile in profiles):
        found.append(Language())
    if any(name.startswith("c4.") for name in used):
        found.append(C4Statistics())
    if any(name.startswith("fineweb2_ko.") for name in used):
        found.append(KoreanWords())
    if contamination := contamination_of(config):
        found.append(contamination)
    if config.pii != "none":
        found.append(PersonalData())
    if config.dedup != "none":
        found.append(DocumentHash())
    if config.dedup == "minhash":
        found.append(MinHash())
    return tuple(found)


def _seen(maps: Sequence[Map], signals: Sequence[Signal]) -> Iterator[Part]:
    """The Maps, each behind what measures the text that it changes."""
    for one in maps:
        yield from (signal for signal in signals if type(signal) is getattr(one, "seen_by", None))
        yield one


def measuring(stream: Stream, signals: Sequence[Signal]) -> Measured:
    """The same input up to its Signals, moai's and the user's."""
    maps, filters, own = ordered([part for part in stream.inner if not isinstance(part, Split)])
    first = [one for one in filters if isinstance(one, Sample)]
    chain = (*_seen(maps, signals), *first, *signals, *own, *(one for one in filters if one not in first))
    chain = tuple(dict.fromkeys(chain))  # a Signal stands where it stands first
    if isinstance(stream.to_text, ToExamples):
        stream = replace(stream, to_text=replace(stream.to_text, shown=stream.to_text.shown | {"text"}))
    what = _identity(stream, [part for part in chain if not isinstance(part, Signal)])
    found = sidecars(chain, lambda parts: _identity(stream, parts))
    measured = Measured(replace(stream, identity=what, transform_key=digest_json(what)[:40]), chain, found)
    return replace(measured, stream=replace(measured.stream, source=measured.read_for(*measured.keys)))


def _identity(stream: Stream, parts: Sequence[Part]) -> Mapping[str, Any]:
    """The text with the columns that these parts look at, and the parts."""
    needs = {name for part in parts for name in part.needs}
    looked_at = tuple(column for column in stream.to_text.columns if column.name in needs)
    return transform_identity(stream.given, (replace(stream.to_text, columns=looked_at), *parts), ())
