"""From flags to the two pipelines: files, tokenizer and keys found, parts put together. No document is read here but a
few to look at.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from moai.cache.ledger import Ledger
from moai.cache.shards import ArrowShards
from moai.core.config import identity
from moai.core.files import canonical_json, digest_json
from moai.coref import candidates as coref_candidates
from moai.coref import samples as coref_samples
from moai.coref.candidates import Candidates
from moai.coref.documents import Documents
from moai.coref.entities import Repetition
from moai.coref.given_names import GivenNames
from moai.coref.korean import CheapRules, Kiwi, KiwiQuality
from moai.coref.manifest import FORMAT_VERSION
from moai.coref.mlm_tokens import MlmTokenizer, check_spells_names, load_mlm_tokenizer
from moai.coref.names import LongestNames, SingleNames
from moai.coref.options import CorefConfig
from moai.coref.picked import PickedSource, Picks
from moai.coref.pieces import Pieces
from moai.coref.placement import Placement
from moai.coref.samples import SPLITS, Samples
from moai.coref.selection import Selection
from moai.engine.part import Part, class_identity, identity_of
from moai.engine.pipeline import Meter, Pipeline, Shard, Source
from moai.engine.run import Done
from moai.engine.schema import with_features
from moai.sources.discover import Input
from moai.sources.inputs import find_inputs, open_input, plan_inputs, stamps_prove
from moai.sources.local import LocalSource
from moai.sources.mistaken import without_mistaken
from moai.tokenizers.load import digest_of, find_tokenizer
from moai.transforms.shapes import TextShape, choose_shape
from moai.transforms.text import ToText

Finder = LongestNames | SingleNames | GivenNames
_PARTS = (
    ToText, Documents, CheapRules, KiwiQuality, LongestNames, SingleNames, GivenNames, Repetition, Placement,
    Candidates, Samples,
)  # fmt: skip
"""A plan is another one where the version of any of them is."""
WORKER_MODULES = (
    "moai.engine.executor", "moai.sources.local", "moai.coref.picked", "moai.coref.documents", "moai.coref.candidates",
    "moai.coref.samples", "moai.cache.shards",
)  # fmt: skip
"""What a worker needs, imported once where workers are forked from."""
_OF_HPLT = ("doc_scores", "filter", "pii")
"""Columns of HPLT's records beside the text."""
_DOCUMENTS_PER_BATCH = 16
"""Tokenized in one call: what the tokenizer holds for them is most of what a worker has for itself."""
_CANDIDATE_ROWS = 256


@dataclass(frozen=True)
class Wanted:
    """What is asked for, resolved as far as it goes without reading data."""

    config: CorefConfig
    cache: Path
    output: Path
    tokenizer: MlmTokenizer
    inputs: tuple[Input, ...]
    stamps_prove: bool
    kiwi: Kiwi
    fields: Mapping[str, Any]
    key: str
    finder: Finder


@dataclass(frozen=True, kw_only=True)
class Head(LocalSource):
    """The first shards of an input, until they hold `most` records: --max-documents. Records are counted by reading
    them, at a small part of what Kiwi costs.
    """

    most: int

    def shards(self) -> Iterator[Shard]:
        left = self.most
        for shard in super().shards():
            if left <= 0:
                return
            yield shard
            left -= sum(batch.num_rows for batch in self.read(shard, Meter()))


@dataclass(frozen=True)
class Stream:
    """One input on its way to candidates: its source, the parts that its records pass, and what names its shards."""

    given: Input
    source: LocalSource
    shape: TextShape
    parts: tuple[Part, ...]

    @property
    def identity(self) -> dict[str, Any]:
        return {"source": {"kind": self.given.kind.identity}, **_identity(self.parts)}


