"""From what is wanted to pipelines: files and tokenizer found, keys computed, parts put together. No document is read
here but a few to look at.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa

from moai.cache.ledger import Ledger
from moai.cache.shards import ArrowShards
from moai.core.distributed import LAUNCHES, Ranks, Report, cache_scope
from moai.core.errors import ConfigError, SourceError
from moai.core.files import digest_json
from moai.core.resources import Plan
from moai.engine.executor import Cluster, Executor, Joining, make_executor
from moai.engine.part import EXAMPLES, Part, Signal, check_columns, ordered, source_columns
from moai.engine.pipeline import Pipeline, peek
from moai.engine.schema import TRAINED, Column, Columns, arrow_schema, row_columns
from moai.prepared.manifest import is_prepared
from moai.pretraining import keys as identity
from moai.pretraining.dataset import DatasetEntry, entries_of
from moai.pretraining.options import DataConfig
from moai.pretraining.tokenizer_backend import SAMPLE_CHARS, Chosen
from moai.quality.personal import MaskPersonalData
from moai.quality.verdicts import Judged, JudgedSource
from moai.sources.discover import Input, discover, named_as_splits
from moai.sources.inputs import distinct, keep_apart, open_input, stamps_prove
from moai.sources.local import LocalSource
from moai.sources.mistaken import without_mistaken
from moai.sources.placed import OfSource, Placed
from moai.tokenizers.backends import BACKENDS, Reference
from moai.tokenizers.load import TokenizerSpec, digest_of, find_tokenizer, load_tokenizer
from moai.transforms.chat import ToExamples
from moai.transforms.conversation import choose_chat_shape
from moai.transforms.encode_examples import EncodeExamples
from moai.transforms.filters import Length, Sample, Split
from moai.transforms.pack import Pack
from moai.transforms.shapes import TextShape, choose_shape
from moai.transforms.template import RENDERER, ChatTemplate, find_template
from moai.transforms.text import ToText
from moai.transforms.tokenize import Tokenize

logger = logging.getLogger(__name__)

_WORKER_MODULES = (
    "moai.engine.executor",
    "moai.sources.local",
    "moai.transforms.text",
    "moai.transforms.chat",
    "moai.transforms.filters",
    "moai.transforms.tokenize",
    "moai.transforms.pack",
    "moai.cache.shards",
    "moai.pretraining.tokenizer_backend",
)
"""What a worker needs, imported once where workers are forked from."""
_HANGS_BEFORE_STALL = 4
"""A worker that hangs is stopped, its shard tried again and the document found, all before the waiting ranks lose
patience.
"""
_SAMPLE_FILES = 3
_MADE = ("text", "messages", "tokens", "examples", "input_ids", "seq_lengths", TRAINED.name)
"""Columns that the recipe makes."""
_OF_MODELS = (
    "labels",
    "position_ids",
    "attention_mask",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
)
"""What else a model is given in training, so that nothing beside the rows can be called so."""
_TYPES = {"bool": ("bool",), "int64": ("int", "uint8", "uint16", "uint32"), "float64": ("float", "double", "halffloat")}
"""Types of values beside a text, by how the names of the sources' types begin; all else travels as text."""
_UNCARRIED = ("union<", "encrypted", "columns of one name")
"""In the names of types that have no value of one type."""
_SAMPLE_TEXT_CHARS = 2000


@dataclass(frozen=True)
class Found:
    """Where everything is: what can be known in a millisecond."""

    config: DataConfig
    cache: Path
    inputs: tuple[Input, ...]
    entries: tuple[DatasetEntry, ...]
    """Of --dataset, one for each input."""
    tokenizer_file: Path
    stamps_prove: bool
    """No file was so young when it was looked at that a later write could leave its stamp as it is."""

    @property
    def nominal_bytes(self) -> int:
        return sum(given.nominal_bytes for given in self.inputs)

    @property
    def text_bytes(self) -> int:
        """About how much there is once decompressed."""
        return sum(given.text_bytes for given in self.inputs)


@dataclass(frozen=True)
class Request(Found):
    """What is wanted, resolved as far as it goes without reading data: the same for `prepare` and `plan`."""

    tokenizer: TokenizerSpec
    fields: Mapping[str, Any]
    key: str
    template: ChatTemplate | None = None
    """Where records are conversations."""


