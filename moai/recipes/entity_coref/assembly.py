"""From flags to the two pipelines: files, tokenizer and keys found, parts put together. No document is read here but a few to look at."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from moai.config import identity
from moai.engine.ledger import Ledger
from moai.engine.pipeline import Pipeline
from moai.engine.run import Done
from moai.engine.schema import with_features
from moai.files import canonical_json, digest_json
from moai.recipes import assembly
from moai.recipes.assembly import Stream
from moai.recipes.dataset import DatasetEntry
from moai.recipes.entity_coref.options import AFTER_CANDIDATES, WHERE_TO_CUT, CorefConfig
from moai.recipes.entity_coref.selection import Selection
from moai.recipes.identity import plan_fields
from moai.recipes.options import DataConfig
from moai.sinks.arrow import ArrowShards
from moai.sources.discover import Input
from moai.sources.local import LocalSource
from moai.sources.picked import PickedSource, Picks
from moai.sources.schema import columns_of
from moai.tokenizer import digest_of, find_tokenizer
from moai.transforms import coref_candidates, coref_samples
from moai.transforms.coref_documents import Documents
from moai.transforms.coref_placement import Placement
from moai.transforms.entities import Repetition
from moai.transforms.korean import CheapRules, KiwiQuality, kiwi_identity
from moai.transforms.mlm_tokens import MlmTokenizer, load_mlm_tokenizer
from moai.transforms.text import ToText

FORMAT_VERSION = 1
WORKER_MODULES = (
    "moai.engine.executor", "moai.sources.local", "moai.sources.picked", "moai.transforms.coref_documents", "moai.transforms.coref_candidates",
    "moai.transforms.coref_samples", "moai.sinks.arrow",
)  # fmt: skip
"""What a worker needs, imported once where workers are forked from."""
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
    request: assembly.Request
    text_columns: Mapping[str, str | None]
    kiwi: Mapping[str, str]
    fields: Mapping[str, Any]
    key: str


def want(config: CorefConfig) -> Wanted:
    """Find files and tokenizer; read no data. Raises ConfigError, SourceError, TokenizerError."""
    kiwi = kiwi_identity(config.kiwi_model)
    tokenizer = load_mlm_tokenizer(config.model, config.mask_token)
    cache, output = places(config)
    columns = dict(config.inputs)
    data = DataConfig(
        dataset=tuple(columns), tokenizer_path=tokenizer.spec.path, eos_token=tokenizer.mask_token, cache_dir=str(cache), shard_bytes=config.shard_bytes,
        text_column=config.text_column, text_template=config.text_template, stall_timeout=config.stall_timeout, rehash=config.rehash,
    )  # fmt: skip
    found = assembly.find(data)
    request = assembly.Request(**vars(found), tokenizer=tokenizer.spec, fields=plan_fields(data, tokenizer.spec, found.inputs, found.entries), key="")
    fields: dict[str, Any] = {
        **request.fields, "config": identity(config), "tokenizer": tokenizer.identity(), "columns": columns,
        "format": {"entity_coref_version": FORMAT_VERSION, "text_version": ToText.version, **kiwi},
    }  # fmt: skip
    fields = json.loads(canonical_json(fields))  # as it will be read back, to be compared
    return Wanted(config, cache, output, tokenizer, request, columns, kiwi, fields, digest_json(fields)[:40])


def places(config: CorefConfig) -> tuple[Path, Path]:
    """(where unfinished work lives, where the corpus is published)."""
    folder = Path(config.output_dir).expanduser().absolute()
    cache = Path(config.cache_dir).expanduser().absolute() if config.cache_dir else folder / "cache_entity_coref"
    return cache, folder / f"entity_coref_v2_{config.seq_len}"


def streams(wanted: Wanted, spool_dir: Path, batch_bytes: int) -> list[Stream]:
    """The inputs, each with the shape of its text. Raises SourceError where none fits."""
    return [_stream(wanted, given, spool_dir, batch_bytes) for given in wanted.request.inputs]


def candidates(wanted: Wanted, stream: Stream, staging: Path) -> Pipeline:
    """The first pipeline: everything that needs Kiwi and the tokenizer, up to candidates that have a place in a row."""
    config = wanted.config
    assert isinstance(stream.to_text, ToText)
    return Pipeline(
        source=stream.source,
        transforms=(
            Documents(to_text=stream.to_text, id_column=config.id_column, batch_rows=min(_DOCUMENTS_PER_BATCH, config.tokenizer_batch_size)),
            CheapRules(
                min_length=config.min_length, max_length=config.max_length, min_sentences=config.min_sentences, min_hangul_ratio=config.min_hangul_ratio,
                max_special_ratio=config.max_special_ratio,
            ),
            coref_candidates.Candidates(
                source=stream.given.name, kiwi_model=config.kiwi_model, tokenizer=wanted.tokenizer,
                quality=KiwiQuality(min_nnp_ratio=config.min_nnp_ratio, max_nnp_ratio=config.max_nnp_ratio, pronoun_filter=config.pronoun_filter),
                repetition=Repetition(
                    tags=config.entity_tags, merge_latin=config.merge_latin, max_mentions=config.max_mentions, min_distance=config.min_distance,
                    max_distance=config.max_distance,
                ),
                placement=Placement(
                    room=wanted.tokenizer.room(config.seq_len), mode=config.mode, skip_widened=config.skip_widened, unknown_id=wanted.tokenizer.unknown_id
                ),
            ),
        ),
        sink=ArrowShards(cache=wanted.cache, staging=staging, schema=coref_candidates.SCHEMA, rows_per_batch=_CANDIDATE_ROWS),
        transform_key=stream.transform_key,
        probe=Ledger(wanted.cache).has_transform(stream.transform_key),
    )  # fmt: skip


def samples(wanted: Wanted, parts: Sequence[Done], selection: Selection, staging: Path) -> Pipeline:
    """The second pipeline: the picked candidates of the finished shards `parts`, about token_chunk_size of them a file."""
    config = wanted.config
    what = {
        "recipe": "entity_coref samples", "version": FORMAT_VERSION, "tokenizer": wanted.tokenizer.identity(), "mode": config.mode,
        "validation_ratio": config.validation_ratio,
    }  # fmt: skip
    return Pipeline(
        source=PickedSource(name="samples", column="candidates", groups=_groups(wanted.cache, parts, selection, config.token_chunk_size)),
        transforms=(coref_samples.Samples(tokenizer=wanted.tokenizer, validation_ratio=config.validation_ratio, labelled=config.mode != "text"),),
        sink=ArrowShards(cache=wanted.cache, staging=staging, schema=with_features(coref_samples.SCHEMA), rows_per_batch=coref_samples.ROWS_PER_BATCH),
        transform_key=digest_json(what)[:40],
    )


def warm(config: CorefConfig) -> tuple[tuple[str, dict[str, Any]], ...]:
    """What workers shall find loaded: Kiwi, so that its 500 MB are there once, and the tokenizer. Raises ConfigError, TokenizerError where there is none."""
    kiwi_identity(config.kiwi_model)
    file = find_tokenizer(config.model)
    backend = {"names": ["tokenizers"], "path": str(file), "digest": digest_of(file), "split_special_tokens": True}
    return (("moai.transforms.korean:warm", {"model": config.kiwi_model}), ("moai.backends:warm", backend))


def _stream(wanted: Wanted, given: Input, spool_dir: Path, batch_bytes: int) -> Stream:
    config, column = wanted.config, wanted.text_columns[given.spec]
    of_preset = given.spec not in config.input
    data = replace(wanted.request.config, text_column=column, text_template=None if of_preset else config.text_template)
    (stream,) = assembly.streams(replace(wanted.request, inputs=(given,), entries=(DatasetEntry(path=given.spec),), config=data), spool_dir, batch_bytes)
    assert isinstance(stream.source, LocalSource)
    shape = stream.to_text.shape
    what = {
        "recipe": "entity_coref candidates", "version": FORMAT_VERSION, "tokenizer": wanted.tokenizer.identity(), "kiwi": dict(wanted.kiwi), "source": given.name,
        "config": {name: value for name, value in identity(config).items() if name not in (*AFTER_CANDIDATES, *WHERE_TO_CUT)},
        "text_version": ToText.version, "kind": stream.given.kind.identity, "shape": [shape.name, list(shape.columns), shape.template],
    }  # fmt: skip
    key = digest_json(what)[:40]
    source = replace(stream.source, transform_key=key)
    if given.kind.columnar and config.id_column in columns_of(given):
        source = replace(source, columns=tuple(dict.fromkeys((*source.columns, config.id_column))))
    return replace(stream, source=source, identity=what, transform_key=key)


def _groups(cache: Path, parts: Sequence[Done], selection: Selection, size: int) -> tuple[tuple[Picks, ...], ...]:
    """Runs of candidate shards that hold `size` samples or a little more."""
    groups: list[list[Picks]] = [[]]
    for done, bits in zip(parts, selection.bits, strict=True):
        if not bits.any():
            continue
        if sum(picks.number for picks in groups[-1]) >= size:
            groups.append([])
        path = Ledger(cache).shard(done.receipt.shard_key)
        groups[-1].append(Picks(str(path), done.receipt.xxh3_128, np.packbits(bits).tobytes(), int(bits.sum())))
    return tuple(tuple(group) for group in groups if group)