def want(config: CorefConfig) -> Wanted:
    """Find files and tokenizer; read no data. Raises ConfigError, SourceError, TokenizerError."""
    kiwi = Kiwi(config.kiwi_model)
    tokenizer = load_mlm_tokenizer(config.model, config.mask_token)
    check_spells_names(tokenizer)
    cache, output = places(config)
    columns = dict(config.inputs)
    inputs = find_inputs(tuple(columns), cache)
    parts = digest_json([class_identity(part) for part in _PARTS])
    finder = _finder(config)
    plan = {
        **plan_inputs(inputs),
        "config": identity(config),
        "tokenizer": tokenizer.identity(),
        "columns": columns,
        "format": {"entity_coref_version": FORMAT_VERSION, "parts": parts, **kiwi.identity()},
        "names": identity_of(finder),
    }
    plan = json.loads(canonical_json(plan))  # as it will be read back, to be compared
    key = digest_json(plan)[:40]
    return Wanted(config, cache, output, tokenizer, inputs, stamps_prove(inputs), kiwi, plan, key, finder)


def _finder(config: CorefConfig) -> Finder:
    if config.entities:
        return GivenNames.open(config.entities)
    if config.rules == "v2":
        return SingleNames(tags=config.entity_tags, merge_latin=config.merge_latin)
    return LongestNames(tags=config.entity_tags)


def places(config: CorefConfig) -> tuple[Path, Path]:
    """(where unfinished work lives, where the corpus is published)."""
    folder = Path(config.output_dir).expanduser().absolute()
    cache = Path(config.cache_dir).expanduser().absolute() if config.cache_dir else folder / "cache_entity_coref"
    return cache, folder / f"entity_coref_v2_{config.seq_len}"


def streams(wanted: Wanted, spool_dir: Path, batch_bytes: int) -> list[Stream]:
    """The inputs, each with its parts. Raises SourceError where no shape of text fits."""
    config, found = wanted.config, []
    known = dict(config.inputs)
    for given in without_mistaken(wanted.inputs, config.max_bad_ratio == 1):
        source, columns = open_input(
            given,
            cache=wanted.cache,
            spool_dir=spool_dir,
            shard_bytes=config.shard_bytes,
            batch_bytes=batch_bytes,
            trust_stamps=not config.rehash,
        )
        template = config.text_template if given.spec in config.input else None  # the columns of a preset are known
        shape = (
            TextShape(name="plain text")
            if given.kind.plain
            else choose_shape(columns, source=given.place, text_column=known[given.spec], template=template)
        )
        of_hplt = set(_OF_HPLT) <= set(columns)
        stream = Stream(given, source, shape, _parts(wanted, given, shape, of_hplt))
        others = (config.id_column, *(_OF_HPLT if of_hplt else ()))
        names = (*shape.columns, *(name for name in others if name in columns))
        key = digest_json(stream.identity)[:40]
        source = replace(source, columns=tuple(dict.fromkeys(names)), transform_keys=(key,))
        if config.max_documents is not None:
            source = Head(
                **{field.name: getattr(source, field.name) for field in fields(source)}, most=config.max_documents
            )
        found.append(replace(stream, source=source))
    return found


def candidates(cache: Path, stream: Stream, staging: Path) -> Pipeline:
    """The first pipeline: everything that needs Kiwi and the tokenizer, up to candidates that have a place in a row."""
    sink = ArrowShards(cache=cache, staging=staging, schema=coref_candidates.SCHEMA, rows_per_batch=_CANDIDATE_ROWS)
    return _pipeline(stream.source, stream.parts, stream.identity, sink)


def samples(wanted: Wanted, done: Sequence[Done], selection: Selection, staging: Path) -> list[Pipeline]:
    """The second pipelines, one for each split that has samples: the picked candidates of the finished shards `done`,
    about token_chunk_size of them a file.
    """
    config, cache = wanted.config, wanted.cache
    schema = with_features(coref_samples.SCHEMA)
    sink = ArrowShards(cache=cache, staging=staging, schema=schema, rows_per_batch=coref_samples.ROWS_PER_BATCH)
    found = []
    for split in SPLITS:
        groups = _groups(Ledger(cache), done, selection, config.token_chunk_size, split)
        part = Samples(tokenizer=wanted.tokenizer, split=split, labelled=config.mode != "text")
        source = PickedSource(name=split, column="candidates", groups=groups)
        found += [_pipeline(source, (part,), _identity((part,)), sink)] if groups else []
    return found


