"""Bad records over all inputs: where each lies in its file, and whether there are too many."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic

from moai.cache.ledger import Ledger
from moai.core.errors import SourceError, TooManyBadRecords
from moai.core.files import canonical_json
from moai.engine.pipeline import DIED, HUNG
from moai.engine.progress import Progress
from moai.engine.run import Done
from moai.engine.stage import Results
from moai.prepared.places import Processed, S

logger = logging.getLogger(__name__)

_FEW = 10
"""This many bad records never fail a run, whatever their share."""
_LEAST_RECORD_BYTES = 8
"""Nominal bytes that a record takes at least, compressed ones included: how many may still come."""


def bad_records(cache: Path, part: Processed[Any]) -> Iterator[dict[str, Any]]:
    """Every quarantined record with its file, line (from 1; the row in columnar files) and byte offset in the
    decompressed file.
    """
    for done, places in part.places():
        if not done.receipt.quarantine_xxh3_128:
            continue
        with open(Ledger(cache).quarantine(done.receipt.shard_key), "rb") as file:
            for entry in sorted(map(json.loads, file), key=lambda e: (e["segment"], e["line"])):
                place = places[entry.pop("segment")]
                offset = None if entry["offset"] is None else place.bytes + entry["offset"]
                yield {
                    **entry,
                    "source": part.given.name,
                    "file": place.file,
                    "line": place.lines + entry["line"] + 1,
                    "offset": offset,
                }


@dataclass(kw_only=True)
class InputWatch(Generic[S]):
    """Watches a stage that reads inputs: notes what makes its shards, reports, and ends it where the share of bad
    records is too high.
    """

    streams: Sequence[S]
    progress: Progress
    cache: Path
    key: str
    """Of the plan: names the list of bad records."""
    max_ratio: float
    report: Callable[[dict[str, Any]], None] = lambda _: None
    counts: Counter[str] = field(default_factory=Counter)

    def on_documents(self, number: int) -> None:
        self.progress.on_documents(number)
        self.report(self.progress.snapshot())

    def on_shard(self, done: Done) -> None:
        """Stops early when no rest of the run can mend it: not even the most records that its bytes could hold."""
        Ledger(self.cache).note_transform(done.receipt.transform_key, self.streams[done.pipeline].identity)
        self.counts.update(done.receipt.counts)
        self.progress.on_shard(done)
        share, left = self.progress.share, self.progress.total_bytes - self.progress.bytes
        most = self.counts["read"] + max(0, left) // _LEAST_RECORD_BYTES
        if share < 1 and _too_many(self.counts["quarantined"], most, self.max_ratio):
            raise TooManyBadRecords(f"{self._said()} (stopped after {share:.0%} of the input)")
        self.report(self.progress.snapshot())

    def close(self, results: Results) -> None:
        """The final word. Raises TooManyBadRecords after writing every bad record with its place to a file."""
        self.progress.close(results)
        if not self.counts["read"]:
            raise SourceError(
                f"{', '.join(stream.given.spec for stream in self.streams)}: holds no record at all; nothing to prepare"
            )
        if not _too_many(self.counts["quarantined"], self.counts["read"], self.max_ratio):
            return
        entries = [entry for part in self.processed(results) for entry in bad_records(self.cache, part)]
        listing = self.cache / "quarantine" / f"{self.key}.jsonl"
        listing.parent.mkdir(exist_ok=True)
        listing.write_bytes(b"".join(canonical_json(entry) + b"\n" for entry in entries))
        first = entries[0]
        place = (
            f"the first: {first['file']} line {first['line']} ({first['reason']}: {first['detail']}); all of them: "
            f"{listing}"
        )
        raise TooManyBadRecords(f"{self._said()}; {place}")

    def processed(self, results: Results) -> list[Processed[S]]:
        return [Processed(stream, done) for stream, done in zip(self.streams, results, strict=True)]

    def _said(self) -> str:
        return _say(
            self.counts["quarantined"], self.counts["read"], grouped(self.counts, "quarantined."), self.max_ratio
        )


def check_content(content: Mapping[str, Any], max_ratio: float) -> None:
    """The same judgement over something prepared under another --max_bad_ratio. Raises TooManyBadRecords."""
    bad, read = content["records"]["quarantined"], content["records"]["read"]
    if left_out := sum(content["quarantined"].get(reason, 0) for reason in (DIED, HUNG)):
        logger.warning(
            "It leaves out %d records that killed or hung their workers when it was made; --rehash tries them again",
            left_out,
        )
    if _too_many(bad, read, max_ratio):
        raise TooManyBadRecords(_say(bad, read, content["quarantined"], max_ratio))


def _too_many(bad: int, read: int, max_ratio: float) -> bool:
    return bad > _FEW and bad > max_ratio * read


def _say(bad: int, read: int, reasons: Mapping[str, int], max_ratio: float) -> str:
    top = ", ".join(f"{number:,} {reason}" for reason, number in Counter(reasons).most_common(4))
    return (
        f"{bad:,} of {read:,} records ({bad / read:.2%}) are bad, more than --max_bad_ratio {max_ratio} allows: {top}"
    )


def grouped(counts: Mapping[str, int], prefix: str) -> dict[str, int]:
    """Counters whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): number for name, number in sorted(counts.items()) if name.startswith(prefix)}
