"""Train a fast byte-level BPE tokenizer, streaming its documents.

    python scripts/train_tokenizer.py --dataset F... --vocab_size 128000 --output_dir tokenizers/mine
    python scripts/train_tokenizer.py --convert SLOW_DIR --output_dir tokenizers/fast

Byte-level, so that every text round-trips exactly and nothing is unknown. What is kept in memory grows with the
distinct pre-tokens of the corpus (inside the trainer), not with the corpus. The same documents give the same bytes, on
any number of threads.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from moai.core.config import option, resolve
from moai.core.errors import ConfigError, MoaiError, SourceError, StorageError, TooManyBadRecords
from moai.core.files import write_atomic
from moai.core.progress import Waiting
from moai.engine.pipeline import Meter, tallied
from moai.sources.discover import Input, discover, some
from moai.sources.kinds import Stream
from moai.sources.local import LocalSource
from moai.sources.mistaken import without_mistaken
from moai.sources.schema import columns_of
from moai.tokenizers.convert import convert
from moai.transforms.shapes import TextShape, choose_shape
from moai.transforms.text import ToText

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>", "<|endoftext|>", "<|im_start|>", "<|im_end|>")
"""Ids 0..6, in this order."""

_SAMPLE_DOCUMENTS = 200
_FEW_BAD, _BAD_RATIO = 10, 0.001
_LEAST_VOCABULARY = 300  # 256 bytes, the special tokens, and a few merges: below that nothing is learned

_SPLIT = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",  # English contractions
        r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+",  # a word of any script, with the space or bracket before it: Hangul too
        r"\p{N}{1,3}",  # at most three digits, so that numbers have few spellings
        r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*",  # punctuation, with the line end behind it: code
        r"\s*[\r\n]+",
        r"\s+(?!\S)|\s+",  # indentation, leaving one space to the word that follows
    )
)


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Tokenizer: what it learns from and where it goes."""

    dataset: tuple[str, ...] = option(
        (),
        "what to learn from: files, folders, globs or Hub names, as for train.py",
        names=("train_file", "input_files"),
    )
    dataset_config: str | None = option(None, "configuration of the first Hub dataset, where its name carries none")
    text_column: str | None = option(
        None, "the column that holds the text; without it the shape is found from the schema"
    )
    text_template: str | None = option(None, "text from several columns, as in '{title}\\n\\n{body}'")
    txt_document: str = option("line", "what a document is in a .txt file", choices=("line", "file"))
    vocab_size: int = option(128_000, "tokens, special ones and the 256 bytes included")
    min_frequency: int = option(2, "pairs seen less often are not merged")
    model_max_length: int = option(
        32_768, "tokens a model that uses it can take, as written into tokenizer_config.json"
    )
    convert: str | None = option(
        None,
        "a slow-only tokenizer directory (vocab.txt, a SentencePiece .model): write it as a fast one instead of "
        "training",
    )
    output_dir: str = option("", "where tokenizer.json and tokenizer_config.json go")
    overwrite: bool = option(False, "replace the tokenizer in an output_dir that is not empty")

    def __post_init__(self) -> None:
        if not self.output_dir:
            raise ConfigError("no place for the tokenizer: set --output_dir DIR")
        if bool(self.dataset) == bool(self.convert):
            raise ConfigError(
                "name what to learn from (--dataset FILE...) or what to convert (--convert DIR), one of the two"
            )
        if self.vocab_size < _LEAST_VOCABULARY:
            raise ConfigError(
                f"vocab_size = {self.vocab_size}: must be at least {_LEAST_VOCABULARY} (256 bytes, "
                f"{len(SPECIAL_TOKENS)} special tokens, merges)"
            )
        if self.min_frequency < 1:
            raise ConfigError(f"min_frequency = {self.min_frequency}: must be at least 1")


def main(argv: Sequence[str], *, prog: str = "scripts/train_tokenizer.py") -> int:
    """The command. Returns the exit code."""
    try:
        config = resolve([TokenizerConfig], argv, os.environ, prog=prog, description=__doc__ or "")[TokenizerConfig]
        place = _output_place(config)
        try:
            if config.convert:
                print(convert(Path(config.convert), place))
            else:
                _train_into(place, config)
        except OSError as error:
            if isinstance(error, MoaiError) or not error.filename:
                raise
            raise StorageError(
                f"{error.filename}: {error.strerror}; free space there or name another --output_dir"
            ) from error
    except MoaiError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(place)
    return 0


