"""From receipts to the published corpus: counters checked, manifest, metadata, report, links to the shards, one rename.

    <output-dir>/entity_coref_v2_<seq_len>/
        dataset_dict.json  train/  validation/      for `datasets.load_from_disk`, a DatasetDict
        README.md                                   the dataset card
        tokenizer.json  tokenizer_config.json  quarantine.jsonl  report.html
        metadata.json      the form of the prior program, with the time it was made
        manifest.json      written last: keys, counters, every file with its hash

Nothing that is published is changed in place. The same corpus stays; another one is refused, or set aside whole with
--replace.
"""

from __future__ import annotations

import json
import logging
import os
import uuid
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from moai.cache.ledger import Ledger
from moai.core.config import identity
from moai.core.errors import ConfigError, DamagedError, SourceError
from moai.core.failpoints import failpoint
from moai.core.files import canonical_json, digest_file, digest_json, link_or_copy, publish_directory
from moai.coref import card, report, statistics
from moai.coref.assembly import Stream, Wanted
from moai.coref.entities import REASONS
from moai.coref.korean import RULE, RULES
from moai.coref.manifest import FORMAT_VERSION, read_manifest
from moai.coref.placement import SKIPS
from moai.coref.samples import SCHEMA, SPLITS
from moai.coref.selection import Selection, names_of
from moai.coref.wording import said
from moai.engine.run import Done, total
from moai.prepared.bad_records import bad_records, grouped, not_read
from moai.prepared.manifest import write_dataset_files, write_file, write_manifest
from moai.prepared.places import Processed
from moai.pretraining.keys import compare, dataset_key

logger = logging.getLogger(__name__)

_TOP = 20
WHY = {**REASONS, **SKIPS}
"""Why a later mention gives no sample: by the rules on mentions, then by its place among the tokens."""
_CHEAP = RULES.index("special") + 1
"""The rules before Kiwi."""


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
    def counts(self) -> Counter[str]:
        return total([*self.candidates, *self.samples])


def is_published(wanted: Wanted) -> bool:
    """Whether the corpus stands there already, and nothing it was made of changed. Raises ConfigError, before hours of
    work, where something else stands there and nobody said that it may go.
    """
    config, output = wanted.config, wanted.output
    if not output.exists():
        return False
    try:
        run = read_manifest(output)["run"]
    except DamagedError as error:
        if config.replace:
            return False
        raise ConfigError(
            f"{output} stands where the corpus shall be published, and is none of moai's: {error}; move it, or set it "
            f"aside with --replace"
        ) from error
    if run["plan_key"] == wanted.key:
        return bool(run["stamps_prove"]) and not config.rehash
    if config.replace:
        return False
    differences = "; ".join(compare(run["plan"], wanted.fields)[:6]) or "the files' order or grouping"
    raise ConfigError(
        f"{output} holds a corpus of other settings or data ({differences}); name another --output-dir, or set it "
        f"aside with --replace (finished work is reused)"
    )


def publish(wanted: Wanted, attempt: Path, corpus: Corpus, run: Mapping[str, Any]) -> None:
    """Build the directory in staging and rename it into place."""
    check_conservation(corpus)
    staged, output = attempt / "corpus", wanted.output
    staged.mkdir()
    content = _content(wanted, staged, corpus)
    write_file(staged / "metadata.json", spelled(metadata(content, run)))
    write_manifest(staged, content, {**run, "plan_key": wanted.key, "plan": {**wanted.fields, "columns": None}})
    failpoint("coref.publish", staged)
    if output.exists():
        if _same(output, content):
            logger.info(said(wanted.config.lang, "stays", path=output))
            return
        if not wanted.config.replace:
            raise ConfigError(
                f"{output} appeared while this corpus was made, and holds another; set it aside with --replace "
                f"(finished work is reused)"
            )
        aside = output.with_name(f"{output.name}.replaced-{uuid.uuid4().hex[:8]}")
        os.rename(output, aside)
        logger.warning("%s held another corpus; set aside as %s", output, aside.name)
        failpoint("coref.aside")
    if not publish_directory(staged, output) and not _same(output, content):
        raise ConfigError(
            f"{output}: another run published another corpus there meanwhile; run again with another --output-dir or "
            f"--replace"
        )


