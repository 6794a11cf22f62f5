"""Bad records over all inputs: where each lies in its file, and whether there are too many or files of nothing else."""

from __future__ import annotations

import itertools
import json
import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic

import numpy as np
import pyarrow as pa

from moai.cache.ledger import Ledger
from moai.core.errors import SourceError, TooManyBadRecords
from moai.core.files import canonical_json
from moai.engine.pipeline import DIED, HUNG
from moai.engine.progress import Progress
from moai.engine.run import Done
from moai.engine.stage import Results
from moai.prepared.places import Processed, S
from moai.sources.discover import some
from moai.sources.kinds import Stream
from moai.sources.mistaken import above, instead

logger = logging.getLogger(__name__)

_FEW = 10
"""This many bad records never fail a run, whatever their share."""
_NAMED = 3
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


def unread(cache: Path, part: Processed[Any]) -> tuple[dict[str, Counter[str]], list[str]]:
    """Files of which no record could be read, with the reasons, and files without any record. A file that is one
    record counts as a record alone.
    """
    kind, ledger = part.given.kind, Ledger(cache)
    if not part.given.files or (isinstance(kind, Stream) and kind.is_one_record):
        return {}, []
    good: set[str] = set()
    bad: dict[str, Counter[str]] = {}
    for done, places in part.places():
        receipt, of_shard = done.receipt, Counter[int]()
        if receipt.quarantine_xxh3_128:
            with open(ledger.quarantine(receipt.shard_key), "rb") as file:
                for entry in map(json.loads, file):
                    of_shard[entry["segment"]] += 1
                    bad.setdefault(places[entry["segment"]].file, Counter())[entry["reason"]] += 1
        if len(places) == 1:
            segments = [0] if receipt.counts.get("read", 0) > receipt.counts.get("quarantined", 0) else []
        elif receipt.documents_xxh3_128:
            with pa.memory_map(str(ledger.documents(receipt.shard_key))) as file:
                segments = np.unique(pa.ipc.open_file(file).read_all()["segment"].to_numpy()).tolist()
        else:  # without a list of documents, lines tell
            segments = [index for index, lines in enumerate(receipt.raw.lines) if lines > of_shard[index]]
        good.update(places[segment].file for segment in segments)
    names = [file.name for file in part.given.files if file.name not in good]
    return {name: bad[name] for name in names if name in bad}, [name for name in names if name not in bad]


