"""From what is wanted to pipelines: files and tokenizer found, keys computed, parts put together. No document is read here but a few to look at."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from moai.backends import FORKABLE, Reference
from moai.engine.executor import Executor, Processes, Serial
from moai.engine.ledger import Ledger
from moai.engine.part import Part, Signal, check_columns, ordered, source_columns
from moai.engine.pipeline import Pipeline, peek
from moai.engine.schema import TRAINED, Column, arrow_schema, row_columns
from moai.errors import ConfigError, SourceError
from moai.files import digest_json
from moai.recipes import identity
from moai.recipes.choosing import SAMPLE_CHARS, Chosen
from moai.recipes.options import DataConfig
from moai.recipes.prepared import is_prepared
from moai.resources import Plan
from moai.sinks.arrow import ArrowShards
from moai.sources.discover import Input, discover
from moai.sources.local import LocalSource
from moai.sources.schema import columns_of
from moai.tokenizer import TokenizerSpec, digest_of, find_tokenizer, load_tokenizer
from moai.transforms.chat import EncodeExamples, ToExamples
from moai.transforms.conversation import choose_chat_shape
from moai.transforms.filters import Length, Split
from moai.transforms.pack import Pack
from moai.transforms.template import RENDERER, ChatTemplate, find_template
from moai.transforms.text import TextShape, ToText, choose_shape
from moai.transforms.tokenize import Tokenize

logger = logging.getLogger(__name__)

_WORKER_MODULES = (
    "moai.engine.executor", "moai.sources.local", "moai.transforms.text", "moai.transforms.chat", "moai.transforms.filters", "moai.transforms.tokenize", "moai.transforms.pack", "moai.sinks.arrow",
    "moai.recipes.choosing",
)  # fmt: skip
"""What a worker needs, imported once where workers are forked from."""
_HANGS_BEFORE_STALL = 4
"""A worker that hangs is stopped, its shard tried again and the document found, all before the waiting ranks lose patience."""
_SAMPLE_FILES = 3
_MADE = ("text", "messages", "tokens", "examples", "input_ids", "seq_lengths", TRAINED.name)
"""Columns that the recipe makes."""
_TYPES = {"bool": ("bool",), "int64": ("int", "uint8", "uint16", "uint32"), "float64": ("float", "double", "halffloat")}
"""Types of values beside a text, by how the names of the sources' types begin; all else travels as text."""
_SAMPLE_TEXT_CHARS = 2000


@dataclass(frozen=True)
class Found:
    """Where everything is: what can be known in a millisecond."""

    config: DataConfig
    cache: Path
    inputs: tuple[Input, ...]
    tokenizer_file: Path
    stamps_prove: bool
    """No file was so young when it was looked at that a later write could leave its stamp as it is."""

    @property
    def nominal_bytes(self) -> int:
        return sum(file.stamp.size for given in self.inputs for file in given.files)

    @property
    def text_bytes(self) -> int:
        """About how much there is once decompressed."""
        return sum(file.stamp.size * (4 if file.compression else 1) for given in self.inputs for file in given.files)


@dataclass(frozen=True)
class Request(Found):
    """What is wanted, resolved as far as it goes without reading data: the same for `prepare` and `plan`."""

    tokenizer: TokenizerSpec
    fields: Mapping[str, Any]
    key: str
    template: ChatTemplate | None = None
    """Where records are conversations."""


@dataclass(frozen=True)
class Stream:
    """One input on its way: its source, the parts that its records pass, and what names its shards."""

    given: Input
    source: LocalSource
    to_text: ToText | ToExamples
    inner: tuple[Part, ...]
    """Maps, filters and signals, in the order they run."""
    encode: Tokenize | EncodeExamples
    pack: Pack
    identity: Mapping[str, Any]
    transform_key: str

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
    for spec in config.dataset:
        if is_prepared(Path(spec).expanduser()):
            raise ConfigError(f"--dataset {spec}: is a prepared directory, whose rows are ready; train on it with --prepared {spec}")
    tokenizer_file = find_tokenizer(config.tokenizer_path)
    inputs = tuple(_distinct(given for index, spec in enumerate(config.dataset) for given in discover(spec, config.dataset_config if index == 0 else None)))
    cache = Path(config.cache_dir).expanduser().absolute()
    _keep_apart(cache, config.dataset)
    return Found(config, cache, inputs, tokenizer_file, not any(file.stamp.is_racy() for given in inputs for file in given.files))


def complete(found: Found) -> Request:
    """Load the tokenizer, which takes a tenth of a second or more, and find its chat template. Raises TokenizerError."""
    config = found.config
    tokenizer = load_tokenizer(str(found.tokenizer_file), eos_token=config.eos_token, need_bos=config.add_bos)
    template = None
    if config.data_format == "chat":
        template = find_template(found.tokenizer_file, file=config.chat_template, eos_token=tokenizer.eos_token, date=config.template_date)
    fields = identity.plan_fields(config, tokenizer, found.inputs, template)
    return Request(**vars(found), tokenizer=tokenizer, fields=fields, key=identity.plan_key(fields), template=template)


