"""From receipts to a published directory: totals, manifest, links to the shards, one rename."""

from __future__ import annotations

import logging
import os
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import xxhash

from moai.cache.ledger import Ledger
from moai.core.config import identity
from moai.core.errors import DamagedError, SourceError
from moai.core.failpoints import failpoint
from moai.core.files import canonical_json, digest_file, digest_json, link_or_copy, publish_directory
from moai.engine.pipeline import DIED, HUNG, MAX_DETAILS
from moai.engine.run import total
from moai.engine.schema import arrow_schema
from moai.prepared.bad_records import bad_records, grouped, listed, not_read
from moai.prepared.manifest import FORMAT_VERSION, read_manifest, write_dataset_files, write_file, write_manifest
from moai.prepared.places import Processed, sources_listing
from moai.pretraining.assembly import Stream
from moai.pretraining.judging import Judgement
from moai.pretraining.keys import dataset_key, tokenizer_files, tokenizer_identity
from moai.pretraining.losses import check_losses
from moai.pretraining.options import DataConfig
from moai.sources.discover import Input
from moai.tokenizers.load import TokenizerSpec, files_beside
from moai.transforms.chat import MARK_ANSWERS
from moai.transforms.named import spelled
from moai.transforms.template import ChatTemplate

logger = logging.getLogger(__name__)

SOURCES = "sources.json"
_WAYS_OUT = {
    "chat.unverified": f"no answer could be told from its question under this chat template: {MARK_ANSWERS}",
    "chat.too_long": "raise --seq_len, or cut them by --long_examples truncate",
    "chat.untrained": "only what the assistant says is learned: give the conversations answers, not all of them with "
    '"weight": 0 or "train": false',
}


def publish(
    cache: Path,
    attempt: Path,
    config: DataConfig,
    tokenizer: TokenizerSpec,
    parts: Sequence[Processed[Stream]],
    run: Mapping[str, Any],
    template: ChatTemplate | None = None,
    judgement: Judgement | None = None,
) -> Path:
    """Build the directory in staging and rename it into place; an equal one that is already there is kept. Returns its
    path.
    """
    counts = total(done for part in parts for done in part.done)
    lost = {"chat": {"counts": grouped(counts, "chat.")}, "filtered": grouped(counts, "filtered.")}
    check_losses({**lost, "records": {"read": counts["read"]}}, config.max_bad_ratio)
    # Places of bad records hold names of files, which the shards' keys know nothing of.
    givens = [part.stream.given for part in parts]
    entries = [entry for part in parts for entry in bad_records(cache, part)]
    bad = b"".join(canonical_json(entry) + b"\n" for entry in entries)
    for entry in entries:
        if entry["reason"] in (DIED, HUNG):
            logger.warning(
                "%s line %d is left out: its worker %s (%s) when it was alone with it, too. Another machine may take "
                "it",
                entry["file"],
                entry["line"],
                "hung" if entry["reason"] == HUNG else "died",
                entry["detail"],
            )
    sources = sources_listing(parts)
    # What is said of sources is content too: renamed ones get a directory of their own, by links.
    keys = [done.receipt.shard_key for part in parts for done in part.done] + [
        xxhash.xxh3_128_hexdigest(listing) for listing in (sources, bad) if listing
    ]
    unused = [digest_json([given.left_out, given.bad]) for given in givens if given.left_out or given.bad]
    judged = [judgement.digest] if judgement else []
    final = cache / "datasets" / dataset_key([*keys, *judged, *tokenizer_files(tokenizer), *unused])
    if os.path.lexists(final):
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
    judged_files = judgement.write_into(staged) if judgement else []
    listings = {SOURCES: sources, "quarantine.jsonl": bad}
    content = _content(cache, staged, config, tokenizer, parts, listings, template, judged_files)
    if judgement:
        content["quality"] = judgement.summary()
    if not content["rows"]:
        raise SourceError(
            f"{', '.join(part.stream.given.spec for part in parts)}: no document is left {_losses(content)}; "
            f"{_way_out(config, content)}"
        )
    failpoint("dataset.manifest")
    entries = [
        {
            **part.stream.reading.entry.as_yaml(),
            **({} if part.stream.reading.entry.source else {"path": whereabouts(part.stream.given)}),
        }
        for part in parts
    ]
    passed_over = {given.name: listed(given.passed_over) for given in givens if given.passed_over}
    where = {
        "inputs": [whereabouts(given) for given in givens],
        **({"passed_over": passed_over} if passed_over else {}),
        "entries": entries,
        "transforms": [spelled(part) for part in config.transforms],
    }
    write_manifest(staged, content, {**run, **where, "directory": final.name})
    publish_directory(staged, final)
    return final


def whereabouts(given: Input) -> str:
    """What a person named, so that it is found from any directory; the name of a Hub dataset stays. It stands in `run`
    only: no key knows where data lies.
    """
    is_local = not given.origin or Path(given.origin["dataset"]).expanduser().exists()
    where = str(Path(given.spec).expanduser().absolute()) if is_local else given.spec
    return os.fsencode(where).decode("utf-8", "backslashreplace")


def _holds(final: Path, parts: Sequence[Processed[Stream]]) -> bool:
    """Whether a published directory holds just these shards. A damaged one is for whoever opens it to refuse."""
    try:
        shards = read_manifest(final)["content"]["shards"]
    except DamagedError:
        return True
    return [shard["xxh3_128"] for shard in shards] == [done.receipt.xxh3_128 for part in parts for done in part.done]