def check_conservation(corpus: Corpus) -> None:
    """No document, mention or sample is lost or made on the way. Raises AssertionError, always: a corpus that does not
    add up is not published.
    """
    counts, selection = corpus.counts, corpus.selection
    filtered, skipped = _lost(counts, f"filtered.{RULE}", RULES), _lost(counts, "skipped", WHY)
    for what, expected, found in (
        ("documents read", counts["read"], counts["quarantined"] + counts["passed"] + sum(filtered.values())),
        ("later mentions", counts["mentions"], counts["candidates"] + sum(skipped.values())),
        ("candidates read for the cap", counts["candidates"], sum(selection.before.values())),
        ("candidates chosen from", counts["candidates"], selection.total + sum(selection.lost.values())),
        ("samples picked", selection.total, counts["samples"]),
        ("samples written", counts["samples"], sum(done.receipt.rows for done in corpus.samples)),
    ):
        if expected != found:
            raise AssertionError(f"{what}: {expected:,}, but their parts sum to {found:,}: {dict(counts)}")


def funnel(counts: Counter[str]) -> list[list[Any]]:
    """(step, documents, "left" or "lost"), in the order of the rules."""
    filtered = _lost(counts, f"filtered.{RULE}", RULES)
    lost = [[f"{number} {rule}", filtered[rule], "lost"] for number, rule in enumerate(RULES)]
    cheap, costly = lost[:_CHEAP], lost[_CHEAP:]
    if not filtered["source"]:
        cheap = cheap[1:]  # only HPLT's documents say something of themselves
    left = counts["read"] - counts["quarantined"] - sum(filtered[rule] for rule in RULES[:_CHEAP])
    return [
        ["read", counts["read"], "left"],
        ["errors", counts["quarantined"], "lost"],
        *cheap,
        ["passed the cheap rules", left, "left"],
        *costly,
        ["passed", counts["passed"], "left"],
        ["with a sample to give", counts["documents"], "left"],
    ]


def mentions(counts: Counter[str], selection: Selection | None = None) -> list[list[Any]]:
    """The same of later mentions of names, up to samples once these are picked."""
    skipped = _lost(counts, "skipped", WHY)
    steps = [
        ["later mentions", counts["mentions"], "left"],
        *([f"skipped: {reason}", number, "lost"] for reason, number in skipped.items() if number),
        ["candidates", counts["candidates"], "left"],
    ]
    if selection is None:
        return steps
    named = {"common": "common names", "easy": "too easy", "cap": "over the cap"}
    lost = [[named[why], selection.lost[why], "lost"] for why in named if selection.lost.get(why)]
    return [*steps, *lost, ["samples", selection.total, "left"]]


def losses(counts: Counter[str]) -> list[str]:
    """Every rule's loss in words, and what would stay without it; and the reason that costs most mentions."""
    read, lost = max(1, counts["read"]), _lost(counts, f"filtered.{RULE}", RULES)
    lines = [
        f"{name}: {number:,} of {read:,} documents ({number / read:.1%}), {counts[f'alone.{name}']:,} of them by this "
        f"rule alone"
        for name, number in lost.items()
        if number
    ]
    skipped = {why: number for why, number in _lost(counts, "skipped", WHY).items() if number}
    if skipped:
        most = max(skipped, key=lambda why: skipped[why])
        share = f"{skipped[most]:,} of {counts['mentions']:,} later mentions"
        lines.append(f"{most}: {share}, more than any other reason: {WHY[most]}")
    return lines


def no_samples(corpus: Corpus) -> SourceError:
    """What lost most is named, and its way out: a rule, a reason why mentions had no place, or a choice."""
    counts, selection = corpus.counts, corpus.selection
    lines = ", ".join(f"{name} {number:,}" for name, number, _ in funnel(counts))
    listed = ", ".join(
        f"{name.removeprefix('skipped: ')} {n:,}" for name, n, what in mentions(counts) if what == "lost"
    )
    if counts["candidates"]:
        advice = f"{selection.lost} of the candidates: lower --min-difficulty, raise --max-name-share"
    elif listed:
        advice = losses(counts)[-1]
    else:
        advice = "widen the rule that drops most (--help lists them)"
    return SourceError(f"no sample could be made: {lines}{f'; mentions skipped: {listed}' if listed else ''}; {advice}")


def metadata(content: Mapping[str, Any], run: Mapping[str, Any]) -> dict[str, Any]:
    """What metadata.json says, in the form of the prior program; all of it follows from the manifest."""
    measures = ("entity_length_stats", "distance_stats", "distance_distribution", "length_stats", "masked_tokens_stats")
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
        **{name: content[name] for name in measures},
        "kiwi": content["kiwi"],
        "content_digest": digest_json(content),
    }


def spelled(found: Any) -> bytes:
    """The one spelling of metadata.json."""
    return json.dumps(found, indent=1, ensure_ascii=False).encode()


def _lost(counts: Counter[str], prefix: str, names: Iterable[str]) -> dict[str, int]:
    return {name: counts[f"{prefix}.{name}"] for name in names}