def request(config: DataConfig) -> Request:
    """Find files and load the tokenizer; read no data."""
    return complete(find(config))


def streams(wanted: Request, spool_dir: Path, batch_bytes: int) -> list[Stream]:
    """The inputs, each with its parts. Raises SourceError where no shape of text fits, ConfigError where parts do not fit."""
    sources = _sources(wanted, spool_dir, batch_bytes)
    carried = _carried(wanted.config, [columns for _, _, _, columns in sources])
    return [
        _compose(wanted, given, replace(source, columns=tuple(dict.fromkeys((*shape.columns, *(c.name for c in carried if c.name in columns))))) if shape else source, shape, carried)
        for given, source, shape, columns in sources
    ]  # fmt: skip


def pipeline(wanted: Request, stream: Stream, chosen: Chosen, staging: Path) -> Pipeline:
    return Pipeline(
        source=stream.source,
        transforms=_transforms(stream, chosen),
        sink=ArrowShards(
            cache=wanted.cache, staging=staging, schema=arrow_schema(stream.columns), writer_batch_size=wanted.config.writer_batch_size, made_by=chosen.backend.made_by()
        ),
        transform_key=stream.transform_key,
        measured=stream.measured,
        probe=Ledger(wanted.cache).has_transform(stream.transform_key),
    )  # fmt: skip


def _transforms(stream: Stream, chosen: Chosen) -> tuple[Part, ...]:
    """The parts with the tokenizer backend that was chosen. Where nothing but the default Length looks at the texts, the tokenizer takes them
    straight from the records: the same documents, and no column is made of them."""
    if isinstance(stream.encode, EncodeExamples):
        return (stream.to_text, *stream.inner, replace(stream.encode, reference=chosen.reference), stream.pack)
    tokenize = replace(stream.encode, backend=chosen.backend, reference=chosen.reference)
    if len(stream.inner) == 1 and isinstance(stream.inner[0], Length) and stream.inner[0].drops_only_blank and isinstance(stream.to_text, ToText):
        return (replace(tokenize, to_text=stream.to_text), stream.pack)
    return (stream.to_text, *stream.inner, tokenize, stream.pack)


def executor_of(found: Found, planned: Plan) -> Executor:
    """This process, or workers that find loaded what they need."""
    if planned.num_proc.value == 0:
        return Serial()
    arguments = {
        "path": str(found.tokenizer_file),
        "digest": digest_of(found.tokenizer_file),
        "split_special_tokens": found.config.split_special_tokens,
    }
    return Processes(
        num_proc=planned.num_proc.value, threads=planned.threads.value, stall_seconds=found.config.stall_timeout / _HANGS_BEFORE_STALL,
        modules=(*_WORKER_MODULES, *((RENDERER,) if found.config.data_format == "chat" else ())), warm=tuple(("moai.backends:warm", {"names": [name], **arguments}) for name in FORKABLE),
    )  # fmt: skip