@dataclass(frozen=True)
class Reading:
    """One input before its parts are known: `config` holds its own settings, `columns` the names and types of what it
    has.
    """

    given: Input
    entry: DatasetEntry
    config: DataConfig
    source: LocalSource | Placed
    shape: TextShape | None
    columns: Mapping[str, str]


@dataclass(frozen=True)
class Stream:
    """One input on its way: its source, the parts that its records pass, and what names its shards."""

    reading: Reading
    source: LocalSource | Placed | JudgedSource
    to_text: ToText | ToExamples
    inner: tuple[Part, ...]
    """Maps, filters and signals, in the order they run."""
    encode: Tokenize | EncodeExamples
    pack: Pack
    identity: Mapping[str, Any]
    transform_key: str

    @property
    def given(self) -> Input:
        return self.reading.given

    @property
    def not_read(self) -> tuple[str, ...]:
        """Columns that the source has and nothing looks at."""
        read = {
            *(self.reading.shape.columns if self.reading.shape else ()),
            *(column.name for column in self.to_text.columns),
        }
        return tuple(name for name in self.reading.columns if name not in read)

    @property
    def columns(self) -> tuple[Column, ...]:
        """Of the rows."""
        return row_columns(self.pack.dtype, self.pack.beside)

    @property
    def measured(self) -> tuple[Column, ...]:
        """Columns of Signals, which stand in the documents file."""
        return tuple(column for part in self.inner if isinstance(part, Signal) for column in part.adds)


def find(config: DataConfig) -> Found:
    """Find files and tokenizer. Raises SourceError, TokenizerError, ConfigError."""
    entries = entries_of(config.dataset)
    for entry in entries:
        if entry.path and is_prepared(Path(entry.path).expanduser()):
            raise ConfigError(
                f"--dataset {entry}: is a prepared directory, whose rows are ready; train on it with --prepared {entry}"
            )
    tokenizer_file = find_tokenizer(config.tokenizer_path)
    found = [
        (given, entry)
        for index, entry in enumerate(entries)
        for given in _inputs_of(entry, config.dataset_config if index == 0 else None)
    ]
    if warning := named_as_splits([entry.path for entry in entries]):
        logger.warning("--dataset: %s", warning)
    inputs, own = distinct(given for given, _ in found), tuple(entry for _, entry in found)
    cache = Path(config.cache_dir).expanduser().absolute()
    keep_apart(cache, [entry.path for entry in entries if entry.path])
    # What a source that is not files holds is known only from reading it.
    proven = stamps_prove(inputs) and not any(entry.source for entry in entries)
    return Found(config, cache, inputs, own, tokenizer_file, proven)


def _inputs_of(entry: DatasetEntry, dataset_config: str | None) -> list[Input]:
    """The inputs of one entry, under its own name where it has one."""
    if entry.source:
        name = entry.name or str(entry.source.name)
        return [Input(str(entry), name, OfSource(source=entry.source), (), {})]
    found = discover(entry.spec, dataset_config)
    return (
        found
        if not entry.name
        else [
            replace(given, name=entry.name if len(found) == 1 else f"{entry.name}.{given.kind.name}") for given in found
        ]
    )


def complete(found: Found) -> Request:
    """Load the tokenizer, which takes a tenth of a second or more, and find its chat template. Raises
    TokenizerError.
    """
    config = found.config
    tokenizer = load_tokenizer(str(found.tokenizer_file), eos_token=config.eos_token, need_bos=config.add_bos)
    template = None
    if config.data_format == "chat":
        template = find_template(
            found.tokenizer_file, file=config.chat_template, eos_token=tokenizer.eos_token, date=config.template_date
        )
    fields = identity.plan_fields(config, tokenizer, found.inputs, found.entries, template)
    return Request(**vars(found), tokenizer=tokenizer, fields=fields, key=identity.plan_key(fields), template=template)


def request(config: DataConfig) -> Request:
    """Find files and load the tokenizer; read no data."""
    return complete(find(config))


