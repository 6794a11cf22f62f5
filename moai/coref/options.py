"""The flags of scripts/prepare_entity_coref_v2.py and of `python -m moai entity-coref`."""

from __future__ import annotations

from dataclasses import dataclass

from moai.core.config import option
from moai.core.errors import ConfigError
from moai.coref.korean import KIWI_MODELS
from moai.coref.placement import MODES
from moai.coref.selection import POLICIES


@dataclass(frozen=True)
class Preset:
    """A public data set by the name people call it: where it is, and the column of its text."""

    spec: str
    text_column: str


PRESETS = {
    "naver_news": Preset("dev7halo/naver-news-summarization-ko-with-gen@train", "document"),
    "hplt": Preset("HPLT/HPLT2.0_cleaned:kor_Hang@train", "text"),
    "air_bench": Preset("AIR-Bench/qa_news_ko:AIR-Bench_24.05@corpus_default", "text"),
    "twice_summ": Preset("nmixx-fin/twice_kr_finance_news_summ@train", "text"),
    "twice_bqa": Preset("nmixx-fin/twice_kr_news_bqa_cls@train", "text"),
}
"""What is read where --input names nothing, in this order."""


@dataclass(frozen=True, kw_only=True)
class CorefConfig:
    """Entity-coref: from Korean text to samples in which a repeated name is masked and labelled."""

    input: tuple[str, ...] = option(
        (), "files, folders, globs or Hub names (name[:config][@split]); an existing path wins over a name"
    )
    sources: tuple[str, ...] = option(
        (), f"data sets by name: {', '.join(PRESETS)}; all of them where --input names nothing"
    )
    text_column: str | None = option(
        None,
        "the column of --input that holds the text; without it the shape is found from the schema",
        affects_output=True,
    )
    text_template: str | None = option(
        None, "text from several columns of --input, as in '{title}\\n\\n{body}'", affects_output=True
    )
    id_column: str = option(
        "id", "the column that names a document; one without it is named by the hash of its text", affects_output=True
    )
    model: str = option(
        "kakaobank/kf-deberta-base", "directory or Hub name with the tokenizer.json of the model to train, or that file"
    )
    mask_token: str | None = option(
        None, "the tokenizer's mask, where it is neither [MASK] nor <mask>", affects_output=True
    )
    output_dir: str = option("./prepared_datasets", "the corpus is published under it, as entity_coref_v2_<seq_len>")
    seq_len: int = option(2048, "tokens in a row at most, ends included", affects_output=True)
    mode: str = option(
        "span",
        "one mask a token of the mention; only mentions of one token; or the prior textual form, without labels",
        affects_output=True,
        choices=MODES,
    )
    skip_widened: bool = option(False, "leave out mentions whose tokens hold more than the name", affects_output=True)
    max_entity_freq: int = option(1000, "samples of one name at most, over the whole corpus", affects_output=True)
    cap_policy: str = option(
        "hash",
        "which samples of a name stay: by hash, whatever the order, or the first ones of the input",
        affects_output=True,
        choices=POLICIES,
    )
    max_samples: int | None = option(
        None, "samples in all, exactly, if there are that many; chosen as --cap-policy says", affects_output=True
    )
    validation_ratio: float = option(
        0.1, "share of the documents whose samples have 'validation' in the column split", affects_output=True
    )
    min_length: int = option(800, "rule 1: characters of a document at least", affects_output=True)
    max_length: int = option(2500, "rule 1: characters of a document at most", affects_output=True)
    min_sentences: int = option(3, "rule 2: full stops, question and exclamation marks at least", affects_output=True)
    min_hangul_ratio: float = option(0.40, "rule 3: share of Hangul syllables at least", affects_output=True)
    max_special_ratio: float = option(
        0.30,
        "rule 4: share of characters that are neither alphanumeric nor space, newline or tab, at most",
        affects_output=True,
    )
    min_nnp_ratio: float = option(
        0.05, "rule 5: share of proper nouns among the morphemes at least", affects_output=True
    )
    max_nnp_ratio: float = option(
        0.20, "rule 5: share of proper nouns among the morphemes at most", affects_output=True
    )
    pronoun_filter: bool = option(
        True, "rule 6: drop documents with a pronoun; --no-pronoun-filter keeps them", affects_output=True
    )
    entity_tags: tuple[str, ...] = option(("NNP",), "Kiwi's tags that make a name", affects_output=True)
    merge_latin: bool = option(
        False, "read Latin letters and a noun right behind them as one name (SK + 하이닉스)", affects_output=True
    )
    max_mentions: int = option(
        3, "later mentions of a name that become samples, in one document at most", affects_output=True
    )
    min_distance: int = option(10, "characters from the first mention to the masked one at least", affects_output=True)
    max_distance: int = option(2000, "characters from the first mention to the masked one at most", affects_output=True)
    kiwi_model: str = option("cong", "Kiwi's model type", affects_output=True, choices=KIWI_MODELS)
    num_workers: int | None = option(None, "worker processes; 0 works in this process", env="DATASET_NUM_PROC")
    start_method: str = option(
        "auto",
        "how workers start: forked from one process that holds Kiwi, or spawned with one Kiwi each; auto spawns only "
        "where a loaded process cannot be forked",
        env="MOAI_START_METHOD",
        choices=("auto", "forkserver", "spawn"),
    )
    token_chunk_size: int = option(20_000, "samples in a file of the corpus, about", affects_output=True)
    tokenizer_batch_size: int = option(
        4096, "documents tokenized in one call at most; a worker has 16 at hand at a time"
    )
    shard_bytes: int = option(1_000_000, "source bytes in a shard, the unit of work and of resume", affects_output=True)
    max_bad_ratio: float = option(
        0.001, "share of unreadable records and of documents Kiwi fails on (of more than 10) above which the run fails"
    )
    stall_timeout: float = option(600.0, "seconds a worker may take for one document", env="MOAI_STALL_TIMEOUT")
    cache_dir: str | None = option(None, "where unfinished work lives; by default OUTPUT_DIR/cache_entity_coref")
    replace: bool = option(False, "set aside a corpus of other settings that stands where this one shall be published")
    rehash: bool = option(False, "read and digest all input again instead of trusting unchanged file stamps")
    report_samples: int = option(50, "samples shown in report.html", affects_output=True)

    def __post_init__(self) -> None:
        for name in ("sources", "entity_tags"):  # a,b is as good as a b
            object.__setattr__(self, name, tuple(part for word in getattr(self, name) for part in word.split(",")))
        for name, least in (
            ("seq_len", 8),
            ("max_entity_freq", 1),
            ("token_chunk_size", 1),
            ("tokenizer_batch_size", 1),
            ("shard_bytes", 1000),
            ("min_length", 0),
            ("max_mentions", 1),
            ("min_distance", 1),
            ("report_samples", 0),
        ):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} = {getattr(self, name)}: must be at least {least}")
        for name in (
            "min_hangul_ratio",
            "max_special_ratio",
            "min_nnp_ratio",
            "max_nnp_ratio",
            "validation_ratio",
            "max_bad_ratio",
        ):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} = {getattr(self, name)}: must lie between 0 and 1")
        for low, high in (
            ("min_length", "max_length"),
            ("min_nnp_ratio", "max_nnp_ratio"),
            ("min_distance", "max_distance"),
        ):
            if getattr(self, low) > getattr(self, high):
                raise ConfigError(
                    f"{low} = {getattr(self, low)} is above {high} = {getattr(self, high)}: no document could pass"
                )
        if self.max_samples is not None and self.max_samples < 1:
            raise ConfigError(f"max_samples = {self.max_samples}: must be at least 1, or not set")
        if self.num_workers is not None and self.num_workers < 0:
            raise ConfigError(f"num_workers = {self.num_workers}: must be 0 (work in this process) or more")
        unknown = [name for name in self.sources if name not in PRESETS]
        if unknown:
            raise ConfigError(
                f"sources: {unknown[0]!r} is none of {', '.join(PRESETS)}; files and other data sets are named with "
                f"--input"
            )
        if not self.entity_tags:
            raise ConfigError("entity_tags is empty: no name could be found; the default is NNP")

    @property
    def inputs(self) -> tuple[tuple[str, str | None], ...]:
        """(what to read, the column of its text if it is known), in order."""
        names = self.sources or (() if self.input else tuple(PRESETS))
        return (
            *((spec, self.text_column) for spec in self.input),
            *((PRESETS[name].spec, PRESETS[name].text_column) for name in names),
        )