def not_read(cache: Path, part: Processed[Any]) -> dict[str, Any]:
    """What a manifest says of files that a source has and that gave nothing."""
    given, (nothing_read, without) = part.given, unread(cache, part)
    left_out = {**given.left_out, **({"without a record": without} if without else {})}
    bad = {**given.bad, **({"nothing could be read": list(nothing_read)} if nothing_read else {})}
    return {
        **({"left_out": {why: listed(names) for why, names in left_out.items()}} if left_out else {}),
        **({"bad_files": {what: listed(names) for what, names in bad.items()}} if bad else {}),
        "files": len(given.files) + sum(map(len, given.bad.values())),
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
    max_files: float | None = None
    """Share of files that may give no record at all, where there is a flag for it; else none may."""
    report: Callable[[dict[str, Any]], None] = lambda _: None
    warns: bool = True
    """Of files without a record; not where an earlier stage over the same inputs has done so."""
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
        parts = self.processed(results)
        said = [self._said()] if _too_many(self.counts["quarantined"], self.counts["read"], self.max_ratio) else []
        said = [*self._files(parts), *said]
        if not said:
            return
        entries = [entry for part in parts for entry in bad_records(self.cache, part)]
        listing = self.cache / "quarantine" / f"{self.key}.jsonl"
        listing.parent.mkdir(exist_ok=True)
        listing.write_bytes(b"".join(canonical_json(entry) + b"\n" for entry in entries))
        first = entries[0]
        place = (
            f"the first: {first['file']} line {first['line']} ({first['reason']}: {first['detail']}); all of them: "
            f"{listing}"
        )
        raise TooManyBadRecords(f"{said[0]}; {place}")

    def _files(self, parts: Sequence[Processed[S]]) -> Iterator[str]:
        """What ends the run of files that gave nothing; what does not is a warning."""
        found = [(part.given, *unread(self.cache, part)) for part in parts]
        if self.warns and (without := [name for _, _, names in found for name in names]):
            logger.warning("%d files hold no record: %s", len(without), some(without))
        said = []
        for given, bad, _ in found:
            for file in given.files:
                if file.name in bad:
                    what = instead(given, file)
                    reasons = ", ".join(f"{number:,} {reason}" for reason, number in bad[file.name].most_common(2))
                    said.append(f"{file.name} ({reasons}{f'; it is {what[0]}' if what else ''})")
        files = sum(len(given.files) for given, *_ in found)
        if len(said) == files:
            return  # then no document is left, which is said with all reasons
        if _too_many_files(len(said), files, self.max_ratio, self.max_files):
            yield _say_files(len(said), files, said, flag=self.max_files is not None)
        elif said:
            logger.warning("Nothing could be read of %d of %d files: %s", len(said), files, some(said))

    def processed(self, results: Results) -> list[Processed[S]]:
        return [Processed(stream, done) for stream, done in zip(self.streams, results, strict=True)]

    def _said(self) -> str:
        return _say(
            self.counts["quarantined"], self.counts["read"], grouped(self.counts, "quarantined."), self.max_ratio
        )


def check_content(content: Mapping[str, Any], max_ratio: float, max_files: float) -> None:
    """The same judgement over something prepared under another --max_bad_ratio or --max_bad_files. Raises
    TooManyBadRecords.
    """
    bad, read = content["records"]["quarantined"], content["records"]["read"]
    if left_out := sum(content["quarantined"].get(reason, 0) for reason in (DIED, HUNG)):
        logger.warning(
            "It leaves out %d records that killed or hung their workers when it was made; --rehash tries them again",
            left_out,
        )
    if _too_many(bad, read, max_ratio):
        raise TooManyBadRecords(_say(bad, read, content["quarantined"], max_ratio))
    bad_files = [entry for source in content["sources"] for entry in source.get("bad_files", {}).values()]
    number = sum(entry["files"] for entry in bad_files)
    files = sum(source.get("files", 0) for source in content["sources"])
    if _too_many_files(number, files, max_ratio, max_files):
        raise TooManyBadRecords(_say_files(number, files, [name for entry in bad_files for name in entry["first"]]))


def listed(names: Collection[str]) -> dict[str, Any]:
    """Names as a manifest keeps them: how many, and the first."""
    return {"files": len(names), "first": list(itertools.islice(names, _NAMED))}


def _too_many(bad: int, read: int, max_ratio: float) -> bool:
    return bad > _FEW and bad > max_ratio * read


def _too_many_files(bad: int, files: int, max_ratio: float, max_files: float | None) -> bool:
    return max_ratio < 1 and bad > (max_files or 0) * files


def _say_files(bad: int, files: int, names: Sequence[str], *, flag: bool = True) -> str:
    way_out = f", or leave them out by --max_bad_files {above(bad / files)}" if flag else ""
    return f"nothing could be read of {bad:,} of {files:,} files: {some(names)}; mend or remove them{way_out}"


def _say(bad: int, read: int, reasons: Mapping[str, int], max_ratio: float) -> str:
    top = ", ".join(f"{number:,} {reason}" for reason, number in Counter(reasons).most_common(4))
    return (
        f"{bad:,} of {read:,} records ({bad / read:.2%}) are bad, more than --max_bad_ratio {max_ratio} allows: {top}"
    )


def grouped(counts: Mapping[str, int], prefix: str) -> dict[str, int]:
    """Counters whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): number for name, number in sorted(counts.items()) if name.startswith(prefix)}
