"""Which documents of a shard go, and how the others pass: a source that knows the verdict, and a filter that asks it.

A verdict names documents by the place of their record (segment and offset), and holds only for the bytes that were
measured. In the key of a packed shard stands the digest of these places, and nothing else of how they were chosen: a
shard that loses no document is the one that is packed without judging.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from moai.core.errors import SourceError
from moai.core.files import digest_json
from moai.engine.documents import DOCUMENT, places
from moai.engine.part import Filter, Part
from moai.engine.pipeline import Meter, Raw, Shard, documents


@dataclass(frozen=True)
class Verdict:
    """Of one shard."""

    measured: str
    """The digest of the range that was measured."""
    dropped: str = ""
    """The digest of the places of the documents that go; empty where none does."""
    path: str = ""
    """uint64 places, as numpy saves them."""

    def named(self, raw: Raw) -> Raw:
        """The range without what goes: another content wherever something does."""
        return replace(raw, digest=digest_json([raw.digest, self.dropped])[:32]) if self.dropped else raw


@dataclass(frozen=True)
class JudgedShard(Shard):
    verdict: Verdict | None = None


@dataclass(frozen=True, kw_only=True)
class JudgedSource:
    """Another source, shard by shard beside its verdicts."""

    source: Any
    verdicts: Mapping[str, Verdict]
    """By the ids of shards; those without one are left out."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "verdicts": {}}  # a worker reads what its orders name

    @property
    def name(self) -> str:
        return str(self.source.name)

    def shards(self) -> Iterator[Shard]:
        for shard in self.source.shards():
            verdict = self.verdicts.get(shard.id)
            if verdict is None:
                if shard.raw:
                    self.source.remember(shard, shard.raw)
                continue
            raw = self._checked(shard.raw, verdict) if shard.raw else None
            yield JudgedShard(**{**vars(shard), "raw": raw}, verdict=verdict)

    def digest(self, shard: Shard) -> Raw:
        return self._checked(self.source.digest(shard), _verdict(shard))

    def read(self, shard: Shard, meter: Meter) -> Iterator[pa.RecordBatch]:
        verdict = _verdict(shard)
        documents().judged_away = np.load(verdict.path) if verdict.path else None
        yield from self.source.read(shard, meter)
        self._checked(meter.raw(), verdict)
        meter.named = verdict.named

    def remember(self, shard: Shard, raw: Raw) -> None:
        # The digest of the range itself was remembered when it was measured; what was spooled for it goes.
        self.source.remember(replace(shard, raw=raw), raw)

    def _checked(self, raw: Raw, verdict: Verdict) -> Raw:
        if raw.digest != verdict.measured:
            raise SourceError(f"{self.name}: changed between measuring and packing; run again when nobody writes to it")
        return verdict.named(raw)


@dataclass(frozen=True)
class Judged(Filter):
    """Lets pass what the verdict of the shard in work leaves."""

    def keep(self, batch: pa.RecordBatch) -> npt.NDArray[np.bool_]:
        away = documents().judged_away
        if away is None:
            return np.ones(batch.num_rows, bool)
        return ~np.isin(documents().places_of(batch[DOCUMENT].to_numpy()), away)


@dataclass(frozen=True)
class Drained(Part):
    """The end of a pipeline whose documents file is all that is wanted."""

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for _ in batches:
            pass
        yield from ()


def write_verdict(
    folder: Path, shard_id: str, measured: str, found: pa.Table, dropped: npt.NDArray[np.bool_]
) -> Verdict:
    """The verdict over the rows of a documents file."""
    if not dropped.any():
        return Verdict(measured)
    away = places(found["segment"].to_numpy()[dropped], found["offset"].to_numpy()[dropped])
    path = folder / f"{digest_json(shard_id)[:32]}.npy"
    np.save(path, away, allow_pickle=False)
    return Verdict(measured, digest_json([int(place) for place in away]), str(path))


@dataclass(frozen=True)
class Copies:
    """Documents of a shard, by their rows, that go in favour of others: the shard and the row of what stays, and what
    both have in common. `against` where that stands in the directory of --dedup_against.
    """

    rows: npt.NDArray[np.int64]
    keeper_shards: npt.NDArray[np.int64]
    keeper_rows: npt.NDArray[np.int64]
    jaccards: npt.NDArray[np.float64]
    against: npt.NDArray[np.bool_]


def write_bits(path: Path, failed: npt.NDArray[np.uint64], rules: Sequence[str], copies: Copies | None) -> None:
    """verdicts-NNNNN.arrow: for every document of a shard the rules that it fails, a bit each (`rules` in the schema's
    metadata names them); where copies were looked for, of each that goes the shard and row of the document that stays
    in its place, their Jaccard similarity, and whether that document stands in the directory of --dedup_against.
    """
    columns = {"failed": pa.array(failed)}
    if copies:
        where = np.full(len(failed), -1)
        where[copies.rows] = np.arange(len(copies.rows))
        at = pa.array(where, mask=where < 0)
        for name, values, kind in (
            ("keeper_shard", copies.keeper_shards, pa.uint32()),
            ("keeper_row", copies.keeper_rows, pa.uint32()),
            ("jaccard", copies.jaccards, pa.float64()),
            ("against", copies.against, pa.bool_()),
        ):
            columns[name] = pa.array(values, kind).take(at)
    table = pa.table(columns).replace_schema_metadata({"rules": " ".join(rules)})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


def read_gone(path: Path) -> npt.NDArray[np.bool_]:
    """Of a file that `write_bits` wrote the documents that go: bool, a value a document."""
    with pa.memory_map(str(path)) as file:
        table = pa.ipc.open_file(file).read_all()
    gone: npt.NDArray[np.bool_] = table["failed"].to_numpy() > 0
    return gone | table["keeper_row"].is_valid().to_numpy() if "keeper_row" in table.column_names else gone


def _verdict(shard: Shard) -> Verdict:
    assert isinstance(shard, JudgedShard)
    assert shard.verdict is not None
    return shard.verdict
