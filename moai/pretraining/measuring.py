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
from moai.engine.part import Part, Signal, ordered
from moai.engine.pipeline import Pipeline
from moai.pretraining.assembly import Request, Stream
from moai.pretraining.keys import transform_identity
from moai.pretraining.options import DataConfig
from moai.quality.hashes import DocumentHash
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
    found: list[Signal] = [TextStatistics()] if config.quality else []
    if config.dedup != "none":
        found.append(DocumentHash())
    return tuple(found)


def measuring(stream: Stream, signals: Sequence[Signal]) -> Measured:
    """The same input up to its Signals, moai's and the user's."""
    maps, filters, own = ordered([part for part in stream.inner if not isinstance(part, Split)])
    first = [one for one in filters if isinstance(one, Sample)]
    chain = (*maps, *first, *signals, *own, *(one for one in filters if one not in first))
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