def train(documents: Iterable[str], *, vocab_size: int, min_frequency: int = 2) -> Tokenizer:
    """A byte-level BPE of at most `vocab_size` tokens; ids 0..6 are SPECIAL_TOKENS."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # all 256 bytes, whether the corpus shows them or not
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def save(tokenizer: Tokenizer, place: Path, *, model_max_length: int) -> None:
    """tokenizer.json, tokenizer_config.json and a ChatML template, as `AutoTokenizer.from_pretrained(place)` reads
    them.
    """
    settings = {
        "bos_token": "<s>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|endoftext|>",
        "model_max_length": model_max_length,
        "pad_token": "<pad>",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
    }
    place.mkdir(parents=True, exist_ok=True)
    write_atomic(place / "tokenizer_config.json", (json.dumps(settings, indent=2) + "\n").encode())
    write_atomic(place / "chat_template.jinja", Path(__file__).with_name("chatml.jinja").read_bytes())
    # Last: a directory without it is no tokenizer, a directory without the other one loads without an end-of-document
    # token.
    write_atomic(place / "tokenizer.json", tokenizer.to_str(pretty=True).encode())


def _train_into(place: Path, config: TokenizerConfig) -> None:
    started = time.monotonic()
    documents = Documents(config)
    with ExitStack() as waiting:
        total = sum(given.text_bytes for given in documents.inputs)
        reading = waiting.enter_context(Waiting("Reading", total=total, unit="MB", scale=1e6, say=_say))

        def texts() -> Iterator[str]:
            for text in documents:
                reading.add(documents.raw_bytes - reading.done)
                yield text
            waiting.close()
            waiting.enter_context(Waiting(f"Learning {config.vocab_size:,} tokens", say=_say))

        tokenizer = train(texts(), vocab_size=config.vocab_size, min_frequency=config.min_frequency)
    if not documents.num_bytes:
        raise SourceError(
            f"{', '.join(config.dataset)}: no text in {documents.read} records, so there is nothing to learn from"
        )
    encoded = [tokenizer.encode(text, add_special_tokens=False).ids for text in documents.sample]
    for text, ids in zip(documents.sample, encoded):
        assert tokenizer.decode(ids, skip_special_tokens=False) == text, (
            f"not byte-level: {text[:80]!r} does not round-trip"
        )
    save(tokenizer, place, model_max_length=config.model_max_length)
    size = tokenizer.get_vocab_size()
    short = (
        ""
        if size == config.vocab_size
        else f" ({config.vocab_size:,} asked; no other pair is seen {config.min_frequency} times)"
    )
    density = sum(len(text.encode()) for text in documents.sample) / max(1, sum(map(len, encoded)))
    passed_over = (
        f", {documents.bad} bad records passed over (the first: {documents.first_bad})" if documents.bad else ""
    )
    print(
        f"{documents.read:,} documents, {documents.num_bytes / 1e6:,.1f} MB, {time.monotonic() - started:.1f} "
        f"s{passed_over}"
    )
    print(
        f"{size:,} tokens{short}; {density:.2f} bytes a token and exact round trip on the first "
        f"{len(documents.sample)} documents"
    )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _output_place(config: TokenizerConfig) -> Path:
    place = Path(config.output_dir).expanduser()
    if place.exists() and not place.is_dir():
        raise ConfigError(f"--output_dir {place}: is a file; name a directory")
    if place.is_dir() and any(place.iterdir()) and not config.overwrite:
        raise ConfigError(f"--output_dir {place}: is not empty; name another one or add --overwrite")
    return place


@dataclass
class Documents:
    """The documents' texts, one at a time, from any input that `--dataset` takes; counts what it meets and keeps a
    sample.
    """

    config: TokenizerConfig
    read: int = 0
    raw_bytes: int = 0
    """Of the files, decompressed."""
    num_bytes: int = 0
    bad: int = 0
    first_bad: str = ""
    files: dict[str, bool] = field(default_factory=dict)
    """Those with records, and whether any could be read. A file that is one record counts as a record alone."""
    sample: list[str] = field(default_factory=list)

    @cached_property
    def inputs(self) -> list[Input]:
        return [
            given
            for index, spec in enumerate(self.config.dataset)
            for given in discover(spec, None if index else self.config.dataset_config)
        ]

    def __iter__(self) -> Iterator[str]:
        for given in without_mistaken(self.inputs, 0.0):
            yield from map(self._watched, self._of_input(given))
        if lost := [path for path, read in self.files.items() if not read]:
            raise TooManyBadRecords(
                f"nothing could be read of {len(lost)} of {len(self.files)} files: {some(lost)}; mend or remove them; "
                f"the first: {self.first_bad}"
            )
        if self.bad > _FEW_BAD and self.bad > _BAD_RATIO * self.read:
            raise TooManyBadRecords(
                f"{self.bad:,} of {self.read:,} records are bad, more than {_BAD_RATIO:.1%}; the first: "
                f"{self.first_bad}"
            )

    def _watched(self, text: str) -> str:
        self.num_bytes += len(text.encode())
        if len(self.sample) < _SAMPLE_DOCUMENTS and 0 < len(text) < 100_000:
            self.sample.append(text)
        return text

    def _of_input(self, given: Input) -> Iterator[str]:
        config = self.config
        kind = given.kind.having(txt_document=config.txt_document)
        shape = TextShape(name="plain text")
        if not kind.plain:
            shape = choose_shape(
                columns_of(given), source=given.place, text_column=config.text_column, template=config.text_template
            )
        # One shard without end: every file is read once from its beginning, and nothing is cached or spooled.
        source = LocalSource(
            name=given.name,
            kind=kind,
            files=given.files,
            shard_bytes=1 << 62,
            cache=Path(os.devnull),
            spool_dir=Path(os.devnull),
            columns=shape.columns,
            batch_rows=256,
            trust_stamps=False,
        )
        to_text = ToText(shape=shape, plain=kind.plain)
        is_one_record = isinstance(kind, Stream) and kind.is_one_record
        for shard in source.shards():
            meter, before = Meter(), self.raw_bytes
            for batch in source.read(shard, meter):
                self.raw_bytes = before + meter.num_bytes
                with tallied() as tally:
                    texts = to_text.strings(batch)
                if kind.plain:  # a blank line is no document
                    texts = [text for text in texts if text.strip()]
                self.read += len(texts) + tally.counts["quarantined"]
                self.bad += tally.counts["quarantined"]
                bad_in = Counter(bad["segment"] for bad in tally.quarantine)
                for segment, records in Counter(batch["segment"].to_pylist()).items() if not is_one_record else ():
                    path = shard.segments[segment].file.path
                    self.files[path] = self.files.get(path, False) or records > bad_in[segment]
                if tally.quarantine and not self.first_bad:
                    bad = tally.quarantine[0]
                    self.first_bad = (
                        f"{shard.segments[bad['segment']].file.path}, line {bad['line'] + 1}: {bad['detail']}"
                    )
                yield from texts
