"""From receipts to the published corpus: counters checked, manifest, metadata, report, links to the shards, one rename.

    <output-dir>/entity_coref_v2_<seq_len>/
        data-00000-of-00012.arrow ...  state.json  dataset_info.json    for `datasets.load_from_disk`
        tokenizer.json  quarantine.jsonl  report.html
        metadata.json                                                   the form of the prior program, with the time it
                                                                        was made
        manifest.json                                                   written last: keys, counters, every file with
                                                                        its hash

Nothing that is published is changed in place. The same corpus stays; another one is refused, or set aside whole with
--replace.
"""

from __future__ import annotations

import json
import logging
import os
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from moai.cache.ledger import Ledger
from moai.core.config import identity
from moai.core.errors import ConfigError, DamagedError, SourceError
from moai.core.failpoints import failpoint
from moai.core.files import canonical_json, digest_file, digest_json, link_or_copy, publish_directory
from moai.coref import report, statistics
from moai.coref.assembly import Stream, Wanted
from moai.coref.korean import RULE, RULES
from moai.coref.manifest import FORMAT_VERSION, read_manifest
from moai.coref.placement import SKIPS
from moai.coref.samples import SCHEMA
from moai.coref.selection import Selection, names_of
from moai.engine.run import Done, total
from moai.prepared.bad_records import bad_records, not_read
from moai.prepared.manifest import write_dataset_files, write_file, write_manifest
from moai.prepared.places import Processed
from moai.pretraining.keys import compare, dataset_key

logger = logging.getLogger(__name__)

_TOP = 20


@dataclass(frozen=True)
class Corpus:
    """All there is to publish: the finished candidate shards by input, what was picked of them, and the finished sample
    shards.
    """

    parts: Sequence[Processed[Stream]]
    selection: Selection
    samples: Sequence[Done] = ()

    @property
    def candidates(self) -> list[Done]:
        return [done for part in self.parts for done in part.done]

    @property
    def done(self) -> list[Done]:
        return [*self.candidates, *self.samples]

    @property
    def counts(self) -> Counter[str]:
        return total(self.done)


def existing(wanted: Wanted) -> dict[str, Any] | None:
    """The manifest of what stands where the corpus shall be published. Raises ConfigError if that is no corpus."""
    if not wanted.output.exists():
        return None
    try:
        return read_manifest(wanted.output)
    except DamagedError as error:
        if wanted.config.replace:
            return None
        raise ConfigError(
            f"{wanted.output} stands where the corpus shall be published, and is none of moai's: {error}; move it, or "
            f"set it aside with --replace"
        ) from error


def refuse_other(wanted: Wanted, manifest: Mapping[str, Any]) -> None:
    """Before hours of work: a corpus of other settings stands there, and nobody said that it may go."""
    if wanted.config.replace or manifest["run"]["plan_key"] == wanted.key:
        return
    differences = "; ".join(compare(manifest["run"]["plan"], wanted.fields)[:6]) or "the files' order or grouping"
    raise ConfigError(
        f"{wanted.output} holds a corpus of other settings or data ({differences}); name another --output-dir, or set "
        f"it aside with --replace (finished work is reused)"
    )


def publish(wanted: Wanted, attempt: Path, corpus: Corpus, run: Mapping[str, Any]) -> Path:
    """Build the directory in staging and rename it into place. Raises SourceError where there is no sample."""
    check_conservation(corpus)
    bad = b"".join(canonical_json(entry) + b"\n" for part in corpus.parts for entry in bad_records(wanted.cache, part))
    staged = attempt / "corpus"
    staged.mkdir()
    content = _content(wanted, staged, corpus, bad)
    write_file(staged / "metadata.json", json.dumps(metadata(content, run), indent=1, ensure_ascii=False).encode())
    write_manifest(staged, content, {**run, "plan_key": wanted.key, "plan": {**wanted.fields, "columns": None}})
    failpoint("coref.publish", staged)
    if wanted.output.exists():
        if _same(wanted.output, content):
            logger.info("같은 내용이 이미 있습니다 (the same content is already published): %s", wanted.output)
            return wanted.output
        aside = wanted.output.with_name(f"{wanted.output.name}.replaced-{uuid.uuid4().hex[:8]}")
        if not wanted.config.replace:
            raise ConfigError(
                f"{wanted.output} appeared while this corpus was made, and holds another; set it aside with --replace "
                f"(finished work is reused)"
            )
        os.rename(wanted.output, aside)
        logger.warning("%s held another corpus; set aside as %s", wanted.output, aside.name)
        failpoint("coref.aside")
    if not publish_directory(staged, wanted.output) and not _same(wanted.output, content):
        raise ConfigError(
            f"{wanted.output}: another run published another corpus there meanwhile; run again with another "
            f"--output-dir or --replace"
        )
    return wanted.output