def _content(wanted: Wanted, staged: Path, corpus: Corpus) -> dict[str, Any]:
    """Link and write every file of the directory but metadata and manifest; return what the manifest says of them."""
    config, counts, ledger = wanted.config, corpus.counts, Ledger(wanted.cache)
    shards = _shards(ledger, staged, corpus)
    bad = b"".join(canonical_json(entry) + b"\n" for part in corpus.parts for entry in bad_records(wanted.cache, part))
    key = dataset_key([shard["shard_key"] for shard in shards] + ([xxhash.xxh3_128_hexdigest(bad)] if bad else []))
    paths = [staged / shard["file"] for shard in shards]
    measured = statistics.measure(paths)
    kept, validation = counts["samples"], counts["samples.validation"]
    content: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "recipe": "entity_coref",
        "dataset_key": key,
        "config": identity(config),
        "seq_len": config.seq_len,
        "tokenizer": wanted.tokenizer.identity(),
        "kiwi": wanted.kiwi.identity(),
        "rows": kept,
        "documents": counts["documents"],
        "widened": counts["samples.widened"],
        "split": {"train": kept - validation, "validation": validation},
        "funnel": funnel(counts),
        "alone": _lost(counts, "alone", RULES),
        "mentions": mentions(counts, corpus.selection),
        "errors": grouped(counts, "quarantined."),
        "entities": _entities(ledger, corpus),
        **statistics.as_json(measured),
        "sources": [{**_source(part), **not_read(wanted.cache, part)} for part in corpus.parts],
    }
    splits = [split for split in SPLITS if content["split"][split]]
    for split in splits:
        names = [shard["file"].removeprefix(f"{split}/") for shard in shards if shard["file"].startswith(f"{split}/")]
        write_dataset_files(staged / split, names, SCHEMA, key)
    write_file(staged / "dataset_dict.json", canonical_json({"splits": splits}))
    for name, data in wanted.tokenizer.files(config.seq_len).items():
        write_file(staged / name, data)
    if bad:
        write_file(staged / "quarantine.jsonl", bad)
    write_file(staged / "README.md", card.render(content).encode())
    some = statistics.some_samples(paths, [shard["rows"] for shard in shards], config.report_samples)
    page = report.render(content, some, wanted.tokenizer.reference, measured)
    write_file(staged / "report.html", page.encode("utf-8", "replace"))
    files = [
        {"file": path.relative_to(staged).as_posix(), "bytes": path.stat().st_size, "xxh3_128": digest_file(path)}
        for path in sorted(staged.rglob("*"))
        if path.is_file() and path.suffix != ".arrow"
    ]
    return {**content, "shards": shards, "files": files}


def _shards(ledger: Ledger, staged: Path, corpus: Corpus) -> list[dict[str, Any]]:
    """Link the finished samples into the folders of their splits; what the manifest says of them."""
    found: list[dict[str, Any]] = []
    for split in SPLITS:
        receipts = [done.receipt for done in corpus.samples if done.receipt.counts.get(f"samples.{split}")]
        for number, receipt in enumerate(receipts):
            name = f"{split}/data-{number:05d}-of-{len(receipts):05d}.arrow"
            (staged / split).mkdir(exist_ok=True)
            link_or_copy(ledger.shard(receipt.shard_key), staged / name)
            of = {field: getattr(receipt, field) for field in ("rows", "bytes", "xxh3_128", "shard_key")}
            found.append({"file": name, **of})
    return found


def _entities(ledger: Ledger, corpus: Corpus) -> dict[str, Any]:
    """How many names there are before and after the cap, and the most frequent; equals stand in the order of their
    letters.
    """
    before, after = corpus.selection.before, corpus.selection.after
    # Twice as many, so that the choice among equals at the end hangs on names and not on hashes as far as it can.
    near = {
        place: sorted(counts.items(), key=lambda item: (-item[1], item[0]))[: 2 * _TOP]
        for place, counts in (("top_before", before), ("top", after))
    }
    paths = [ledger.shard(done.receipt.shard_key) for done in corpus.candidates]
    names = names_of((entity for ranking in near.values() for entity, _ in ranking), paths)
    top = {
        place: [[name, -less] for less, name in sorted((-number, names[entity]) for entity, number in ranking)[:_TOP]]
        for place, ranking in near.items()
    }
    return {"unique": len(after), "unique_before": len(before), **top}


def _source(part: Processed[Stream]) -> dict[str, Any]:
    given, counts = part.given, total(part.done)
    return {
        "name": given.name,
        "kind": given.kind.name,
        "text": part.stream.shape.name,
        "shards": len(part.done),
        "origin": given.origin,
        "license": card.license_of(given),
        **{name: counts[name] for name in ("read", "passed", "documents", "candidates")},
    }


def _same(path: Path, content: Mapping[str, Any]) -> bool:
    try:
        return bool(read_manifest(path)["content_digest"] == digest_json(content))
    except DamagedError:
        return False