def streams(wanted: Request, spool_dir: Path, batch_bytes: int) -> list[Stream]:
    """The inputs, each with its parts. Raises SourceError where no shape of text fits, ConfigError where parts do not
    fit.
    """
    inputs = sound_inputs(wanted)
    readings = [_reading(wanted, given, entry, spool_dir, batch_bytes) for given, entry in zip(inputs, wanted.entries)]
    carried = _carried(wanted.config, readings)
    composed = [_compose(wanted, reading, carried) for reading in readings]
    for stream in composed:
        if stream.columns != composed[0].columns:
            one, other = (", ".join(column.name for column in each.columns) for each in (composed[0], stream))
            raise ConfigError(
                f"the rows of {composed[0].given.name} have the columns {one}, those of {stream.given.name} {other}: a "
                f"part whose column travels "
                'with the rows (per="piece") belongs to the transforms of all sources'
            )
    return composed


def sound_inputs(wanted: Request) -> tuple[Input, ...]:
    """The inputs without files that are something else than they are called. Raises TooManyBadRecords."""
    config = wanted.config
    allowed = 1.0 if config.max_bad_ratio == 1 else config.max_bad_files
    return without_mistaken(wanted.inputs, allowed, flag="--max_bad_files")


def pipeline(wanted: Request, stream: Stream, chosen: Chosen, staging: Path) -> Pipeline:
    return Pipeline(
        source=stream.source,
        transforms=_transforms(stream, chosen),
        sink=ArrowShards(
            cache=wanted.cache,
            staging=staging,
            schema=arrow_schema(stream.columns),
            writer_batch_size=wanted.config.writer_batch_size,
            made_by=chosen.backend.made_by(),
        ),
        transform_key=stream.transform_key,
        measured=stream.measured,
        proof=chosen.proof,
        probe=Ledger(wanted.cache).has_transform(stream.transform_key),
    )


def _transforms(stream: Stream, chosen: Chosen) -> tuple[Part, ...]:
    """The parts with the tokenizer backend that was chosen. Where nothing but the default Length looks at the texts,
    the tokenizer takes them straight from the records: the same documents, and no column is made of them."""
    judged = (Judged(),) if isinstance(stream.source, JudgedSource) else ()
    tokenize = replace(stream.encode, backend=chosen.backend, reference=chosen.reference)
    if (
        len(stream.inner) == 1
        and not judged
        and isinstance(stream.inner[0], Length)
        and stream.inner[0].drops_only_blank
        and isinstance(stream.to_text, ToText)
        and isinstance(tokenize, Tokenize)
    ):
        return (replace(tokenize, to_text=stream.to_text), stream.pack)
    return (stream.to_text, *judged, *stream.inner, tokenize, stream.pack)


def cluster_of(
    config: DataConfig, here: Ranks, environ: Mapping[str, str], report: Report = lambda _: None
) -> contextlib.AbstractContextManager[Cluster | None]:
    """Of Ray, where that is wished: nothing is started before there is work, and it ends with the context."""
    if config.executor != "ray":
        return contextlib.nullcontext()
    shared = Path(config.cache_dir).expanduser().absolute() / LAUNCHES
    return Cluster(here=here, environ=environ, report=report, shared=shared)


@contextlib.contextmanager
def joining(
    config: DataConfig, cache: Path, here: Ranks, environ: Mapping[str, str]
) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """What a waiting rank does with what it hears: one of every node joins the private Ray of its launch. Raises
    ConfigError where the nodes share no cache.
    """
    if config.executor != "ray" or here.nodes == 1:
        yield lambda progress: None
        return
    if cache_scope(cache, config.cache_scope) != "shared":
        raise ConfigError(
            f"--executor ray on {here.nodes} nodes: {cache} is each node's own; name a --cache_dir that all of them "
            f"share, and say --cache_scope shared where its file system does not tell"
        )
    with Joining(environ) as own:
        yield own.heed if here.local_rank == 0 else lambda progress: None