def check_conservation(corpus: Corpus) -> None:
    """No document, mention or sample is lost or made on the way. Raises AssertionError, always: a corpus that does not
    add up is not published.
    """
    counts = corpus.counts
    sums = {
        "documents read": (
            counts["read"],
            counts["quarantined"] + counts["passed"] + sum(counts[f"filtered.{RULE}.{rule}"] for rule in RULES),
        ),
        "later mentions": (
            counts["mentions"],
            counts["candidates"] + sum(counts[f"skipped.{reason}"] for reason in SKIPS),
        ),
        "candidates read for the cap": (counts["candidates"], sum(corpus.selection.before.values())),
        "samples picked": (corpus.selection.total, counts["samples"]),
        "samples written": (counts["samples"], sum(done.receipt.rows for done in corpus.samples)),
    }
    for what, (expected, found) in sums.items():
        if expected != found:
            raise AssertionError(f"{what}: {expected:,}, but their parts sum to {found:,}: {dict(counts)}")


def funnel(counts: Mapping[str, int]) -> list[list[Any]]:
    """(step, documents, "left" or "lost"), in the order of the rules."""
    steps: list[list[Any]] = [["read", counts.get("read", 0), "left"], ["errors", counts.get("quarantined", 0), "lost"]]
    left = steps[0][1] - steps[1][1]
    for number, rule in enumerate(RULES, start=1):
        lost = counts.get(f"filtered.{RULE}.{rule}", 0)
        left -= lost
        steps += [
            [f"{number} {rule}", lost, "lost"],
            *([["passed the cheap rules", left, "left"]] if rule == "special" else []),
        ]
    return [
        *steps,
        ["passed", counts.get("passed", 0), "left"],
        ["with a sample to give", counts.get("documents", 0), "left"],
    ]


def no_samples(counts: Mapping[str, int]) -> SourceError:
    lines = ", ".join(f"{name} {number:,}" for name, number, _ in funnel(counts))
    skipped = ", ".join(
        f"{reason} {counts[f'skipped.{reason}']:,}" for reason in SKIPS if counts.get(f"skipped.{reason}")
    )
    return SourceError(
        f"no sample could be made: {lines}{f'; mentions skipped: {skipped}' if skipped else ''}; widen the rule that "
        f"drops most (--help lists them)"
    )


