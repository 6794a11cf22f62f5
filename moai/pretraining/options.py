"""The data flags of train.py and of `python -m moai prepare`: one dataclass for both."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from datetime import date
from importlib import import_module
from typing import Any

from moai.core.config import option
from moai.core.errors import ConfigError


def _from(module: str, name: str) -> Callable[..., Any]:
    """A function that is imported when it is called: `--help` needs none of what reads data."""
    return lambda *given, **named: getattr(import_module(module), name)(*given, **named)


_DATASET, _PARTS, _RULES = "moai.pretraining.dataset", "moai.transforms.named", "moai.quality.rules"
_FILES = "moai.core.config"
_AGAINST = "moai.pretraining.against"

EXECUTORS = ("auto", "ray")
FORMATS = ("text", "chat")
PACKINGS = ("none", "wrapped", "bfd", "bfd_split")
PII = ("none", "count", "mask")
DEDUPS = ("none", "exact", "minhash")
BACKENDS = ("auto", "tokenizers", "fastokens")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Data: from text to packed rows."""

    dataset: tuple[Any, ...] = option(
        (),
        "files, folders, globs or Hub names (name[:config][@split]), or NAME=PATH[,setting=value...]; an existing path "
        "wins",
        names=("train_file",),
        parse=_from(_DATASET, "parse_dataset"),
        spell=_from(_DATASET, "spelled_dataset"),
    )
    dataset_config: str | None = option(
        None, "configuration of the first dataset, where its name carries none", affects_output=True
    )
    data_format: str = option(
        "text", "what a record is: a text, or a conversation for --mode sft", affects_output=True, choices=FORMATS
    )
    text_column: str | None = option(
        None,
        "the column that holds the text (or the turns); without it the shape is found from the schema",
        affects_output=True,
    )
    text_template: str | None = option(
        None, "text from several columns, as in '{title}\\n\\n{body}'", affects_output=True, only="text"
    )
    txt_document: str = option(
        "line", "what a document is in a .txt file", affects_output=True, choices=("line", "file")
    )
    tokenizer_path: str = option("", "directory or Hub name with a tokenizer.json, or that file")
    eos_token: str | None = option(
        None, "end-of-document token, where the tokenizer's configuration names none", affects_output=True
    )
    add_bos: bool = option(
        False, "begin every document with the tokenizer's BOS token", affects_output=True, only="text"
    )
    split_special_tokens: bool = option(
        False, "read special-token strings inside text as plain text", affects_output=True, only="text"
    )
    chat_template: str | None = option(
        None, "chat: a file with the template, instead of the tokenizer's own", only="chat"
    )
    template_date: str | None = option(
        None, "chat: the day a template that asks for it is told, as 2025-01-31", affects_output=True, only="chat"
    )
    train_on: str = option(
        "all", "chat: the assistant's turns that are learned", affects_output=True, choices=("all", "last"), only="chat"
    )
    long_examples: str = option(
        "drop",
        "chat: what becomes of an example over seq_len",
        affects_output=True,
        choices=("drop", "truncate"),
        only="chat",
    )
    tokenizer_backend: str = option(
        "auto", "what encodes: a faster equal of the reference where there is one, or the one named", choices=BACKENDS
    )
    seq_len: int = option(2048, "tokens in a row", affects_output=True, names=("max_seq_length",))
    packing: str = option(
        "none",
        "how documents share rows; bare --packing is 'wrapped'",
        affects_output=True,
        choices=PACKINGS,
        bare="wrapped",
    )
    long_documents: str = option(
        "truncate",
        "without packing: what becomes of a document over seq_len",
        affects_output=True,
        choices=("truncate", "split"),
        only="text",
    )
    min_chars: int = option(
        1, "drop documents with fewer characters (after stripping white space)", affects_output=True
    )
    max_chars: int | None = option(None, "drop documents with more characters", affects_output=True)
    transforms: tuple[Any, ...] = option(
        (),
        "filters, maps and signals: Name: {field: value} of moai's, or my_module:MyFilter: {field: value} of yours",
        parse=_from(_PARTS, "parse_parts"),
        spell=_from(_PARTS, "spelled_parts"),
    )
    quality: Any = option(  # noqa: RUF009
        None,
        "judge documents by a profile: gopher, fineweb, fineweb2_ko, c4, repetition, code, demo, or a YAML file",
        parse=_from(_RULES, "parse_profile"),
        spell=_from(_RULES, "spelled"),
    )
    quality_set: tuple[str, ...] = option(
        (), "other thresholds than the profile's, as gopher.min_words=40 or gopher.min_stop_words=off"
    )
    dedup: str = option(
        "none", "drop copies, within and across sources: of the same text, or also of similar ones", choices=DEDUPS
    )
    dedup_similarity: float = option(
        0.8, "minhash: share of the word 5-grams of both that two documents have in common at least to be copies"
    )
    languages: tuple[str, ...] = option(
        (), "drop documents that are surely in another language than these, as ko en; what is of none stays"
    )
    decontaminate: tuple[str, ...] = option(
        (), "drop documents that hold items of evaluations: files of JSON lines", parse=_from(_FILES, "parse_files")
    )
    pii: str = option(
        "none", "count personal data (mail, IP, phone, resident numbers), or also put a mask over it", choices=PII
    )
    dedup_against: str | None = option(
        None, "a prepared directory whose documents are there already: what is a copy of one of them goes"
    )
    max_dropped: float | None = option(
        None, "share of the documents read, of all and of each source, above which judging ends the run"
    )
    sample: float = option(1.0, "share of the documents that is taken, by the hash of their text", affects_output=True)
    carry_columns: tuple[str, ...] = option(
        (), "columns of the source that travel beside the rows, a value a piece", affects_output=True
    )
    eval_ratio: float = option(
        0.0, "share of the documents held out of training, by the hash of their text", affects_output=True
    )
    held_out: bool = option(False, "prepare what --eval_ratio holds out, instead of the rest", affects_output=True)
    max_doc_bytes: int = option(16 * 2**20, "quarantine records larger than this", affects_output=True)
    max_bad_ratio: float = option(0.001, "share of quarantined records (of more than 10) above which the run fails")
    max_bad_files: float = option(0.0, "share of files of which nothing can be read above which the run fails")
    shard_bytes: int = option(
        16_000_000, "source bytes in a shard, the unit of work and of resume", affects_output=True
    )
    cache_dir: str = option("~/.cache/moai", "where shards and prepared directories live", env="MOAI_CACHE_DIR")
    cache_scope: str = option(
        "auto", "who sees the cache: all nodes, or one node each", choices=("auto", "shared", "node")
    )
    executor: str = option(
        "auto", "what works on the shards: processes of this machine, or a Ray cluster", choices=EXECUTORS
    )
    num_proc: int | None = option(
        None, "worker processes, or tasks of Ray at a time; 0 works in this process", env="DATASET_NUM_PROC"
    )
    dataset_batch_size: int = option(1000, "documents in a batch at most", env="DATASET_BATCH_SIZE")
    writer_batch_size: int = option(10_000, "rows that wait in memory for the writer", env="DATASET_WRITER_BATCH_SIZE")
    memory_mode: str = option("auto", "how much memory speed may cost", choices=("auto", "memory", "balanced", "disk"))
    stall_timeout: float = option(
        600.0, "seconds without any progress after which preparation counts as failed", env="MOAI_STALL_TIMEOUT"
    )
    rehash: bool = option(False, "read and digest all input again instead of trusting unchanged file stamps")

    def __post_init__(self) -> None:
        for name, least in (
            ("seq_len", 2),
            ("min_chars", 0),
            ("max_doc_bytes", 1),
            ("shard_bytes", 1000),
            ("dataset_batch_size", 1),
            ("writer_batch_size", 1),
        ):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} = {getattr(self, name)}: must be at least {least}")
        if self.num_proc is not None and self.num_proc < 0:
            raise ConfigError(f"num_proc = {self.num_proc}: must be 0 (work in this process) or more")
        if self.executor == "ray" and self.num_proc == 0:
            raise ConfigError("num_proc = 0 with executor = ray: tasks at a time; leave it away for all of its CPUs")
        if not 0 <= self.eval_ratio < 1 or (self.held_out and not self.eval_ratio):
            raise ConfigError(
                f"eval_ratio = {self.eval_ratio}: must lie between 0 (nothing is held out) and 1"
                + (", and above 0 with --held_out" if self.held_out else "")
            )
        if not 0 < self.sample <= 1:
            raise ConfigError(f"sample = {self.sample}: must lie above 0, and 1 at most")
        for name in ("max_bad_ratio", "max_bad_files"):
            if not 0 <= (share := getattr(self, name)) <= 1:
                raise ConfigError(f"{name} = {share}: must lie between 0 and 1")
        if self.max_chars is not None and self.max_chars < self.min_chars:
            raise ConfigError(
                f"max_chars = {self.max_chars} is below min_chars = {self.min_chars}: no document could pass"
            )
        if self.text_column and self.text_template:
            raise ConfigError(
                "text_column and text_template are both set: the template names its columns itself, drop text_column"
            )
        if self.max_dropped is not None and not 0 <= self.max_dropped <= 1:
            raise ConfigError(f"max_dropped = {self.max_dropped}: must lie between 0 and 1")
        if self.quality_set and not self.has_rules:
            raise ConfigError("quality_set is set and quality is not: name a profile, as --quality gopher")
        if not 0.5 <= self.dedup_similarity <= 1:
            raise ConfigError(f"dedup_similarity = {self.dedup_similarity}: must lie between 0.5 and 1")
        if self.dedup_similarity != 0.8 and self.dedup != "minhash":
            raise ConfigError(
                f"dedup_similarity = {self.dedup_similarity} with dedup = {self.dedup}: is for --dedup minhash"
            )
        if self.dedup_against and self.dedup == "none":
            raise ConfigError("dedup_against is set and dedup is not: add --dedup exact or --dedup minhash")
        if self.max_dropped is not None and not self.judges:
            raise ConfigError(
                "max_dropped is set, and neither quality nor dedup is, nor languages or decontaminate: nothing would "
                "be dropped"
            )
        if self.transforms:
            _from("moai.engine.part", "ordered")(self.transforms)
        if self.data_format == "chat":
            self._check_chat()

    def _check_chat(self) -> None:
        """What has no meaning for conversations is refused rather than passed over."""
        if self.packing not in ("none", "bfd"):
            raise ConfigError(
                f"packing = {self.packing}: would cut conversations in two; with data_format chat choose bfd, or none"
            )
        if given := self._set_only_for("text"):
            raise ConfigError(
                f"{given[0]} = {getattr(self, given[0])}: is for texts; with data_format chat the chat template writes "
                f"the text, drop it"
            )
        if self.pii == "mask":
            raise ConfigError("pii = mask: of conversations nothing is changed; --pii count only counts")
        if self.template_date is not None:
            try:
                date.fromisoformat(self.template_date)
            except ValueError as error:
                raise ConfigError(f"template_date = {self.template_date!r}: is no day like 2025-01-31") from error

    @property
    def judges(self) -> bool:
        """Whether documents are measured and judged before they are packed."""
        return self.has_rules or self.dedup != "none" or self.pii != "none"

    @property
    def has_rules(self) -> bool:
        """Whether a document may go for what it is."""
        own = any(
            one.get("quality") if isinstance(one, Mapping) else getattr(one, "quality", None) for one in self.dataset
        )
        return bool(self.quality or self.languages or self.decontaminate or own)

    @property
    def copies(self) -> dict[str, Any]:
        """What counts as a copy, as keys and manifests say it."""
        similarity = {"similarity": self.dedup_similarity} if self.dedup == "minhash" else {}
        against = {"against": _from(_AGAINST, "digest_of")(self.dedup_against)} if self.dedup_against else {}
        return {"dedup": self.dedup, **similarity, **against} if self.dedup != "none" else {}

    def profile(self) -> Any:
        """The thresholds that documents are judged by (moai.quality.rules.Profile). Raises ConfigError."""
        found = _from(_RULES, "parse_profile")(self.quality or {})
        return found.asked(self.languages, decontaminates=bool(self.decontaminate)).changed(self.quality_set)

    def of_mode(self, mode: str) -> DataConfig:
        """The data of a training: conversations for sft, texts for pretrain. Raises ConfigError where data_format says
        otherwise.
        """
        if mode == "sft":
            return replace(self, data_format="chat")
        if self.data_format != "text":
            raise ConfigError(f"data_format = {self.data_format} with mode = {mode}: conversations are for --mode sft")
        return self

    def require(self) -> DataConfig:
        """This configuration if it names data and a tokenizer. Raises ConfigError with the missing flag."""
        if self.data_format == "text" and (given := self._set_only_for("chat")):
            raise ConfigError(
                f"{given[0]} = {getattr(self, given[0])}: is for conversations; add --data_format chat (train.py: "
                f"--mode sft)"
            )
        if not self.dataset:
            raise ConfigError("no data: name files, folders or Hub datasets with --dataset (or --train_file)")
        if not self.tokenizer_path:
            raise ConfigError(
                "no tokenizer: set --tokenizer_path DIR (train one: python scripts/train_tokenizer.py --dataset FILE "
                "--output_dir DIR)"
            )
        return self

    def _set_only_for(self, data_format: str) -> list[str]:
        """Flags that were set and have a meaning for that format alone."""
        return [
            f.name for f in fields(self) if f.metadata["only"] == data_format and getattr(self, f.name) != f.default
        ]


@dataclass(frozen=True, kw_only=True)
class SaveConfig:
    """Saving: what is prepared, under a name of your own."""

    save_to: str | None = option(
        None, "also give the prepared directory this name: links or copies of all that training needs"
    )
    publish: str | None = option(
        None, "upload the prepared directory to a store, as s3://bucket/prefix: below it, named by its content"
    )
    overwrite: bool = option(False, "replace a prepared directory of other content that save_to names")

    def __post_init__(self) -> None:
        if self.overwrite and self.save_to is None:
            raise ConfigError("overwrite is set and save_to is not: name the directory with --save_to DIR")