def sample(streams: Sequence[Stream]) -> list[str]:
    """Beginnings of documents of every input, SAMPLE_CHARS in all at most; of conversations none, which only the reference encodes."""
    streams = [stream for stream in streams if isinstance(stream.to_text, ToText)]
    if not streams:
        return []
    texts: list[str] = []
    looks = [(stream, batches) for stream in streams for batches in stream.source.looks(_SAMPLE_FILES)]
    most = max(1, SAMPLE_CHARS // _SAMPLE_TEXT_CHARS // len(looks))
    for stream, batches in looks[: SAMPLE_CHARS // _SAMPLE_TEXT_CHARS]:
        batch = peek(batches, (stream.to_text,))
        found = batch["text"].to_pylist() if batch else []
        texts += [text[:_SAMPLE_TEXT_CHARS] for text in found[:: -(-len(found) // most)]] if found else []
    return texts


def _compose(wanted: Request, given: Input, source: LocalSource, shape: TextShape | None, carried: Sequence[Column]) -> Stream:
    """The parts of one input, and the keys that follow from them."""
    config = wanted.config
    reference = Reference(spec=wanted.tokenizer, split_special_tokens=config.split_special_tokens)
    inner = inner_parts(config)
    shown = frozenset(name for part in inner for name in part.needs)
    reading: dict[str, Any] = {"columns": tuple(carried), "max_doc_bytes": config.max_doc_bytes}
    to_text: ToText | ToExamples
    encode: Tokenize | EncodeExamples
    if wanted.template:
        assert shape
        to_text = ToExamples(
            shape=shape, template=wanted.template, reference=reference, train_on=config.train_on, shown=shown & {"text", "messages"}, **reading
        )
        encode = EncodeExamples(reference=reference, seq_len=config.seq_len, truncate=config.long_examples == "truncate")
    else:
        to_text = ToText(shape=shape or TextShape(name="plain text"), plain=shape is None, **reading)
        encode = Tokenize(backend=reference, reference=reference)
    beside = [column for column in carried if column.name in config.carry_columns]
    beside += [column for part in inner for column in part.adds if column.per == "piece"]
    pack = Pack(seq_len=config.seq_len, strategy=config.packing, dtype=np.dtype(wanted.tokenizer.dtype).name, split_long=config.long_documents == "split",
                beside=(*((TRAINED,) if wanted.template else ()), *beside))  # fmt: skip
    columns = row_columns(pack.dtype, pack.beside)
    what = identity.transform_identity(given, config, (to_text, *inner, encode, pack), columns)
    key = digest_json(what)[:40]
    return Stream(given, replace(source, transform_key=key), to_text, inner, encode, pack, what, key)


def inner_parts(config: DataConfig) -> tuple[Part, ...]:
    """Maps, then the held-out split, the length and the filters, then signals. Raises ConfigError for parts that do not fit one another."""
    maps, filters, signals = ordered(config.transforms)
    split = [Split(ratio=config.eval_ratio, held_out=config.held_out)] if config.eval_ratio else []
    length = Length(min_chars=config.min_chars, max_chars=config.max_chars)
    # The template writes something around an empty conversation too, so that by default none goes for its length.
    lengths = [] if config.data_format == "chat" and length.drops_only_blank else [length]
    parts = (*maps, *split, *lengths, *filters, *signals)
    check_columns(parts, given=(*_MADE, *config.carry_columns))
    return parts


def _sources(wanted: Request, spool_dir: Path, batch_bytes: int) -> list[tuple[Input, LocalSource, TextShape | None, dict[str, str]]]:
    """Every input with the shape of its text and the types of its columns. Raises SourceError where no shape fits."""
    config = wanted.config
    found: list[tuple[Input, LocalSource, TextShape | None, dict[str, str]]] = []
    for given in wanted.inputs:
        source = LocalSource(
            name=given.name, kind=given.kind, files=given.files, shard_bytes=config.shard_bytes, cache=wanted.cache, spool_dir=spool_dir, txt_document=config.txt_document,
            max_record_bytes=config.max_doc_bytes, batch_rows=config.dataset_batch_size, batch_bytes=batch_bytes, trust_stamps=not config.rehash,
        )  # fmt: skip
        if given.kind == "txt":
            if wanted.template:
                raise SourceError(
                    f"{given.spec}: is plain text, which holds no conversations; data_format chat (--mode sft) reads JSON lines, JSON, Parquet and Arrow"
                )
            found.append((given, source, None, {}))
            continue
        columns = columns_of(source, given)
        shape = (
            choose_chat_shape(columns, source=given.spec, text_column=config.text_column)
            if wanted.template
            else choose_shape(columns, source=given.spec, text_column=config.text_column, template=config.text_template)
        )
        found.append((given, source, shape, columns))
    return found


def _carried(config: DataConfig, sources: Sequence[Mapping[str, str]]) -> tuple[Column, ...]:
    """The columns of the sources that parts look at or that travel with the rows, in one type for all sources. Raises ConfigError."""
    parts = inner_parts(config)
    names = dict.fromkeys((*config.carry_columns, *source_columns(parts, given=_MADE)))
    carried = []
    for name in names:
        types = [columns[name] for columns in sources if name in columns]
        if not types and name in config.carry_columns:
            known = ", ".join(dict.fromkeys(column for columns in sources for column in columns)) or "none"
            raise ConfigError(f"carry_columns: {name!r} is a column of no source (found: {known})")
        if not types:
            logger.warning(
                "the column %r, which %s looks at, is in no source: it is null everywhere", name, next(part.name for part in parts if name in part.needs)
            )
        carried.append(Column(name, _one_type(types), per="piece"))
    return tuple(carried)


def _one_type(names: Sequence[str]) -> str:
    """The type that holds the values of all sources: numbers where they all are, else text."""
    kinds = {next((kind for kind, prefixes in _TYPES.items() if name.startswith(prefixes)), "string") for name in names if name not in ("NoneType", "null")}
    if kinds == {"int64", "float64"}:
        return "float64"
    return kinds.pop() if len(kinds) == 1 else "string"


def _keep_apart(cache: Path, dataset: Sequence[str]) -> None:
    """A cache inside the data would be data of the next run."""
    for spec in dataset:
        folder = Path(spec).expanduser()
        if not folder.is_dir() or not cache.resolve().is_relative_to(folder.resolve()):
            continue
        if not any(part.startswith((".", "__")) for part in cache.resolve().relative_to(folder.resolve()).parts):  # folders that are passed over
            raise ConfigError(f"--cache_dir {cache} lies inside the data {spec} and would be read as data by the next run; name another")


def _distinct(inputs: Iterator[Input]) -> Iterator[Input]:
    """Names of sources are names of shards: a second `train` becomes `train-2`."""
    seen: set[str] = set()
    for given in inputs:
        name = next(name for number in itertools.count(1) if (name := given.name if number == 1 else f"{given.name}-{number}") not in seen)
        seen.add(name)
        yield replace(given, name=name)
