"""From receipts to a published directory: totals, manifest, links to the shards, one rename.

Also the judgement over bad records, which needs the same receipts.
"""

from __future__ import annotations

import json
import logging
import os
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from moai.config import identity
from moai.engine.ledger import Ledger
from moai.engine.pipeline import DIED, HUNG, MAX_DETAILS
from moai.engine.progress import Progress
from moai.engine.run import Done
from moai.engine.schema import arrow_schema
from moai.errors import DamagedError, SourceError, TooManyBadRecords
from moai.failpoints import failpoint
from moai.files import canonical_json, digest_file, link_or_copy, publish_directory
from moai.recipes.assembly import Stream
from moai.recipes.identity import dataset_key, tokenizer_files, tokenizer_identity
from moai.recipes.options import DataConfig
from moai.recipes.prepared import FORMAT_VERSION, read_manifest, write_dataset_files, write_file, write_manifest
from moai.sources.discover import Input
from moai.tokenizer import TokenizerSpec, files_beside
from moai.transforms.named import spelled
from moai.transforms.template import ChatTemplate

logger = logging.getLogger(__name__)

_FEW = 10
"""This many bad records never fail a run, whatever their share."""
_WAYS_OUT = {
    "chat.too_long": "raise --seq_len, or cut them by --long_examples truncate",
    "chat.untrained": 'only what the assistant says is learned: give the conversations answers, not all of them with "weight": 0 or "train": false',
}
_LEAST_RECORD_BYTES = 8
"""Nominal bytes that a record takes at least, compressed ones included: how many may still come."""


@dataclass(frozen=True)
class Processed:
    """One input and its finished shards, in order."""

    stream: Stream
    done: list[Done]

    @property
    def given(self) -> Input:
        return self.stream.given


def publish(
    cache: Path,
    attempt: Path,
    config: DataConfig,
    tokenizer: TokenizerSpec,
    parts: Sequence[Processed],
    run: Mapping[str, Any],
    template: ChatTemplate | None = None,
) -> Path:
    """Build the directory in staging and rename it into place; an equal one that is already there is kept. Returns its path."""
    # Places of bad records hold names of files, which the shards' keys know nothing of.
    entries = [entry for part in parts for entry in bad_records(cache, part)]
    bad = b"".join(canonical_json(entry) + b"\n" for entry in entries)
    for entry in entries:
        if entry["reason"] in (DIED, HUNG):
            logger.warning("%s line %d is left out: its worker %s (%s) when it was alone with it, too. Another machine may take it",
                           entry["file"], entry["line"], "hung" if entry["reason"] == HUNG else "died", entry["detail"])  # fmt: skip
    keys = [done.receipt.shard_key for part in parts for done in part.done] + ([xxhash.xxh3_128_hexdigest(bad)] if bad else [])
    final = cache / "datasets" / dataset_key([*keys, *tokenizer_files(tokenizer)])
    if final.exists():
        if _holds(final, parts):
            logger.info("The same content is already published: %s", final)
            return final
        # Made from the same input by a backend that was wrong. Whoever has it open keeps it; nobody finds it any more.
        aside = final.with_name(f"{final.name}.wrong-{uuid.uuid4().hex[:8]}")
        logger.warning("%s holds other shards than were made now; set aside as %s", final, aside.name)
        os.rename(final, aside)
    staged = attempt / "dataset"
    staged.mkdir()
    failpoint("dataset.begin")
    content = _content(cache, staged, config, tokenizer, parts, bad, template)
    if not content["rows"]:
        raise SourceError(f"{', '.join(part.given.spec for part in parts)}: no document is left {_losses(content)}; {_way_out(config, content)}")
    failpoint("dataset.manifest")
    write_manifest(staged, content, {**run, "inputs": [whereabouts(part.given) for part in parts], "transforms": [spelled(part) for part in config.transforms]})
    publish_directory(staged, final)
    return final


def whereabouts(given: Input) -> str:
    """What a person named, so that it is found from any directory; the name of a Hub dataset stays. It stands in `run` only: no key knows where data lies."""
    is_local = not given.origin or Path(given.origin["dataset"]).expanduser().exists()
    where = str(Path(given.spec).expanduser().absolute()) if is_local else given.spec
    return os.fsencode(where).decode("utf-8", "backslashreplace")


def _holds(final: Path, parts: Sequence[Processed]) -> bool:
    """Whether a published directory holds just these shards. A damaged one is for whoever opens it to refuse."""
    try:
        shards = read_manifest(final)["content"]["shards"]
    except DamagedError:
        return True
    return [shard["xxh3_128"] for shard in shards] == [done.receipt.xxh3_128 for part in parts for done in part.done]


