"""From what is wanted to pipelines: files and tokenizer found, keys computed, parts put together. No document is read here but a few to look at."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from moai.backends import FORKABLE
from moai.engine.executor import Executor, Processes, Serial
from moai.engine.ledger import Ledger
from moai.engine.pipeline import Pipeline, Transform, peek
from moai.errors import ConfigError, SourceError
from moai.files import digest_json
from moai.recipes import identity
from moai.recipes.choosing import SAMPLE_CHARS, Chosen
from moai.recipes.options import DataConfig
from moai.resources import Plan
from moai.sinks.arrow import ArrowShards
from moai.sources.discover import Input, discover
from moai.sources.local import LocalSource
from moai.sources.schema import columns_of
from moai.tokenizer import TokenizerSpec, digest_of, find_tokenizer, load_tokenizer
from moai.transforms.chat import Chats
from moai.transforms.conversation import choose_chat_shape
from moai.transforms.filters import Length, Split
from moai.transforms.pack import Pack
from moai.transforms.template import RENDERER, ChatTemplate, find_template
from moai.transforms.text import TextShape, ToText, choose_shape
from moai.transforms.tokenize import Tokenize

_WORKER_MODULES = (
    "moai.engine.executor", "moai.sources.local", "moai.transforms.text", "moai.transforms.chat", "moai.transforms.filters", "moai.transforms.tokenize", "moai.transforms.pack", "moai.sinks.arrow",
    "moai.recipes.choosing",
)  # fmt: skip
"""What a worker needs, imported once where workers are forked from."""
_HANGS_BEFORE_STALL = 4
"""A worker that hangs is stopped, its shard tried again and the document found, all before the waiting ranks lose patience."""
_SAMPLE_FILES = 3
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
    """One input on its way: its source, how its records make text, and what names its shards."""

    given: Input
    source: LocalSource
    to_text: ToText
    identity: Mapping[str, Any]
    transform_key: str
    is_chat: bool = False


def find(config: DataConfig) -> Found:
    """Find files and tokenizer. Raises SourceError, TokenizerError, ConfigError."""
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
    """The inputs, each with the shape of its text. Raises SourceError where none fits."""
    return [_stream(wanted, given, spool_dir, batch_bytes) for given in wanted.inputs]


def pipeline(wanted: Request, stream: Stream, chosen: Chosen, staging: Path) -> Pipeline:
    config, chat = wanted.config, wanted.template is not None
    dtype = np.dtype(wanted.tokenizer.dtype).name
    return Pipeline(
        source=stream.source,
        transforms=(
            *_to_tokens(wanted, stream, chosen),
            Pack(seq_len=config.seq_len, strategy=config.packing, dtype=dtype, split_long=config.long_documents == "split", chat=chat),
        ),
        sink=ArrowShards(
            cache=wanted.cache, staging=staging, dtype=dtype, chat=chat, writer_batch_size=config.writer_batch_size, made_by=chosen.backend.made_by()
        ),
        transform_key=stream.transform_key,
        probe=Ledger(wanted.cache).has_transform(stream.transform_key),
    )


def _to_tokens(wanted: Request, stream: Stream, chosen: Chosen) -> tuple[Transform, ...]:
    config = wanted.config
    split = (Split(ratio=config.eval_ratio, held_out=config.held_out),) if config.eval_ratio else ()
    if wanted.template:
        return (Chats(shape=stream.to_text.shape, template=wanted.template, reference=chosen.reference, seq_len=config.seq_len, truncate=config.long_examples == "truncate",
                      train_on=config.train_on, split=split[0] if split else None, max_doc_bytes=config.max_doc_bytes),)  # fmt: skip
    length = Length(min_chars=config.min_chars, max_chars=config.max_chars)
    at_once = length.drops_only_blank and not config.eval_ratio
    tokenize = Tokenize(backend=chosen.backend, reference=chosen.reference, to_text=stream.to_text if at_once else None)
    return (tokenize,) if at_once else (stream.to_text, *split, length, tokenize)


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
    streams = [stream for stream in streams if not stream.is_chat]
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


def _stream(wanted: Request, given: Input, spool_dir: Path, batch_bytes: int) -> Stream:
    config = wanted.config
    given = replace(given, kind=given.kind.having(txt_document=config.txt_document))
    source = LocalSource(
        name=given.name, kind=given.kind, files=given.files, shard_bytes=config.shard_bytes, cache=wanted.cache, spool_dir=spool_dir,
        max_record_bytes=config.max_doc_bytes, batch_rows=config.dataset_batch_size, batch_bytes=batch_bytes, trust_stamps=not config.rehash,
    )  # fmt: skip
    shape = None
    if wanted.template and given.kind.plain:
        raise SourceError(f"{given.spec}: is plain text, which holds no conversations; data_format chat (--mode sft) reads JSON lines, JSON, Parquet and Arrow")
    if not given.kind.plain:
        found = columns_of(given)
        shape = (
            choose_chat_shape(found, source=given.spec, text_column=config.text_column)
            if wanted.template
            else choose_shape(found, source=given.spec, text_column=config.text_column, template=config.text_template)
        )
        source = replace(source, columns=shape.columns)
    what = identity.transform_identity(config, wanted.tokenizer, given, shape, wanted.template)
    key = digest_json(what)[:40]
    to_text = ToText(shape=shape or TextShape(name="plain text"), plain=shape is None, max_doc_bytes=config.max_doc_bytes)
    return Stream(given, replace(source, transform_key=key), to_text, what, key, is_chat=wanted.template is not None)


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