def _content(
    cache: Path,
    staged: Path,
    config: DataConfig,
    tokenizer: TokenizerSpec,
    parts: Sequence[Processed[Stream]],
    listings: Mapping[str, bytes],
    template: ChatTemplate | None,
    judged_files: Sequence[str],
) -> dict[str, Any]:
    """Link and write every file of the directory but the manifest; return what the manifest says of them."""
    counts = total(done for part in parts for done in part.done)
    _check_conservation(counts)
    columns = parts[0].stream.columns
    shards = _link_shards(cache, staged, parts)
    names = [shard["file"] for shard in shards if shard["file"]]
    write_dataset_files(staged, names, arrow_schema(columns), dataset_key(shard["shard_key"] for shard in shards))
    for name, data in {
        "tokenizer.json": Path(tokenizer.path).read_bytes(),
        **files_beside(Path(tokenizer.path)),
        **listings,
    }.items():
        if data:
            write_file(staged / name, data)
    if left_out := counts["quarantined_without_place"]:
        logger.warning(
            "quarantine.jsonl leaves out %s bad records: of one shard it keeps %s with their place",
            f"{left_out:,}",
            f"{MAX_DETAILS:,}",
        )
    files = [
        {"file": p.name, "bytes": p.stat().st_size, "xxh3_128": digest_file(p)}
        for p in sorted(staged.iterdir())
        if p.suffix != ".arrow" or p.name in judged_files
    ]
    rows = counts["rows"]
    return {
        "format_version": FORMAT_VERSION,
        "recipe": "pretraining",
        "config": {**identity(config), **({"pii": config.pii} if config.pii == "mask" else {})},
        "seq_len": config.seq_len,
        "packing": config.packing,
        "tokenizer": {
            **tokenizer_identity(tokenizer, template),
            "vocab_size": tokenizer.vocab_size,
            "eos_token": tokenizer.eos_token,
        },
        "tokenizer_digest": tokenizer.digest,
        "vocab_size": tokenizer.vocab_size,
        "columns": [column.as_json() for column in columns],
        "transforms": [part.identity() for part in config.transforms],
        "rows": rows,
        "tokens": counts["tokens.rows"],
        "fill_rate": round(counts["tokens.rows"] / (rows * config.seq_len), 6) if rows else 0.0,
        "records": {
            "read": counts["read"],
            "kept": counts["kept"],
            "filtered": counts["filtered"],
            "quarantined": counts["quarantined"],
        },
        **({"nulls": nulls} if (nulls := grouped(counts, "nulls.")) else {}),
        "documents": counts["kept"],
        "filtered": grouped(counts, "filtered."),
        "quarantined": grouped(counts, "quarantined."),
        "token_counts": {"eos": 0, **grouped(counts, "tokens.")},
        "sources": [_source(cache, part) for part in parts],
        "shards": shards,
        "files": files,
        **(_chat(template, counts) if template else {}),
    }


def _chat(template: ChatTemplate, counts: Mapping[str, int]) -> dict[str, Any]:
    """The template, so that shards can be made again and a model keeps it, and what became of the conversations."""
    return {"chat": {"template": template.as_json(), "counts": {"examples": 0, "turns": 0, **grouped(counts, "chat.")}}}


def _link_shards(cache: Path, staged: Path, parts: Sequence[Processed[Stream]]) -> list[dict[str, Any]]:
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
            documents = {
                "file": documents_name,
                "bytes": receipt.documents_bytes,
                "xxh3_128": receipt.documents_xxh3_128,
            }
            link_or_copy(ledger.documents(receipt.shard_key), staged / documents_name)
            shards.append(
                {
                    "file": name,
                    "rows": receipt.rows,
                    "bytes": receipt.bytes,
                    "xxh3_128": receipt.xxh3_128,
                    "shard_key": receipt.shard_key,
                    "source": part.stream.given.name,
                    "documents": receipt.counts.get("kept", 0),
                    "tokens": receipt.counts.get("tokens.rows", 0),
                    "raw_digest": receipt.raw.digest,
                    "documents_file": documents,
                }
            )
    return shards


def _source(cache: Path, part: Processed[Stream]) -> dict[str, Any]:
    counts, given = total(part.done), part.stream.given
    return {
        **not_read(cache, part),
        "name": given.name,
        "not_read": list(part.stream.not_read),
        "kind": given.kind.name,
        "text": part.stream.to_text.shape.name,
        "shards": len(part.done),
        "read": counts["read"],
        "documents": counts["kept"],
        "tokens": counts["tokens.rows"],
        "origin": given.origin,
        "raw_bytes": sum(sum(done.receipt.raw.bytes) for done in part.done),
    }


def _check_conservation(counts: Counter[str]) -> None:
    """Nothing is lost or made on the way: records, and tokens."""
    assert counts["read"] == counts["kept"] + counts["filtered"] + counts["quarantined"], counts
    assert (
        counts["tokens.text"] + counts["tokens.bos"] + counts["tokens.eos"]
        == counts["tokens.rows"] + counts["tokens.dropped"]
    ), counts


def _way_out(config: DataConfig, content: Mapping[str, Any]) -> str:
    if config.held_out:
        return "nothing is held out: raise --eval_ratio, or leave it away"
    return "; ".join(
        ["nothing to train on", *(way for reason, way in _WAYS_OUT.items() if content["filtered"].get(reason))]
    )


def _losses(content: Mapping[str, Any]) -> str:
    records = content["records"]
    reasons = ", ".join(
        f"{number:,} {reason}"
        for reason, number in Counter({**content["filtered"], **content["quarantined"]}).most_common(4)
    )
    return (
        f"({records['read']:,} read, {records['filtered']:,} filtered, {records['quarantined']:,} quarantined): "
        f"{reasons}"
    )