def executor_of(
    found: Found, planned: Plan, modules: Sequence[str] = (), cluster: Cluster | None = None, **how: Any
) -> Executor:
    """This process, workers that find loaded what they need, or the cluster; `modules` are loaded too, `how` is further
    settings of make_executor.
    """
    assert cluster or found.config.executor != "ray"
    arguments = {
        "path": str(found.tokenizer_file),
        "digest": digest_of(found.tokenizer_file),
        "split_special_tokens": found.config.split_special_tokens,
    }
    return make_executor(
        planned.num_proc.value,
        cluster=cluster,
        threads=planned.threads.value,
        stall_seconds=found.config.stall_timeout / _HANGS_BEFORE_STALL,
        modules=(*_WORKER_MODULES, *((RENDERER,) if found.config.data_format == "chat" else ()), *modules),
        warm=tuple(("moai.tokenizers.backends:warm", {"names": [name], **arguments}) for name in BACKENDS),
        **how,
    )


def sample(streams: Sequence[Stream]) -> list[str]:
    """Beginnings of documents of every input, SAMPLE_CHARS in all at most; of conversations as the template writes
    them.
    """
    if not streams:
        return []
    texts: list[str] = []
    looks = [(stream, batches) for stream in streams for batches in _looks(stream)]
    most = max(1, SAMPLE_CHARS // _SAMPLE_TEXT_CHARS // len(looks))
    for stream, batches in looks[: SAMPLE_CHARS // _SAMPLE_TEXT_CHARS]:
        batch = peek(batches, (stream.to_text,))
        found = _texts(batch) if batch else []
        texts += [text[:_SAMPLE_TEXT_CHARS] for text in found[:: -(-len(found) // most)]] if found else []
    return texts


def _texts(batch: pa.RecordBatch) -> list[str]:
    if EXAMPLES in batch.schema.names:
        return [text for record in batch[EXAMPLES].to_pylist() for text, _ in orjson.loads(record) or ()]
    return list(batch["text"].to_pylist())


def _looks(stream: Stream) -> Iterator[Iterator[pa.RecordBatch]]:
    assert not isinstance(stream.source, JudgedSource), "a look is for what is not measured yet"
    return stream.source.looks(_SAMPLE_FILES)


def _compose(wanted: Request, reading: Reading, carried: Sequence[Column]) -> Stream:
    """The parts of one input, and the keys that follow from them."""
    config, shape = reading.config, reading.shape
    reference = Reference(spec=wanted.tokenizer, split_special_tokens=config.split_special_tokens)
    inner = inner_parts(config)
    shown = frozenset(name for part in inner for name in part.needs)
    looked_at = {*config.carry_columns, *source_columns(inner, given=_MADE)}
    columns = tuple(column for column in carried if column.name in looked_at)
    how: dict[str, Any] = {"columns": columns, "max_doc_bytes": config.max_doc_bytes}
    to_text: ToText | ToExamples
    encode: Tokenize | EncodeExamples
    if wanted.template:
        assert shape
        to_text = ToExamples(
            shape=shape,
            template=wanted.template,
            reference=reference,
            train_on=config.train_on,
            shown=shown & {"text", "messages"},
            **how,
        )
        encode = EncodeExamples(
            backend=reference, reference=reference, seq_len=config.seq_len, truncate=config.long_examples == "truncate"
        )
    else:
        to_text = ToText(shape=shape or TextShape(name="plain text"), plain=shape is None, **how)
        encode = Tokenize(backend=reference, reference=reference)
    beside = [column for column in carried if column.name in config.carry_columns]
    beside += [column for part in inner for column in part.adds if column.per == "piece"]
    pack = Pack(
        seq_len=config.seq_len,
        strategy=config.packing,
        dtype=np.dtype(wanted.tokenizer.dtype).name,
        split_long=config.long_documents == "split",
        beside=(*((TRAINED,) if wanted.template else ()), *beside),
    )
    what = identity.transform_identity(
        reading.given, (to_text, *inner, encode, pack), row_columns(pack.dtype, pack.beside)
    )
    key = digest_json(what)[:40]
    source = reading.source
    if isinstance(source, LocalSource):
        names = dict.fromkeys(
            (*(shape.columns if shape else ()), *(column.name for column in columns if column.name in reading.columns))
        )
        source = replace(source, columns=tuple(names), transform_keys=(key,))
    return Stream(reading, source, to_text, inner, encode, pack, what, key)


def inner_parts(config: DataConfig) -> tuple[Part, ...]:
    """Maps, then the held-out split, the length and the filters, then signals. Raises ConfigError for parts that do not
    fit one another.
    """
    maps, filters, signals = ordered(config.transforms)
    split = [Split(ratio=config.eval_ratio, held_out=config.held_out)] if config.eval_ratio else []
    sample = [Sample(share=config.sample)] if config.sample < 1 else []
    length = Length(min_chars=config.min_chars, max_chars=config.max_chars)
    # The template writes something around an empty conversation too, so that by default none goes for its length.
    lengths = [] if config.data_format == "chat" and length.drops_only_blank else [length]
    mask = [MaskPersonalData()] if config.pii == "mask" else []
    parts = (*maps, *mask, *sample, *split, *lengths, *filters, *signals)
    shown = ("text", "messages") if config.data_format == "chat" else ("text",)
    check_columns(parts, made=_MADE, shown=shown, kept_free=_OF_MODELS, carried=config.carry_columns)
    return parts


def _reading(wanted: Request, given: Input, entry: DatasetEntry, spool_dir: Path, batch_bytes: int) -> Reading:
    """One input with the shape of its text and the types of its columns. Raises SourceError where no shape fits."""
    config = entry.applied_to(wanted.config)
    source: LocalSource | Placed
    columns: Mapping[str, str]
    if entry.source:
        source = Placed(source=entry.source, name=given.name)
        columns = source.columns_of()
    else:
        given = replace(given, kind=given.kind.having(txt_document=config.txt_document, encoding=entry.encoding))
        if given.kind.plain and wanted.template:
            raise SourceError(
                f"{given.spec}: is plain text, which holds no conversations; data_format chat (--mode sft) reads JSON "
                f"lines, JSON, CSV, Parquet and Arrow"
            )
        source, columns = open_input(
            given,
            cache=wanted.cache,
            spool_dir=spool_dir,
            shard_bytes=config.shard_bytes,
            batch_bytes=batch_bytes,
            batch_rows=config.dataset_batch_size,
            max_record_bytes=config.max_doc_bytes,
            trust_stamps=not config.rehash,
        )
    shape = (
        choose_chat_shape(columns, source=given.place, text_column=config.text_column)
        if wanted.template
        else None
        if given.kind.plain
        else choose_shape(columns, source=given.place, text_column=config.text_column, template=config.text_template)
    )
    return Reading(given, entry, config, source, shape, columns)


def _carried(config: DataConfig, readings: Sequence[Reading]) -> tuple[Column, ...]:
    """The columns of the sources that parts look at or that travel with the rows, in one type for all sources. Raises
    ConfigError.
    """
    looked_at = {
        name: part
        for reading in readings
        for part in inner_parts(reading.config)
        for name in source_columns([part], given=_MADE)
    }
    added = {column.name for reading in readings for part in inner_parts(reading.config) for column in part.adds}
    carried = []
    for name in dict.fromkeys((*config.carry_columns, *(name for name in looked_at if name not in added))):
        types = [reading.columns[name] for reading in readings if name in reading.columns]
        for reading in readings:
            for path, own in reading.columns.of_files if isinstance(reading.columns, Columns) else ():
                if any(word in own.get(name, "") for word in _UNCARRIED):
                    raise SourceError(f"{path}: its column {name!r} is {own[name][:60]}, which cannot be carried along")
        if not types and name in config.carry_columns:
            known = ", ".join(dict.fromkeys(column for reading in readings for column in reading.columns)) or "none"
            raise ConfigError(f"carry_columns: {name!r} is a column of no source (found: {known})")
        if not types:
            logger.warning(
                "the column %r, which %s looks at, is in no source: it is null everywhere", name, looked_at[name].name
            )
        carried.append(Column(name, _one_type(types), per="piece"))
    return tuple(carried)


def _one_type(names: Sequence[str]) -> str:
    """The type that holds the values of all sources: numbers where they all are, else text."""
    kinds = {
        next((kind for kind, prefixes in _TYPES.items() if name.startswith(prefixes)), "string")
        for name in names
        if name not in ("NoneType", "null")
    }
    if kinds == {"int64", "float64"}:
        return "float64"
    return kinds.pop() if len(kinds) == 1 else "string"