def warm(config: CorefConfig) -> tuple[tuple[str, dict[str, Any]], ...]:
    """What workers shall find loaded: Kiwi, so that its 500 MB are there once, and the tokenizer. Raises ConfigError,
    TokenizerError where there is none.
    """
    Kiwi(config.kiwi_model).identity()
    file = find_tokenizer(config.model)
    backend = {"names": ["tokenizers"], "path": str(file), "digest": digest_of(file), "split_special_tokens": True}
    return (("moai.coref.korean:warm", {"model": config.kiwi_model}), ("moai.tokenizers.backends:warm", backend))


def _parts(wanted: Wanted, given: Input, shape: TextShape, of_hplt: bool) -> tuple[Part, ...]:
    config, tokenizer = wanted.config, wanted.tokenizer
    mentions = config.rules == "mention"
    assert config.min_nnp_ratio is not None
    assert config.max_nnp_ratio is not None
    return (
        Documents(
            to_text=ToText(shape=shape, plain=given.kind.plain),
            id_column=config.id_column,
            min_doc_score=config.min_doc_score if of_hplt else None,
            keep_pii=config.pii == "keep",
            batch_rows=min(_DOCUMENTS_PER_BATCH, config.tokenizer_batch_size),
        ),
        CheapRules(**_named_alike(config, CheapRules)),
        Candidates(
            source=given.name,
            kiwi=wanted.kiwi,
            tokenizer=tokenizer,
            quality=KiwiQuality(
                min_nnp_ratio=config.min_nnp_ratio,
                max_nnp_ratio=config.max_nnp_ratio,
                pronoun_filter=config.pronoun_filter and not mentions,
            ),
            repetition=Repetition(
                finder=wanted.finder,
                max_mentions=config.max_mentions,
                min_distance=config.min_distance,
                max_distance=config.max_distance,
                spread=mentions,
                pronoun_filter=config.pronoun_filter and mentions,
                hide_copies=config.mask == "all-later",
            ),
            placement=Placement(
                room=tokenizer.room(config.seq_len),
                mode=config.mode,
                skip_widened=config.skip_widened,
                hide_copies=config.mask == "all-later",
                unknown_id=tokenizer.unknown_id,
                pieces=Pieces(tokenizer.spec.path, tokenizer.spec.digest) if mentions else None,
            ),
        ),
    )


def _named_alike(config: CorefConfig, part: Any) -> dict[str, Any]:
    """The options that are a part's fields, by name."""
    return {field.name: getattr(config, field.name) for field in fields(part) if hasattr(config, field.name)}


def _identity(parts: Sequence[Part]) -> dict[str, Any]:
    return {"format_version": FORMAT_VERSION, "parts": [part.identity() for part in parts]}


def _pipeline(source: Source, parts: tuple[Part, ...], identity: Mapping[str, Any], sink: ArrowShards) -> Pipeline:
    key = digest_json(identity)[:40]
    probe = Ledger(sink.cache).has_transform(key)
    return Pipeline(source=source, transforms=parts, sink=sink, transform_key=key, probe=probe)


def _groups(
    ledger: Ledger, parts: Sequence[Done], selection: Selection, size: int, split: str
) -> tuple[tuple[Picks, ...], ...]:
    """Runs of candidate shards that hold `size` samples of the split or a little more."""
    groups: list[list[Picks]] = [[]]
    for index, receipt in enumerate(done.receipt for done in parts):
        bits, sides = selection.bits[index], selection.validation[index]
        wanted = bits & (sides if split == "validation" else ~sides)
        if wanted.any():
            if sum(picks.number for picks in groups[-1]) >= size:
                groups.append([])
            path, values = str(ledger.shard(receipt.shard_key)), selection.difficulties[index][wanted[bits]]
            groups[-1].append(Picks(path, receipt.xxh3_128, np.packbits(wanted).tobytes(), values.tobytes()))
    return tuple(tuple(group) for group in groups if group)