def _content(
    cache: Path, staged: Path, config: DataConfig, tokenizer: TokenizerSpec, parts: Sequence[Processed], bad: bytes, template: ChatTemplate | None
) -> dict[str, Any]:
    """Link and write every file of the directory but the manifest; return what the manifest says of them."""
    counts = _sum(done.receipt.counts for part in parts for done in part.done)
    _check_conservation(counts)
    columns = parts[0].stream.columns
    shards = _link_shards(cache, staged, parts)
    names = [shard["file"] for shard in shards if shard["file"]]
    write_dataset_files(staged, names, arrow_schema(columns), dataset_key(shard["shard_key"] for shard in shards))
    for name, data in {"tokenizer.json": Path(tokenizer.path).read_bytes(), **files_beside(Path(tokenizer.path))}.items():
        write_file(staged / name, data)
    if bad:
        write_file(staged / "quarantine.jsonl", bad)
    if left_out := counts["quarantined_without_place"]:
        logger.warning("quarantine.jsonl leaves out %s bad records: of one shard it keeps %s with their place", f"{left_out:,}", f"{MAX_DETAILS:,}")
    files = [{"file": p.name, "bytes": p.stat().st_size, "xxh3_128": digest_file(p)} for p in sorted(staged.iterdir()) if p.suffix != ".arrow"]
    rows = counts["rows"]
    return {
        "format_version": FORMAT_VERSION, "recipe": "pretraining", "config": identity(config), "seq_len": config.seq_len, "packing": config.packing,
        "tokenizer": {**tokenizer_identity(tokenizer, template), "vocab_size": tokenizer.vocab_size, "eos_token": tokenizer.eos_token}, "tokenizer_digest": tokenizer.digest,
        "vocab_size": tokenizer.vocab_size, "columns": [column.as_json() for column in columns],
        "transforms": [part.identity() for part in config.transforms], "rows": rows, "tokens": counts["tokens.rows"],
        "fill_rate": round(counts["tokens.rows"] / (rows * config.seq_len), 6) if rows else 0.0,
        "records": {"read": counts["read"], "kept": counts["kept"], "filtered": counts["filtered"], "quarantined": counts["quarantined"]},
        "documents": counts["kept"], "filtered": _group(counts, "filtered."), "quarantined": _group(counts, "quarantined."), "token_counts": {"eos": 0, **_group(counts, "tokens.")},
        "sources": [_source(part) for part in parts], "shards": shards, "files": files, **(_chat(template, counts) if template else {}),
    }  # fmt: skip


def _chat(template: ChatTemplate, counts: Mapping[str, int]) -> dict[str, Any]:
    """The template, so that shards can be made again and a model keeps it, and what became of the conversations."""
    return {"chat": {"template": template.as_json(), "counts": {"examples": 0, "turns": 0, **_group(counts, "chat.")}}}


def _link_shards(cache: Path, staged: Path, parts: Sequence[Processed]) -> list[dict[str, Any]]:
    ledger = Ledger(cache)
    number, of = 0, sum(done.receipt.rows > 0 for part in parts for done in part.done)
    shards: list[dict[str, Any]] = []
    for part in parts:
        for done in part.done:
            receipt, name = done.receipt, None
            if receipt.rows:
                name, number = f"data-{number:05d}-of-{of:05d}.arrow", number + 1
                link_or_copy(ledger.shard(receipt.shard_key), staged / name)
            documents_name = f"documents-{len(shards):05d}.arrow"
            documents = {"file": documents_name, "bytes": receipt.documents_bytes, "xxh3_128": receipt.documents_xxh3_128}
            link_or_copy(ledger.documents(receipt.shard_key), staged / documents_name)
            shards.append({"file": name, "rows": receipt.rows, "bytes": receipt.bytes, "xxh3_128": receipt.xxh3_128, "shard_key": receipt.shard_key, "source": part.given.name,
                           "documents": receipt.counts.get("kept", 0), "tokens": receipt.counts.get("tokens.rows", 0), "raw_digest": receipt.raw.digest, "documents_file": documents})  # fmt: skip
    return shards


def _source(part: Processed) -> dict[str, Any]:
    counts = _sum(done.receipt.counts for done in part.done)
    return {
        "name": part.given.name, "kind": part.given.kind, "text": part.stream.to_text.shape.name, "files": len(part.given.files), "shards": len(part.done), "read": counts["read"],
        "documents": counts["kept"], "tokens": counts["tokens.rows"], "origin": part.given.origin, "raw_bytes": sum(sum(done.receipt.raw.bytes) for done in part.done),
    }  # fmt: skip