def _content(wanted: Wanted, staged: Path, corpus: Corpus, bad: bytes) -> dict[str, Any]:
    """Link and write every file of the directory but metadata and manifest; return what the manifest says of them."""
    counts, ledger = corpus.counts, Ledger(wanted.cache)
    shards: list[dict[str, Any]] = []
    for number, done in enumerate(corpus.samples):
        name = f"data-{number:05d}-of-{len(corpus.samples):05d}.arrow"
        link_or_copy(ledger.shard(done.receipt.shard_key), staged / name)
        receipt = done.receipt
        shards.append(
            {
                "file": name,
                "rows": receipt.rows,
                "bytes": receipt.bytes,
                "xxh3_128": receipt.xxh3_128,
                "shard_key": receipt.shard_key,
            }
        )
    key = dataset_key([shard["shard_key"] for shard in shards] + ([xxhash.xxh3_128_hexdigest(bad)] if bad else []))
    paths = [staged / shard["file"] for shard in shards]
    measured = statistics.measure(paths)
    kept = counts["samples"]
    content: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "recipe": "entity_coref",
        "dataset_key": key,
        "config": identity(wanted.config),
        "seq_len": wanted.config.seq_len,
        "tokenizer": wanted.tokenizer.identity(),
        "kiwi": wanted.kiwi.identity(),
        "rows": kept,
        "documents": counts["documents"],
        "widened": counts["samples.widened"],
        "split": {"train": kept - counts["samples.validation"], "validation": counts["samples.validation"]},
        "funnel": funnel(counts),
        "mentions": [
            ["later mentions", counts["mentions"], "left"],
            *(
                [f"skipped: {reason}", counts[f"skipped.{reason}"], "lost"]
                for reason in SKIPS
                if counts[f"skipped.{reason}"]
            ),
            ["candidates", counts["candidates"], "left"],
            ["over the cap", counts["candidates"] - kept, "lost"],
            ["samples", kept, "left"],
        ],
        "errors": {
            name.removeprefix("quarantined."): number
            for name, number in sorted(counts.items())
            if name.startswith("quarantined.")
        },
        "entities": {
            "unique": len(corpus.selection.after),
            "unique_before": len(corpus.selection.before),
            **_top(ledger, corpus),
        },
        **measured.as_json(),
        "sources": [{**_source(part), **not_read(wanted.cache, part)} for part in corpus.parts],
    }
    write_dataset_files(staged, [shard["file"] for shard in shards], SCHEMA, key)
    write_file(staged / "tokenizer.json", Path(wanted.tokenizer.spec.path).read_bytes())
    if bad:
        write_file(staged / "quarantine.jsonl", bad)
    some = statistics.some_samples(paths, [shard["rows"] for shard in shards], wanted.config.report_samples)
    page = report.render(content, some, wanted.tokenizer.reference, measured.lengths, measured.distances)
    write_file(staged / "report.html", page.encode("utf-8", "replace"))
    files = [
        {"file": p.name, "bytes": p.stat().st_size, "xxh3_128": digest_file(p)}
        for p in sorted(staged.iterdir())
        if p.suffix != ".arrow"
    ]
    return {**content, "shards": shards, "files": files}


def _top(ledger: Ledger, corpus: Corpus) -> dict[str, list[list[Any]]]:
    """The most frequent names before and after the cap; equals stand in the order of their letters."""
    paths = [ledger.shard(done.receipt.shard_key) for done in corpus.candidates]
    rankings = {"top_before": corpus.selection.before, "top": corpus.selection.after}
    # Twice as many, so that the choice among equals at the end hangs on names and not on hashes as far as it can.
    near = {
        name: sorted(counts.items(), key=lambda item: (-item[1], item[0]))[: 2 * _TOP]
        for name, counts in rankings.items()
    }
    names = names_of((entity for ranking in near.values() for entity, _ in ranking), paths)
    return {
        name: [
            [names[entity], number]
            for entity, number in sorted(ranking, key=lambda item: (-item[1], names[item[0]]))[:_TOP]
        ]
        for name, ranking in near.items()
    }


def _source(part: Processed[Stream]) -> dict[str, Any]:
    counts = total(part.done)
    return {
        "name": part.given.name,
        "kind": part.given.kind.name,
        "text": part.stream.shape.name,
        "shards": len(part.done),
        "origin": part.given.origin,
        "read": counts["read"],
        "passed": counts["passed"],
        "documents": counts["documents"],
        "candidates": counts["candidates"],
    }


def metadata(content: Mapping[str, Any], run: Mapping[str, Any]) -> dict[str, Any]:
    """What metadata.json says, in the form of the prior program; all of it follows from the manifest."""
    return {
        "dataset_type": "entity_coreference_v2",
        "version": "2.0",
        "num_samples": content["rows"],
        "seq_len": content["seq_len"],
        "created_at": run["created"],
        "source_datasets": [source["name"] for source in content["sources"]],
        "num_unique_entities": content["entities"]["unique"],
        "max_entity_freq": content["config"]["max_entity_freq"],
        "top_entities": content["entities"]["top"],
        **{
            name: content[name]
            for name in (
                "entity_length_stats",
                "distance_stats",
                "distance_distribution",
                "length_stats",
                "masked_tokens_stats",
            )
        },
        "kiwi": content["kiwi"],
        "content_digest": digest_json({**content}),
    }


def _same(path: Path, content: Mapping[str, Any]) -> bool:
    try:
        return bool(read_manifest(path)["content_digest"] == digest_json(content))
    except DamagedError:
        return False