def bad_records(cache: Path, part: Processed) -> Iterator[dict[str, Any]]:
    """Every quarantined record with its file, line (from 1; the row in columnar files) and byte offset in the decompressed file.

    Receipts place a record within its segment, since that is all its content knows; the way to there is summed up here.
    """
    lines: Counter[str] = Counter()
    offsets: dict[str, int] = {}
    for done in part.done:
        segments, raw = done.shard.segments, done.receipt.raw
        for segment in segments:
            offsets.setdefault(segment.file.name, segment.start if segment.framing != "lines" and segment.aligned else 0)
        if done.receipt.quarantine_xxh3_128:
            with open(Ledger(cache).quarantine(done.receipt.shard_key), "rb") as file:
                for entry in sorted(map(json.loads, file), key=lambda e: (e["segment"], e["line"])):
                    name = segments[entry.pop("segment")].file.name
                    columnar = entry["offset"] is None
                    yield {
                        **entry,
                        "source": part.given.name,
                        "file": name,
                        "line": lines[name] + entry["line"] + 1,
                        "offset": None if columnar else offsets[name] + entry["offset"],
                    }
        for segment, size, records in zip(segments, raw.bytes, raw.lines):
            lines[segment.file.name] += records
            offsets[segment.file.name] += size


class BadRecords:
    """How many records were bad, of how many; raises when the share is too high."""

    def __init__(self, max_ratio: float, progress: Progress | None) -> None:
        self.max_ratio, self.progress = max_ratio, progress
        self.counts: Counter[str] = Counter()

    def add(self, counts: Mapping[str, int]) -> None:
        """Count one shard, and stop early when no rest of the run can mend it: not even the most records that its bytes could hold."""
        self.counts.update(counts)
        bad, read = self.counts["quarantined"], self.counts["read"]
        if self.progress is None or self.progress.share >= 1.0 or bad <= _FEW:
            return
        most = read + max(0, self.progress.total_bytes - self.progress.bytes) // _LEAST_RECORD_BYTES
        if bad > self.max_ratio * most:
            share = self.progress.share
            raise TooManyBadRecords(f"{self._say(bad, read, _group(self.counts, 'quarantined.'))} (stopped after {share:.0%} of the input)")

    def check(self, parts: Sequence[Processed], listing: Path) -> None:
        """The final word. Raises TooManyBadRecords after writing every bad record with its place to `listing`."""
        bad, read = self.counts["quarantined"], self.counts["read"]
        if not read:
            raise SourceError(f"{', '.join(part.given.spec for part in parts)}: holds no record at all; nothing to prepare")
        if bad <= _FEW or bad <= self.max_ratio * read:
            return
        cache = listing.parent.parent
        entries = [entry for part in parts for entry in bad_records(cache, part)]
        listing.parent.mkdir(exist_ok=True)
        listing.write_bytes(b"".join(canonical_json(entry) + b"\n" for entry in entries))
        first = entries[0]
        place = f"the first: {first['file']} line {first['line']} ({first['reason']}: {first['detail']}); all of them: {listing}"
        raise TooManyBadRecords(f"{self._say(bad, read, _group(self.counts, 'quarantined.'))}; {place}")

    def check_content(self, content: Mapping[str, Any]) -> None:
        """The same judgement over something prepared under another --max_bad_ratio."""
        bad, read = content["records"]["quarantined"], content["records"]["read"]
        if left_out := sum(content["quarantined"].get(reason, 0) for reason in (DIED, HUNG)):
            logger.warning("It leaves out %d records that killed or hung their workers when it was made; --rehash tries them again", left_out)
        if bad > _FEW and bad > self.max_ratio * read:
            raise TooManyBadRecords(self._say(bad, read, content["quarantined"]))

    def _say(self, bad: int, read: int, reasons: Mapping[str, int]) -> str:
        top = ", ".join(f"{number:,} {reason}" for reason, number in Counter(reasons).most_common(4))
        return f"{bad:,} of {read:,} records ({bad / read:.2%}) are bad, more than --max_bad_ratio {self.max_ratio} allows: {top}"


def _check_conservation(counts: Counter[str]) -> None:
    """Nothing is lost or made on the way: records, and tokens."""
    assert counts["read"] == counts["kept"] + counts["filtered"] + counts["quarantined"], counts
    assert counts["tokens.text"] + counts["tokens.bos"] + counts["tokens.eos"] == counts["tokens.rows"] + counts["tokens.dropped"], counts


def _sum(many: Iterator[dict[str, int]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for counts in many:
        total.update(counts)
    return total


def _group(counts: Mapping[str, int], prefix: str) -> dict[str, int]:
    return {name.removeprefix(prefix): number for name, number in sorted(counts.items()) if name.startswith(prefix)}


def _way_out(config: DataConfig, content: Mapping[str, Any]) -> str:
    if config.held_out:
        return "nothing is held out: raise --eval_ratio, or leave it away"
    return "; ".join(["nothing to train on", *(way for reason, way in _WAYS_OUT.items() if content["filtered"].get(reason))])


def _losses(content: Mapping[str, Any]) -> str:
    records = content["records"]
    reasons = ", ".join(f"{number:,} {reason}" for reason, number in Counter({**content["filtered"], **content["quarantined"]}).most_common(4))
    return f"({records['read']:,} read, {records['filtered']:,} filtered, {records['quarantined']:,} quarantined): {reasons}"
